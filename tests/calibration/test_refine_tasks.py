import json

import pytest
from datasets import concatenate_datasets

from hp_edit_trl import load_scorer_prompts
from hp_edit_trl.calibration import (
    PromptRefiner,
    history_table,
    plan_refinement,
    plan_table,
    rated_tasks,
    read_history,
    refine_tasks,
    summary_table,
)
from hp_edit_trl.judges import Judgement
from hp_edit_trl.ratings import Rating
from hp_edit_trl.rewards import read_scorer_prompt
from tests.calibration.test_refine import ARTIFACTS, USELESS, Proposer, first_prompts, look, refiner, revision, world
from tests.helpers import RuleJudge


def several(**counts):
    """Edits of several tasks and their ratings."""
    parts, ratings = [], []
    for seed, (task, count) in enumerate(counts.items()):
        dataset, given = world(count, seed=seed)
        parts.append(dataset.map(lambda row, task=task: {"task": task, "id": f"{task} {row['id']}"}))
        ratings += [Rating(r.annotator, f"{task} {r.id}", None, r.score, "r:1", r.time) for r in given]
    return concatenate_datasets(parts), ratings


class Stumbles(RuleJudge):
    """A judge that is down when it should score with a prompt that has some words."""

    words: str | None = None

    def __call__(self, conversations):
        judged = super().__call__(conversations)
        down = self.words is not None and self.words in conversations[0][0]["content"][0]["text"]
        return [Judgement(None, "busy", answered=False) for _ in judged] if down else judged


def test_from_base_to_the_target(tmp_path):
    work = refiner(tmp_path, from_base=True)
    base = load_scorer_prompts()["base"].text
    assert work.current.text == base and work.current.task == "color"
    assert sorted(load_scorer_prompts(str(tmp_path))) == ["base", "color"]  # nothing finished
    proposer = Proposer(json.dumps([USELESS]), json.dumps([ARTIFACTS]))
    summary = work.refine(proposer, rounds=5, target=0.9)
    assert (summary["proposed"], summary["accepted"], summary["reason"]) == (2, 1, "the target is reached")
    assert summary["before"]["value"] < 0.9 <= summary["after"]["value"] and summary["after"]["low"] > 0.8
    assert summary["start"] == "1" and summary["current"] == "3"
    # It is resumed, and asks nobody
    again = refiner(tmp_path, from_base=True).refine(Proposer(), rounds=5, target=0.9)
    assert again == summary
    row = summary_table([summary]).splitlines()[2]
    assert "| 2 " in row and "the target is reached" in row and f"{summary['after']['value']:.2f} [" in row
    # The number of rounds counts those of before
    assert refiner(tmp_path).refine(Proposer(), rounds=2)["reason"] == "2 of 2 rounds are used"
    assert refiner(tmp_path / "b").refine(Proposer(), rounds=0)["proposed"] == 0


def test_a_folder_that_began_otherwise_is_not_taken_for_one_from_base(tmp_path):
    refiner(tmp_path / "finished")
    refiner(tmp_path / "compared").compare(revision("2", ARTIFACTS))
    for name in ("finished", "compared"):
        with pytest.raises(ValueError, match="a prompt for 'color' that did not start from the base prompt"):
            refiner(tmp_path / name, from_base=True)
    refiner(tmp_path / "base", from_base=True)
    assert refiner(tmp_path / "base").current.text == load_scorer_prompts()["base"].text  # goes on with what is there
    scorer = first_prompts(RuleJudge(rule=look))
    del scorer.scorer_prompts["base"]
    with pytest.raises(ValueError, match="neither a prompt for the task 'color' nor a base prompt.*add base.md"):
        PromptRefiner("color", scorer, *world(), tmp_path / "none", from_base=True)
    assert not (tmp_path / "none").exists()


def test_a_proposal_outlives_a_judge_that_fails(tmp_path):
    judge = Stumbles(rule=look)
    judge.words = ARTIFACTS
    work = refiner(tmp_path, judge, from_base=True)
    proposer = Proposer(json.dumps([ARTIFACTS]))
    with pytest.raises(ConnectionError, match="gave no answer"):
        work.refine(proposer, rounds=1)
    assert work.history == [] and work.summary("x")["before"]["value"] > 0
    judge.words = None
    summary = refiner(tmp_path, judge, from_base=True).refine(Proposer(), rounds=1)  # the proposer is not asked again
    assert summary["accepted"] == 1 and read_history(tmp_path)[0]["questions"] == [ARTIFACTS]


def test_the_base_prompt_is_refined_on_all_tasks_and_others_start_from_it(tmp_path):
    dataset, ratings = several(color=20, style=20, add=20)
    scorer = first_prompts(RuleJudge(rule=look))
    work = PromptRefiner("base", scorer, dataset, ratings, tmp_path, from_base=True)
    assert len(work.cases) == 60
    summary = work.refine(Proposer(json.dumps([ARTIFACTS])), rounds=1)
    assert summary["accepted"] == 1
    (entry,) = work.history
    assert entry["validation"]["cases"] > 40 and entry["validation"]["p"] < 0.01
    task = PromptRefiner("color", scorer, dataset, ratings, tmp_path, from_base=True, validation_fraction=0.4)
    assert ARTIFACTS in task.current.text and task.start.text == work.current.text


def test_which_tasks_can_be_refined():
    dataset, ratings = several(color=40, style=40, add=8, swap=40)
    ratings = [
        r if not r.id.startswith("swap") else Rating(r.annotator, r.id, None, 4, "r:1", r.time) for r in ratings
    ]
    found, left_out = rated_tasks(dataset, ratings)
    assert [one.task for one in found] == ["color", "style"] and len(found[0].ids) == 40
    assert found[0].num_ratings == 80
    assert "'add' has " in left_out["add"] and "at least 5 and 8 are needed" in left_out["add"]
    assert "People gave all held-out edits of the task 'swap' the same score" in left_out["swap"]
    assert "swap" not in rated_tasks(dataset, ratings, statistic="mae")[1]
    found, left_out = rated_tasks(dataset, ratings, ["style", "remove", "base"])
    assert [one.task for one in found] == ["base", "style"] and len(found[0].ids) == 128
    assert left_out == {
        "remove": "The task 'remove' has no rated edits; there are ratings for add, color, style, swap."
    }
    with pytest.raises(ValueError, match="No task can be refined. The task 'remove' has no rated edits"):
        rated_tasks(dataset, ratings, ["remove"])
    with pytest.raises(ValueError, match="name one of them twice"):
        rated_tasks(dataset, ratings, ["color", "color"])
    with pytest.raises(ValueError, match="No edit has a rating with a score"):
        rated_tasks(dataset, [Rating("anna", "other", None, 3, "r:1", ratings[0].time)])
    with pytest.raises(ValueError, match="No edit has a rating with a score"):
        rated_tasks(dataset, [Rating("anna", "color case 1", None, None, "r:1", ratings[0].time)])
    # Without a column `task`, the edits are of the one that is named
    dataset, ratings = world()
    (one,), _ = rated_tasks(dataset.remove_columns("task"), ratings, ["crop"])
    assert one.task == "crop" and rated_tasks(dataset.remove_columns("task"), ratings)[0][0].task == "base"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.2}, "target=1.2 is no value of the statistic pearson: use one from -1 to 1"),
        ({"target": float("nan")}, "target=nan is no value"),
        ({"rounds": -1}, "rounds=-1 must not be negative"),
    ],
)
def test_options_are_checked_before_anybody_is_asked(tmp_path, options, message):
    judge = RuleJudge(rule=look)
    with pytest.raises(ValueError, match=message):
        refiner(tmp_path, judge).refine(Proposer(), **options)
    with pytest.raises(ValueError, match="target=5.5 is no value of the statistic mae: use one from 0 to 5"):
        refiner(tmp_path, judge, statistic="mae").refine(Proposer(), target=5.5)
    assert judge.asked == 0


def test_a_judge_that_always_says_the_same_ends_the_search(tmp_path):
    work = refiner(tmp_path, RuleJudge(rule=lambda text, pictures: 5))
    summary = work.refine(Proposer())
    assert "undefined: the scorer gave all edits the same score; use the statistic mae" in summary["reason"]
    assert summary["proposed"] == 0 and "| – " in summary_table([summary])
    done = refiner(tmp_path, statistic="mae").refine(Proposer(json.dumps([ARTIFACTS])), rounds=3, target=0.5)
    assert done["reason"] == "the target is reached" and done["after"]["value"] <= 0.5


def test_the_plan_asks_nobody_and_knows_what_is_known(tmp_path):
    dataset, ratings = several(color=40, style=40)
    judge = RuleJudge(rule=look)
    scorer = first_prompts(judge)
    tasks, _ = rated_tasks(dataset, ratings)
    rows = plan_refinement(tasks, scorer, tmp_path / "new")
    assert [(row["task"], row["before"], row["known"]) for row in rows] == [
        ("color", 0.5, False), ("color", 0.7, False), ("style", 0.5, False), ("style", 0.7, False),
    ]  # fmt: skip
    table = plan_table(rows, rounds=3)
    assert "| color | 40    | 1             | 2 " in table and "0.70 assumed" in table
    assert "Up to 320 judgements (3 rounds) and 6 proposals" in table
    assert "three editors of each case would count like 1.9 times as many cases" in table
    assert judge.asked == 0 and not (tmp_path / "new").exists()
    # From scores with the current prompt, by this judge; then from the history
    sha = scorer.scorer_prompts["color"].digest
    line = {"editor": None, "judge": scorer.judge_description, "scorer_prompt_sha": sha}
    scores = [
        line | {"id": key[0], "score": round(score)} for key, score in zip(tasks[0].keys, tasks[0].human, strict=True)
    ]
    (row,) = plan_refinement(tasks[:1], scorer, tmp_path / "new", scores)
    assert row["known"] and 0.9 < row["before"] <= 1
    for changed in ({"judge": "another"}, {"scorer_prompt_sha": "another"}):
        assert not plan_refinement(tasks[:1], scorer, tmp_path, [one | changed for one in scores])[0]["known"]
    work = PromptRefiner("color", scorer, dataset, ratings, tmp_path)
    entry = work.compare(revision("2", ARTIFACTS))
    (row,) = plan_refinement(tasks[:1], scorer, tmp_path)
    assert row["before"] == entry["validation"]["after"] and entry["adopted"]


def test_tasks_one_after_the_other_and_one_that_fails(tmp_path):
    dataset, ratings = several(color=30, style=30)
    scorer = first_prompts(RuleJudge(rule=look))
    tasks, _ = rated_tasks(dataset, ratings)
    given = (tasks, scorer, dataset, ratings, tmp_path)
    proposer = Proposer("nonsense", json.dumps([ARTIFACTS]))
    summaries = list(refine_tasks(*given, proposer, rounds=1, from_base=True))
    assert [(one["task"], one["accepted"], one["failed"]) for one in summaries] == [
        ("color", 0, True),
        ("style", 1, False),
    ]
    assert "no JSON list of questions" in summaries[0]["reason"] and summaries[0]["before"]["value"] > 0
    summaries = list(refine_tasks(*given, Proposer(json.dumps([ARTIFACTS])), rounds=1, from_base=True))
    assert [one["accepted"] for one in summaries] == [1, 1]
    assert "| style | 2 " in history_table(read_history(tmp_path))
    # A judge that is gone ends it, after the summary of its task
    judge = Stumbles(rule=look)
    judge.words = ""
    found = []
    with pytest.raises(ConnectionError, match="gave no answer"):
        for one in refine_tasks(tasks, first_prompts(judge), dataset, ratings, tmp_path / "b", Proposer()):
            found.append(one)
    assert [(one["task"], one["failed"], one["before"]) for one in found] == [("color", True, None)]


def test_a_file_that_is_called_like_another_task(tmp_path):
    (tmp_path / "color.md").write_text("---\ntask: style\nrevision: 1\n---\n{prompt}")
    with pytest.raises(ValueError, match="is a prompt for the task 'style': name the file after its task"):
        refiner(tmp_path)
    assert read_scorer_prompt(tmp_path / "color.md").task == "style"
