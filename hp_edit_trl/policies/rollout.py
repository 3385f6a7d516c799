"""Rolling a policy out: from conditions to final latents and, for the trained steps, what training needs."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..flow.dynamics import log_prob, transition
from ..flow.schedule import resampled
from .edit_policy import EditConditions, EditPolicy, bucketed
from .prefixes import Prefixes


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
def rollout_batches(
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
    start_generators: list[torch.Generator] | None = None,
    num_finish_steps: int | None = None,
    keep_means: bool = False,
) -> Iterator[tuple[list[int], list[Trajectory]]]:
    """
    Samples one edit per entry of `conditions`, batch by batch.

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
        start_generators (`list[torch.Generator]`, *optional*):
            CPU generators of the noise that the samples start from. Samples of a case that have the same one share
            it, and what they have in common is computed once: the steps before the first stochastic one, and the
            prediction there. By default `generators`.
        num_finish_steps (`int`, *optional*):
            Number of steps after the stochastic ones, if it is smaller than the number of those left: they lead
            through the same noise levels with an Adams-Bashforth method of second order. By default those of the
            schedule, by Euler's method.
        keep_means (`bool`, *optional*, defaults to `False`):
            Whether the trajectories hold the means of the stochastic steps, which take as much memory as the latents.

    Yields:
        `tuple[list[int], list[Trajectory]]`: the places of a batch's samples in `conditions`, and their trajectories,
        on the policy's device.
    """
    start_generators = generators if start_generators is None else start_generators
    leaders: dict[torch.Generator, int] = {}  # the first sample that has the generator
    for index, generator in enumerate(start_generators):
        leaders.setdefault(generator, index)
    begin, end = (steps.start, steps.stop) if steps else (num_inference_steps, num_inference_steps)

    def follow_ode(latents, sigmas, batch, second_order=False) -> torch.Tensor:
        last: tuple[torch.Tensor, torch.Tensor] | None = None  # prediction and length of the step before
        for sigma, sigma_next in pairwise(sigmas):
            velocity = slope = policy.velocity(model, latents, sigma, batch, true_cfg_scale)
            if second_order and last is not None:
                slope = velocity + (velocity - last[0]) * ((sigma_next - sigma) / (2 * last[1])).to(velocity.device)
            latents, _ = transition("ode", latents, slope, sigma, sigma_next, 0.0, 1.0)
            last = velocity, sigma_next - sigma
        return latents

    # Latents at the first stochastic step and the prediction there, by the number of the leader
    first_steps: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    prefixes, batches = Prefixes(policy, true_cfg_scale), bucketed(conditions, batch_size)
    for number, members in enumerate(batches):
        first = conditions[members[0]]
        batch = before = prefixes.added(policy.collate([conditions[index] for index in members]), model)
        sigmas = policy.sigmas(num_inference_steps, first)
        starts = [leaders[start_generators[index]] for index in members]
        new = [index for index in dict.fromkeys(starts) if index not in first_steps]
        if new:
            if new != members:
                before = prefixes.added(policy.collate([conditions[index] for index in new]), model)
            latents = torch.stack([_noise(start_generators[index], first) for index in new]).to(policy.device)
            latents = follow_ode(latents, sigmas[: begin + 1], before)
            velocity = policy.velocity(model, latents, sigmas[begin], before, true_cfg_scale) if steps else latents
            first_steps.update(zip(new, zip(latents, velocity, strict=True), strict=True))
        latents, velocity = (torch.stack(part) for part in zip(*(first_steps[i] for i in starts), strict=True))
        stored: list[torch.Tensor] = [latents]
        log_probs: list[torch.Tensor] = []
        means: list[torch.Tensor] = []
        for step in steps:
            if step > begin:
                velocity = policy.velocity(model, latents, sigmas[step], batch, true_cfg_scale)
            mean, std = transition(dynamics, latents, velocity, sigmas[step], sigmas[step + 1], noise_level, sigmas[1])
            noise = torch.stack([_noise(generators[index], first) for index in members]).to(policy.device)
            latents = mean + std * noise
            stored.append(latents)
            log_probs.append(log_prob(dynamics, latents, mean, std))
            if keep_means:
                means.append(mean)
        rest = sigmas[end:]
        if num_finish_steps is not None and num_finish_steps < len(rest) - 1:
            latents = follow_ode(latents, resampled(rest, num_finish_steps), batch, second_order=True)
        else:
            latents = follow_ode(latents, rest, batch)
        prefixes.keep(conditions[index] for later in batches[number + 1 :] for index in later)
        batch = before = {}  # or the prefixes would be held while edits are decoded
        none = latents.new_empty((0, *latents.shape[1:]))
        yield (
            members,
            [
                Trajectory(
                    sigmas=sigmas,
                    steps=steps,
                    latents=torch.stack([x[row] for x in stored]) if steps else none,
                    log_probs=torch.stack([x[row] for x in log_probs]) if steps else latents.new_empty(0),
                    means=torch.stack([x[row] for x in means]) if means else none,
                    final=latents[row],
                )
                for row in range(len(members))
            ],
        )


def rollout(*args: Any, **kwargs: Any) -> list[Trajectory]:
    """Samples as [`rollout_batches`] does, with its arguments. Returns all trajectories in the order of the cases."""
    trajectories: dict[int, Trajectory] = {}
    for members, batch in rollout_batches(*args, **kwargs):
        trajectories.update(zip(members, batch, strict=True))
    return [trajectories[index] for index in range(len(trajectories))]


def _noise(generator: torch.Generator, conditions: EditConditions) -> torch.Tensor:
    return torch.randn((conditions.num_tokens, conditions.num_channels), generator=generator)


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
