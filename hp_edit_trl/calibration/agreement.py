"""
How well a scorer agrees with people, and people with each other: statistics with bootstrap intervals.

An interval comes from resampling whole clusters (cases), because several models' edits of one case are not independent, within each
group (task), because the tasks are chosen and not drawn. Every statistic is computed from a matrix of weights: how often each edit
occurs in each resample. Its first row is all ones and gives the statistic itself.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np

from ..utils.statistics import bootstrap_weights, cluster_labels, estimate, finite_or_none


STATISTICS = ("pearson", "spearman", "kendall", "mae", "exact", "within_one", "bias", "ties_human", "ties_scorer")
LEVELS = ("nominal", "ordinal", "interval")


def rounded(values: np.ndarray) -> np.ndarray:
    """Whole scores, with halves rounded up: 2.5 is 3."""
    return np.floor(values + 0.5).astype(int)


def agreement(
    human: Sequence[float],
    scores: Sequence[float | None],
    groups: Sequence[str] | None = None,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Agreement between people and a scorer on the same edits.

    Args:
        human (`Sequence[float]`):
            What people gave each edit, 0 to 5.
        scores (`Sequence[float | None]`):
            What the scorer gave it, 0 to 5. `None` or NaN where it gave none: such edits are counted and left out.
        groups (`Sequence[str]`, *optional*):
            Group of each edit, e.g. its task, for results per group.
        clusters (`Sequence[Hashable]`, *optional*):
            Which edits belong together, e.g. the ids of their cases. They are resampled together. By default each edit stands for
            itself.
        confidence (`float`, *optional*, defaults to `0.95`):
            Probability that an interval is made for.
        num_resamples (`int`, *optional*, defaults to `1000`):
            How many bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resamples.

    Returns:
        `dict`: `overall` (all edits pooled), `groups` (by name) and `mean_of_groups` (the unweighted mean of the groups' Pearson
        correlations, `None` without groups; its `left_out` names the groups that have none). `overall` and each group hold `n` (edits with a score), `missing` (edits without),
        `clusters`, `confusion` (6 x 6 counts, people's rounded scores in the rows) and, for each of `STATISTICS`, a dictionary with
        `value`, `low` and `high`, `undefined_resamples` (how many of the resamples have no value and were left out) and `reason`
        (why there is no value or no interval). Correlations and differences use the scores as they are; `exact`, `within_one` and
        the confusion matrix use whole scores with halves rounded up. `bias` is the scorer's mean minus people's. `ties_human` and
        `ties_scorer` are shares of the pairs of edits.

    Raises:
        `ValueError`: If the lengths differ, a value is outside 0 to 5, a cluster lies in several groups, or an option has no meaning.
    """
    people, scorer = _checked(human, "human"), _checked(scores, "scores", may_miss=True)
    if len(people) != len(scorer):
        raise ValueError(
            f"There are {len(people)} human values and {len(scorer)} scores: both need one for each edit."
        )
    cluster_of, group_of = cluster_labels(clusters, groups, len(people))
    present = ~np.isnan(scorer)
    weights = np.zeros((1 + num_resamples, len(people)), np.int32)
    weights[:, present] = bootstrap_weights(cluster_of[present], group_of[present], confidence, num_resamples, seed)

    def result(members: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        scored = members & present
        x, y = people[scored], scorer[scored]
        num_clusters = len(np.unique(cluster_of[scored]))
        rows = _statistics(x, y, weights[:, scored])
        values: dict[str, Any] = {"n": len(x), "missing": int((members & ~present).sum()), "clusters": num_clusters}
        for name in STATISTICS:
            values[name] = estimate(rows[name], confidence, num_clusters, _why_undefined(name, x, y))
        confusion = np.zeros((6, 6), int)
        np.add.at(confusion, (rounded(x), rounded(y)), 1)
        values["confusion"] = confusion.tolist()
        return values, rows

    by_group: dict[str, dict[str, Any]] = {}
    mean = None
    if groups is not None:
        defined = {}
        for name in np.unique(group_of).tolist():
            by_group[name], rows = result(group_of == name)
            if by_group[name]["pearson"]["value"] is not None:
                defined[name] = rows["pearson"]
        mean = estimate(
            np.mean(list(defined.values()), axis=0) if defined else np.full(1 + num_resamples, np.nan),
            confidence,
            min((by_group[name]["clusters"] for name in defined), default=0),
            "no group has a Pearson correlation",
        )
        mean["left_out"] = [name for name in by_group if name not in defined]
    return {
        "overall": result(np.ones(len(people), bool))[0],
        "groups": by_group,
        "mean_of_groups": mean,
        "confidence": confidence,
        "num_resamples": num_resamples,
        "seed": seed,
    }


def agreement_difference(
    human: Sequence[float],
    scores_a: Sequence[float | None],
    scores_b: Sequence[float | None],
    clusters: Sequence[Hashable] | None = None,
    statistic: str = "pearson",
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    How much better or worse scorer `b` agrees with people than scorer `a` does, on the edits that both of them scored.

    Both are computed on the same resamples, so that what makes an edit easy or hard for both of them cancels out of the interval.

    Args:
        human (`Sequence[float]`):
            What people gave each edit, 0 to 5.
        scores_a (`Sequence[float | None]`):
            What the one scorer gave it, 0 to 5; `None` or NaN where it gave none.
        scores_b (`Sequence[float | None]`):
            What the other scorer gave it.
        clusters (`Sequence[Hashable]`, *optional*):
            Which edits belong together, e.g. the ids of their cases. By default each edit stands for itself.
        statistic (`str`, *optional*, defaults to `"pearson"`):
            One of `STATISTICS`.
        confidence (`float`, *optional*, defaults to `0.95`):
            Probability that the interval is made for.
        num_resamples (`int`, *optional*, defaults to `1000`):
            How many bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resamples.

    Returns:
        `dict`: `difference` (that of `b` minus that of `a`), `low` and `high` of its interval, `a` and `b` (the statistic of each
        scorer), `n` (edits that both scored), `missing` (edits that one or both did not score), `undefined_resamples` and `reason`
        as in [`agreement`]. What is undefined is `None`.

    Raises:
        `ValueError`: As in [`agreement`], or if there is no such statistic.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"There is no statistic {statistic!r}: choose one of {', '.join(STATISTICS)}.")
    people = _checked(human, "human")
    a, b = _checked(scores_a, "scores_a", may_miss=True), _checked(scores_b, "scores_b", may_miss=True)
    if not len(people) == len(a) == len(b):
        raise ValueError(
            f"There are {len(people)} human values, {len(a)} and {len(b)} scores: all need one for each edit."
        )
    both = ~(np.isnan(a) | np.isnan(b))
    cluster_of, group_of = (labels[both] for labels in cluster_labels(clusters, None, len(people)))
    people, a, b = people[both], a[both], b[both]
    weights = bootstrap_weights(cluster_of, group_of, confidence, num_resamples, seed)
    rows_a = _statistics(people, a, weights)[statistic]
    rows_b = _statistics(people, b, weights)[statistic]
    reason = _why_undefined(statistic, people, a) or _why_undefined(statistic, people, b)
    result = estimate(rows_b - rows_a, confidence, len(np.unique(cluster_of)), reason)
    return {
        "difference": result.pop("value"),
        **result,
        "a": finite_or_none(rows_a[0]),
        "b": finite_or_none(rows_b[0]),
        "n": len(people),
        "missing": int((~both).sum()),
        "statistic": statistic,
    }


def krippendorff_alpha(
    ratings: Sequence[tuple[Hashable, Hashable, float]], level: Literal["nominal", "ordinal", "interval"] = "ordinal"
) -> float | None:
    """
    Krippendorff's alpha: 1 where all annotators agree, 0 where they agree as much as chance would have it.

    Paper: Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011).

    Args:
        ratings (`Sequence[tuple]`):
            Annotator, item and value of each rating. Not everyone needs to rate everything; an item with one rating does not count.
        level (`str`, *optional*, defaults to `"ordinal"`):
            How far apart two values are: `"nominal"` (equal or not), `"ordinal"` (by how many ratings lie between them) or
            `"interval"` (by the square of their difference).

    Returns:
        `float` or `None`: alpha; `None` if no item has two ratings, or all values are the same.

    Raises:
        `ValueError`: If a value is no number, an annotator rated an item twice, or there is no such level.
    """
    return krippendorff_interval(ratings, level, num_resamples=0)["value"]


def krippendorff_interval(
    ratings: Sequence[tuple[Hashable, Hashable, float]],
    level: Literal["nominal", "ordinal", "interval"] = "ordinal",
    groups: dict[Hashable, str] | None = None,
    clusters: dict[Hashable, Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    [`krippendorff_alpha`] with an interval from resampling items.

    Args:
        ratings (`Sequence[tuple]`):
            Annotator, item and value of each rating.
        level (`str`, *optional*, defaults to `"ordinal"`):
            `"nominal"`, `"ordinal"` or `"interval"`.
        groups (`dict`, *optional*):
            Group of each item, within which is resampled.
        clusters (`dict`, *optional*):
            Cluster of each item. Items of one cluster are resampled together. By default each item stands for itself.
        confidence (`float`, *optional*, defaults to `0.95`):
            Probability that the interval is made for.
        num_resamples (`int`, *optional*, defaults to `1000`):
            How many bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resamples.

    Returns:
        `dict`: `value`, `low`, `high`, `undefined_resamples`, `reason`, and `items`, the number of items with two ratings or more.

    Raises:
        `ValueError`: As in [`krippendorff_alpha`].
    """
    if level not in LEVELS:
        raise ValueError(f"There is no level {level!r}: choose one of {', '.join(LEVELS)}.")
    by_item: dict[Hashable, dict[Hashable, float]] = {}
    for annotator, item, value in ratings:
        if value is None or not np.isfinite(value):
            raise ValueError(f"The rating of item {item!r} by {annotator!r} is {value!r}: leave missing ratings out.")
        if annotator in by_item.setdefault(item, {}):
            raise ValueError(f"Item {item!r} was rated twice by {annotator!r}: keep one of the two ratings.")
        by_item[item][annotator] = float(value)
    paired = {item: list(given.values()) for item, given in by_item.items() if len(given) > 1}
    levels = np.array(sorted({value for given in paired.values() for value in given}))

    # How often two annotators gave one item the values c and k. An item with m ratings counts m times, however many pairs it has.
    counts = np.zeros((len(paired), len(levels)))
    for row, given in enumerate(paired.values()):
        np.add.at(counts[row], np.searchsorted(levels, given), 1)
    coincidences = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(len(levels))
    coincidences /= (counts.sum(1) - 1)[:, None, None]

    cluster_of, group_of = cluster_labels(
        None if clusters is None else [clusters[item] for item in paired],
        None if groups is None else [groups[item] for item in paired],
        len(paired),
    )
    weights = bootstrap_weights(cluster_of, group_of, confidence, num_resamples, seed)
    observed = np.einsum("ri,ick->rck", weights.astype(float), coincidences, optimize=True)
    totals = observed.sum(2)  # how often each value occurs
    if level == "ordinal":
        position = np.cumsum(totals, 1) - totals / 2
    else:
        position = np.broadcast_to(levels, totals.shape)
    distance = (position[:, :, None] - position[:, None, :]) ** 2
    if level == "nominal":
        distance = (distance > 0).astype(float)
    # By chance, the values of all items are paired with each other.
    by_chance = (totals[:, :, None] * totals[:, None, :] * distance).sum((1, 2)) / np.maximum(totals.sum(1) - 1, 1)
    rows = np.full(len(weights), np.nan)
    np.divide((observed * distance).sum((1, 2)), by_chance, out=rows, where=by_chance > 0)
    if not paired:
        one = len({annotator for annotator, _, _ in ratings}) < 2
        reason = "there is only one annotator" if one else "no edit was rated by two annotators"
    else:
        reason = "all ratings are the same"
    return {**estimate(1 - rows, confidence, len(np.unique(cluster_of)), reason), "items": len(paired)}


def _checked(values: Sequence[float | None], name: str, may_miss: bool = False) -> np.ndarray:
    try:
        numbers = np.array([np.nan if value is None else value for value in values], dtype=float).reshape(-1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold numbers from 0 to 5, but {error}.") from error
    wrong = ~((numbers >= 0) & (numbers <= 5)) & ~(np.isnan(numbers) & may_miss)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"{name}[{row}] is {values[row]!r}, but must be a number from 0 to 5.")
    return numbers


def _statistics(human: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Each of `STATISTICS` for each row of weights, NaN where undefined."""
    if len(human) == 0:
        return {name: np.full(len(weights), np.nan) for name in STATISTICS}
    at_once = max(1, 4_000_000 // len(human))  # rows, which bounds the memory
    parts = [
        _statistics_of_rows(human, scores, weights[i : i + at_once].astype(float))
        for i in range(0, len(weights), at_once)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in STATISTICS}


def _statistics_of_rows(human: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    num_edits = (weights > 0).sum(1)
    copies = (weights**2).sum(1)  # pairs of an edit with itself: it may occur several times in a resample
    # Few pairs of values are different, so that each is looked at once, with the sum of its weights.
    (x, y), pair_of = np.unique(np.stack([human, scores]), axis=1, return_inverse=True)
    weights = _sums(weights, pair_of.reshape(-1))
    total = weights.sum(1)
    x_of, y_of = (np.unique(values, return_inverse=True)[1] for values in (x, y))
    x_counts, y_counts = _sums(weights, x_of), _sums(weights, y_of)
    varied = (num_edits >= 3) & ((x_counts > 0).sum(1) > 1) & ((y_counts > 0).sum(1) > 1)

    x_ranks, y_ranks = (np.cumsum(counts, 1) - counts / 2 for counts in (x_counts, y_counts))
    concordance = np.zeros(len(weights))  # concordant minus discordant ordered pairs
    for i in range(0, len(x), 500):
        block = np.sign(x[i : i + 500, None] - x) * np.sign(y[i : i + 500, None] - y)
        concordance += (weights[:, i : i + 500] * (weights @ block.T)).sum(1)
    x_untied, y_untied = (total**2 - (counts**2).sum(1) for counts in (x_counts, y_counts))
    pairs = total**2 - copies
    gap = np.abs(rounded(x) - rounded(y))
    return {
        "pearson": _correlation(x[None], y[None], weights, varied),
        "spearman": _correlation(x_ranks[:, x_of], y_ranks[:, y_of], weights, varied),
        "kendall": _ratio(concordance, np.sqrt(x_untied * y_untied), varied),
        "mae": _ratio(weights @ np.abs(y - x), total, total > 0),
        "exact": _ratio(weights @ (gap == 0), total, total > 0),
        "within_one": _ratio(weights @ (gap <= 1), total, total > 0),
        "bias": _ratio(weights @ (y - x), total, total > 0),
        "ties_human": _ratio(pairs - x_untied, pairs, pairs > 0),
        "ties_scorer": _ratio(pairs - y_untied, pairs, pairs > 0),
    }


def _sums(weights: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Sums the columns that have the same index; every index from 0 to the largest occurs."""
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(index.max() + 1))
    return np.add.reduceat(weights[:, order], starts, axis=1)


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray, defined: np.ndarray) -> np.ndarray:
    total = np.maximum(weights.sum(1, keepdims=True), 1)
    x = x - (weights * x).sum(1, keepdims=True) / total
    y = y - (weights * y).sum(1, keepdims=True) / total
    scale = np.sqrt((weights * x**2).sum(1) * (weights * y**2).sum(1))
    return np.clip(_ratio((weights * x * y).sum(1), scale, defined & (scale > 0)), -1, 1)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, defined: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=defined)


def _why_undefined(statistic: str, human: np.ndarray, scores: np.ndarray) -> str | None:
    if len(human) == 0:
        return "no edit has a score"
    if statistic in ("pearson", "spearman", "kendall"):
        if len(human) < 3:
            return "fewer than 3 edits"
        if len(np.unique(human)) == 1:
            return "people gave every edit the same"
        if len(np.unique(scores)) == 1:
            return "the scorer gave every edit the same"
    if statistic.startswith("ties") and len(human) < 2:
        return "fewer than 2 edits"
    return None
