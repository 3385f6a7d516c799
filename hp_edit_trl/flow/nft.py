"""DiffusionNFT for flow matching: how optimal a sample is, and the loss of the two implicit policies."""

import torch


FLOOR = 1e-5  # of the mean absolute error that a loss is divided by


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
