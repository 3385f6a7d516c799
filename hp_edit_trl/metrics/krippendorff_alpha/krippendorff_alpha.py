"""Krippendorff's alpha as a module for `evaluate.load`, which copies this file: imports are absolute."""

import evaluate

from hp_edit_trl.calibration import krippendorff_alpha
from hp_edit_trl.metrics.common import metric_info


class KrippendorffAlpha(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Krippendorff's alpha: the agreement of annotators with each other.",
            "annotators, items and values: one entry per rating. level: 'nominal', 'ordinal' (default) or 'interval'. "
            "Returns krippendorff_alpha, None where it is undefined.",
            annotators="string",
            items="string",
            values="float64",
        )

    def _compute(
        self, annotators: list[str], items: list[str], values: list[float], level: str = "ordinal"
    ) -> dict[str, float | None]:
        ratings = list(zip(annotators, items, values, strict=True))
        return {"krippendorff_alpha": krippendorff_alpha(ratings, level)}  # type: ignore[arg-type]
