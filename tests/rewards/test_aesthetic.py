import pytest

from hp_edit_trl.miniature.tiny import tiny_clip, tiny_judge
from hp_edit_trl.rewards import AestheticReward
from tests.rewards.helpers import call


def test_the_probability_of_the_good_prompt(tmp_path):
    reward = AestheticReward(tiny_clip(str(tmp_path)), batch_size=2)
    reward.load()
    rewards, metrics, _ = call(reward, 3, image=None)
    assert len(set(rewards)) == 3 and all(0 < one < 1 for one in rewards)
    assert metrics["aesthetic"] == pytest.approx(sum(rewards) / 3)
    assert call(AestheticReward(str(tmp_path)), 3)[0] == pytest.approx(rewards, abs=1e-5)  # whatever the batches
    assert reward([], []) == []


def test_another_model(tmp_path):
    with pytest.raises(ValueError, match="model=.* is a model of type qwen3_vl: name a CLIP model"):
        AestheticReward(tiny_judge(str(tmp_path))).load()
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        AestheticReward(batch_size=0)
