import math

import pytest
import torch

from hp_edit_trl.flow.nft import FLOOR, awm_loss, nft_loss, optimality


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_optimality_is_a_half_for_the_mean_and_clipped():
    advantages = torch.tensor([-7.0, -5.0, -1.0, 0.0, 2.5, 5.0, 9.0])
    assert optimality(advantages, 5.0).tolist() == pytest.approx([0.0, 0.0, 0.4, 0.5, 0.75, 1.0, 1.0])
    assert optimality(torch.tensor([0.5]), 0.5).item() == 1.0


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.5])
def test_the_loss_is_that_of_the_paper_sample_by_sample(beta):
    velocity, old, clean, noise = (draw(3, 4, 2, seed=seed) for seed in range(4))
    sigmas, optimal = torch.tensor([0.9, 0.4, 0.05]).double(), torch.tensor([0.0, 0.7, 1.0]).double()
    expected = []
    for v, v_old, x, e, s, r in zip(velocity, old, clean, noise, sigmas.tolist(), optimal.tolist(), strict=True):
        noisy = (1 - s) * x + s * e
        loss = 0.0
        for share, implicit in ((r, (1 - beta) * v_old + beta * v), (1 - r, (1 + beta) * v_old - beta * v)):
            errors = [((n - s * i) - c).item() for n, i, c in zip(*(t.flatten() for t in (noisy, implicit, x)))]  # noqa: B905
            loss += share * sum(error**2 for error in errors) / sum(abs(error) for error in errors)
        expected.append(loss)
    losses = nft_loss(velocity, old, clean, noise, sigmas, optimal, beta)
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    single = nft_loss(*(t.float() for t in (velocity, old, clean, noise, sigmas, optimal)), beta)
    assert single.tolist() == pytest.approx(expected, rel=1e-5)


def test_at_the_old_policy_the_gradient_is_the_advantage_times_that_of_the_flow_loss():
    # Of A_max / beta times the loss: neither of the two options changes it, and the mean of a group has none.
    old, clean, noise = (draw(3, 4, 2, seed=seed) for seed in range(3))
    sigmas, advantages = torch.tensor([0.9, 0.4, 0.05]).double(), torch.tensor([-1.5, 0.0, 2.0]).double()
    error = sigmas[:, None, None] * (noise - clean - old)
    weight = error.abs().mean((1, 2), keepdim=True)
    expected = advantages[:, None, None] * 2 * error * -sigmas[:, None, None] / (weight * clean[0].numel())
    for beta, clip in ((1.0, 5.0), (0.1, 3.0)):
        velocity = old.clone().requires_grad_()
        losses = nft_loss(velocity, old, clean, noise, sigmas, optimality(advantages, clip), beta)
        (losses * clip / beta).sum().backward()
        torch.testing.assert_close(velocity.grad, expected)


def test_the_best_velocity_is_the_one_of_the_papers_theorem():
    # Two samples that cannot be told apart, at +1 and -1, of which the first is optimal and the second is not. The
    # theorem: v = v_old + 2 / beta * alpha * (v_positive - v_old), with alpha the share of optimal samples, 1/2.
    clean, noisy, sigma, beta = torch.tensor([[1.0], [-1.0]]).double(), 0.3, 0.5, 0.4
    noise = (noisy - (1 - sigma) * clean) / sigma
    old = torch.full_like(clean, noisy / sigma)  # it predicts their mean, 0
    best = old + 2 / beta * 0.5 * ((noisy - 1) / sigma - old)
    optimal, sigmas = torch.tensor([1.0, 0.0]).double(), torch.full((2,), sigma).double()

    def loss(velocity):
        return nft_loss(velocity, old, clean, noise, sigmas, optimal, beta).sum().item()

    assert loss(best) == pytest.approx(0, abs=1e-12)
    assert min(loss(best + 0.1), loss(best - 0.1), loss(old)) > 0.01


def test_a_perfect_prediction_has_a_finite_loss_and_gradient():
    clean, noise = draw(1, 4, 2), draw(1, 4, 2, seed=1)
    velocity = (noise - clean).requires_grad_()
    loss = nft_loss(velocity, noise - clean, clean, noise, torch.ones(1), torch.ones(1), 1.0)
    loss.sum().backward()
    assert loss.item() == 0 and not velocity.grad.any()
    slightly = nft_loss(noise - clean + FLOOR / 10, noise - clean, clean, noise, torch.ones(1), torch.ones(1), 1.0)
    assert slightly.item() == pytest.approx(FLOOR / 100)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_awm_is_the_likelihood_ratio_times_the_advantage_sample_by_sample(beta):
    velocity, old, clean, noise = (draw(3, 4, 2, seed=seed) for seed in range(4))
    sigmas, advantages = torch.tensor([0.9, 0.4, 0.05]).double(), torch.tensor([-1.0, 0.4, 1.0]).double()
    expected = []
    for v, v_old, x, e, s, a in zip(velocity, old, clean, noise, sigmas.tolist(), advantages.tolist(), strict=True):

        def mean_square(one, other):
            return sum((p - q) ** 2 for p, q in zip(one.flatten().tolist(), other.flatten().tolist())) / 8  # noqa: B905

        old_error, error = mean_square(v_old, e - x), mean_square(v, e - x)
        ratio = math.exp(4 * s * math.sqrt(math.sqrt(old_error))) / math.exp(4 * s * math.sqrt(math.sqrt(error)))
        expected.append(-a * ratio + beta * mean_square(v, v_old))
    losses = awm_loss(velocity, old, clean, noise, sigmas, advantages, beta)
    assert losses.tolist() == pytest.approx(expected, rel=1e-8)
    single = awm_loss(*(t.float() for t in (velocity, old, clean, noise, sigmas, advantages)), beta)
    assert single.tolist() == pytest.approx(expected, rel=1e-4)


def test_at_the_old_policy_awm_has_the_direction_of_the_flow_loss_and_that_of_nft():
    old, clean, noise = (draw(3, 4, 2, seed=seed) for seed in range(3))
    sigmas, advantages = torch.tensor([0.9, 0.4, 0.05]).double(), torch.tensor([-1.0, 0.0, 0.4]).double()
    gradients = []
    for loss, values in ((awm_loss, advantages), (nft_loss, optimality(advantages, 1.0))):
        velocity = old.clone().requires_grad_()
        loss(velocity, old, clean, noise, sigmas, values, 1.0).sum().backward()
        gradients.append(velocity.grad.flatten(1))
    error = (old - (noise - clean)).flatten(1)
    for gradient in gradients:
        assert not gradient[1].any()  # the mean of a group
        assert torch.cosine_similarity(gradient[0], error[0], dim=0).item() == pytest.approx(-1)
        assert torch.cosine_similarity(gradient[2], error[2], dim=0).item() == pytest.approx(1)
    # A sigma e ** (-3/4) times the gradient of the flow-matching error e
    scale = advantages * sigmas * error.square().mean(1) ** -0.75
    torch.testing.assert_close(gradients[0], scale[:, None] * 2 * error / 8)


def test_a_perfect_prediction_of_awm_has_a_finite_gradient():
    clean, noise = draw(1, 4, 2), draw(1, 4, 2, seed=1)
    velocity = (noise - clean).requires_grad_()
    loss = awm_loss(velocity, noise - clean, clean, noise, torch.ones(1), torch.ones(1), 1.0)
    loss.sum().backward()
    assert loss.item() == -1 and not velocity.grad.any()
