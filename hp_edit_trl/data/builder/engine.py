"""
The engine of a build: it takes a stage through all rows of a work folder, batch by batch, and can be stopped at any
time.

A stage is a function from a batch of columns to a batch of columns. Each batch that it returns becomes one Parquet
file, written completely or not at all. A build that was killed resumes with the batches that have no file: it repeats
the one that was being computed, and ends with the same bytes as a build that was never stopped. Rows that a model did
not answer are computed again by the next run.

Columns are never copied from stage to stage. Pixels are written once, by the stage that made them.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from accelerate import Accelerator
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from tqdm import tqdm

from ...judges import JudgeTally
from ...utils.files import check_unchanged, read_json, write_atomically, write_json
from ...utils.secrets import redacted


Batch = dict[str, list]

UNANSWERED = "unanswered"  # column of the rows of a stage that have no answer of its model
OPEN_FILES = 32  # shards that are held open for reading


class Stage(Protocol):
    """
    A stage: a function from a batch of columns to a batch of columns, as [`~datasets.Dataset.map`] with `batched=True`
    and Ray Data's `map_batches` call it. It returns one row for each row that it is given, in the same order.

    Attributes:
        name (`str`):
            Name of the stage and of its folder.
        inputs (`tuple[str, ...]`):
            The columns that it reads.
        features ([`~datasets.Features`]):
            The columns that it adds. In addition it returns `reason`: `None`, or why the row is rejected. A rejected
            row stays on disk, but later stages do not see it.
        batch_size (`int` or `None`):
            Number of rows per batch. `None` gives it all rows at once, for choices that depend on all of them; such a
            stage reads no images. It may also return `parent`: for each of its rows, the number of the row of the
            batch that it comes from. Its rows then replace those before. A stage that asks a model that may fail also
            returns `unanswered`: whether each row has no answer. The next run computes these rows again, unless a
            later stage with batches has begun.
        tally ([`JudgeTally`] or `None`):
            What its judge was asked, if it has one.
        settings (`dict`):
            Everything that its results depend on. Results of different settings are not mixed.
    """

    name: str
    inputs: tuple[str, ...]
    features: Features = Features({})
    batch_size: int | None = None

    @property
    def tally(self) -> JudgeTally | None:
        return None

    @property
    def settings(self) -> dict[str, Any]: ...

    def load(self) -> None:
        """Gets ready, e.g. loads a model. Raises an error if every row would fail. By default does nothing."""
        return None

    def __call__(self, batch: Batch) -> Batch: ...

    def check(self, again: bool) -> None:
        """
        Called when a batch with `unanswered` is written. Raises an error if it makes no sense to go on, e.g. because a
        model is gone. By default does nothing. `again` says that its rows had no answer in an earlier run either.
        """
        return None


class Reader(Protocol):
    """The rows that the first stage reads, by their numbers."""

    settings: dict[str, Any]

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Batch: ...


@dataclass
class FinishedStage:
    """
    A stage whose rows are complete.

    Args:
        name (`str`):
            Its name.
        key (`str`):
            Hash of its settings and of those of all stages before it.
        columns (`tuple[str, ...]`):
            The columns that it added.
        rows (`numpy.ndarray`):
            The numbers of its rows, ascending.
        batch_size (`int`):
            Number of rows in each of its files.
        level (`int`):
            How many stages up to this one replaced the rows. Columns of an earlier level are found through `parents`.
        folder (`Path`):
            Where its files are.
    """

    name: str
    key: str
    columns: tuple[str, ...]
    rows: np.ndarray
    batch_size: int
    level: int
    folder: Path


class WorkFolder:
    """
    The folder of a build: its finished stages, and the rows that they kept. It can be pickled.

    Args:
        path (`str` or `Path`):
            The folder.
        sources ([`Reader`]):
            The rows that the first stage reads.
    """

    def __init__(self, path: str | Path, sources: Reader):
        self.path = Path(path)
        self.sources = sources
        self.stages: list[FinishedStage] = []
        self.live = np.arange(len(sources))
        self.parents: list[np.ndarray] = []  # for each level after the first: the row of the level before
        self._open: OrderedDict[Path, pq.ParquetFile] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def branch(self, name: str) -> "WorkFolder":
        """A build that begins with the finished stages of this one, and has its own later ones in a subfolder."""
        branch = WorkFolder(self.path / name, self.sources)
        branch.stages, branch.parents, branch.live = [*self.stages], [*self.parents], self.live
        return branch

    @property
    def key(self) -> str:
        """Hash of the settings of all finished stages."""
        return self.stages[-1].key if self.stages else _digest(self.sources.settings)

    @staticmethod
    @contextlib.contextmanager
    def locked(path: str | Path) -> Iterator[None]:
        """
        Locks a folder against other builders.

        Args:
            path (`str` or `Path`):
                The folder. It is created if it does not exist.

        Raises:
            `ValueError`: If another builder has locked it.
        """
        import fcntl  # does not exist on Windows, where the rest of the package works

        Path(path).mkdir(parents=True, exist_ok=True)
        with open(Path(path) / ".lock", "a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise ValueError(
                    f"Another builder is running in {path} ({lock.read() or 'unknown'}): wait until it has ended, "
                    "stop it, or choose another output_dir."
                ) from None
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            yield
            lock.truncate(0)

    def has_column(self, name: str) -> bool:
        """Whether a finished stage has added a column."""
        return any(name in stage.columns for stage in self.stages)

    def rows(self, name: str) -> np.ndarray:
        """The numbers of the rows of a finished stage, also of those that it rejected."""
        return next(stage.rows for stage in self.stages if stage.name == name)

    def read(self, rows: np.ndarray, columns: tuple[str, ...] | list[str]) -> Batch:
        """
        Reads columns of rows.

        Args:
            rows (`numpy.ndarray`):
                Numbers of rows, as the latest stage numbers them.
            columns (`tuple[str, ...]`):
                Names of columns.

        Raises:
            `ValueError`: If a column does not exist, or a file is damaged.
        """
        batch: Batch = {}
        by_stage: dict[str, list[str]] = {}
        for column in columns:
            home = [stage for stage in self.stages if column in stage.columns]
            if not home:
                known = [name for stage in self.stages for name in stage.columns]
                raise ValueError(f"There is no column {column!r} yet; there are {known}.")
            by_stage.setdefault(home[-1].name, []).append(column)  # the latest, e.g. of two splits
        for stage in self.stages:
            if wanted := by_stage.get(stage.name):
                of_stage = rows
                for parents in reversed(self.parents[stage.level :]):
                    of_stage = parents[of_stage]
                batch |= self._read(stage, of_stage, wanted)
        return {column: batch[column] for column in columns}

    def _read(self, stage: FinishedStage, rows: np.ndarray, columns: list[str]) -> Batch:
        places = np.searchsorted(stage.rows, rows)
        shards, offsets = places // stage.batch_size, places % stage.batch_size
        pieces, order = [], []
        for shard in np.unique(shards):
            members = np.flatnonzero(shards == shard)
            order.append(members)
            file = _file(stage.folder, int(shard))
            try:
                parquet = self._parquet(file)
                per_group = parquet.metadata.row_group(0).num_rows
                groups = np.unique(offsets[members] // per_group)
                table = parquet.read_row_groups(groups.tolist(), columns)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(
                    f"{file} is missing or damaged ({error}): remove it and run again to compute this batch again."
                ) from error
            starts = np.searchsorted(groups, offsets[members] // per_group) * per_group
            pieces.append(table.take(pa.array(starts + offsets[members] % per_group)))
        back = np.argsort(np.concatenate(order)) if order else np.empty(0, dtype=int)
        table = pa.concat_tables(pieces).take(pa.array(back)) if pieces else None
        return {column: table[column].to_pylist() if table is not None else [] for column in columns}

    def _parquet(self, file: Path) -> pq.ParquetFile:
        if file not in self._open:
            self._open[file] = pq.ParquetFile(file, page_checksum_verification=True)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(file)
        return self._open[file]

    def input_batch(self, stage: Stage, number: int) -> tuple[np.ndarray, Batch]:
        """The rows of a stage's batch, and their columns."""
        size = stage.batch_size or max(len(self.live), 1)
        rows = self.live[number * size : (number + 1) * size]
        if self.stages:
            return rows, self.read(rows, stage.inputs)
        batch = self.sources.read(int(rows[0]), int(rows[-1]) + 1)
        return rows, {column: batch[column] for column in stage.inputs}

    def compute(self, stage: Stage, number: int) -> dict[str, int]:
        """Computes and writes one batch of a stage. Returns how many rows it has, and how many are rejected."""
        rows, batch = self.input_batch(stage, number)
        file = _file(self.path / stage.name, number)
        before = pq.read_table(file) if file.exists() else None
        if before is not None:
            again = np.flatnonzero(before[UNANSWERED].to_numpy())
            rows, batch = rows[again], {name: [values[i] for i in again] for name, values in batch.items()}
        done = stage(batch)
        parents = done.pop("parent", None)
        unanswered = done.pop(UNANSWERED, None)
        if done.keys() != {*stage.features, "reason"} or parents is not None and stage.batch_size is not None:
            raise ValueError(
                f"The stage {stage.name!r} returned the columns {sorted(done)}; expected are "
                f"{sorted([*stage.features, 'reason'])}."
            )
        count = len(rows) if parents is None else len(parents)
        if lengths := {name: len(values) for name, values in done.items() if len(values) != count}:
            raise ValueError(f"The stage {stage.name!r} was given {count} rows and returned {lengths}.")
        arrays = {"row": pa.array(rows if parents is None else np.arange(count), pa.int64())}
        if parents is not None:
            arrays["parent"] = pa.array(rows[np.asarray(parents, dtype=int)], pa.int64())
        schema = stage.features.arrow_schema
        arrays |= {name: pa.array(done[name], schema.field(name).type) for name in stage.features}
        arrays["reason"] = pa.array(done["reason"], pa.string())
        arrays |= {} if unanswered is None else {UNANSWERED: pa.array(unanswered, pa.bool_())}
        table = pa.table(arrays)
        if before is not None:
            self._drop_later(stage)
            kept = before.filter(pc.invert(before[UNANSWERED]))
            table = pa.concat_tables([kept, table]).sort_by("row").combine_chunks()
        # Later stages read images one by one, in another order.
        with_images = any(isinstance(feature, ImageFeature) for feature in stage.features.values())
        _write(file, table, row_group_size=1 if with_images else 1000)
        if unanswered is not None:
            stage.check(again=before is not None)
        return {"rows": count, "rejected": count - done["reason"].count(None)}

    def begin(self, stage: Stage) -> None:
        """
        Writes down the settings of a stage.

        Raises:
            `ValueError`: If its folder holds rows that were made with other settings.
        """
        folder = self.path / stage.name
        manifest = read_json(folder / "manifest.json")
        if manifest is None:
            if any(folder.glob("*.parquet")):
                raise ValueError(f"{folder} holds files without a readable manifest.json: remove the folder.")
            folder.mkdir(parents=True, exist_ok=True)
            settings = redacted(stage.settings)
            made = {"stage": stage.name, "after": self.key, "batch_size": stage.batch_size, "settings": settings}
            write_json(folder / "manifest.json", made)
            return
        held = f"{folder} holds rows of the stage {stage.name!r}"
        remedy = "remove the folder to run it and all later stages again, or choose another output_dir"
        if manifest["after"] != self.key:
            raise ValueError(f"{held}, but the stages before it were made anew: {remedy}.")
        before = {**manifest["settings"], "batch_size": manifest["batch_size"]}
        check_unchanged(held, before, {**stage.settings, "batch_size": stage.batch_size}, remedy)
        for unfinished in folder.glob("*.part"):
            unfinished.unlink()

    def has_begun(self, name: str) -> bool:
        """Whether a stage has begun."""
        return (self.path / name / "manifest.json").exists()

    def is_finished(self, stage: Stage) -> bool:
        """Whether a stage is finished, given that all earlier ones are."""
        return self.has_begun(stage.name) and not self.missing(stage)

    def missing(self, stage: Stage) -> list[int]:
        """The numbers of the batches of a stage that have no file yet."""
        there = {int(file.stem) for file in (self.path / stage.name).glob("[0-9]*.parquet")}
        size = stage.batch_size or max(len(self.live), 1)
        return [number for number in range(-(-len(self.live) // size)) if number not in there]

    def unanswered(self, stage: Stage) -> list[int]:
        """
        The numbers of the batches of a stage with rows that have no answer and can be computed again: no later stage
        has begun, or only such as are computed in one piece.
        """
        files = sorted((self.path / stage.name).glob("[0-9]*.parquet"))
        if not files or any((read_json(file) or {}).get("batch_size") for file in self._later(stage)):
            return []
        numbers = []
        for file in files:
            try:
                if UNANSWERED not in pq.read_schema(file).names:
                    return []
                if pc.any(pq.read_table(file, columns=[UNANSWERED])[0]).as_py():
                    numbers.append(int(file.stem))
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{file} is damaged ({error}): remove it and run again.") from error
        return numbers

    def _later(self, stage: Stage) -> list[Path]:
        """The manifests of the stages after one that is computed now."""
        before = {stage.name, *(done.name for done in self.stages)}
        files = [file for file in self.path.glob("*/manifest.json") if file.parent.name not in before]
        # The folder may hold other things, e.g. checkpoints, which have a file of this name as well.
        return [file for file in files if (read_json(file) or {}).get("stage") == file.parent.name]

    def _drop_later(self, stage: Stage) -> None:
        """Removes what later stages made of rows that are computed again."""
        for manifest in self._later(stage):
            shutil.rmtree(manifest.parent, ignore_errors=True)  # another process may do the same

    def finish(self, stage: Stage, write: bool = True) -> Counter:
        """
        Adds a stage whose batches are complete: later reads see its columns, without the rows that it rejected.

        Args:
            stage ([`Stage`]):
                The stage.
            write (`bool`, *optional*, defaults to `True`):
                Complete its manifest. With several processes, only one does.

        Returns:
            `Counter`: number of rejected rows by the part of the reason before its first colon.
        """
        folder = self.path / stage.name
        rows, live, parents, reasons = [], [], [], Counter[str]()
        for file in sorted(folder.glob("[0-9]*.parquet")):
            try:
                table = pq.read_table(file, columns=None if stage.batch_size is None else ["row", "reason"])
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{file} is damaged ({error}): remove it and run again.") from error
            rows.append(table["row"].to_numpy())
            live.append(rows[-1][table["reason"].is_null().to_numpy()])
            parents += [table["parent"].to_numpy()] if "parent" in table.column_names else []
            reasons.update(reason.partition(":")[0] for reason in table["reason"].drop_null().to_pylist())
        empty = np.empty(0, dtype=int)
        self.parents += [np.concatenate(parents)] if parents else []
        known = json.loads((folder / "manifest.json").read_text())
        key = _digest({name: known[name] for name in ("stage", "after", "batch_size", "settings")})
        done = FinishedStage(
            stage.name,
            key,
            tuple(stage.features),
            np.concatenate([empty, *rows]),
            stage.batch_size or max(len(self.live), sum(map(len, rows)), 1),
            len(self.parents),
            folder,
        )
        self.live = np.concatenate([empty, *live])
        self.stages.append(done)
        if write:
            counts = {"rows": len(done.rows), "kept": len(self.live), "rejected": dict(sorted(reasons.items()))}
            if known != (complete := known | counts):
                write_json(folder / "manifest.json", complete)
        return reasons

    def rejected(self) -> Iterator[dict[str, Any]]:
        """
        Every rejected row of the stages that are finished in this folder: `stage`, `row`, `reason`, and its image's
        `source` and `file`.
        """
        for number, stage in enumerate(self.stages):
            if stage.folder.parent != self.path:  # of the build that this one branched off
                continue
            for file in sorted(stage.folder.glob("[0-9]*.parquet")):
                table = pq.read_table(file, columns=["row", "reason"])
                table = table.filter(table["reason"].is_valid())
                rows = images = table["row"].to_numpy()
                for parents in reversed(self.parents[: stage.level]):
                    images = parents[images]
                origin = self._read(self.stages[0], images, ["source", "file"]) if len(rows) else {}
                for i, reason in enumerate(table["reason"].to_pylist()):
                    yield {
                        "stage": self.stages[number].name,
                        "row": int(rows[i]),
                        "reason": reason,
                        **{name: values[i] for name, values in origin.items()},
                    }


def run_stage(
    folder: WorkFolder,
    stage: Stage,
    accelerator: Accelerator,
    engine: str = "local",
    num_workers: int = 1,
    gpus_per_worker: float = 0,
) -> Counter:
    """
    Runs a stage on all batches that have no file yet, and again on rows that a model has not answered.

    Args:
        folder ([`WorkFolder`]):
            The folder, with all earlier stages finished.
        stage ([`Stage`]):
            The stage.
        accelerator ([`~accelerate.Accelerator`]):
            The processes of this launch. Each takes a part of the batches.
        engine (`str`, *optional*, defaults to `"local"`):
            `"local"`: in these processes, through `datasets`. `"ray"`: with Ray Data, on this machine or the cluster
            that Ray is connected to. All its machines must reach the folder under the same path.
        num_workers (`int`, *optional*, defaults to `1`):
            With Ray: number of workers, each with its own model.
        gpus_per_worker (`float`, *optional*, defaults to `0`):
            With Ray: number of GPUs per worker.

    Returns:
        `Counter`: number of rejected rows by reason.

    Raises:
        `ValueError`: If the folder holds rows of this stage that were made with other settings.
        `OSError`: If a batch cannot be written. Earlier batches are kept.
    """
    if accelerator.is_main_process:
        folder.begin(stage)
    accelerator.wait_for_everyone()
    missing = sorted({*folder.missing(stage), *folder.unanswered(stage)})
    accelerator.wait_for_everyone()  # before anything is written that another process has yet to look for
    # By number, because the share of a process must not depend on the progress of others.
    mine = [number for number in missing if number % accelerator.num_processes == accelerator.process_index]
    if mine:
        size = stage.batch_size or max(len(folder.live), 1)
        progress = tqdm(
            total=len(folder.live),
            initial=max(0, len(folder.live) - len(missing) * size),
            desc=stage.name,
            unit="row",
            disable=not accelerator.is_main_process,
        )
        # A stage that takes all rows at once is a single batch, which needs no workers.
        if engine == "ray" and stage.batch_size is not None:
            batches = _on_ray(folder, stage, mine, num_workers, gpus_per_worker)
        else:
            batches = _locally(folder, stage, mine)
        with progress:
            for done in batches:
                progress.update(done["rows"] * (accelerator.num_processes if stage.batch_size else 0))
    accelerator.wait_for_everyone()
    return folder.finish(stage, write=accelerator.is_main_process)


def _locally(folder: WorkFolder, stage: Stage, numbers: list[int]) -> Iterator[dict]:
    stage.load()
    batches = Dataset.from_dict({"number": numbers}).to_iterable_dataset()
    yield from batches.map(lambda row: folder.compute(stage, row["number"]), remove_columns="number")


def _on_ray(
    folder: WorkFolder, stage: Stage, numbers: list[int], num_workers: int, gpus_per_worker: float
) -> Iterator[dict]:
    try:
        import ray
    except ImportError as error:
        raise ImportError("engine='ray' needs Ray Data: pip install hp-edit-trl[ray]") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False

    class Worker:
        """Keeps the model of the stage from batch to batch."""

        def __init__(self, folder: WorkFolder, stage: Stage):
            self.folder, self.stage = folder, stage
            stage.load()

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[int]]:
            done = [self.folder.compute(self.stage, int(number)) for number in batch["number"]]
            return {name: [one[name] for one in done] for name in ("rows", "rejected")}

    blocks = min(len(numbers), 1000)
    batches = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=blocks)
    done = batches.map_batches(
        Worker,
        batch_size=1,
        fn_constructor_args=(folder, stage),
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_cpus=1,
        num_gpus=gpus_per_worker,
    )
    try:
        yield from done.iter_rows()
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # the error of the stage or of the disk
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"Ray could not run the stage {stage.name!r}: {lines[-1]}") from error


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.parquet"


def _write(file: Path, table: pa.Table, row_group_size: int) -> None:
    def write(part: Path) -> None:
        pq.write_table(table, part, compression="zstd", row_group_size=row_group_size, write_page_checksum=True)

    write_atomically(file, write)
