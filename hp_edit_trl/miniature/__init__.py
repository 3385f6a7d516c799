"""Floor 4: a small world, a small policy and a scorer that knows the answers. Nothing else in the library knows them."""

from .building import MINIATURE_STYLES, SceneJudge, SimulatedWriter, save_pictures
from .comparison import before_after_sheet, comparison_table, edit_dataset, report, score_edits
from .policy import load_pipeline
from .raters import (
    SimulatedJudge,
    SimulatedProposer,
    TargetJudge,
    flawed_edits,
    known_pearson,
    simulate_ratings,
    true_scores,
)
from .scorers import CoarseScorer, RuleScorer
from .world import load_dataset


__all__ = [
    "MINIATURE_STYLES",
    "CoarseScorer",
    "RuleScorer",
    "SceneJudge",
    "SimulatedJudge",
    "SimulatedProposer",
    "SimulatedWriter",
    "TargetJudge",
    "before_after_sheet",
    "comparison_table",
    "edit_dataset",
    "flawed_edits",
    "known_pearson",
    "load_dataset",
    "load_pipeline",
    "report",
    "save_pictures",
    "score_edits",
    "simulate_ratings",
    "true_scores",
]
