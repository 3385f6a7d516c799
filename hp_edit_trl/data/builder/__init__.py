"""The builder: makes a dataset of hard cases from images, stage by stage. Each stage is in the module of its name."""

from .balance import Balance
from .category import ClipCategories
from .config import BuildConfig
from .duplicates import Duplicates
from .edits import MakeEdits
from .engine import Stage, WorkFolder, run_stage
from .export import export_dataset, push_dataset
from .filter import Filter
from .instructions import WriteInstructions, load_instruction_templates
from .plan import Plan
from .run import build_dataset
from .scores import ScoreEdits
from .sources import ImageCheck, Sources
from .split import Split
from .styles import STYLES, Style, StyleImages


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
    "StyleImages",
    "WorkFolder",
    "WriteInstructions",
    "build_dataset",
    "export_dataset",
    "load_instruction_templates",
    "push_dataset",
    "run_stage",
]
