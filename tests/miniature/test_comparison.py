import math

import numpy as np
import pytest
from datasets import concatenate_datasets
from PIL import Image

from hp_edit_trl.miniature import (
    before_after_sheet,
    comparison,
    comparison_table,
    edit_dataset,
    load_dataset,
    score_edits,
)
from hp_edit_trl.miniature.comparison import gains_figure, steps_table
from hp_edit_trl.utils.statistics import paired_difference


def test_edits_and_scores_stay_with_their_cases():
    dataset = load_dataset("test", 20)
    edits = edit_dataset(lambda cases: [row["target"] for row, _ in cases], dataset, batch_size=7)
    assert [edit.tobytes() for edit in edits] == [row["target"].tobytes() for row in dataset]
    assert score_edits(edits, dataset) == [5.0] * 20
    mixed = [row["target"] if i % 2 else row["image"] for i, row in enumerate(dataset)]
    assert score_edits(mixed, dataset) == [5.0 * (i % 2) for i in range(20)]
    with pytest.raises(ValueError):
        score_edits(edits[:-1], dataset)


def test_paired_difference():
    mean, error = paired_difference([1.0, 2.0, 3.0], [2.0, 2.0, 5.0])
    assert mean == pytest.approx(1.0) and error == pytest.approx(1.0 / math.sqrt(3))


def test_the_table_has_a_line_per_task_and_one_for_all():
    lines = comparison_table(["add", "style", "add"], [1.0, 4.0, 2.0], [2.0, 4.5, 2.0]).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["add", "style", "all"]
    assert lines[2] == "| add | 2 | 1.50 | 2.00 | +0.50 ± 0.50 |"
    assert lines[-1].startswith("| all | 3 | 2.33 | 2.83 | +0.50")


def test_the_gains_are_drawn(tmp_path):
    gains_figure(["add", "style", "add"], [1.0, 4.0, 2.0], [2.0, 4.5, 2.0], tmp_path / "gains.png")
    with Image.open(tmp_path / "gains.png") as image:
        assert image.width > 2.5 * image.height and len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_the_table_of_steps():
    lines = steps_table({5: ([1.0, 2.0], [2.0, 3.0]), 2: ([3.0, 3.0], [3.0, 4.0])}).splitlines()
    assert lines[2:] == ["| 2 | 3.00 | 3.50 | +0.50 ± 0.50 |", "| 5 | 1.50 | 2.50 | +1.00 ± 0.00 |"]


def test_the_sheet_shows_a_hard_case_of_each_task(monkeypatch):
    # 30 cases of one task and one of another. The edits are only told apart here; case i scores i before.
    dataset = load_dataset("test", 30, tasks=("add",))
    dataset = concatenate_datasets([dataset, load_dataset("test", 1, tasks=("style",))])
    gains = iter([[float(i) for i in range(31)], [3.0, 2.0, 5.0, *range(3, 31)]])  # gains of the lowest: 3, 1, 3
    monkeypatch.setattr(comparison, "score_edits", lambda edits, dataset: next(gains))
    shown = []
    monkeypatch.setattr(comparison, "comparison_sheet", lambda rows, *args, **kwargs: shown.extend(rows))
    before_after_sheet(dataset, list(dataset["image"]), list(dataset["target"]))
    assert [text.split("  ")[0] for text, _ in shown] == ["0.0 -> 3.0", "30.0 -> 30.0"]
    assert shown[0][0].endswith(dataset[0]["prompt"]) and shown[0][1] == [
        dataset[0][c] for c in ("image", "image", "target")
    ]


def test_the_sheet_is_wide():
    dataset = load_dataset("test", 16)
    sheet = before_after_sheet(dataset, list(dataset["image"]), list(dataset["target"]))
    assert sheet.width > 4 * sheet.height  # 8 tasks, four side by side
    assert np.asarray(sheet).std() > 0
