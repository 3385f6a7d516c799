import json

import pytest
from PIL import Image

from hp_edit_trl.cases import load_split
from hp_edit_trl.cli import main
from hp_edit_trl.utils.image_folders import metadata_fault, unlisted_images


ROWS = [{"file_name": f"{i}.png", "prompt": "Make it red"} for i in range(3)]


@pytest.fixture
def make_folder(tmp_path):
    """A folder of three images with the lines of a `metadata.jsonl`."""

    def make(lines, encoding="utf-8"):
        for row in ROWS:
            Image.new("RGB", (8, 8)).save(tmp_path / row["file_name"])
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (tmp_path / "metadata.jsonl").write_text(text + "\n", encoding=encoding)
        return str(tmp_path)

    return make


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ('{"file_name": "2.png" "prompt": "x"}', "line 4 is no JSON: .* at character 23 of .*Each line is an object"),
        ("[1]", "line 4 is a list, but each line"),
        ({"file_name": "2.png", "prompt": 3}, "line 4: 'prompt' is a number, but text in line 1"),
        ({"file_name": "2.png", "prompt": ["x"]}, "line 4: 'prompt' is a list, but text in line 1"),
    ],
)
def test_a_fault_is_told_with_its_line(make_folder, last, message):
    with pytest.raises(ValueError, match=f"metadata.jsonl, {message}") as caught:
        load_split(make_folder([ROWS[0], "", ROWS[1], last]))
    assert caught.value.__cause__ is not None


def test_another_key_for_the_file_is_told(make_folder):
    with pytest.raises(
        ValueError, match=r"line 1 names no image; its keys are \['filename', 'prompt'\]. Name the file"
    ):
        load_split(make_folder([{"filename": "0.png", "prompt": "x"}] * 3))


def test_what_can_be_read_has_no_fault(make_folder):
    assert metadata_fault(make_folder([*ROWS, "", {"file_name": "0.png", "prompt": None}])) is None
    assert metadata_fault(make_folder([{"file_name": "0.png", "mask_file_name": "1.png", "size": 1.5}])) is None
    numbers = [{"file_name": "0.png", "size": 1}, {"file_name": "1.png", "size": 1.5}]
    assert metadata_fault(make_folder(numbers)) is None
    assert "line 2 is null, but each line" in metadata_fault(make_folder([ROWS[0], "null"]))
    assert "is not UTF-8" in metadata_fault(make_folder([ROWS[0], '{"prompt": "Grün"}'], encoding="latin-1"))


def test_images_that_are_left_out_are_told(make_folder, capsys):
    folder = make_folder(ROWS)
    main(["check-dataset", folder])
    assert "left out" not in capsys.readouterr().out
    folder = make_folder([ROWS[0], {"file_name": None, "prompt": "x", "mask_file_names": ["1.png"]}])
    assert [path.name for path in unlisted_images(folder)] == ["2.png"]
    folder = make_folder(ROWS[:1])
    main(["check-dataset", folder])
    assert "2 images of the folder are in no metadata.jsonl and are left out, e.g. 1.png." in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        '{"file_name": "0.png", "prompt": "a\u2028b\x85c"}',
        '\ufeff{"file_name": "0.png", "prompt": "x"}',
        '{"file_name": "0.png", "prompt": "x"} {"file_name": "1.png", "prompt": "x"}',
        '{"file_name": "0.png",\n"prompt": "x"}',
        '{"file_name": "0.png", "prompt": "x"}\r',
    ],
)
def test_what_the_loader_reads_can_be_checked(make_folder, tmp_path, line):
    (tmp_path / ".old").mkdir()
    (tmp_path / ".old" / "metadata.jsonl").write_text("[")
    (tmp_path / "edits.png").mkdir()
    (tmp_path / "paper.pdf").touch()
    main(["check-dataset", make_folder([line])])
    left_out = [path.name for path in unlisted_images(str(tmp_path))]
    assert left_out == (["1.png", "2.png"] if len(line.splitlines()) != 2 and "} {" not in line else [])
    if left_out:
        assert metadata_fault(str(tmp_path)) is None


def test_a_saved_dataset_leaves_out_nothing(make_folder, tmp_path):
    folder = make_folder(["[1]"])
    (tmp_path / "state.json").touch()
    assert unlisted_images(folder) == []


def test_a_folder_without_metadata_leaves_out_nothing(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    assert unlisted_images(str(tmp_path)) == []
