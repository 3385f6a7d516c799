"""The whole method: rewards that mean something improve the policy, and the same rewards shuffled do not."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from experiments import make_trainer

from hp_edit_trl.miniature import RuleScorer, edit_dataset, load_dataset, score_edits
from hp_edit_trl.utils.statistics import paired_difference


CONFIG = Path(__file__).parents[2] / "examples" / "miniature" / "experiment.yaml"
GROUP = 12


def train_and_compare(reward, folder):
    options = {"max_steps": 100, "save_strategy": "no"}
    trainer = make_trainer(CONFIG, options, folder, 0, reward, load_dataset("train", 400))
    assert trainer.num_generations == GROUP
    trainer.train()
    test = load_dataset("test", 800)
    before = score_edits(edit_dataset(partial(trainer.sample_edits, adapter=False), test), test)
    after = score_edits(edit_dataset(trainer.sample_edits, test), test)
    return paired_difference(before, after)


@pytest.mark.slow
def test_a_short_run_improves_the_policy(tmp_path):
    difference, error = train_and_compare(RuleScorer(), tmp_path)
    assert difference > 5 * error


@pytest.mark.slow
def test_shuffled_rewards_do_not(tmp_path):
    scorer, rng = RuleScorer(), np.random.default_rng(0)

    def shuffled(**columns):
        return rng.permuted(np.array(scorer(**columns)).reshape(-1, GROUP), axis=1).flatten().tolist()

    difference, error = train_and_compare(shuffled, tmp_path)
    assert difference < 2 * error
