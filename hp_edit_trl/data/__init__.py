"""Stage 2 of HP-Edit: the schema of a case, the dataset builder, and preference pairs."""

from typing import TYPE_CHECKING, Any

from .schema import (
    CASE_FEATURES,
    EDIT_FEATURES,
    SCHEMA_VERSION,
    SCORE_FEATURES,
    check_realpref,
    load_realpref,
)


if TYPE_CHECKING:
    from .preference_pairs import build_preference_dataset, mine_preference_pairs, sample_and_score


def __getattr__(name: str) -> Any:
    if name not in ("build_preference_dataset", "mine_preference_pairs", "sample_and_score"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import preference_pairs  # needs diffusers, which takes seconds to import

    return getattr(preference_pairs, name)


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
