"""The LoRA that is trained: what may be trained, its wrapper around the transformer, and its files."""

import copy
import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig

from ..lora_formats import Lora, exact_patterns, rank_and_alpha, write_lora
from ..policies import EditPolicy
from ..utils.quantization import check_trainable, describe_quantization


# The fields of a LoraConfig that say which modules a plain LoRA adapts, and how. Others make it something else.
PLAIN_FIELDS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "init_lora_weights", "runtime_config",
}  # fmt: skip


def check_peft_config(peft_config: LoraConfig | None) -> None:
    """
    Raises an error for a LoRA that could be trained but not loaded afterwards.

    Args:
        peft_config ([`~peft.LoraConfig`], *optional*):
            The user's configuration.

    Raises:
        `TypeError`: If it is not a `LoraConfig`.
        `ValueError`: If it has dropout, trains biases, trains whole modules besides the LoRA, its initialization
            changes the base model, it is a variant that only PEFT can load (e.g. DoRA), nothing would be trained, or
            a rank, an alpha or a pattern is not valid.
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
    initialization = peft_config.init_lora_weights
    if not isinstance(initialization, bool) and initialization not in ("gaussian", "orthogonal"):
        raise ValueError(
            f"init_lora_weights={initialization!r} may change the weights of the base model, which the "
            "LoRA would then not fit: use True or 'gaussian'."
        )
    if peft_config.modules_to_save:
        raise ValueError(
            f"modules_to_save={peft_config.modules_to_save} must be empty: diffusers does not load whole modules with "
            "a LoRA."
        )
    plain = LoraConfig()
    for field in dataclasses.fields(LoraConfig):
        value, default = getattr(peft_config, field.name), getattr(plain, field.name)
        if field.name not in PLAIN_FIELDS and value and value != default:
            raise ValueError(
                f"{field.name}={value!r} must be {default!r}: other tools cannot load the LoRA that this makes."
            )
    if peft_config.inference_mode:
        raise ValueError("inference_mode=True must be False: nothing would be trained.")
    ranks, alphas = peft_config.rank_pattern or {}, peft_config.alpha_pattern or {}
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise ValueError("rank_pattern and alpha_pattern must be dictionaries of patterns and their values.")
    for name, rank in {"r": peft_config.r, **{f"rank_pattern[{key!r}]": rank for key, rank in ranks.items()}}.items():
        if type(rank) is not int or rank < 1:
            raise ValueError(f"{name}={rank!r} must be a whole number of at least 1.")
    of_patterns = {f"alpha_pattern[{key!r}]": alpha for key, alpha in alphas.items()}
    for name, alpha in {"lora_alpha": peft_config.lora_alpha, **of_patterns}.items():
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
            raise ValueError(f"{name}={alpha!r} must be a number above 0.")
    # As PEFT uses them
    expressions = {f"rank_pattern: {key!r}": rf"(.*\.)?({key})$" for key in ranks}
    expressions |= {f"alpha_pattern: {key!r}": rf"(.*\.)?({key})$" for key in alphas}
    for option in ("target_modules", "exclude_modules"):
        if isinstance(value := getattr(peft_config, option), str):
            expressions[f"{option}: {value!r}"] = value
    for name, expression in expressions.items():
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(f"{name} is not a regular expression ({error}).") from error


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
        `ValueError`: If the transformer has an adapter already, was trained with `offload_transformer`, or is
            quantized to 8 bits by bitsandbytes, `target_modules` match nothing, or a module is not a linear layer.
    """
    transformer = policy.pipeline.transformer
    check_trainable(transformer)
    if getattr(transformer, "is_streamed", False):
        raise ValueError(
            "The pipeline was trained with offload_transformer, and blocks of its transformer still come and go: load "
            "it anew, with the LoRA that was saved."
        )
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
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        raise ValueError(
            "layers_to_transform needs target_modules as a list of names: by default those of a "
            f"{type(transformer).__name__} are a regular expression."
        )
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
        except (ValueError, TypeError, re.error) as error:
            raise ValueError(
                f"No LoRA with target_modules={config.target_modules!r} can be put on a {type(transformer).__name__}: "
                f"{str(error).strip()} Leave target_modules out for the modules that the policy names."
            ) from error
    config.base_model_name_or_path = base_model  # `get_peft_model` resets it
    layers = lora_layers(model)
    odd = [name for name, layer in layers.items() if not isinstance(layer.get_base_layer(), nn.Linear)]
    if odd:
        raise ValueError(f"target_modules: {odd[0]!r} is no linear layer, so other tools cannot load it: exclude it.")
    # PEFT takes the first pattern that matches, but files do not keep the order.
    config.rank_pattern = exact_patterns({name: layer.r["default"] for name, layer in layers.items()}, config.r)
    config.alpha_pattern = exact_patterns(
        {name: layer.lora_alpha["default"] for name, layer in layers.items()}, config.lora_alpha
    )
    # At its start DDP would make the weights of all processes equal, which those of torchao cannot be made. They are.
    of_torchao = [name for name, parameter in model.named_parameters() if hasattr(parameter, "__tensor_flatten__")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, of_torchao)
    # Trainer wants a transformers config, and a diffusers model has a FrozenDict.
    own = ("quantization_config", "_pre_quantization_dtype")  # objects that trackers cannot write as JSON
    model.config = PreTrainedConfig(**{k: v for k, v in dict(transformer.config).items() if k not in own})
    model.config._name_or_path = base_model

    # PEFT would look for resized token embeddings, and ask the Hub for the base model's config.json to find out.
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)

    return model


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The layers of a model that have a LoRA, by their names in the transformer."""
    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLayer)}


def check_same_lora(model: PeftModel, checkpoint: str | Path) -> None:
    """
    Checks that a checkpoint holds the LoRA that a run trains: PEFT would load weights of the same shapes whatever
    their alpha, and leave weights that are missing as they are.

    Args:
        model ([`~peft.PeftModel`]):
            The model of the run.
        checkpoint (`str` or `Path`):
            Folder of the checkpoint.

    Raises:
        `ValueError`: If a module has another rank or another scale, or only one of them has it.
    """
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted = {name: list(weight.shape) for name, weight in weights.items()}
    try:
        with safe_open(Path(checkpoint, SAFETENSORS_WEIGHTS_NAME), "pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        config = json.loads(Path(checkpoint, CONFIG_NAME).read_text(encoding="utf-8"))
        scales = {name: rank_and_alpha(name, config) for name in lora_layers(model)}
        other = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)] or [
            name
            for name, layer in lora_layers(model).items()
            if not math.isclose(scales[name][1] / scales[name][0], layer.scaling["default"], rel_tol=1e-6)
        ]
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"The LoRA of {checkpoint} cannot be read: {type(error).__name__}: {error}") from error
    if other:
        raise ValueError(
            f"{checkpoint} holds another LoRA than the peft_config of this run gives: {other[0]!r} and "
            f"{len(other) - 1} more differ in rank or alpha, or only one of them has it. Resume with the peft_config "
            "of the checkpoint."
        )


def save_lora(policy: EditPolicy, model: PeftModel, folder: str) -> None:
    """
    Saves the LoRA as `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(folder)` reads, and checks
    that what it reads there changes every module as the trained LoRA does.

    Args:
        policy ([`EditPolicy`]):
            The policy. The file names what its pipeline is quantized with.
        model ([`~peft.PeftModel`]):
            The trained model.
        folder (`str`):
            Where to save it.

    Raises:
        `ValueError`: If the file would not change a module as the trained LoRA does. It is deleted then.
    """
    state_dict = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name.removeprefix("base_model.model."): weight.detach().cpu() for name, weight in state_dict.items()}
    config = model.peft_config["default"].to_dict()
    layers = lora_layers(model)
    # Alpha is stored with the file. Without it diffusers takes alpha to be r, silently.
    lora = Lora(
        {name: weights[f"{name}.lora_A.weight"] for name in layers},
        {name: weights[f"{name}.lora_B.weight"] for name in layers},
        {name: rank_and_alpha(name, config)[1] for name in layers},
        "diffusers",
        config["base_model_name_or_path"],
        describe_quantization(policy.pipeline),
    )
    file = write_lora(lora, folder, "diffusers")
    wrong = changed_otherwise(layers, file)
    if wrong:
        file.unlink()
        raise ValueError(
            f"{file} was not saved: with it, {type(policy.pipeline).__name__}.load_lora_weights would change "
            f"{len(wrong)} modules otherwise than the trained LoRA, e.g. {wrong[0]}. Was the adapter's scale changed, "
            "or are its weights not finite? Save it with `model.save_pretrained` and report the LoraConfig."
        )


def changed_otherwise(layers: dict[str, LoraLayer], file: Path) -> list[str]:
    """
    The modules that a saved LoRA would change otherwise than the one in memory. The changes `scale * B @ A` are
    compared by what they make of two random vectors, with the scale that diffusers reads from the file.

    Args:
        layers (`dict[str, LoraLayer]`):
            The layers with the LoRA, see [`lora_layers`].
        file (`Path`):
            The file of the LoRA in the format of diffusers.
    """
    wrong = []
    with safe_open(file, "pt") as saved:
        stored = json.loads(saved.metadata()[LORA_ADAPTER_METADATA_KEY])
        config = LoraConfig(**{name.removeprefix("transformer."): value for name, value in stored.items()}).to_dict()
        names = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in saved.keys()}  # noqa: SIM118
        for name in sorted(names | set(layers)):
            if name not in names or name not in layers:
                wrong.append(name)
                continue
            rank, alpha = rank_and_alpha(name, config)
            down, up = (saved.get_tensor(f"transformer.{name}.lora_{part}.weight").float() for part in "AB")
            layer = layers[name]
            trained = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            trained_down, trained_up = (weight.detach().cpu().float() for weight in trained)
            probe = torch.randn(down.shape[1], 2, generator=torch.Generator().manual_seed(0))
            wanted = layer.scaling["default"] * (trained_up @ (trained_down @ probe))
            found = alpha / rank * (up @ (down @ probe))
            if rank != len(down) or not (found - wanted).norm() <= 1e-5 * wanted.norm():  # nor NaN
                wrong.append(name)
    return wrong
