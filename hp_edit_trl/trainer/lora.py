"""The LoRA that is trained: what may be trained, its wrapper around the transformer, and its files."""

import copy
import functools
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedConfig

from ..policies import EditPolicy


def check_peft_config(peft_config: LoraConfig | None) -> None:
    """
    Raises an error for a LoRA that could be trained but not loaded afterwards.

    Args:
        peft_config ([`~peft.LoraConfig`], *optional*):
            The user's configuration.

    Raises:
        `TypeError`: If it is not a `LoraConfig`.
        `ValueError`: If it has dropout, trains biases, trains whole modules besides the LoRA, or its initialization
            changes the base model.
    """
    if peft_config is None:
        return
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(f"peft_config must be a LoraConfig, but is a {type(peft_config).__name__}.")
    if peft_config.lora_dropout:
        raise ValueError(
            f"lora_dropout={peft_config.lora_dropout} must be 0: with dropout, the trained policy differs from the "
            "policy that samples and from the reference."
        )
    if peft_config.bias != "none":
        raise ValueError(f"bias={peft_config.bias!r} must be 'none': diffusers does not load biases with a LoRA.")
    if peft_config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"init_lora_weights={peft_config.init_lora_weights!r} may change the weights of the base model, which the "
            "LoRA would then not fit: use True or 'gaussian'."
        )
    if peft_config.modules_to_save:
        raise ValueError(
            f"modules_to_save={peft_config.modules_to_save} must be empty: diffusers does not load whole modules with "
            "a LoRA."
        )


def prepare_lora(policy: EditPolicy, peft_config: LoraConfig | None, base_model: str, seed: int) -> PeftModel:
    """
    Wraps the policy's transformer with the LoRA that is to be trained.

    Args:
        policy ([`EditPolicy`]):
            The policy. The adapter is injected into its pipeline's transformer.
        peft_config ([`~peft.LoraConfig`], *optional*):
            The user's configuration; it is not modified. By default the paper's rank of 32 with an alpha of 64.
        base_model (`str`):
            Hub id or folder of the pipeline, written into the saved files.
        seed (`int`):
            Seed of the LoRA's initial weights.

    Raises:
        `ValueError`: If the transformer has an adapter already, or `target_modules` match nothing.
    """
    transformer = policy.pipeline.transformer
    if hasattr(transformer, "peft_config"):
        raise ValueError(
            "The pipeline's transformer has a LoRA loaded already. Call `pipeline.fuse_lora()` and "
            "`pipeline.unload_lora_weights()` first to train on top of it."
        )
    config = (
        copy.deepcopy(peft_config)
        if peft_config is not None
        else LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian")
    )
    config.task_type = None  # PEFT's task types are for language models
    if config.target_modules is None:
        config.target_modules = policy.lora_target_modules
    if config.exclude_modules is None:
        config.exclude_modules = policy.lora_exclude_modules
    if not isinstance(config.target_modules, str):
        names = [f".{name}" for name, _ in transformer.named_modules()]
        unknown = [t for t in config.target_modules if not any(name.endswith(f".{t}") for name in names)]
        if unknown:
            raise ValueError(
                f"target_modules={sorted(unknown)} match no module of {type(transformer).__name__}. Leave "
                "target_modules out for the modules that the policy names."
            )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = get_peft_model(transformer, config)
        except ValueError as error:
            raise ValueError(
                f"No LoRA with target_modules={config.target_modules!r} can be put on a {type(transformer).__name__}: "
                f"{str(error).strip()} Leave target_modules out for the modules that the policy names."
            ) from error
    config.base_model_name_or_path = base_model  # `get_peft_model` resets it
    # Trainer wants a transformers config, and a diffusers model has a FrozenDict.
    model.config = PreTrainedConfig(**dict(transformer.config))
    model.config._name_or_path = base_model

    # PEFT would look for resized token embeddings, and ask the Hub for the base model's config.json to find out.
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)

    def enable_checkpointing(*args: Any, **kwargs: Any) -> None:
        transformer.enable_gradient_checkpointing()

    # The name that Trainer looks for, and its former name
    model.activation_checkpointing_enable = model.gradient_checkpointing_enable = enable_checkpointing
    return model


def save_lora(policy: EditPolicy, model: PeftModel, folder: str) -> None:
    """
    Saves the LoRA as `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(folder)` reads.

    Args:
        policy ([`EditPolicy`]):
            The policy, for its pipeline's class.
        model ([`~peft.PeftModel`]):
            The trained model.
        folder (`str`):
            Where to save it.
    """
    state_dict = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name.removeprefix("base_model.model."): weight for name, weight in state_dict.items()}
    # Without this metadata diffusers takes alpha to be r, silently. The modules are named one by one: diffusers does
    # not know of those that were excluded.
    adapted = sorted({name.rpartition(".lora_")[0] for name in weights})
    config = {**model.peft_config["default"].to_dict(), "target_modules": adapted, "exclude_modules": None}
    type(policy.pipeline).save_lora_weights(
        folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=config
    )
