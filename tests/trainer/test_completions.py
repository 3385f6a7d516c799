from types import SimpleNamespace

import pytest
from datasets import load_dataset

from hp_edit_trl.trainer.completions import log_completions_table
from tests.helpers import photo


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_trackers_get_a_table_with_images(tmp_path, monkeypatch, tracker):
    # A stand-in with the three names that are used of each; the real ones want an account or a Space.
    logged = []

    def log(data, **kwargs):
        assert kwargs == {}  # a step of our own would clash with that of transformers' callback
        logged.append(data["completions"])

    def table(columns=None, data=None, dataframe=None):
        return [dict(zip(columns, row, strict=True)) for row in data] if data else dataframe.to_dict("records")

    module = SimpleNamespace(log=log, Image=lambda image: ("image", image.size), Table=table)
    monkeypatch.setitem(__import__("sys").modules, tracker, module)
    rows = [
        {"step": 2, "id": "a", "prompt": "x", "reference": photo(32, 16), "completion": photo(16, 16), "reward": 0.5,
            "odd": {1}},
        {"step": 3, "id": "b", "prompt": "y", "reference": photo(32, 16), "completion": photo(16, 16), "reward": 0.25,
            "note": "n", "odd": "half a \ud83d"},
    ]  # fmt: skip
    log_completions_table(rows, 3, tmp_path, [tracker])
    ((first, second),) = logged
    assert first["reference"] == ("image", (32, 16)) and second["completion"] == ("image", (16, 16))
    assert (first["id"], first["reward"], first["step"]) == ("a", 0.5, 2) and second["note"] == "n"
    stored = load_dataset("parquet", data_files=str(tmp_path / "completions" / "completions_00003.parquet"))["train"]
    assert stored["note"] == [None, "n"] and stored["odd"] == ["{1}", "half a ?"]  # whatever a function logged
