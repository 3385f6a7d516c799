"""A small world, a small policy that edits it, and scorers that know the answers."""

from .building import MINIATURE_STYLES, SceneJudge, SimulatedWriter, save_pictures
from .comparison import before_after_sheet, comparison_table, edit_dataset, evaluate_before_after, score_edits
from .policy import load_pipeline, training_args
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
    "evaluate_before_after",
    "flawed_edits",
    "known_pearson",
    "load_dataset",
    "load_pipeline",
    "save_pictures",
    "score_edits",
    "simulate_ratings",
    "training_args",
    "true_scores",
]
