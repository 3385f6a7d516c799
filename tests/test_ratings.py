import json

import pytest

from hp_edit_trl.ratings import Rating, append_rating, read_ratings
from tests.helpers import make_edits


def rating(annotator="anna", case="case-0", editor="one", score=3, rubric="r:1", **kwargs):
    return Rating(annotator, case, editor, score, rubric, "2026-01-01T00:00:00+00:00", **kwargs)


def test_what_was_written_is_read_and_the_last_word_counts(tmp_path):
    first = rating(comment='schön "?"\n')
    skipped = rating(case="case-1", score=None)
    for one in (first, skipped, rating(editor="two", score=0)):
        append_rating(tmp_path / "ratings-anna.jsonl", one)
    append_rating(tmp_path / "ratings-ben.jsonl", rating("ben", score=5))
    ratings, problems = read_ratings(tmp_path, make_edits(2))
    assert problems == []
    assert ratings == [first, skipped, rating(editor="two", score=0), rating("ben", score=5)]
    append_rating(tmp_path / "ratings-anna.jsonl", rating(score=1))
    ratings, _ = read_ratings(tmp_path / "ratings-anna.jsonl")
    assert ratings == [rating(score=1), skipped, rating(editor="two", score=0)]


def test_a_file_cut_in_the_middle_of_a_line(tmp_path, caplog):
    file = tmp_path / "ratings-anna.jsonl"
    append_rating(file, rating())
    append_rating(file, rating(case="case-1", comment="ü" * 30))
    whole = file.read_bytes()
    for cut in range(len(whole) - 2, whole.index(b"\n") + 1, -7):  # in the middle of a letter, too
        file.write_bytes(whole[:cut])
        ratings, problems = read_ratings(tmp_path)
        assert ratings == [rating()] and "ratings-anna.jsonl, line 2: not a whole rating" in problems[0]
    append_rating(file, rating(case="case-1", score=4))
    ratings, problems = read_ratings(tmp_path)
    assert ratings == [rating(), rating(case="case-1", score=4)] and len(problems) == 1
    assert "Left out: ratings-anna.jsonl, line 2" in caplog.text


@pytest.mark.parametrize("score", [6, -1, 3.5, 4.0, "4", True, [4]])
def test_scores_that_are_none(tmp_path, score):
    append_rating(tmp_path / "ratings-anna.jsonl", rating(score=2))
    append_rating(tmp_path / "ratings-anna.jsonl", rating(score=score))
    append_rating(tmp_path / "ratings-anna.jsonl", rating(case="case-1"))
    ratings, problems = read_ratings(tmp_path)
    assert ratings == [rating(score=2), rating(case="case-1")]
    assert problems == [f"ratings-anna.jsonl, line 2: the score {score!r} is no whole number from 0 to 5"]


def test_edits_that_the_dataset_does_not_hold(tmp_path):
    for one in (rating(), rating(case="elsewhere"), rating(editor="three"), rating(editor=None)):
        append_rating(tmp_path / "r.jsonl", one)
    ratings, problems = read_ratings(tmp_path / "r.jsonl", make_edits(1))
    assert ratings == [rating()]
    assert [problem.split(": ")[1] for problem in problems] == [
        "the dataset has no edit of case 'elsewhere' by 'one'",
        "the dataset has no edit of case 'case-0' by 'three'",
        "the dataset has no edit of case 'case-0'",
    ]


def test_two_revisions_of_the_rubric(tmp_path):
    for one in (rating(), rating(case="case-1", rubric="r:2")):
        append_rating(tmp_path / "r.jsonl", one)
    with pytest.raises(ValueError, match="made with 2 revisions of the rubric, r:1, r:2"):
        read_ratings(tmp_path / "r.jsonl")
    ratings, problems = read_ratings(tmp_path / "r.jsonl", rubric="r:2")
    assert ratings == [rating(case="case-1", rubric="r:2")]
    assert problems == ["r.jsonl, line 1: made with the rubric 'r:1', not 'r:2'"]


def test_files_that_are_no_ratings(tmp_path):
    with pytest.raises(FileNotFoundError, match="No ratings at"):
        read_ratings(tmp_path)
    with pytest.raises(FileNotFoundError, match="No ratings at"):
        read_ratings(tmp_path / "missing.jsonl")
    lines = ["[1, 2]", '"text"', "null", "5", '{"id": "case-0"}', "prose", json.dumps({"annotator": ["x"], "id": "a", "editor": None, "score": 1, "rubric": "r", "time": ""})]  # fmt: skip
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    ratings, problems = read_ratings(tmp_path / "r.jsonl")
    assert ratings == [] and len(problems) == 7
    (tmp_path / "empty.jsonl").touch()
    assert read_ratings(tmp_path / "empty.jsonl") == ([], [])
