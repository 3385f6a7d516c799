"""The table of sample edits: in the terminal, on disk, and in the trackers that are in use."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text


def log_completions_table(
    rows: list[dict[str, Any]], step: int, output_dir: str | Path, trackers: Iterable[str], writers: Iterable[Any] = ()
) -> None:
    """
    Shows sample edits: as a table in the terminal; with their images as a Parquet file in `output_dir/completions`;
    and as a table or images in wandb, trackio and TensorBoard.

    Args:
        rows (`list[dict]`):
            The edits: `step`, `id`, `prompt`, `reference` and `completion` (PIL images), a column per reward function,
            `advantage`, and further columns that reward functions logged, which not every row needs to have.
        step (`int`):
            The present update.
        output_dir (`str` or `Path`):
            The trainer's output folder.
        trackers (`Iterable[str]`):
            The trainer's `report_to`.
        writers (`Iterable[SummaryWriter]`, *optional*):
            TensorBoard's writers.
    """
    images = ("reference", "completion")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        values = [row.get(name) for row in rows]
        if len({type(value) for value in values if value is not None}) > 1:  # a column of a table has one type
            values = [None if value is None else str(value) for value in values]
        for row, value in zip(rows, values, strict=True):
            row[name] = value

    table = Table(title=f"Edits, step {step}", show_lines=True)
    columns = [name for name in names if name not in (*images, "step")]
    for name in columns:
        table.add_column(Text(name), justify="left" if name in ("id", "prompt") else "right")
    for row in rows:
        # As text, because a prompt may hold what rich takes for markup
        table.add_row(*(Text(f"{row[n]:.3f}" if isinstance(row[n], float) else str(row[n])) for n in columns))
    Console().print(table)

    folder = Path(output_dir) / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(folder / f"completions_{step:05d}.parquet")

    for tracker in set(trackers) & {"wandb", "trackio"}:
        module = __import__(tracker)
        data = [[module.Image(row[n]) if n in images else row[n] for n in names] for row in rows]
        if tracker == "wandb":
            module.log({"completions": module.Table(columns=names, data=data)})
        else:
            import pandas

            module.log({"completions": module.Table(dataframe=pandas.DataFrame(data, columns=names))})
    for writer in writers:
        for i, row in enumerate(rows):
            for name in images:
                writer.add_image(f"{name}/{i}", np.asarray(row[name]), step, dataformats="HWC")
            writer.add_text(f"prompt/{i}", row["prompt"], step)
