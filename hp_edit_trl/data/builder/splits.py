"""The stages that choose: the benchmark's cases, and those that are hard enough to train on."""

import math
from collections import Counter
from typing import Any

import numpy as np
from datasets import Features, Value

from ...tasks import TASKS
from ...utils.seeding import seeded_generator
from .engine import Batch
from .instructions import repeated_prompts


class Split:
    """
    Stage `split`: which cases are the benchmark's (`"test"`), and which are left for training (`"train"`).

    For each task as many cases as asked for are drawn, evenly over the categories. What is left of an image of the benchmark, and
    all images that look like one, are rejected: training sees neither. Before that, prompts that were written too often are
    rejected.

    Args:
        counts (`dict[str, int]`, *optional*, defaults to those of RealPref-Bench):
            Number of cases of each task in the benchmark; `{}` for none.
        max_distance (`int`, *optional*, defaults to `8`):
            Images whose perceptual hashes differ in at most this number of their 64 bits look alike.
        max_repeats (`int`, *optional*, defaults to `20`):
            How often one prompt may occur in a task.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
    """

    name = "split"
    inputs = ("id", "task", "category", "prompt", "image_id", "image_hash")
    features = Features({"split": Value("string")})
    batch_size = None

    def __init__(
        self, counts: dict[str, int] | None = None, max_distance: int = 8, max_repeats: int = 20, seed: int = 0
    ):
        self.counts = {task.name: task.realpref_bench for task in TASKS.values()} if counts is None else dict(counts)
        if any(not isinstance(count, int) or count < 0 for count in self.counts.values()):
            raise ValueError(f"benchmark_counts={self.counts} must be whole numbers of at least 0.")
        if not 0 <= max_distance <= 64 or max_repeats < 1:
            raise ValueError(
                f"max_distance={max_distance} must be in 0..64, and max_repeats={max_repeats} at least 1."
            )
        self.max_distance = max_distance
        self.max_repeats = max_repeats
        self.seed = seed

    @property
    def settings(self) -> dict[str, Any]:
        names = ("counts", "max_distance", "max_repeats", "seed")
        return {name: getattr(self, name) for name in names}

    def load(self) -> None:
        """There is nothing to get ready."""

    def __call__(self, batch: Batch) -> Batch:
        ids = batch["id"]
        reasons = repeated_prompts(batch["task"], batch["prompt"], self.max_repeats)
        free = [i for i, reason in enumerate(reasons) if reason is None]
        free.sort(key=lambda i: seeded_generator(self.seed, "benchmark", ids[i]).initial_seed())
        chosen: set[int] = set()
        for task, count in sorted(self.counts.items()):
            by_category: dict[str, list[int]] = {}
            for i in free:
                if batch["task"][i] == task:
                    by_category.setdefault(batch["category"][i], []).append(i)
            available = sum(map(len, by_category.values()))
            if count > available:
                raise ValueError(
                    f"The benchmark asks for {count} cases of the task {task!r}, but there are {available}: build from more "
                    "images, or set benchmark_counts ({} for no benchmark)."
                )
            # One of each category in turn, the rarest first, so that all are there before one is there twice
            rounds = [
                (turn, len(members), category, members[turn])
                for category, members in by_category.items()
                for turn in range(len(members))
            ]
            chosen |= {entry[-1] for entry in sorted(rounds, key=lambda entry: entry[:3])[:count]}

        images = {batch["image_id"][i] for i in chosen}
        hashes = np.array([int(value, 16) for value in batch["image_hash"]], dtype=np.uint64)
        known = {batch["image_id"][i]: int(hashes[i]) for i in sorted(chosen)}
        benchmark = np.array(list(known.values()), dtype=np.uint64)
        names = list(known)
        for i in free:
            if i in chosen:
                continue
            if batch["image_id"][i] in images:
                reasons[i] = "in the benchmark: its image is there with another instruction"
            elif len(benchmark):
                bits = np.bitwise_count(benchmark ^ hashes[i])
                nearest = int(bits.argmin())
                if bits[nearest] <= self.max_distance:
                    reasons[i] = f"near the benchmark: {bits[nearest]} bits from its image {names[nearest]}"
        split = ["test" if i in chosen else "train" for i in range(len(ids))]
        return {"split": split, "reason": reasons}


class Filter:
    """
    Stage `filter`: keeps the hard cases for training. The others get the split `"filtered"`, for analysis.

    Args:
        rule (`str`, *optional*, defaults to `"below"`):
            `"below"`: train on scores below `threshold` (the paper drops those of 5). `"hardest"`: train on this share of each
            task's cases, those with the lowest scores.
        threshold (`float`, *optional*, defaults to `5.0`):
            The score, in (0, 5], or the share, in (0, 1].
    """

    name = "filter"
    inputs = ("id", "task", "split", "score")
    features = Features({"split": Value("string")})
    batch_size = None

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

    def load(self) -> None:
        """There is nothing to get ready."""

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
