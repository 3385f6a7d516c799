"""Results of a benchmark: how scores are summarized, the folder that holds a run, and the difference of two runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ..utils.files import read_json
from ..utils.statistics import bootstrap_weights, estimate


FORMAT = 3  # of a results folder
# Settings of a benchmark that say where its cases came from. A hash of the cases tells whether they are the same.
WHERE_FROM = {"dataset", "split", "revision"}


@dataclass
class Run:
    """
    A finished run of a benchmark, as [`read_run`] reads it.

    Args:
        folder (`Path`):
            The results folder.
        name (`str`):
            Name of the editor in tables.
        settings (`dict`):
            `run.json`: everything that is needed to repeat the run and to report on it.
        cases (`list[dict]`):
            `cases.parquet`: one for each case.
        results (`dict`):
            `results.json`: the summary of the scores, and what is missing.
    """

    folder: Path
    name: str
    settings: dict[str, Any]
    cases: list[dict[str, Any]]
    results: dict[str, Any]

    @property
    def benchmark(self) -> dict[str, Any]:
        """The benchmark's part of the settings."""
        return self.settings["benchmark"]

    @property
    def main_metric(self) -> str:
        """Name of the main metric."""
        return next(iter(self.benchmark["metrics"]))

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the metrics in tables and figures."""
        return {name: metric["label"] for name, metric in self.benchmark["metrics"].items()} | {"human": "people"}

    @property
    def hp_scores(self) -> list[dict[str, Any]]:
        """
        HP-Scorer's score of each edit, as lines like those that [`~hp_edit_trl.calibration.read_scores`] reads; none
        if the benchmark has no metric `hp_score`.
        """
        if "hp_score" not in self.benchmark["metrics"]:
            return []
        lines = []
        for case in self.cases:
            if case["edit"] is None:
                continue
            task = case[self.benchmark["group"]]
            name = self.benchmark.get("scorer_tasks", {}).get(task, task)
            prompt, sha = self.benchmark["scorer_prompts"][name]
            answer = json.loads(case["answers"] or "{}").get("hp_score")
            line = {"id": case["id"], "editor": self.name, "task": task, "score": case["hp_score"], "answer": answer}
            line |= {"judge": self.benchmark.get("hp_judge", self.benchmark["judge"])}
            line |= {"score_mode": self.benchmark["score_mode"]}
            lines.append(line | {"scorer_prompt": prompt, "scorer_prompt_sha": sha})
        return lines


def summarize(
    cases: Sequence[dict[str, Any]],
    metrics: Sequence[str],
    group: str,
    sections: dict[str, dict[str, Any]] | None = None,
    products: dict[str, tuple[str, str]] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    ratios: dict[str, tuple[str, str]] | None = None,
) -> list[dict[str, Any]]:
    """
    Summarizes the scores of cases: the mean of each group, the unweighted mean of the groups' means, and the mean over
    all cases.

    Intervals are percentiles of means over resampled cases. Cases are resampled within their group, because the groups
    are chosen and not drawn. So there is no interval where a group has only one case: it could not vary.

    Args:
        cases (`Sequence[dict]`):
            The cases, with a key for each metric (a number, or `None` where it is missing), for the group, and for
            each column of a section.
        metrics (`Sequence[str]`):
            Names of the metrics.
        group (`str`):
            The key whose values are the groups, e.g. `"task"`.
        sections (`dict[str, dict]`, *optional*):
            Parts of the benchmark that are summarized separately: the values that their cases have in some columns, by
            name. By default one part, `""`, with all cases.
        products (`dict[str, tuple[str, str]]`, *optional*):
            Further metrics, each the product of two other metrics' means.
        confidence (`float`, *optional*, defaults to `0.95`):
            Coverage of the intervals.
        num_resamples (`int`, *optional*, defaults to `1000`):
            Number of bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resamples.
        ratios (`dict[str, tuple[str, str]]`, *optional*):
            Further metrics, each the ratio of two other metrics' means.

    Returns:
        `list[dict]`: for each section, metric and group a row of `section`, `kind`, `group`, `metric`, `value`, `low`,
        `high`, `n` (cases with a value), `missing` (cases without), `undefined_resamples` and `reason` (why there is
        no value or no interval). `kind` is `"group"`, `"overall"` (the unweighted mean of the groups' means; it has no
        value if a group has none) or `"cases"` (the mean over all cases); `group` is `None` in the last two.

    Raises:
        `ValueError`: If a value is not finite.
    """
    found = _summary_rows(
        cases, metrics, group, sections, products or {}, ratios or {}, confidence, num_resamples, seed
    )
    return [_row(*row, confidence, "") for row in found]


def compare(
    a: Run, b: Run, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """
    Computes how much better or worse run `b` is than run `a`, on the cases that have a value in both.

    Both are computed on the same resamples, so that the difficulty of a case for both editors cancels out of the
    interval.

    Args:
        a ([`Run`]):
            The run to compare with.
        b ([`Run`]):
            The run that is compared.
        confidence (`float`, *optional*, defaults to `0.95`):
            Coverage of the intervals.
        num_resamples (`int`, *optional*, defaults to `1000`):
            Number of bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resamples.

    Returns:
        `list[dict]`: rows like those of [`summarize`], each `value` that of `b` minus that of `a`. `missing` counts
        the cases without a value in one or both.

    Raises:
        `ValueError`: If the runs are of different benchmarks, cases or judges.
    """
    one, other = a.benchmark, b.benchmark
    differing = [name for name in sorted({*one, *other} - WHERE_FROM) if one.get(name) != other.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{a.folder} and {b.folder} cannot be compared: their {' and '.join(differing)} differ, the first being "
            f"{one.get(name)!r} and {other.get(name)!r}. Scores can be compared only on the same cases, with the same "
            "judge and scorer prompts."
        )
    derived = one["products"], one["ratios"]
    metrics = [name for name in one["metrics"] if not any(name in names for names in derived)]
    if any(case["human"] is not None for case in a.cases) and any(case["human"] is not None for case in b.cases):
        metrics.append("human")
    both: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for first, second in zip(a.cases, b.cases, strict=True):
        lacking = {name: None for name in metrics if first[name] is None or second[name] is None}
        both[0].append(first | lacking)
        both[1].append(second | lacking)
    means_a, means_b = (
        _summary_rows(cases, metrics, one["group"], one["sections"], *derived, confidence, num_resamples, seed)
        for cases in both
    )
    return [
        _row(key, rows_b - rows_a, n, missing, alone, confidence, " in both")
        for (key, rows_a, n, missing, alone), (_, rows_b, *_) in zip(means_a, means_b, strict=True)
    ]


def read_run(folder: str | Path) -> Run:
    """
    Reads a results folder that [`run_benchmark`] wrote.

    Args:
        folder (`str` or `Path`):
            The folder.

    Raises:
        `ValueError`: If it is not a results folder, has another format, or the run did not finish.
    """
    folder = Path(folder)
    settings = read_json(folder / "run.json")
    if settings is None:
        raise ValueError(f"{folder} is not a results folder of a benchmark: it has no readable file run.json.")
    check_format(folder, settings)
    results = read_json(folder / "results.json")
    if results is None or not (folder / "cases.parquet").is_file():
        raise ValueError(f"The run in {folder} did not finish: run `hp-edit bench` with --output_dir {folder} again.")
    try:
        cases = pq.read_table(folder / "cases.parquet").to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / 'cases.parquet'} cannot be read: {error} Remove it and run `hp-edit bench` again, which keeps "
            "all edits and scores."
        ) from error
    return Run(folder, settings["editor"]["name"], settings, cases, results)


def check_format(folder: Path, settings: dict[str, Any]) -> None:
    """Raises a `ValueError` if a results folder was written in another format."""
    if settings.get("format") != FORMAT:
        raise ValueError(
            f"{folder} holds results in format {settings.get('format')!r}, written by hp-edit-trl "
            f"{settings.get('versions', {}).get('hp-edit-trl', 'of an unknown version')}; this version reads format "
            f"{FORMAT}. Score its edits again into a new folder, with --editor {folder / 'edits'}."
        )


def _summary_rows(
    cases: Sequence[dict[str, Any]],
    metrics: Sequence[str],
    group: str,
    sections: dict[str, dict[str, Any]] | None,
    products: dict[str, tuple[str, str]],
    ratios: dict[str, tuple[str, str]],
    confidence: float,
    num_resamples: int,
    seed: int,
) -> list[tuple[dict[str, Any], np.ndarray, int, int, list[str]]]:
    """
    The rows of a summary: the key of each, its mean and the means of the resamples, the numbers of cases with and
    without a value, and the groups of which only one case has a value.
    """
    table = []
    order = list(dict.fromkeys(str(case[group]) for case in cases))
    for section, wanted in ({"": {}} if sections is None else sections).items():
        members = [case for case in cases if all(case[name] == value for name, value in wanted.items())]
        groups = np.array([case[group] for case in members], str)
        weights = bootstrap_weights(np.arange(len(members)), groups, confidence, num_resamples, seed)
        names = [name for name in order if name in groups]
        means: dict[tuple[str, str, str | None], np.ndarray] = {}
        values, present = {}, {}
        for metric in metrics:
            values[metric] = np.array([np.nan if case[metric] is None else case[metric] for case in members], float)
            present[metric] = ~np.isnan(values[metric])
            if np.isinf(values[metric]).any():
                case = members[int(np.isinf(values[metric]).argmax())]
                raise ValueError(f"{metric} of case {case.get('id')!r} is {case[metric]}: it must be a finite number.")
            sums = _group_means(values[metric], weights, groups, names, present[metric])
            means |= {(metric, *key): rows for key, rows in sums.items()}
        for derived, (first, second) in (products | ratios).items():
            present[derived] = present[first] & present[second]
            # Both parts on the same cases: those with both values
            parts = [_group_means(values[part], weights, groups, names, present[derived]) for part in (first, second)]
            combine = _divided if derived in ratios else np.multiply
            means |= {(derived, *key): combine(rows, parts[1][key]) for key, rows in parts[0].items()}
        for (metric, kind, of_group), rows in means.items():
            of = groups == of_group if kind == "group" else np.ones(len(members), bool)
            n = int((of & present[metric]).sum())
            key = {"section": section, "kind": kind, "group": of_group, "metric": metric}
            alone = [name for name in names if (groups[of & present[metric]] == name).sum() == 1]
            table.append((key, rows, n, int(of.sum()) - n, alone))
    return table


def _row(
    key: dict[str, Any], means: np.ndarray, n: int, missing: int, alone: list[str], confidence: float, where: str
) -> dict[str, Any]:
    """A row of a summary. It has no interval if only one case of a group has a value."""
    reason = f"no case has a value{where}"
    if n > 0:
        reason = f"a group has no value{where}" if key["kind"] == "overall" else "the mean to divide by is 0"
    row = key | {"n": n, "missing": missing} | estimate(means, confidence, 1 if alone else n, reason)
    if alone and n > 1 and row["value"] is not None:
        row["reason"] = f"no interval from only one case with a value{where} of {', '.join(alone)}"
    return row


def _divided(rows: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.divide(rows, by, out=np.full(len(rows), np.nan), where=by > 0)


def _group_means(
    values: np.ndarray, weights: np.ndarray, groups: np.ndarray, names: list[str], present: np.ndarray
) -> dict[tuple[str, str | None], np.ndarray]:
    """The mean of each group, the mean of these means, and the mean over all cases, for each row of weights."""
    means: dict[tuple[str, str | None], np.ndarray] = {
        ("group", name): _weighted_mean(values, weights, (groups == name) & present) for name in names
    }
    overall = np.mean(list(means.values()), 0) if names else np.full(len(weights), np.nan)
    return means | {("overall", None): overall, ("cases", None): _weighted_mean(values, weights, present)}


def _weighted_mean(values: np.ndarray, weights: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The mean over some cases for each row of weights, NaN where no case has a weight."""
    total = weights[:, members].sum(1)
    means = np.full(len(weights), np.nan)
    return np.divide(weights[:, members] @ values[members], total, out=means, where=total > 0)
