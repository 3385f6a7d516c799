"""Random generators that depend on their purpose, not on what was drawn before."""

import hashlib

import torch


def seeded_generator(*key: int | str) -> torch.Generator:
    """
    A CPU generator for one purpose, e.g. `seeded_generator(seed, "rollout", generation, case_id, sample)`.

    A run that was resumed, sharded differently or reordered asks with the same keys and draws the same numbers.

    Args:
        *key (`int` or `str`):
            The run's seed, the purpose, and the case.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
