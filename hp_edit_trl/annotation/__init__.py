"""Floor 3: rating of edits by people. The page, its rubric, and the ways in and out of it."""

from typing import TYPE_CHECKING, Any

from .export import add_ratings, from_label_studio, label_studio_config, ratings_dataset, to_label_studio
from .rubric import Rubric, load_rubric
from .session import RatingSession, assign_cases, ratings_file


if TYPE_CHECKING:
    from .page import annotate, build_app


def __getattr__(name: str) -> Any:
    if name not in ("annotate", "build_app"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import page  # needs Gradio, which only the page does

    return getattr(page, name)


__all__ = [
    "RatingSession",
    "Rubric",
    "add_ratings",
    "annotate",
    "assign_cases",
    "build_app",
    "from_label_studio",
    "label_studio_config",
    "load_rubric",
    "ratings_dataset",
    "ratings_file",
    "to_label_studio",
]
