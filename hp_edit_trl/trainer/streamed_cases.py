"""Cases of a stream, which are read while they are trained on."""

import json
import math
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset, DatasetInfo, Features, IterableDataset, Value
from datasets.table import InMemoryTable
from PIL import Image

from ..cases import BadCaseError, encoded_features
from ..utils.distributed import in_step
from ..utils.files import read_json
from ..utils.secrets import redact_error
from ..utils.seeding import seeded_generator
from .same_run import check_same_data, dataset_digest


logger = get_logger(__name__)

STREAM = "stream.json"  # of a checkpoint: where its run was in the stream
SETTINGS = ("seed", "shuffle_dataset", "shuffle_buffer_size")  # that the order of the cases depends on


@dataclass(frozen=True)
class Position:
    """
    Where a buffer begins.

    Args:
        epoch (`int`, *optional*, defaults to `0`):
            The epoch of the stream.
        row (`int`, *optional*, defaults to `0`):
            Number of the rows of this epoch before it.
        total (`int`, *optional*, defaults to `0`):
            Number of the rows of all epochs before it.
        case (`int`, *optional*, defaults to `0`):
            Number of the usable cases of all epochs before it.
    """

    epoch: int = 0
    row: int = 0
    total: int = 0
    case: int = 0


@dataclass
class Buffer:
    """
    Consecutive rows of a stream.

    Args:
        position ([`Position`]):
            Where it begins.
        name (`str`):
            Its name in errors.
        cases ([`~datasets.Dataset`]):
            Its usable cases, in the order in which they are trained on, with their images encoded.
        digest (`str`):
            A hash of them.
        state (`dict`, *optional*):
            State of the stream before its first row. `None` at the beginning of an epoch, or if it is not known.
    """

    position: Position
    name: str
    cases: Dataset
    digest: str
    state: dict[str, Any] | None

    @property
    def end(self) -> int:
        """Number of the case after its last one."""
        return self.position.case + len(self.cases)


def _lossless(value: Any) -> Any:
    """The value without the formats of its decoded images, in which `datasets` would compress their pixels again."""
    if isinstance(value, dict):
        return {name: _lossless(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_lossless(one) for one in value]
    return value.copy() if isinstance(value, Image.Image) else value


class StreamedCases:
    """
    The cases of a run that are read from a stream. It has what a trainer uses of a [`~datasets.Dataset`]: `[number]`
    is the case that the run trains on after `number` others, and the length is the number of cases that it takes.

    The stream is cut into buffers of `shuffle_buffer_size` rows. The usable cases of each are shuffled by themselves,
    by seed, epoch and place. Only those buffers are in memory that the present generation batch needs, at most two
    where enough of their cases can be used. When the stream ends, its next epoch begins, in another order. All
    processes read the same rows.

    Args:
        stream ([`~datasets.IterableDataset`]):
            The stream.
        args ([`FlowGRPOEditConfig`] or [`FlowNFTEditConfig`]):
            The trainer's configuration.
        columns (`Collection[str]`, *optional*):
            Columns that are kept. By default all.

    Attributes:
        rows ([`~datasets.Dataset`]):
            The first rows, unchecked. What can be used of them is given to [`start`].
        is_short (`bool`):
            Whether they are the whole stream.

    Raises:
        `ValueError`: If `max_steps` is not set, `shuffle_buffer_size` is smaller than a generation batch, or the first
            rows cannot be read.
    """

    cache_files: tuple[dict[str, str], ...] = ()  # as those of a dataset that was not loaded from the Hub

    def __init__(self, stream: IterableDataset, args: Any, columns: Collection[str] | None = None):
        self.args = args
        self.cases_per_batch = args.generation_batch_size // args.num_generations
        if args.max_steps <= 0:
            raise ValueError("train_dataset is a stream, whose length is not known: set max_steps.")
        if args.shuffle_buffer_size < self.cases_per_batch:
            raise ValueError(
                f"shuffle_buffer_size={args.shuffle_buffer_size} is too small for a stream: a generation batch has "
                f"{self.cases_per_batch} cases. Set it to at least that."
            )
        self._is_typed = stream.features is not None
        self._source = stream.with_format(None)
        features = stream.features if self._is_typed else self._find_features()
        if columns is not None:
            features = {name: feature for name, feature in features.items() if name in columns}
            self._source = self._source.select_columns(list(features))
        self._row_features = encoded_features(features)
        self.features = Features({"id": Value("int64"), **self._row_features})

        self._buffers: list[Buffer] = []
        self._next = Position()
        self._reached = 0  # number of the case after the last generation batch
        self._first_epoch: tuple[int, int] | None = None  # its rows and usable cases, when it has ended
        self._open()
        self.rows = self._read()
        self.is_short = len(self.rows) < args.shuffle_buffer_size

    def _find_features(self) -> Features:
        rows: list[dict[str, Any]] = []
        try:
            rows += self._source.take(self.args.shuffle_buffer_size)
            return Dataset.from_list(_lossless(rows)).features
        except Exception as error:  # streams raise errors of many kinds
            raise self._unreadable(error, f"The first rows of train_dataset (from {len(rows)} on)") from error

    def _unreadable(self, error: Exception, what: str) -> Exception:
        redact_error(error)  # an address may hold a token
        kind = OSError if isinstance(error, OSError) else ValueError
        return kind(
            f"{what} cannot be read: {type(error).__name__}: {error}. Repair the stream, or give it the types of its "
            "columns with stream.cast(features). A run that has a checkpoint resumes with resume_from_checkpoint=True."
        )

    def start(self, cases: Dataset, usable: Callable[[Dataset, str], Dataset]) -> None:
        """
        Takes the first buffer, before anything else is read.

        Args:
            cases ([`~datasets.Dataset`]):
                The usable cases of `rows`.
            usable (`Callable[[Dataset, str], Dataset]`):
                Returns the usable cases of further rows, which have the given name in errors. May raise
                [`~hp_edit_trl.cases.BadCaseError`].
        """
        self._usable = usable
        self._add(self.rows, cases, None)
        # Rows of their own, because a selection would keep the whole buffer in memory
        self.first_cases = Dataset.from_dict(cases[: self.args.num_sample_edits], features=cases.features)
        del self.rows

    def __len__(self) -> int:
        microbatches = self.args.max_steps * self.args.gradient_accumulation_steps
        return self.cases_per_batch * math.ceil(
            microbatches / (self.args.steps_per_generation * self.args.num_iterations)
        )

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number < self._buffers[0].position.case:
            number += len(self)  # a case in place of a bad one at the end of the run: the stream goes on
        while number >= self._next.case:
            self._append()
        buffer = next(buffer for buffer in self._buffers if number < buffer.end)
        return buffer.cases[number - buffer.position.case]

    @property
    def num_seen(self) -> int:
        """Number of cases that were in a generation batch."""
        return min(self._reached, self._first_epoch[1]) if self._first_epoch else self._reached

    @property
    def num_left_out(self) -> int:
        """Number of bad cases in the rows that were read."""
        rows, cases = self._first_epoch or (self._next.total, self._next.case)
        return rows - cases

    def reach(self, generation: int, accelerator: Accelerator) -> None:
        """
        Reads the cases of a generation batch, and forgets those before. All processes call it.

        Args:
            generation (`int`):
                Number of the generation batch.
            accelerator ([`~accelerate.Accelerator`]):
                The trainer's.

        Raises:
            `ValueError`: If rows cannot be read or used, or processes have read different ones.
        """
        first = generation * self.cases_per_batch
        self._reached = first + self.cases_per_batch
        with in_step(accelerator):
            if not self._buffers or first < self._buffers[0].position.case:  # a run begins, or has other batch sizes
                self._go_to(Position())
            while self._next.case < self._reached:
                self._forget(first)
                self._append()
            self._forget(first)
        needed = [buffer for buffer in self._buffers if buffer.position.case < self._reached]
        check_same_data({buffer.name: (len(buffer.cases), buffer.digest) for buffer in needed})

    def _forget(self, first: int) -> None:
        self._buffers = [buffer for buffer in self._buffers if buffer.end > first]

    def _open(self, state: dict[str, Any] | None = None) -> None:
        """Begins to read at the next position: with a state of the stream, or else by skipping the rows before."""
        # A new object each time, because an earlier state of the stream would be applied in each epoch
        stream = self._source.cast(self._row_features) if self._is_typed else self._source.with_format(None)
        if self.args.shuffle_dataset:
            stream.set_epoch(self._next.epoch)
        if state is not None:
            stream.load_state_dict(state)
        skipped = 0 if state is not None else self._next.row
        self._stream, self._state = stream, state
        self._iterator: Iterator[dict[str, Any]] = islice(stream, skipped, None)

    def _read(self) -> Dataset:
        """The rows from the next position on, as many as a buffer has or the epoch still has."""
        tables, count = [self.features.arrow_schema.empty_table()], 0
        try:
            for row in islice(self._iterator, self.args.shuffle_buffer_size):
                row = {
                    "id": self._next.total + count,
                    **{name: _lossless(row.get(name)) for name in self._row_features},
                }
                tables.append(pa.Table.from_pylist([self.features.encode_example(row)], self.features.arrow_schema))
                count += 1
        except Exception as error:  # streams raise errors of many kinds
            raise self._unreadable(error, f"Row {self._next.row + count} of train_dataset") from error
        # With a name, because `datasets` would make one of all bytes
        info, fingerprint = DatasetInfo(features=self.features), uuid.uuid4().hex
        return Dataset(InMemoryTable(pa.concat_tables(tables)), info=info, fingerprint=fingerprint)

    def _append(self) -> None:
        """Reads the next buffer that has a usable case."""
        ends = 0
        while ends < 2:  # from somewhere in one epoch to the end of the next
            epoch, state = self._next.epoch, self._state
            rows = self._read()
            cases = rows
            if len(rows):
                try:
                    cases = self._usable(rows, self._name(len(rows)))
                except BadCaseError as error:
                    if self.args.on_bad_case == "error":
                        raise
                    logger.warning(f"{error} They are left out.")
                    cases = rows.select([])
            self._add(rows, cases, state)
            if len(cases):
                return
            ends += self._next.epoch > epoch
        raise BadCaseError("No case of train_dataset can be used.")

    def _name(self, count: int) -> str:
        row, epoch = self._next.row, self._next.epoch
        of_epoch = f" in epoch {epoch + 1}" if epoch else ""
        return f"rows {row} to {row + count - 1} of train_dataset{of_epoch}"

    def _add(self, rows: Dataset, cases: Dataset, state: dict[str, Any] | None) -> None:
        """Adds a buffer, and moves the next position behind it."""
        args, here = self.args, self._next
        if len(cases):
            if args.shuffle_dataset:
                place = here.row // args.shuffle_buffer_size
                generator = seeded_generator(args.seed, "stream", here.epoch, place)
                cases = cases.select(torch.randperm(len(cases), generator=generator).tolist())
            self._buffers.append(Buffer(here, self._name(len(rows)), cases, dataset_digest(cases), state))
        after = Position(here.epoch, here.row + len(rows), here.total + len(rows), here.case + len(cases))
        if len(rows) == args.shuffle_buffer_size:
            self._next, self._state = after, self._stream.state_dict()
            return
        if here.epoch == 0:
            self._first_epoch = after.total, after.case
        self._next = replace(after, epoch=here.epoch + 1, row=0)
        self._open()

    def _go_to(self, position: Position, state: dict[str, Any] | None = None) -> None:
        self._buffers, self._next = [], position
        self._open(state)

    def close(self) -> None:
        """Ends a run: stops reading, and forgets what is in memory. A further run begins with the first case."""
        self._go_to(Position())

    def state_dict(self) -> dict[str, Any]:
        """Where the run is in the stream, for a checkpoint: the first buffer in memory."""
        buffer = self._buffers[0]
        try:  # it may hold numbers and arrays of NumPy
            state = json.loads(json.dumps(buffer.state, default=lambda value: value.tolist(), allow_nan=False))
        except (TypeError, ValueError, AttributeError):
            state = None
        return {
            **{name: getattr(self.args, name) for name in SETTINGS},
            "position": asdict(buffer.position),
            "digest": buffer.digest,
            "stream": state,
            "reached": self._reached,
            "first_epoch": self._first_epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Goes to where a run was in the stream. If the stream does not find its place by its own state, its rows before
        are read again and skipped.

        Args:
            state (`dict`):
                What [`state_dict`] returned.

        Raises:
            `ValueError`: If that run had another seed, another size of buffers, or another stream.
        """
        for name in SETTINGS:
            if state[name] != getattr(self.args, name):
                raise ValueError(
                    f"The checkpoint was saved with {name}={state[name]}, but this run has "
                    f"{name}={getattr(self.args, name)}, so the stream would go on with other cases. Resume with "
                    f"{name}={state[name]}, or start over."
                )
        position = Position(**state["position"])
        for known in ([] if state["stream"] is None else [state["stream"]]) + [None]:
            if known is None and position.row:
                logger.warning(
                    f"The stream of train_dataset does not find its place by its state, as with a shuffle() of its "
                    f"own: the {position.row} rows before are read again."
                )
            try:
                self._go_to(position, known)
                self._append()
            except Exception as error:  # `datasets` does not check a state
                if known is None:
                    raise
                logger.warning(f"{type(error).__name__}: {error}")
                continue
            if self._buffers[0].digest == state["digest"]:
                self._reached = state["reached"]
                self._first_epoch = tuple(state["first_epoch"]) if state["first_epoch"] else None
                while self._next.case < self._reached:
                    self._append()
                return
        raise ValueError(
            f"train_dataset gives other rows than in the run of the checkpoint, from row {position.row} of epoch "
            f"{position.epoch + 1} on. Resume with the same revision of the dataset, the same shuffle() and seed of "
            "the stream, and the same on_bad_case, or start over."
        )


def restore_stream(dataset: Dataset | StreamedCases, checkpoint: str) -> None:
    """
    Goes to where the run of a checkpoint was in its stream, if it had one.

    Args:
        dataset ([`~datasets.Dataset`] or [`StreamedCases`]):
            The training set.
        checkpoint (`str`):
            The checkpoint.

    Raises:
        `ValueError`: If the training set is no stream, or another one, see [`StreamedCases.load_state_dict`].
    """
    state = read_json(Path(checkpoint, STREAM))
    if state is None:  # `train` has said so
        return
    if not isinstance(dataset, StreamedCases):
        raise ValueError(
            f"{checkpoint} was saved by a run on a stream, but train_dataset is none, so it has its cases in another "
            "order. Resume with the stream, or start over."
        )
    dataset.load_state_dict(state)
