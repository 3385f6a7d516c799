"""Diffusion-DPO for flow matching: errors of a velocity, implicit rewards, losses of a pair, noise levels."""

import torch
from torch.nn import functional as F


def flow_error(velocity: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    r"""
    Squared error of a velocity, \\( e = \overline{(v - (\epsilon - x_0))^2} \\), a mean over all dimensions of a
    sample.

    Args:
        velocity (`torch.Tensor` of shape `(batch_size, ...)`):
            The prediction of `noise - clean` at `(1 - sigma) * clean + sigma * noise`.
        clean (`torch.Tensor` of shape `(batch_size, ...)`):
            Latents at noise level 0.
        noise (`torch.Tensor` of shape `(batch_size, ...)`):
            Gaussian noise.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    return (velocity - (noise - clean)).square().flatten(1).mean(1)


def implicit_reward(error: torch.Tensor, reference_error: torch.Tensor, beta: float) -> torch.Tensor:
    r"""
    The reward that a policy implies against its reference, \\( r = -\frac{\beta}{2} (e_\theta - e_{ref}) \\): how much
    better it has become at denoising a sample ([Diffusion-DPO](https://huggingface.co/papers/2311.12908), equation
    14).

    Args:
        error (`torch.Tensor` of shape `(batch_size,)`):
            The policy's [`flow_error`].
        reference_error (`torch.Tensor` of shape `(batch_size,)`):
            The reference's, with the same noise and noise level.
        beta (`float`):
            Scale.
    """
    return -0.5 * beta * (error - reference_error)


def preference_loss(loss_type: str, margin: torch.Tensor, chosen_error: torch.Tensor) -> torch.Tensor:
    r"""
    Loss of each pair. With the margin \\( m = r_w - r_l \\) of its implicit rewards:

    | `loss_type` | loss |
    |---|---|
    | `"sigmoid"` | \\( -\log \sigma(m) \\) |
    | `"ipo"` | \\( (m - \frac{1}{2})^2 \\), which is \\( \beta^2 (\frac{m}{\beta} - \frac{1}{2 \beta})^2 \\) |
    | `"hinge"` | \\( \max(0, 1 - m) \\) |
    | `"sft"` | \\( e_\theta(w) \\) |

    Args:
        loss_type (`str`):
            `"sigmoid"`, `"ipo"`, `"hinge"` or `"sft"`.
        margin (`torch.Tensor` of shape `(num_pairs,)`):
            Implicit reward of the chosen edit less that of the rejected one.
        chosen_error (`torch.Tensor` of shape `(num_pairs,)`):
            The policy's [`flow_error`] of the chosen edit.

    Returns:
        `torch.Tensor` of shape `(num_pairs,)`.
    """
    if loss_type == "sigmoid":
        return -F.logsigmoid(margin)
    if loss_type == "ipo":
        return (margin - 0.5).square()
    if loss_type == "hinge":
        return torch.relu(1 - margin)
    if loss_type == "sft":
        return chosen_error
    raise ValueError(f"loss_type={loss_type!r} is not known.")


def safeguard_scale(chosen_residual: torch.Tensor, rejected_residual: torch.Tensor) -> torch.Tensor:
    r"""
    How much of the rejected edit's gradient is left so that a step does not raise the chosen edit's error
    ([Diffusion-SDPO](https://huggingface.co/papers/2511.03317)).

    A step along \\( -(g_w - \lambda g_l) \\) changes that error by \\( -\langle g_w, g_w - \lambda g_l \rangle \\) to
    first order, which is not above 0 as long as \\( \lambda \langle g_w, g_l \rangle \le \|g_w\|^2 \\). As in the
    paper, gradients with respect to the outputs stand for those with respect to the weights; they are proportional to
    the residuals. Hence \\( \lambda = \min(1, \|g_w\|^2 / \langle g_w, g_l \rangle) \\) where the two point the same
    way, and 1 elsewhere.

    Args:
        chosen_residual (`torch.Tensor` of shape `(num_pairs, ...)`):
            Velocity less its target for the chosen edit.
        rejected_residual (`torch.Tensor` of shape `(num_pairs, ...)`):
            The same for the rejected edit.

    Returns:
        `torch.Tensor` of shape `(num_pairs,)`: in [0, 1], without gradient.
    """
    chosen, rejected = chosen_residual.detach().flatten(1), rejected_residual.detach().flatten(1)
    alignment = (chosen * rejected).sum(1)
    bound = chosen.square().sum(1) / alignment.clamp(min=torch.finfo(alignment.dtype).tiny)
    return torch.where(alignment > 0, bound.clamp(max=1.0), torch.ones_like(bound))


def draw_sigma(
    schedule: torch.Tensor, sampling: str, generator: torch.Generator, logit_mean: float = 0.0, logit_std: float = 1.0
) -> torch.Tensor:
    r"""
    Draws a noise level.

    A position \\( u \\) in (0, 1) is drawn, uniformly or as the logistic function of a normal variable, and the
    schedule is read at that place, linearly between its steps: then levels are as frequent as they are in sampling.

    Args:
        schedule (`torch.Tensor` of shape `(num_inference_steps + 1,)`):
            The policy's noise levels, decreasing from 1 to 0.
        sampling (`str`):
            `"uniform"` or `"logit_normal"`.
        generator (`torch.Generator`):
            CPU generator.
        logit_mean (`float`, *optional*, defaults to `0.0`):
            Mean of the normal variable.
        logit_std (`float`, *optional*, defaults to `1.0`):
            Its standard deviation.

    Returns:
        `torch.Tensor`: a scalar in [0, 1], float32.
    """
    if sampling == "logit_normal":
        position = torch.sigmoid(logit_mean + logit_std * torch.randn((), generator=generator))
    elif sampling == "uniform":
        position = torch.rand((), generator=generator)
    else:
        raise ValueError(f"sampling={sampling!r} is not known.")
    # u = 1 is the noisy end, where the schedule begins.
    place = (1 - position) * (len(schedule) - 1)
    index = place.floor().long().clamp(max=len(schedule) - 2)
    return torch.lerp(schedule[index], schedule[index + 1], place - index)
