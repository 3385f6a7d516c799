"""Krippendorff's alpha as a module for `evaluate.load`, which copies this file: imports are absolute."""

import datasets
import evaluate

from hp_edit_trl.calibration import krippendorff_alpha


class KrippendorffAlpha(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Krippendorff's alpha: how well annotators agree with each other.",
            citation="",
            inputs_description=(
                "annotators, items and values: who rated what how, one entry for each rating. level: 'nominal', 'ordinal' (default) "
                "or 'interval'. Returns krippendorff_alpha, None where it is undefined."
            ),
            features=datasets.Features(
                {
                    "annotators": datasets.Value("string"),
                    "items": datasets.Value("string"),
                    "values": datasets.Value("float64"),
                }
            ),
        )

    def _compute(
        self, annotators: list[str], items: list[str], values: list[float], level: str = "ordinal"
    ) -> dict[str, float | None]:
        ratings = list(zip(annotators, items, values, strict=True))
        return {"krippendorff_alpha": krippendorff_alpha(ratings, level)}  # type: ignore[arg-type]
