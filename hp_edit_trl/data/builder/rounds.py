"""
The rounds of a build. A case counts only once its edit has turned out to be hard, so cases are made in rounds until
each task has its count, or its images are used up. A round is a work folder of its own: the stages from `plan` to
`filter`, after the stages of the images, which all rounds share.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .engine import WorkFolder


class Earlier:
    """
    What earlier rounds used, which a later one must not use again.

    Args:
        rounds (`Sequence[WorkFolder]`, *optional*, defaults to `()`):
            The rounds, with all of their stages finished.
    """

    def __init__(self, rounds: Sequence[WorkFolder] = ()):
        self.rounds = list(rounds)

    @property
    def key(self) -> str | None:
        """Hash of the settings of all stages that this depends on, up to `split`; `None` if there are no rounds."""
        return next(stage.key for stage in self.rounds[-1].stages if stage.name == "split") if self.rounds else None

    @cached_property
    def tasks(self) -> dict[str, set[str]]:
        """The tasks that each image has cases of, by the image's id."""
        tasks: dict[str, set[str]] = {}
        for one in self.rounds:
            for image, task in zip(*one.read(one.rows("plan"), ["image_id", "task"]).values(), strict=True):
                tasks.setdefault(image, set()).add(task)
        return tasks

    @cached_property
    def styles(self) -> Counter[str]:
        """Number of cases of each style."""
        columns = [one.read(one.rows("plan"), ["style"])["style"] for one in self.rounds]
        return Counter(style for styles in columns for style in styles if style is not None)

    @cached_property
    def prompts(self) -> list[tuple[str, str]]:
        """Task and prompt of each case."""
        columns = [one.read(one.rows("split"), ["task", "prompt"]) for one in self.rounds]
        return [pair for batch in columns for pair in zip(batch["task"], batch["prompt"], strict=True)]

    @cached_property
    def benchmark(self) -> dict[str, int]:
        """The perceptual hash of each image of the benchmark and its reserve, by the image's id."""
        found = {}
        for one in self.rounds:
            batch = one.read(one.rows("split"), ["image_id", "image_hash", "place"])
            for image, value, place in zip(*batch.values(), strict=True):
                if place is not None:
                    found[image] = int(value, 16)
        return found


@dataclass
class Outcome:
    """
    What rounds have come to, by task. The candidates of the benchmark do not count.

    Args:
        planned (`Counter[str]`):
            Number of cases that prompts were asked for.
        edited (`Counter[str]`):
            Number of cases that edits were asked for.
        hard (`Counter[str]`):
            Number of cases that the filter keeps for training.
        solved (`Counter[str]`):
            Number of cases that it does not keep, because the editor solved them.
    """

    planned: Counter[str] = field(default_factory=Counter)
    edited: Counter[str] = field(default_factory=Counter)
    hard: Counter[str] = field(default_factory=Counter)
    solved: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, rounds: Sequence[WorkFolder]) -> "Outcome":
        """Counts the cases of rounds whose stages are finished."""
        outcome = cls()
        for one in rounds:
            outcome.planned.update(one.read(one.rows("plan"), ["task"])["task"])
            for task, place in zip(*one.read(one.rows("edits"), ["task", "place"]).values(), strict=True):
                outcome.planned[task] -= place is not None
                outcome.edited[task] += place is None
            for task, split in zip(*one.read(one.live, ["task", "split"]).values(), strict=True):
                if split in ("train", "filtered"):
                    (outcome.hard if split == "train" else outcome.solved)[task] += 1
        return outcome


def over_count(rounds: Sequence[WorkFolder], counts: Mapping[str, int]) -> list[set[int]]:
    """
    The hard cases beyond the count of their task: those that were made last.

    Args:
        rounds (`Sequence[WorkFolder]`):
            The rounds, with all of their stages finished.
        counts (`Mapping[str, int]`):
            Number of cases per task.

    Returns:
        `list[set[int]]`: their rows in each round.
    """
    taken: Counter[str] = Counter()
    over: list[set[int]] = []
    for one in rounds:
        over.append(set())
        columns = one.read(one.live, ["task", "split"]).values()
        for row, task, split in zip(one.live.tolist(), *columns, strict=True):
            if split == "train":
                taken[task] += 1
                over[-1] |= {row} if taken[task] > counts.get(task, 0) else set()
    return over
