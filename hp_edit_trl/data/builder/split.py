"""Stage `split`: draws the candidates of the benchmark, and keeps their images out of the training data."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Features, Value

from ...tasks import TASKS
from ...utils.config import check_positive
from ...utils.seeding import seeded_generator
from .engine import Batch, Stage
from .instructions import compact_text
from .rounds import Earlier


BENCHMARK_COUNTS = {task.name: task.realpref_bench for task in TASKS.values()}


class Split(Stage):
    """
    Assigns cases to the benchmark (`"test"`), to its reserve (`"reserve"`) or to training (`"train"`).

    First, prompts that occur too often are rejected. Then the requested number of cases of each task is drawn, evenly
    over the categories, and after them the reserve, which replaces cases that people reject or that the editor fails
    with. `place` is the order of a task's cases in both. The other cases of their images, and all cases of images
    that look like one of them, are rejected, so that training sees neither. The first round draws the whole benchmark.

    Args:
        counts (`Mapping[str, int]`, *optional*):
            Number of cases per task in the benchmark; `{}` for none. Defaults to the counts of RealPref-Bench.
        max_distance (`int`, *optional*, defaults to `8`):
            Images look alike if their perceptual hashes differ in at most this many of 64 bits.
        max_repeats (`int`, *optional*, defaults to `20`):
            How often the same prompt may occur in a task.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        reserve (`float`, *optional*, defaults to `0.25`):
            Size of the reserve, as a share of the benchmark. A task with fewer cases has a smaller one.
        earlier ([`Earlier`], *optional*):
            The earlier rounds, if this is not the first one.
    """

    name = "split"
    inputs = ("id", "task", "category", "prompt", "image_id", "image_hash")
    features = Features({"split": Value("string"), "place": Value("int64")})

    def __init__(
        self,
        counts: Mapping[str, int] = BENCHMARK_COUNTS,
        max_distance: int = 8,
        max_repeats: int = 20,
        seed: int = 0,
        reserve: float = 0.25,
        earlier: Earlier | None = None,
    ):
        self.counts = dict(counts)
        if any(not isinstance(count, int) or count < 0 for count in self.counts.values()):
            raise ValueError(f"benchmark_counts={self.counts} must be integers of at least 0.")
        if not 0 <= max_distance <= 64:
            raise ValueError(f"max_distance={max_distance} must be in 0..64.")
        if not 0 <= reserve < math.inf:
            raise ValueError(f"benchmark_reserve={reserve} must be a number of at least 0.")
        check_positive(max_repeats=max_repeats)
        self.max_distance = max_distance
        self.max_repeats = max_repeats
        self.seed = seed
        self.reserve = reserve
        self.earlier = earlier or Earlier()

    @property
    def candidates(self) -> dict[str, int]:
        """Number of cases per task in the benchmark and its reserve."""
        return {task: count + math.ceil(count * self.reserve) for task, count in self.counts.items()}

    @property
    def settings(self) -> dict[str, Any]:
        names = ("counts", "max_distance", "max_repeats", "seed", "reserve")
        return {name: getattr(self, name) for name in names}

    def __call__(self, batch: Batch) -> Batch:
        ids = batch["id"]
        before = self.earlier.prompts
        tasks, prompts = ([*(pair[i] for pair in before), *batch[name]] for i, name in enumerate(("task", "prompt")))
        reasons = repeated_prompts(tasks, prompts, self.max_repeats)[len(before) :]
        free = [i for i, reason in enumerate(reasons) if reason is None]
        free.sort(key=lambda i: seeded_generator(self.seed, "benchmark", ids[i]).initial_seed())
        chosen: dict[int, int] = {}  # the place of each candidate
        for task, count in sorted(self.counts.items()) if not self.earlier.rounds else ():
            by_category: dict[str, list[int]] = {}
            for i in free:
                if batch["task"][i] == task:
                    by_category.setdefault(batch["category"][i], []).append(i)
            available = sum(map(len, by_category.values()))
            if count > available:
                raise ValueError(
                    f"The benchmark asks for {count} cases of the task {task!r}, but there are {available}: add "
                    "images, raise sample_size if there are more, or set benchmark_counts ({} for no benchmark)."
                )
            # One case per category in turn, the rarest category first, so that all occur before one occurs twice
            rounds = [
                (turn, len(members), category, members[turn])
                for category, members in by_category.items()
                for turn in range(len(members))
            ]
            drawn = sorted(rounds, key=lambda entry: entry[:3])[: self.candidates[task]]
            chosen |= {entry[-1]: place for place, entry in enumerate(drawn)}

        hashes = np.array([int(value, 16) for value in batch["image_hash"]], dtype=np.uint64)
        known = self.earlier.benchmark | {batch["image_id"][i]: int(hashes[i]) for i in sorted(chosen)}
        benchmark = np.array(list(known.values()), dtype=np.uint64)
        names = list(known)
        for i in free:
            if i in chosen:
                continue
            if batch["image_id"][i] in known:
                reasons[i] = "in the benchmark: its image is there with another prompt"
            elif len(benchmark):
                bits = np.bitwise_count(benchmark ^ hashes[i])
                nearest = int(bits.argmin())
                if bits[nearest] <= self.max_distance:
                    reasons[i] = f"near the benchmark: {bits[nearest]} bits from its image {names[nearest]}"
        split = ["train"] * len(ids)
        for i, place in chosen.items():
            split[i] = "test" if place < self.counts[batch["task"][i]] else "reserve"
        return {"split": split, "place": [chosen.get(i) for i in range(len(ids))], "reason": reasons}


def repeated_prompts(tasks: Sequence[str], prompts: Sequence[str], max_repeats: int) -> list[str | None]:
    """
    Finds prompts that occur too often in a task. Prompts that differ only in case, punctuation and spaces count as
    equal.

    Args:
        tasks (`Sequence[str]`):
            The task of each row.
        prompts (`Sequence[str]`):
            The prompt of each row.
        max_repeats (`int`):
            How often a prompt may occur in a task. The first ones are kept.

    Returns:
        `list[str | None]`: for each row the reason why it is rejected, or `None`.
    """
    seen: Counter[tuple[str, str]] = Counter()
    reasons: list[str | None] = []
    for task, prompt in zip(tasks, prompts, strict=True):
        key = task, compact_text(prompt)
        seen[key] += 1
        often = seen[key] > max_repeats
        reasons.append(f"repeated prompt: {task} has it {max_repeats} times before this" if often else None)
    return reasons
