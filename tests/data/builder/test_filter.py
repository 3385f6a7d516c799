"""Which cases are hard enough to train on."""

import pytest

from hp_edit_trl.data.builder.filter import Filter


def graded(scores, split=None, task=None):
    count = len(scores)
    return {
        "id": [str(i) for i in range(count)],
        "task": task or ["add"] * count,
        "split": split or ["train"] * count,
        "score": scores,
    }


def test_scores_of_five_are_not_trained_on_and_missing_ones_neither():
    done = Filter()(graded([5.0, 4.99, None, 0.0, 5.0, None], ["train"] * 4 + ["test"] * 2))
    assert done["split"] == ["filtered", "train", "train", "train", "test", "test"]
    assert done["reason"] == [None, None, "no score", None, None, None]
    assert Filter(threshold=4)(graded([5, 4, 3]))["split"] == ["filtered", "filtered", "train"]


def test_the_hardest_share_of_each_task():
    scores = [5.0, 1.0, 2.0, 3.0, 4.0, 4.0, None, 3.0]
    done = Filter("hardest", 0.5)(graded(scores, task=["add"] * 4 + ["swap"] * 4))
    assert done["split"][:4] == ["filtered", "train", "train", "filtered"]
    # Three of swap have a score; half of them, rounded up, are two: 3 and, of equal scores, the first by id.
    assert done["split"][4:] == ["train", "filtered", "train", "train"] and done["reason"][6] == "no score"


@pytest.mark.parametrize(
    ("rule", "threshold", "message"),
    [
        ("above", 5, "filter_rule='above'"),
        ("below", 5.5, "at most 5"),
        ("hardest", 2, "at most 1"),
        ("below", 0, "above 0"),
    ],
)
def test_rules_that_are_not_there(rule, threshold, message):
    with pytest.raises(ValueError, match=message):
        Filter(rule, threshold)
