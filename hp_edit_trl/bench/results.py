"""Results of a benchmark: how the scores of cases are summed up, the folder that holds a run, and the difference of two runs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from ..judges import Judge, Judgement
from ..utils.files import read_json
from ..utils.statistics import bootstrap_weights, estimate


FORMAT = 1  # of a results folder
BENCHMARKS = {"realpref": "RealPref-Bench", "gedit": "GEdit-Bench", "dreambench": "DreamBench++"}
# What metrics are called where people read them
LABELS = {
    "hp_score": "HP-score",
    "o": "O",
    "sc": "SC",
    "pq": "PQ",
    "cp_pf": "CP·PF",
    "cp": "CP",
    "pf": "PF",
    "dino_i": "DINO-I",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "human": "people",
}
# Settings of a benchmark that say where its cases came from. What they are is told by a hash of them.
WHERE_FROM = {"dataset", "split", "revision"}


@dataclass
class CaseScore:
    """
    What a benchmark says about one edit.

    Args:
        values (`dict[str, float | None]`):
            The value of each metric, `None` where there is none.
        judgements (`dict[str, Judgement]`, *optional*):
            The verdict of each call of a judge, e.g. `{"sc": ..., "pq": ...}`.
        reason (`str`, *optional*):
            Why a value is missing.
    """

    values: dict[str, float | None]
    judgements: dict[str, Judgement] = field(default_factory=dict)
    reason: str | None = None


@dataclass
class Run:
    """
    A finished run of a benchmark, as [`read_run`] reads it.

    Args:
        folder (`Path`):
            The results folder.
        name (`str`):
            What tables call the editor.
        settings (`dict`):
            `run.json`: everything that is needed to repeat the run.
        cases (`list[dict]`):
            `cases.parquet`: one for each case.
        results (`dict`):
            `results.json`: what the scores come to, and what is missing.
    """

    folder: Path
    name: str
    settings: dict[str, Any]
    cases: list[dict[str, Any]]
    results: dict[str, Any]


def summarize(
    cases: Sequence[dict[str, Any]],
    metrics: Sequence[str],
    group: str,
    sections: dict[str, dict[str, Any]] | None = None,
    products: dict[str, tuple[str, str]] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """
    Sums up the scores of cases: the mean in each group, the unweighted mean of the groups' means, and the mean over all cases.

    Intervals are percentiles of means over resampled cases. Cases are resampled within their group, because the groups are chosen
    and not drawn.

    Args:
        cases (`Sequence[dict]`):
            The cases, with a key for each metric (a number, or `None` where it is missing), for the group, and for what the
            sections ask.
        metrics (`Sequence[str]`):
            Names of the metrics.
        group (`str`):
            The key whose values are the groups, e.g. `"task"`.
        sections (`dict[str, dict]`, *optional*):
            Parts of the benchmark that are summed up by themselves, by name, each with the values that its cases have. By default
            one part, `""`, with all cases.
        products (`dict[str, tuple[str, str]]`, *optional*):
            Further metrics, each the product of two metrics' means.
        confidence (`float`, *optional*, defaults to `0.95`):
            Probability that the intervals are made for.
        num_resamples (`int`, *optional*, defaults to `1000`):
            How many bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resamples.

    Returns:
        `list[dict]`: for each section, metric and group a row of `section`, `kind`, `group`, `metric`, `value`, `low`, `high`,
        `n` (cases with a value), `missing` (cases without), `undefined_resamples` and `reason` (why there is no value or no
        interval). `kind` is `"group"`, `"overall"` (the unweighted mean of the groups' means; it has no value if a group has
        none) or `"cases"` (the mean over all cases); `group` is `None` in the last two.

    Raises:
        `ValueError`: If a value is no finite number.
    """
    rows = []
    for key, means, n, missing in _means(
        cases, metrics, group, sections, products or {}, confidence, num_resamples, seed
    ):
        reason = "no case has a value" if n == 0 else "a group has no value"
        rows.append(key | {"n": n, "missing": missing} | estimate(means, confidence, n, reason))
    return rows


def compare(
    a: Run, b: Run, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """
    How much better or worse run `b` is than run `a`, on the cases that have a value in both.

    Both are computed on the same resamples, so that what makes a case easy or hard for both editors cancels out of the interval.

    Args:
        a ([`Run`]):
            The one run.
        b ([`Run`]):
            The other run.
        confidence (`float`, *optional*, defaults to `0.95`):
            Probability that the intervals are made for.
        num_resamples (`int`, *optional*, defaults to `1000`):
            How many bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resamples.

    Returns:
        `list[dict]`: rows as those of [`summarize`], each `value` that of `b` minus that of `a`. `missing` counts the cases that
        lack a value in one or both.

    Raises:
        `ValueError`: If the runs are of different benchmarks, cases or judges.
    """
    one, other = a.settings["benchmark"], b.settings["benchmark"]
    differing = [name for name in sorted({*one, *other} - WHERE_FROM) if one.get(name) != other.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{a.folder} and {b.folder} cannot be compared: their {' and '.join(differing)} differ, the first being "
            f"{one.get(name)!r} and {other.get(name)!r}. Scores compare only on the same cases with the same judge and prompts."
        )
    metrics = [name for name in one["metrics"] if name not in one["products"]]
    if any(case["human"] is not None for case in a.cases) and any(case["human"] is not None for case in b.cases):
        metrics.append("human")
    both: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for first, second in zip(a.cases, b.cases, strict=True):
        lacking = {name: None for name in metrics if first[name] is None or second[name] is None}
        both[0].append(first | lacking)
        both[1].append(second | lacking)
    means_a, means_b = (
        _means(cases, metrics, one["group"], one["sections"], one["products"], confidence, num_resamples, seed)
        for cases in both
    )
    rows = []
    for (key, rows_a, n, missing), (_, rows_b, _, _) in zip(means_a, means_b, strict=True):
        reason = "no case has a value in both" if n == 0 else "a group has no value in both"
        rows.append(key | {"n": n, "missing": missing} | estimate(rows_b - rows_a, confidence, n, reason))
    return rows


def read_run(folder: str | Path) -> Run:
    """
    Reads a results folder that [`run_benchmark`] wrote.

    Args:
        folder (`str` or `Path`):
            The folder.

    Raises:
        `ValueError`: If it is no results folder, one of another format, or of a run that did not finish.
    """
    folder = Path(folder)
    settings = read_json(folder / "run.json")
    if settings is None:
        raise ValueError(f"{folder} is no results folder of a benchmark: it has no file run.json that can be read.")
    check_format(folder, settings)
    results = read_json(folder / "results.json")
    if results is None or not (folder / "cases.parquet").is_file():
        raise ValueError(f"The run in {folder} did not finish: run `hp-edit bench` with --out {folder} again.")
    try:
        cases = pq.read_table(folder / "cases.parquet").to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / 'cases.parquet'} cannot be read: {error} Remove it and run `hp-edit bench` again, which keeps all edits "
            "and scores."
        ) from error
    return Run(folder, settings["editor"]["name"], settings, cases, results)


def check_format(folder: Path, settings: dict[str, Any]) -> None:
    """Raises a `ValueError` if a results folder was written in another format."""
    if settings.get("format") != FORMAT:
        raise ValueError(
            f"{folder} holds results in format {settings.get('format')!r}, written by hp-edit-trl "
            f"{settings.get('versions', {}).get('hp-edit-trl', 'of an unknown version')}; this version reads format {FORMAT}. "
            f"Score its edits again into a new folder, with --editor {folder / 'edits'}."
        )


def check_values(values: Sequence[float | None], name: str, largest: float) -> list[float | None]:
    """The values with `None` for NaN. Raises a `ValueError` if one is not between 0 and `largest`."""
    for number, value in enumerate(values):
        if value is not None and not math.isnan(value) and not 0 <= value <= largest:
            raise ValueError(f"{name}[{number}] is {value}, but must be a number from 0 to {largest:g}.")
    return [None if value is None or math.isnan(value) else value for value in values]


def check_groups(groups: Sequence[str | None], name: str, taken: Sequence[str] = ()) -> list[str]:
    """The groups, `name` for an error message. Raises a `ValueError` if one is missing, or has the name of another result."""
    for number, group in enumerate(groups):
        if group is None or group in taken:
            raise ValueError(
                f"{name}[{number}] is {group!r}, but must name a group"
                + (f", and not be one of {', '.join(taken)}, which are other results." if taken else ".")
            )
    return [str(group) for group in groups]


def conversation(text: str, shown: list[tuple[str, Image.Image]]) -> list[dict[str, Any]]:
    """What a judge is shown: its prompt, then images under their names."""
    content: list[dict[str, Any]] = []
    for name, image in shown:
        content += [{"type": "text", "text": f"{name}:"}, {"type": "image", "image": image}]
    system = [{"type": "text", "text": text}]
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def check_parser(judge: Judge, parse: Callable[[str], float | None], min_new_tokens: int = 1) -> None:
    """
    Raises a `ValueError` if a judge takes another kind of score out of its answers, or cuts them off before the score. A judge of the
    user's own may not tell.
    """
    asked: Any = getattr(judge, "judge", judge)  # behind a cache
    parser = getattr(asked, "parse", parse)
    if parser is not parse:
        raise ValueError(
            f"The judge takes scores out of its answers by {parser.__name__}, but this benchmark needs parse={parse.__name__}."
        )
    if getattr(asked, "max_new_tokens", min_new_tokens) < min_new_tokens:
        raise ValueError(
            f"The judge's answers end after max_new_tokens={asked.max_new_tokens}, but this benchmark asks for reasons and scores: "
            f"allow {min_new_tokens} or more."
        )


def why_no_score(judgement: Judgement) -> str:
    """Why a judgement has no score, in a few words and the judge's."""
    return (
        f"{'no score in the answer' if judgement.answered else 'the judge gave no answer'}: {judgement.answer[:200]}"
    )


def _means(
    cases: Sequence[dict[str, Any]],
    metrics: Sequence[str],
    group: str,
    sections: dict[str, dict[str, Any]] | None,
    products: dict[str, tuple[str, str]],
    confidence: float,
    num_resamples: int,
    seed: int,
) -> list[tuple[dict[str, Any], np.ndarray, int, int]]:
    """For each row of a summary what it is of, its mean and those of the resamples, and how many cases have and lack a value."""
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
            sums = _sums(values[metric], weights, groups, names, present[metric])
            means |= {(metric, *key): rows for key, rows in sums.items()}
        for product, (first, second) in products.items():
            present[product] = present[first] & present[second]
            # Both factors on the same cases: those that have both
            factors = [_sums(values[factor], weights, groups, names, present[product]) for factor in (first, second)]
            means |= {(product, *key): rows * factors[1][key] for key, rows in factors[0].items()}
        for (metric, kind, of_group), rows in means.items():
            of = groups == of_group if kind == "group" else np.ones(len(members), bool)
            n = int((of & present[metric]).sum())
            key = {"section": section, "kind": kind, "group": of_group, "metric": metric}
            table.append((key, rows, n, int(of.sum()) - n))
    return table


def _sums(
    values: np.ndarray, weights: np.ndarray, groups: np.ndarray, names: list[str], present: np.ndarray
) -> dict[tuple[str, str | None], np.ndarray]:
    """The mean of each group, the mean of these, and the mean over all cases, for each row of weights."""
    means: dict[tuple[str, str | None], np.ndarray] = {
        ("group", name): _mean_of(values, weights, (groups == name) & present) for name in names
    }
    overall = np.mean(list(means.values()), 0) if names else np.full(len(weights), np.nan)
    return means | {("overall", None): overall, ("cases", None): _mean_of(values, weights, present)}


def _mean_of(values: np.ndarray, weights: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The mean over some cases for each row of weights, NaN where a row has none of them."""
    total = weights[:, members].sum(1)
    means = np.full(len(weights), np.nan)
    return np.divide(weights[:, members] @ values[members], total, out=means, where=total > 0)
