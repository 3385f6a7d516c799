"""Reward functions of the package in a training: gates, tournaments, and what is said where they are missing."""

import numpy as np
import pytest
from peft import LoraConfig

from hp_edit_trl import FlowGRPOEditTrainer
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.rewards import Gate, IdentityReward, TournamentReward
from tests.helpers import make_cases, make_config, redness
from tests.rewards.helpers import AnswersJudge, images_of


def redder(conversation):
    first, second = (np.asarray(image, dtype=float)[..., 0].mean() for image in images_of(conversation)[-2:])
    return float(first > second)


def test_a_tournament_and_a_gate_in_a_training(tmp_path):
    judge = AnswersJudge(redder)
    tournament = TournamentReward(judge)
    trainer = FlowGRPOEditTrainer(
        tiny_pipeline(),
        [tournament, Gate(redness, IdentityReward(None), threshold=2.0)],  # which no edit can pass
        make_config(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1, logging_steps=1),
        make_cases(4, sizes=((64, 64),)),
        make_cases(2, sizes=((64, 64),)),
        peft_config=LoraConfig(r=2),
    )
    assert judge.loaded == 3
    trainer.train()
    logs = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    assert logs["rewards/TournamentReward/mean"] == pytest.approx(0.5)
    assert logs["rewards/gated_redness/mean"] == 0 and logs["gate_closed"] == 1
    assert logs["frac_reward_zero_std"] == 0 and logs["pair_agreement"] == 1
    # A case has one edit there: the tournament does not apply, and the other reward counts alone
    assert logs["eval_reward"] == 0 and logs["eval_frac_reward_missing"] == 0
    assert "eval_rewards/TournamentReward/mean" not in logs


def test_a_tournament_needs_whole_groups(tmp_path):
    args = make_config(tmp_path)
    args.per_device_train_batch_size = 3  # as if other processes sampled the rest of a group
    with pytest.raises(ValueError, match="TournamentReward compares the edits of a case"):
        FlowGRPOEditTrainer(tiny_pipeline(), TournamentReward(AnswersJudge(redder)), args, make_cases(4))
