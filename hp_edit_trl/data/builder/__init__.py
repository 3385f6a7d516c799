"""The pipeline that builds a dataset of hard cases, stage by stage."""

from .categories import Balance, ClipCategories
from .edits import MakeEdits, ScoreEdits
from .engine import Stage, WorkFolder, run_stage
from .export import export_dataset, push_dataset
from .instructions import Plan, WriteInstructions, load_instruction_templates
from .run import BuildConfig, build_dataset
from .sources import Duplicates, ImageCheck, Sources
from .splits import Filter, Split
from .styles import STYLES, Style


__all__ = [
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
    "export_dataset",
    "load_instruction_templates",
    "push_dataset",
    "run_stage",
]
