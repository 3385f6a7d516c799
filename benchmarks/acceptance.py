"""
How often a revision of a scorer prompt is accepted, with and without a true gain in agreement. The tables are in
docs/building_an_hp_scorer.md.

    python benchmarks/acceptance.py                # 4,000 comparisons for each number
    python benchmarks/acceptance.py --runs 400

People and judges are simulated, and every acceptance is decided by the package's own test. An edit has a true quality;
raters see it with an error and answer with a whole number from 0 to 5; so does the judge, with either prompt, but for
an error whose size is set so that the judge's agreement with the mean of the raters has a known value in the
population. Qualities and errors of the edits of a case correlate.
"""

import argparse
import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy.optimize import brentq

from hp_edit_trl.calibration.acceptance import (
    GAINS,
    acceptance_power,
    gain_in_agreement,
    one_sided_level,
    swap_test,
)
from hp_edit_trl.calibration.agreement import statistic_of
from hp_edit_trl.utils.tables import markdown_table


@dataclass(frozen=True)
class World:
    """
    What is simulated.

    Args:
        cases, edits (`int`, *optional*, defaults to 100 and 3):
            Number of cases, and of edits of each.
        before, after (`float`, *optional*, defaults to `0.7`):
            Agreement of the judge with people in the population, with the current prompt and with the candidate.
        validation_fraction (`float`, *optional*, defaults to `0.8`):
            Share of the cases that are held out.
        statistic (`str`, *optional*, defaults to `"pearson"`):
            The statistic of agreement.
        raters (`int`, *optional*, defaults to `2`):
            Number of raters.
        noise (`float`, *optional*, defaults to `0.6`):
            Standard deviation of a rater's error; that of the true quality is 1.
        case_share (`float`, *optional*, defaults to `0.3`):
            Correlation of the judge's errors on two edits of a case, and of their qualities.
        common (`float`, *optional*, defaults to `0.0`):
            Share of the judge's errors that both prompts have in common.
        scale (`float`, *optional*, defaults to `1.0`):
            Part of the scale that the judge uses with the candidate, relative to the current prompt.
        rare (`bool`, *optional*, defaults to `False`):
            Whether the errors with the candidate are nine times as large in a tenth of the cases.
        tasks (`int`, *optional*, defaults to `1`):
            Number of tasks with as many cases each, which are pooled.
    """

    cases: int = 100
    edits: int = 3
    before: float = 0.7
    after: float = 0.7
    validation_fraction: float = 0.8
    statistic: str = "pearson"
    raters: int = 2
    noise: float = 0.6
    case_share: float = 0.3
    common: float = 0.0
    scale: float = 1.0
    rare: bool = False
    tasks: int = 1

    def draw(
        self, rng: np.random.Generator, cases: int, sizes: tuple[float, float]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """People's mean and the judge's scores with both prompts, each of shape `(cases, edits)`."""

        def correlated() -> np.ndarray:
            of_case = rng.normal(size=(cases, 1))
            return math.sqrt(self.case_share) * of_case + math.sqrt(1 - self.case_share) * rng.normal(
                size=(cases, self.edits)
            )

        def answer(values: np.ndarray, scale: float = 1.0) -> np.ndarray:
            return np.clip(np.floor(3 + 1.3 * scale * values + 0.5), 0, 5)

        quality, shared = correlated(), correlated()
        seen = quality[..., None] + self.noise * rng.normal(size=(cases, self.edits, self.raters))
        before, after = (math.sqrt(self.common) * shared + math.sqrt(1 - self.common) * correlated() for _ in range(2))
        if self.rare:
            after = after * np.where(rng.random((cases, 1)) < 0.1, 3.0, 1 / 3)
        human = answer(seen).mean(-1)
        return human, answer(quality + sizes[0] * before), answer(quality + sizes[1] * after, self.scale)

    @property
    def sizes(self) -> tuple[float, float]:
        """Sizes of the judge's errors that give the two agreements."""
        # They do not depend on the fields that are set here.
        world = replace(self, cases=100, edits=3, validation_fraction=0.8, tasks=1, scale=1.0, rare=False, common=0.0)
        before = _size(replace(world, after=0.0), 1)
        if self.scale == 1 and not self.rare:
            return before, _size(replace(world, before=self.after, after=0.0), 1)
        return before, _size(replace(world, before=0.0, scale=self.scale, rare=self.rare), 2)


@cache
def _size(world: World, which: int) -> float:
    """The size of the errors with the current prompt (1) or the candidate (2), found in a large population."""
    target = world.before if which == 1 else world.after

    def distance(size: float) -> float:
        drawn = world.draw(np.random.default_rng(0), 40_000, (size, size))
        return statistic_of(world.statistic, drawn[0].ravel(), drawn[which].ravel()) - target

    return float(brentq(distance, 0.01, 9, xtol=1e-3))


def compare(
    world: World, rng: np.random.Generator, look: int = 1, overfit: bool = False, on_all: bool = False
) -> tuple[bool, bool]:
    """
    Simulates one comparison. Returns whether the test on the held-out cases passes, and whether the candidate is
    accepted: then it is also better on the calibration cases.

    Args:
        world ([`World`]):
            What is simulated.
        rng (`np.random.Generator`):
            Source of randomness.
        look (`int`, *optional*, defaults to `1`):
            Number of the look at the held-out cases.
        overfit (`bool`, *optional*, defaults to `False`):
            Whether the candidate repeats what people said of the calibration cases, which whoever wrote it has seen.
        on_all (`bool`, *optional*, defaults to `False`):
            Whether the test is on all cases, the seen ones included, which is not what the package does.
    """
    drawn = []
    for task in range(world.tasks):
        human, before, after = world.draw(rng, world.cases, world.sizes)
        held_out = rng.random(world.cases) < world.validation_fraction
        if overfit:
            after[~held_out] = np.floor(human[~held_out] + 0.5)
        of_case = np.stack([held_out, np.arange(world.cases) + task * world.cases, np.full(world.cases, task)])
        edits = np.repeat(of_case, world.edits, axis=1)
        drawn.append(np.concatenate([np.stack([human.ravel(), before.ravel(), after.ravel()]), edits]))
    human, before, after, held_out, case, task_of = np.concatenate(drawn, axis=1)
    seen = [(held_out == 0) & (task_of == task) for task in range(world.tasks)]
    gains = [gain_in_agreement(world.statistic, human[of], before[of], after[of]) for of in seen]
    defined = [gain for gain in gains if not math.isnan(gain)]  # with few cases, some are not
    is_better = not defined or np.mean(defined) > 0  # if none is, the test alone decides
    level = one_sided_level(look)
    side = np.ones(len(case), bool) if on_all else held_out == 1
    columns = human[side], before[side], after[side], case[side]
    num_permutations = math.ceil(20 / level)
    p = swap_test(*columns, world.statistic, num_permutations, int(rng.integers(2**31)), task_of[side])
    return p <= level, p <= level and is_better


def rates(world: World, runs: int, seed: int = 0, **options: bool) -> np.ndarray:
    """The shares of comparisons in which the test passes, and in which the candidate is accepted."""
    rng = np.random.default_rng(seed)
    return np.mean([compare(world, rng, **options) for _ in range(runs)], axis=0)


def rate_of_five(world: World, runs: int, seed: int = 0) -> float:
    """The share of runs in which any of five candidates is accepted, each at a look of its own."""
    rng = np.random.default_rng(seed)
    return float(np.mean([any(compare(world, rng, look)[1] for look in range(1, 6)) for _ in range(runs)]))


def power_table(runs: int) -> str:
    """Acceptance of true gains over an agreement of .70."""
    rows = []
    for cases, edits in ((50, 1), (100, 1), (50, 3), (100, 3)):
        world = World(cases, edits)
        half = replace(world, validation_fraction=0.5, after=0.85)
        human = world.draw(np.random.default_rng(1), cases, world.sizes)[0].ravel()
        planned = acceptance_power(human, np.repeat(np.arange(cases), edits))
        found = [rates(replace(world, after=0.7 + gain), runs)[1] for gain in GAINS]
        cells = [f"{rate:.2f} ({plan['power']:.2f})" for rate, plan in zip(found, planned, strict=True)]
        rows.append([cases, edits, *cells, f"{rates(half, runs)[1]:.2f}"])
    # A question that all tasks share, in the base prompt: eight tasks of 25 cases
    tasks = World(25, 1, tasks=8)
    cells = [f"{rates(replace(tasks, after=0.7 + gain), runs)[1]:.2f}" for gain in GAINS]
    half = replace(tasks, after=0.85, validation_fraction=0.5)
    rows.append(["8 tasks of 25", 1, *cells, f"{rates(half, runs)[1]:.2f}"])
    head = ["cases", "edits of each", *(f"+{gain:.2f} (plan)" for gain in GAINS), "+0.15, half held out"]
    return markdown_table(head, rows)


def level_table(runs: int) -> str:
    """Acceptance without a true gain. The nominal level of a first look is .025."""
    worlds = {
        "as above": World(),
        "20 cases": World(20),
        "50 cases, one edit of each": World(50, 1),
        "agreement .85": World(before=0.85, after=0.85),
        "errors of a case correlate by .7": World(case_share=0.7),
        "half of the errors are common to both prompts": World(common=0.5),
        "one rater with an error of 1": World(before=0.6, after=0.6, raters=1, noise=1.0),
        "the candidate uses half of the scale": World(scale=0.5),
        "Spearman": World(statistic="spearman"),
        "mean absolute error .7": World(statistic="mae", before=0.7, after=0.7),
        "8 tasks of 25 cases, one edit of each": World(25, 1, tasks=8),
        "the candidate's errors are in a tenth of the cases": World(rare=True),
    }
    rows = [[name, *(f"{rate:.3f}" for rate in rates(world, runs))] for name, world in worlds.items()]
    rows.append(["overfitted to the calibration cases", *(f"{one:.3f}" for one in rates(World(), runs, overfit=True))])
    on_all = rates(World(), runs, overfit=True, on_all=True)
    rows.append(["the same, if all cases were tested", *(f"{one:.3f}" for one in on_all)])
    rows.append(["any of five candidates (nominal: .05)", "", f"{rate_of_five(World(), runs // 2):.3f}"])
    return markdown_table(["no true gain", "test passed", "accepted"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4000, help="comparisons for each number")
    args = parser.parse_args()
    print(power_table(args.runs), level_table(args.runs), sep="\n")
