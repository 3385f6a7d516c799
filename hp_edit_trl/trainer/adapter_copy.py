"""Copies of the adapter that follow the trained weights: their moving average, and the policy that samples in NFT."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback


class AdapterCopy:
    """
    A copy of a model's trained weights, which follows them slowly.

    Args:
        model (`torch.nn.Module`):
            The model. Its trained weights stay the same objects as long as the copy is used.
    """

    def __init__(self, model: nn.Module):
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().clone() for name, p in self._trained.items()}

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """The weights that are trained."""
        return {name: p.detach() for name, p in self._trained.items()}

    def reset(self) -> None:
        """Makes the copy equal to the trained weights."""
        for name, weight in self.trained.items():
            self.weights[name].copy_(weight)

    def place(self) -> None:
        """Moves the copy to where the trained weights are."""
        self.weights = {name: weight.to(self._trained[name].device) for name, weight in self.weights.items()}

    def update(self, decay: float) -> None:
        """Makes each weight `decay` times itself and `1 - decay` times the trained one."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.lerp_(self._trained[name], 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """
        Context in which the model has the weights of the copy. Passes in it must not need gradients.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._trained.items():
            parameter.data, self.weights[name] = self.weights[name], parameter.data


def average_decay(ema_decay: float, num_updates: int) -> float:
    """
    The decay of a moving average after a number of updates: lower at first, or the average would long be that of a
    model without training. It is that of diffusers' `EMAModel`.
    """
    return min(ema_decay, (1 + num_updates) / (10 + num_updates))


class AfterUpdates(TrainerCallback):
    """
    Calls a function after each step of the optimizer.

    Args:
        function (`Callable[[], None]`):
            The function.
    """

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.function()
