import numpy as np
import pytest
import torch

from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.policies import QwenImageEditPlusPolicy, decode, rollout
from hp_edit_trl.utils.seeding import seeded_generator
from tests.helpers import photo


@pytest.fixture(scope="module")
def policy():
    return QwenImageEditPlusPolicy(tiny_pipeline())


def roll(policy, conditions, **kwargs):
    options = dict(num_inference_steps=4, true_cfg_scale=1.0, batch_size=4, dynamics="flow_sde", noise_level=0.7)
    return rollout(
        policy,
        policy.pipeline.transformer.eval(),
        conditions,
        [seeded_generator(i) for i in range(len(conditions))],
        **{**options, "steps": range(1, 3), **kwargs},
    )


def test_large_images_are_decoded_in_smaller_batches(policy, monkeypatch):
    conditions = [policy.encode([photo(64, 64)], "x", None, 64)] * 5
    latents = [path.final for path in roll(policy, conditions)]
    sizes = []
    real = policy.decode
    monkeypatch.setattr(policy, "decode", lambda batch, first: sizes.append(len(batch)) or real(batch, first))
    together = decode(policy, latents, conditions, 4)
    assert sizes == [4, 1]
    for pixels, expected in ((2 * 64 * 64, [2, 2, 1]), (100, [1] * 5)):
        sizes.clear()
        monkeypatch.setitem(decode.__globals__, "DECODED_PIXELS", pixels)
        apart = decode(policy, latents, conditions, 4)
        assert sizes == expected
        for one, other in zip(together, apart, strict=True):
            assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1


def test_means_are_kept_on_demand(policy):
    conditions = [policy.encode([photo(64, 64)], "x", None, 64)]
    (without,), (path,) = roll(policy, conditions), roll(policy, conditions, keep_means=True)
    assert without.means.numel() == 0 and without.latents.equal(path.latents)
    assert path.means.shape == (2, *path.final.shape)
    assert torch.isfinite(path.means).all() and not path.means[0].equal(path.latents[1])
