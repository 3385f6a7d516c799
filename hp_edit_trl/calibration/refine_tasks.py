"""Refinement of the scorer prompts of several tasks: which have ratings, what it takes, and one after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..cases import edit_keys
from ..judges import Judge
from ..ratings import Rating
from ..rewards import HPScorerReward
from ..utils.tables import markdown_table
from .acceptance import GAINS, POWER, acceptance_power, effective_edits
from .agreement import statistic_of
from .refine import BASE, PromptRefiner, check_rated, check_refinement, read_history, scores_by_edit, starting_prompt


ASSUMED = {"pearson": (0.5, 0.7), "spearman": (0.5, 0.7), "kendall": (0.4, 0.6), "mae": (0.7, 1.0)}  # agreements


@dataclass
class RatedTask:
    """
    The rated edits of a task.

    Args:
        task (`str`):
            The task, or `"base"` for the edits of all tasks.
        keys (`list[tuple[str, str | None]]`):
            Id of the case and editor of each edit.
        human (`list[float]`):
            Score of each by people.
        groups (`list[str]`):
            Task of each.
        num_ratings (`int`):
            Number of their ratings.
    """

    task: str
    keys: list[tuple[str, str | None]]
    human: list[float]
    groups: list[str]
    num_ratings: int

    @property
    def ids(self) -> list[str]:
        """Id of the case of each edit."""
        return [case_id for case_id, _ in self.keys]


def rated_tasks(
    dataset: Dataset,
    ratings: Sequence[Rating],
    tasks: Sequence[str] | None = None,
    statistic: str = "pearson",
    validation_fraction: float = 0.8,
    seed: int = 0,
) -> tuple[list[RatedTask], dict[str, str]]:
    """
    Finds the tasks whose prompts can be refined.

    Args:
        dataset ([`~datasets.Dataset`]):
            The edits. Without a column `task`, all are of the one task that is named, or of `"base"`.
        ratings (`Sequence[Rating]`):
            Their ratings.
        tasks (`Sequence[str]`, *optional*):
            The tasks. By default all that have ratings. `"base"` is the base prompt, with the edits of all tasks; it
            comes first.
        statistic, validation_fraction, seed:
            See [`PromptRefiner`].

    Returns:
        `tuple[list[RatedTask], dict[str, str]]`: the tasks, and why others are left out, by name.

    Raises:
        `ValueError`: If no task is left, or a task is named twice.
    """
    check_refinement(statistic, validation_fraction)
    named = list(tasks or [])
    if len(set(named)) < len(named):
        raise ValueError(f"The tasks {', '.join(named)} name one of them twice.")
    given = scores_by_edit(ratings)
    if "task" in dataset.column_names:
        task_of = dataset["task"][:]
    else:
        task_of = [named[0] if len(named) == 1 else BASE] * len(dataset)
    rows = [(key, task or BASE) for key, task in zip(edit_keys(dataset), task_of, strict=True) if key in given]
    if not rows:
        raise ValueError(
            "No edit has a rating with a score: ratings are matched by id and editor. Check that they are of these "
            "edits."
        )
    found, left_out = [], {}
    known = sorted({task for _, task in rows} - {BASE}) or [BASE]
    for task in sorted(named or known, key=lambda task: task != BASE):
        of = [(key, group) for key, group in rows if task in (group, BASE)]
        one = RatedTask(
            task,
            [key for key, _ in of],
            [float(np.mean([rating.score or 0 for rating in given[key]])) for key, _ in of],
            [group for _, group in of],
            sum(len(given[key]) for key, _ in of),
        )
        try:
            if not of:
                raise ValueError(f"The task {task!r} has no rated edits; there are ratings for {', '.join(known)}.")
            check_rated(task, one.ids, one.human, statistic, validation_fraction, seed)
            found.append(one)
        except ValueError as error:
            left_out[task] = str(error)
    if not found:
        raise ValueError(f"No task can be refined. {' '.join(left_out.values())}")
    return found, left_out


def plan_refinement(
    tasks: Sequence[RatedTask],
    scorer: HPScorerReward,
    output_dir: str | Path,
    scores: Sequence[dict[str, Any]] = (),
    statistic: str = "pearson",
    validation_fraction: float = 0.8,
    confidence: float = 0.95,
    seed: int = 0,
    from_base: bool = False,
) -> list[dict[str, Any]]:
    """
    Estimates, before a judge is asked, how likely true gains in agreement are to be accepted with the ratings at hand,
    see [`acceptance_power`].

    Args:
        tasks (`Sequence[RatedTask]`):
            The tasks, see [`rated_tasks`].
        scorer ([`HPScorerReward`]):
            Judge and initial prompts.
        output_dir (`str` or `Path`):
            The folder of prompts.
        scores (`Sequence[dict]`, *optional*):
            Scores of the edits. Those that this judge gave with a task's current prompt tell today's agreement.
            Otherwise it is taken from the folder's history or, without one, assumed.
        statistic, validation_fraction, confidence, seed, from_base:
            See [`PromptRefiner`].

    Returns:
        `list[dict]`: for each task and agreement of today (one if it is known, several if it is assumed) a row of
        `task`, `cases`, `edits_per_case`, `ratings_per_edit`, `before` (the agreement), `known` (whether it is) and
        `gains`, as [`acceptance_power`] returns them.
    """
    rows = []
    for one in tasks:
        known = _agreement_of_today(one, scorer, Path(output_dir), scores, statistic, from_base)
        human, ids = one.human, one.ids
        cases = len(set(ids))
        for before in ASSUMED[statistic] if known is None else (known,):
            power = acceptance_power(
                human, ids, statistic, before, GAINS, validation_fraction, confidence, seed=seed, groups=one.groups
            )
            rows.append(
                {
                    "task": one.task,
                    "cases": cases,
                    "edits_per_case": len(ids) / cases,
                    "ratings_per_edit": one.num_ratings / len(ids),
                    "before": before,
                    "known": known is not None,
                    "gains": power,
                }
            )
    return rows


def _agreement_of_today(
    one: RatedTask,
    scorer: HPScorerReward,
    folder: Path,
    scores: Sequence[dict[str, Any]],
    statistic: str,
    from_base: bool,
) -> float | None:
    """The agreement with a task's current prompt, as far as it is known without asking a judge."""
    current = starting_prompt(one.task, scorer, folder, from_base)
    made = {"scorer_prompt_sha": current.digest, "judge": scorer.judge_description}
    score_of = {
        (line["id"], line["editor"]): line["score"]
        for line in scores
        if line["score"] is not None and made.items() <= line.items()
    }
    both = [
        (human, score_of[key], group)
        for key, human, group in zip(one.keys, one.human, one.groups, strict=True)
        if key in score_of
    ]
    if len(both) >= len(one.keys) / 2:
        people, judged, groups = map(np.array, zip(*both, strict=True))
        found = [statistic_of(statistic, people[groups == name], judged[groups == name]) for name in set(groups)]
        if np.isfinite(found).any():
            return float(np.nanmean(found))
    for entry in reversed(read_history(folder, one.task)):
        side = entry["validation"] or entry["calibration"]
        value = side["after" if entry["adopted"] else "before"]
        if entry["statistic"] == statistic and value is not None:
            return float(value)
    return None


def plan_table(rows: Sequence[dict[str, Any]], rounds: int) -> str:
    """Returns a plan as a Markdown table, with what it means below, see [`plan_refinement`]."""

    def cell(gain: dict[str, Any]) -> str:
        if gain["power"] is None:
            return "–"
        return f"{gain['power']:.0%} ({gain['cases']} cases)"

    table = [
        [
            row["task"],
            row["cases"],
            f"{row['edits_per_case']:.3g}",
            f"{row['ratings_per_edit']:.3g}",
            f"{row['before']:.2f}{'' if row['known'] else ' assumed'}",
            *map(cell, row["gains"]),
        ]
        for row in rows
    ]
    head = ["task", "cases", "edits of each", "ratings of each edit", "agreement today"]
    head += [f"gain of {gain['gain']:.2f}" for gain in rows[0]["gains"]]
    edits = {row["task"]: round(row["cases"] * row["edits_per_case"]) for row in rows}
    text = markdown_table(head, table) + (
        "\nThe chance that a true gain in agreement is accepted at the first look, and the number of cases for "
        f"{POWER:.0%}. It is smaller at later looks.\nUp to {sum(edits.values()) * (1 + rounds)} judgements "
        f"({rounds} rounds) and {len(edits) * rounds} proposals, less what is in the cache.\n"
    )
    fewest = min(row["edits_per_case"] for row in rows)
    if fewest < 2:
        times = effective_edits(3) / effective_edits(fewest)
        text += f"Rated edits by three editors of each case would count like {times:.1f} times as many cases.\n"
    return text


def refine_tasks(
    tasks: Sequence[RatedTask],
    scorer: HPScorerReward,
    dataset: Dataset,
    ratings: Sequence[Rating],
    output_dir: str | Path,
    proposer: Judge,
    rounds: int = 3,
    target: float | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """
    Refines the prompts of tasks one after the other, see [`PromptRefiner.refine`]. A second call resumes.

    Args:
        tasks (`Sequence[RatedTask]`):
            The tasks, see [`rated_tasks`].
        scorer, dataset, ratings, output_dir:
            See [`PromptRefiner`].
        proposer, rounds, target:
            See [`PromptRefiner.refine`].
        **options:
            Further options of [`PromptRefiner`].

    Yields:
        `dict`: the summary of each task, see [`PromptRefiner.summary`]. A task whose proposals cannot be used has
        `failed` set, and the others go on.

    Raises:
        `ConnectionError`: If the judge or the proposer does not answer. The summary of its task comes before.
    """
    for one in tasks:
        try:
            refiner = PromptRefiner(one.task, scorer, dataset, ratings, output_dir, **options)
        except ValueError as error:  # e.g. images that cannot be read
            yield {
                "task": one.task, "start": "–", "current": "–", "proposed": 0, "accepted": 0, "before": None,
                "after": None, "reason": str(error), "failed": True,
            }  # fmt: skip
            continue
        try:
            summary = refiner.refine(proposer, rounds, target)
        except ValueError as error:
            yield {**refiner.summary(str(error)), "failed": True}
            continue
        except ConnectionError as error:
            yield {**refiner.summary(str(error)), "failed": True}
            raise
        yield {**summary, "failed": False}
