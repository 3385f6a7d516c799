"""What is shared about a trained LoRA: its weights for diffusers and for resuming, and its model card with pictures."""

import copy
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import datasets
import diffusers
import peft
import torch
import transformers
import trl
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.constants import HF_HUB_CACHE
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import PreTrainedConfig

from .. import __version__
from ..policies import EditPolicy


if TYPE_CHECKING:
    from .base_edit_trainer import _BaseEditTrainer


def check_lora(peft_config: LoraConfig | None) -> None:
    """
    Raises an error for a LoRA that could be trained but not be used afterwards.

    Args:
        peft_config ([`~peft.LoraConfig`], *optional*):
            The user's configuration.

    Raises:
        `TypeError`: If it is not a `LoraConfig`.
        `ValueError`: If it has dropout, trains biases, trains whole modules beside the LoRA, or starts from weights that
            change the base model.
    """
    if peft_config is None:
        return
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(f"peft_config must be a LoraConfig, but is a {type(peft_config).__name__}.")
    if peft_config.lora_dropout:
        raise ValueError(
            f"lora_dropout={peft_config.lora_dropout} must be 0: with dropout the policy that is trained is another "
            "one than the policy that samples, and than the reference."
        )
    if peft_config.bias != "none":
        raise ValueError(f"bias={peft_config.bias!r} must be 'none': diffusers loads no biases with a LoRA.")
    if peft_config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"init_lora_weights={peft_config.init_lora_weights!r} may change the weights of the base model, on which the LoRA "
            "would then not fit: use True or 'gaussian'."
        )
    if peft_config.modules_to_save:
        raise ValueError(
            f"modules_to_save={peft_config.modules_to_save} must be empty: diffusers loads no whole modules with a LoRA."
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
            Hub id or folder of the pipeline, remembered in what is saved.
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
    config.task_type = None  # image editors are none of PEFT's language tasks
    if config.target_modules is None:
        config.target_modules = policy.lora_target_modules
    if config.exclude_modules is None:
        config.exclude_modules = policy.lora_exclude_modules
    if not isinstance(config.target_modules, str):
        names = [f".{name}" for name, _ in transformer.named_modules()]
        unknown = [t for t in config.target_modules if not any(name.endswith(f".{t}") for name in names)]
        if unknown:
            raise ValueError(
                f"target_modules={sorted(unknown)} match no module of {type(transformer).__name__}. Leave target_modules out "
                "for the modules that the policy names."
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

    # The name that Trainer looks for, and the one that it used to look for.
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
    # Without this metadata diffusers takes alpha to be r, silently. The modules are named one by one: diffusers does not
    # know of those that were excluded.
    adapted = sorted({name.rpartition(".lora_")[0] for name in weights})
    config = {**model.peft_config["default"].to_dict(), "target_modules": adapted, "exclude_modules": None}
    type(policy.pipeline).save_lora_weights(
        folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=config
    )


def reward_curve(log_history: list[dict[str, Any]], curves: list[tuple[str, str, str]], path: Path) -> bool:
    """
    Draws the rewards over the steps.

    Args:
        log_history (`list[dict]`):
            The trainer's `state.log_history`.
        curves (`list[tuple[str, str, str]]`):
            Name in the log, label and colour of each curve. Those of an evaluation are drawn with markers, others smoothed.
        path (`Path`):
            PNG file to write.

    Returns:
        `bool`: whether there was anything to draw.
    """
    # Not pyplot: nothing here may touch the figures or the backend of the user's session.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="reward")
    drawn = False
    for key, label, color in curves:
        points = [(log["step"], log[key]) for log in log_history if log.get(key) is not None]
        if not points:
            continue
        drawn = True
        steps, values = zip(*points, strict=True)
        width = max(1, len(values) // 20)
        smooth = [sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]  # fmt: skip
        evaluation = key.startswith("eval_")
        if evaluation or width == 1:
            marker = "o" if evaluation or len(values) == 1 else None
            axes.plot(steps, values, color=color, label=label, marker=marker)
        else:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth, color=color, label=f"{label} (mean of {width})")
    if drawn:
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path)
    return drawn


def comparison_sheet(rows: list[tuple[str, list[Image.Image]]], headings: list[str], height: int = 256) -> Image.Image:
    """
    A picture of pictures: one row per case with its text below, one column per heading.

    Args:
        rows (`list[tuple[str, list[PIL.Image.Image]]]`):
            Text and images of each case.
        headings (`list[str]`):
            Heading of each column.
        height (`int`, *optional*, defaults to `256`):
            Height of each image in the sheet; small images are enlarged without smoothing.
    """
    font = ImageFont.load_default(size=15)
    scaled = []
    for text, images in rows:
        fitted = []
        for image in images:
            method = Image.Resampling.NEAREST if image.height < height else Image.Resampling.LANCZOS
            fitted.append(image.resize((max(1, round(image.width * height / image.height)), height), method))
        scaled.append((text, fitted))
    columns = [max(images[i].width for _, images in scaled) for i in range(len(headings))]
    gap, line = 10, 26
    sheet = Image.new(
        "RGB", (sum(columns) + gap * (len(columns) + 1), line + gap + len(rows) * (height + line)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    left = gap
    for heading, width in zip(headings, columns, strict=True):
        draw.text((left, 6), heading, fill="black", font=font)
        left += width + gap
    for i, (text, images) in enumerate(scaled):
        top, left = line + i * (height + line), gap
        for image, width in zip(images, columns, strict=True):
            sheet.paste(image, (left, top))
            left += width + gap
        limit = sheet.width - 2 * gap
        while text and draw.textlength(text, font=font) > limit:
            text = text[:-2].rstrip("….") + "…"
        draw.text((gap, top + height + 3), text, fill="black", font=font)
    return sheet


def save_pictures(
    folder: Path,
    cases: list[tuple[dict[str, Any], list[Image.Image]]],
    before: list[Image.Image],
    after: list[Image.Image],
) -> None:
    """
    Saves edits before and after training to `folder/images`, and a sheet of them to `folder/before_after.png`.

    Args:
        folder (`Path`):
            The output folder.
        cases (`list[tuple[dict, list[PIL.Image.Image]]]`):
            Row and source images of each case.
        before (`list[PIL.Image.Image]`):
            Their edits by the model without its adapter.
        after (`list[PIL.Image.Image]`):
            Their edits by the trained policy, from the same noise.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i, ((row, images), old, new) in enumerate(zip(cases, before, after, strict=True)):
        old.save(folder / "images" / f"{i}_before.png")
        new.save(folder / "images" / f"{i}_after.png")
        (folder / "images" / f"{i}_prompt.txt").write_text(row["prompt"], encoding="utf-8")
        rows.append((row["prompt"], [ImageOps.fit(images[-1], new.size), old, new]))
    comparison_sheet(rows, ["source", "before training", "after training"]).save(folder / "before_after.png")


def hub_dataset(dataset: datasets.Dataset) -> tuple[str | None, str | None]:
    """Repository and commit that a dataset was loaded from, as far as its files in the cache tell."""
    # `load_dataset` prepares a dataset in a folder named after the commit. That path changes the repository's name
    # ("50K" becomes "50_k"), so the name is taken from the Hub cache, where the same commit was downloaded to.
    for file in dataset.cache_files:
        for part in Path(file["filename"]).parts:
            if re.fullmatch(r"[0-9a-f]{40}", part):
                for snapshot in Path(HF_HUB_CACHE).glob(f"datasets--*/snapshots/{part}"):
                    return snapshot.parent.parent.name.removeprefix("datasets--").replace("--", "/"), part
    return None, None


def write_model_card(
    trainer: "_BaseEditTrainer",
    folder: Path,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
) -> None:
    """
    Writes `README.md`, and `reward_curve.png` if there is one to draw.

    Args:
        trainer ([`FlowGRPOEditTrainer`] or [`DPOEditTrainer`]):
            The trainer.
        folder (`Path`):
            Where to write them. The card shows `before_after.png` and `images` if they are there.
        model_name (`str`, *optional*):
            Name of the model. Defaults to that of the repository or the output folder.
        dataset_name (`str`, *optional*):
            Hub id of the training dataset. By default what the dataset knows of itself.
        tags (`Sequence[str]`, *optional*):
            Further tags of the model.
    """
    args = trainer.args
    folder.mkdir(parents=True, exist_ok=True)
    name = model_name or (args.hub_model_id or Path(args.output_dir).resolve().name).split("/")[-1]
    repository, revision = hub_dataset(trainer.train_dataset)
    base_model = trainer.base_model
    on_hub = not Path(base_model).is_dir() and "/" in base_model
    prompts = {
        int(path.name.split("_")[0]): path.read_text(encoding="utf-8")
        for path in sorted((folder / "images").glob("*_prompt.txt"))
    }
    card_data = ModelCardData(
        base_model=base_model if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["lora", "diffusers", "image-editing", "trl", *trainer._tag_names, *tags],
        datasets=[dataset_name or repository] if dataset_name or repository else None,
        widget=[{"text": text, "output": {"url": f"images/{i}_after.png"}} for i, text in prompts.items()] or None,
    )
    lora = trainer.accelerator.unwrap_model(trainer.model).peft_config["default"]
    shown = {
        "LoRA rank, alpha": f"{lora.r}, {lora.lora_alpha}",
        **trainer._card_settings(),
        "Steps trained": str(trainer.state.global_step),
    }
    card = ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).parent / "model_card.md"),
        model_name=name,
        method=trainer._name,
        paper=trainer._paper,
        repo_id=trainer.hub_model_id or args.hub_model_id or name,
        base_model_name=base_model,
        base_model_revision=dict(args.model_init_kwargs or {}).get("revision"),  # type: ignore[arg-type]
        dataset=dataset_name or repository,
        dataset_revision=revision if dataset_name in (None, repository) else None,
        num_cases=trainer.num_train_cases,
        pipeline_class=type(trainer.policy.pipeline).__name__,
        call_arguments={
            name: json.dumps(value, ensure_ascii=False)
            for name, value in trainer.policy.call_arguments(trainer.true_cfg_scale, args.negative_prompt or "").items()
        },
        default_num_inference_steps=trainer.policy.default_num_inference_steps,
        num_inference_steps=trainer.sample_num_inference_steps,
        resolution=args.resolution,
        has_curve=reward_curve(trainer.state.log_history, trainer._card_curves(), folder / "reward_curve.png"),
        has_sheet=(folder / "before_after.png").is_file(),
        options=shown,
        versions={
            "hp-edit-trl": __version__, "trl": trl.__version__, "transformers": transformers.__version__,
            "diffusers": diffusers.__version__, "peft": peft.__version__, "accelerate": accelerate.__version__,
            "datasets": datasets.__version__, "torch": torch.__version__,
        },
    )  # fmt: skip
    card.save(folder / "README.md")
