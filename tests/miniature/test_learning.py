"""The whole method: rewards that mean something improve the policy, and the same rewards shuffled do not."""

from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from experiments import make_trainer

from hp_edit_trl.miniature import RuleScorer, edit_dataset, load_dataset, score_edits
from hp_edit_trl.policies.qwen_image_edit import QwenImageEditPlusPolicy
from hp_edit_trl.utils.statistics import paired_difference


CONFIG = Path(__file__).parents[2] / "examples" / "miniature" / "experiment.yaml"
GROUP = 12


@pytest.fixture(scope="module", autouse=True)
def encoded_once():
    """The test cases are encoded once for all evaluations: the encoders are not trained."""
    encode, known = QwenImageEditPlusPolicy.encode, {}

    def remember(self, images, prompt, *args):
        key = (*[image.tobytes() for image in images], prompt, *args)
        if key not in known:
            known[key] = encode(self, images, prompt, *args)
        return known[key]

    with mock.patch.object(QwenImageEditPlusPolicy, "encode", remember):
        yield


training_cases = cache(partial(load_dataset, "train", 400))


def trainer_of(reward, folder):
    options = {"max_steps": 20, "save_strategy": "no", "disable_tqdm": True}
    return make_trainer(CONFIG, options, folder, 0, reward, training_cases())


@pytest.fixture(scope="module")
def test_cases():
    return load_dataset("test", 400)


@pytest.fixture(scope="module")
def before(test_cases, tmp_path_factory):
    """Scores before training, the same for both."""
    trainer = trainer_of(RuleScorer(), tmp_path_factory.mktemp("before"))
    return score_edits(edit_dataset(partial(trainer.sample_edits, adapter=False), test_cases), test_cases)


def train_and_compare(reward, folder, test_cases, before):
    trainer = trainer_of(reward, folder)
    assert trainer.num_generations == GROUP
    trainer.train()
    return paired_difference(before, score_edits(edit_dataset(trainer.sample_edits, test_cases), test_cases))


@pytest.mark.slow
def test_a_short_run_improves_the_policy(tmp_path, test_cases, before):
    difference, error = train_and_compare(RuleScorer(), tmp_path, test_cases, before)
    assert difference > 3 * error


@pytest.mark.slow
def test_shuffled_rewards_do_not(tmp_path, test_cases, before):
    scorer, rng = RuleScorer(), np.random.default_rng(0)

    def shuffled(**columns):
        return rng.permuted(np.array(scorer(**columns)).reshape(-1, GROUP), axis=1).flatten().tolist()

    difference, error = train_and_compare(shuffled, tmp_path, test_cases, before)
    assert difference < 2 * error
