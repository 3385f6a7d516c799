"""Floor 2: a judge, and what is made of its score."""

from .cache import CachedJudge
from .hp_scorer import HPScorerReward
from .judges import Judge, Judgement, ServerJudge, TransformersJudge, parse_score
from .prompts import TASKS, ScorerPrompt, load_scorer_prompts, read_scorer_prompt
from .scoring import JudgingReport, probe_judge, read_scores, score_dataset


__all__ = [
    "TASKS",
    "CachedJudge",
    "HPScorerReward",
    "Judge",
    "Judgement",
    "JudgingReport",
    "ScorerPrompt",
    "ServerJudge",
    "TransformersJudge",
    "load_scorer_prompts",
    "parse_score",
    "probe_judge",
    "read_scorer_prompt",
    "read_scores",
    "score_dataset",
]
