import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from hp_edit_trl.flow.preference import draw_sigma, flow_error, implicit_reward, preference_loss, safeguard_scale
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.policies import EditConditions, QwenImageEditPlusPolicy


MARGINS = [-30.0, -1.5, -1e-3, 0.0, 0.25, 0.5, 1.0, 4.0, 30.0]


def test_flow_error_is_a_mean_over_each_sample():
    generator = torch.Generator().manual_seed(0)
    velocity, clean, noise = (torch.randn(3, 5, 4, generator=generator) for _ in range(3))
    v, x, n = (t.double().numpy() for t in (velocity, clean, noise))
    expected = [np.mean((v[i] - (n[i] - x[i])) ** 2) for i in range(3)]
    np.testing.assert_allclose(flow_error(velocity, clean, noise), expected, rtol=1e-6)
    # A velocity with the sign or the parametrisation of another convention is not error-free, this one is.
    assert flow_error(noise - clean, clean, noise).tolist() == [0.0] * 3


def test_a_better_error_is_a_higher_reward():
    error, reference = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0])
    assert implicit_reward(error, reference, 3.0).tolist() == [0.75, 0.0, -1.5]


@pytest.mark.parametrize(
    ("loss_type", "formula", "slope"),
    [
        ("sigmoid", lambda m: np.log1p(np.exp(-m)), lambda m: -1 / (1 + np.exp(m))),
        ("ipo", lambda m: (m - 0.5) ** 2, lambda m: 2 * m - 1),
        ("hinge", lambda m: np.maximum(0, 1 - m), lambda m: np.where(m < 1, -1.0, 0.0)),
        ("sft", lambda m: 7 + np.arange(len(m)), lambda m: 0 * m),
    ],
)
def test_losses(loss_type, formula, slope):
    margin = torch.tensor(MARGINS, dtype=torch.float64, requires_grad=True)
    error = (7.0 + torch.arange(len(MARGINS), dtype=torch.float64)).requires_grad_()
    losses = preference_loss(loss_type, margin, error)
    np.testing.assert_allclose(losses.detach(), formula(np.array(MARGINS)), rtol=1e-12, atol=1e-12)
    losses.sum().backward()
    np.testing.assert_allclose(
        np.zeros(len(MARGINS)) if margin.grad is None else margin.grad,
        slope(np.array(MARGINS)),
        rtol=1e-12,
        atol=1e-12,
    )
    assert (error.grad is None or not error.grad.any()) == (loss_type != "sft")


def test_the_sigmoid_loss_neither_overflows_nor_dies_out():
    margin = torch.tensor([-5000.0, 5000.0], requires_grad=True)
    losses = preference_loss("sigmoid", margin, torch.zeros(2))
    assert losses.tolist() == [5000.0, 0.0]
    losses.sum().backward()
    assert margin.grad.tolist() == [-1.0, 0.0]


def test_the_sigmoid_loss_of_no_margin():
    assert preference_loss("sigmoid", torch.zeros(1), torch.zeros(1)).item() == pytest.approx(math.log(2), rel=1e-7)


def test_an_unknown_loss():
    with pytest.raises(ValueError, match="'dpo'"):
        preference_loss("dpo", torch.zeros(1), torch.zeros(1))


def residuals() -> tuple[torch.Tensor, torch.Tensor]:
    """Residuals at all angles and of all ratios of lengths, as pairs (chosen, rejected)."""
    generator = torch.Generator().manual_seed(1)
    common, own = torch.randn(2, 400, 6, 4, generator=generator)
    mix = torch.linspace(-1, 1, 400)[:, None, None]
    length = torch.logspace(-2, 2, 7).repeat(58)[:400, None, None]
    return common, length * (mix * common + (1 - mix.abs()) * own)


def test_the_safeguard_keeps_the_chosen_edit_and_no_more_than_that():
    chosen, rejected = residuals()
    scale = safeguard_scale(chosen, rejected)
    assert scale.shape == (400,)
    w, r, s = chosen.flatten(1).double().numpy(), rejected.flatten(1).double().numpy(), scale.double().numpy()
    assert (s >= 0).all() and (s <= 1).all()
    # To first order, a step along -(g_w - scale * g_l) does not raise the chosen edit's error ...
    change = -(w * (w - s[:, None] * r)).sum(1)
    assert (change <= 1e-5 * (w * w).sum(1)).all()
    # ... and where something was taken away, it was just enough.
    tight = s < 1
    assert 50 < tight.sum() < 350
    np.testing.assert_allclose(change[tight] / (w * w).sum(1)[tight], 0, atol=1e-5)
    # Without it the error would have risen there, and only there.
    unguarded = -(w * (w - r)).sum(1)
    assert (unguarded[tight] > 0).all() and (unguarded[~tight] <= 1e-5 * (w * w).sum(1)[~tight]).all()


def test_a_guarded_step_does_not_raise_the_chosen_error():
    # The outputs themselves take the step: the errors are those of velocity less target.
    chosen, rejected = (t.clone().requires_grad_() for t in residuals())
    errors = chosen.square().flatten(1).mean(1), rejected.square().flatten(1).mean(1)
    g_w, g_l = torch.autograd.grad(errors[0].sum() + errors[1].sum(), [chosen, rejected])
    scale = safeguard_scale(chosen, rejected)[:, None, None]

    def rise(step):
        return (chosen - 1e-4 * step).square().flatten(1).mean(1) / errors[0] - 1

    assert (rise(g_w - g_l) > 1e-6).sum() > 50
    assert rise(g_w - scale * g_l).max() < 1e-6


def test_the_safeguard_on_the_edges():
    x = torch.tensor([[1.0, 2.0, -1.0]])
    assert safeguard_scale(x, -5 * x).item() == 1.0  # they do not get in each other's way
    assert safeguard_scale(x, x).item() == 1.0
    assert safeguard_scale(x, 4 * x).item() == pytest.approx(0.25)
    assert safeguard_scale(x, torch.tensor([[0.0, 1.0, 2.0]])).item() == 1.0  # at a right angle
    for chosen, rejected in [(0 * x, x), (x, 0 * x), (0 * x, 0 * x), (1e-25 * x, 1e-25 * x), (1e-25 * x, x)]:
        scale = safeguard_scale(chosen, rejected).item()
        assert 0 <= scale <= 1, (chosen, rejected)  # and not nan


def test_the_safeguard_has_no_gradient():
    chosen, rejected = (t.clone().requires_grad_() for t in residuals())
    assert not safeguard_scale(chosen, rejected).requires_grad


def conditions(height: int, width: int) -> EditConditions:
    return EditConditions(height, width, height * width // 256, 16, (), {})


def shifted(u, num_tokens: int, steps: int):
    """Qwen-Image's noise level at position u in closed form: exponential shift, then stretched to end at 0.02."""
    mu = 0.5 + (0.9 - 0.5) * (num_tokens - 256) / (8192 - 256)

    def shift(t):
        return math.exp(mu) / (math.exp(mu) + 1 / t - 1)

    return 1 - (1 - shift(u)) * (1 - 0.02) / (1 - shift(1 / steps))


def draws(schedule, sampling: str, count: int = 3000, **kwargs) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return np.array([draw_sigma(schedule, sampling, generator, **kwargs).item() for _ in range(count)])


def ks_distance(values, cdf) -> float:
    """Kolmogorov-Smirnov distance of values from a distribution."""
    expected, steps = cdf(np.sort(values)), np.arange(len(values) + 1) / len(values)
    return max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())


@pytest.mark.parametrize("side", [64, 1024, 2048])
@pytest.mark.parametrize(
    ("sampling", "options", "cdf"),
    [
        ("uniform", {}, lambda u: u),
        ("logit_normal", {}, lambda u: Normal(0.0, 1.0).cdf(torch.from_numpy(u).logit()).numpy()),
        (
            "logit_normal",
            dict(logit_mean=0.8, logit_std=0.4),
            lambda u: Normal(0.8, 0.4).cdf(torch.from_numpy(u).logit()).numpy(),
        ),
    ],
)
def test_draws_are_shifted_as_the_schedule_is(side, sampling, options, cdf):
    case, steps = conditions(side, side), 40
    schedule = QwenImageEditPlusPolicy(tiny_pipeline()).sigmas(steps, case)
    sigmas = draws(schedule, sampling, **options)
    assert sigmas.min() >= 0 and sigmas.max() <= 1
    # The closed form is increasing in u, so each draw has one position, and positions have the distribution asked for.
    grid = np.linspace(1e-4, 1, 20_000)
    inner = grid[grid >= 1 / steps]
    curve = np.concatenate([0.02 * steps * grid[grid < 1 / steps], shifted(inner, case.num_tokens, steps)])
    positions = np.interp(sigmas, curve, grid)
    assert ks_distance(positions, cdf) < 1.63 / math.sqrt(len(sigmas))  # 99 %
    # It would be seen if the shift were left out, or another image size's.
    assert ks_distance(sigmas, cdf) > 0.07
    other = 64 if side > 1024 else 2048
    assert (
        ks_distance(np.interp(shifted(positions, conditions(other, other).num_tokens, steps), curve, grid), cdf) > 0.03
    )


def test_a_draw_is_between_the_steps_and_the_generators_own():
    schedule = torch.tensor([1.0, 0.9, 0.4, 0.0])
    before = torch.get_rng_state()
    first, second = (draws(schedule, "logit_normal", 300) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert (first == second).all() and len(set(first)) > 290
    # Each of the three steps takes a third of the positions, from the noisy end.
    tail = Normal(0, 1).cdf(torch.tensor(1 / 2).log()).item()
    shares = [(first <= 0.4).mean(), ((first > 0.4) & (first <= 0.9)).mean(), (first > 0.9).mean()]
    np.testing.assert_allclose(shares, [tail, 1 - 2 * tail, tail], atol=0.08)
    sigma = draw_sigma(schedule, "uniform", torch.Generator().manual_seed(0))
    assert sigma.shape == () and sigma.dtype == torch.float32


def test_a_higher_logit_mean_is_noisier():
    schedule = torch.linspace(1, 0, 11)
    low, high = (draws(schedule, "logit_normal", 200, logit_mean=mean) for mean in (-2.0, 2.0))
    assert np.median(low) < 0.2 and np.median(high) > 0.8
    narrow = draws(schedule, "logit_normal", 200, logit_std=1e-3)
    np.testing.assert_allclose(narrow, 0.5, atol=2e-3)


def test_the_ends_of_the_schedule_can_be_drawn():
    # A position that is rounded to 0 or 1 lies on the last or the first step, and not beyond.
    schedule = torch.tensor([1.0, 0.7, 0.0])
    generator = torch.Generator().manual_seed(0)
    assert draw_sigma(schedule, "logit_normal", generator, logit_mean=200.0).item() == 1.0
    assert draw_sigma(schedule, "logit_normal", generator, logit_mean=-200.0).item() == 0.0
