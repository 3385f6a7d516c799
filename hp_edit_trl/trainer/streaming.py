"""
The frozen transformer in CPU memory, whose blocks come to the device one after the other, while they are needed.

As with sharding, the LoRA is not part of it, and neither are the few weights outside of blocks: they are on the device
all the time.
"""

from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .sharding import check_not_quantized, transformer_blocks


# Page-locked memory is handed out in powers of two. Weights that share pieces of such a size leave little unused.
PIECE = 2**30
ALIGNMENT = 512


class BlockStream:
    """
    Keeps the frozen weights of a transformer's blocks in CPU memory. A block's weights are copied to the device for
    its forward pass, while the block before it is computed, and are dropped when the next block begins: the device
    never holds those of more than two blocks. With gradient checkpointing that is so in backward passes too, which
    compute each block again. Results are the same as without it.

    It belongs to the transformer from then on: what changes a weight, such as merging a LoRA, would be lost in the
    blocks that are on the device.

    On a GPU the weights are copied once into page-locked memory, from which transfers run beside computations. Each
    process has its own copy of them.

    Args:
        model ([`~peft.PeftModel`]):
            The transformer with its LoRA.
        device (`torch.device`):
            The device that it is computed on.

    Raises:
        `ValueError`: If the transformer is quantized, or does not name its blocks.
    """

    def __init__(self, model: PeftModel, device: torch.device):
        blocks = transformer_blocks(model, "offload_transformer")
        check_not_quantized(model, "offload_transformer")
        model.get_base_model().is_streamed = True
        self.device = device
        self._weights = [
            [
                (part, name, weight)
                for part in block.modules()
                for name, weight in part.named_parameters(recurse=False)
                if not weight.requires_grad
            ]
            for block in blocks
        ]
        self._copy_to_host()
        # A block that is on the device or on its way, and when it arrives
        self._arrivals: dict[int, torch.cuda.Event | None] = {}
        self._last = 0
        self._transfers = torch.cuda.Stream(device) if device.type == "cuda" else None
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._use, index))
        # DistributedDataParallel takes care of the LoRA alone; it would want all weights on one device.
        frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)

    @property
    def block_bytes(self) -> list[int]:
        """The bytes of each block's frozen weights."""
        return [sum(weight.nbytes for _, _, weight in weights) for weights in self._weights]

    def _copy_to_host(self) -> None:
        piece, used = torch.empty(0, dtype=torch.uint8), 0
        for weights in self._weights:
            for place, (part, name, weight) in enumerate(weights):
                if used + weight.nbytes > len(piece):
                    size = max(PIECE, weight.nbytes)
                    piece, used = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda"), 0
                copy = piece[used : used + weight.nbytes].view(weight.dtype).view(weight.shape)
                used += -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
                host = nn.Parameter(copy.copy_(weight.detach()), requires_grad=False)
                setattr(part, name, host)
                weights[place] = part, name, host

    def place(self, model: nn.Module, device: torch.device) -> None:
        """Moves everything else of a model to a device, and the blocks that a pass begins with."""
        self.device = device
        for index in list(self._arrivals):
            self._drop(index)
        for weights in self._weights:
            for part, name, _ in weights:
                setattr(part, name, None)
        model.to(device)
        for index in range(len(self._weights)):
            self._drop(index)
        for index in range(min(2, len(self._weights))):
            self.load(index)

    def weights(self, index: int) -> list[nn.Parameter]:
        """The weights of a block, where they are now."""
        return [getattr(part, name) for part, name, _ in self._weights[index]]

    def _use(self, index: int, *_: Any) -> None:
        """Called before a block is computed."""
        count = len(self._weights)
        # After the last block of a pass with gradients, a backward pass begins there, and goes on to the one before.
        if index == 0:
            following = 1
        elif index < self._last or (index == count - 1 and torch.is_grad_enabled()):
            following = index - 1
        else:
            following = index + 1
        self._last = index
        following %= count
        for other in list(self._arrivals):
            if other not in (index, following):
                self._drop(other)
        self.load(index)
        self.load(following)
        self._await(self._arrivals[index])

    def load(self, index: int) -> None:
        """Starts to copy a block to the device, unless it is there."""
        if index in self._arrivals:
            return
        # Memory is taken and given back in the order of the stream of computations, for which the copies wait: what
        # was there before is not needed any more.
        copies = [torch.empty_like(host, device=self.device) for _, _, host in self._weights[index]]
        arrival = None
        if self._transfers is not None:
            self._transfers.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._transfers):
            for (part, name, host), copy in zip(self._weights[index], copies, strict=True):
                setattr(part, name, nn.Parameter(copy.copy_(host.detach(), non_blocking=True), requires_grad=False))
            if self._transfers is not None:
                arrival = self._transfers.record_event()
        self._arrivals[index] = arrival

    def _await(self, arrival: torch.cuda.Event | None) -> None:
        if arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(arrival)

    def _drop(self, index: int) -> None:
        self._await(self._arrivals.pop(index, None))  # or others would use memory that is still being written
        for part, name, host in self._weights[index]:
            setattr(part, name, host)  # a backward pass that is not finished keeps the copies that it needs
