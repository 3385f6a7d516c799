"""Edits and scores of held-out cases, before and after training."""

import csv
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from ..tasks import TASKS
from ..trainer.base_edit_trainer import BaseEditTrainer
from ..utils.files import write_atomically
from ..utils.images import comparison_sheet
from ..utils.statistics import paired_difference
from .policy import WEIGHTS
from .scorers import RuleScorer


def edit_dataset(
    sample_edits: Callable[[list[tuple[dict, list[Image.Image]]]], list[Image.Image]],
    dataset: Dataset,
    batch_size: int = 100,
) -> list[Image.Image]:
    """
    Edits every case of a dataset of [`load_dataset`].

    Args:
        sample_edits (`Callable`):
            Edits cases: takes pairs of a row and its images, and returns the edits, as `trainer.sample_edits` does.
        dataset (`~datasets.Dataset`):
            The cases.
        batch_size (`int`, *optional*, defaults to `100`):
            Number of cases per call.

    Returns:
        `list[PIL.Image.Image]`: one edit per case.
    """
    edits: list[Image.Image] = []
    for start in tqdm(range(0, len(dataset), batch_size), "Editing", leave=False):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        edits += sample_edits([(row, [row["image"]]) for row in rows])
    return edits


def score_edits(edits: list[Image.Image], dataset: Dataset) -> list[float]:
    """Scores each edit of a dataset of [`load_dataset`] with [`RuleScorer`], from 0 to 5."""
    scorer = RuleScorer()
    return [scorer.score(edit, row["image"], row["target"]) for edit, row in zip(edits, dataset, strict=True)]


def comparison_table(tasks: list[str], before: list[float], after: list[float]) -> str:
    """
    Makes a Markdown table of mean scores before and after training, per task and overall, with paired differences and
    their standard errors.

    Args:
        tasks (`list[str]`):
            The task of each case.
        before (`list[float]`):
            The score of each case before training.
        after (`list[float]`):
            The score of each case after training.
    """
    lines = ["| task | cases | before | after | difference |", "|---|---|---|---|---|"]
    for name in [*[task for task in TASKS if task in tasks], "all"]:
        rows = [i for i, task in enumerate(tasks) if name in (task, "all")]
        old, new = [before[i] for i in rows], [after[i] for i in rows]
        difference, error = paired_difference(old, new)
        lines.append(
            f"| {name} | {len(rows)} | {np.mean(old):.2f} | {np.mean(new):.2f} | {difference:+.2f} ± {error:.2f} |"
        )
    return "\n".join(lines)


def before_after_sheet(dataset: Dataset, before: list[Image.Image], after: list[Image.Image]) -> Image.Image:
    """
    Shows a hard case of each task, four side by side: reference and both edits. Of the tenth of a task's cases whose
    edits scored lowest before training, it is the one with the median gain.

    Args:
        dataset (`~datasets.Dataset`):
            The cases.
        before (`list[PIL.Image.Image]`):
            Their edits before training.
        after (`list[PIL.Image.Image]`):
            Their edits after training.
    """
    scores = list(zip(score_edits(before, dataset), score_edits(after, dataset), strict=True))
    rows = []
    for task in TASKS:
        places = sorted((i for i, t in enumerate(dataset["task"]) if t == task), key=lambda i: scores[i][0])
        hard = sorted(places[: max(1, len(places) // 10)], key=lambda i: scores[i][1] - scores[i][0])
        if hard:
            index = hard[len(hard) // 2]
            row, (old, new) = dataset[index], scores[index]
            rows.append((f"{old:.1f} -> {new:.1f}  {row['prompt']}", [row["image"], before[index], after[index]]))
    return comparison_sheet(rows, ["reference", "before", "after"], height=128, across=4)


def gains_figure(tasks: list[str], before: list[float], after: list[float], path: Path) -> None:
    """
    Draws the mean scores of each task before and after training, with standard errors over the cases, and what the
    miniature's VAE allows at most.

    Args:
        tasks (`list[str]`):
            The task of each case.
        before (`list[float]`):
            The score of each case before training.
        after (`list[float]`):
            The score of each case after training.
        path (`Path`):
            The image file.
    """
    names = ["all", *[task for task in TASKS if task in tasks]]
    limits = json.loads((WEIGHTS / "scores.json").read_text(encoding="utf-8"))["vae"]
    limits["all"] = limits["score"]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    means = {}
    for shift, scores, label, color in ((-0.19, before, "before", "#9aa5b1"), (0.19, after, "after", "#1f7a5c")):
        parts = [[scores[i] for i, task in enumerate(tasks) if name in (task, "all")] for name in names]
        errors = [np.std(part, ddof=1) / len(part) ** 0.5 if len(part) > 1 else 0.0 for part in parts]
        means[label] = [np.mean(part) for part in parts]
        places = np.arange(len(names)) + shift
        axes.bar(places, means[label], 0.36, yerr=errors, label=label, color=color, ecolor="#333")
    for place, name in enumerate(names):
        axes.hlines(
            limits[name],
            place - 0.4,
            place + 0.4,
            color="black",
            linestyle=":",
            label="" if place else "VAE limit",
        )
    axes.set_ylim(max(0.0, np.floor(min(means["before"]) * 2) / 2 - 0.5), 5.05)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("score, 0 to 5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=3, loc="lower right", framealpha=1)
    write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=150))


def steps_table(scores: dict[int, tuple[list[float], list[float]]]) -> str:
    """
    Makes a Markdown table of mean scores before and after training by the number of denoising steps.

    Args:
        scores (`dict[int, tuple[list[float], list[float]]]`):
            The scores of the cases before and after training, by the number of steps.
    """
    lines = ["| denoising steps | before | after | difference |", "|---|---|---|---|"]
    for steps, (old, new) in sorted(scores.items()):
        difference, error = paired_difference(old, new)
        lines.append(f"| {steps} | {np.mean(old):.2f} | {np.mean(new):.2f} | {difference:+.2f} ± {error:.2f} |")
    return "\n".join(lines)


def evaluate_before_after(
    trainer: BaseEditTrainer, dataset: Dataset, other_steps: Sequence[int] = ()
) -> tuple[list[float], list[float]]:
    """
    Edits a dataset with and without the trained adapter, along the ODE and from the same noise. Prints the scores per
    task, and writes `scores.csv`, `gains.png` and `hard_cases.png` to the trainer's `output_dir`.

    Args:
        trainer ([`FlowGRPOEditTrainer`], [`FlowNFTEditTrainer`] or [`DPOEditTrainer`]):
            The trainer, after training.
        dataset (`~datasets.Dataset`):
            Held-out cases of [`load_dataset`].
        other_steps (`Sequence[int]`, *optional*, defaults to `()`):
            Other numbers of denoising steps that are compared as well. Only their mean scores are printed.

    Returns:
        `tuple[list[float], list[float]]`: the score of each case before and after.
    """
    own_steps = trainer.sample_num_inference_steps
    edits: dict[int, tuple[list[Image.Image], list[Image.Image]]] = {}
    scores: dict[int, tuple[list[float], list[float]]] = {}
    print(f"Editing {len(dataset)} held-out scenes before and after training", flush=True)
    try:
        for steps in dict.fromkeys((own_steps, *other_steps)):
            trainer.sample_num_inference_steps = steps
            before = edit_dataset(partial(trainer.sample_edits, adapter=False), dataset)
            after = edit_dataset(trainer.sample_edits, dataset)
            edits[steps] = before, after
            scores[steps] = score_edits(before, dataset), score_edits(after, dataset)
    finally:
        trainer.sample_num_inference_steps = own_steps
    print(comparison_table(dataset["task"], *scores[own_steps]))
    if len(scores) > 1:
        print(steps_table(scores))
    folder = Path(trainer.args.output_dir)
    rows = [("id", "task", "before", "after"), *zip(dataset["id"], dataset["task"], *scores[own_steps], strict=True)]

    def write(part: Path) -> None:
        with part.open("w", newline="") as file:
            csv.writer(file).writerows(rows)

    write_atomically(folder / "scores.csv", write)
    before_after_sheet(dataset, *edits[own_steps]).save(folder / "hard_cases.png")
    gains_figure(dataset["task"], *scores[own_steps], folder / "gains.png")
    return scores[own_steps]
