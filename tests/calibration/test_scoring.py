import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from hp_edit_trl import HPScorerReward
from hp_edit_trl.calibration import probe_judge, read_scores, score_dataset
from hp_edit_trl.judges import CachedJudge, Judgement
from tests.helpers import RuleJudge, make_edits


def test_scores_are_those_of_the_scorer_and_carry_what_made_them(tmp_path):
    edits = make_edits(4)
    scorer = HPScorerReward(RuleJudge())
    report = score_dataset(scorer, edits, tmp_path / "out" / "scores.jsonl", chunk_size=3)
    lines = read_scores(tmp_path / "out" / "scores.jsonl")
    assert [(line["id"], line["editor"]) for line in lines] == [(row["id"], row["editor"]) for row in edits]
    for row, line in zip(edits, lines, strict=True):
        (expected,) = scorer.judge_edits([row["prompt"]], [row["edit"]], [[row["image"]]], [row["task"]], [None])
        assert line["score"] == expected.score == round(5 * row["edit"].getpixel((0, 0))[0] / 255)
        assert line["prompt"] == f"hp-edit-trl:{row['task']}:1" and line["task"] == row["task"]
        assert line["judge"] == "judge RuleJudge, name rule, score_mode integer" and line["score_mode"] == "integer"
    assert len(report.judgements) == 8 and report.kept == 0
    table = report.table(input_price=2.0, output_price=10.0)
    assert "| tokens read, written | 800, 8 |" in table
    assert "| cost, in all and per 1,000 | 0.00168, 0.21 |" in table  # (800 x 2 + 8 x 10) / 1e6, and of 8 edits
    assert "cost" not in report.table()


def test_a_run_goes_on_with_what_has_no_score(tmp_path, caplog):
    edits, file = make_edits(6), tmp_path / "scores.jsonl"
    flaky = RuleJudge(rule=lambda text, pictures: "hm" if "number 2" in text else 3)
    report = score_dataset(HPScorerReward(flaky), edits, file, chunk_size=5)
    assert sum(one.score is None for one in report.judgements) == 2
    assert "| answers without a score | 2 |" in report.table()
    assert "'case-2'" in caplog.text and "answered 'hm'" in caplog.text
    judge = RuleJudge()
    report = score_dataset(HPScorerReward(judge), edits, file)
    assert judge.asked == 2 and report.kept == 10
    assert [line["score"] is None for line in read_scores(file)] == [False] * 12
    # A score that is there is not taken back by a later line without one
    with open(file, "a") as lines:
        lines.write(json.dumps({**read_scores(file)[0], "score": None}) + "\n")
    assert read_scores(file)[0]["score"] == 3.0


def test_the_edits_of_a_case_are_judged_together(tmp_path):
    edits = make_edits(4, editors=("one",)).to_list() + make_edits(4, editors=("two",)).to_list()
    seen = []
    judge = RuleJudge(rule=lambda text, pictures: seen.append(text.split("number ")[1][0]) or 3)
    score_dataset(HPScorerReward(judge), Dataset.from_list(edits), tmp_path / "scores.jsonl")
    assert "".join(seen) == "00112233"


def test_a_line_that_was_cut_off_is_reported_and_scored_again(tmp_path, caplog):
    edits, file = make_edits(3), tmp_path / "scores.jsonl"
    score_dataset(HPScorerReward(RuleJudge()), edits, file)
    whole = read_scores(file)
    file.write_bytes(file.read_bytes()[:-40])
    assert len(read_scores(file)) == 5 and "line 6: not a whole score" in caplog.text
    judge = RuleJudge()
    score_dataset(HPScorerReward(judge), edits, file)
    assert judge.asked == 1
    assert [line["score"] for line in read_scores(file)] == [line["score"] for line in whole]


def test_scores_of_two_scorers_are_not_mixed(tmp_path):
    edits, file = make_edits(2), tmp_path / "scores.jsonl"
    score_dataset(HPScorerReward(RuleJudge()), edits, file)
    before = file.read_bytes()
    with pytest.raises(
        ValueError, match="scores of another scorer.*its judge is 'judge RuleJudge, name rule,.*another file"
    ):
        score_dataset(HPScorerReward(RuleJudge("second")), edits, file)
    with pytest.raises(ValueError, match="its prompt is 'hp-edit-trl:add:1', now it is 'hp-edit-trl:base:1'"):
        score_dataset(HPScorerReward(RuleJudge(), task="base"), edits, file)
    # A prompt that was changed without a new revision
    scorer = HPScorerReward(RuleJudge())
    prompt = scorer.scorer_prompts["add"]
    scorer.scorer_prompts["add"] = type(prompt)(prompt.task, prompt.revision, prompt.text + " Be strict.")
    with pytest.raises(ValueError, match="its scorer_prompt_sha is"):
        score_dataset(scorer, edits, file)
    assert file.read_bytes() == before


def test_images_that_cannot_be_read_are_missing_scores(tmp_path, caplog):
    rows = make_edits(4, editors=("one",))
    broken = [{**row, "edit": {"path": None, "bytes": b"no picture"} if i == 1 else row["edit"], "image": row["image"] if i != 2 else None} for i, row in enumerate(rows)]  # fmt: skip
    for row in broken:
        for column in ("image", "edit"):
            if isinstance(row[column], Image.Image):
                row[column] = ImageFeature().encode_example(row[column])
    edits = Dataset.from_list(broken).cast_column("image", ImageFeature()).cast_column("edit", ImageFeature())
    report = score_dataset(HPScorerReward(RuleJudge()), edits, tmp_path / "scores.jsonl")
    assert [line["score"] is None for line in read_scores(tmp_path / "scores.jsonl")] == [False, True, True, False]
    assert "The edit of case 'case-1' by 'one' cannot be decoded" in report.unreadable[0]
    assert "Case 'case-2' has no image" in report.unreadable[1]
    assert "| images that cannot be decoded | 2 |" in report.table()


def test_a_judge_that_dies_half_way_keeps_what_it_scored(tmp_path):
    class Dies(RuleJudge):
        def __call__(self, conversations):
            if self.asked >= 8:
                return [Judgement(None, "APIConnectionError: nobody there", answered=False) for _ in conversations]
            return super().__call__(conversations)

    edits, file = make_edits(12), tmp_path / "scores.jsonl"
    with pytest.raises(ConnectionError, match="no answer to 8 edits in a row.*nobody there.*run it again"):
        score_dataset(HPScorerReward(Dies()), edits, file, chunk_size=8)
    assert sum(line["score"] is not None for line in read_scores(file)) == 8
    judge = RuleJudge()
    score_dataset(HPScorerReward(judge), edits, file, chunk_size=8)
    assert judge.asked == 16
    # Small chunks add up, and a few failures between answers do not
    with pytest.raises(ConnectionError, match="no answer to 9 edits in a row"):
        score_dataset(HPScorerReward(Dies()), edits, tmp_path / "small.jsonl", chunk_size=3)

    class Hiccups(RuleJudge):
        def __call__(self, conversations):
            answers = super().__call__(conversations)
            return [Judgement(None, "busy", answered=False) if i < 7 else one for i, one in enumerate(answers)]

    report = score_dataset(HPScorerReward(Hiccups()), edits, tmp_path / "hiccups.jsonl", chunk_size=8)
    assert "| no answer | 21 |" in report.table()


def test_an_edit_that_was_changed_is_scored_again(tmp_path, caplog):
    edits, file = make_edits(3), tmp_path / "scores.jsonl"
    score_dataset(HPScorerReward(RuleJudge()), edits, file)
    rows = edits.to_list()
    rows[0]["edit"] = ImageFeature().encode_example(Image.new("RGB", (64, 64), (255, 0, 0)))
    rows[3]["prompt"] = "Something else, number 9"
    changed = Dataset.from_list(rows, features=edits.features)
    judge = RuleJudge()
    report = score_dataset(HPScorerReward(judge), changed, file)
    assert judge.asked == 2 and report.kept == 4 and "2 edits were changed since they were scored" in caplog.text
    assert read_scores(file)[0]["score"] == 5
    # A score of other images does not stand in for a failure
    rows[0]["edit"] = ImageFeature().encode_example(Image.new("RGB", (64, 64), (0, 0, 9)))
    score_dataset(
        HPScorerReward(RuleJudge(rule=lambda *_: "hm")), Dataset.from_list(rows, features=edits.features), file
    )
    assert read_scores(file)[0]["score"] is None


def test_options_and_lines_that_make_no_sense(tmp_path, caplog):
    scorer = HPScorerReward(RuleJudge())
    for size in (0, -1):
        with pytest.raises(ValueError, match="chunk_size=.* must be at least 1"):
            score_dataset(scorer, make_edits(2), tmp_path / "scores.jsonl", chunk_size=size)
    with pytest.raises(ValueError, match="num_cases=1: a judge is probed with two"):
        probe_judge(scorer, make_edits(3), num_cases=1)
    lines = ['{"id": ["a"], "editor": null, "score": 1}', '{"id": 3, "editor": null, "score": 1}', "[1]", '{"id": "x"}', '{"id": "case-0", "editor": "one", "score": 2}']  # fmt: skip
    (tmp_path / "scores.jsonl").write_text("\n".join(lines))
    assert [line["id"] for line in read_scores(tmp_path / "scores.jsonl")] == ["case-0"]
    assert caplog.text.count("not a whole score") == 4
    report = score_dataset(scorer, make_edits(2), tmp_path / "scores.jsonl")  # a score whose images nobody knows
    assert report.kept == 0


def test_half_a_character_in_an_answer_is_no_accident(tmp_path):
    judge = RuleJudge(rule=lambda text, pictures: "good \ud83d")
    report = score_dataset(HPScorerReward(CachedJudge(judge, tmp_path / "c")), make_edits(2), tmp_path / "s.jsonl")
    assert [one.answer for one in report.judgements] == ["good ?"] * 4


def test_bad_datasets(tmp_path):
    scorer, edits = HPScorerReward(RuleJudge()), make_edits(2)
    for dataset, message in [
        (edits.remove_columns("edit"), "must have a column 'edit'"),
        (edits.remove_columns("id"), "has no column 'id'"),
        (edits.remove_columns("editor"), "Row 1 of dataset has the id 'case-0' of row 0"),
        (edits.remove_columns("prompt"), "has no column 'prompt'"),
        (edits.select([]), "dataset is empty"),
        (edits.map(lambda row: {"task": "crop"}), "No scorer prompt for the task 'crop'"),
    ]:
        with pytest.raises(ValueError, match=message):
            score_dataset(scorer, dataset, tmp_path / "scores.jsonl")
    assert not (tmp_path / "scores.jsonl").exists()
    (tmp_path / "scores.jsonl").write_text('{"id": "case-0", "editor": "one", "task": "add", "score": 7}\n')
    with pytest.raises(ValueError, match="line 1: the score 7 of case 'case-0' is not between 0 and 5"):
        score_dataset(scorer, edits, tmp_path / "scores.jsonl")


@pytest.mark.slow
def test_a_kill_costs_at_most_one_chunk(tmp_path):
    make_edits(20).save_to_disk(tmp_path / "edits")
    code = f"""
import sys, time
from tests.helpers import RuleJudge
from hp_edit_trl import HPScorerReward
from hp_edit_trl.cases import load_edits
from hp_edit_trl.rewards import score_dataset
def slow(text, pictures):
    time.sleep(0.05)
    print("judged", flush=True)
    return 3
score_dataset(HPScorerReward(RuleJudge(rule=slow)), load_edits({str(tmp_path / "edits")!r}), {str(tmp_path / "s.jsonl")!r}, 4)
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    judged = 0
    for kill_at in (7, 15, None):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True)
        while kill_at is None or judged < kill_at:
            if not process.stdout.readline():
                break
            judged += 1
        if kill_at is not None:
            process.send_signal(signal.SIGKILL)
            judged += process.stdout.read().count("judged")
        process.wait(60)
    lines = read_scores(tmp_path / "s.jsonl")
    assert len(lines) == 40 and all(line["score"] == 3 for line in lines)
    assert 40 <= judged <= 40 + 2 * 4


def fair(text, pictures):
    """Scores what a fair judge would: 5 for a change that is redder, 0 if nothing changed or the pictures differ in shape."""
    before, after = (np.asarray(picture, dtype=float) for picture in pictures)
    return 5 if before.shape == after.shape and after[..., 0].mean() - before[..., 0].mean() > 20 else 0


def test_probes_of_a_fair_and_of_biased_judges(caplog):
    rows = []
    for i in range(8):
        source = Image.new("RGB", (32, 32), (10 * i, 90, 30 * i))
        edit = Image.new("RGB", (32, 32), (10 * i + 60, 90, 30 * i))
        rows.append({"id": str(i), "prompt": f"redder {i}", "image": source, "edit": edit, "task": "color"})
    edits = Dataset.from_list(rows)

    def labelled(user):
        """The pictures by their labels, however they are ordered."""
        content = user["content"]
        return [content[i + 1]["image"] for label in ("Image A:", "Image B:") for i, part in enumerate(content) if part.get("text") == label]  # fmt: skip

    class Reads(RuleJudge):
        def __call__(self, conversations):
            return [Judgement(float(self.rule("", labelled(user))), "") for _, user in conversations]

    def table(judge, **kwargs):
        return {row["probe"]: row for row in probe_judge(HPScorerReward(judge), edits, **kwargs)}

    fine = table(Reads(rule=fair))
    # What each probe shows: whose edit, and in which role
    notes = []

    def note(text, pictures):
        before, after = (round(np.asarray(picture, dtype=float)[..., 2].mean() / 30) for picture in pictures)
        edited = [bool(np.asarray(picture)[..., 0].mean() - 10 * number > 30) for picture, number in zip(pictures, (before, after), strict=True)]  # fmt: skip
        notes.append((before == after, *edited))
        return 3

    table(Reads(rule=note))
    assert set(notes[:16]) == {(True, False, True)}  # as given, and edit first
    assert set(notes[16:24]) == {(True, True, False)} and set(notes[24:32]) == {(True, False, False)}
    assert set(notes[32:]) == {(False, False, True)}
    assert fine["as given"]["mean"] == 5 and fine["edit first"]["change"] == 0
    assert fine["unchanged"]["mean"] == 0 and fine["unchanged"]["low"] == 1 and fine["roles swapped"]["mean"] == 0
    assert fine["unrelated"]["scores"] == 8
    # One that goes by the order of the pictures, and one that likes everything
    ordered = table(RuleJudge(rule=lambda text, pictures: fair(text, pictures)))
    assert ordered["edit first"]["shift"] == -5
    generous = table(RuleJudge(rule=lambda text, pictures: 4))
    assert generous["unchanged"]["low"] == 0 and generous["unrelated"]["mean"] == 4
    mute = table(RuleJudge(rule=lambda text, pictures: "no idea"), num_cases=3)
    assert mute["as given"]["failed"] == 3 and mute["as given"]["mean"] is None and mute["unchanged"]["shift"] is None
    with pytest.raises(ValueError, match="there are 1 with readable images"):
        probe_judge(HPScorerReward(RuleJudge()), edits.select([0]))


def test_a_cached_judge_in_bulk(tmp_path):
    judge = RuleJudge()
    scorer = HPScorerReward(CachedJudge(judge, tmp_path / "cache.sqlite"))
    edits = make_edits(3)
    score_dataset(scorer, edits, tmp_path / "a.jsonl")
    report = score_dataset(scorer, edits, tmp_path / "b.jsonl")
    assert judge.asked == 6 and "| of these from the cache | 6 |" in report.table()
    assert "judgements per second" not in report.table()
