"""The prefixes of cases: what a policy computes once for all passes of a case."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .edit_policy import EditConditions, EditPolicy


class Prefixes:
    """
    The prefixes of cases for passes without gradients. Each is computed once, and kept as long as it is needed.
    Without effect for a policy that has none.

    Args:
        policy ([`EditPolicy`]):
            The policy.
        true_cfg_scale (`float`):
            Guidance scale of the passes.
    """

    def __init__(self, policy: EditPolicy, true_cfg_scale: float):
        self.policy, self.true_cfg_scale = policy, true_cfg_scale
        # By the identity of a case's encoding, which is kept with it
        self._kept: dict[int, tuple[EditConditions, Any]] = {}

    @torch.no_grad()
    def added(self, batch: dict, model: nn.Module) -> dict:
        """
        A batch with the prefixes of its cases.

        Args:
            batch (`dict`):
                What [`~EditPolicy.collate`] returned.
            model (`torch.nn.Module`):
                The transformer, with the weights that the batch is passed through.
        """
        if not self.policy.has_prefix:
            return batch
        cases = batch["conditions"]
        for case in cases:
            if id(case) not in self._kept:
                self._kept[id(case)] = case, self.policy.prefix(model, case, self.true_cfg_scale)
        return {**batch, "prefixes": [self._kept[id(case)][1] for case in cases]}

    def keep(self, conditions: Iterable[EditConditions]) -> None:
        """Drops the prefixes of all cases but these."""
        wanted = set(map(id, conditions))
        self._kept = {key: kept for key, kept in self._kept.items() if key in wanted}
