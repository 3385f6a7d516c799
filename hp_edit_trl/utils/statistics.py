"""
Means, differences and bootstrap intervals.

An interval comes from resampling whole clusters (cases), because the edits of a case are not independent. Clusters are
resampled within their group (task), because the tasks are chosen and not drawn. A resample is a row of weights: how
often each value occurs. The first row of weights is all ones and gives the statistic itself.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from .seeding import seeded_generator


def mean_with_interval(
    values: Sequence[float],
    groups: Sequence[str] | None = None,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Computes a mean over edits with its bootstrap interval.

    Args:
        values (`Sequence[float]`):
            Value of each edit.
        groups (`Sequence[str]`, *optional*):
            Group of each edit, e.g. its task. Clusters are resampled within their group.
        clusters (`Sequence[Hashable]`, *optional*):
            Cluster of each edit, e.g. the id of its case. The edits of a cluster are resampled together. By default,
            each edit is a cluster of its own.
        confidence (`float`, *optional*, defaults to `0.95`):
            Confidence level of the interval.
        num_resamples (`int`, *optional*, defaults to `1000`):
            Number of bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resamples.

    Returns:
        `dict`: `value`, `low`, `high`, `undefined_resamples` and `reason`, see [`estimate`].
    """
    numbers = np.asarray(values, dtype=float)
    cluster_of, group_of = cluster_labels(clusters, groups, len(numbers))
    weights = bootstrap_weights(cluster_of, group_of, confidence, num_resamples, seed)
    rows = weights @ numbers / weights.sum(1) if len(numbers) else np.full(num_resamples + 1, np.nan)
    return estimate(rows, confidence, len(np.unique(cluster_of)), "no values")


def paired_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Computes the mean of the differences `after - before` and its standard error (NaN for a single pair)."""
    differences = np.array(after) - np.array(before)
    error = differences.std(ddof=1) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return float(differences.mean()), float(error)


def cluster_labels(
    clusters: Sequence[Hashable] | None, groups: Sequence[str] | None, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """
    Numbers the cluster of each edit and names its group. Raises `ValueError` if the lengths differ, or a cluster is in
    several groups.
    """
    for name, labels in (("clusters", clusters), ("groups", groups)):
        if labels is not None and len(labels) != count:
            raise ValueError(f"There are {count} edits and {len(labels)} {name}: each edit needs one.")
    if clusters is None:
        clusters = range(count)
    if groups is None:
        groups = [""] * count
    group_of_cluster = dict(zip(clusters, groups, strict=True))
    for cluster, group in zip(clusters, groups, strict=True):
        if group != group_of_cluster[cluster]:
            raise ValueError(
                f"The cluster {cluster!r} has edits in the groups {group!r} and {group_of_cluster[cluster]!r}: all "
                "edits of a case must have the same task, because cases are resampled within their task."
            )
    number = {cluster: index for index, cluster in enumerate(group_of_cluster)}
    return np.array([number[cluster] for cluster in clusters], int), np.array(groups, str)


def bootstrap_weights(
    cluster_of: np.ndarray, group_of: np.ndarray, confidence: float, num_resamples: int, seed: int
) -> np.ndarray:
    """
    Draws bootstrap resamples of whole clusters, within their groups.

    Args:
        cluster_of (`np.ndarray`):
            Number of each edit's cluster, of shape `(edits,)`, see [`cluster_labels`].
        group_of (`np.ndarray`):
            Name of each edit's group, of the same shape. Groups of a single cluster are resampled together.
        confidence (`float`):
            Confidence level of the interval, which is only checked here.
        num_resamples (`int`):
            Number of resamples.
        seed (`int`):
            Seed of the resamples.

    Returns:
        `np.ndarray`: how often each edit occurs in each resample, of shape `(1 + num_resamples, edits)`. The first row
        is all ones.

    Raises:
        `ValueError`: If an option is not valid.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1, e.g. 0.95.")
    if num_resamples < 0:
        raise ValueError(f"num_resamples={num_resamples} must not be negative.")
    strata = group_of.copy()
    for group in np.unique(group_of):
        if len(np.unique(cluster_of[group_of == group])) == 1:  # a single cluster cannot vary
            strata[group_of == group] = ""
    weights = np.ones((1 + num_resamples, len(cluster_of)), np.int32)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        distinct, index = np.unique(cluster_of[members], return_inverse=True)
        rng = np.random.default_rng(seeded_generator(seed, "agreement", str(stratum)).initial_seed())
        drawn = rng.multinomial(len(distinct), np.full(len(distinct), 1 / len(distinct)), size=num_resamples)
        weights[1:, members] = drawn[:, index]
    return weights


def estimate(rows: np.ndarray, confidence: float, num_clusters: int, reason: str | None) -> dict[str, Any]:
    """
    Makes an estimate of a statistic's values: the first is its value, the others are those of the resamples.

    Args:
        rows (`np.ndarray`):
            The values, of shape `(1 + num_resamples,)`; NaN where the statistic is undefined.
        confidence (`float`):
            Confidence level of the percentile interval.
        num_clusters (`int`):
            Number of clusters. A single one has no interval.
        reason (`str`, *optional*):
            Why the value is undefined, if it is.

    Returns:
        `dict`: `value`, `low`, `high` (`None` if undefined), `undefined_resamples` (their number; they are left out)
        and `reason` (why there is no value or no interval).
    """
    value, resamples = finite_or_none(rows[0]), rows[1:][~np.isnan(rows[1:])]
    low = high = None
    if value is not None:
        reason = None
        if num_clusters < 2 or len(resamples) == 0:
            reason = "no interval from one case" if num_clusters < 2 else "no resample has a value"
        else:
            low, high = np.quantile(resamples, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    return {
        "value": value,
        "low": low,
        "high": high,
        "undefined_resamples": len(rows) - 1 - len(resamples),
        "reason": reason,
    }


def finite_or_none(value: float) -> float | None:
    """Returns the value as a `float`, or `None` for NaN."""
    return None if np.isnan(value) else float(value)
