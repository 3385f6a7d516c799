"""Noise levels of a rollout, set exactly as the diffusers pipeline would set them."""

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler


def pipeline_sigmas(
    scheduler: FlowMatchEulerDiscreteScheduler,
    num_inference_steps: int,
    num_tokens: int,
    mu: float | None = None,
    noise_levels: list[float] | None = None,
) -> torch.Tensor:
    """
    The noise levels that a pipeline with dynamic shifting visits.

    The shift grows with the number of noisy tokens, so images of different sizes have different schedules.

    Args:
        scheduler ([`~diffusers.FlowMatchEulerDiscreteScheduler`]):
            The pipeline's scheduler. It is not modified.
        num_inference_steps (`int`):
            Number of denoising steps.
        num_tokens (`int`):
            Number of packed latent tokens of the target image, the references not counted.
        mu (`float`, *optional*):
            The shift. By default it grows linearly with `num_tokens`, as most pipelines have it.
        noise_levels (`list[float]`, *optional*):
            Those before the shift. By default at equal distances.

    Returns:
        `torch.Tensor` of shape `(num_inference_steps + 1,)`: decreasing, the last one 0; float32 on the CPU.
    """
    config = scheduler.config
    if mu is None:
        shifts = config["max_shift"] - config["base_shift"]
        slope = shifts / (config["max_image_seq_len"] - config["base_image_seq_len"])
        mu = num_tokens * slope + config["base_shift"] - slope * config["base_image_seq_len"]
    fresh = FlowMatchEulerDiscreteScheduler.from_config(config)
    even = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
    fresh.set_timesteps(sigmas=even if noise_levels is None else noise_levels, mu=mu)
    return fresh.sigmas.to("cpu", torch.float32)


def resampled(sigmas: torch.Tensor, num_steps: int) -> torch.Tensor:
    """
    A schedule with fewer steps that begins and ends at the same noise levels: those at equal distances along the given
    one, between whose levels it interpolates linearly.

    Args:
        sigmas (`torch.Tensor` of shape `(n,)`):
            Noise levels.
        num_steps (`int`):
            Number of steps between them.

    Returns:
        `torch.Tensor` of shape `(num_steps + 1,)`.
    """
    places = np.linspace(0, len(sigmas) - 1, num_steps + 1)
    levels = np.interp(places, np.arange(len(sigmas)), sigmas.numpy())
    return torch.from_numpy(levels).to(sigmas.dtype)
