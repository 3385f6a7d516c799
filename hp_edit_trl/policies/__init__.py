"""Diffusers edit pipelines as RL policies."""

from diffusers import DiffusionPipeline

from ..utils.hub import check_reachable, hub_options
from .components import check_components
from .edit_policy import EditConditions, EditPolicy, Example, bucketed
from .flux2_klein import Flux2KleinPolicy
from .flux_kontext import FluxKontextPolicy
from .long_prompts import check_prompt_lengths
from .longcat_image import LongCatImageEditPolicy
from .prefixes import Prefixes
from .qwen_image_21 import QwenImage21Policy
from .qwen_image_edit import QwenImageEditPlusPolicy, QwenImageEditPolicy
from .rollout import Trajectory, decode, rollout, rollout_batches


# The pipelines that can be trained, by the class name in their `model_index.json`.
POLICIES: dict[str, type[EditPolicy]] = {
    "QwenImageEditPlusPipeline": QwenImageEditPlusPolicy,
    "QwenImageEditPipeline": QwenImageEditPolicy,
    "FluxKontextPipeline": FluxKontextPolicy,
    "Flux2KleinPipeline": Flux2KleinPolicy,
    "LongCatImageEditPipeline": LongCatImageEditPolicy,
    "QwenImage21Pipeline": QwenImage21Policy,
}


def policy_class(model: str | DiffusionPipeline, **kwargs) -> type[EditPolicy]:
    """
    Finds the policy for a pipeline, and checks that its components are those of its class. Only `model_index.json` is
    read, no weights.

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            Hub id, local folder, or a loaded pipeline.
        **kwargs:
            Passed to [`~diffusers.DiffusionPipeline.load_config`], e.g. `revision`.

    Raises:
        `FileNotFoundError`, `ConnectionError`: See [`~hp_edit_trl.utils.hub.check_reachable`].
        `ValueError`: If the model cannot be read as a pipeline, there is no policy for its class, or a component is
            missing or of another class.
    """
    if isinstance(model, str):
        check_reachable(model, **hub_options(kwargs))
        try:
            index = DiffusionPipeline.load_config(model, **kwargs)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model={model!r} is not a diffusers pipeline: neither a local folder nor a Hub repository with a "
                f"readable model_index.json ({error})."
            ) from error
        name, told = index.get("_class_name"), f"model={model!r}"
    else:
        index, name = model, type(model).__name__
        told = f"This {name}"
    if name not in POLICIES:
        raise ValueError(
            f"model={model if isinstance(model, str) else name!r} is a {name}, which is not an edit pipeline that "
            f"can be trained here. Known are: {', '.join(POLICIES)}. docs/adding_a_policy.md shows how to add one."
        )
    check_components(name, index, told)
    return POLICIES[name]


__all__ = [
    "POLICIES",
    "EditConditions",
    "EditPolicy",
    "Example",
    "Flux2KleinPolicy",
    "FluxKontextPolicy",
    "LongCatImageEditPolicy",
    "Prefixes",
    "QwenImage21Policy",
    "QwenImageEditPlusPolicy",
    "QwenImageEditPolicy",
    "Trajectory",
    "bucketed",
    "check_components",
    "check_prompt_lengths",
    "decode",
    "policy_class",
    "rollout",
    "rollout_batches",
]
