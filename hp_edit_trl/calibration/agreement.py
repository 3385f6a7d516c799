"""
How well a scorer agrees with people, and people with each other: statistics with bootstrap intervals, see
[`~hp_edit_trl.utils.statistics`]. A resample says how often each edit occurs.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np

from ..utils.statistics import bootstrap_weights, cluster_labels, estimate, finite_or_none


STATISTICS = ("pearson", "spearman", "kendall", "mae", "exact", "within_one", "bias", "ties_human", "ties_scorer")
CORRELATIONS = STATISTICS[:3]
LEVELS = ("nominal", "ordinal", "interval")


def rounded(values: np.ndarray) -> np.ndarray:
    """Rounds scores to integers, halves up: 2.5 becomes 3."""
    return np.floor(values + 0.5).astype(int)


def agreement(
    human: Sequence[float],
    scores: Sequence[float | None],
    groups: Sequence[str] | None = None,
    clusters: Sequence[Hashable] | None = None,
    statistics: Sequence[str] = STATISTICS,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Measures the agreement between people and a scorer on the same edits.

    Args:
        human (`Sequence[float]`):
            Score of each edit by people, 0 to 5.
        scores (`Sequence[float | None]`):
            Score of each edit by the scorer, 0 to 5. `None` or NaN if it is missing: such edits are counted and left
            out.
        groups (`Sequence[str]`, *optional*):
            Group of each edit, e.g. its task, for results per group.
        clusters (`Sequence[Hashable]`, *optional*):
            Cluster of each edit, e.g. the id of its case. The edits of a cluster are resampled together. By default,
            each edit is a cluster of its own.
        statistics (`Sequence[str]`, *optional*, defaults to all of `STATISTICS`):
            The statistics to compute.
        confidence (`float`, *optional*, defaults to `0.95`):
            Confidence level of the intervals.
        num_resamples (`int`, *optional*, defaults to `1000`):
            Number of bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resamples.

    Returns:
        `dict`: `overall` (all edits pooled), `groups` (by name) and `mean_of_groups` (the unweighted mean of the
        groups' Pearson correlations; `left_out` names the groups without one; `None` without groups or without
        `"pearson"`). `overall` and each group hold `n` (edits with a score), `missing` (edits without), `clusters`,
        `confusion` (6 x 6 counts of integer scores, people's in the rows) and, for each statistic, a dictionary with
        `value`, `low`, `high`, `undefined_resamples` (resamples that have no value and were left out) and `reason`
        (why there is no value or no interval). Correlations and differences use the scores as they are; `exact`,
        `within_one` and the confusion matrix use integer scores, with halves rounded up. `bias` is the scorer's mean
        minus people's. `ties_human` and `ties_scorer` are shares of the pairs of edits.

    Raises:
        `ValueError`: If the lengths differ, a value is outside 0 to 5, a cluster is in several groups, or an option is
            not valid.
    """
    _check_statistics(statistics)
    people, scorer = _checked(human, "human"), _checked(scores, "scores", may_miss=True)
    if len(people) != len(scorer):
        raise ValueError(f"There are {len(people)} human values and {len(scorer)} scores: each edit needs both.")
    cluster_of, group_of = cluster_labels(clusters, groups, len(people))
    present = ~np.isnan(scorer)
    weights = np.zeros((1 + num_resamples, len(people)), np.int32)
    weights[:, present] = bootstrap_weights(cluster_of[present], group_of[present], confidence, num_resamples, seed)

    def result(members: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        scored = members & present
        x, y = people[scored], scorer[scored]
        num_clusters = len(np.unique(cluster_of[scored]))
        values: dict[str, Any] = {"n": len(x), "missing": int((members & ~present).sum()), "clusters": num_clusters}
        rows = {name: _resampled(name, x, y, weights[:, scored]) for name in statistics}
        for name in statistics:
            values[name] = estimate(rows[name], confidence, num_clusters, _why_undefined(name, x, y))
        confusion = np.zeros((6, 6), int)
        np.add.at(confusion, (rounded(x), rounded(y)), 1)
        values["confusion"] = confusion.tolist()
        return values, rows

    by_group: dict[str, dict[str, Any]] = {}
    mean = None
    if groups is not None:
        pearson = {}
        for name in np.unique(group_of).tolist():
            by_group[name], rows = result(group_of == name)
            if "pearson" in rows and by_group[name]["pearson"]["value"] is not None:
                pearson[name] = rows["pearson"]
        if "pearson" in statistics:
            mean = estimate(
                np.mean(list(pearson.values()), axis=0) if pearson else np.full(1 + num_resamples, np.nan),
                confidence,
                min((by_group[name]["clusters"] for name in pearson), default=0),
                "no group has a Pearson correlation",
            )
            mean["left_out"] = [name for name in by_group if name not in pearson]
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
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """
    Measures how much better or worse scorer `b` agrees with people than scorer `a`, on the edits that both scored.

    Both are computed on the same resamples. What makes an edit easy or hard for both then cancels out of the interval.

    Args:
        human (`Sequence[float]`):
            Score of each edit by people, 0 to 5.
        scores_a (`Sequence[float | None]`):
            Score of each edit by scorer `a`, 0 to 5; `None` or NaN if it is missing.
        scores_b (`Sequence[float | None]`):
            Score of each edit by scorer `b`.
        statistic (`str`, *optional*, defaults to `"pearson"`):
            One of `STATISTICS`.
        clusters, confidence, num_resamples, seed:
            See [`agreement`].
        groups (`Sequence[str]`, *optional*):
            Group of each edit, e.g. its task. The statistics are then unweighted means over the groups; a group in
            which one of the two is undefined is left out.

    Returns:
        `dict`: `difference` (`b` minus `a`), `low` and `high` of its interval, `a` and `b` (the statistic of each
        scorer), `n` (edits that both scored), `missing` (edits that at least one did not score), `statistic`, and
        `undefined_resamples` and `reason` as in [`agreement`]. Undefined values are `None`.

    Raises:
        `ValueError`: As in [`agreement`], or if the statistic is unknown.
    """
    _check_statistics([statistic])
    people = _checked(human, "human")
    a, b = _checked(scores_a, "scores_a", may_miss=True), _checked(scores_b, "scores_b", may_miss=True)
    if not len(people) == len(a) == len(b):
        raise ValueError(
            f"There are {len(people)} human values, {len(a)} and {len(b)} scores: each edit needs all three."
        )
    both = ~(np.isnan(a) | np.isnan(b))
    cluster_of, group_of = (labels[both] for labels in cluster_labels(clusters, groups, len(people)))
    people, a, b = people[both], a[both], b[both]
    weights = bootstrap_weights(cluster_of, group_of, confidence, num_resamples, seed)
    (rows_a, rows_b), reason = _mean_over_groups(statistic, people, (a, b), group_of, weights)
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


def mean_agreement(
    human: Sequence[float],
    scores: Sequence[float | None],
    clusters: Sequence[Hashable] | None = None,
    statistic: str = "pearson",
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """
    Measures one statistic of the agreement between people and a scorer: the unweighted mean over the groups in which
    it is defined.

    Args:
        human, scores, clusters, confidence, num_resamples, seed, groups:
            See [`agreement`].
        statistic (`str`, *optional*, defaults to `"pearson"`):
            One of `STATISTICS`.

    Returns:
        `dict`: `value`, `low`, `high`, `undefined_resamples` and `reason`, as in [`agreement`].

    Raises:
        `ValueError`: As in [`agreement`], or if the statistic is unknown.
    """
    _check_statistics([statistic])
    people, scorer = _checked(human, "human"), _checked(scores, "scores", may_miss=True)
    present = ~np.isnan(scorer)
    cluster_of, group_of = (labels[present] for labels in cluster_labels(clusters, groups, len(people)))
    weights = bootstrap_weights(cluster_of, group_of, confidence, num_resamples, seed)
    (rows,), reason = _mean_over_groups(statistic, people[present], (scorer[present],), group_of, weights)
    return estimate(rows, confidence, len(np.unique(cluster_of)), reason)


def krippendorff_alpha(
    ratings: Sequence[tuple[Hashable, Hashable, float]], level: Literal["nominal", "ordinal", "interval"] = "ordinal"
) -> float | None:
    """
    Krippendorff's alpha: 1 if all annotators agree, 0 if they agree as often as expected by chance.

    Paper: Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011).

    Args:
        ratings (`Sequence[tuple]`):
            Annotator, item and value of each rating. Annotators may rate different items; an item with one rating does
            not count.
        level (`str`, *optional*, defaults to `"ordinal"`):
            How the distance of two values is measured: `"nominal"` (equal or not), `"ordinal"` (by the number of
            ratings between them) or `"interval"` (by the square of their difference).

    Returns:
        `float` or `None`: alpha; `None` if no item has two ratings, or all values are the same.

    Raises:
        `ValueError`: If a value is not a number, an annotator rated an item twice, or the level is unknown.
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
    Computes [`krippendorff_alpha`] with an interval from resampling items.

    Args:
        ratings, level:
            See [`krippendorff_alpha`].
        groups (`dict`, *optional*):
            Group of each item. Items are resampled within their group.
        clusters (`dict`, *optional*):
            Cluster of each item. The items of a cluster are resampled together. By default, each item is a cluster of
            its own.
        confidence, num_resamples, seed:
            See [`agreement`].

    Returns:
        `dict`: `value`, `low`, `high`, `undefined_resamples`, `reason`, and `items`, the number of items with at least
        two ratings.

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

    # How often two annotators gave one item the values c and k. An item with m ratings counts m times, however many
    # pairs it has.
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


def _check_statistics(names: Sequence[str]) -> None:
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"There is no statistic {name!r}: choose one of {', '.join(STATISTICS)}.")


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


def statistic_of(statistic: str, human: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """
    Computes one of `STATISTICS`.

    Args:
        statistic (`str`):
            Name of the statistic.
        human (`np.ndarray`):
            Score of each edit by people, of shape `(edits,)`.
        scores (`np.ndarray`):
            Score of each edit by the scorer, of the same shape.
        weights (`np.ndarray`, *optional*):
            How often each edit occurs in a resample, as integers of the same shape. By default, once.

    Returns:
        `float`: its value; NaN where it is undefined.
    """
    weights = np.ones(len(human), int) if weights is None else weights
    return float(_resampled(statistic, human, scores, weights[None])[0])


def _resampled(statistic: str, human: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """
    A statistic on every resample, of shape `(resamples,)`: that of the edits written out as often as they occur, from
    weighted sums over all resamples at once, which takes less than a tenth of the time of scipy on each of them.
    """
    weights = weights.astype(float)
    total = weights.sum(1)
    if statistic in CORRELATIONS:
        defined = ((weights > 0).sum(1) >= 3) & _varies(human, weights) & _varies(scores, weights)
        if statistic == "kendall":
            above, below = _pairs_in_order(human, scores, weights)
        else:
            if statistic == "spearman":  # midranks
                levels = [_weights_of_levels(values, weights) for values in (human, scores)]
                x, y = [(np.cumsum(one, 1) - one / 2)[:, level] for one, level in levels]
            else:
                x, y = human[None], scores[None]
            mean = [(weights * values).sum(1) / np.maximum(total, 1) for values in (x, y)]
            x, y = x - mean[0][:, None], y - mean[1][:, None]
            above = (weights * x * y).sum(1)
            below = np.sqrt((weights * x * x).sum(1) * (weights * y * y).sum(1))
    elif statistic in ("ties_human", "ties_scorer"):
        of_level, _ = _weights_of_levels(human if statistic == "ties_human" else scores, weights)
        copies = (weights**2).sum(1)  # pairs of an edit with itself, which are not ties
        above, below = (of_level**2).sum(1) - copies, total**2 - copies
        defined = below > 0
    else:
        if statistic == "bias":
            values = scores - human
        elif statistic == "mae":
            values = np.abs(scores - human)
        else:
            values = np.abs(rounded(scores) - rounded(human)) <= (statistic == "within_one")
        above, below, defined = weights @ values, total, total > 0
    rows = np.full(len(weights), np.nan)
    np.divide(above, below, out=rows, where=defined)
    return np.clip(rows, -1, 1) if statistic in CORRELATIONS else rows


def _varies(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Whether a resample has more than one value."""
    largest = np.where(weights > 0, values, -np.inf).max(1, initial=-np.inf)
    return largest > np.where(weights > 0, values, np.inf).min(1, initial=np.inf)


def _weights_of_levels(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often each distinct value occurs in each resample, in ascending order, and the number of each edit's."""
    distinct, level = np.unique(values, return_inverse=True)
    return weights @ (level[:, None] == np.arange(len(distinct))), level


def _pairs_in_order(human: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numerator and denominator of Kendall's tau-b in each resample. Edits with the same two values are one."""
    (x, y), edit = np.unique(np.stack([human, scores]), axis=1, return_inverse=True)
    weights = weights @ (edit.reshape(-1, 1) == np.arange(len(x)))
    sums = np.zeros((3, len(weights)))
    for part in np.array_split(np.arange(len(x)), 1 + len(x) // 1024):  # the signs of all pairs take much memory
        of_x, of_y = np.sign(x[:, None] - x[part]), np.sign(y[:, None] - y[part])
        for row, signs in enumerate((of_x * of_y, np.abs(of_x), np.abs(of_y))):
            sums[row] += (weights @ signs * weights[:, part]).sum(1)
    return sums[0], np.sqrt(sums[1] * sums[2])


def _mean_over_groups(
    statistic: str, human: np.ndarray, scores: Sequence[np.ndarray], group_of: np.ndarray, weights: np.ndarray
) -> tuple[list[np.ndarray], str | None]:
    """
    The statistic of each of several scores on the resamples, as a mean over the groups in which it is defined for all
    of them, and why it is not defined in others.
    """
    parts = [group_of == name for name in np.unique(group_of)] or [np.ones(len(human), bool)]
    problems = [[_why_undefined(statistic, human[of], one[of]) for of in parts] for one in scores]
    in_all = [not any(of_part) for of_part in zip(*problems, strict=True)]
    means = []
    for one, of_one in zip(scores, problems, strict=True):
        # If no group is defined for all, those that are for this one tell at least its own value.
        used = in_all if any(in_all) else [problem is None for problem in of_one]
        rows = [
            _resampled(statistic, human[of], one[of], weights[:, of])
            for of, use in zip(parts, used, strict=True)
            if use
        ]
        means.append(np.mean(rows, axis=0) if rows else np.full(len(weights), np.nan))
    return means, next((problem for of_one in problems for problem in of_one if problem), None)


def _why_undefined(statistic: str, human: np.ndarray, scores: np.ndarray) -> str | None:
    if len(human) == 0:
        return "no edit has a score"
    if statistic in CORRELATIONS:
        if len(human) < 3:
            return "fewer than 3 edits"
        if len(np.unique(human)) == 1:
            return "people gave all edits the same score"
        if len(np.unique(scores)) == 1:
            return "the scorer gave all edits the same score"
    if statistic.startswith("ties") and len(human) < 2:
        return "fewer than 2 edits"
    return None
