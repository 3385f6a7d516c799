"""The summary of RealPref-Bench as a module for `evaluate.load`, which copies this file: imports are absolute."""

import evaluate

from hp_edit_trl.bench import summarize
from hp_edit_trl.metrics.common import check_groups, check_values, metric_info


class RealPrefBenchMetric(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "HP-scores of edits, summarized over tasks.",
            "predictions: HP-scores from 0 to 5, NaN where missing. tasks: the task of each case. Returns overall "
            "(the unweighted mean of the tasks' means, None if a task has no score), mean (over all cases), the mean "
            "of each task, n and missing.",
            predictions="float64",
            tasks="string",
        )

    def _compute(self, predictions: list[float], tasks: list[str]) -> dict[str, float | None]:
        scores = check_values(predictions, "predictions", 5)
        tasks = check_groups(tasks, "tasks", ("overall", "mean", "n", "missing"))
        cases = [{"task": task, "score": score} for task, score in zip(tasks, scores, strict=True)]
        rows = summarize(cases, ["score"], "task", num_resamples=0)
        overall, mean = (next(row for row in rows if row["kind"] == kind) for kind in ("overall", "cases"))
        of_tasks = {row["group"]: row["value"] for row in rows if row["kind"] == "group"}
        whole = {"overall": overall["value"], "mean": mean["value"], "n": mean["n"], "missing": mean["missing"]}
        return whole | of_tasks
