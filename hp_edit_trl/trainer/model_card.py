"""The model card of a trained LoRA, with its curve and its pictures."""

import json
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
from PIL import Image, ImageOps

from .. import __version__
from ..utils.images import comparison_sheet
from ..utils.revisions import dataset_revision


if TYPE_CHECKING:
    from .base_edit_trainer import _BaseEditTrainer


def reward_curve(log_history: list[dict[str, Any]], curves: list[tuple[str, str, str]], path: Path) -> bool:
    """
    Draws the rewards over the steps.

    Args:
        log_history (`list[dict]`):
            The trainer's `state.log_history`.
        curves (`list[tuple[str, str, str]]`):
            Name in the log, label and color of each curve. Those of an evaluation are drawn with markers, others smoothed.
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
    repository, revision = dataset_revision(trainer.train_dataset)
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
