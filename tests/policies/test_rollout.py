import math

import numpy as np
import pytest
import torch

from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.policies import EditConditions, QwenImageEditPlusPolicy, decode, rollout
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


class Oscillator:
    """Velocities that lead around a circle: `dx/dsigma` turns the two channels of a token. Its solution is known."""

    device = torch.device("cpu")
    has_prefix = False

    def sigmas(self, num_inference_steps, conditions):
        return torch.linspace(1, 0, num_inference_steps + 1)

    def collate(self, conditions):
        return {}

    def velocity(self, model, latents, sigma, batch, true_cfg_scale):
        return 3 * torch.stack([-latents[..., 1], latents[..., 0]], dim=-1)


def test_finishing_steps_are_of_second_order():
    conditions = [EditConditions(16, 16, 50, 2, (), {})]
    errors = {}
    for count in (4, 8, 16, None):
        (path,) = rollout(
            Oscillator(), None, conditions, [seeded_generator(0)], num_inference_steps=40, true_cfg_scale=1.0,
            batch_size=1, dynamics="flow_sde", noise_level=0.5, steps=range(1, 4), num_finish_steps=count,
        )  # fmt: skip
        angle = -3 * path.sigmas[4].item()
        x, y = path.latents[-1].unbind(-1)
        exact = torch.stack(
            [math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y], dim=-1
        )
        errors[count] = (path.final - exact).norm().item()
    # Half as long steps, a quarter of the error
    assert errors[4] / errors[8] > 3 and errors[8] / errors[16] > 3.5
    assert errors[16] < errors[None]  # better than 36 Euler steps
    assert errors[None] > 0


def test_what_samples_of_one_start_share_is_computed_once_and_exact(policy):
    conditions = [policy.encode([photo(64, 64, seed)], f"number {seed}", None, 64) for seed in (0, 0, 1, 1)]
    starts = [seeded_generator("start", case) for case in (0, 1)]
    together = roll(policy, conditions, start_generators=[starts[0], starts[0], starts[1], starts[1]])
    for index, path in enumerate(together):
        (alone,) = rollout(
            policy, policy.pipeline.transformer, [conditions[index]], [seeded_generator(index)], batch_size=1,
            num_inference_steps=4, true_cfg_scale=1.0, dynamics="flow_sde", noise_level=0.7, steps=range(1, 3),
            start_generators=[seeded_generator("start", index // 2)],
        )  # fmt: skip
        for name in ("latents", "log_probs", "final"):
            torch.testing.assert_close(getattr(path, name), getattr(alone, name), rtol=1e-5, atol=2e-5)
    assert together[0].latents[0].equal(together[1].latents[0])
    assert not together[0].latents[1].equal(together[1].latents[1])
    assert not together[0].latents[0].equal(together[2].latents[0])
