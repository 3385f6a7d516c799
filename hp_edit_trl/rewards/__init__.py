"""Reward functions made of a judge's answers, and their scorer prompts."""

from .hp_scorer import HPScorerReward
from .prompts import ScorerPrompt, load_scorer_prompts, read_scorer_prompt


__all__ = ["HPScorerReward", "ScorerPrompt", "load_scorer_prompts", "read_scorer_prompt"]
