"""
The frozen transformer, sharded over the processes of a launch (FSDP2), and passes through it that the processes make
together.

Only the transformer's own weights are sharded. The LoRA, its gradients and its optimizer are the same on all
processes, as with DDP: they are small, any optimizer works, and a checkpoint does not depend on how many processes
made it.
"""

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from ..utils.distributed import OutOfStepError


# Options of accelerate's FSDP that would change what a run does, the values that are refused, and what to set instead
REFUSED = {
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "leaves the text encoder without weights on all processes but the first",
        "fsdp_cpu_ram_efficient_loading: false; processes of a machine share the pages of safetensors files anyway",
    ),
    "FSDP_OFFLOAD_PARAMS": (
        "is not supported",
        "fsdp_offload_params: false, and use more processes, or offload_encoders=True",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "is not read",
        "fsdp_activation_checkpointing: false, and gradient_checkpointing=True in the trainer's config",
    ),
}


def is_set(variable: str) -> bool:
    """Whether an environment variable of `accelerate launch` switches something on."""
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on")


def check_fsdp_version(version: str | int) -> None:
    """Raises `ValueError` for another version of FSDP than 2."""
    if str(version) != "2":
        raise ValueError(
            f"The accelerate config has fsdp_version: {version}, but only version 2 is supported, which can shard the "
            "frozen transformer and leave the LoRA whole. Set fsdp_version: 2 as in examples/accelerate/fsdp2.yaml, "
            "or convert the config with `accelerate to-fsdp2`."
        )


def check_fsdp() -> bool:
    """
    Whether this is a launch with FSDP2, by an accelerate config.

    Raises:
        `ValueError`: If its options are not supported.
    """
    if not is_set("ACCELERATE_USE_FSDP"):
        return False
    check_fsdp_version(os.environ.get("FSDP_VERSION", "1"))  # accelerate's default is 1
    for variable, (cause, remedy) in REFUSED.items():
        if is_set(variable):
            raise ValueError(f"{variable.lower()}: true in the accelerate config {cause}. Set {remedy}.")
    return True


def transformer_blocks(model: PeftModel, option: str) -> list[nn.Module]:
    """
    The blocks of a transformer, in the order in which they are computed.

    Args:
        model ([`~peft.PeftModel`]):
            The transformer with its LoRA.
        option (`str`):
            What they are needed for, for the error message.

    Raises:
        `ValueError`: If the transformer does not name its blocks.
    """
    transformer = model.get_base_model()
    if not getattr(transformer, "_no_split_modules", None):
        raise ValueError(
            f"{option} needs a transformer that names its blocks (_no_split_modules), but "
            f"{type(transformer).__name__} does not: leave {option} out."
        )
    return [part for part in transformer.modules() if type(part).__name__ in transformer._no_split_modules]


def check_not_quantized(model: PeftModel, option: str) -> None:
    """
    Checks that the frozen weights of a transformer are plain tensors.

    Args:
        model ([`~peft.PeftModel`]):
            The transformer with its LoRA.
        option (`str`):
            What needs it, for the error message.

    Raises:
        `ValueError`: If one of them is quantized.
    """
    for name, weight in model.named_parameters():
        is_plain = weight.is_floating_point() and not hasattr(weight, "__tensor_flatten__")  # as torchao's are not
        if not (weight.requires_grad or is_plain):
            raise ValueError(
                f"{option} is not possible with a quantized transformer, and {name} is quantized: load it without "
                f"quantization, or leave {option} out."
            )


def check_same_weights(model: PeftModel) -> None:
    """
    Checks that all processes have loaded the same frozen weights, by a few values of each.

    Args:
        model ([`~peft.PeftModel`]):
            The transformer with its LoRA.

    Raises:
        `ValueError`: If they have not.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            continue
        digest.update(repr((name, weight.shape, weight.dtype, weight.flatten()[:8].tolist())).encode())
    if len(set(gather_object([digest.digest()]))) > 1:
        raise ValueError(
            "The processes have loaded different transformers: name a commit as revision in model_init_kwargs, or "
            "load the model from storage that all nodes share."
        )


def shard(model: PeftModel, device: torch.device) -> None:
    """
    Shards the frozen weights of a transformer over all processes, block by block. On a GPU they are moved there one
    block at a time, so that no process ever holds them all.

    Args:
        model ([`~peft.PeftModel`]):
            The transformer with its LoRA. All processes must have loaded the same, see [`check_same_weights`].
        device (`torch.device`):
            The process's device.

    Raises:
        `ValueError`: If the transformer is quantized, or does not name its blocks.
    """
    transformer = model.get_base_model()
    blocks = transformer_blocks(model, "FSDP")
    check_not_quantized(model, "FSDP")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    lora = {weight for weight in model.parameters() if weight.requires_grad}
    # The transformer itself holds what is in no block. It must come last.
    for part in [*blocks, transformer]:
        # Its own gathering and freeing of weights, without a computation in between, see `make_empty_pass`
        part.gather = lambda *parts: [one.gather() for one in parts]
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=lora)
        register_fsdp_forward_method(part, "gather")
    # Every policy slices the output; none changes it in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def wrap(model: PeftModel, find_unused_parameters: bool) -> DistributedDataParallel:
    """
    Wraps a sharded model, so that the gradients of its LoRA are averaged over the processes. Accelerate refuses to.

    Args:
        model ([`~peft.PeftModel`]):
            The model, see [`shard`].
        find_unused_parameters (`bool`):
            As in `DistributedDataParallel`.
    """
    names = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return DistributedDataParallel(model, find_unused_parameters=find_unused_parameters, broadcast_buffers=False)


@torch.no_grad()
def make_empty_pass(model: nn.Module) -> None:
    """Takes part in the gathering of the weights for a pass of another process, without one of its own."""
    parts: list[Any] = [part for part in model.modules() if isinstance(part, FSDPModule)]
    parts[0].gather(*parts[1:])


def most_of_all(count: int, device: torch.device) -> int:
    """The largest of the processes' numbers."""
    largest = torch.tensor(count, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


@dataclass
class PassCount:
    """Passes that a process has made, and those among them that were for other processes."""

    made: int = 0
    filled: int = 0


@contextmanager
def equal_passes(model: PeftModel, device: torch.device, count: PassCount) -> Iterator[None]:
    """
    Context for passes through a sharded model without gradients. The processes may make different numbers of them: the
    one that is done takes part in those of the others, with empty passes.

    Args:
        model ([`~peft.PeftModel`]):
            The model that is called within the context.
        device (`torch.device`):
            The process's device.
        count ([`PassCount`]):
            Where the passes are counted.

    Raises:
        [`~hp_edit_trl.utils.distributed.OutOfStepError`]: If a pass fails: the others cannot be told. They stop too,
            when this process ends. An error between two passes is raised when the others are done.
    """
    in_pass = False

    def works(self_too: bool) -> torch.Tensor:
        number = torch.tensor(float(self_too), device=device)
        dist.all_reduce(number)
        return number

    def begin(*_) -> None:
        nonlocal in_pass
        in_pass = True
        works(True)  # not read, so that nothing waits for the device
        count.made += 1

    def end(*_) -> None:
        nonlocal in_pass
        in_pass = False

    hooks = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    finally:
        for hook in hooks:
            hook.remove()
    try:
        if failure is not None and in_pass:
            raise failure
        while works(False).item() > 0:
            make_empty_pass(model)
            count.made += 1
            count.filled += 1
    except Exception as error:
        raise OutOfStepError(
            f"A pass through the sharded transformer failed on process {dist.get_rank()}, or another process has "
            f"stopped: {type(error).__name__}: {error}"
        ) from error
    if failure is not None:
        raise failure
