"""What both configs share: secrets among the options are not shown, and launches that do not work are refused."""

import os
from typing import Any

from trl.trainer.base_config import _BaseConfig

from ..utils.secrets import redacted


# A subclass is a `@dataclass(repr=False)`: otherwise the decorator would give it a `repr` of its own.
class BaseEditConfig(_BaseConfig):
    def __post_init__(self):
        for name, option, variable in (
            ("FSDP", self.fsdp, "ACCELERATE_USE_FSDP"),
            ("DeepSpeed", self.deepspeed, "ACCELERATE_USE_DEEPSPEED"),
        ):
            if option or os.environ.get(variable, "false").lower() in ("1", "true"):
                raise ValueError(
                    f"{name} is not supported: the processes do not make the same number of passes through the model, "
                    "and would wait for each other. Launch with DDP (`accelerate launch --multi_gpu`), where each "
                    "process holds the whole transformer."
                )
        super().__post_init__()

    # Trackers and logs show these.
    def to_dict(self) -> dict[str, Any]:
        return redacted(super().to_dict())

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"{type(self).__name__}({options})"

    __str__ = __repr__
