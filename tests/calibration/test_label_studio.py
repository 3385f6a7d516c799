"""Ratings through Label Studio and back, and the commands that export and import them."""

import base64
import io
import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from datasets import Image, load_dataset, load_from_disk
from PIL import Image as PILImage

from hp_edit_trl import cli
from hp_edit_trl.calibration import from_label_studio, label_studio_config, load_rubric, to_label_studio
from hp_edit_trl.ratings import add_ratings, append_answer, ratings_file, read_ratings
from tests.calibration.helpers import RATINGS, make_edits, pixels, with_broken, with_references
from tests.fake_hub import fake_hub
from tests.processes import Script


def export(tmp_path, edits, ratings, *options):
    """The command, on files."""
    edits.save_to_disk(tmp_path / "edits")
    for rating in ratings:
        append_answer(ratings_file(tmp_path, rating.annotator), rating)
    cli.main(
        ["export-ratings", str(tmp_path), str(tmp_path / "edits"), "--output_dir", str(tmp_path / "out"), *options]
    )


def test_export_as_a_dataset(tmp_path, capsys):
    export(tmp_path, make_edits(), RATINGS)
    assert "5 ratings of 3 edits" in capsys.readouterr().out
    rated = load_from_disk(tmp_path / "out")
    assert rated["human_score"][:] == [3.5, None, None, None, 0.0, None, None, None]
    with pytest.raises(SystemExit, match="already exists"):
        cli.main(["export-ratings", str(tmp_path), str(tmp_path / "edits"), "--output_dir", str(tmp_path / "out")])
    for options in (["--image-url", "x"], ["--no-private"], ["--format", "label-studio", "--push-to-hub", "a/b"]):
        command = ["export-ratings", str(tmp_path), str(tmp_path / "edits"), "--output_dir", str(tmp_path / "new")]
        with pytest.raises(SystemExit, match="hp-edit: --"):
            cli.main([*command, *options])
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_to_the_hub_and_back(tmp_path):
    edits = make_edits()
    edits.save_to_disk(tmp_path / "edits")
    for rating in RATINGS:
        append_answer(ratings_file(tmp_path, rating.annotator), rating)
    with fake_hub() as hub:
        command = ["-m", "hp_edit_trl.cli", "export-ratings", ".", "edits", "--output_dir", "out"]
        done = Script(*command, "--push-to-hub", "someone/rated", cwd=tmp_path, environment=hub.env).wait()
        assert done.returncode == 0, done.stderr[-3000:]
        files = hub.files("someone/rated", "dataset")
        assert "datasets/someone/rated" in hub.private
    (name,) = [name for name in files if name.endswith(".parquet")]
    (tmp_path / "rated.parquet").write_bytes(files[name])
    rated = load_dataset("parquet", data_files=str(tmp_path / "rated.parquet"), cache_dir=tmp_path, split="train")
    assert rated["human_score"][:] == [3.5, None, None, None, 0.0, None, None, None]
    assert pixels(rated.cast_column("edit", Image()), "edit") == pixels(edits, "edit")
    assert rated["ratings"][0][1]["comment"] == "hm"


def decoded(url):
    head, _, content = url.partition(",")
    assert head == "data:image/jpeg;base64"
    return PILImage.open(io.BytesIO(base64.b64decode(content)))


def test_label_studio_tasks_show_the_edits_and_not_their_editors():
    edits = with_references(make_edits(), 3, 2)
    rubric = load_rubric()
    tasks = to_label_studio(edits, RATINGS, rubric=rubric.revision)
    assert len(tasks) == len(edits) and "model-" not in json.dumps(tasks)
    config = label_studio_config(edits, rubric)
    root = ET.fromstring(config)
    names = {element.get("name"): element for element in root.iter() if element.get("name")}
    used = {element.get("value")[1:] for element in names.values() if (element.get("value") or "").startswith("$")}
    assert used == {"reference", "edit", "prompt", "task"} and all(used <= task["data"].keys() for task in tasks)
    choices = [choice.get("value") for choice in names["score"]]
    assert choices == list("012345") and names["score"].tag == "Choices" and names["score"].get("toName") in names
    # The order of tasks is not that of editors.
    by_prompt = {}
    for task in tasks:
        by_prompt.setdefault(task["data"]["prompt"], []).append(task)
    assert {len(same) for same in by_prompt.values()} == {2}
    widths = sorted(decoded(task["data"]["reference"]).width for task in tasks)
    assert widths[-1] > 60 and set(widths[:-1]) == {48}  # two references side by side


def test_broken_images_are_left_out_of_the_tasks(caplog):
    edits = with_broken(make_edits(), "edit", 2)
    assert len(to_label_studio(edits, RATINGS, rubric="r:1")) == 7
    assert "Left out: The edit of case 'case-1' by 'model-one' cannot be decoded" in caplog.text


def test_label_studio_and_back_is_the_same(tmp_path):
    edits = make_edits()
    given = [replace(RATINGS[0], aspects={"adherence": 5, "quality": 3}), *RATINGS[1:]]
    tasks = to_label_studio(edits, given, rubric="r:1")
    file = tmp_path / "export.json"
    # As Label Studio exports what it imported: users and times are its own.
    for number, task in enumerate(tasks):
        task["id"] = number
        for annotation in task["annotations"]:
            annotation |= {
                "completed_by": 1,
                "created_at": "2030-01-01T00:00:00.5Z",
                "updated_at": "2030-01-02T00:00:00Z",
            }
    file.write_text(json.dumps(tasks))
    ratings, problems = from_label_studio(file, edits)
    assert ratings == given and problems == []
    assert add_ratings(ratings, tmp_path) == 5
    before = {path.name: path.read_bytes() for path in tmp_path.glob("ratings-*")}
    assert add_ratings(ratings, tmp_path) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("ratings-*")} == before
    assert sorted(map(str, read_ratings(tmp_path, edits)[0])) == sorted(map(str, given))
    rated = next(task for task in tasks if task["annotations"])
    rated["annotations"][0]["result"][0]["meta"]["aspects"] = {"quality": 7}
    file.write_text(json.dumps(tasks))
    assert "the aspects in its `meta`, {'quality': 7}, are not scores" in from_label_studio(file, edits)[1][0]


def test_images_in_a_folder(tmp_path, capsys):
    export(tmp_path, make_edits(), [], "--format", "label-studio", "--image-url", "/data/local-files/?d=x")
    assert "0 ratings of 0 edits" in capsys.readouterr().out
    tasks = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert ET.parse(tmp_path / "out" / "config.xml").getroot().tag == "View"
    for task in tasks:
        for column in ("reference", "edit"):
            prefix, _, name = task["data"][column].rpartition("/")
            assert prefix == "/data/local-files/?d=x"
            assert PILImage.open(tmp_path / "out" / "images" / name).size == (48, 32)


def annotation(*results, by=7, time="2026-02-01T10:00:00.123456Z", **values):
    return {"id": 1, "completed_by": by, "result": list(results), "was_cancelled": False, "created_at": time, **values}


def choice(value, name="score"):
    return {"from_name": name, "to_name": "edit", "type": "choices", "value": {"choices": value}}


def stars(value):
    return {"from_name": "stars", "to_name": "edit", "type": "rating", "value": {"rating": value}}


def comment(*lines):
    return {"from_name": "comment", "to_name": "edit", "type": "textarea", "value": {"text": list(lines)}}


def task(*annotations, **data):
    return {"id": 100, "data": {"id": "case-0", "editor": "model-one", **data}, "annotations": list(annotations)}


def read(tmp_path, content, **options):
    file = tmp_path / "export.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return from_label_studio(file, make_edits(), **options)


def test_annotations_of_many_kinds(tmp_path):
    tasks = [
        task(annotation(choice(["0"]), comment("not", "done")), rubric="ours:2"),
        task(annotation(stars(5), by={"id": 3, "email": "c@example.org"}), id="case-1"),
        task(annotation(choice(["4"]), choice(["cropped"], "artifacts")), id="case-2"),
        task(annotation(by=8, was_cancelled=True), id="case-3"),
        {**task(annotation(choice(["3"]))), "data": {"id": "case-3"}, "meta": {"editor": "model-two"}},
    ]
    ratings, problems = read(tmp_path, tasks, rubric="given:1")
    assert problems == []
    assert [(r.annotator, r.id, r.editor, r.score, r.comment, r.rubric) for r in ratings] == [
        ("label-studio-7", "case-0", "model-one", 0, "not\ndone", "ours:2"),
        ("c@example.org", "case-1", "model-one", 5, "", "given:1"),
        ("label-studio-7", "case-2", "model-one", 4, "", "given:1"),
        ("label-studio-8", "case-3", "model-one", None, "", "given:1"),
        ("label-studio-7", "case-3", "model-two", 3, "", "given:1"),
    ]
    assert ratings[0].time == "2026-02-01T10:00:00.123456Z"


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (task(annotation(choice(["6"]))), "task 100, annotation 1: the score ['6'] is not an integer from 0 to 5"),
        (task(annotation(stars(-1))), "the score -1 is not an integer"),
        (task(annotation(stars(2.5))), "the score 2.5 is not an integer"),
        (task(annotation(choice(["1", "2"]))), "the score ['1', '2'] is not an integer"),
        (task(annotation(choice(["good"]))), "the score ['good'] is not an integer"),
        (task(annotation()), "0 answers of type choices or rating"),
        (task(annotation(choice(["1"], "a"), choice(["2"], "b"))), "2 answers of type choices or rating"),
        (task(annotation(choice(["1"]), time="yesterday")), "`created_at` 'yesterday' is not a time"),
        (task(annotation(choice(["1"]), time=None)), "`created_at` None is not a time"),
        (task(annotation(choice(["1"]), by=None)), "`completed_by` names no user"),
        (task(annotation({**choice(["1"]), "value": None})), "the score None is not an integer"),
        (task(annotation(choice(["1"]), {"type": "textarea", "value": 3})), "the comment"),
        (task({"id": 1}), "no `result`"),
        (task(5), "task 100, annotation 5: it has no `result`"),
        (task(annotation(choice(["1"])), id="case-9"), "no edit of case 'case-9' by 'model-one'"),
        (task(annotation(choice(["1"])), id=None), "neither `edit_hash` nor `id`"),
        (task(annotation(choice(["1"])), edit_hash="abc"), "no edit 'abc': it was exported from another dataset"),
        (task(annotation(choice(["1"])), edit_hash=["abc"]), "no edit ['abc']"),
        (task(annotation(choice(["1"])), editor=["x"]), "no edit of case 'case-0'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_reported_and_the_rest_kept(tmp_path, broken, reason):
    ratings, problems = read(
        tmp_path, [task(annotation(choice(["2"]))), broken, task(annotation(stars(1)), id="case-1")]
    )
    assert [rating.score for rating in ratings] == [2, 1]
    assert len(problems) == 1 and reason in problems[0], problems


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("not json", "is not JSON"),
        ('{"data": {}}', "not a list of tasks"),
        ('[{"id": 1, "score": "3", "annotator": 1}]', "not JSON-MIN"),
        ("[3]", "not a list of tasks"),
    ],
)
def test_what_is_no_export_is_refused(tmp_path, content, reason):
    with pytest.raises(ValueError, match=reason):
        read(tmp_path, content)


def test_import_by_the_command(tmp_path, capsys):
    make_edits().save_to_disk(tmp_path / "edits")
    (tmp_path / "export.json").write_text(json.dumps([task(annotation(choice(["2"]))), task(annotation(stars(9)))]))
    command = ["import-ratings", str(tmp_path / "export.json"), str(tmp_path / "edits")]
    command += ["--output_dir", str(tmp_path / "ratings")]
    for added, there in ((1, 0), (0, 1)):
        cli.main(command)
        said = capsys.readouterr()
        assert f"{added} ratings added, {there} already there, 1 left out" in said.out
        assert "left out: task 100, annotation 1: the score 9" in said.err
    assert [rating.score for rating in read_ratings(tmp_path / "ratings")[0]] == [2]
    (tmp_path / "export.json").write_text("[")
    with pytest.raises(SystemExit, match="hp-edit: .*is not JSON"):
        cli.main(command)
