"""The dataset as it lies on the Hub: row groups, files, card, figures."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from PIL import Image

from hp_edit_trl.data import CASE_FEATURES, SCORE_FEATURES, load_realpref
from hp_edit_trl.data.builder import export, export_dataset, push_dataset
from hp_edit_trl.data.builder.export import GROUP_BYTES, GROUP_ROWS
from tests.data.builder.toy_build import encoded
from tests.data.test_schema import FEATURES, make_rows


def batches(count: int, **changes):
    rows = {**make_rows(count), **{name: list(values) for name, values in changes.items()}}
    for start in range(0, count, 7):
        yield {name: values[start : start + 7] for name, values in rows.items()}


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_what_is_written_comes_back_and_the_same_rows_give_the_same_bytes(tmp_path):
    def write(folder):
        return export_dataset({"train": batches(20), "test": batches(3)}, folder, rejected={"edits": {"no edit": 4}})

    contents = write(tmp_path / "one")
    assert contents.splits == {"train": 20, "test": 3}
    write(tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    loaded = load_realpref(str(tmp_path / "one"))
    assert (
        loaded.features == FEATURES
        and loaded["id"] == make_rows(20)["id"]
        and loaded["score"] == make_rows(20)["score"]
    )
    pixels = [np.asarray(Image.open(io.BytesIO(value["bytes"]))) for value in make_rows(20)["edit"]]
    assert all(np.array_equal(np.asarray(row["edit"]), wanted) for row, wanted in zip(loaded, pixels, strict=True))
    # Other rows in the same place are not taken from the cache.
    export_dataset({"train": batches(4)}, tmp_path / "one")
    assert len(load_realpref(str(tmp_path / "one"))) == 4
    assert not (tmp_path / "one.part").exists() and not (tmp_path / "one.old").exists()


def test_row_groups_and_files_have_limits(tmp_path, monkeypatch):
    noise = np.random.default_rng(0)
    images = [encoded(Image.fromarray(noise.integers(0, 255, (64, 64, 3), dtype=np.uint8))) for _ in range(240)]
    export_dataset({"train": batches(240, image=images)}, tmp_path / "plain")
    (file,) = (tmp_path / "plain" / "data").iterdir()
    metadata = pq.ParquetFile(file).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [GROUP_ROWS, GROUP_ROWS, 40]
    assert GROUP_BYTES < 100e6
    # The limits in bytes, made small
    size = len(images[0]["bytes"])
    monkeypatch.setattr(export, "GROUP_BYTES", 10 * size)
    monkeypatch.setattr(export, "FILE_BYTES", 100 * size)
    export_dataset({"train": batches(240, image=images)}, tmp_path / "small")
    files = sorted((tmp_path / "small" / "data").iterdir())
    assert [file.name for file in files] == [f"train-{i:05d}-of-{len(files):05d}.parquet" for i in range(len(files))]
    assert len(files) >= 2
    for file in files:
        metadata = pq.ParquetFile(file).metadata
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            assert group.total_byte_size <= 11 * size + 5000 * group.num_rows
    assert load_realpref(str(tmp_path / "small"))["id"] == make_rows(240)["id"]


def test_a_row_that_is_larger_than_a_group_stands_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "GROUP_BYTES", 10)
    export_dataset({"train": batches(3)}, tmp_path / "rows")
    (file,) = (tmp_path / "rows" / "data").iterdir()
    assert pq.ParquetFile(file).metadata.num_row_groups == 3


def test_the_card_says_what_there_is(tmp_path):
    rows = {
        "license": ["cc0-1.0"] * 8 + [None, "a | b"],
        "source": ["mine"] * 9 + ["theirs"],
        "language": ["en"] * 9 + ["zh"],
        "task": ["add"] * 6 + ["style"] * 4,
        "writer": [None] * 10,
    }
    export_dataset(
        {"train": batches(10, **rows), "filtered": batches(2)}, tmp_path / "set", rejected={"edits": {"no edit": 4}}
    )
    card = DatasetCard.load(tmp_path / "set" / "README.md")
    assert card.data.license == "other" and card.data.language == ["en", "text", "zh"]
    info = card.data.dataset_info
    assert {split["name"]: split["num_examples"] for split in info["splits"]} == {"train": 10, "filtered": 2}
    assert info["download_size"] == sum(file.stat().st_size for file in (tmp_path / "set" / "data").iterdir())
    text = card.text
    for line in (
        "| add | 6 | 0 |",
        "| style | 4 | 0 |",
        "| all | 10 | 2 |",
        "| edits | no edit | 4 |",
        "| mine | cc0-1.0 | 8 |",
        "| mine | unknown | 1 |",
        "| theirs | a \\| b | 1 |",
    ):
        assert line in text, line
    assert "\n\n\n" not in text and "`test`" not in text
    for figure in ("tasks_and_categories.png", "scores.png"):
        assert Image.open(tmp_path / "set" / "figures" / figure).size[0] > 500
    # What the Hub's own tools read
    dataset = load_dataset(str(tmp_path / "set"))
    assert dataset["train"].features == FEATURES and dataset["train"].info.splits["train"].num_examples == 10


def test_a_license_that_all_rows_share(tmp_path):
    export_dataset({"train": batches(3, license=["cc-by-4.0"] * 3)}, tmp_path / "set")
    assert DatasetCard.load(tmp_path / "set" / "README.md").data.license == "cc-by-4.0"


def test_cases_without_edits_or_scores(tmp_path):
    bare = ({name: batch[name] for name in CASE_FEATURES} for batch in batches(9))
    export_dataset({"train": bare}, tmp_path / "set")
    loaded = load_realpref(str(tmp_path / "set"))
    assert "edit" not in loaded.features and len(loaded) == 9
    assert "score" not in (tmp_path / "set" / "README.md").read_text().split("## ")[1]
    assert not (tmp_path / "set" / "figures" / "scores.png").exists()


def test_nothing_to_write_and_nothing_to_push(tmp_path):
    with pytest.raises(ValueError, match=r"no rows to export in the splits \['train'\]"):
        export_dataset({"train": iter(())}, tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="holds no dataset"):
        push_dataset(tmp_path, "someone/nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mine": [1] * 3}, r"'train' has columns that are not in the schema: \['mine'\]"),
        ({"score": [1.0, 7.0, 1.0]}, "Row 1 of the split 'train', column 'score': 7 is not between 0 and 5"),
        ({"image": [None] * 3}, "Row 0 of the split 'train', column 'image': has no image"),
        ({"id": ["a", "b", "a"]}, "Row 2 of the split 'train', column 'id': row 0 has 'a'"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        export_dataset({"train": batches(3, **changes)}, tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_all_rows_have_the_same_columns(tmp_path):
    (whole,) = batches(3)
    bare = {name: values for name, values in whole.items() if name not in SCORE_FEATURES}
    for splits in ({"train": [whole], "test": [bare]}, {"train": [bare, whole]}):
        with pytest.raises(ValueError, match="has other columns than the rows before it"):
            export_dataset(splits, tmp_path / "set")
    with pytest.raises(ValueError, match=r"has no columns \['language'\]"):
        export_dataset({"train": [{n: v for n, v in whole.items() if n != "language"}]}, tmp_path / "set")


def test_names_that_look_like_formulas_can_be_drawn(tmp_path):
    export_dataset({"train": batches(3, task=[r"$\bad{$ x"] * 3, category=[r"$\bad{$ y"] * 3)}, tmp_path / "set")
    assert (tmp_path / "set" / "figures" / "scores.png").exists()


def test_a_kill_between_the_renamings_loses_nothing(tmp_path):
    export_dataset({"train": batches(3)}, tmp_path / "set")
    before = digests(tmp_path / "set")
    (tmp_path / "set").rename(tmp_path / "set.old")
    with pytest.raises(ValueError, match="no rows"):
        export_dataset({"train": iter(())}, tmp_path / "set")
    assert digests(tmp_path / "set") == before


def test_what_was_there_survives_a_full_disk(tmp_path, monkeypatch):
    export_dataset({"train": batches(3)}, tmp_path / "set")
    before = digests(tmp_path / "set")

    def full(count):
        yield from batches(count)
        raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match="cannot be written .*No space left on device.*Free space, and run again"):
        export_dataset({"train": full(9)}, tmp_path / "set")
    assert digests(tmp_path / "set") == before and not (tmp_path / "set.part").exists()
