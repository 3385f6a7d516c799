"""The table of sample edits: in the terminal, on disk, and in the trackers that are in use."""

import functools
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset
from datasets import Image as ImageFeature
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..utils.files import write_atomically
from ..utils.images import image_digest


def _webp(image: Image.Image) -> bytes:
    # For looking at: a tenth of the size of a PNG file
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    return buffer.getvalue()


def _save_reference(image: Image.Image, folder: Path) -> str:
    """Saves an image if it is not there yet. Returns its name, which is a hash of its pixels."""
    name = f"references/{image_digest(image).hex()[:16]}.webp"
    if not (folder / name).exists():
        write_atomically(folder / name, functools.partial(Path.write_bytes, data=_webp(image)))
    return name


def _is_column(values: list[Any]) -> bool:
    """Whether values, which a reward function may have logged, can be stored as a column of a table."""
    try:
        pyarrow.array(values)
    except Exception:  # pyarrow raises errors of many kinds for objects that it does not know
        return False
    return len({type(value) for value in values if value is not None}) <= 1


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Within it `datasets` shows none."""
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


def log_completions_table(
    rows: list[dict[str, Any]],
    step: int,
    output_dir: str | Path,
    trackers: Iterable[str],
    writers: Iterable[Any] = (),
    num_to_print: int | None = None,
) -> None:
    """
    Logs sample edits: as a table in the terminal; as a Parquet file in `output_dir/completions`, whose column
    `reference` names a file in `output_dir/completions/references`, where each reference image is stored once; and as
    a table or images in wandb, trackio and TensorBoard.

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
        num_to_print (`int`, *optional*):
            Number of rows of the table in the terminal. Defaults to all; with 0 there is no table.
    """
    images = ("reference", "completion")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        values = [row.get(name) for row in rows]
        if name not in images and not _is_column(values):
            # Half a character, which models write at times, cannot be stored.
            values = [None if value is None else str(value).encode("utf-8", "replace").decode() for value in values]
        for row, value in zip(rows, values, strict=True):
            row[name] = value

    table = Table(title=f"Edits, step {step}", show_lines=True)
    columns = [name for name in names if name not in (*images, "step")]
    for name in columns:
        table.add_column(Text(name), justify="left" if name in ("id", "prompt") else "right")
    for row in rows[:num_to_print]:
        # As text, because a prompt may hold what rich takes for markup
        table.add_row(*(Text(f"{row[n]:.3f}" if isinstance(row[n], float) else str(row[n])) for n in columns))
    if num_to_print is None or num_to_print > 0:
        Console().print(table)

    folder = Path(output_dir) / "completions"
    (folder / "references").mkdir(parents=True, exist_ok=True)
    stored = Dataset.from_list(
        [
            row
            | {"reference": _save_reference(row["reference"], folder)}
            | {"completion": {"bytes": _webp(row["completion"]), "path": None}}
            for row in rows
        ]
    ).cast_column("completion", ImageFeature())
    with without_progress_bars():  # one at every log would tear that of the training apart
        write_atomically(folder / f"completions_{step:05d}.parquet", stored.to_parquet)

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
