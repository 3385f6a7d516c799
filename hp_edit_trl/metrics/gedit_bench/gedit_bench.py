"""GEdit-Bench's sums over scores, as a module for `evaluate.load`, which copies this file: imports are absolute."""

import math

import datasets
import evaluate

from hp_edit_trl.bench import summarize
from hp_edit_trl.bench.results import check_groups, check_values


class GEditBench(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="SC, PQ and O of GEdit-Bench, summed up over its tasks. Use it for one language at a time.",
            citation="",
            inputs_description=(
                "semantic_consistency and perceptual_quality: scores from 0 to 10 of each edit, NaN where there is none. tasks: the task "
                "of each case. Returns g_sc, g_pq and g_o (unweighted means of the tasks' means, None if a task has no score), mean_o "
                "(over all cases), o_ and a task's name (the mean of that task), n (edits with both scores) and missing."
            ),
            features=datasets.Features(
                {
                    "semantic_consistency": datasets.Value("float64"),
                    "perceptual_quality": datasets.Value("float64"),
                    "tasks": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self, semantic_consistency: list[float], perceptual_quality: list[float], tasks: list[str]
    ) -> dict[str, float | None]:
        consistency = check_values(semantic_consistency, "semantic_consistency", 10)
        quality = check_values(perceptual_quality, "perceptual_quality", 10)
        tasks = check_groups(tasks, "tasks")
        cases = [
            {"task": task, "sc": sc, "pq": pq, "o": None if sc is None or pq is None else math.sqrt(sc * pq)}
            for sc, pq, task in zip(consistency, quality, tasks, strict=True)
        ]
        rows = summarize(cases, ["sc", "pq", "o"], "task", num_resamples=0)
        overall = {row["metric"]: row for row in rows if row["kind"] == "overall"}
        result = {f"g_{name}": row["value"] for name, row in overall.items()}
        result["mean_o"] = next(row["value"] for row in rows if (row["kind"], row["metric"]) == ("cases", "o"))
        of_tasks = {
            f"o_{row['group']}": row["value"] for row in rows if (row["kind"], row["metric"]) == ("group", "o")
        }
        return {**result, **of_tasks, "n": overall["o"]["n"], "missing": overall["o"]["missing"]}
