"""Reward functions for edits, most of them made of a judge's answers, and their scorer prompts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import Reward, Rewards
from .editing_judges import (
    EditScoreReward,
    FIRMReward,
    RationalReward,
    SpatialReward,
    UnifiedPairReward,
    UnifiedReward,
)
from .hp_scorer import HPScorerReward
from .http import HTTPReward
from .ocr import OCRReward
from .prompts import ScorerPrompt, load_scorer_prompts, read_scorer_prompt
from .tournament import TournamentReward
from .vlm import VLMReward


# What needs models in this process or TRL, imported when it is first asked for
_MODULES = {"AestheticReward": "aesthetic", "Gate": "gate", "IdentityReward": "identity"}

if TYPE_CHECKING:
    from .aesthetic import AestheticReward
    from .gate import Gate
    from .identity import IdentityReward


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


__all__ = [
    "AestheticReward",
    "EditScoreReward",
    "FIRMReward",
    "Gate",
    "HPScorerReward",
    "HTTPReward",
    "IdentityReward",
    "OCRReward",
    "RationalReward",
    "Reward",
    "Rewards",
    "ScorerPrompt",
    "SpatialReward",
    "TournamentReward",
    "UnifiedPairReward",
    "UnifiedReward",
    "VLMReward",
    "load_scorer_prompts",
    "read_scorer_prompt",
]
