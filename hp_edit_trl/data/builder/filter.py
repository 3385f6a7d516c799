"""Stage `filter`: keeps the hard cases for training."""

import math
from collections import Counter
from typing import Any

from datasets import Features, Value

from .engine import Batch, Stage


class Filter(Stage):
    """
    Keeps the hard cases for training. The other cases get the split `"filtered"`, for analysis.

    Args:
        rule (`str`, *optional*, defaults to `"below"`):
            `"below"`: train on cases with scores below `threshold` (the paper drops those with a score of 5).
            `"hardest"`: train on this share of the cases of each task, those with the lowest scores.
        threshold (`float`, *optional*, defaults to `5.0`):
            The score, in (0, 5], or the share, in (0, 1].
    """

    name = "filter"
    inputs = ("id", "task", "split", "score")
    features = Features({"split": Value("string")})

    def __init__(self, rule: str = "below", threshold: float = 5.0):
        limits = {"below": 5, "hardest": 1}
        if rule not in limits:
            raise ValueError(f"filter_rule={rule!r} is not known: use one of {list(limits)}.")
        if not 0 < threshold <= limits[rule]:
            raise ValueError(f"filter_threshold={threshold} must be above 0 and at most {limits[rule]} with {rule!r}.")
        self.rule = rule
        self.threshold = threshold

    @property
    def settings(self) -> dict[str, Any]:
        return {"rule": self.rule, "threshold": self.threshold}

    def __call__(self, batch: Batch) -> Batch:
        scores, split = batch["score"], list(batch["split"])
        train = [i for i, name in enumerate(split) if name == "train"]
        reasons: list[str | None] = [None] * len(split)
        for i in train:
            if scores[i] is None:
                reasons[i] = "no score"
        scored = [i for i in train if scores[i] is not None]
        if self.rule == "below":
            easy = {i for i in scored if scores[i] >= self.threshold}
        else:
            room = {
                task: math.ceil(self.threshold * count)
                for task, count in Counter(batch["task"][i] for i in scored).items()
            }
            easy = set()
            for i in sorted(scored, key=lambda i: (scores[i], batch["id"][i])):
                room[batch["task"][i]] -= 1
                easy |= {i} if room[batch["task"][i]] < 0 else set()
        return {"split": ["filtered" if i in easy else name for i, name in enumerate(split)], "reason": reasons}
