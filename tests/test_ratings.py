import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Image, load_from_disk

from hp_edit_trl.ratings import Rating, add_ratings, append_answer, ratings_dataset, ratings_file, read_ratings
from tests.calibration import helpers
from tests.helpers import make_edits


def rating(annotator="anna", case="case-0", editor="one", score=3, rubric="r:1", **kwargs):
    return Rating(annotator, case, editor, score, rubric, "2026-01-01T00:00:00+00:00", **kwargs)


def test_what_was_written_is_read_and_the_last_word_counts(tmp_path):
    first = rating(comment='schön "?"\n')
    skipped = rating(case="case-1", score=None)
    for one in (first, skipped, rating(editor="two", score=0)):
        append_answer(tmp_path / "ratings-anna.jsonl", one)
    append_answer(tmp_path / "ratings-ben.jsonl", rating("ben", score=5))
    ratings, problems = read_ratings(tmp_path, make_edits(2))
    assert problems == []
    assert ratings == [first, skipped, rating(editor="two", score=0), rating("ben", score=5)]
    append_answer(tmp_path / "ratings-anna.jsonl", rating(score=1))
    ratings, _ = read_ratings(tmp_path / "ratings-anna.jsonl")
    assert ratings == [rating(score=1), skipped, rating(editor="two", score=0)]


def test_a_file_cut_in_the_middle_of_a_line(tmp_path, caplog):
    file = tmp_path / "ratings-anna.jsonl"
    append_answer(file, rating())
    append_answer(file, rating(case="case-1", comment="ü" * 30))
    whole = file.read_bytes()
    for cut in range(len(whole) - 2, whole.index(b"\n") + 1, -7):  # in the middle of a letter, too
        file.write_bytes(whole[:cut])
        ratings, problems = read_ratings(tmp_path)
        assert ratings == [rating()] and "ratings-anna.jsonl, line 2: not a complete rating" in problems[0]
    append_answer(file, rating(case="case-1", score=4))
    ratings, problems = read_ratings(tmp_path)
    assert ratings == [rating(), rating(case="case-1", score=4)] and len(problems) == 1
    assert "Left out: ratings-anna.jsonl, line 2" in caplog.text


@pytest.mark.parametrize("score", [6, -1, 3.5, 4.0, "4", True, [4]])
def test_scores_that_are_none(tmp_path, score):
    append_answer(tmp_path / "ratings-anna.jsonl", rating(score=2))
    append_answer(tmp_path / "ratings-anna.jsonl", rating(score=score))
    append_answer(tmp_path / "ratings-anna.jsonl", rating(case="case-1"))
    ratings, problems = read_ratings(tmp_path)
    assert ratings == [rating(score=2), rating(case="case-1")]
    assert problems == [f"ratings-anna.jsonl, line 2: the score {score!r} is not an integer from 0 to 5"]


def test_edits_that_the_dataset_does_not_hold(tmp_path):
    for one in (rating(), rating(case="elsewhere"), rating(editor="three"), rating(editor=None)):
        append_answer(tmp_path / "r.jsonl", one)
    ratings, problems = read_ratings(tmp_path / "r.jsonl", make_edits(1))
    assert ratings == [rating()]
    assert [problem.split(": ")[1] for problem in problems] == [
        "the dataset has no edit of case 'elsewhere' by 'one'",
        "the dataset has no edit of case 'case-0' by 'three'",
        "the dataset has no edit of case 'case-0'",
    ]


def test_two_revisions_of_the_rubric(tmp_path):
    for one in (rating(), rating(case="case-1", rubric="r:2")):
        append_answer(tmp_path / "r.jsonl", one)
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
    lines = [
        "[1, 2]",
        '"text"',
        "null",
        "5",
        '{"id": "case-0"}',
        "prose",
        json.dumps({"annotator": ["x"], "id": "a", "editor": None, "score": 1, "rubric": "r", "time": ""}),
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    ratings, problems = read_ratings(tmp_path / "r.jsonl")
    assert ratings == [] and len(problems) == 7
    (tmp_path / "empty.jsonl").touch()
    assert read_ratings(tmp_path / "empty.jsonl") == ([], [])


def test_ratings_stand_beside_their_edits():
    edits = helpers.make_edits()
    first = replace(helpers.RATINGS[0], aspects={"image quality": 4})
    rated = ratings_dataset([first, *helpers.RATINGS[1:]], edits)
    assert rated.column_names == [*edits.column_names, "human_score", "num_ratings", "ratings"]
    found = {(row["id"], row["editor"]): row for row in rated}
    assert len(found) == len(rated) == len(edits)
    assert (found["case-0", "model-one"]["human_score"], found["case-0", "model-one"]["num_ratings"]) == (3.5, 2)
    assert found["case-0", "model-one"]["ratings"][1] == {
        "annotator": "bert", "score": 2, "comment": "hm", "rubric": "r:1", "time": "2026-01-01T10:01:00+00:00",
        "aspects": [],
    }  # fmt: skip
    assert found["case-0", "model-one"]["ratings"][0]["aspects"] == [{"name": "image quality", "score": 4}]
    assert (found["case-2", "model-one"]["human_score"], found["case-2", "model-one"]["num_ratings"]) == (0.0, 1)
    for key in (("case-1", "model-two"), ("case-3", "model-one")):  # skipped, not seen: no score, never 0
        assert found[key]["human_score"] is None and found[key]["num_ratings"] == 0
    assert [rating["score"] for rating in found["case-1", "model-two"]["ratings"]] == [None]
    assert helpers.pixels(rated, "edit") == helpers.pixels(edits, "edit")


def test_a_dataset_without_editors():
    edits = helpers.make_edits(editors=("x",)).remove_columns("editor")
    rated = ratings_dataset([helpers.make_rating(editor=None, score=4)], edits)
    assert rated["human_score"][:] == [4.0, None, None, None]


def test_ratings_of_other_edits_and_taken_columns_are_refused():
    with pytest.raises(ValueError, match="anna rated an edit of case 'case-9' by 'model-one', which the dataset"):
        ratings_dataset([helpers.make_rating(id="case-9")], helpers.make_edits())
    with pytest.raises(ValueError, match=r"columns \['ratings'\] already"):
        ratings_dataset([], helpers.make_edits().add_column("ratings", [1] * 8))


def test_images_come_along_where_the_dataset_has_paths(tmp_path):
    edits = helpers.with_references(helpers.make_edits(), 1, 2)
    expected = helpers.pixels(edits, "edit")
    files = [str(tmp_path / f"{i}.png") for i in range(len(edits))]
    for file, image in zip(files, edits["edit"], strict=True):
        image.save(file)
    by_path = edits.remove_columns("edit").add_column("edit", files)
    ratings_dataset(helpers.RATINGS, by_path).save_to_disk(tmp_path / "out")
    for file in files:
        Path(file).unlink()
    rated = load_from_disk(tmp_path / "out")
    assert helpers.pixels(rated, "edit") == expected and isinstance(rated.features["edit"], Image)
    assert len(rated[1]["images"]) == 2 and rated[0]["images"] is None


def test_a_later_rating_is_not_taken_back(tmp_path):
    first, second = helpers.make_rating(score=1, minute=1), helpers.make_rating(score=2, minute=2)
    newer = helpers.make_rating(score=5, minute=9)
    assert add_ratings([first, second], tmp_path) == 2
    append_answer(ratings_file(tmp_path, "anna"), newer)
    assert add_ratings([first, second], tmp_path) == 0
    assert read_ratings(tmp_path)[0] == [newer]
    assert add_ratings([helpers.make_rating(score=0, minute=10)], tmp_path) == 1
    assert read_ratings(tmp_path)[0][0].score == 0


def test_rubrics_are_not_mixed(tmp_path):
    add_ratings([helpers.make_rating()], tmp_path)
    before = (tmp_path / "ratings-anna.jsonl").read_bytes()
    with pytest.raises(ValueError, match="rubrics r:1, r:2"):
        add_ratings([helpers.make_rating("bert"), helpers.make_rating("anna", rubric="r:2", minute=5)], tmp_path)
    assert (tmp_path / "ratings-anna.jsonl").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
