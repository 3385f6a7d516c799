"""Stage 1 of HP-Edit: people rate edits, a scorer scores them, and its prompts are refined until both agree."""

from typing import TYPE_CHECKING, Any

from .agreement import agreement, agreement_difference, krippendorff_alpha, krippendorff_interval
from .agreement_page import agreement_tables, worst_disagreements, write_agreement
from .comparison import compare_with_people
from .label_studio import from_label_studio, label_studio_config, to_label_studio
from .preferences import load_preferences, measure_preferences, preferences_table
from .probe import probe_judge
from .refine import PromptRefiner, add_questions, is_held_out, parse_questions
from .rubric import Rubric, load_guidelines, load_rubric
from .scoring import ScoringSummary, read_scores, score_dataset
from .session import RatingSession, ReviewSession, assign_cases, sample_cases


if TYPE_CHECKING:
    from .page import annotate, build_app


def __getattr__(name: str) -> Any:
    if name not in ("annotate", "build_app"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import page  # the only module that needs Gradio

    return getattr(page, name)


__all__ = [
    "PromptRefiner",
    "RatingSession",
    "ReviewSession",
    "Rubric",
    "ScoringSummary",
    "add_questions",
    "agreement",
    "agreement_difference",
    "agreement_tables",
    "annotate",
    "assign_cases",
    "build_app",
    "compare_with_people",
    "from_label_studio",
    "is_held_out",
    "krippendorff_alpha",
    "krippendorff_interval",
    "label_studio_config",
    "load_guidelines",
    "load_preferences",
    "load_rubric",
    "measure_preferences",
    "parse_questions",
    "preferences_table",
    "probe_judge",
    "read_scores",
    "sample_cases",
    "score_dataset",
    "to_label_studio",
    "worst_disagreements",
    "write_agreement",
]
