import math

import pytest
import torch

from hp_edit_trl.flow.dynamics import (
    kl_divergence,
    log_prob,
    noise_weight,
    normalized_log_ratio,
    sde_window,
    transition,
)


SIGMAS = torch.tensor([1.0, 0.92, 0.71, 0.43, 0.02, 0.0], dtype=torch.float64)
STOCHASTIC = ["flow_sde", "dance_sde", "cps"]


def gaussian_velocity(x, sigma, mean, std):
    """E[noise - x0 | x] for x0 ~ N(mean, std²), in closed form."""
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    residual = (x - (1 - sigma) * mean) / variance
    x0 = mean + (1 - sigma) * std**2 * residual
    noise = sigma * residual
    return noise - x0


@pytest.mark.parametrize("dynamics", ["ode", *STOCHASTIC])
def test_marginals_of_the_ode_are_kept(dynamics):
    # Every dynamics is a sampler of the same flow: with the exact velocity of Gaussian data and many steps, the
    # samples have the data's mean and standard deviation, whatever noise is added on the way.
    mean, std, steps, n = 0.7, 0.5, 400, 60_000
    # CPS adds an amount of noise per step, not per time, so its noise level has to shrink as the steps get finer.
    noise_level = 3 / math.sqrt(steps) if dynamics == "cps" else 0.7
    generator = torch.Generator().manual_seed(0)
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    x = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    halfway = None
    for i in range(steps):
        velocity = gaussian_velocity(x, sigmas[i], mean, std)
        # The last step is always deterministic, as in a rollout.
        name = dynamics if i < steps - 1 else "ode"
        mu, scale = transition(name, x, velocity, sigmas[i], sigmas[i + 1], noise_level, sigmas[1])
        x = mu + scale * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if i == steps // 2 - 1:
            halfway = x.clone()
    assert x.mean().item() == pytest.approx(mean, abs=0.015)
    assert x.std().item() == pytest.approx(std, abs=0.015)
    expected = math.sqrt(0.25 * std**2 + 0.25)
    assert halfway.mean().item() == pytest.approx(0.5 * mean, abs=0.015)
    assert halfway.std().item() == pytest.approx(expected, abs=0.02)


def test_cps_keeps_the_noise_level_exactly_at_any_number_of_steps():
    # Where the clean image is known (data concentrated in one point), CPS is exact: x = (1 - sigma) x0 + sigma noise.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60_000, 1, generator=generator, dtype=torch.float64)
    for sigma, sigma_next in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
        velocity = gaussian_velocity(x, sigma, 0.7, 0.0)
        mu, scale = transition("cps", x, velocity, sigma, sigma_next, 0.8, SIGMAS[1])
        x = mu + scale * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        assert x.mean().item() == pytest.approx((1 - sigma_next.item()) * 0.7, abs=0.015)
        assert x.std().item() == pytest.approx(sigma_next.item(), abs=0.015)


@pytest.mark.parametrize("dynamics", STOCHASTIC)
def test_no_noise_is_the_ode(dynamics):
    x, v = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    mean, std = transition(dynamics, x, v, 0.7, 0.5, 0.0, 0.9)
    torch.testing.assert_close(mean, x + v * (0.5 - 0.7))
    assert std == 0


def test_flow_sde_formula_at_the_first_step():
    # At sigma 1 the coefficient is taken at the schedule's second noise level; worked out by hand.
    x, v = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[-0.5]], dtype=torch.float64)
    mean, std = transition("flow_sde", x, v, 1.0, 0.9, 0.7, 0.9)
    rate = 0.49 * 1.0 / 0.1
    assert mean.item() == pytest.approx(2.0 * (1 + rate / 2 * -0.1) + -0.5 * -0.1)
    assert std.item() == pytest.approx(math.sqrt(rate * 0.1))


@pytest.mark.parametrize("dynamics", STOCHASTIC)
@pytest.mark.parametrize("step", [0, 1, 3])
def test_log_prob_against_torch_distributions(dynamics, step):
    generator = torch.Generator().manual_seed(step)
    x, v = (torch.randn(3, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    mean, std = transition(dynamics, x, v, SIGMAS[step], SIGMAS[step + 1], 0.8, SIGMAS[1])
    drawn = mean + std * torch.randn(mean.shape, generator=generator, dtype=torch.float64)
    reference = torch.distributions.Normal(mean, std).log_prob(drawn)
    if dynamics == "cps":  # its authors leave out the scale and the constant
        reference = (reference + torch.log(std) + 0.5 * math.log(2 * math.pi)) * 2 * std**2
    torch.testing.assert_close(
        log_prob(dynamics, drawn, mean, std), reference.flatten(1).mean(1), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("dynamics", STOCHASTIC)
@pytest.mark.parametrize("step", [0, 1, 3])
def test_normalized_log_ratio_against_torch_distributions(dynamics, step):
    generator = torch.Generator().manual_seed(step)
    x, v, v_new = (torch.randn(3, 6, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    old_mean, std = transition(dynamics, x, v, SIGMAS[step], SIGMAS[step + 1], 0.8, SIGMAS[1])
    mean, _ = transition(dynamics, x, v_new, SIGMAS[step], SIGMAS[step + 1], 0.8, SIGMAS[1])
    drawn = old_mean + std * torch.randn(mean.shape, generator=generator, dtype=torch.float64)
    new, old = torch.distributions.Normal(mean, std), torch.distributions.Normal(old_mean, std)
    log_ratio = (new.log_prob(drawn) - old.log_prob(drawn)).flatten(1).mean(1)
    expected = std * (log_ratio + ((mean - old_mean) ** 2).flatten(1).mean(1) / (2 * std**2))
    torch.testing.assert_close(normalized_log_ratio(drawn, mean, old_mean, std), expected)


def test_the_normalized_log_ratio_has_no_drift():
    generator = torch.Generator().manual_seed(0)
    old_mean, std = torch.zeros(20_000, 4), torch.tensor(0.3)
    drawn = old_mean + std * torch.randn(old_mean.shape, generator=generator)
    normalized = normalized_log_ratio(drawn, old_mean + 0.2, old_mean, std)
    plain = log_prob("flow_sde", drawn, old_mean + 0.2, std) - log_prob("flow_sde", drawn, old_mean, std)
    error = normalized.std() / len(normalized) ** 0.5
    assert abs(normalized.mean()) < 4 * error
    assert plain.mean() < -0.2  # the left shift that clipping then misses


@pytest.mark.parametrize("dynamics", STOCHASTIC)
def test_kl_against_torch_distributions(dynamics):
    generator = torch.Generator().manual_seed(0)
    x, v, v_ref = (torch.randn(3, 6, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    mean, std = transition(dynamics, x, v, SIGMAS[1], SIGMAS[2], 0.8, SIGMAS[1])
    mean_ref, _ = transition(dynamics, x, v_ref, SIGMAS[1], SIGMAS[2], 0.8, SIGMAS[1])
    normal = torch.distributions.Normal
    reference = torch.distributions.kl_divergence(normal(mean, std), normal(mean_ref, std))
    torch.testing.assert_close(kl_divergence(mean, mean_ref, std), reference.flatten(1).mean(1))


@pytest.mark.parametrize("dynamics", ["ode", *STOCHASTIC])
def test_half_precision_inputs_are_computed_in_float32(dynamics):
    x, v = torch.randn(2, 5, 4).bfloat16(), torch.randn(2, 5, 4).bfloat16()
    mean, std = transition(dynamics, x, v, 0.7, 0.5, 0.7, 0.9)
    expected, _ = transition(dynamics, x.double(), v.double(), 0.7, 0.5, 0.7, 0.9)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6)


def test_unknown_dynamics_and_ode_log_prob():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="flow_sde, dance_sde, cps, ode"):
        transition("sde", x, x, 0.5, 0.4, 0.7, 0.9)
    with pytest.raises(ValueError, match="deterministic"):
        log_prob("ode", x, x, torch.zeros(()))


@pytest.mark.parametrize("dynamics", STOCHASTIC)
def test_the_weight_of_a_step_is_its_share_of_the_noise(dynamics):
    weights = [noise_weight(dynamics, SIGMAS, step, (0, 3), 0.8) for step in range(3)]
    x = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stds = [transition(dynamics, x, x, SIGMAS[k], SIGMAS[k + 1], 0.8, SIGMAS[1])[1] for k in range(3)]
    assert sum(weights).item() == pytest.approx(3)
    for weight, std in zip(weights, stds, strict=True):
        assert (weight / weights[0]).item() == pytest.approx((std / stds[0]).item())


def test_windows():
    assert sde_window("fixed", 2, (1, 5), 7) == range(1, 3)
    assert [sde_window("sliding", 2, (0, 4), g).start for g in range(5)] == [0, 1, 2, 0, 1]
    drawn = {sde_window("random", 2, (0, 4), 0, torch.Generator().manual_seed(s)).start for s in range(50)}
    assert drawn == {0, 1, 2}
    again = sde_window("random", 2, (0, 4), 0, torch.Generator().manual_seed(3))
    assert again == sde_window("random", 2, (0, 4), 9, torch.Generator().manual_seed(3))
    with pytest.raises(ValueError, match=r"window of 4 steps does not fit into the steps \[1, 4\)"):
        sde_window("fixed", 4, (1, 4), 0)
    with pytest.raises(ValueError, match="'fixed', 'random' or 'sliding'"):
        sde_window("jumping", 1, (0, 4), 0)
