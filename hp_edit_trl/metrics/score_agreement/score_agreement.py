"""Agreement of scores with people's as a module for `evaluate.load`, which copies this file: imports are absolute."""

import evaluate

from hp_edit_trl.calibration import agreement
from hp_edit_trl.metrics.common import metric_info


class ScoreAgreement(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Agreement of scores from 0 to 5 with people's scores of the same edits.",
            "predictions: the scores, NaN where missing. references: people's scores. Returns pearson, spearman, "
            "kendall (None where undefined), mae, exact, within_one, bias (scores minus people's), n and missing.",
            predictions="float64",
            references="float64",
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float | None]:
        result = agreement(references, predictions, num_resamples=0)["overall"]
        names = ("pearson", "spearman", "kendall", "mae", "exact", "within_one", "bias")
        return {**{name: result[name]["value"] for name in names}, "n": result["n"], "missing": result["missing"]}
