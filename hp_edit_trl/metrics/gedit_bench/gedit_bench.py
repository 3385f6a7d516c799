"""The summary of GEdit-Bench as a module for `evaluate.load`, which copies this file: imports are absolute."""

import math

import evaluate

from hp_edit_trl.bench import summarize
from hp_edit_trl.metrics.common import check_groups, check_values, metric_info


class GEditBenchMetric(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "SC, PQ and O of GEdit-Bench, summarized over its tasks. Use it for one language at a time.",
            "semantic_consistency and perceptual_quality: scores from 0 to 10 of each edit, NaN where missing. tasks: "
            "the task of each case. Returns g_sc, g_pq and g_o (unweighted means of the tasks' means, None if a task "
            "has no score), mean_o (over all cases), o_ with the name of a task (its mean), n (edits with both "
            "scores) and missing.",
            semantic_consistency="float64",
            perceptual_quality="float64",
            tasks="string",
        )

    def _compute(
        self, semantic_consistency: list[float], perceptual_quality: list[float], tasks: list[str]
    ) -> dict[str, float | None]:
        consistency = check_values(semantic_consistency, "semantic_consistency", 10)
        quality = check_values(perceptual_quality, "perceptual_quality", 10)
        cases = [
            {"task": task, "sc": sc, "pq": pq, "o": None if sc is None or pq is None else math.sqrt(sc * pq)}
            for sc, pq, task in zip(consistency, quality, check_groups(tasks, "tasks"), strict=True)
        ]
        rows = summarize(cases, ["sc", "pq", "o"], "task", num_resamples=0)
        result = {f"g_{row['metric']}": row["value"] for row in rows if row["kind"] == "overall"}
        of_tasks = {
            f"o_{row['group']}": row["value"] for row in rows if (row["kind"], row["metric"]) == ("group", "o")
        }
        mean = next(row for row in rows if (row["kind"], row["metric"]) == ("cases", "o"))
        return result | of_tasks | {"mean_o": mean["value"], "n": mean["n"], "missing": mean["missing"]}
