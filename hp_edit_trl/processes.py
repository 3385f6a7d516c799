"""The processes of a launch."""

from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs


def patient_accelerator() -> Accelerator:
    """The processes of this launch. At a barrier they wait for each other as long as it takes: hours, for a slow judge."""
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
