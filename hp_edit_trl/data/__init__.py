"""Floor 3: data sets of preferences."""

from .preference_pairs import build_preference_dataset, mine_preference_pairs, sample_and_score


__all__ = ["build_preference_dataset", "mine_preference_pairs", "sample_and_score"]
