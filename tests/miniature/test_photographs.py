"""The path of real input: photographs of several sizes, a judge in the process, a second reward."""

import math

import numpy as np
import pytest
from peft import LoraConfig

from hp_edit_trl import FlowGRPOEditTrainer, HPScorerReward, TransformersJudge
from hp_edit_trl.miniature.photographs import load_photographs
from hp_edit_trl.miniature.tiny import tiny_judge, tiny_pipeline
from tests.helpers import make_config


def warmth(completions, **columns):
    """How much red outweighs blue, from -1 to 1."""
    pixels = [np.asarray(image, dtype=float) / 255 for image in completions]
    return [float(image[..., 0].mean() - image[..., 2].mean()) for image in pixels]


@pytest.mark.slow
def test_photographs_and_a_judge(tmp_path):
    photographs = load_photographs()
    assert len({image.size for image in photographs["image"]}) == 4
    # A random judge hardly ever means to answer with a digit; its scores are taken all the same.
    judge = TransformersJudge(tiny_judge(str(tmp_path / "judge")), "expected", min_digit_mass=0.0)
    args = make_config(
        tmp_path / "run", num_generations=4, per_device_train_batch_size=8, gradient_accumulation_steps=1,
        max_steps=12, learning_rate=1e-2, reward_weights=[0.0, 1.0], eval_strategy="steps", eval_steps=12,
        eval_on_start=True, resolution=64,
    )  # fmt: skip
    trainer = FlowGRPOEditTrainer(
        tiny_pipeline(), [HPScorerReward(judge), warmth], args, photographs, photographs,
        peft_config=LoraConfig(r=8, lora_alpha=16),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    before, after = (log["eval_reward"] for log in trainer.state.log_history if "eval_reward" in log)
    assert after > before + 0.002
    assert all(math.isfinite(log["rewards/HPScorerReward/mean"]) for log in trainer.state.log_history if "loss" in log)
    assert (tmp_path / "run" / "before_after.png").exists()
