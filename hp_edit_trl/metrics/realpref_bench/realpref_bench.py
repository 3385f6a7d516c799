"""RealPref-Bench's sums over scores, as a module for `evaluate.load`, which copies this file: imports are absolute."""

import datasets
import evaluate

from hp_edit_trl.bench import summarize
from hp_edit_trl.bench.results import check_groups, check_values


class RealPrefBench(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="HP-scores of a benchmark's edits, summed up over tasks.",
            citation="",
            inputs_description=(
                "predictions: HP-scores from 0 to 5, NaN where there is none. tasks: the task of each case. Returns overall (the unweighted "
                "mean of the tasks' means, None if a task has no score), mean (over all cases), the mean of each task, n and missing."
            ),
            features=datasets.Features({"predictions": datasets.Value("float64"), "tasks": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[float], tasks: list[str]) -> dict[str, float | None]:
        scores = check_values(predictions, "predictions", 5)
        tasks = check_groups(tasks, "tasks", ("overall", "mean", "n", "missing"))
        cases = [{"task": task, "score": score} for task, score in zip(tasks, scores, strict=True)]
        rows = summarize(cases, ["score"], "task", num_resamples=0)
        result = {row["group"]: row["value"] for row in rows if row["kind"] == "group"}
        overall, mean = (next(row for row in rows if row["kind"] == kind) for kind in ("overall", "cases"))
        return {
            "overall": overall["value"],
            "mean": mean["value"],
            **result,
            "n": mean["n"],
            "missing": mean["missing"],
        }
