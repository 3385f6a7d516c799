"""Folders of pipelines at their published sizes, without weights: what `hp-edit plan` reads."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import (
    CLIPTokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    T5TokenizerFast,
)

from hp_edit_trl.miniature.tiny import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    qwen3_vl_processor,
    tiny_kontext_pipeline,
    tiny_tokenizer,
)


CONFIGS = Path(__file__).parent
# Layers of the text encoders in dry runs; FLUX.2-klein reads the 27th.
SHORT = {
    "qwen_image_edit": 2, "qwen_image_edit_2509": 2, "qwen_image_edit_2511": 2, "flux_kontext": 2,
    "flux2_klein_4b": 28, "flux2_klein_9b": 28, "longcat_image_edit": 2, "qwen_image_21": 2,
}  # fmt: skip


def _described(name: str, short: bool) -> dict[str, Any]:
    described = json.loads((CONFIGS / f"{name}.json").read_text())
    if short:
        for component in {"text_encoder", "text_encoder_2"} & set(described):
            config = described[component]
            part = config.get("text_config", config)
            part["num_layers" if config["model_type"] == "t5" else "num_hidden_layers"] = SHORT[name]
            if "vision_config" in config:
                config["vision_config"] |= {
                    "depth": 1,
                    "deepstack_visual_indexes" if config["model_type"] == "qwen3_vl" else "fullatt_block_indexes": [0],
                }
    return described


def _text_bytes(name: str, short: bool) -> int:
    total = 0
    described = _described(name, short)
    for component in {"text_encoder", "text_encoder_2"} & set(described):
        kind = getattr(transformers, described[component]["architectures"][0])
        text = re.sub(r'"<\|[a-z_]+\|>"', "0", json.dumps(described[component]))
        config = transformers.AutoConfig.for_model(**json.loads(text))
        with torch.device("meta"):
            total += sum(2 * parameter.numel() for parameter in kind(config).parameters())
    return total


def left_out_bytes(name: str) -> int:
    """Bytes in bfloat16 of the layers of the text encoders that a short folder leaves out."""
    return _text_bytes(name, False) - _text_bytes(name, True)


def full_size_folder(name: str, folder: Path, short: bool = True) -> str:
    """
    Writes the configurations of a model into a folder, with small tokenizers in place of its own: its texts have other
    tokens, but its weights and passes have the published sizes; unless `short`, also those of its text encoders.
    """
    described = _described(name, short)
    index = described["model_index.json"]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    special = {text: tokenizer.convert_tokens_to_ids(text) for text in SPECIAL_TOKENS}
    for component, config in described.items():
        if component == "model_index.json":
            continue
        text = json.dumps(config)
        for token, number in special.items():
            text = text.replace(f'"{token}"', str(number))
        (folder / component).mkdir(parents=True, exist_ok=True)
        (folder / component / "config.json").write_text(text)
    (folder / "model_index.json").write_text(json.dumps(index))
    FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    ).save_pretrained(folder / "scheduler")
    for component, (_, class_name) in ((k, v) for k, v in index.items() if isinstance(v, list)):
        if class_name is None:  # left out, as Kontext's image encoder
            continue
        if class_name == "Qwen2VLProcessor":
            Qwen2VLProcessor(
                image_processor=Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056),
                tokenizer=tokenizer,
                video_processor=Qwen2VLVideoProcessor(),
                chat_template=CHAT_TEMPLATE,
            ).save_pretrained(folder / component)
        elif class_name == "Qwen3VLProcessor":
            qwen3_vl_processor(tokenizer, 256 * 256, 4096 * 4096).save_pretrained(folder / component)
        elif "Qwen2Tokenizer" in class_name:
            tokenizer.save_pretrained(folder / component)
        elif "Tokenizer" in class_name:
            small = tiny_kontext_pipeline()
            kinds = {CLIPTokenizer: small.tokenizer, T5TokenizerFast: small.tokenizer_2}
            (kinds[CLIPTokenizer] if "CLIP" in class_name else kinds[T5TokenizerFast]).save_pretrained(
                folder / component
            )
    return str(folder)
