"""DreamBench++'s sums over grades, as a module for `evaluate.load`, which copies this file: imports are absolute."""

import datasets
import evaluate

from hp_edit_trl.bench import summarize
from hp_edit_trl.bench.results import check_groups, check_values


class DreamBenchPlus(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Concept preservation, prompt following and their product, as DreamBench++ sums them up.",
            citation="",
            inputs_description=(
                "concept_preservation and prompt_following: mean grades from 0 to 4 of each edit, NaN where there is none. kinds: the kind of "
                "each description, e.g. photorealistic. Returns cp and pf (means over all cases, divided by 4), cp_pf (their product), "
                "cp_ and pf_ with a kind's name (the means of that kind), n (edits with both grades) and missing."
            ),
            features=datasets.Features(
                {
                    "concept_preservation": datasets.Value("float64"),
                    "prompt_following": datasets.Value("float64"),
                    "kinds": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self, concept_preservation: list[float], prompt_following: list[float], kinds: list[str]
    ) -> dict[str, float | None]:
        kept = check_values(concept_preservation, "concept_preservation", 4)
        followed = check_values(prompt_following, "prompt_following", 4)
        kinds = check_groups(kinds, "kinds", ("pf",))  # cp_pf is the product
        cases = [
            {"kind": kind, "cp": None if cp is None else cp / 4, "pf": None if pf is None else pf / 4}
            for cp, pf, kind in zip(kept, followed, kinds, strict=True)
        ]
        rows = summarize(cases, ["cp", "pf"], "kind", products={"cp_pf": ("cp", "pf")}, num_resamples=0)
        whole = {row["metric"]: row for row in rows if row["kind"] == "cases"}
        of_kinds = {
            f"{row['metric']}_{row['group']}": row["value"]
            for row in rows
            if row["kind"] == "group" and row["metric"] in ("cp", "pf")
        }
        result = {name: row["value"] for name, row in whole.items()}
        return {**result, **of_kinds, "n": whole["cp_pf"]["n"], "missing": whole["cp_pf"]["missing"]}
