"""
Losses on the forward process of flow matching: DiffusionNFT's, with how optimal a sample is, and that of Advantage
Weighted Matching.
"""

import torch


LOSS_TYPES = ["nft", "awm"]
FLOOR = 1e-5  # of the mean absolute error that a loss is divided by
POWER = 0.25  # of the flow-matching error in AWM's log-likelihood
SHIFT = 1e-10  # of that error, whose root would have no gradient at 0


def optimality(advantages: torch.Tensor, adv_clip_max: float) -> torch.Tensor:
    r"""
    The optimality probability of samples, \\( r = \frac{1}{2} + \frac{1}{2} \mathrm{clip}(A / A_{max}, -1, 1) \\)
    ([DiffusionNFT](https://huggingface.co/papers/2509.16117)).

    Args:
        advantages (`torch.Tensor` of shape `(batch_size,)`):
            Group-relative advantages \\( A \\).
        adv_clip_max (`float`):
            The advantage \\( A_{max} \\) from which a sample counts as optimal.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, in [0, 1].
    """
    return 0.5 + 0.5 * (advantages / adv_clip_max).clamp(-1, 1)


def nft_loss(
    velocity: torch.Tensor,
    old_velocity: torch.Tensor,
    clean: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    optimal: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    r"""
    Loss of the implicit policies of [DiffusionNFT](https://huggingface.co/papers/2509.16117) on the forward process.

    At \\( x_\sigma = (1 - \sigma) x_0 + \sigma \epsilon \\) the velocities of the implicit positive and negative
    policy are \\( v^+ = (1 - \beta) v_{old} + \beta v \\) and \\( v^- = (1 + \beta) v_{old} - \beta v \\). With the
    sample that each predicts, \\( \hat x_0(v) = x_\sigma - \sigma v \\), the loss is

    $$ r\, \frac{\overline{(\hat x_0(v^+) - x_0)^2}}{w^+} + (1 - r)\, \frac{\overline{(\hat x_0(v^-) - x_0)^2}}{w^-} $$

    where bars are means over the dimensions of a sample, and \\( w^\pm = \overline{|\hat x_0(v^\pm) - x_0|} \\) (at
    least 1e-5), without gradient, takes the place of a weight for each noise level.

    Args:
        velocity (`torch.Tensor` of shape `(batch_size, ...)`):
            The policy's prediction \\( v \\) of `noise - clean`.
        old_velocity (`torch.Tensor` of shape `(batch_size, ...)`):
            That of the policy that sampled, without gradient.
        clean (`torch.Tensor` of shape `(batch_size, ...)`):
            The samples \\( x_0 \\).
        noise (`torch.Tensor` of shape `(batch_size, ...)`):
            Gaussian noise \\( \epsilon \\).
        sigmas (`torch.Tensor` of shape `(batch_size,)`):
            Noise levels.
        optimal (`torch.Tensor` of shape `(batch_size,)`):
            \\( r \\), see [`optimality`].
        beta (`float`):
            How far the implicit policies are from the old one.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    sigmas = sigmas.view(-1, *[1] * (clean.ndim - 1))

    def loss(implicit: torch.Tensor) -> torch.Tensor:
        error = (sigmas * (noise - clean - implicit)).flatten(1)  # x_sigma - sigma v - x_0
        weight = error.detach().abs().mean(1).clamp(min=FLOOR)
        return error.square().mean(1) / weight

    positive = torch.lerp(old_velocity, velocity, beta)
    negative = torch.lerp(old_velocity, velocity, -beta)
    return optimal * loss(positive) + (1 - optimal) * loss(negative)


def awm_loss(
    velocity: torch.Tensor,
    old_velocity: torch.Tensor,
    clean: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    advantages: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    r"""
    Loss of [Advantage Weighted Matching](https://huggingface.co/papers/2509.25050) on the forward process, with the
    weighting of its authors' code.

    The flow-matching error \\( e(v) = \overline{(v - (\epsilon - x_0))^2} \\), a mean over the dimensions of a sample,
    stands in for the likelihood: \\( \log p(v) = -4 \sigma \, e(v)^{1/4} \\). With the advantage \\( A \\) the loss is

    $$ -A \, \frac{p(v)}{p(v_{old})} + \beta \, \overline{(v - v_{old})^2} $$

    Their code also clips the ratio, to [0, 2] in its recipes; here it is not clipped.

    Args:
        velocity (`torch.Tensor` of shape `(batch_size, ...)`):
            The policy's prediction \\( v \\) of `noise - clean`.
        old_velocity (`torch.Tensor` of shape `(batch_size, ...)`):
            That of the policy that sampled, without gradient.
        clean (`torch.Tensor` of shape `(batch_size, ...)`):
            The samples \\( x_0 \\).
        noise (`torch.Tensor` of shape `(batch_size, ...)`):
            Gaussian noise \\( \epsilon \\).
        sigmas (`torch.Tensor` of shape `(batch_size,)`):
            Noise levels.
        advantages (`torch.Tensor` of shape `(batch_size,)`):
            Group-relative advantages, scaled to [-1, 1].
        beta (`float`):
            Weight of the difference to the policy that sampled.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """

    def log_likelihood(predicted: torch.Tensor) -> torch.Tensor:
        error = (predicted - (noise - clean)).square().flatten(1).mean(1)
        return -sigmas / POWER * ((error + SHIFT) ** POWER - SHIFT**POWER)

    ratio = torch.exp(log_likelihood(velocity) - log_likelihood(old_velocity))
    return -advantages * ratio + beta * (velocity - old_velocity).square().flatten(1).mean(1)
