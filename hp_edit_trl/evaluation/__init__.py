"""Floor 3: agreement between people and the scorer."""

from pathlib import Path

from .agreement import agreement, krippendorff_alpha, krippendorff_interval, mean_with_interval, paired_difference
from .compare import compare_with_people
from .refine import PromptRefiner, add_questions, is_held_out, parse_questions
from .report import report_text, worst_disagreements, write_report


# A folder of modules for `evaluate.load(str(METRICS / "score_agreement"))`.
METRICS = Path(__file__).parent / "metrics"

__all__ = [
    "METRICS",
    "PromptRefiner",
    "add_questions",
    "agreement",
    "compare_with_people",
    "is_held_out",
    "krippendorff_alpha",
    "krippendorff_interval",
    "mean_with_interval",
    "paired_difference",
    "parse_questions",
    "report_text",
    "worst_disagreements",
    "write_report",
]
