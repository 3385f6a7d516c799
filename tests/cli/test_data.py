"""`hp-edit check-dataset` on what people have in their folders."""

import json

import pytest
from datasets import Dataset

from hp_edit_trl.cli import main
from tests.helpers import make_cases, make_edits, photo


def write_folder(folder, rows, sizes=((64, 64),)):
    """A folder of pictures with `metadata.jsonl`; each row gets the fields of `rows` besides its picture."""
    folder.mkdir()
    for i, _ in enumerate(rows):
        photo(*sizes[i % len(sizes)], seed=i).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", **row}) for i, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def test_a_folder_of_ones_own_is_checked_as_the_trainers_do(tmp_path, capsys):
    prompts = [{"prompt": f"Make it red, {i}", "wish": i} for i in range(3)]
    folder = write_folder(tmp_path / "photos", prompts, sizes=((64, 64), (96, 64)))
    main(["check-dataset", folder])
    assert capsys.readouterr().out == f"{folder}, split train: 3 rows in order, for training and benchmarks\n"
    folder = write_folder(tmp_path / "tasks", [prompt | {"task": "recolour"} for prompt in prompts])
    main(["check-dataset", folder])
    assert "HP-Scorer has no prompt for the tasks recolour: use scorer_task='base'" in capsys.readouterr().out
    folder = write_folder(tmp_path / "blank", [*prompts, {"prompt": " "}])
    with pytest.raises(SystemExit, match="1 of 4 cases of .*Row 3 has a blank prompt: write an instruction"):
        main(["check-dataset", folder])
    folder = write_folder(tmp_path / "foreign", [{"instruction": "Make it red"}])
    with pytest.raises(SystemExit, match="has no column 'prompt'"):
        main(["check-dataset", folder])


def test_what_a_dataset_is_for_goes_by_its_columns(tmp_path, capsys):
    edits = make_edits(3, ["one"])
    edits.save_to_disk(tmp_path / "edits")
    pairs = [
        {**{name: row[name] for name in ("prompt", "image")}, "chosen": row["edit"], "rejected": row["edit"]}
        for row in edits
    ]
    Dataset.from_list(pairs).save_to_disk(tmp_path / "pairs")
    for name, purpose in (("edits", "scoring, rating and training"), ("pairs", "DPO")):
        main(["check-dataset", str(tmp_path / name)])
        assert capsys.readouterr().out.endswith(f"3 rows in order, for {purpose}\n")


def test_what_realpref_promises_is_checked_where_it_is_promised(tmp_path):
    cases = make_cases(2)
    cases.add_column("schema_version", [1, 1]).add_column("width", [64, 0]).save_to_disk(tmp_path / "realpref")
    with pytest.raises(SystemExit, match="column 'width': 0 is not a number of pixels"):
        main(["check-dataset", str(tmp_path / "realpref")])
    cases.add_column("width", [64, 0]).save_to_disk(tmp_path / "own")
    main(["check-dataset", str(tmp_path / "own")])


@pytest.mark.parametrize("column", ["image", "target"])
def test_a_picture_that_is_cut_off_is_found_with_its_file(tmp_path, column):
    rows = [{"prompt": "Make it red", f"{column}_file_name": f"{i}.png"} for i in range(3)]
    if column == "target":
        rows = [{**row, "image_file_name": f"{i}.png"} for i, row in enumerate(rows)]
    folder = write_folder(tmp_path / "photos", rows)
    lines = (tmp_path / "photos" / "metadata.jsonl").read_text().replace('"file_name"', '"name"')
    (tmp_path / "photos" / "metadata.jsonl").write_text(lines)
    file = tmp_path / "photos" / "1.png"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(SystemExit, match=f"1 of 3 cases .*Row 1 has an image .*that cannot be decoded '{file}'"):
        main(["check-dataset", folder])


def test_what_is_not_there(tmp_path):
    folder = write_folder(tmp_path / "photos", [{"prompt": "Make it red"}])
    with pytest.raises(
        SystemExit, match="metadata.jsonl is a file, but a dataset is a folder .*: name the file's fol"
    ):
        main(["check-dataset", f"{folder}/metadata.jsonl"])
    with pytest.raises(
        SystemExit, match=r"has no split 'test'; its splits are \['train'\]. Name one of them: --split"
    ):
        main(["check-dataset", folder, "--split", "test"])
