"""Gradient checkpointing of a transformer, or of some of its blocks."""

from typing import Any

from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from .sharding import transformer_blocks


def prepare_checkpointing(model: PeftModel, num_blocks: int | None = None) -> None:
    """
    Makes a model ready for Trainer to enable gradient checkpointing.

    Args:
        model ([`~peft.PeftModel`]):
            The transformer with its LoRA.
        num_blocks (`int`, *optional*):
            Number of blocks that are computed again in the backward pass: the first ones, because activations of the
            last ones are needed for the shortest time. Defaults to all.

    Raises:
        `ValueError`: If the transformer does not name its blocks, or has fewer.
    """
    transformer = model.get_base_model()
    kept: set[nn.Module] = set()
    if num_blocks is not None:
        blocks = transformer_blocks(model, "num_checkpointed_blocks")
        if num_blocks > len(blocks):
            raise ValueError(
                f"num_checkpointed_blocks={num_blocks}, but {type(transformer).__name__} has {len(blocks)} blocks: "
                "leave it out to checkpoint all of them."
            )
        kept = set(blocks[num_blocks:])

    def compute(module: nn.Module, *args: Any) -> Any:
        return module(*args) if module in kept else checkpoint(module, *args, use_reentrant=False)

    def enable(*args: Any, **kwargs: Any) -> None:
        transformer.enable_gradient_checkpointing(compute)

    # The name that Trainer looks for, and its former name
    model.activation_checkpointing_enable = model.gradient_checkpointing_enable = enable
