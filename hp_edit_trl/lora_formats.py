"""LoRA files of several tools: reading, writing, checking and merging them."""

import contextlib
import json
import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .utils.files import write_atomically, write_json
from .utils.hub import check_reachable


logger = logging.getLogger(__name__)

QUANTIZATION_KEY = "base_quantization"  # in a file's metadata
FORMATS = ("diffusers", "peft", "comfyui", "kohya")

# Names of sd-scripts and musubi-tuner for the modules of FLUX transformers, which they have in the original layout.
# The modules in a list are one module there, stacked in this order.
FLUX_BLOCKS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
FLUX_ATTENTION = {
    "img_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn_proj": ["attn.to_out.0"],
    "txt_attn_proj": ["attn.to_add_out"],
}
KONTEXT_NAMES = {
    "double_blocks": FLUX_ATTENTION
    | {
        "img_mlp_0": ["ff.net.0.proj"],
        "img_mlp_2": ["ff.net.2"],
        "txt_mlp_0": ["ff_context.net.0.proj"],
        "txt_mlp_2": ["ff_context.net.2"],
        "img_mod_lin": ["norm1.linear"],
        "txt_mod_lin": ["norm1_context.linear"],
    },
    "single_blocks": {
        "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
        "linear2": ["proj_out"],
        "modulation_lin": ["norm.linear"],
    },
}
KLEIN_NAMES = {
    "double_blocks": FLUX_ATTENTION
    | {
        "img_mlp_0": ["ff.linear_in"],
        "img_mlp_2": ["ff.linear_out"],
        "txt_mlp_0": ["ff_context.linear_in"],
        "txt_mlp_2": ["ff_context.linear_out"],
    },
    "single_blocks": {"linear1": ["attn.to_qkv_mlp_proj"], "linear2": ["attn.to_out"]},
}
# The modules of Qwen-Image keep their names, with underscores for dots. These are the possible endings.
QWEN_SUFFIXES = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1",
    "txt_mod.1",
]  # fmt: skip


# First part of the names of linear layers, in all transformers
TRANSFORMER_PARTS = {
    "transformer_blocks", "single_transformer_blocks", "img_in", "txt_in", "x_embedder", "context_embedder",
    "time_text_embed", "time_guidance_embed", "norm_out", "proj_out", "double_stream_modulation_img",
    "double_stream_modulation_txt", "single_stream_modulation", "time_embed",
}  # fmt: skip


@dataclass
class Lora:
    """
    A LoRA of a transformer, independent of any file format.

    Args:
        down (`dict[str, torch.Tensor]`):
            The weight of shape `(rank, in_features)` of each adapted module, by the name of the module in diffusers.
        up (`dict[str, torch.Tensor]`):
            The weight of shape `(out_features, rank)` of each adapted module.
        alpha (`dict[str, float]`):
            The alpha of each adapted module. The LoRA adds `alpha / rank * up @ down` to the module's weight.
        file_format (`str`):
            The format that it was read from, one of `FORMATS`.
        base_model (`str`, *optional*):
            Hub id or folder of the model that it was trained on, if the file names it.
        base_quantization (`str`, *optional*):
            What that model was quantized with, if the file names it. It is in the file's metadata in all formats.
    """

    down: dict[str, torch.Tensor]
    up: dict[str, torch.Tensor]
    alpha: dict[str, float]
    file_format: str
    base_model: str | None = None
    base_quantization: str | None = None
    names: list[str] = field(init=False)

    def __post_init__(self):
        self.names = sorted(self.down)

    def scale(self, name: str) -> float:
        """The factor `alpha / rank` of a module."""
        return self.alpha[name] / len(self.down[name])


def lora_file(source: str | Path) -> Path:
    """
    Finds the file of a LoRA, and downloads it if necessary.

    Args:
        source (`str` or `Path`):
            A safetensors file, a folder, or a Hub repository.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: If there is no file, or there are several.
    """
    path = Path(source)
    if not path.exists():
        check_reachable(str(source))
        try:
            patterns = ["*.safetensors", "adapter_config.json"]
            # Subfolders hold the components of a pipeline, or checkpoints.
            path = Path(snapshot_download(str(source), allow_patterns=patterns, ignore_patterns=["*/*"]))
        except Exception as error:
            raise ValueError(f"{source} is neither a file, a folder, nor a Hub repository: {error}") from error
    if path.is_dir():
        known = [path / name for name in (LORA_WEIGHT_NAME_SAFE, SAFETENSORS_WEIGHTS_NAME)]
        files = [file for file in known if file.exists()] or sorted(path.glob("*.safetensors"))
        if len(files) == 0:
            raise ValueError(f"{source} has no safetensors file, so it holds no LoRA.")
        if len(files) > 1 and files[0] not in known:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{source} has several safetensors files ({names}): name one of them.")
        path = files[0]
    return path


def load_lora(pipeline: DiffusionPipeline, source: str | Path) -> None:
    """
    Loads a LoRA in the format of diffusers onto a pipeline, or onto its transformer where the pipeline has no method
    for LoRAs.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
        source (`str` or `Path`):
            A safetensors file, a folder, or a Hub repository.

    Raises:
        `ValueError`: If there is no file, or neither the pipeline nor its transformer takes LoRAs.
    """
    file = lora_file(source)
    loader = getattr(pipeline, "load_lora_weights", None) or getattr(
        getattr(pipeline, "transformer", None), "load_lora_adapter", None
    )
    if loader is None:
        raise ValueError(f"diffusers has no method that loads a LoRA onto a {type(pipeline).__name__}.")
    loader(str(file.parent), weight_name=file.name)


def read_lora(source: str | Path) -> Lora:
    """
    Reads a LoRA in any of `FORMATS`.

    Args:
        source (`str` or `Path`):
            A safetensors file, a folder (written by `trainer.save_model()` or PEFT), or a Hub repository.

    Returns:
        [`Lora`]: the LoRA.

    Raises:
        `ValueError`: If there is no LoRA, it cannot be read, or its kind is not supported.
    """
    path = lora_file(source)
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}). Pickled LoRAs are not opened.") from error
    if not state:
        raise ValueError(f"{path} is empty.")
    lora = _parsed(state, metadata, path)
    lora.base_quantization = metadata.get(QUANTIZATION_KEY)
    return lora


def _parsed(state: dict[str, torch.Tensor], metadata: dict[str, str], path: Path) -> Lora:
    if all(name.startswith("lora_unet_") for name in state):
        return _from_kohya(state, path)
    if any(re.match(r"(diffusion_model\.)?(double|single)_blocks\.", name) for name in state):
        # FLUX in its original layout, as written by ai-toolkit and others: the names of sd-scripts with dots
        return _from_kohya({_kohya_key(name): weight for name, weight in state.items()}, path)
    config: dict[str, Any] = {}
    if all(name.startswith("base_model.model.") for name in state):
        prefix, kind = "base_model.model.", "peft"
        file = path.with_name("adapter_config.json")
        if not file.exists():
            raise ValueError(
                f"{path} is a PEFT adapter without adapter_config.json, so its alpha is unknown: put the file there."
            )
        config = _configuration(file.read_text(encoding="utf-8", errors="replace"), file)
    elif all(name.startswith(("transformer.", "diffusion_model.")) for name in state):
        prefix = next(iter(state)).split(".")[0] + "."
        kind = "comfyui" if any(name.endswith(".alpha") for name in state) else "diffusers"
        stored = _configuration(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"), path)
        config = {
            name.removeprefix("transformer."): value
            for name, value in stored.items()
            if name.startswith("transformer.")
        }
    else:
        raise ValueError(
            f"{path} is not a LoRA of a transformer in a known format ({', '.join(FORMATS)}): it has weights such as "
            f"{sorted(state)[0]!r}."
        )
    if config.get("use_dora") or any("magnitude" in name for name in state):
        raise ValueError(f"{path} is a DoRA, which only PEFT itself can load.")

    state = {name.removeprefix(prefix): weight for name, weight in state.items()}
    foreign = [name for name in state if name.partition(".")[0] not in TRANSFORMER_PARTS]
    if foreign:
        raise ValueError(f"{path}: {foreign[0]!r} is not a module of a supported transformer.")
    down, up, alpha = {}, {}, {}
    for name, weight in state.items():
        module, _, part = name.rpartition(".lora_")
        if part == "A.weight":
            down[module] = weight
        elif part == "B.weight":
            up[module] = weight
        elif not name.endswith(".alpha"):
            raise ValueError(f"{path}: {name!r} is not a weight of a LoRA.")
    for module, weight in down.items():
        if f"{module}.alpha" in state:
            alpha[module] = float(state[f"{module}.alpha"])
        elif not config:
            alpha[module] = len(weight)  # the convention of all tools
        else:
            rank, alpha[module] = rank_and_alpha(module, config)
            if rank != len(weight):
                raise ValueError(
                    f"{path}: {module!r} has the rank {len(weight)}, but {rank} in the configuration, so PEFT and "
                    "diffusers cannot load it. Correct r or rank_pattern there."
                )
    return _checked(Lora(down, up, alpha, kind, config.get("base_model_name_or_path")), path)


def _configuration(text: str, path: Path) -> dict[str, Any]:
    """The configuration of a LoRA, with ranks and alphas that are numbers."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: the configuration of the LoRA is not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: the configuration of the LoRA is no JSON object, but {text.strip()[:40]!r}.")
    for name, value in config.items():
        field = name.removeprefix("transformer.")
        if field in ("r", "lora_alpha"):
            numbers = [value]
        elif field in ("rank_pattern", "alpha_pattern") and value is not None:
            numbers = list(value.values()) if isinstance(value, dict) else [None]
        else:
            continue
        if any(isinstance(number, bool) or not isinstance(number, int | float) or number <= 0 for number in numbers):
            raise ValueError(f"{path}: {field}={value!r} in the configuration of the LoRA is not valid.")
    return config


def rank_and_alpha(module: str, config: dict[str, Any]) -> tuple[int, float]:
    """
    Rank and alpha of a module by PEFT's configuration, as PEFT and diffusers read it: the first pattern that matches
    decides. The LoRA is multiplied by `alpha / rank`; a rank-stabilized one has a larger alpha here.

    Args:
        module (`str`):
            Name of the module.
        config (`dict`):
            The fields of a [`~peft.LoraConfig`]; those that are missing have PEFT's default.
    """
    rank_pattern, alpha_pattern = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = rank_pattern.get(get_pattern_key(rank_pattern, module), config.get("r", LoraConfig.r))
    alpha = alpha_pattern.get(get_pattern_key(alpha_pattern, module), config.get("lora_alpha", LoraConfig.lora_alpha))
    return rank, alpha * rank**0.5 if config.get("use_rslora") else alpha


def exact_patterns(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """
    The `rank_pattern` or `alpha_pattern` of PEFT that gives each module its value: an entry for each that differs from
    the default, which matches this module alone. Their order does not matter then, which files do not keep.
    """
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


def _checked(lora: Lora, path: Path) -> Lora:
    if not lora.down and not lora.up:
        raise ValueError(f"{path} has no weights of a LoRA.")
    unpaired = set(lora.down) ^ set(lora.up)
    if unpaired:
        raise ValueError(f"{path}: {sorted(unpaired)[0]!r} has only one of its two weights.")
    for name in lora.names:
        if lora.down[name].shape[0] != lora.up[name].shape[1]:
            shapes = tuple(lora.down[name].shape), tuple(lora.up[name].shape)
            raise ValueError(f"{path}: the two weights of {name!r} do not fit together: {shapes[0]} and {shapes[1]}.")
    return lora


def _family(lora: Lora) -> str | None:
    """
    The family of transformers that a LoRA is for: `"qwen"`, `"qwen-2.1"`, `"kontext"`, `"klein"`, `"longcat"`, or None
    if it is unknown. The modules decide; if several families have them, the base model does.
    """
    names = " ".join(lora.names)
    if re.search(r"\.img_mlp\.(proj|gate_layer|out)( |$)", names):
        return "qwen-2.1"
    if re.search(r"\.(img|txt)_(mlp|mod)\.", names):
        return "qwen"
    if re.search(r"\.linear_(in|out)|\.to_qkv_mlp_proj|single_transformer_blocks\.\d+\.attn\.to_out( |$)", names):
        return "klein"
    may_be_kontext = re.search(r"single_transformer_blocks\.|\.ff(_context)?\.", names) is not None
    if lora.base_model is None:
        return "kontext" if may_be_kontext else None
    kind = lora.base_model
    with contextlib.suppress(Exception):  # the configuration is more reliable than the name
        kind = DiffusionPipeline.load_config(lora.base_model)["_class_name"]
    kind = kind.lower().replace(".", "").replace("-", "")
    if "longcat" in kind:  # whose modules have Kontext's names
        return "longcat"
    if may_be_kontext:
        return "kontext"
    if "qwenimage21" in kind:
        return "qwen-2.1"
    return "qwen" if "qwen" in kind else "klein" if "flux2" in kind else "kontext" if "flux" in kind else None


def _kohya_names(lora: Lora) -> dict[str, list[str]]:
    """The module names of sd-scripts, each with the diffusers modules that it consists of."""
    family = _family(lora)
    if family is None:
        raise ValueError(
            "The LoRA only adapts attention, which many transformers have, and does not say what it was trained on. "
            "Its names in sd-scripts are therefore unknown: use another format."
        )
    if family == "longcat":
        raise ValueError("The names of LongCat's modules in sd-scripts are unknown: use another format.")
    if family == "qwen-2.1":
        raise ValueError("The names of Qwen-Image-2.1's modules in sd-scripts are not known: use another format.")
    if family == "qwen":
        return {f"lora_unet_{name.replace('.', '_')}": [name] for name in lora.names}
    table = KLEIN_NAMES if family == "klein" else KONTEXT_NAMES
    groups = {}
    for name in lora.names:
        block, _, rest = name.partition(".")
        number, _, suffix = rest.partition(".")
        kind = FLUX_BLOCKS.get(block, "")
        target = next((key for key, parts in table.get(kind, {}).items() if suffix in parts), None)
        if target is None:
            raise ValueError(f"sd-scripts has no name for {name!r}: leave it out of the LoRA, or use another format.")
        groups[f"lora_unet_{kind}_{number}_{target}"] = [f"{block}.{number}.{part}" for part in table[kind][target]]
    return groups


def _to_kohya(lora: Lora) -> dict[str, torch.Tensor]:
    state = {}
    for target, parts in _kohya_names(lora).items():
        missing = [name for name in parts if name not in lora.down]
        if missing:
            raise ValueError(
                f"sd-scripts keeps {', '.join(parts)} in one module, but the LoRA does not adapt {missing[0]!r}: use "
                "another format, or adapt all of them."
            )
        scales = {lora.scale(name) for name in parts}
        ranks = {len(lora.down[name]) for name in parts}
        if len(scales) > 1 or len(ranks) > 1:
            raise ValueError(
                f"sd-scripts keeps {', '.join(parts)} in one module, but their ranks or alphas differ: use another "
                "format."
            )
        # Stacked modules: the ranks one after the other, each with the outputs of its own part
        state[f"{target}.lora_down.weight"] = torch.cat([lora.down[name] for name in parts])
        state[f"{target}.lora_up.weight"] = torch.block_diag(*[lora.up[name] for name in parts])
        state[f"{target}.alpha"] = torch.tensor(float(sum(lora.alpha[name] for name in parts)))
    return state


def _kohya_key(name: str) -> str:
    """The name in sd-scripts of e.g. `diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`."""
    module, _, part = name.removeprefix("diffusion_model.").rpartition(".lora_")
    if not module:
        module, _, part = name.removeprefix("diffusion_model.").rpartition(".")
    part = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}.get(part, part)
    return f"lora_unet_{module.replace('.', '_')}.{part}"


def _is_klein(state: dict[str, torch.Tensor]) -> bool:
    """Whether the modules have the widths of FLUX.2-klein, whose MLPs are gated, or those of FLUX.1."""
    widths = {"linear1": (9, 1), "linear2": (1, 4), "mlp_0": (6, 1), "mlp_2": (1, 3)}
    for name, down in state.items():
        for suffix, (outputs, inputs) in widths.items():
            if name.endswith(f"_{suffix}.lora_down.weight"):
                up = state.get(name.replace("lora_down", "lora_up"))
                return up is not None and len(up) * inputs == down.shape[1] * outputs
    return False


def _from_kohya(state: dict[str, torch.Tensor], path: Path) -> Lora:
    down, up, alpha = {}, {}, {}
    table = KLEIN_NAMES if _is_klein(state) else KONTEXT_NAMES
    diffusers_blocks = {theirs: ours for ours, theirs in FLUX_BLOCKS.items()}
    qwen_suffixes = {known.replace(".", "_"): known for known in QWEN_SUFFIXES}
    for name, weight in state.items():
        target, _, part = name.partition(".")
        if part != "lora_down.weight":
            if part not in ("lora_up.weight", "alpha"):
                raise ValueError(f"{path}: {name!r} is not a weight of a LoRA.")
            if f"{target}.lora_down.weight" not in state:
                raise ValueError(f"{path}: {target!r} has no lora_down.")
            continue
        if f"{target}.lora_up.weight" not in state:
            raise ValueError(f"{path}: {target!r} has no lora_up.")
        whole_up = state[f"{target}.lora_up.weight"]
        whole_alpha = float(state.get(f"{target}.alpha", torch.tensor(float(len(weight)))))
        match = re.fullmatch(r"lora_unet_(double_blocks|single_blocks|transformer_blocks)_(\d+)_(\w+)", target)
        if match is None:
            raise ValueError(f"{path}: {target!r} is not a module of a supported transformer.")
        kind, number, suffix = match.groups()
        if kind == "transformer_blocks":
            if suffix not in qwen_suffixes:
                raise ValueError(f"{path}: {target!r} is not a module of Qwen-Image.")
            parts = [f"{kind}.{number}.{qwen_suffixes[suffix]}"]
        else:
            if suffix not in table[kind]:
                raise ValueError(f"{path}: {target!r} is not a module of FLUX.")
            parts = [f"{diffusers_blocks[kind]}.{number}.{part}" for part in table[kind][suffix]]
        # Queries, keys and values are as wide as the input; an MLP in the same module takes the rest.
        sizes = [len(whole_up)] if len(parts) == 1 else [len(whole_up) // 3] * 3
        if len(parts) == 4:
            sizes = [weight.shape[1]] * 3 + [len(whole_up) - 3 * weight.shape[1]]
        if sum(sizes) != len(whole_up) or min(sizes) < 1:
            raise ValueError(
                f"{path}: {target!r} has {len(whole_up)} outputs, which {len(parts)} modules cannot share."
            )
        rank, blocks = len(weight) // len(parts), whole_up.split(sizes)
        diagonal = [b[:, i * rank : (i + 1) * rank] for i, b in enumerate(blocks)]
        stacked = len(parts) > 1 and len(weight) % len(parts) == 0
        if stacked and torch.equal(torch.block_diag(*diagonal), whole_up):
            downs, ups, share = weight.split(rank), diagonal, whole_alpha / len(parts)
        else:  # one LoRA over all parts: each part gets the whole down weight
            downs, ups, share = (weight,) * len(parts), blocks, whole_alpha
        for part, part_down, part_up in zip(parts, downs, ups, strict=True):
            down[part], up[part], alpha[part] = part_down.contiguous(), part_up.contiguous(), share
    return _checked(Lora(down, up, alpha, "kohya"), path)


def write_lora(lora: Lora, output_dir: str | Path, file_format: str) -> Path:
    """
    Writes a LoRA.

    Args:
        lora ([`Lora`]):
            The LoRA.
        output_dir (`str` or `Path`):
            Folder for the LoRA, whose file gets the name that diffusers or PEFT look for. Unless the format is
            `"peft"`, a path that ends in `.safetensors` is the name of the file itself.
        file_format (`str`):
            - `"diffusers"`: `transformer.<module>.lora_A.weight`, and alpha in the file's metadata.
            - `"peft"`: `base_model.model.<module>.lora_A.weight`, and `adapter_config.json`.
            - `"comfyui"`: `diffusion_model.<module>.lora_A.weight` for Qwen-Image, whose modules ComfyUI names as
            diffusers
              does, and `transformer.<module>.lora_A.weight` for FLUX; and a tensor `.alpha` for each module, because
              ComfyUI does not read the metadata.
            - `"kohya"`: `lora_unet_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`, as sd-scripts and
              musubi-tuner name the modules; FLUX's queries, keys and values are stacked.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: If the format is not known, or cannot hold this LoRA.
    """
    if file_format not in FORMATS:
        raise ValueError(f"format={file_format!r} is not known: use one of {', '.join(FORMATS)}.")
    output_dir = Path(output_dir)
    if file_format == "peft" and output_dir.suffix == ".safetensors":
        raise ValueError(f"PEFT's format is a folder, but {output_dir} is the name of a file: name a folder.")
    if file_format == "kohya":
        state = _to_kohya(lora)
    else:
        prefix = "base_model.model." if file_format == "peft" else "transformer."
        if file_format == "comfyui" and _family(lora) == "qwen":
            prefix = "diffusion_model."
        state = {f"{prefix}{name}.lora_A.weight": weight for name, weight in lora.down.items()}
        state |= {f"{prefix}{name}.lora_B.weight": weight for name, weight in lora.up.items()}
        if file_format == "comfyui":
            state |= {f"{prefix}{name}.alpha": torch.tensor(float(alpha)) for name, alpha in lora.alpha.items()}
    state = {name: weight.contiguous().clone() for name, weight in state.items()}
    metadata = {"format": "pt"}
    if lora.base_quantization is not None:
        metadata[QUANTIZATION_KEY] = lora.base_quantization
    if file_format == "diffusers":
        config = {f"transformer.{name}": value for name, value in _peft_config(lora).items()}
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(config, indent=2, sort_keys=True)
    if file_format == "peft":
        file = output_dir / SAFETENSORS_WEIGHTS_NAME
    else:
        file = output_dir if output_dir.suffix == ".safetensors" else output_dir / LORA_WEIGHT_NAME_SAFE
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda part: save_file(state, part, metadata))
    if file_format == "peft":
        config = {"peft_type": "LORA", **_peft_config(lora)}
        write_json(output_dir / "adapter_config.json", config)
    return file


def _peft_config(lora: Lora) -> dict[str, Any]:
    """Rank and alpha in the form of `LoraConfig`: the most frequent values, and patterns for the others."""
    ranks = {name: len(weight) for name, weight in lora.down.items()}
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    ((alpha, _),) = Counter(lora.alpha.values()).most_common(1)
    return {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": exact_patterns(ranks, rank),
        "alpha_pattern": exact_patterns(lora.alpha, alpha),
        "base_model_name_or_path": lora.base_model,
        # In a list, `proj_out` would also stand for `single_transformer_blocks.0.proj_out`.
        "target_modules": lora.names
        if all("_blocks." in name for name in lora.names)
        else "|".join(map(re.escape, lora.names)),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
    }


def base_transformer(base: str) -> nn.Module:
    """
    Makes the transformer of a pipeline without its weights, from its configuration alone.

    Args:
        base (`str`):
            Hub id or folder of the pipeline.

    Raises:
        `ValueError`: If it is not a diffusers pipeline with a transformer.
    """
    check_reachable(base)
    try:
        index = DiffusionPipeline.load_config(base)
        transformer = getattr(diffusers, index["transformer"][1])
        config = transformer.load_config(base, subfolder="transformer")
    except Exception as error:
        raise ValueError(f"{base!r} is not a diffusers pipeline with a transformer: {error}") from error
    with init_empty_weights():
        return transformer.from_config(config)


def misfits(lora: Lora, transformer: nn.Module) -> list[str]:
    """Compares a LoRA with a transformer: returns a line for each module that is missing or has a different shape."""
    modules = dict(transformer.named_modules())
    lines = []
    for name in lora.names:
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            lines.append(f"{name}: the model has no such linear layer")
            continue
        wanted = (module.out_features, module.in_features)
        found = (lora.up[name].shape[0], lora.down[name].shape[1])
        if wanted != found:
            lines.append(f"{name}: {found[0]} x {found[1]} in the LoRA, {wanted[0]} x {wanted[1]} in the model")
    return lines


def describe_lora(lora: Lora) -> str:
    """Describes a LoRA: its format, rank, alpha and type, and the modules that it adapts, summed over all blocks."""
    kinds: dict[str, list[str]] = {}
    for name in lora.names:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), []).append(name)
    ranks = sorted({len(weight) for weight in lora.down.values()})
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in lora.down.values()})
    untrained = [name for name in lora.names if not lora.up[name].any()]
    lines = [
        f"format      {lora.file_format}",
        f"base model  {lora.base_model or 'not stated'}",
        *([f"quantized   {lora.base_quantization}"] if lora.base_quantization else []),
        f"rank        {', '.join(map(str, ranks))}",
        f"alpha       {', '.join(f'{alpha:g}' for alpha in sorted(set(lora.alpha.values())))}",
        f"dtype       {', '.join(dtypes)}",
        f"modules     {len(lora.names)}",
        *(f"  {len(names):4d}  {kind}" for kind, names in kinds.items()),
    ]
    if untrained:
        lines.append(f"untrained   {len(untrained)} modules, e.g. {untrained[0]}: they change nothing")
    return "\n".join(lines)


def merge_lora(base: str, lora: Lora, output_dir: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """
    Adds a LoRA to the weights of a pipeline and saves the pipeline.

    Args:
        base (`str`):
            Hub id or folder of the pipeline.
        lora ([`Lora`]):
            The LoRA.
        output_dir (`str` or `Path`):
            Folder for the merged pipeline.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            Type of all weights of the merged pipeline. The sum is computed in float32, but changes that are small
            compared with a weight are lost when the sum is rounded to bfloat16.

    Raises:
        `ValueError`: If the LoRA does not fit the pipeline's transformer, the pipeline is stored quantized, or
            `output_dir` is `base`.
    """
    if Path(output_dir).exists() and Path(base).exists() and Path(output_dir).samefile(base):
        raise ValueError(f"{output_dir} is the folder of the base model itself: name another folder.")
    transformer: Any = base_transformer(base)
    check_fit(lora, transformer, base)
    if transformer.config.get("quantization_config") is not None:
        raise ValueError(
            f"The transformer of {base} is stored quantized, and rounding would lose most of what the LoRA changes: "
            "merge into the pipeline in full precision."
        )
    if lora.base_quantization is not None:
        logger.warning(
            f"The LoRA was trained on quantized weights ({lora.base_quantization}). {base} is not quantized, so the "
            "merged pipeline edits slightly differently."
        )
    pipeline = DiffusionPipeline.from_pretrained(base, dtype=dtype)
    modules = dict(pipeline.transformer.named_modules())
    with torch.no_grad():
        for name in lora.names:
            weight = modules[name].weight
            change = lora.scale(name) * lora.up[name].float() @ lora.down[name].float()
            weight.copy_(weight.float() + change)
    pipeline.save_pretrained(output_dir)


def check_fit(lora: Lora, transformer: nn.Module, base: str) -> None:
    """Raises `ValueError` if a LoRA does not fit a transformer, and warns if the LoRA names a different base model."""
    lines = misfits(lora, transformer)
    if lines:
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise ValueError(
            f"The LoRA was not trained on {base}: {'; '.join(lines[:3])}{more}."
            + (f" It names {lora.base_model} as its base model." if lora.base_model else "")
        )
    if lora.base_model is not None and lora.base_model.rstrip("/") != base.rstrip("/"):
        # Models of one family have the same shapes
        logger.warning(f"The LoRA fits {base} by its shapes, but says that it was trained on {lora.base_model}.")
