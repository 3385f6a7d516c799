"""Rolling a policy out: from conditions to final latents and, for the trained steps, what training needs."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn

from ..flow.dynamics import log_prob, transition
from .edit_policy import EditConditions, EditPolicy, bucketed


DECODED_PIXELS = 512 * 512  # of all images that are decoded together


@dataclass
class Trajectory:
    """
    One sample's path through the trained steps.

    Args:
        sigmas (`torch.Tensor` of shape `(num_inference_steps + 1,)`):
            The noise levels of this sample's own schedule, stored because they depend on its size.
        steps (`range`):
            The stochastic steps. Step `i` goes from `sigmas[i]` to `sigmas[i + 1]`.
        latents (`torch.Tensor` of shape `(len(steps) + 1, num_tokens, num_channels)`):
            float32 latents before each of those steps and after the last. Empty where no step is stochastic.
        log_probs (`torch.Tensor` of shape `(len(steps),)`):
            Log-probability of each of those steps under the policy that took it.
        means (`torch.Tensor` of shape `(len(steps), num_tokens, num_channels)`):
            float32 means that those steps' next latents were drawn around. Empty unless `keep_means` was set.
        final (`torch.Tensor` of shape `(num_tokens, num_channels)`):
            float32 latents at noise level 0.
    """

    sigmas: torch.Tensor
    steps: range
    latents: torch.Tensor
    log_probs: torch.Tensor
    means: torch.Tensor
    final: torch.Tensor


@torch.no_grad()
def rollout(
    policy: EditPolicy,
    model: nn.Module,
    conditions: list[EditConditions],
    generators: list[torch.Generator],
    *,
    num_inference_steps: int,
    true_cfg_scale: float,
    batch_size: int,
    dynamics: str = "ode",
    noise_level: float = 0.0,
    steps: range = range(0),
    keep_means: bool = False,
) -> list[Trajectory]:
    """
    Samples one edit per entry of `conditions`.

    Samples are batched with others of exactly their sizes. All randomness of a sample comes from its own generator, so
    a sample does not depend on which others share its batch.

    Args:
        policy ([`EditPolicy`]):
            The policy.
        model (`torch.nn.Module`):
            Its transformer, possibly wrapped, in evaluation mode.
        conditions (`list[EditConditions]`):
            One entry per sample; a case that is sampled several times is repeated.
        generators (`list[torch.Generator]`):
            CPU generators, one per sample.
        num_inference_steps (`int`):
            Number of denoising steps.
        true_cfg_scale (`float`):
            Guidance scale; at 1.0 and below there is no unconditional pass.
        batch_size (`int`):
            Largest number of samples denoised together.
        dynamics (`str`, *optional*, defaults to `"ode"`):
            Dynamics of the stochastic steps, see [`~hp_edit_trl.flow.dynamics.transition`].
        noise_level (`float`, *optional*, defaults to `0.0`):
            Noise level of the stochastic steps.
        steps (`range`, *optional*, defaults to `range(0)`):
            The consecutive steps that are stochastic. All others follow the ODE and are not stored.
        keep_means (`bool`, *optional*, defaults to `False`):
            Whether the trajectories hold the means of those steps, which take as much memory as the latents.

    Returns:
        `list[Trajectory]`, in the order of `conditions`, on the policy's device.
    """
    trajectories: dict[int, Trajectory] = {}
    for members in bucketed(conditions, batch_size):
        first = conditions[members[0]]
        shape = (first.num_tokens, first.num_channels)

        def noise(members=members, shape=shape) -> torch.Tensor:
            return torch.stack([torch.randn(shape, generator=generators[i]) for i in members]).to(policy.device)

        batch = policy.collate([conditions[i] for i in members])
        sigmas = policy.sigmas(num_inference_steps, first)
        latents = noise()
        stored: list[torch.Tensor] = []
        log_probs: list[torch.Tensor] = []
        means: list[torch.Tensor] = []
        for step in range(num_inference_steps):
            velocity = policy.velocity(model, latents, sigmas[step], batch, true_cfg_scale)
            if step not in steps:
                latents, _ = transition("ode", latents, velocity, sigmas[step], sigmas[step + 1], 0.0, sigmas[1])
                continue
            mean, std = transition(dynamics, latents, velocity, sigmas[step], sigmas[step + 1], noise_level, sigmas[1])
            stored.append(latents)
            if keep_means:
                means.append(mean)
            latents = mean + std * noise()
            log_probs.append(log_prob(dynamics, latents, mean, std))
            if step == steps[-1]:
                stored.append(latents)
        for row, index in enumerate(members):
            trajectories[index] = Trajectory(
                sigmas=sigmas,
                steps=steps,
                latents=torch.stack([x[row] for x in stored]) if stored else latents.new_empty((0, *shape)),
                log_probs=torch.stack([x[row] for x in log_probs]) if stored else latents.new_empty(0),
                means=torch.stack([x[row] for x in means]) if means else latents.new_empty((0, *shape)),
                final=latents[row],
            )
    return [trajectories[index] for index in range(len(conditions))]


def decode(
    policy: EditPolicy, latents: list[torch.Tensor], conditions: list[EditConditions], batch_size: int
) -> list[Image.Image]:
    """
    Decodes final latents to PIL images, in the order of `conditions`. At most `batch_size` images of one size are
    decoded together, and fewer if they have more than 512² pixels together: the decoder's activations are the largest
    allocation of a rollout, 1 GiB for each image of 512 x 512 with Qwen-Image-Edit.
    """
    images: dict[int, Image.Image] = {}
    with policy.loaded("vae"):
        for members in bucketed(conditions, batch_size):
            first = conditions[members[0]]
            together = max(1, DECODED_PIXELS // (first.height * first.width))
            for start in range(0, len(members), together):
                part = members[start : start + together]
                decoded = policy.decode(torch.stack([latents[i] for i in part]), first)
                images.update(zip(part, decoded, strict=True))
    return [images[index] for index in range(len(conditions))]
