"""Stage 1 of HP-Edit: people rate edits, a scorer scores them, and its prompts are refined until both agree."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .acceptance import acceptance_power, swap_test
from .agreement import (
    agreement,
    agreement_difference,
    krippendorff_alpha,
    krippendorff_interval,
    mean_agreement,
)
from .agreement_page import agreement_tables, worst_disagreements, write_agreement
from .comparison import compare_with_people
from .label_studio import from_label_studio, label_studio_config, to_label_studio
from .probe import probe_judge
from .refine import (
    PromptRefiner,
    add_questions,
    history_table,
    is_held_out,
    parse_questions,
    read_history,
    summary_table,
)
from .refine_tasks import plan_refinement, plan_table, rated_tasks, refine_tasks
from .rubric import Rubric, load_guidelines, load_rubric
from .scoring import ScoringSummary, read_scores, score_dataset
from .session import RatingSession, ReviewSession, assign_cases, sample_cases


# What needs Gradio or TRL, imported when it is first asked for
_MODULES = {
    "annotate": "page",
    "build_app": "page",
    "load_preferences": "preferences",
    "measure_preferences": "preferences",
    "preferences_table": "preferences",
}

if TYPE_CHECKING:
    from .page import annotate, build_app
    from .preferences import load_preferences, measure_preferences, preferences_table


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


__all__ = [
    "PromptRefiner",
    "RatingSession",
    "ReviewSession",
    "Rubric",
    "ScoringSummary",
    "acceptance_power",
    "add_questions",
    "agreement",
    "agreement_difference",
    "agreement_tables",
    "annotate",
    "assign_cases",
    "build_app",
    "compare_with_people",
    "from_label_studio",
    "history_table",
    "is_held_out",
    "krippendorff_alpha",
    "krippendorff_interval",
    "label_studio_config",
    "load_guidelines",
    "load_preferences",
    "load_rubric",
    "mean_agreement",
    "measure_preferences",
    "parse_questions",
    "plan_refinement",
    "plan_table",
    "preferences_table",
    "probe_judge",
    "rated_tasks",
    "read_history",
    "read_scores",
    "refine_tasks",
    "sample_cases",
    "score_dataset",
    "summary_table",
    "swap_test",
    "to_label_studio",
    "worst_disagreements",
    "write_agreement",
]
