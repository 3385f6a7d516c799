"""How well scores agree with people's, as a module for `evaluate.load`, which copies this file: imports are absolute."""

import datasets
import evaluate

from hp_edit_trl.calibration import agreement


class ScoreAgreement(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Agreement of scores from 0 to 5 with what people gave the same edits.",
            citation="",
            inputs_description=(
                "predictions: the scores, NaN where there is none. references: people's scores. Returns pearson, spearman, kendall "
                "(None where undefined), mae, exact, within_one, bias (scores minus people's), n and missing."
            ),
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float | None]:
        result = agreement(references, predictions, num_resamples=0)["overall"]
        names = ("pearson", "spearman", "kendall", "mae", "exact", "within_one", "bias")
        return {**{name: result[name]["value"] for name in names}, "n": result["n"], "missing": result["missing"]}
