"""Floor 3: building data sets of hard cases, and of preferences."""

from .build import BuildConfig, build_dataset
from .categories import Balance, ClipCategories
from .edits import MakeEdits, ScoreEdits
from .engine import Stage, WorkFolder, run_stage
from .export import export_dataset, push_dataset
from .instructions import Plan, WriteInstructions, load_instruction_templates
from .preference_pairs import build_preference_dataset, mine_preference_pairs, sample_and_score
from .schema import (
    CASE_FEATURES,
    EDIT_FEATURES,
    SCHEMA_VERSION,
    SCORE_FEATURES,
    check_realpref,
    load_realpref,
)
from .sources import Duplicates, ImageCheck, Sources
from .splits import Filter, Split
from .styles import STYLES, Style


__all__ = [
    "CASE_FEATURES",
    "EDIT_FEATURES",
    "SCHEMA_VERSION",
    "SCORE_FEATURES",
    "STYLES",
    "Balance",
    "BuildConfig",
    "ClipCategories",
    "Duplicates",
    "Filter",
    "ImageCheck",
    "MakeEdits",
    "Plan",
    "ScoreEdits",
    "Sources",
    "Split",
    "Stage",
    "Style",
    "WorkFolder",
    "WriteInstructions",
    "build_dataset",
    "build_preference_dataset",
    "check_realpref",
    "export_dataset",
    "load_instruction_templates",
    "load_realpref",
    "mine_preference_pairs",
    "push_dataset",
    "run_stage",
    "sample_and_score",
]
