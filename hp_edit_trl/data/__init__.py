"""Stage 2 of HP-Edit: the schema of a case, the dataset builder, and preference pairs."""

from .preference_pairs import build_preference_dataset, mine_preference_pairs, sample_and_score
from .schema import CASE_FEATURES, EDIT_FEATURES, SCHEMA_VERSION, SCORE_FEATURES, check_realpref, load_realpref


__all__ = [
    "CASE_FEATURES",
    "EDIT_FEATURES",
    "SCHEMA_VERSION",
    "SCORE_FEATURES",
    "build_preference_dataset",
    "check_realpref",
    "load_realpref",
    "mine_preference_pairs",
    "sample_and_score",
]
