import json
import re
import time

import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from hp_edit_trl import HPScorerReward
from hp_edit_trl.calibration import read_scores, score_dataset
from hp_edit_trl.judges import CachedJudge, Judgement, JudgeRefusedError
from tests.helpers import RuleJudge, make_edits
from tests.processes import Script


def squeezed(table):
    return re.sub(" +", " ", table)


def test_scores_are_those_of_the_scorer_and_carry_what_made_them(tmp_path):
    edits = make_edits(4)
    scorer = HPScorerReward(RuleJudge())
    summary = score_dataset(scorer, edits, tmp_path / "out", chunk_size=3)
    lines = read_scores(tmp_path / "out")
    assert lines == read_scores(tmp_path / "out" / "scores.jsonl")
    assert [(line["id"], line["editor"]) for line in lines] == [(row["id"], row["editor"]) for row in edits]
    for row, line in zip(edits, lines, strict=True):
        (expected,) = scorer.judge_edits([row["prompt"]], [row["edit"]], [[row["image"]]], [row["task"]], [None])
        assert line["score"] == expected.score == round(5 * row["edit"].getpixel((0, 0))[0] / 255)
        assert line["scorer_prompt"] == f"hp-edit-trl:{row['task']}:3" and line["task"] == row["task"]
        assert line["judge"] == "judge RuleJudge, name rule, score_mode integer" and line["score_mode"] == "integer"
    assert len(summary.judgements) == 8 and summary.kept == 0
    table = squeezed(summary.table(input_price=2.0, output_price=10.0))
    assert "| tokens, input and output | 800, 8 |" in table
    assert "| cost, total and per 1,000 | 0.00168, 0.21 |" in table  # (800 x 2 + 8 x 10) / 1e6, and of 8 edits
    assert "cost" not in summary.table()


def test_a_run_goes_on_with_what_has_no_score(tmp_path, caplog):
    edits, file = make_edits(6), tmp_path / "scores.jsonl"
    flaky = RuleJudge(rule=lambda text, pictures: "hm" if "number 2" in text else 3)
    summary = score_dataset(HPScorerReward(flaky), edits, tmp_path, chunk_size=5)
    assert sum(one.score is None for one in summary.judgements) == 2
    assert "| answers without a score | 2 |" in squeezed(summary.table())
    assert "'case-2'" in caplog.text and "answered 'hm'" in caplog.text
    judge = RuleJudge()
    summary = score_dataset(HPScorerReward(judge), edits, tmp_path)
    assert judge.asked == 2 and summary.kept == 10
    assert [line["score"] is None for line in read_scores(file)] == [False] * 12
    # A score that is there is not taken back by a later line without one
    with open(file, "a") as lines:
        lines.write(json.dumps({**read_scores(file)[0], "score": None}) + "\n")
    assert read_scores(file)[0]["score"] == 3.0


def test_the_edits_of_a_case_are_judged_together(tmp_path):
    edits = make_edits(4, editors=("one",)).to_list() + make_edits(4, editors=("two",)).to_list()
    seen = []
    judge = RuleJudge(rule=lambda text, pictures: seen.append(text.split("number ")[1][0]) or 3)
    score_dataset(HPScorerReward(judge), Dataset.from_list(edits), tmp_path)
    assert "".join(seen) == "00112233"


def test_a_line_that_was_cut_off_is_reported_and_scored_again(tmp_path, caplog):
    edits, file = make_edits(3), tmp_path / "scores.jsonl"
    score_dataset(HPScorerReward(RuleJudge()), edits, tmp_path)
    whole = read_scores(file)
    file.write_bytes(file.read_bytes()[:-40])
    assert len(read_scores(file)) == 5 and "line 6: not a complete score" in caplog.text
    judge = RuleJudge()
    score_dataset(HPScorerReward(judge), edits, tmp_path)
    assert judge.asked == 1
    assert [line["score"] for line in read_scores(file)] == [line["score"] for line in whole]


def test_scores_of_two_scorers_are_not_mixed(tmp_path):
    edits, file = make_edits(2), tmp_path / "scores.jsonl"
    score_dataset(HPScorerReward(RuleJudge()), edits, tmp_path)
    before = file.read_bytes()
    with pytest.raises(
        ValueError,
        match="scores for the task .* other settings .judge: 'judge RuleJudge, .*another output_dir",
    ):
        score_dataset(HPScorerReward(RuleJudge("second")), edits, tmp_path)
    with pytest.raises(ValueError, match="scorer_prompt: 'hp-edit-trl:add:3' -> 'hp-edit-trl:base:3'"):
        score_dataset(HPScorerReward(RuleJudge(), task="base"), edits, tmp_path)
    # A prompt that was changed without a new revision
    scorer = HPScorerReward(RuleJudge())
    prompt = scorer.scorer_prompts["add"]
    scorer.scorer_prompts["add"] = type(prompt)(prompt.task, prompt.revision, prompt.text + " Be strict.")
    with pytest.raises(ValueError, match="settings .scorer_prompt_sha: "):
        score_dataset(scorer, edits, tmp_path)
    assert file.read_bytes() == before


def test_images_that_cannot_be_read_are_missing_scores(tmp_path, caplog):
    rows = make_edits(4, editors=("one",))
    broken = [
        {
            **row,
            "edit": {"path": None, "bytes": b"no picture"} if i == 1 else row["edit"],
            "image": row["image"] if i != 2 else None,
        }
        for i, row in enumerate(rows)
    ]
    for row in broken:
        for column in ("image", "edit"):
            if isinstance(row[column], Image.Image):
                row[column] = ImageFeature().encode_example(row[column])
    edits = Dataset.from_list(broken).cast_column("image", ImageFeature()).cast_column("edit", ImageFeature())
    summary = score_dataset(HPScorerReward(RuleJudge()), edits, tmp_path)
    assert [line["score"] is None for line in read_scores(tmp_path / "scores.jsonl")] == [False, True, True, False]
    assert "Case 'case-1' has an edit that cannot be decoded" in summary.unreadable[0]
    assert "Case 'case-2' has no image" in summary.unreadable[1]
    assert "| bad cases | 2 |" in squeezed(summary.table())


def test_a_judge_that_dies_half_way_keeps_what_it_scored(tmp_path):
    class Dies(RuleJudge):
        def __call__(self, conversations):
            if self.asked >= 8:
                return [Judgement(None, "APIConnectionError: nobody there", answered=False) for _ in conversations]
            return super().__call__(conversations)

    class Refuses(RuleJudge):
        def __call__(self, conversations):
            answers = super().__call__(conversations)
            refused = Judgement(None, "refused: the server answered 401", answered=False, failure="refused")
            return [*answers[:3], *[refused for _ in answers[3:]]]

    edits, file = make_edits(12), tmp_path / "scores.jsonl"
    for kept in (3, 6):  # also of edits that were tried before, all that was answered is kept
        with pytest.raises(JudgeRefusedError, match="^the server answered 401 Earlier scores are kept in"):
            score_dataset(HPScorerReward(Refuses()), edits, tmp_path / "refused", chunk_size=8)
        assert sum(line["score"] is not None for line in read_scores(tmp_path / "refused")) == kept
    with pytest.raises(ConnectionError, match="too many edits: 8 in a row.*nobody there.*run it again"):
        score_dataset(HPScorerReward(Dies()), edits, tmp_path, chunk_size=8)
    assert sum(line["score"] is not None for line in read_scores(file)) == 8
    judge = RuleJudge()
    score_dataset(HPScorerReward(judge), edits, tmp_path, chunk_size=8)
    assert judge.asked == 16
    # Small chunks add up, and a few failures between answers do not
    with pytest.raises(ConnectionError, match="too many edits: 9 in a row"):
        score_dataset(HPScorerReward(Dies()), edits, tmp_path / "small", chunk_size=3)

    class Hiccups(RuleJudge):
        def __call__(self, conversations):
            answers = super().__call__(conversations)
            return [Judgement(None, "busy", answered=False) if i < 7 else one for i, one in enumerate(answers)]

    summary = score_dataset(HPScorerReward(Hiccups()), edits, tmp_path / "hiccups", chunk_size=8)
    assert "| no answer | 21 |" in squeezed(summary.table())


def test_an_edit_that_was_changed_is_scored_again(tmp_path, caplog):
    edits, file = make_edits(3), tmp_path / "scores.jsonl"
    score_dataset(HPScorerReward(RuleJudge()), edits, tmp_path)
    rows = edits.to_list()
    rows[0]["edit"] = ImageFeature().encode_example(Image.new("RGB", (64, 64), (255, 0, 0)))
    rows[3]["prompt"] = "Something else, number 9"
    changed = Dataset.from_list(rows, features=edits.features)
    judge = RuleJudge()
    summary = score_dataset(HPScorerReward(judge), changed, tmp_path)
    assert judge.asked == 2 and summary.kept == 4 and "2 edits have changed since they were scored" in caplog.text
    assert read_scores(file)[0]["score"] == 5
    # A score of other images does not stand in for a failure
    rows[0]["edit"] = ImageFeature().encode_example(Image.new("RGB", (64, 64), (0, 0, 9)))
    score_dataset(
        HPScorerReward(RuleJudge(rule=lambda *_: "hm")), Dataset.from_list(rows, features=edits.features), tmp_path
    )
    assert read_scores(file)[0]["score"] is None


def test_options_and_lines_that_make_no_sense(tmp_path, caplog):
    scorer = HPScorerReward(RuleJudge())
    for size in (0, -1):
        with pytest.raises(ValueError, match="chunk_size=.* must be at least 1"):
            score_dataset(scorer, make_edits(2), tmp_path, chunk_size=size)
    lines = [
        '{"id": ["a"], "editor": null, "score": 1}',
        '{"id": 3, "editor": null, "score": 1}',
        "[1]",
        '{"id": "x"}',
        '{"id": "case-0", "editor": "one", "score": 2}',
    ]
    (tmp_path / "scores.jsonl").write_text("\n".join(lines))
    assert [line["id"] for line in read_scores(tmp_path / "scores.jsonl")] == ["case-0"]
    assert caplog.text.count("not a complete score") == 4
    summary = score_dataset(scorer, make_edits(2), tmp_path)  # a score whose images nobody knows
    assert summary.kept == 0


def test_half_a_character_in_an_answer_is_no_accident(tmp_path):
    judge = RuleJudge(rule=lambda text, pictures: "good \ud83d")
    summary = score_dataset(HPScorerReward(CachedJudge(judge, tmp_path / "c")), make_edits(2), tmp_path / "s")
    assert [one.answer for one in summary.judgements] == ["good ?"] * 4


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
            score_dataset(scorer, dataset, tmp_path)
    assert not (tmp_path / "scores.jsonl").exists()
    (tmp_path / "scores.jsonl").write_text('{"id": "case-0", "editor": "one", "task": "add", "score": 7}\n')
    with pytest.raises(ValueError, match="line 1: the score 7 of case 'case-0' is not between 0 and 5"):
        score_dataset(scorer, edits, tmp_path)


@pytest.mark.slow
def test_a_kill_costs_at_most_one_chunk(tmp_path):
    make_edits(20).save_to_disk(tmp_path / "edits")
    code = f"""
import sys, time
from tests.helpers import RuleJudge
from hp_edit_trl import HPScorerReward
from hp_edit_trl.cases import load_edits
from hp_edit_trl.calibration import score_dataset
def slow(text, pictures):
    time.sleep(0.05)
    print("judged", flush=True)
    return 3
edits = load_edits({str(tmp_path / "edits")!r})
score_dataset(HPScorerReward(RuleJudge(rule=slow)), edits, {str(tmp_path / "scores")!r}, 4)
"""
    (tmp_path / "script.py").write_text(code)
    judged = 0
    for kill_at in (7, 15, None):
        run = Script(tmp_path / "script.py")
        while kill_at is not None and judged + run.printed("stdout").count("judged") < kill_at:
            time.sleep(0.01)
        if kill_at is not None:
            run.kill()
        judged += run.wait().stdout.count("judged")
    lines = read_scores(tmp_path / "scores")
    assert len(lines) == 40 and all(line["score"] == 3 for line in lines)
    assert 40 <= judged <= 40 + 2 * 4


def test_a_cached_judge_in_bulk(tmp_path):
    judge = RuleJudge()
    scorer = HPScorerReward(CachedJudge(judge, tmp_path / "cache.sqlite"))
    edits = make_edits(3)
    score_dataset(scorer, edits, tmp_path / "a")
    summary = score_dataset(scorer, edits, tmp_path / "b")
    assert judge.asked == 6 and "| judgements from the cache | 6 |" in squeezed(summary.table())
    assert "judgements per second" not in summary.table()
