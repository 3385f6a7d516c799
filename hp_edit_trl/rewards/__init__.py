"""Reward functions for edits, most of them made of a judge's answers, and their scorer prompts."""

from .aesthetic import AestheticReward
from .base import Reward, Rewards
from .editing_judges import (
    EditScoreReward,
    FIRMReward,
    RationalReward,
    SpatialReward,
    UnifiedPairReward,
    UnifiedReward,
)
from .gate import Gate
from .hp_scorer import HPScorerReward
from .http import HTTPReward
from .identity import IdentityReward
from .ocr import OCRReward
from .prompts import ScorerPrompt, load_scorer_prompts, read_scorer_prompt
from .tournament import TournamentReward
from .vlm import VLMReward


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
