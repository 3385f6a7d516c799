"""The user study: the edits of several runs as one dataset to be rated, and their HP-scores, to be compared."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from .results import Run


TEXTS = ("id", "prompt", "task", "requirement", "editor")


def edits_of_runs(runs: Sequence[Run]) -> Dataset:
    """
    Joins the edits of runs into a dataset for [`~hp_edit_trl.calibration.annotate`], with the name of each run as
    `editor`, and the benchmark's groups as `task`. Cases that a run has no edit of are left out for it.

    Args:
        runs (`Sequence[Run]`):
            Runs of one benchmark on the same cases.

    Returns:
        [`~datasets.Dataset`]: `id`, `images`, `edit`, `prompt`, `task`, `requirement` and `editor`.

    Raises:
        `ValueError`: If runs have one name, are of different cases, or have no edits.
    """
    first = runs[0]
    names = [run.name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        folders = ", ".join(str(run.folder) for run in runs if run.name == twice)
        raise ValueError(f"Several runs have the name {twice!r} ({folders}): give them different ones with --name.")
    for run in runs:
        for part in ("name", "cases_sha"):
            if run.benchmark[part] != first.benchmark[part]:
                raise ValueError(
                    f"{first.folder} and {run.folder} are of different cases: people can compare editors only on the "
                    f"same ones ({part} {first.benchmark[part]!r} and {run.benchmark[part]!r})."
                )
    columns: dict[str, list[Any]] = {name: [] for name in (*TEXTS, "images", "edit")}
    for run in runs:
        for case in run.cases:
            if case["edit"] is None:
                continue
            row = {name: case[name] for name in ("id", "prompt", "requirement")}
            row |= {"task": str(case[run.benchmark["group"]]), "editor": run.name}
            row["images"] = [str(run.folder / file) for file in case["references"]]
            row["edit"] = str(run.folder / case["edit"])
            for name, value in row.items():
                columns[name].append(value)
    if not columns["id"]:
        raise ValueError(f"There are no edits in {', '.join(str(run.folder) for run in runs)}.")
    features = Features(
        {**{name: Value("string") for name in TEXTS}, "images": List(Image(decode=False)), "edit": Image(decode=False)}
    )
    return Dataset.from_dict(columns, features=features)


def scores_of_runs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """
    Joins the HP-scores of runs, see [`Run.hp_scores`].

    Raises:
        `ValueError`: If a run has none.
    """
    for run in runs:
        if not run.hp_scores:
            raise ValueError(
                f"{run.folder} has no HP-scores: {run.benchmark['title']} gives others. GEdit-Bench adds them with "
                "--benchmark_options hp_scorer=true."
            )
    return [line for run in runs for line in run.hp_scores]
