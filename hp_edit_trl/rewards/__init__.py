"""Floor 2: a judge, and what is made of its score."""

from .hp_scorer import HPScorerReward
from .judges import Judge, Judgement, ServerJudge, TransformersJudge, parse_score
from .prompts import TASKS, ScorerPrompt, load_scorer_prompts


__all__ = [
    "TASKS",
    "HPScorerReward",
    "Judge",
    "Judgement",
    "ScorerPrompt",
    "ServerJudge",
    "TransformersJudge",
    "load_scorer_prompts",
    "parse_score",
]
