"""The model card of a trained LoRA, with its curve and its pictures."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import datasets
import diffusers
import peft
import torch
import transformers
import trl
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image, ImageOps
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

from ..policies import Example
from ..utils.files import write_text
from ..utils.hub import CITATION
from ..utils.images import comparison_sheet
from ..utils.secrets import redacted
from ..version import __version__


def reward_curve(log_history: list[dict[str, Any]], curves: list[tuple[str, str, str]], path: Path) -> bool:
    """
    Draws the rewards over the steps.

    Args:
        log_history (`list[dict]`):
            The trainer's `state.log_history`.
        curves (`list[tuple[str, str, str]]`):
            Name in the log, label and color of each curve. Those of an evaluation are drawn with markers, others
            smoothed.
        path (`Path`):
            PNG file to write.

    Returns:
        `bool`: whether there was anything to draw.
    """
    # Not pyplot: nothing here may touch the figures or the backend of the user's session.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="reward")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn = False
    for key, label, color in curves:
        points = [(log["step"], log[key]) for log in log_history if log.get(key) is not None]
        if not points:
            continue
        drawn = True
        steps, values = zip(*points, strict=True)
        width = max(1, len(values) // 20)
        windows = [values[max(0, i - width + 1) : i + 1] for i in range(len(values))]
        smooth = [sum(window) / len(window) for window in windows]
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


def tracker_links(trackers: Sequence[str]) -> dict[str, str]:
    """
    Addresses of the present run in the services that track it, by their names.

    Args:
        trackers (`Sequence[str]`):
            The trainer's `report_to`. Others are left out, also if a run of theirs is open in this process.
    """
    run = getattr(sys.modules.get("wandb"), "run", None)
    links = {
        "wandb": ("Weights & Biases", None if run is None else run.url),
        "trackio": ("Trackio", get_trackio_space_url() if "trackio" in trackers else None),
        "comet_ml": ("Comet", get_comet_experiment_url() if "comet_ml" in trackers else None),
    }
    return {label: url for name, (label, url) in links.items() if name in trackers and url}


def remove_before_after(folder: Path) -> None:
    """Removes what [`save_before_after`] has written to a folder."""
    (folder / "before_after.png").unlink(missing_ok=True)
    for name in ("before.png", "after.png", "prompt.txt"):
        for file in (folder / "images").glob(f"[0-9]*_{name}"):
            file.unlink()


def save_before_after(
    folder: Path,
    cases: list[tuple[dict[str, Any], list[Image.Image]]],
    before: list[Image.Image],
    after: list[Image.Image],
) -> None:
    """
    Saves edits before and after training to `folder/images`, and a sheet of them and their references, scaled to a
    height of 256 pixels, to `folder/before_after.png`.

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
    remove_before_after(folder)  # an earlier run may have had more cases
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i, ((row, images), old, new) in enumerate(zip(cases, before, after, strict=True)):
        old.save(folder / "images" / f"{i}_before.png")
        new.save(folder / "images" / f"{i}_after.png")
        write_text(folder / "images" / f"{i}_prompt.txt", row["prompt"])
        rows.append((row["prompt"], [ImageOps.fit(images[-1], new.size), old, new]))
    comparison_sheet(rows, ["reference", "before training", "after training"]).save(folder / "before_after.png")


def write_model_card(
    folder: Path,
    *,
    model_name: str,
    repo_id: str,
    base_model: str,
    base_model_revision: str | None,
    base_quantization: str | None,
    dtype: torch.dtype,
    dataset: str | None,
    dataset_revision: str | None,
    num_cases: int,
    method: str,
    paper: dict[str, str],
    tags: Sequence[str],
    settings: dict[str, str],
    pipeline_class: str,
    lora_loader: str,
    call_arguments: dict[str, Any],
    example: Example,
    default_num_inference_steps: int,
    num_inference_steps: int,
    resolution: int,
    log_history: list[dict[str, Any]],
    curves: list[tuple[str, str, str]],
    links: dict[str, str],
) -> None:
    """
    Writes `README.md`, and `reward_curve.png` if there is one to draw. The card shows `before_after.png` and `images`
    if they are in the folder, see [`save_before_after`].

    Args:
        folder (`Path`):
            Folder to write to.
        model_name (`str`):
            Title of the card.
        repo_id (`str`):
            Hub id or folder that the example loads the LoRA from.
        base_model (`str`):
            Hub id or folder of the pipeline.
        base_model_revision (`str` or `None`):
            Branch, tag or commit of its repository.
        base_quantization (`str` or `None`):
            What it was quantized with, see [`~hp_edit_trl.utils.quantization.describe_quantization`].
        dtype (`torch.dtype`):
            Type of its weights in training.
        dataset (`str` or `None`):
            Hub id of the training dataset.
        dataset_revision (`str` or `None`):
            Its commit.
        num_cases (`int`):
            Number of cases that were trained on.
        method (`str`):
            Name of the algorithm.
        paper (`dict[str, str]`):
            Its paper: `title`, `id` on arXiv, `citation` in BibTeX.
        tags (`Sequence[str]`):
            Tags of the model.
        settings (`dict[str, str]`):
            Rows of the table of settings.
        pipeline_class (`str`):
            Name of the pipeline's class.
        lora_loader (`str`):
            Code that loads a LoRA, see [`~hp_edit_trl.policies.EditPolicy`].
        call_arguments (`dict[str, Any]`):
            Arguments of the pipeline's call in the example.
        example ([`~hp_edit_trl.policies.Example`]):
            What makes the pipeline edit at the resolution of training.
        default_num_inference_steps (`int`):
            The pipeline's own number of denoising steps.
        num_inference_steps (`int`):
            Number of denoising steps of the example and of the card's own pictures.
        resolution (`int`):
            Their resolution.
        log_history (`list[dict]`):
            The trainer's `state.log_history`.
        curves (`list[tuple[str, str, str]]`):
            Name in the log, label and color of each curve, see [`reward_curve`].
        links (`dict[str, str]`):
            Addresses of the run in services that track it, see [`tracker_links`].
    """
    folder.mkdir(parents=True, exist_ok=True)
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
        tags=["lora", "diffusers", "image-editing", "trl", *tags],
        datasets=[dataset] if dataset else None,
        widget=[{"text": text, "output": {"url": f"images/{i}_after.png"}} for i, text in prompts.items()] or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).parent / "model_card.md"),
        model_name=model_name,
        method=method,
        paper=paper,
        citation=CITATION,
        load_lora=lora_loader.format(repo_id),
        base_model_name=base_model,
        on_hub=on_hub,
        base_model_revision=base_model_revision,
        base_quantization=base_quantization,
        dtype=dtype,
        prompt=json.dumps(
            next(iter(prompts.values()), "Replace the background with a snowy mountain"), ensure_ascii=False
        ),
        dataset=dataset,
        dataset_revision=dataset_revision,
        num_cases=num_cases,
        pipeline_class=pipeline_class,
        call_arguments={name: json.dumps(value, ensure_ascii=False) for name, value in call_arguments.items()}
        | example.arguments,
        example=example,
        default_num_inference_steps=default_num_inference_steps,
        num_inference_steps=num_inference_steps,
        resolution=resolution,
        has_curve=reward_curve(log_history, curves, folder / "reward_curve.png"),
        has_sheet=(folder / "before_after.png").is_file(),
        options=redacted(settings),
        links=redacted(links),
        versions={
            "hp-edit-trl": __version__, "trl": trl.__version__, "transformers": transformers.__version__,
            "diffusers": diffusers.__version__, "peft": peft.__version__, "accelerate": accelerate.__version__,
            "datasets": datasets.__version__, "torch": torch.__version__,
        },
    )  # fmt: skip
    write_text(folder / "README.md", str(card))
