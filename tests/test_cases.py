import pytest
from datasets import DatasetDict
from datasets import Image as ImageFeature

from hp_edit_trl.cases import check_cases, check_edits, edit_keys, load_edits
from hp_edit_trl.utils.images import read_image
from tests.helpers import make_cases, make_edits


def test_edits_are_loaded_from_where_they_were_saved(tmp_path):
    edits = make_edits(3)
    edits.save_to_disk(tmp_path / "disk")
    DatasetDict({"test": edits}).save_to_disk(tmp_path / "splits")
    (tmp_path / "parquet").mkdir()
    edits.to_parquet(tmp_path / "parquet" / "train-0.parquet")
    for path, split in (("disk", "train"), ("splits", "test"), ("parquet", "train")):
        loaded = load_edits(str(tmp_path / path), split)
        assert edit_keys(loaded) == [(f"case-{i}", editor) for i in range(3) for editor in ("one", "two")]
        assert loaded.features["edit"] == ImageFeature(decode=False) == loaded.features["image"]
        assert read_image(loaded[3]["edit"], "x").tobytes() == edits[3]["edit"].tobytes()
    with pytest.raises(ValueError, match=r"has no split 'train'; its splits are \['test'\]"):
        load_edits(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match="disk holds one dataset without splits, so there is no split 'test'"):
        load_edits(str(tmp_path / "disk"), "test")
    with pytest.raises(FileNotFoundError):
        load_edits(str(tmp_path / "missing"))
    make_cases(2).save_to_disk(tmp_path / "cases")
    with pytest.raises(ValueError, match="cases must have a column 'edit'"):
        load_edits(str(tmp_path / "cases"))


def test_what_edits_need():
    edits = make_edits(3)
    check_edits(edits, "dataset")
    with pytest.raises(
        ValueError, match="Row 1 of dataset has the id 'case-0' of row 0.*Ids must be there and unique, or"
    ):
        check_cases(edits, "dataset")
    with pytest.raises(ValueError, match="Row 6 of dataset has the id 'case-0' and editor 'one' of row 0"):
        check_edits(edits.select([*range(6), 0]), "dataset")
    with pytest.raises(ValueError, match="Row 0 of dataset has no id"):
        check_edits(edits.map(lambda row: {"id": None}), "dataset")
    check_edits(edits.select([0, 2]).remove_columns("editor"), "dataset")
    assert edit_keys(edits.select([0, 2]).remove_columns("editor")) == [("case-0", None), ("case-1", None)]
    with pytest.raises(TypeError, match="dictionary of splits"):
        check_edits(DatasetDict({"train": edits}), "dataset")
