"""Modules that are on a device only while they are used."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """
    Within it a frozen module is on the device; afterwards it has the tensors it had before, not copies of them.
    Weights that were loaded from safetensors are pages of the files, which the processes of a machine share;
    `module.to("cpu")` would copy them into the memory of each.

    Args:
        module (`torch.nn.Module`):
            The module. What happens to its weights within the context is lost.
        device (`torch.device`):
            The device.
    """
    owned = [
        (part, name, tensor)
        for part in module.modules()
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
    ]
    copies: dict[torch.Tensor, torch.Tensor] = {}  # a tied weight is one tensor there too
    for part, name, tensor in owned:
        if tensor not in copies:
            moved = _with_own_state(tensor).to(device)
            frozen = isinstance(tensor, nn.Parameter) and not isinstance(moved, nn.Parameter)
            copies[tensor] = nn.Parameter(moved, requires_grad=False) if frozen else moved
        setattr(part, name, copies[tensor])
    try:
        yield
    finally:
        copies.clear()
        for part, name, tensor in owned:
            setattr(part, name, tensor)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # or the memory would stay reserved for this process


def _with_own_state(tensor: Any) -> Any:
    """
    The tensor; a 4-bit weight of bitsandbytes with a copy of its scales' holder, because moving the weight moves the
    scales in place, those of the original with it.
    """
    state = getattr(tensor, "quant_state", None)
    if state is None:
        return tensor
    tensor = copy.copy(tensor)
    tensor.quant_state = copy.copy(state)
    tensor.quant_state.state2 = copy.copy(state.state2)
    return tensor
