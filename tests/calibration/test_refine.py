import json
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from hp_edit_trl import HPScorerReward, load_scorer_prompts
from hp_edit_trl.calibration import PromptRefiner, add_questions, agreement_difference, is_held_out, parse_questions
from hp_edit_trl.calibration.refine import swap_test
from hp_edit_trl.judges import CachedJudge, Judgement
from hp_edit_trl.ratings import Rating
from hp_edit_trl.rewards import ScorerPrompt, read_scorer_prompt
from tests.helpers import RuleJudge


ARTIFACTS = "Is Image B free of white blotches? Yes is good."
USELESS = "Is Image B lit from above? Yes is good."


def look(text, pictures):
    """A judge that answers what it is asked: how red the edit is, and blotches only if the prompt speaks of them."""
    red, white = np.asarray(pictures[-1], dtype=float)[[0, -1], 0][:, 0] / 255 * 5
    if "lit from above" in text:  # a question that confuses
        red = 5 - red
    return int(np.clip(round(red - (2 if white == 5 and "blotches" in text else 0)), 0, 5))


def world(count=60, noise=0.3, seed=0):
    """Edits that are more or less red and have a blotch or none, and people who see both."""
    rng = np.random.default_rng(seed)
    rows, ratings = [], []
    for i in range(count):
        red, blotch = rng.uniform(), bool(rng.integers(2))
        pixels = np.zeros((16, 16, 3), dtype=np.uint8)
        pixels[..., 0] = round(255 * red)
        pixels[-1] = 255 if blotch else pixels[0]
        pixels[..., 2] = i  # no two edits are the same
        source = Image.new("RGB", (16, 16), (0, 0, i))
        rows.append(
            {
                "id": f"case {i}",
                "prompt": f"Make it red, {i}",
                "image": source,
                "edit": Image.fromarray(pixels),
                "task": "color",
            }
        )
        for name in ("anna", "ben"):
            score = int(np.clip(round(5 * red - 2 * blotch + rng.normal(0, noise)), 0, 5))
            ratings.append(Rating(name, f"case {i}", None, score, "r:1", "2026-01-01T00:00:00+00:00", "ugly" * blotch))
    return Dataset.from_list(rows), ratings


def revision(name, *questions):
    prompt = load_scorer_prompts()["color"]
    return ScorerPrompt("color", f"mine:color:{name}", add_questions(prompt.text, list(questions)))


def refiner(folder, judge=None, data=None, **kwargs):
    dataset, ratings = data or world()
    return PromptRefiner("color", first_prompts(judge or RuleJudge(rule=look)), dataset, ratings, folder, **kwargs)


def first_prompts(judge):
    """A scorer whose prompts are all called 1, so that revisions of them count from 2."""
    scorer = HPScorerReward(judge)
    scorer.scorer_prompts = {
        task: replace(prompt, revision=f"hp-edit-trl:{task}:1") for task, prompt in scorer.scorer_prompts.items()
    }
    return scorer


def test_the_split_is_fixed_by_the_case_alone():
    ids = [f"case {i}" for i in range(4000)]
    held_out = [is_held_out(one) for one in ids]
    assert abs(np.mean(held_out) - 0.8) < 0.03
    assert held_out[:100] == [is_held_out(one) for one in ids[:100]]
    assert abs(np.mean([is_held_out(one, 0.2) for one in ids]) - 0.2) < 0.03
    assert held_out != [is_held_out(one, seed=1) for one in ids]


def test_a_better_prompt_is_adopted_and_the_folder_is_one_of_prompts(tmp_path):
    work = refiner(tmp_path)
    entry = work.compare(revision("2", ARTIFACTS), [ARTIFACTS])
    assert entry["adopted"] and entry["look"] == 1 and entry["validation"]["confidence"] == pytest.approx(0.95)
    assert entry["validation"]["low"] > 0 and entry["validation"]["after"] > 0.9 > entry["validation"]["before"]
    # What it reports is what the statistics say of the held-out cases
    dataset, ratings = world()
    side = [i for i in range(60) if is_held_out(f"case {i}")]
    human = [(ratings[2 * i].score + ratings[2 * i + 1].score) / 2 for i in side]
    scores = [
        [look(text, [dataset[i]["image"], dataset[i]["edit"]]) for i in side]
        for text in (load_scorer_prompts()["color"].text, revision("2", ARTIFACTS).text)
    ]
    groups = ["color"] * len(side)
    expected = agreement_difference(human, *scores, [f"case {i}" for i in side], num_resamples=2000, groups=groups)
    assert entry["validation"]["difference"] == pytest.approx(expected["difference"])
    assert entry["validation"]["low"] == pytest.approx(expected["low"])
    assert entry["validation"]["before"] == pytest.approx(np.corrcoef(human, scores[0])[0, 1])
    # The folder can be used as it is, and a later run starts from it
    prompts = load_scorer_prompts(str(tmp_path))
    assert ARTIFACTS in prompts["color"].text and prompts["color"].name == "2" and len(prompts) == 9
    assert refiner(tmp_path).current.name == "2"
    assert "→" in work.table() and "yes: better on the held-out cases" in work.table()


def test_a_worse_prompt_never_looks_at_the_held_out_cases(tmp_path):
    work = refiner(tmp_path)
    entry = work.compare(revision("2", USELESS))
    assert entry["validation"] is None and entry["look"] is None and not entry["adopted"]
    assert entry["reason"] == "not better on the calibration cases"
    assert work.current.name == "1" and load_scorer_prompts(str(tmp_path))["color"].name == "1"


def test_a_gain_that_may_be_chance_is_not_adopted_and_each_look_costs_confidence(tmp_path):
    # One blotched edit on each side of the split is judged better: a gain, but none to rely on.
    dataset, ratings = world(noise=1.0)
    blotched = [i for i, row in enumerate(dataset) if row["edit"].getpixel((0, 15))[1] == 255]
    blotched = [i for i in blotched if look("", [dataset[i]["edit"]]) - ratings[2 * i].score >= 3]
    helped = [next(i for i in blotched if is_held_out(f"case {i}") == side) for side in (False, True)]

    def slightly(text, pictures):
        of = pictures[-1].getpixel((0, 0))[2]  # the blue of an edit is its number
        return look("blotches" if "patience" in text and of in helped else "", pictures)

    work = refiner(tmp_path, RuleJudge(rule=slightly), (dataset, ratings))
    for k in (1, 2):
        entry = work.compare(revision(f"{k + 1}", "Was patience shown?" + " At all?" * k))
        assert entry["look"] == k and entry["validation"]["gain"] > 0 and not entry["adopted"]
        assert entry["reason"].startswith("the gain on the held-out cases may be chance")
        assert entry["validation"]["confidence"] == pytest.approx(1 - 2 * 0.05 / (k * (k + 1)))
    # Asked again, it does not look again
    assert work.compare(revision("3", "Was patience shown? At all? At all?")) == entry
    assert len(work.history) == 2


def test_a_prompt_that_leaves_hard_edits_without_a_score_is_not_better(tmp_path):
    def evades(text, pictures):
        hard = "blotches" in text and pictures[-1].getpixel((0, 0))[2] % 5 == 0
        return "hard to say" if hard else look(text, pictures)

    entry = refiner(tmp_path, RuleJudge(rule=evades)).compare(revision("2", ARTIFACTS))
    missing = sum(is_held_out(f"case {i}") for i in range(0, 60, 5))
    assert entry["validation"]["low"] > 0 and entry["validation"]["missing_after"] == missing > 0
    assert not entry["adopted"] and entry["reason"] == "more edits have no score"


def test_the_mean_absolute_error_is_better_when_it_is_smaller(tmp_path):
    entry = refiner(tmp_path, statistic="mae").compare(revision("2", ARTIFACTS))
    assert entry["adopted"] and entry["validation"]["difference"] < 0 and entry["validation"]["gain_low"] > 0


class Proposer:
    """Answers what it is told to, and keeps what it was shown."""

    def __init__(self, *answers):
        self.answers, self.shown = list(answers), []

    def __call__(self, conversations):
        self.shown += conversations
        answer = self.answers.pop(0)
        return [answer if isinstance(answer, Judgement) else Judgement(None, answer)]


def test_proposals_are_shown_the_worst_of_the_calibration_cases_alone(tmp_path):
    work = refiner(tmp_path)
    proposer = Proposer(json.dumps([USELESS]), f"Well.\n```json\n{json.dumps([ARTIFACTS])}\n```")
    for _ in range(2):
        candidate, questions = work.propose(proposer)
        work.compare(candidate, questions)
    first, second = proposer.shown
    texts = [part["text"] for part in first[1]["content"] if part["type"] == "text" and "Instruction" in part["text"]]
    shown = [f"case {text.split('red, ')[1].split(chr(34))[0]}" for text in texts]
    assert len(shown) == 6 and not any(map(is_held_out, shown))
    people = {case["id"]: case["human"] for case in work.cases}
    begun = load_scorer_prompts()["color"].text
    errors = {
        case["id"]: abs(case["human"] - look(begun, [None, case["edit"]]))
        for case in work.cases
        if not case["held_out"]
    }
    assert sorted((errors[one] for one in shown), reverse=True) == sorted(errors.values(), reverse=True)[:6]
    assert f"People: {people[shown[0]]:.2g}." in texts[0] and 'People wrote: "ugly"; "ugly"' in texts[0]
    assert sum(part["type"] == "image" for part in first[1]["content"]) == 12
    assert begun in first[0]["content"][0]["text"] and "did not help" not in first[0]["content"][0]["text"]
    assert USELESS in second[0]["content"][0]["text"].split("did not help")[1]
    assert [entry["adopted"] for entry in work.history] == [False, True]
    assert [entry["after"] for entry in work.history] == ["2", "3"]
    assert ARTIFACTS in read_scorer_prompt(tmp_path / "color.md").text and USELESS not in work.current.text
    assert (tmp_path / "revisions" / "color-2.md").exists()


def test_a_proposer_that_answers_rubbish_or_nothing(tmp_path):
    work = refiner(tmp_path)
    for answer in ("I would add more detail.", "[]", "[1, 2]", '["unclosed', '{"a": 1}'):
        with pytest.raises(ValueError, match="answer has no JSON list of questions"):
            work.propose(Proposer(answer))
    with pytest.raises(ConnectionError, match="gave no answer: APITimeoutError"):
        work.propose(Proposer(Judgement(None, "APITimeoutError", answered=False)))
    assert work.history == []
    assert parse_questions('As in [1], I would ask ["Is a? [2]", "Is b?"].') == ["Is a? [2]", "Is b?"]
    assert parse_questions('<think>["no"]</think>["Is {prompt} met?"]') == ["Is (prompt) met?"]


def test_questions_go_to_the_end_of_the_list():
    color = load_scorer_prompts()["color"].text
    added = add_questions(color, ["First new?", "Second new?"])
    before, after = added.split("First new?")
    number = int(before.rstrip(". ").rpartition("\n")[2].strip("."))
    assert f"\n{number - 1}. " in before and after.startswith(f"\n{number + 1}. Second new?\n\n")
    assert added.replace(f"\n{number}. First new?\n{number + 1}. Second new?", "") == color
    # Bokeh's scale follows its list of checks; the base prompt has no list.
    bokeh = add_questions(load_scorer_prompts()["bokeh"].text, ["New?"])
    assert "instead of\n   one uniform blur laid over everything regardless of depth.\n7. New?\n\nThen" in bokeh
    base = add_questions(load_scorer_prompts()["base"].text, ["New?"])
    assert (
        "Requirements: {requirement}\n\nGo through these questions in your mind before you grade:\n1. New?\n\n" in base
    )


@pytest.mark.parametrize("task", ["../../evil", "/evil", "..", ".", "a/b"])
def test_a_task_is_no_path_to_another_folder(tmp_path, task):
    dataset, ratings = world()
    dataset = dataset.map(lambda row: {"task": task})
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "a.md").write_text(f"---\ntask: '{task}'\nrevision: 1\n---\n{{prompt}}")
    scorer = HPScorerReward(RuleJudge(rule=look), scorer_prompts=str(tmp_path / "prompts"))
    folder = tmp_path / "deep" / "er" / "out"
    work = PromptRefiner(task, scorer, dataset, ratings, folder)
    work.compare(replace(work.current, revision=f"x:{task}:2", text="{prompt} " + ARTIFACTS))
    assert load_scorer_prompts(str(folder))[task].name == "2"
    assert {path.name for path in tmp_path.iterdir()} == {"prompts", "deep"}
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["er"]


def test_a_new_task_begins_with_the_base_prompt(tmp_path):
    dataset, ratings = world()
    dataset = dataset.map(lambda row: {"task": "crop"})
    work = PromptRefiner("crop", first_prompts(RuleJudge(rule=look)), dataset, ratings, tmp_path)
    assert work.current.text == load_scorer_prompts()["base"].text and work.current.task == "crop"
    assert load_scorer_prompts(str(tmp_path))["crop"].name == "1"


def test_nothing_is_scored_twice(tmp_path):
    judge = RuleJudge(rule=look)
    work = refiner(tmp_path / "prompts", CachedJudge(judge, tmp_path / "cache"))
    work.compare(revision("2", ARTIFACTS))
    assert judge.asked == 120
    refiner(tmp_path / "prompts", CachedJudge(judge, tmp_path / "cache")).compare(revision("3", ARTIFACTS, USELESS))
    assert judge.asked == 180


def test_bad_input(tmp_path):
    dataset, ratings = world()
    with pytest.raises(ValueError, match="'color' has 0 rated cases for calibration and 0 held out"):
        refiner(tmp_path, data=(dataset, []))
    few = [Rating(r.annotator, r.id, None, r.score if r.id < "case 2" else None, "r:1", r.time) for r in ratings]
    with pytest.raises(ValueError, match="2 rated cases for calibration and 10 held out; at least 5 and 8 are needed"):
        refiner(tmp_path, data=(dataset, few))
    with pytest.raises(ValueError, match="statistic='r2' is unknown"):
        refiner(tmp_path, statistic="r2")
    with pytest.raises(ValueError, match="validation_fraction=1"):
        refiner(tmp_path, validation_fraction=1)
    work = refiner(tmp_path)
    with pytest.raises(ValueError, match="prompt for 'add', not for 'color'"):
        work.compare(load_scorer_prompts()["add"])
    with pytest.raises(ValueError, match="has the text of the current revision '1'"):
        work.compare(ScorerPrompt("color", "mine:color:2", work.current.text))
    with pytest.raises(ValueError, match="The revision '1' of the candidate belongs to a prompt with another text"):
        work.compare(revision("1", ARTIFACTS))
    dead = RuleJudge()
    dead.__class__ = type(
        "Dead",
        (RuleJudge,),
        {"__call__": lambda self, chats: [Judgement(None, "timed out", answered=False) for _ in chats]},
    )
    with pytest.raises(ConnectionError, match="The judge gave no answer for case 'case 0': timed out"):
        refiner(tmp_path, dead).compare(revision("2", ARTIFACTS))
    assert refiner(tmp_path).history == []


def test_an_outage_says_nothing_of_the_prompt(tmp_path):
    class Stumbles(RuleJudge):
        down = True

        def __call__(self, conversations):
            judged = super().__call__(conversations)
            return [
                Judgement(None, "busy", answered=False) if self.down and i == 40 else one
                for i, one in enumerate(judged)
            ]

    judge = Stumbles(rule=look)
    cached = CachedJudge(judge, tmp_path / "cache")
    with pytest.raises(ConnectionError, match="no answer for case 'case 40': busy"):
        refiner(tmp_path / "p", cached).compare(revision("2", ARTIFACTS))
    judge.down = False
    work = refiner(tmp_path / "p", cached)
    assert work.history == [] and work.compare(revision("2", ARTIFACTS))["adopted"]


def test_other_ratings_are_another_comparison(tmp_path):
    dataset, ratings = world()
    opposite = [Rating(r.annotator, r.id, None, 5 - r.score, "r:1", r.time) for r in ratings]
    assert not refiner(tmp_path, data=(dataset, opposite)).compare(revision("2", ARTIFACTS))["adopted"]
    assert refiner(tmp_path).compare(revision("2", ARTIFACTS))["adopted"]
    assert len(refiner(tmp_path).history) == 2


@pytest.mark.parametrize("other", [{"seed": 1}, {"validation_fraction": 0.85}])
def test_another_split_would_hold_out_cases_that_questions_were_written_from(tmp_path, other):
    refiner(tmp_path).compare(revision("2", USELESS))
    with pytest.raises(ValueError, match="were refined with seed=0 .* choose another output_dir"):
        refiner(tmp_path, **other)
    assert refiner(tmp_path, validation_fraction=0.7).current.name == "1"  # holds out some of the same


def test_a_kill_loses_nothing(tmp_path, caplog):
    work = refiner(tmp_path)
    begun = (tmp_path / "color.md").read_text()
    entry = work.compare(revision("2", ARTIFACTS))
    adopted = (tmp_path / "color.md").read_text()
    # Between the history and the prompt's file
    (tmp_path / "color.md").write_text(begun)
    assert refiner(tmp_path).current.name == "2" and (tmp_path / "color.md").read_text() == adopted
    # In the middle of a line of the history
    with open(tmp_path / "history.jsonl", "a") as lines:
        lines.write('{"task": "col')
    work = refiner(tmp_path)
    assert work.history == [entry] and "line 2: not a complete entry" in caplog.text
    assert work.compare(revision("2", ARTIFACTS)) == entry  # asked for twice, also when it was adopted
    work.compare(revision("3", ARTIFACTS, USELESS))
    assert [one["after"] for one in refiner(tmp_path).history] == ["2", "3"]
    # While the folder was begun
    (tmp_path / "new").mkdir()
    load_scorer_prompts()["add"].save(tmp_path / "new" / "add.md")
    assert refiner(tmp_path / "new").current.text == load_scorer_prompts()["color"].text


def test_looks_are_counted_and_not_tries(tmp_path):
    work = refiner(tmp_path)
    for name in ("2", "3"):
        assert work.compare(revision(name, USELESS * int(name)))["look"] is None
    assert work.compare(revision("4", ARTIFACTS))["look"] == 1


def test_the_edits_of_a_case_belong_together(tmp_path):
    dataset, ratings = world(40)
    rows = [{**row, "editor": editor} for row in dataset for editor in ("a", "b", "c")]  # three times the same
    thrice = [Rating(r.annotator, r.id, editor, r.score, "r:1", r.time) for r in ratings for editor in ("a", "b", "c")]
    once = refiner(tmp_path / "once", data=(dataset, ratings)).compare(revision("2", ARTIFACTS))["validation"]
    three = refiner(tmp_path / "three", data=(Dataset.from_list(rows), thrice)).compare(revision("2", ARTIFACTS))[
        "validation"
    ]
    assert three["edits"] == 3 * once["edits"] and three["cases"] == once["cases"]
    # Copies add nothing to what is known
    assert three["high"] - three["low"] == pytest.approx(once["high"] - once["low"], rel=0.1)
    assert three["p"] == pytest.approx(once["p"])


@pytest.mark.parametrize("statistic", ["pearson", "spearman", "kendall", "mae"])
def test_the_swap_test_against_all_permutations(statistic):
    from itertools import product

    from scipy import stats

    rng = np.random.default_rng(3)
    human = rng.integers(0, 6, 9).astype(float)
    before, after = (np.clip(human + rng.integers(-2, 3, 9), 0, 5) for _ in range(2))
    clusters = list("aabcdefgh")
    measure = {
        "pearson": lambda x: stats.pearsonr(human, x)[0],
        "spearman": lambda x: stats.spearmanr(human, x)[0],
        "kendall": lambda x: stats.kendalltau(human, x)[0],
        "mae": lambda x: -np.abs(human - x).mean(),
    }[statistic]
    gains = []
    for swaps in product([False, True], repeat=8):
        swapped = np.array([swaps["abcdefgh".index(cluster)] for cluster in clusters])
        gains.append(measure(np.where(swapped, before, after)) - measure(np.where(swapped, after, before)))
    exact = np.mean(np.array(gains) >= gains[0] - 1e-9)
    count = 500 if statistic == "kendall" else 4000
    found = swap_test(human, before, after, clusters, statistic, count)
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / count) + 2 / count)


def test_the_table_says_what_was_compared(tmp_path):
    refiner(tmp_path).compare(revision("2", USELESS))
    work = refiner(tmp_path, statistic="mae")
    entry = work.compare(revision("3", ARTIFACTS))
    rows = work.table().splitlines()
    assert "| pearson " in rows[2] and "| mae " in rows[3]
    low, high = entry["validation"]["low"], entry["validation"]["high"]
    assert f"+{-entry['validation']['difference']:.3f} (+{-high:.3f} to +{-low:.3f})" in rows[3]


def test_broken_images_are_left_out(tmp_path, caplog):
    dataset, ratings = world()
    rows = dataset.to_list()
    rows[0]["edit"] = {"path": None, "bytes": b"broken"}
    from datasets import Image as ImageFeature

    broken = Dataset.from_list(rows).cast_column("image", ImageFeature()).cast_column("edit", ImageFeature())
    assert len(refiner(tmp_path, data=(broken, ratings)).cases) == 59
    assert "Case 'case 0' has an edit that cannot be decoded" in caplog.text
