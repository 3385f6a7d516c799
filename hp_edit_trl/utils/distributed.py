"""The processes of a launch."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object


def patient_accelerator() -> Accelerator:
    """
    The processes of this launch. At a barrier they wait for each other as long as it takes: hours, for a slow judge.
    """
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])


class OutOfStepError(RuntimeError):
    """An error of one process that the others cannot be told, because they wait for something else of it."""


@contextmanager
def lost_processes() -> Iterator[None]:
    """Context for a run of several processes. If one of them stops, the error of the others says so."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no class of its own for it
        if not isinstance(error, dist.DistError) and "by peer" not in str(error):
            raise
        raise RuntimeError(
            f"Another process of this run has stopped, and process {dist.get_rank()} cannot go on without it. Why it "
            "stopped is in its own output; if there is nothing, it was killed, e.g. because memory ran out. Then "
            "resume with resume_from_checkpoint=True."
        ) from error


@contextmanager
def in_step(accelerator: Accelerator) -> Iterator[None]:
    """
    Context for work after which the processes wait for each other. If it fails in one process, it fails in all, so
    that none waits for a process that has stopped: with an `OSError` if it was one, with a `ValueError` otherwise.
    """
    failure: Exception | None = None
    try:
        yield
    except OutOfStepError:
        raise
    except Exception as error:
        failure = error
    kind = next((kind for kind in (ConnectionError, OSError) if isinstance(failure, kind)), ValueError)
    failures = [None if failure is None else (kind, f"{type(failure).__name__}: {failure}")]
    if accelerator.num_processes > 1:
        failures = gather_object(failures)
    if failure is not None:
        raise failure
    for rank, told in enumerate(failures):
        if told is not None:
            raise told[0](f"Process {rank} failed: {told[1]}")
