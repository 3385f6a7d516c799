"""Quantized base models: options as the configuration of diffusers, and what a loaded pipeline is quantized with."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from torch import nn
from transformers.utils.versions import require_version

from .dtypes import parse_dtype


# What each backend needs: the oldest version that was tried
PACKAGES = {"bitsandbytes_4bit": "bitsandbytes>=0.50", "torchao": "torchao>=0.18"}
# Where diffusers quantizes with bitsandbytes
BITSANDBYTES_DEVICES = ("cuda", "xpu", "mps")
TORCHAO_TYPES = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")
INT8_OF_BITSANDBYTES = (
    "8 bits of bitsandbytes (LLM.int8) cannot be used for the transformer: it rounds the inputs of each layer, too, "
    "so that the policy that is trained is not the one that sampled. Use load_in_8bit, or quant_backend='torchao'."
)


def check_quantization(config: Any, device: torch.device | str) -> None:
    """
    Checks the option `quantization_config` before anything is downloaded.

    Args:
        config (`dict` or [`~diffusers.PipelineQuantizationConfig`], *optional*):
            The option, see [`quantization_config`].
        device (`torch.device` or `str`):
            The device that the model is used on.

    Raises:
        `ValueError`: If the option is not valid, or the device cannot use the quantization.
        `ImportError`: If its package is not installed, or too old.
    """
    if config is None:
        return
    if isinstance(config, PipelineQuantizationConfig):
        backends = _backends(config)
        if backends.get("transformer") == "bitsandbytes_8bit":
            raise ValueError(INT8_OF_BITSANDBYTES)
    elif isinstance(config, Mapping):
        check_options(config)
        backends = {"transformer": config["quant_backend"]}
    else:
        raise ValueError(
            f"quantization_config={config!r} must be a mapping with `quant_backend`, `quant_kwargs` and "
            "`components_to_quantize`, or a PipelineQuantizationConfig of diffusers."
        )
    device = torch.device(device)
    for backend in PACKAGES.keys() & backends.values():
        if backend == "bitsandbytes_4bit" and device.type not in BITSANDBYTES_DEVICES:
            raise ValueError(
                f"quant_backend={backend!r} (load_in_4bit) needs a GPU ({', '.join(BITSANDBYTES_DEVICES)}), but the "
                f"model is to be used on {device.type!r}. Leave the quantization out, or use 8 bits (load_in_8bit)."
            )
        try:
            require_version(PACKAGES[backend])
        except ImportError as error:  # missing, or too old
            raise ImportError(
                f'quant_backend={backend!r} needs {PACKAGES[backend]}: pip install "hp-edit-trl[quantization]"'
            ) from error


def in_bits(four: bool, eight: bool, quant_type: str = "nf4", nested: bool = False) -> dict[str, Any] | None:
    """
    The option `quantization_config` that `load_in_4bit` or `load_in_8bit` stand for; `None` without either.

    Args:
        four (`bool`):
            `load_in_4bit`.
        eight (`bool`):
            `load_in_8bit`.
        quant_type (`str`, *optional*, defaults to `"nf4"`):
            `bnb_4bit_quant_type`.
        nested (`bool`, *optional*, defaults to `False`):
            `use_bnb_nested_quant`.

    Raises:
        `ValueError`: If both are asked for.
    """
    if four and eight:
        raise ValueError("load_in_4bit and load_in_8bit are both set: leave one out.")
    if four:
        options = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": nested}
        return {"quant_backend": "bitsandbytes_4bit", "quant_kwargs": options}
    return {"quant_backend": "torchao", "quant_kwargs": {"quant_type": TORCHAO_TYPES[0]}} if eight else None


def quantization_config(config: Any, components: Sequence[str], dtype: torch.dtype) -> PipelineQuantizationConfig:
    """
    Makes the configuration that [`~diffusers.DiffusionPipeline.from_pretrained`] takes.

    Args:
        config (`dict` or [`~diffusers.PipelineQuantizationConfig`]):
            A mapping of `quant_backend` (`"bitsandbytes_4bit"` or `"torchao"`), `quant_kwargs` (arguments of the
            backend's own configuration, *optional*: by default NF4, and `Int8WeightOnlyConfig` of torchao) and
            `components_to_quantize` (a list of names, *optional*). An object is returned as it is.
        components (`Sequence[str]`):
            The components that may be quantized, and are by default.
        dtype (`torch.dtype`):
            Type of the weights that are not quantized, and of computations.

    Raises:
        `ValueError`: If the mapping is not valid, or names another component.
    """
    if isinstance(config, PipelineQuantizationConfig):
        return config
    backend, options = config["quant_backend"], dict(config.get("quant_kwargs") or {})
    names = config.get("components_to_quantize") or components
    names = [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in components]:
        raise ValueError(
            f"components_to_quantize={unknown} cannot be quantized. Of this pipeline can be: {', '.join(components)}."
        )
    try:
        if backend == "torchao":
            from torchao import quantization as torchao

            options["quant_type"] = getattr(torchao, options.get("quant_type", TORCHAO_TYPES[0]))()
            # Of torchao the configurations of diffusers and transformers differ, so each component needs its own.
            kinds = {name: diffusers if name == "transformer" else transformers for name in names}
            return PipelineQuantizationConfig(
                quant_mapping={name: kind.TorchAoConfig(**options) for name, kind in kinds.items()}
            )
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, **options}
        diffusers.BitsAndBytesConfig(**options)
        return PipelineQuantizationConfig(quant_backend=backend, quant_kwargs=options, components_to_quantize=names)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"quantization_config: quant_kwargs={config.get('quant_kwargs')} is wrong: {error}"
        ) from error


def check_trainable(transformer: Any) -> None:
    """Raises `ValueError` if a transformer is quantized in a way that it cannot be trained with."""
    if is_quantized(transformer) and _backend(transformer.config.quantization_config) == "bitsandbytes_8bit":
        raise ValueError(INT8_OF_BITSANDBYTES)


def check_offloadable(encoders: Mapping[str, Any]) -> None:
    """Raises `ValueError` if an encoder is quantized in a way that it would not leave the device."""
    for name, module in encoders.items():
        if is_quantized(module) and _backend(module.config.quantization_config) == "bitsandbytes_8bit":
            raise ValueError(
                f"offload_encoders: {name} is quantized to 8 bits by bitsandbytes, whose layers keep their weights on "
                "the device. Leave offload_encoders out, or quantize the encoder to 4 bits or with torchao."
            )


def describe_quantization(pipeline: DiffusionPipeline) -> str | None:
    """
    Says what a loaded pipeline is quantized with, e.g. `"transformer: bitsandbytes NF4"`; `None` if it is not.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
    """
    found = []
    for name, module in pipeline.components.items():
        if is_quantized(module):
            found.append(f"{name}: {_describe(module.config.quantization_config)}")
    return ", ".join(sorted(found, reverse=True)) or None  # the transformer first


def unquantized_dtype(model: Any) -> torch.dtype:
    """
    The type of a diffusers model's inputs and of its weights that are not quantized. `model.dtype` may be the type
    that quantized weights are stored in.

    Args:
        model ([`~diffusers.ModelMixin`]):
            The model.
    """
    return (is_quantized(model) and model.config.get("_pre_quantization_dtype")) or model.dtype


def is_quantized(module: Any) -> bool:
    """Whether something is a quantized model of diffusers or transformers."""
    return isinstance(module, nn.Module) and getattr(module, "is_quantized", False)  # others lack the attribute


def check_options(config: Mapping[str, Any]) -> None:
    """Raises `ValueError` if the option `quantization_config`, a mapping, is not valid."""
    known: tuple[str, ...] = ("quant_backend", "quant_kwargs", "components_to_quantize")
    if unknown := sorted(map(str, config.keys() - set(known))):
        raise ValueError(f"quantization_config has no option {', '.join(unknown)}. It has: {', '.join(known)}.")
    backend, options = config.get("quant_backend"), config.get("quant_kwargs") or {}
    if backend == "bitsandbytes_8bit":
        raise ValueError(INT8_OF_BITSANDBYTES)
    if not isinstance(backend, str) or backend not in PACKAGES:
        raise ValueError(f"quantization_config: quant_backend={backend!r} must be one of {', '.join(PACKAGES)}.")
    names = config.get("components_to_quantize")
    if not isinstance(options, Mapping):
        raise ValueError(f"quantization_config: quant_kwargs={options!r} must be a mapping.")
    if names is not None and (not isinstance(names, list | tuple | str) or not names):
        raise ValueError(f"quantization_config: components_to_quantize={names!r} must be a list of names.")
    if backend == "torchao":
        known = ("quant_type", "modules_to_not_convert")
        if options.get("quant_type", TORCHAO_TYPES[0]) not in TORCHAO_TYPES:
            raise ValueError(
                f"quantization_config: quant_type={options['quant_type']!r} must be one of "
                f"{', '.join(TORCHAO_TYPES)} for torchao. Types that quantize inputs as well are not supported."
            )
    else:
        known = tuple(inspect.signature(diffusers.BitsAndBytesConfig).parameters)[:-1]
        if options.get("load_in_4bit", True) is not True or options.get("load_in_8bit"):
            raise ValueError(f"quantization_config: quant_kwargs={options} contradict quant_backend={backend!r}.")
    if unknown := sorted(map(str, options.keys() - set(known))):
        raise ValueError(
            f"quantization_config: quant_kwargs of {backend} has no {', '.join(unknown)}. It has: {', '.join(known)}."
        )
    if options.get("bnb_4bit_quant_type", "nf4") not in ("nf4", "fp4"):
        raise ValueError(
            f"quantization_config: bnb_4bit_quant_type={options['bnb_4bit_quant_type']!r} must be 'nf4' or 'fp4'."
        )
    for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
        if options.get(name) is not None:
            parse_dtype(options[name])


def _backends(config: PipelineQuantizationConfig) -> dict[str, str]:
    """The backend of each component. Without names of components all are quantized, the transformer among them."""
    if config.quant_backend is not None:
        return dict.fromkeys(config.components_to_quantize or ["transformer"], config.quant_backend)
    return {name: _backend(one) for name, one in config.quant_mapping.items()}


def _backend(config: Any) -> str:
    method = str(getattr(config.quant_method, "value", config.quant_method))
    return f"{method}_{'4bit' if config.load_in_4bit else '8bit'}" if method == "bitsandbytes" else method


def _describe(config: Any) -> str:
    backend = _backend(config)
    if backend == "bitsandbytes_4bit":
        nested = " with nested quantization" if config.bnb_4bit_use_double_quant else ""
        return f"bitsandbytes {config.bnb_4bit_quant_type.upper()}{nested}"
    if backend == "bitsandbytes_8bit":
        return "bitsandbytes int8"
    if backend == "torchao":
        return f"torchao {type(config.quant_type).__name__}"
    return backend
