"""Modules for `evaluate.load(str(METRICS / "score_agreement"))`."""

from pathlib import Path


METRICS = Path(__file__).parent
