"""Modules for `evaluate`, e.g. `evaluate.load(str(METRICS / "score_agreement"))`."""

from pathlib import Path


METRICS = Path(__file__).parent
