"""Types of weights by their names, and the values of weights of any type."""

import torch


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """
    Returns the type that a name stands for, e.g. `"bfloat16"`.

    Raises:
        `ValueError`: If torch has no such type.
    """
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype):
        raise ValueError(f"dtype={dtype!r} is not a type of tensors: use e.g. 'bfloat16' or 'float32'.")
    return parsed


def plain_values(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a weight; of one that torchao has quantized, which few operations take, those it stands for."""
    return tensor.dequantize() if hasattr(tensor, "__tensor_flatten__") else tensor
