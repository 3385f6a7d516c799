"""Comparison of ratings and scores, joined edit by edit."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from ..cases import EditKey, check_edits, edit_keys
from ..ratings import Rating
from ..utils.statistics import mean_with_interval
from .agreement import agreement, krippendorff_interval


NO_TASK = "no task"


def compare_with_people(
    ratings: Sequence[Rating],
    scores: Sequence[dict[str, Any]],
    dataset: Dataset | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Compares a scorer with the people who rated the same edits, and the people with each other.

    People's score of an edit is the mean over the annotators who did not skip it. Intervals come from resampling cases
    within their tasks, see [`agreement`].

    Args:
        ratings (`Sequence[Rating]`):
            The ratings, see [`~hp_edit_trl.ratings.read_ratings`]. If an annotator rated an edit several times, the
            last rating counts.
        scores (`Sequence[dict]`):
            The scores, see [`~hp_edit_trl.calibration.read_scores`].
        dataset ([`~datasets.Dataset`], *optional*):
            The edits. With it, ratings and scores of other edits are left out, and its column `task` counts as well as
            the tasks in the scores.
        confidence, num_resamples, seed:
            See [`agreement`].

    Returns:
        `dict`, ready for JSON:

        - `agreement`: what [`agreement`] returns, with the tasks as groups.
        - `alpha`: Krippendorff's ordinal alpha between the annotators, `overall` and by task in `groups`, each as
          [`krippendorff_interval`] returns it.
        - `annotators`: by name, against the mean of the others on the same edits: `n`, `skipped`, `pearson`, `bias`.
        - `editors`: by name, the means `human` and `scorer` on the edits that have both, and their number `n`. Empty
          if the edits have no editor.
        - `aspects`: by name, the means of people's scores of an aspect: `n` (edits with one), `human`, `pearson` with
          the scorer's scores, and the mean of each editor in `editors`. Empty if people scored the edits alone.
        - `edits`: each rated edit with `id`, `editor`, `task`, `human`, `score`, `answer`, and `ratings` (annotator,
          score, comment).
        - `left_out`: lists of `(id, editor)` by reason: `no_score` (the scorer gave none), `not_scored` (not in the
          scores), `not_rated`, `skipped` (by all who saw it) and `unknown` (not in the dataset). The first two are the
          `missing` of `agreement`.
        - `rubric`, `judge`, `score_mode`, `scorer_prompts` (by task): settings of the ratings and scores.

    Raises:
        `ValueError`: If there are no ratings, no edit has both a rating and a score, the ratings were made with
            several rubrics, the scores with several judges, score modes or revisions of a task's prompt, or a case has
            several tasks.
    """
    known = None
    if dataset is not None:
        check_edits(dataset, "dataset", on_bad_case=None)
        known = set(edit_keys(dataset))
    rated: dict[EditKey, dict[str, Rating]] = {}
    for rating in ratings:
        rated.setdefault(rating.edit, {})[rating.annotator] = rating
    lines: dict[EditKey, dict[str, Any]] = {}
    for line in scores:
        key = line["id"], line["editor"]
        line = {**line, "score": _number(line["score"])}
        if line["score"] is not None or lines.get(key, line)["score"] is None:
            lines[key] = line

    unknown = [] if known is None else [key for key in rated.keys() | lines.keys() if key not in known]
    rated = {key: rated[key] for key in sorted(rated.keys() - unknown, key=_order)}
    lines = {key: lines[key] for key in sorted(lines.keys() - unknown, key=_order)}
    human = {key: _mean(given) for key, given in rated.items()}
    values = {key: value for key, value in human.items() if value is not None}
    score_of = {key: lines[key]["score"] if key in lines else None for key in values}
    _check_overlap(rated, values, lines, score_of, bool(unknown))
    task_of = _tasks(lines, dataset)
    settings = _settings(ratings, lines)

    tasks = [task_of.get(key[0]) or NO_TASK for key in values]
    groups = None if set(tasks) == {NO_TASK} else tasks
    options: dict[str, Any] = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    ids = [key[0] for key in values]

    def alpha(only: str | None = None) -> dict[str, Any]:
        keys = [key for key, task in zip(values, tasks, strict=True) if only in (None, task)]
        given = [(r.annotator, key, r.score) for key in keys for r in rated[key].values() if r.score is not None]
        return krippendorff_interval(
            given,
            groups=dict(zip(values, tasks, strict=True)),
            clusters=dict(zip(values, ids, strict=True)),
            **options,
        )

    left_out = {
        "no_score": [key for key in values if score_of[key] is None and key in lines],
        "not_scored": [key for key in values if key not in lines],
        "not_rated": [key for key in lines if key not in rated],
        "skipped": [key for key in rated if key not in values],
        "unknown": sorted(unknown, key=_order),
    }
    return {
        **settings,
        "agreement": agreement(list(values.values()), list(score_of.values()), groups, ids, **options),
        "alpha": {
            "overall": alpha(),
            "groups": {} if groups is None else {task: alpha(task) for task in sorted(set(groups))},
        },
        "annotators": {
            name: _against_the_others(name, rated, task_of, options)
            for name in sorted({rating.annotator for given in rated.values() for rating in given.values()})
        },
        "editors": _means_of_editors(values, score_of, task_of, options),
        "aspects": _aspects(rated, score_of, task_of, options),
        "left_out": {reason: [list(key) for key in keys] for reason, keys in left_out.items()},
        "edits": [
            {
                "id": key[0],
                "editor": key[1],
                "task": task_of.get(key[0]),
                "human": human[key],
                "score": score_of.get(key),
                "answer": lines[key].get("answer") if key in lines else None,
                "ratings": [
                    {"annotator": name, "score": rating.score, "comment": rating.comment}
                    for name, rating in sorted(given.items())
                ],
            }
            for key, given in rated.items()
        ],
    }


def _order(key: EditKey) -> tuple[str, str]:
    return key[0], key[1] or ""


def _number(score: float | None) -> float | None:
    return None if score is None or math.isnan(score) else score


def _mean(given: dict[str, Rating]) -> float | None:
    scores = [rating.score for rating in given.values() if rating.score is not None]
    return float(np.mean(scores)) if scores else None


def _tasks(lines: dict[EditKey, dict[str, Any]], dataset: Dataset | None) -> dict[str, str]:
    """Returns the task of each case that has one."""
    found = [(key[0], line.get("task"), "the scores") for key, line in lines.items()]
    if dataset is not None and "task" in dataset.features:
        tasks = dataset["task"][:]
        found += [(key[0], task, "the dataset") for key, task in zip(edit_keys(dataset), tasks, strict=True)]
    task_of: dict[str, tuple[str, str]] = {}
    for case, task, where in found:
        if task is None:
            continue
        other, there = task_of.setdefault(case, (task, where))
        if task != other:
            raise ValueError(
                f"Case {case!r} has the task {other!r} in {there} and {task!r} in {where}, but a case must have one "
                "task, whose prompt its edits are scored with. Correct the dataset, or score it again."
            )
    return {case: task for case, (task, _) in task_of.items()}


def _settings(ratings: Sequence[Rating], lines: dict[EditKey, dict[str, Any]]) -> dict[str, Any]:
    """Returns the settings of the ratings and scores, after a check that they are the same for all."""
    rubrics = sorted({rating.rubric for rating in ratings})
    if len(rubrics) > 1:
        raise ValueError(f"The ratings were made with the rubrics {', '.join(rubrics)}: compare with one at a time.")
    scored = [line for line in lines.values() if line["score"] is not None]
    for name in ("judge", "score_mode"):
        found = sorted({str(line.get(name)) for line in scored})
        if len(found) > 1:
            raise ValueError(
                f"The scores were made with several {name}s, {', '.join(found)}, which must not be mixed: score into "
                "another output_dir for each."
            )
    prompts: dict[str, str | None] = {}
    for line in scored:
        task, prompt = line.get("task") or NO_TASK, line.get("scorer_prompt")
        if line.get("scorer_prompt_sha"):
            prompt = f"{prompt} ({line['scorer_prompt_sha']})"
        if prompts.setdefault(task, prompt) != prompt:
            raise ValueError(
                f"The scores of {task if task == NO_TASK else f'the task {task!r}'} were made with two revisions of "
                f"the prompt, {prompts[task]} and {prompt}, which must not be mixed: score into another output_dir "
                "for each."
            )
    return {
        "rubric": rubrics[0],
        "judge": scored[0].get("judge"),
        "score_mode": scored[0].get("score_mode"),
        "scorer_prompts": prompts,
    }


def _check_overlap(rated: dict, values: dict, lines: dict, score_of: dict, some_unknown: bool) -> None:
    if not values:
        skipped = f"all {len(rated)} edits were skipped" if rated else "there are no ratings"
        where = " of edits of this dataset" if some_unknown and not rated else ""
        raise ValueError(f"There is nothing to compare with: {skipped}{where}.")
    if not values.keys() & lines.keys():
        examples = f"e.g. {next(iter(values))} and {next(iter(lines))}" if lines else "there are none"
        raise ValueError(
            f"None of the {len(values)} rated edits is among the {len(lines)} scored ones ({examples}): edits are "
            "matched by id and editor. Check that ratings and scores are of the same dataset."
        )
    if all(score is None for score in score_of.values()):
        raise ValueError(
            f"None of the {len(values)} rated edits has a score, because the judge gave none. See its answers in the "
            "scores."
        )


def _against_the_others(
    name: str, rated: dict[EditKey, dict[str, Rating]], task_of: dict[str, str], options: dict[str, Any]
) -> dict[str, Any]:
    own, others, keys = [], [], []
    for key, given in rated.items():
        rest = _mean({other: rating for other, rating in given.items() if other != name})
        if rest is not None and name in given and given[name].score is not None:
            own.append(given[name].score)
            others.append(rest)
            keys.append(key)
    tasks = [task_of.get(case) or NO_TASK for case, _ in keys]
    ids = [case for case, _ in keys]
    result = agreement(others, own, tasks, ids, statistics=("pearson", "bias"), **options)["overall"]
    for statistic in ("pearson", "bias"):
        result[statistic]["reason"] = _of_annotators(result[statistic]["reason"])
    return {
        "n": result["n"],
        "skipped": sum(name in given and given[name].score is None for given in rated.values()),
        "pearson": result["pearson"],
        "bias": result["bias"],
    }


def _of_annotators(reason: str | None) -> str | None:
    """Words a reason of [`agreement`] for an annotator in the place of the scorer."""
    words = {
        "no edit has a score": "no edit was rated by this annotator and another",
        "people gave all edits the same score": "the others gave all edits the same score",
        "the scorer gave all edits the same score": "this annotator gave all edits the same score",
    }
    return words.get(reason, reason) if reason else None


def _aspects(
    rated: dict[EditKey, dict[str, Rating]],
    score_of: dict[EditKey, float | None],
    task_of: dict[str, str],
    options: dict[str, Any],
) -> dict[str, Any]:
    result = {}
    given = [rating.aspects for ratings in rated.values() for rating in ratings.values()]
    for name in dict.fromkeys(name for aspects in given for name in aspects):
        values = {
            key: float(np.mean(scores))
            for key, ratings in rated.items()
            if (scores := [one.aspects[name] for one in ratings.values() if name in one.aspects])
        }

        def mean(keys: list[EditKey], values: dict[EditKey, float] = values) -> dict[str, Any]:
            tasks, ids = [task_of.get(key[0]) or NO_TASK for key in keys], [key[0] for key in keys]
            return mean_with_interval([values[key] for key in keys], tasks, ids, **options)

        tasks, ids = [task_of.get(key[0]) or NO_TASK for key in values], [key[0] for key in values]
        by_scorer = [score_of.get(key) for key in values]
        agreed = agreement(list(values.values()), by_scorer, tasks, ids, statistics=("pearson",), **options)["overall"]
        editors = sorted({key[1] for key in values if key[1] is not None})
        result[name] = {
            "n": len(values),
            "human": mean(list(values)),
            "pearson": agreed["pearson"],
            "editors": {editor: mean([key for key in values if key[1] == editor]) for editor in editors},
        }
    return result


def _means_of_editors(
    values: dict[EditKey, float],
    score_of: dict[EditKey, float | None],
    task_of: dict[str, str],
    options: dict[str, Any],
) -> dict[str, Any]:
    result = {}
    for editor in sorted({key[1] for key in values if key[1] is not None}):
        keys = [key for key in values if key[1] == editor and score_of[key] is not None]
        tasks, ids = [task_of.get(key[0]) or NO_TASK for key in keys], [key[0] for key in keys]
        result[editor] = {
            "n": len(keys),
            "human": mean_with_interval([values[key] for key in keys], tasks, ids, **options),
            "scorer": mean_with_interval([score_of[key] for key in keys], tasks, ids, **options),  # type: ignore[misc]
        }
    return result
