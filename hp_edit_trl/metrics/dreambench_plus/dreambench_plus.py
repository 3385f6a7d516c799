"""The summary of DreamBench++ as a module for `evaluate.load`, which copies this file: imports are absolute."""

import evaluate

from hp_edit_trl.bench import summarize
from hp_edit_trl.metrics.common import check_groups, check_values, metric_info


class DreamBenchPlusMetric(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Concept preservation, prompt following, their product and their ratio, summarized as in DreamBench++.",
            "concept_preservation and prompt_following: mean grades from 0 to 4 of each edit, NaN where missing. "
            "kinds: the kind of each description, e.g. photorealistic. Returns cp and pf (means over all cases, "
            "divided by 4), cp_pf (their product), cp_over_pf (their ratio, None if pf is 0), cp_ and pf_ with the "
            "name of a kind (its means), n (edits with both grades) and missing.",
            concept_preservation="float64",
            prompt_following="float64",
            kinds="string",
        )

    def _compute(
        self, concept_preservation: list[float], prompt_following: list[float], kinds: list[str]
    ) -> dict[str, float | None]:
        preserved = check_values(concept_preservation, "concept_preservation", 4)
        followed = check_values(prompt_following, "prompt_following", 4)
        kinds = check_groups(kinds, "kinds", ("pf", "over_pf"))  # cp_pf is the product, cp_over_pf the ratio
        cases = [
            {"kind": kind, "cp": None if cp is None else cp / 4, "pf": None if pf is None else pf / 4}
            for cp, pf, kind in zip(preserved, followed, kinds, strict=True)
        ]
        both = ("cp", "pf")
        rows = summarize(cases, both, "kind", products={"cp_pf": both}, num_resamples=0, ratios={"cp_over_pf": both})
        whole = {row["metric"]: row for row in rows if row["kind"] == "cases"}
        of_kinds = {
            f"{row['metric']}_{row['group']}": row["value"]
            for row in rows
            if row["kind"] == "group" and row["metric"] in ("cp", "pf")
        }
        result = {name: row["value"] for name, row in whole.items()}
        return result | of_kinds | {"n": whole["cp_pf"]["n"], "missing": whole["cp_pf"]["missing"]}
