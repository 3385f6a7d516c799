"""
One denoising step as a Gaussian transition, and what policy gradients need of it.

Convention, everywhere in this library (it is that of diffusers): `sigma` is the noise level in [0, 1], a noisy latent
is `x = (1 - sigma) * x0 + sigma * noise`, a model predicts the velocity `v = noise - x0`, and a step goes from `sigma`
to a smaller `sigma_next`, so that `dt = sigma_next - sigma` is negative. The clean estimate is `x0 = x - sigma * v`,
the noise estimate `x + (1 - sigma) * v`.

All functions compute in float32, or in float64 if they are given float64, whatever the type of the model: the ratio of
two log-probabilities is of order 1 + 1e-5 and does not survive half precision.
"""

import math

import torch


DYNAMICS = ("flow_sde", "dance_sde", "cps", "ode")


def transition(
    dynamics: str,
    latents: torch.Tensor,
    velocity: torch.Tensor,
    sigma: torch.Tensor | float,
    sigma_next: torch.Tensor | float,
    noise_level: float,
    sigma_max: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Mean and standard deviation of the next latents, `x_next ~ N(mean, std²)`.

    With \\( s \\) the diffusion coefficient, \\( \eta \\) the `noise_level` and \\( \sigma' \\) the next noise level:

    - `flow_sde`, equation (6) of HP-Edit and of [Flow-GRPO](https://huggingface.co/papers/2505.05470), with
      \\( s = \eta \sqrt{\sigma / (1 - \sigma)} \\):
      mean \\( x (1 + \frac{s^2}{2\sigma} dt) + v (1 + \frac{s^2 (1 - \sigma)}{2\sigma}) dt \\), std
      \\( s \sqrt{-dt} \\). At \\( \sigma = 1 \\), where \\( s \\) diverges, `sigma_max` takes the place of
      \\( \sigma \\) under the root.
    - `dance_sde`, [DanceGRPO](https://huggingface.co/papers/2505.07818), with a constant \\( s = \eta \\):
      mean \\( x + (v + \frac{\eta^2}{2} \frac{x - (1 - \sigma) \hat x_0}{\sigma^2}) dt \\), std
      \\( \eta \sqrt{-dt} \\).
    - `cps`, coefficients-preserving sampling ([Flow-CPS](https://huggingface.co/papers/2509.05952)), with
      \\( s = \sigma' \sin(\eta\pi/2) \\): mean
      \\( (1 - \sigma') \hat x_0 + \sqrt{\sigma'^2 - s^2} \, \hat\epsilon \\), std \\( s \\). It adds noise per step,
      not per time: with many steps the same \\( \eta \\) is far more noise.
    - `ode`, the Euler step of the pipeline's own scheduler: mean \\( x + v \, dt \\), std 0.

    Args:
        dynamics (`str`):
            One of `"flow_sde"`, `"dance_sde"`, `"cps"` and `"ode"`.
        latents (`torch.Tensor`):
            Latents at `sigma`, of any shape.
        velocity (`torch.Tensor`):
            The model's prediction `noise - x0` at `latents`, of the same shape.
        sigma (`torch.Tensor` or `float`):
            Noise level of `latents`; a scalar, or a tensor that broadcasts against `latents`.
        sigma_next (`torch.Tensor` or `float`):
            Noise level after the step, smaller than `sigma`.
        noise_level (`float`):
            How much noise the step adds (\\( \eta \\)). 0 makes every dynamics the ODE.
        sigma_max (`torch.Tensor` or `float`):
            The largest noise level below 1 of the schedule in use (`sigmas[1]`). Only read by `flow_sde` at
            `sigma = 1`. It depends on the image's size, so it has to come from the schedule of the very sample.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the mean, shaped as `latents`, and the std, a scalar or shaped as `sigma`.

    Raises:
        `ValueError`: If `dynamics` is not known.
    """
    dtype = torch.promote_types(latents.dtype, torch.float32)
    x, v = latents.to(dtype), velocity.to(dtype)
    sigma = torch.as_tensor(sigma, dtype=dtype, device=x.device)
    sigma_next = torch.as_tensor(sigma_next, dtype=dtype, device=x.device)
    dt = sigma_next - sigma

    if dynamics == "ode":
        return x + v * dt, torch.zeros_like(sigma)
    if dynamics == "flow_sde":
        sigma_max = torch.as_tensor(sigma_max, dtype=dtype, device=x.device)
        variance_rate = noise_level**2 * sigma / (1 - torch.where(sigma >= 1, sigma_max, sigma))
        drift = variance_rate / (2 * sigma)
        mean = x * (1 + drift * dt) + v * (1 + drift * (1 - sigma)) * dt
        return mean, torch.sqrt(-dt * variance_rate)
    if dynamics == "dance_sde":
        score_term = (x - (1 - sigma) * (x - sigma * v)) / sigma**2
        return x + (v + 0.5 * noise_level**2 * score_term) * dt, noise_level * torch.sqrt(-dt)
    if dynamics == "cps":
        std = sigma_next * math.sin(noise_level * math.pi / 2)
        clean, noise = x - sigma * v, x + (1 - sigma) * v
        return clean * (1 - sigma_next) + noise * torch.sqrt(sigma_next**2 - std**2), std
    raise ValueError(f"Unknown dynamics {dynamics!r}: use one of {', '.join(DYNAMICS)}.")


def log_prob(dynamics: str, next_latents: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    r"""
    Log-probability of a step, averaged over the latent's dimensions.

    The mean rather than the sum, as in every public Flow-GRPO trainer: clip ranges such as 1e-4 only make sense with
    it. For `cps` it is \\( -\overline{(x' - \mu)^2} \\), without the density's scale and constant, as its authors
    define it.

    Args:
        dynamics (`str`):
            The dynamics that made `mean` and `std`; not `"ode"`, whose steps have no density.
        next_latents (`torch.Tensor` of shape `(batch_size, ...)`):
            The latents that were drawn.
        mean (`torch.Tensor` of shape `(batch_size, ...)`):
            Mean of the transition.
        std (`torch.Tensor`):
            Standard deviation of the noise that was added; broadcasts against `mean`.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    if dynamics == "ode":
        raise ValueError("A step of the ODE is deterministic and has no log-probability.")
    squared = (next_latents.to(mean.dtype) - mean) ** 2
    if dynamics == "cps":
        return -squared.flatten(1).mean(1)
    density = -squared / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def normalized_log_ratio(
    next_latents: torch.Tensor, mean: torch.Tensor, old_mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    r"""
    Logarithm of the ratio of two transitions of the same standard deviation, normalized as in
    [GRPO-Guard](https://huggingface.co/papers/2510.22319) (equation 8 there), averaged over the latent's dimensions.

    The plain log-ratio is \\( (\overline{2 \, \delta (x' - \mu_\text{old})} - \overline{\delta^2}) / (2 \,
    \text{std}^2) \\) with \\( \delta = \mu - \mu_\text{old} \\): its expectation is below 0, and its spread depends on
    the step's `std`. Adding back the second term and multiplying by `std` gives \\( \overline{\delta \, \epsilon} \\)
    with the noise \\( \epsilon \\) that was drawn, whose expectation is 0 at every step.

    Args:
        next_latents (`torch.Tensor` of shape `(batch_size, ...)`):
            The latents that were drawn.
        mean (`torch.Tensor` of shape `(batch_size, ...)`):
            Mean of the policy's transition.
        old_mean (`torch.Tensor` of shape `(batch_size, ...)`):
            Mean of the transition that they were drawn from.
        std (`torch.Tensor`):
            Standard deviation of the noise that was added; broadcasts against `mean`.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    noise = (next_latents.to(mean.dtype) - old_mean) / std
    return ((mean - old_mean) * noise).flatten(1).mean(1)


def kl_divergence(mean: torch.Tensor, mean_ref: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    r"""
    KL divergence between two transitions of the same standard deviation, averaged over the latent's dimensions:
    \\( \overline{(\mu - \mu_\text{ref})^2} / (2 \, \text{std}^2) \\), where `std` is that of the noise really added,
    the factor \\( \sqrt{-dt} \\) included.

    Args:
        mean (`torch.Tensor` of shape `(batch_size, ...)`):
            Mean of the policy's transition.
        mean_ref (`torch.Tensor` of shape `(batch_size, ...)`):
            Mean of the reference's transition from the same latents.
        std (`torch.Tensor`):
            Their common standard deviation; broadcasts against `mean`.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    return ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(1).mean(1)


def noise_weight(
    dynamics: str, sigmas: torch.Tensor, step: int, window_range: tuple[int, int], noise_level: float
) -> torch.Tensor:
    """
    Weight of a step by the noise that it adds, as in [TempFlow-GRPO](https://huggingface.co/papers/2508.04324): the
    standard deviation of its transition, divided by the mean of those of all steps that a window may cover.

    Args:
        dynamics (`str`):
            Dynamics of the stochastic steps, see [`transition`].
        sigmas (`torch.Tensor` of shape `(num_inference_steps + 1,)`):
            The schedule.
        step (`int`):
            The step, in `window_range`.
        window_range (`tuple[int, int]`):
            First step and end (exclusive) of the steps that a window may cover.
        noise_level (`float`):
            Noise level of the stochastic steps.

    Returns:
        `torch.Tensor`: a scalar. Over the steps of `window_range` its mean is 1.
    """
    start, stop = window_range
    levels = sigmas[start : stop + 1]
    stds = transition(dynamics, levels[:-1], levels[:-1], levels[:-1], levels[1:], noise_level, sigmas[1])[1]
    return stds[step - start] / stds.mean()


def sde_window(
    mode: str, size: int, window_range: tuple[int, int], generation: int, generator: torch.Generator | None = None
) -> range:
    """
    Which steps of a rollout are stochastic and trained; all others follow the ODE. One window holds for a whole
    generation batch: windows drawn per request make runs collapse.

    Args:
        mode (`str`):
            `"fixed"`: always the first position; `"random"`: a position drawn anew for each generation batch;
            `"sliding"`: one step further with each generation batch, from the start again after the last position.
        size (`int`):
            Number of steps in the window.
        window_range (`tuple[int, int]`):
            First step and end (exclusive) of the steps that a window may cover.
        generation (`int`):
            Index of the generation batch.
        generator (`torch.Generator`, *optional*):
            Source of the draw, needed for `"random"`.

    Returns:
        `range`: the indices of the stochastic steps.

    Raises:
        `ValueError`: If the window does not fit into the range, or `mode` is not known.
    """
    start, stop = window_range
    positions = stop - start - size + 1
    if positions < 1:
        raise ValueError(f"An SDE window of {size} steps does not fit into the steps [{start}, {stop}).")
    if mode == "fixed":
        offset = 0
    elif mode == "random":
        offset = int(torch.randint(positions, (1,), generator=generator))
    elif mode == "sliding":
        offset = generation % positions
    else:
        raise ValueError(f"Unknown SDE window mode {mode!r}: use 'fixed', 'random' or 'sliding'.")
    return range(start + offset, start + offset + size)
