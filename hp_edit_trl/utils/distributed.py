"""The processes of a launch."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object


def patient_accelerator() -> Accelerator:
    """
    The processes of this launch. At a barrier they wait for each other as long as it takes: hours, for a slow judge.
    """
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])


@contextmanager
def in_step(accelerator: Accelerator) -> Iterator[None]:
    """
    Context for work after which the processes wait for each other. If it fails in one process, it fails in all, so
    that none waits for a process that has stopped.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told = None if failure is None else (isinstance(failure, ConnectionError), f"{type(failure).__name__}: {failure}")
    failures = gather_object([told]) if accelerator.num_processes > 1 else [told]
    if failure is not None:
        raise failure
    for rank, one in enumerate(failures):
        if one is not None:
            is_connection, text = one
            raise (ConnectionError if is_connection else ValueError)(f"Process {rank} failed: {text}")
