"""Stage `split`: draws the cases of the benchmark, and keeps their images out of the training data."""

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


BENCHMARK_COUNTS = {task.name: task.realpref_bench for task in TASKS.values()}


class Split(Stage):
    """
    Assigns cases to the benchmark (`"test"`) or to training (`"train"`).

    First, prompts that occur too often are rejected. Then the requested number of cases of each task is drawn, evenly
    over the categories. The other cases of a benchmark image, and all cases of images that look like one, are
    rejected, so that training sees neither.

    Args:
        counts (`Mapping[str, int]`, *optional*):
            Number of cases per task in the benchmark; `{}` for none. Defaults to the counts of RealPref-Bench.
        max_distance (`int`, *optional*, defaults to `8`):
            Images look alike if their perceptual hashes differ in at most this many of 64 bits.
        max_repeats (`int`, *optional*, defaults to `20`):
            How often the same prompt may occur in a task.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
    """

    name = "split"
    inputs = ("id", "task", "category", "prompt", "image_id", "image_hash")
    features = Features({"split": Value("string")})

    def __init__(
        self, counts: Mapping[str, int] = BENCHMARK_COUNTS, max_distance: int = 8, max_repeats: int = 20, seed: int = 0
    ):
        self.counts = dict(counts)
        if any(not isinstance(count, int) or count < 0 for count in self.counts.values()):
            raise ValueError(f"benchmark_counts={self.counts} must be integers of at least 0.")
        if not 0 <= max_distance <= 64:
            raise ValueError(f"max_distance={max_distance} must be in 0..64.")
        check_positive(max_repeats=max_repeats)
        self.max_distance = max_distance
        self.max_repeats = max_repeats
        self.seed = seed

    @property
    def settings(self) -> dict[str, Any]:
        names = ("counts", "max_distance", "max_repeats", "seed")
        return {name: getattr(self, name) for name in names}

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
                    f"The benchmark asks for {count} cases of the task {task!r}, but there are {available}: add "
                    "images, or set benchmark_counts ({} for no benchmark)."
                )
            # One case per category in turn, the rarest category first, so that all occur before one occurs twice
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
                reasons[i] = "in the benchmark: its image is there with another prompt"
            elif len(benchmark):
                bits = np.bitwise_count(benchmark ^ hashes[i])
                nearest = int(bits.argmin())
                if bits[nearest] <= self.max_distance:
                    reasons[i] = f"near the benchmark: {bits[nearest]} bits from its image {names[nearest]}"
        split = ["test" if i in chosen else "train" for i in range(len(ids))]
        return {"split": split, "reason": reasons}


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
