"""Ratings and scores joined by hand, and files that do not belong together."""

import numpy as np
import pytest
from datasets import Dataset

from hp_edit_trl.calibration import compare_with_people, krippendorff_alpha
from hp_edit_trl.ratings import Rating
from tests.helpers import photo


def rate(annotator, case, score, editor="m", **kwargs):
    return Rating(annotator, case, editor, score, **{"rubric": "r1", "time": "2026-01-01T00:00:00+00:00", **kwargs})


def line(case, score, editor="m", task="add", **kwargs):
    made = {
        "answer": f"Score: {score}",
        "judge": "judge-a",
        "scorer_prompt": f"hp-edit-trl:{task}:1",
        "score_mode": "integer",
    }
    return {"id": case, "editor": editor, "task": task, "score": score, "time": "t", **made, **kwargs}


def edits(rows):
    """A dataset of `(id, editor, task)`."""
    return Dataset.from_list(
        [
            {"id": case, "editor": editor, "task": task, "prompt": "Edit", "image": photo(8, 8), "edit": photo(8, 8)}
            for case, editor, task in rows
        ]
    )


RATINGS = [
    *(rate("ada", f"c{i}", score) for i, score in enumerate([0, 2, 4, 5, 3])),
    *(rate("ben", f"c{i}", score) for i, score in enumerate([1, 2, 5, 5, None])),
    *(rate("chloe", f"c{i}", score) for i, score in enumerate([2, 2, 3])),
]
SCORES = [line("c0", 1), line("c1", 3), line("c2", 4, task="remove"), line("c3", 5, task="remove"), line("c4", None)]


def test_people_are_the_mean_of_those_who_did_not_skip():
    result = compare_with_people(RATINGS, SCORES, num_resamples=50)
    found = {edit["id"]: (edit["human"], edit["score"], edit["task"]) for edit in result["edits"]}
    assert found == {
        "c0": (1, 1, "add"),
        "c1": (2, 3, "add"),
        "c2": (4, 4, "remove"),
        "c3": (5, 5, "remove"),
        "c4": (3, None, "add"),
    }
    overall, groups = result["agreement"]["overall"], result["agreement"]["groups"]
    assert (overall["n"], overall["missing"], overall["bias"]["value"]) == (4, 1, 0.25)
    assert (groups["add"]["n"], groups["add"]["missing"], groups["remove"]["n"]) == (2, 1, 2)
    assert result["left_out"]["no_score"] == [["c4", "m"]]
    assert (result["judge"], result["score_mode"], result["rubric"]) == ("judge-a", "integer", "r1")
    assert result["scorer_prompts"] == {"add": "hp-edit-trl:add:1", "remove": "hp-edit-trl:remove:1"}
    assert result["edits"][4]["ratings"][1] == {"annotator": "ben", "score": None, "comment": ""}


def test_annotators_stand_against_the_mean_of_the_others():
    result = compare_with_people(RATINGS, SCORES, num_resamples=50)
    ben = result["annotators"]["ben"]  # c0 to c3; the others' means are 1, 2, 3.5 and 5
    assert (ben["n"], ben["skipped"]) == (4, 1)
    assert ben["bias"]["value"] == pytest.approx(np.mean([1, 2, 5, 5]) - np.mean([1, 2, 3.5, 5]))
    assert ben["pearson"]["value"] == pytest.approx(np.corrcoef([1, 2, 5, 5], [1, 2, 3.5, 5])[0, 1])
    given = [(r.annotator, r.id, r.score) for r in RATINGS if r.score is not None]
    assert result["alpha"]["overall"]["value"] == pytest.approx(krippendorff_alpha(given))
    remove = [rating for rating in given if rating[1] in ("c2", "c3")]
    assert result["alpha"]["groups"]["remove"]["value"] == pytest.approx(krippendorff_alpha(remove))


def test_one_annotator_has_no_one_to_agree_with():
    result = compare_with_people([r for r in RATINGS if r.annotator == "ada"], SCORES, num_resamples=20)
    assert result["alpha"]["overall"]["value"] is None
    assert result["alpha"]["overall"]["reason"] == "there is only one annotator"
    ada = result["annotators"]["ada"]
    assert (ada["n"], ada["pearson"]["value"]) == (0, None)
    assert ada["pearson"]["reason"] == "no edit was rated by this annotator and another"


def test_models_are_compared_on_the_edits_that_have_both():
    ratings = [
        rate("ada", f"c{i}", score, e)
        for e, scores in {"x": [1, 2, 3], "y": [4, 5, 5]}.items()
        for i, score in enumerate(scores)
    ]
    scores = [
        line("c0", 2, "x"),
        line("c1", 3, "x"),
        line("c2", None, "x"),
        *(line(f"c{i}", 5, "y") for i in range(3)),
    ]
    editors = compare_with_people(ratings, scores, num_resamples=100)["editors"]
    assert list(editors) == ["x", "y"]
    assert (editors["x"]["n"], editors["x"]["human"]["value"], editors["x"]["scorer"]["value"]) == (2, 1.5, 2.5)
    assert editors["y"]["human"]["value"] == pytest.approx(14 / 3) and editors["y"]["scorer"]["low"] == 5
    nobody = [rate("ada", f"c{i}", i, None) for i in range(3)]
    assert compare_with_people(nobody, [line(f"c{i}", i, None) for i in range(3)])["editors"] == {}


def test_what_is_left_out_is_named():
    dataset = edits(
        [(f"c{i}", "m", None) for i in range(5)]
        + [("skipped", "m", None), ("unscored", "m", None), ("unrated", "m", None)]
    )
    ratings = [*RATINGS, rate("ada", "skipped", None), rate("ada", "unscored", 2), rate("ada", "gone", 3)]
    scores = [*SCORES, line("skipped", 1), line("unrated", 4), line("c0", 1, editor="other")]
    result = compare_with_people(ratings, scores, dataset, num_resamples=10)
    assert result["left_out"] == {
        "no_score": [["c4", "m"]],
        "not_scored": [["unscored", "m"]],
        "not_rated": [["unrated", "m"]],
        "skipped": [["skipped", "m"]],
        "unknown": [["c0", "other"], ["gone", "m"]],
    }
    assert (result["agreement"]["overall"]["n"], result["agreement"]["overall"]["missing"]) == (4, 2)
    assert result["agreement"]["groups"]["no task"]["missing"] == 1  # nobody says the task of `unscored`


def test_tasks_come_from_the_dataset_or_the_scores():
    scores = [{**one, "task": None, "scorer_prompt": "hp-edit-trl:base:1"} for one in SCORES]
    assert compare_with_people(RATINGS, scores, num_resamples=10)["agreement"]["groups"] == {}
    dataset = edits([(f"c{i}", "m", "style" if i < 3 else "color") for i in range(5)])
    result = compare_with_people(RATINGS, scores, dataset, num_resamples=10)
    assert {name: values["n"] for name, values in result["agreement"]["groups"].items()} == {"color": 1, "style": 3}
    with pytest.raises(ValueError, match="'c0' has the task 'add' in the scores and 'style' in the dataset"):
        compare_with_people(RATINGS, SCORES, dataset)


def test_a_result_does_not_depend_on_the_order_of_the_files():
    first = compare_with_people(RATINGS, SCORES, num_resamples=50, seed=3)
    assert first == compare_with_people(RATINGS[::-1], SCORES[::-1], num_resamples=50, seed=3)


def test_of_several_lines_the_last_with_a_score_counts():
    scores = [*SCORES, line("c0", 5), line("c1", float("nan")), line("c4", 2)]
    found = {edit["id"]: edit["score"] for edit in compare_with_people(RATINGS, scores, num_resamples=5)["edits"]}
    assert found == {"c0": 5, "c1": 3, "c2": 4, "c3": 5, "c4": 2}


@pytest.mark.parametrize(
    "ratings, scores, message",
    [
        ([], SCORES, "nothing to compare with: there are no ratings"),
        ([rate("ada", "c0", None)], SCORES, "all 1 edits were skipped"),
        (RATINGS, [], r"None of the 5 rated edits is among the 0 scored ones \(there are none\)"),
        (RATINGS, [line("other", 3)], r"None of the 5 rated edits .*e.g. \('c0', 'm'\) and \('other', 'm'\)"),
        (RATINGS, [line("c0", 3, editor=None)], "matched by id and editor"),
        (RATINGS, [line(f"c{i}", None) for i in range(5)], "None of the 5 rated edits has a score"),
        (RATINGS, [*SCORES, line("c9", 1, judge="judge-b")], "several judges, judge-a, judge-b"),
        (RATINGS, [*SCORES, line("c9", 1, score_mode="expected")], "several score_modes, expected, integer"),
        (
            RATINGS,
            [*SCORES, line("c9", 1, scorer_prompt="mine:add:2")],
            "'add' were made with two revisions .*:add:1 and mine:add:2",
        ),
        (
            RATINGS,
            [*SCORES[1:], line("c0", 1, scorer_prompt_sha="abc")],
            r"'add' .* hp-edit-trl:add:1 \(abc\) and hp-edit-trl:add:1,",
        ),
        ([*RATINGS, rate("ada", "c9", 1, rubric="r2")], SCORES, "rubrics r1, r2"),
        (
            RATINGS,
            [*SCORES, line("c1", 2, editor="n", task="style")],
            "'c1' has the task 'add' in the scores and 'style'",
        ),
    ],
)
def test_what_does_not_belong_together_is_an_error(ratings, scores, message):
    with pytest.raises(ValueError, match=message):
        compare_with_people(ratings, scores, num_resamples=5)


def test_ratings_of_another_dataset_are_an_error():
    with pytest.raises(ValueError, match="there are no ratings of edits of this dataset"):
        compare_with_people(RATINGS, SCORES, edits([("else", "m", "add")]))
    with pytest.raises(ValueError, match="must have a column 'edit'"):
        compare_with_people(RATINGS, SCORES, edits([("c0", "m", "add")]).remove_columns("edit"))
