"""
What the frozen LoRA makes of the frozen cases is what it was. If it is not, and was meant to change: `freeze.py`.

Machines differ in the last digits of floating-point numbers, so that a few pixels may be a level off: by some 0.00001
on average with other batch sizes, threads or instruction sets. Changes of what is computed move more than that (the
second test).
"""

import json

import numpy as np
import pytest
from PIL import Image

from tests.regression.freeze import HERE, bench, exact_scores, load_cases, sheet


LIMIT = 0.005  # mean absolute difference of the edits, in levels of 255


def difference(run) -> float:
    """Mean absolute difference of the edits from the (first) frozen ones, in levels of 255."""
    edits = np.asarray(sheet(run), float)
    with Image.open(HERE / "edits.png") as frozen:
        return float(np.abs(edits - np.asarray(frozen, float)[: len(edits)]).mean())


def test_the_frozen_policy_edits_the_frozen_cases_as_it_did(tmp_path):
    cases, known = load_cases(), json.loads((HERE / "scores.json").read_text())
    run = bench(cases, tmp_path)
    assert run.results["counts"]["edits"] == len(cases) == 64
    scores = dict(zip(cases["id"], exact_scores(run, cases), strict=True))
    assert difference(run) < LIMIT
    assert np.mean(list(scores.values())) == pytest.approx(known["mean"], abs=0.002)
    assert scores == pytest.approx(known["scores"], abs=0.05)


@pytest.mark.parametrize(
    "change", [dict(lora=False), dict(scale=0.98), dict(num_inference_steps=6), dict(true_cfg_scale=1.5)], ids=str
)
def test_a_change_of_what_is_computed_is_seen(tmp_path, change):
    cases = load_cases() if change == {"lora": False} else load_cases().select(range(16))
    run = bench(cases, tmp_path, **change)
    assert difference(run) > 2 * LIMIT
    if change == {"lora": False}:
        known = json.loads((HERE / "scores.json").read_text())
        assert np.mean(exact_scores(run, cases)) == pytest.approx(known["mean_without_lora"], abs=0.002)
