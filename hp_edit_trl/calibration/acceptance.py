"""
When a revision of a scorer prompt is accepted, and how likely a true gain in agreement is to be accepted. The rates of
both are simulated by `benchmarks/acceptance.py`.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

from ..utils.seeding import seeded_generator
from .agreement import statistic_of


# Statistics of agreement: 1 if larger is better, -1 if smaller is better
DIRECTION = {"pearson": 1, "spearman": 1, "kendall": 1, "mae": -1}
GAINS = (0.05, 0.1, 0.15)  # of which the power is shown
POWER = 0.8  # that is aimed at
ERROR_CORRELATION = 0.3  # of a judge's errors on two edits of one case, where it has to be assumed
BATCH = 4096  # swaps at once


def one_sided_level(look: int, confidence: float = 0.95) -> float:
    r"""
    The level of the k-th look at the held-out cases, \\( (1 - c) / (k (k + 1)) \\). The levels of all looks add up to
    \\( 1 - c \\).

    Args:
        look (`int`):
            The number \\( k \\) of the look, from 1.
        confidence (`float`, *optional*, defaults to `0.95`):
            The confidence \\( c \\).
    """
    return (1 - confidence) / (look * (look + 1))


def swap_test(
    human: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    clusters: Sequence[str],
    statistic: str = "pearson",
    num_permutations: int = 1000,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> float:
    """
    Paired permutation test of the gain in agreement with people, one-sided.

    The scores `before` and `after` are swapped case by case at random, with all edits of a case together. The p-value
    is the share of swaps with at least the observed gain. If neither prompt has merit over the other, p is at most any
    level with about that probability.

    Scores are brought to one mean and spread before they are swapped (correlations of ranks: replaced by their ranks),
    which does not change a correlation. Otherwise a prompt that uses another part of the scale than the one before
    would be tested at another level. With fewer than 20 cases, this makes the test a little too generous.

    Args:
        human (`np.ndarray`):
            Score of each edit by people, of shape `(edits,)`.
        before (`np.ndarray`):
            The scores with the current prompt, of the same shape.
        after (`np.ndarray`):
            The scores with the candidate.
        clusters (`Sequence[str]`):
            Case of each edit.
        statistic (`str`, *optional*, defaults to `"pearson"`):
            `"pearson"`, `"spearman"`, `"kendall"` or `"mae"`.
        num_permutations (`int`, *optional*, defaults to `1000`):
            Number of random swaps.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the swaps.
        groups (`Sequence[str]`, *optional*):
            Group of each edit, e.g. its task. The gain is then the unweighted mean of the groups' gains; a group in
            which it is undefined is left out.

    Returns:
        `float`: the p-value; 1 if the gain is undefined.
    """
    _, case_of = np.unique(np.asarray(clusters, str), return_inverse=True)
    group_of = np.zeros(len(human), int) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    num_cases = case_of.max() + 1
    unswapped = np.zeros((1, num_cases))
    parts = []
    for group in range(group_of.max() + 1):
        of = group_of == group
        gains_of = _gains_of_swaps(statistic, human[of], before[of], after[of], case_of[of], num_cases)
        if not np.isnan(gains_of(unswapped)).any():
            parts.append(gains_of)
    if not parts:
        return 1.0

    def gains(swapped: np.ndarray) -> np.ndarray:
        found = np.mean([gains_of(swapped) for gains_of in parts], axis=0)
        # Undefined gains count against the candidate. Equal gains stay equal, in whatever order their terms are added.
        return np.nan_to_num(np.round(np.asarray(found), 12), nan=math.inf)

    (observed,) = gains(unswapped)
    rng = np.random.default_rng(seeded_generator(seed, "swap test").initial_seed())
    as_good = 0
    for start in range(0, num_permutations, BATCH):
        swapped = rng.integers(2, size=(min(BATCH, num_permutations - start), num_cases), dtype=np.uint8)
        as_good += int((gains(swapped.astype(float)) >= observed).sum())
    return (1 + as_good) / (1 + num_permutations)


def gain_in_agreement(statistic: str, human: np.ndarray, before: np.ndarray, after: np.ndarray) -> float:
    """The gain of `after` over `before`: positive is better, for any statistic. NaN if it is undefined."""
    return DIRECTION[statistic] * (statistic_of(statistic, human, after) - statistic_of(statistic, human, before))


def acceptance_power(
    human: Sequence[float],
    clusters: Sequence[str],
    statistic: str = "pearson",
    before: float = 0.7,
    gains: Sequence[float] = GAINS,
    validation_fraction: float = 0.8,
    confidence: float = 0.95,
    num_simulations: int = 200,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> list[dict[str, float | None]]:
    r"""
    Estimates the probability that a true gain in agreement is accepted at the first look, with the ratings at hand.

    Scores with two prompts are simulated for the rated edits as they are: whole numbers from 0 to 5, with errors that
    are independent for the two prompts, correlated by .3 among the edits of a case, and as large as the two agreements
    say. Independent errors are the hard case: with errors in common, a gain is easier to see. The mean of the observed
    gain over its standard deviation, \\( \lambda \\), grows with the root of the number of cases. The candidate is
    accepted with the probability \\( \Phi(\lambda_c) \, \Phi(\lambda_v - z) \\): better on the calibration cases, and
    significantly so on the held-out cases.

    Args:
        human (`Sequence[float]`):
            Score of each edit by people.
        clusters (`Sequence[str]`):
            Case of each edit.
        statistic (`str`, *optional*, defaults to `"pearson"`):
            The statistic that is compared.
        before (`float`, *optional*, defaults to `0.7`):
            The agreement with the current prompt.
        gains (`Sequence[float]`, *optional*, defaults to `(0.05, 0.1, 0.15)`):
            The gains; for `"mae"`, how much smaller it becomes.
        validation_fraction (`float`, *optional*, defaults to `0.8`):
            Share of the cases that are held out.
        confidence (`float`, *optional*, defaults to `0.95`):
            As in [`PromptRefiner`].
        num_simulations (`int`, *optional*, defaults to `200`):
            Number of simulated data sets.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the simulation.
        groups (`Sequence[str]`, *optional*):
            Group of each edit, e.g. its task. The agreement is then the unweighted mean over the groups.

    Returns:
        `list[dict]`: for each gain, `gain`, `power`, and `cases`, the number of cases with as many edits each of which
        the power would be 0.8. Both are `None` if the scale does not allow such an agreement.
    """
    people = np.asarray(human, float)
    _, case_of = np.unique(np.asarray(clusters, str), return_inverse=True)
    num_cases = case_of.max() + 1
    rng = np.random.default_rng(seeded_generator(seed, "acceptance power").initial_seed())

    def errors(count: int) -> np.ndarray:
        of_case = rng.normal(size=(count, num_cases))[:, case_of]
        of_edit = rng.normal(size=(count, len(people)))
        return math.sqrt(ERROR_CORRELATION) * of_case + math.sqrt(1 - ERROR_CORRELATION) * of_edit

    # Many copies of the edits, of which the size of the errors is found that gives an agreement
    many = errors(math.ceil(20000 / len(people)))
    group_of = np.zeros(len(people), int) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    parts = [group_of == group for group in range(group_of.max() + 1)]
    parts = [of for of in parts if statistic == "mae" or np.ptp(people[of]) > 0]
    if not parts:
        return [{"gain": gain, "power": None, "cases": None} for gain in gains]

    def size_of_errors(agreement: float) -> float | None:
        def distance(size: float) -> float:
            scores = _scores(people, many, size)
            found = [statistic_of(statistic, np.tile(people[of], len(many)), scores[:, of].ravel()) for of in parts]
            return float(np.mean(found)) - agreement

        try:
            return float(brentq(distance, 0, 100, xtol=1e-4))
        except ValueError:  # no size gives it
            return None

    def simulated(size: float) -> np.ndarray:
        scores = _scores(people, errors(num_simulations), size)
        return np.mean([_rows(statistic, people[of], scores[:, of]) for of in parts], axis=0)

    z = ndtri(1 - one_sided_level(1, confidence))

    def power(cases: float, effect: float) -> float:
        held_out = validation_fraction * cases
        return float(ndtr(effect * math.sqrt(cases - held_out)) * ndtr(effect * math.sqrt(held_out) - z))

    results: list[dict[str, float | None]] = []
    size_before = size_of_errors(before)
    rows_before = None if size_before is None else simulated(size_before)
    for gain in gains:
        size = size_of_errors(before + DIRECTION[statistic] * gain)
        result: dict[str, float | None] = {"gain": gain, "power": None, "cases": None}
        if rows_before is not None and size is not None:
            difference = DIRECTION[statistic] * (simulated(size) - rows_before)
            difference = difference[~np.isnan(difference)]
            # Per case. The mean is known: it is the gain.
            effect = gain / (difference.std() * math.sqrt(num_cases)) if len(difference) > 1 else 0.0
            if 0 < effect < math.inf:
                needed = 1.0
                while power(needed, effect) < POWER:
                    needed *= 1.01
                result |= {"power": power(num_cases, effect), "cases": math.ceil(needed)}
        results.append(result)
    return results


def effective_edits(edits_per_case: float) -> float:
    """For how many independent edits the edits of a case count, if errors on them correlate as is assumed here."""
    return edits_per_case / (1 + ERROR_CORRELATION * (edits_per_case - 1))


def _scores(human: np.ndarray, errors: np.ndarray, size: float) -> np.ndarray:
    """Whole scores with people's mean and spread, and with errors of a size, relative to that spread."""
    spread = human.std() or 1.0
    latent = (human - human.mean() + size * spread * errors) / math.sqrt(1 + size**2)
    return np.clip(np.floor(human.mean() + latent + 0.5), 0, 5)


def _comparable(statistic: str, values: np.ndarray) -> np.ndarray:
    """Values of which only that is left on which the statistic depends."""
    if statistic == "mae":
        return np.asarray(values, float)
    values = np.asarray(values, float) if statistic == "pearson" else rankdata(values)
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else values * 0


def _gains_of_swaps(
    statistic: str, human: np.ndarray, before: np.ndarray, after: np.ndarray, case_of: np.ndarray, num_cases: int
) -> Callable[[np.ndarray], np.ndarray]:
    """
    A function that computes the gain for each row of a matrix, which says for each case whether its scores are swapped
    (1) or keep their places (0). NaN where it is undefined.
    """
    x, old, new = (_comparable(statistic, values) for values in (human, before, after))
    if statistic == "kendall":

        def by_pairs(swapped: np.ndarray) -> np.ndarray:
            places = swapped[:, case_of] == 1
            return _rows(statistic, x, np.where(places, old, new)) - _rows(statistic, x, np.where(places, new, old))

        return by_pairs

    # All others are functions of sums over edits, of which each case has its part.
    def sums(y: np.ndarray) -> np.ndarray:
        terms = (np.abs(y - x),) if statistic == "mae" else (x * y, y, y * y)
        return np.stack([np.bincount(case_of, term, num_cases) for term in terms], axis=1)

    def value(totals: np.ndarray) -> np.ndarray:
        if statistic == "mae":
            return totals[:, 0] / len(x)
        products, mean, squares = totals.T / len(x)
        scale = np.sqrt(np.maximum(squares - mean**2, 0) * (x @ x) / len(x))
        return np.divide(products, scale, out=np.full(len(products), np.nan), where=scale > 1e-9)

    sums_old, sums_new = sums(old), sums(new)
    difference = sums_old - sums_new

    def by_sums(swapped: np.ndarray) -> np.ndarray:
        moved = swapped @ difference
        return DIRECTION[statistic] * (value(sums_new.sum(0) + moved) - value(sums_old.sum(0) - moved))

    return by_sums


def _rows(statistic: str, human: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The statistic of each row of scores; NaN where it is undefined."""
    if statistic == "mae":
        return np.abs(scores - human).mean(1)
    if statistic == "kendall":
        return np.array([statistic_of(statistic, human, row) for row in scores])
    if statistic == "spearman":
        human, scores = rankdata(human), rankdata(scores, axis=1)
    x, y = human - human.mean(), scores - scores.mean(1, keepdims=True)
    scale = np.sqrt((x @ x) * (y * y).sum(1))
    defined = scale > 1e-9 * len(x)
    return np.divide(y @ x, scale, out=np.full(len(y), np.nan), where=defined)
