"""Reading reviews, and what those of several people come to."""

import json

import pytest

from hp_edit_trl.ratings import append_answer
from hp_edit_trl.reviews import Review, Verification, read_reviews, verify


def review(annotator="anna", case="a", verdict="accept", reason="", **more):
    return Review(annotator, case, "Do it", verdict, "g:1", "2026-01-01T00:00:00+00:00", reason, **more)


def test_any_rejection_counts_and_a_correction_outweighs_acceptance():
    red, blue = {"corrected_prompt": "Do it in red"}, {"corrected_prompt": "Do it in blue"}
    found = verify(
        [
            review(case="a"), review("ben", "a"), review("eve", "a", None),
            review(case="b"), review("ben", "b", "correct", **red),
            review(case="c", verdict="correct", **red), review("ben", "c", "correct", **red), review("eve", "c"),
            review(case="d", verdict="correct", **red), review("ben", "d", "correct", **blue),
            review(case="e"), review("ben", "e", "correct", **red), review("eve", "e", "reject", "unclear"),
            review(case="f", verdict=None),
        ]
    )  # fmt: skip
    assert found == {
        "a": Verification("accepted", 2),
        "b": Verification("corrected", 2, (), "Do it in red"),
        "c": Verification("corrected", 3, (), "Do it in red"),
        "d": Verification("disputed", 2),
        "e": Verification("rejected", 3, ("unclear",)),
    }


def test_lines_that_are_no_reviews_are_reported_and_the_last_one_counts(tmp_path):
    file = tmp_path / "reviews-anna.jsonl"
    append_answer(file, review())
    append_answer(file, review(verdict="reject", reason="unclear"))
    append_answer(file, review(case="b", verdict="maybe"))
    append_answer(file, review(case="c", verdict="correct", corrected_prompt=" "))
    append_answer(file, review(case="d", verdict="correct"))
    whole = json.loads(file.read_text().splitlines()[0])
    with file.open("a") as lines:
        for bad in ({**whole, "id": 3}, {**whole, "reason": None}, {"id": "e"}, [1]):
            lines.write(json.dumps(bad) + "\n")
        lines.write('{"id": "e", "annot')
    reviews, problems = read_reviews(tmp_path)
    assert [(one.id, one.verdict) for one in reviews] == [("a", "reject")]
    assert len(problems) == 8 and "line 3: the verdict 'maybe'" in problems[0]
    assert "line 4: as corrected, case 'c' has a blank prompt" in problems[1]
    with pytest.raises(FileNotFoundError, match="No reviews at .*reviews-"):
        read_reviews(tmp_path / "none")
    append_answer(tmp_path / "reviews-ben.jsonl", Review("ben", "a", "Do it", "accept", "g:2", "2026-01-01"))
    with pytest.raises(ValueError, match="2 revisions of the guidelines, g:1, g:2"):
        read_reviews(tmp_path)
