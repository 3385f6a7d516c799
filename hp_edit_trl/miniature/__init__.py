"""Floor 3: small stand-ins for the real models and data. Nothing in the rest of the library knows them."""

from .scorers import CoarseScorer, RuleScorer
from .world import load_dataset


__all__ = ["CoarseScorer", "RuleScorer", "load_dataset"]
