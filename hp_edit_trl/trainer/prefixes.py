"""The prefixes of cases in training: each is computed once in an update, and gradients of all its passes reach it."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn

from ..policies import EditConditions, EditPolicy


class TrainedPrefixes:
    """
    The prefixes of cases for passes with gradients. Each is computed once in an update, with gradients, and detached
    for the passes, so that each of these can have a backward pass of its own. Their gradients of the prefix are added
    up, and sent through what computed it in one backward pass, when the case is not needed any more: memory holds the
    prefixes of those cases that are. Without effect for a policy that has none.

    In the last pass of an update both are one backward pass. Under DDP it is the one that synchronizes, in which every
    weight must have a gradient; one through the prefix alone would miss weights.

    Args:
        policy ([`EditPolicy`]):
            The policy.
        true_cfg_scale (`float`):
            Guidance scale of the passes.
        no_sync (`Callable[[torch.nn.Module], AbstractContextManager]`):
            Context in which backward passes of a model do not synchronize.
    """

    def __init__(
        self,
        policy: EditPolicy,
        true_cfg_scale: float,
        no_sync: Callable[[nn.Module], AbstractContextManager],
    ):
        self.policy, self.true_cfg_scale, self.no_sync = policy, true_cfg_scale, no_sync
        self._kept: dict[int, _Prefix] = {}

    def added(self, batch: dict, model: nn.Module, is_last: bool) -> dict:
        """
        A batch with the prefixes of its cases, for one pass that is followed by its backward pass.

        Args:
            batch (`dict`):
                What [`~EditPolicy.collate`] returned.
            model (`torch.nn.Module`):
                The transformer, as Trainer has wrapped it.
            is_last (`bool`):
                Whether this is the last pass of the update. Its backward pass is that of all prefixes as well.
        """
        if not self.policy.has_prefix:
            return batch
        cases = batch["conditions"]
        with self.no_sync(model):
            if is_last:
                self.keep(cases)
            for case in cases:
                if id(case) not in self._kept:
                    self._kept[id(case)] = _Prefix(case, self.policy.prefix(model, case, self.true_cfg_scale))
        if not is_last:
            return {**batch, "prefixes": [self._kept[id(case)].leaves for case in cases]}
        joined = {key: prefix.joined() for key, prefix in self._kept.items()}
        self._kept.clear()
        return {**batch, "prefixes": [joined[id(case)] for case in cases]}

    def keep(self, conditions: Iterable[EditConditions]) -> None:
        """Makes the backward passes through the prefixes of all cases but these, and drops them."""
        wanted = set(map(id, conditions))
        for key in [key for key in self._kept if key not in wanted]:  # in a fixed order: sums depend on it
            self._kept.pop(key).backward()

    def clear(self) -> None:
        """Drops all prefixes, without backward passes."""
        self._kept.clear()


class _Prefix:
    """A prefix with its graph, what passes read in its place, and the sums of their gradients, in float32."""

    def __init__(self, case: EditConditions, tensors: list[torch.Tensor]):
        self.case = case
        self.tensors = tensors
        # Those that no trained weight reaches need no gradient, e.g. the first block's keys if its `to_k` has no LoRA.
        self.leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        self.sums: dict[int, torch.Tensor] = {}
        for place, leaf in enumerate(self.leaves):
            if leaf.requires_grad:
                leaf.register_post_accumulate_grad_hook(partial(_collect, self.sums, place))

    def backward(self) -> None:
        reached = [(self.tensors[place], gradient) for place, gradient in sorted(self.sums.items())]
        if reached:
            tensors, gradients = zip(*reached, strict=True)
            torch.autograd.backward(tensors, [g.to(t.dtype) for t, g in zip(tensors, gradients, strict=True)])

    def joined(self) -> list[torch.Tensor]:
        """The tensors themselves. A backward pass that reaches them adds what earlier ones have summed up."""
        for place, gradient in self.sums.items():
            self.tensors[place].register_hook(partial(_add, gradient))
        return self.tensors


def _collect(sums: dict[int, torch.Tensor], place: int, leaf: torch.Tensor) -> None:
    assert leaf.grad is not None
    sums[place] = sums[place].add_(leaf.grad) if place in sums else leaf.grad.float()
    leaf.grad = None


def _add(more: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return (gradient + more).to(gradient.dtype)
