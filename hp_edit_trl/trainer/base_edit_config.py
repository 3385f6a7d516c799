"""What all configs share: secrets among the options are not shown, and launches that do not work are refused."""

import warnings
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers.utils import is_torch_bf16_gpu_available
from trl.trainer.base_config import _BaseConfig

from ..utils.secrets import redacted
from .sharding import check_fsdp, is_set


logger = get_logger(__name__)


def lacks_bfloat16() -> bool:
    """Whether training would take place on a device that transformers does not let train in bfloat16."""
    return not is_torch_bf16_gpu_available()


def check_config(args: Any, expected: type) -> None:
    """
    Checks that a trainer is given its own config.

    Args:
        args (`Any`):
            The config.
        expected (`type`):
            Its class.

    Raises:
        `TypeError`: If it is another.
    """
    if not isinstance(args, expected):
        raise TypeError(
            f"args is a {type(args).__name__}, but this trainer needs a {expected.__name__}: write "
            f"`from hp_edit_trl import {expected.__name__}` and args={expected.__name__}(output_dir=...). It has the "
            "options of transformers.TrainingArguments; leave out those that are for text."
        )


# A subclass is a `@dataclass(repr=False)`: otherwise the decorator would give it a `repr` of its own.
class BaseEditConfig(_BaseConfig):
    # Fields of the subclasses
    offload_transformer: bool
    num_checkpointed_blocks: int | None
    ema_decay: float | None
    bf16: bool | None
    ddp_broadcast_buffers: bool | None

    def __post_init__(self):
        if self.fsdp:
            raise ValueError(
                "fsdp is not an option of this config. Launch with an accelerate config that has distributed_type: "
                "FSDP and fsdp_version: 2: `accelerate launch --config_file examples/accelerate/fsdp2.yaml`."
            )
        if self.deepspeed or is_set("ACCELERATE_USE_DEEPSPEED"):
            raise ValueError(
                "DeepSpeed is not supported. Launch with FSDP2 (`accelerate launch --config_file "
                "examples/accelerate/fsdp2.yaml`), which shards the transformer, or with DDP (`--multi_gpu`), where "
                "each process holds the whole transformer."
            )
        # A transformer's buffers are constants, and DDP would broadcast them in each pass, of which the processes may
        # make different numbers.
        if self.ddp_broadcast_buffers:
            raise ValueError(
                "ddp_broadcast_buffers=True is not supported, because processes may make different numbers of passes: "
                "leave it out."
            )
        self.ddp_broadcast_buffers = False
        is_sharded = check_fsdp()
        # TRL's default is refused where there is no GPU for it; a value that was given is used as it is.
        falls_back = self.bf16 is None and not self.fp16 and not self.use_cpu and lacks_bfloat16()
        self.bf16 = False if falls_back else self.bf16
        with warnings.catch_warnings():
            # TRL's default for gradient_checkpointing, and its keyword arguments, which users have not set
            message = "`gradient_checkpointing(_kwargs)?` is deprecated"
            warnings.filterwarnings("ignore", message, FutureWarning)
            super().__post_init__()
        if self.device.type == "cpu":  # torch would warn of it where there is no GPU
            self.dataloader_pin_memory = False
        if falls_back:
            found = "The GPU has no bfloat16" if torch.accelerator.is_available() else "No GPU was found"
            logger.warning(f"{found}: training in float32 on {self.device.type!r}. Set bf16 or fp16 to choose.")
        if self.offload_transformer and is_sharded:
            raise ValueError(
                "offload_transformer does not go with FSDP, which shards the transformer over the GPUs: leave one out."
            )
        if self.gradient_checkpointing_kwargs not in (None, {}, {"use_reentrant": False}):
            raise ValueError(
                f"gradient_checkpointing_kwargs={self.gradient_checkpointing_kwargs} is not used: leave it out. "
                "num_checkpointed_blocks says how many blocks are computed again."
            )
        blocks = self.num_checkpointed_blocks
        if blocks is not None and (blocks < 1 or not self.gradient_checkpointing):
            raise ValueError(
                f"num_checkpointed_blocks={blocks} must be at least 1, with gradient_checkpointing=True; without any, "
                "set gradient_checkpointing=False."
            )
        if self.offload_transformer and (blocks is not None or not self.gradient_checkpointing):
            raise ValueError(
                "offload_transformer needs gradient_checkpointing=True, without num_checkpointed_blocks: otherwise "
                "blocks would stay on the device until the backward pass."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"ema_decay={self.ema_decay} must be above 0 and below 1, e.g. 0.99; without it there is no average."
            )

    # Trackers and logs show these.
    def to_dict(self) -> dict[str, Any]:
        return redacted(super().to_dict())

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"{type(self).__name__}({options})"

    __str__ = __repr__
