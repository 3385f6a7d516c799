"""Judges: vision-language models that answer a prompt about images."""

from .base import Judge, Judgement, describe_judge, parse_score
from .cache import CachedJudge
from .server import ServerJudge
from .transformers import TransformersJudge


__all__ = [
    "CachedJudge",
    "Judge",
    "Judgement",
    "ServerJudge",
    "TransformersJudge",
    "describe_judge",
    "parse_score",
]
