"""
How many cases a round should have, and what a build will take: the edits that its targets cost depend on how often the
editor fails, which is assumed before the first edit and measured after it.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...utils.tables import markdown_table
from .rounds import Outcome


# Mean HP-score of Qwen-Image-Edit-2509 for each task (HP-Edit, table 1)
TABLE_1 = {
    "add": 4.81, "remove": 4.85, "swap": 4.781, "background": 4.539, "color": 4.358, "bokeh": 4.165, "relight": 3.54,
    "style": 4.734,
}  # fmt: skip

MOST_GROWTH = 10  # a round has at most this many times the cases of all earlier ones
PRICES = ("edit", "judgement", "prompt")  # what a build may be told a price of


def assumed_shares(rule: str = "below", threshold: float = 5.0) -> dict[str, float]:
    """
    The largest share of edits, by task, that the filter can keep if the editor is as good as Qwen-Image-Edit-2509 in
    table 1 of HP-Edit. Scores are integers up to 5: with a mean of 4.85, at most 15 % are below 5, which all are 4
    then.

    Args:
        rule (`str`, *optional*, defaults to `"below"`):
            Rule of the filter. With `"hardest"`, the share is the threshold.
        threshold (`float`, *optional*, defaults to `5.0`):
            Threshold of the filter.
    """
    if rule == "hardest":
        return dict.fromkeys(TABLE_1, threshold)
    lost = 6 - math.ceil(threshold)  # points that each edit below the threshold lacks at least
    return {task: min(1.0, (5 - mean) / lost) for task, mean in TABLE_1.items()}


def least_edits(counts: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, int]:
    """
    The number of edits per task that give a number of hard cases.

    Args:
        counts (`Mapping[str, int]`):
            Number of hard cases per task.
        shares (`Mapping[str, float]`):
            Share of hard cases per task.
    """
    # Shares come from means with three digits: without rounding, 4.81 would leave a little less than 0.19.
    return {task: math.ceil(round(count / shares[task], 6)) for task, count in counts.items()}


def cases_to_plan(missing: int, hard: int, planned: int) -> int:
    """
    The number of further cases to plan for a task, so that hardly any are made in vain: as many as are needed if the
    share of hard cases is at the upper end of its interval (Wilson, 95 %), and a few more because their number varies.

    Args:
        missing (`int`):
            Number of hard cases that the task lacks.
        hard (`int`):
            Number of hard cases so far.
        planned (`int`):
            Number of planned cases so far, at least 1.
    """
    if missing <= 0:
        return 0
    z, share = 1.96, hard / planned
    spread = z * math.sqrt(share * (1 - share) / planned + (z / planned) ** 2 / 4)
    upper = (share + z**2 / planned / 2 + spread) / (1 + z**2 / planned)
    return min(math.ceil((missing + 2 * math.sqrt(missing)) / upper), MOST_GROWTH * planned)


class Estimate:
    """
    What a build still takes, and what it will have.

    Args:
        counts (`Mapping[str, int]`):
            Number of hard cases per task that the build should have.
        assumed (`Mapping[str, float]`):
            Share of hard cases per task, as long as none is measured.
        outcome ([`Outcome`]):
            What its rounds have come to.
        candidates (`Mapping[str, int]`, *optional*):
            Number of candidates of the benchmark per task that are still to be made.
        prices (`Mapping[str, float]`, *optional*):
            Price of an `edit`, a `judgement` and a `prompt`.
    """

    def __init__(
        self,
        counts: Mapping[str, int],
        assumed: Mapping[str, float],
        outcome: Outcome,
        candidates: Mapping[str, int] | None = None,
        prices: Mapping[str, float] | None = None,
    ):
        self.counts = dict(counts)
        self.outcome = outcome
        self.candidates = dict(candidates or {})
        self.prices = dict(prices or {})
        self.missing = {task: max(0, count - outcome.hard[task]) for task, count in counts.items()}
        self.shares: dict[str, float] = {}  # of edits that are hard
        self.yields: dict[str, float] = {}  # of planned cases that are hard
        for task in counts:
            edited, planned = outcome.solved[task] + outcome.hard[task], outcome.planned[task]
            # If none was hard, the next one may be.
            self.shares[task] = max(outcome.hard[task], 0.5) / edited if edited else assumed[task]
            self.yields[task] = max(outcome.hard[task], 0.5) / planned if planned else assumed[task]
        needed = least_edits(self.missing, self.yields)
        # Number of cases per task to plan, the candidates of the benchmark among them
        self.planned = {task: number + self.candidates.get(task, 0) for task, number in needed.items()}

    def next_round(self, sample_size: int) -> dict[str, int]:
        """
        The number of cases per task to plan for the next round.

        Args:
            sample_size (`int`):
                Largest number of cases for training per task in the first round; 0 for no limit.
        """
        counts = {}
        for task, count in self.planned.items():
            if planned := self.outcome.planned[task]:
                counts[task] = cases_to_plan(self.missing[task], self.outcome.hard[task], planned)
                continue
            candidates = self.candidates.get(task, 0)
            # Twice the candidates of the benchmark, because some prompts cannot be used.
            counts[task] = min(count - candidates, sample_size or count) + 2 * candidates
        return counts

    def describe(self, available: Mapping[str, int]) -> str:
        """
        A table of the tasks, and the totals.

        Args:
            available (`Mapping[str, int]`):
                How many of the cases in `planned` there are images for.
        """
        rows: list[list[Any]] = []
        total: Counter[str] = Counter()
        for task, wanted in self.counts.items():
            outcome, candidates = self.outcome, self.candidates.get(task, 0)
            cases = max(0, available.get(task, 0) - candidates)
            kept = outcome.edited[task] / outcome.planned[task] if outcome.planned[task] else 1.0
            edits = math.ceil(cases * kept) + min(candidates, available.get(task, 0))
            comes = min(wanted, outcome.hard[task] + round(cases * self.yields[task]))
            judged = outcome.solved[task] + outcome.hard[task]
            share = f"{self.shares[task]:.1%} of {judged:,}" if judged else f"{self.shares[task]:.1%} (assumed)"
            got = min(outcome.hard[task], wanted)
            rows.append([task, f"{wanted:,}", f"{got:,}", share, f"{edits:,}", f"{comes:,}"])
            total.update(wanted=wanted, got=got, edits=edits, comes=comes, prompts=available.get(task, 0))
        numbers = [f"{total[name]:,}" for name in ("wanted", "got", "edits", "comes")]
        rows.append(["all", *numbers[:2], "", *numbers[2:]])
        head = ["task", "cases wanted", "made", "share that is hard", "edits to make", "cases expected"]
        told = (
            f"Still to make: {total['edits']:,} edits, as many judgements, and prompts for {total['prompts']:,} cases"
        )
        amounts = {"edit": total["edits"], "judgement": total["edits"], "prompt": total["prompts"]}
        if self.prices:
            cost = sum(price * amounts[what] for what, price in self.prices.items())
            told += f"; at {', '.join(f'{price:g} per {what}' for what, price in self.prices.items())}: {cost:,.2f}"
        told = f"{markdown_table(head, rows)}{told}."
        if all(self.outcome.planned.values()) and self.outcome.planned:
            return told
        return (
            f"{told} Assumed shares are the largest that integer scores with the means of Qwen-Image-Edit-2509 in "
            "table 1 of HP-Edit can have, and no prompts are expected to be rejected: there may be more to make."
        )
