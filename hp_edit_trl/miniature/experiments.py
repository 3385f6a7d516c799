"""Comparisons in miniature: several recipes, several seeds each, and results that the script itself writes down."""

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import LoraConfig
from tqdm import tqdm

from ..trainer.flow_grpo_edit_config import FlowGRPOEditConfig
from ..trainer.flow_grpo_edit_trainer import FlowGRPOEditTrainer
from .policy import WEIGHTS, load_pipeline
from .report import edit_dataset, paired_difference, report, score_edits
from .scorers import CoarseScorer, RuleScorer
from .world import TASKS, load_dataset


@dataclass(frozen=True)
class Arm:
    """
    One of the recipes that an experiment compares.

    Args:
        name (`str`):
            Its name in tables and figures.
        options (`dict[str, Any]`, *optional*):
            What it changes in the experiment's config: arguments of [`FlowGRPOEditConfig`], or `lora_r`, `lora_alpha`.
        task_aware (`bool`, *optional*, defaults to `True`):
            Whether [`RuleScorer`] or [`CoarseScorer`] is the reward.
        filtered (`bool`, *optional*, defaults to `False`):
            Whether training leaves out the cases that the pretrained policy's edit scores 5 (rounded) on already.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    task_aware: bool = True
    filtered: bool = False


def make_trainer(
    config: Path, options: dict[str, Any], output_dir: Path, seed: int, reward: Any, train: Any, validation: Any
) -> FlowGRPOEditTrainer:
    """A trainer of the miniature, from a YAML file and what is to be changed in it."""
    values = yaml.safe_load(config.read_text()) | options | {"output_dir": str(output_dir), "seed": seed}
    lora = LoraConfig(r=values.pop("lora_r"), lora_alpha=values.pop("lora_alpha"))
    args = FlowGRPOEditConfig(**values)
    return FlowGRPOEditTrainer(load_pipeline(), reward, args, train, validation, peft_config=lora)


def hard_cases(config: Path, num_cases: int, folder: Path) -> list[int]:
    """Which of the first training cases the pretrained policy does not edit well enough for a 5 (rounded)."""
    file = folder / f"base_scores_{num_cases}.json"
    if not file.exists():
        train = load_dataset("train", num_cases)
        options = {"eval_strategy": "no", "eval_on_start": False, "save_strategy": "no"}
        trainer = make_trainer(config, options, folder / "base", 0, RuleScorer(), train, None)
        scores = score_edits(edit_dataset(trainer.sample_edits, train), train)
        file.write_text(json.dumps(scores))
    return [i for i, score in enumerate(json.loads(file.read_text())) if score < 4.5]


def learning_curve(trainer: FlowGRPOEditTrainer) -> list[dict[str, float]]:
    """
    Score in evaluation against the work done until then: transformer passes in thousands of images (one for each step of
    a rollout and one for each trained step; a backward pass is not counted), and seconds of the trainer's own phases.
    """
    args = trainer.args
    images_per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    passes_per_image = args.num_inference_steps / args.num_iterations + args.sde_window_size
    seconds, points = 0.0, []
    for log in trainer.state.log_history:
        seconds += sum(value for name, value in log.items() if name.startswith("time/"))
        if "eval_score" in log:
            passes = log["step"] * images_per_update * passes_per_image / 1000
            points.append(
                {"step": log["step"], "thousand_passes": passes, "seconds": seconds, "score": log["eval_score"]}
            )
    return points


def run_arm(arm: Arm, seed: int, config: Path, num_cases: int, folder: Path) -> dict[str, Any]:
    """Trains one arm with one seed, and scores it on the test cases. A finished run of just this is not done again."""
    output_dir = folder / f"{arm.name.replace(' ', '_').replace('/', '-')}-{seed}"
    file = output_dir / "result.json"
    weights = (WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    key = hashlib.sha256(repr((arm, seed, num_cases)).encode() + config.read_bytes() + weights).hexdigest()
    if file.exists():
        result = json.loads(file.read_text())
        if result["key"] == key:
            return result
    torch.set_num_threads(1)
    train, validation, test = load_dataset("train", num_cases), load_dataset("validation", 100), load_dataset("test")
    if arm.filtered:
        train = train.select(hard_cases(config, num_cases, folder))
    reward = [RuleScorer()] if arm.task_aware else [CoarseScorer(), RuleScorer()]
    options = dict(arm.options) | {"save_strategy": "no", "disable_tqdm": True}
    if not arm.task_aware:
        options["reward_weights"] = [1.0, 0.0]  # the second is only there to be logged in evaluation
    trainer = make_trainer(config, options, output_dir, seed, reward, train, validation)
    began = time.time()
    trainer.train()
    wall_seconds = time.time() - began
    before, after = report(trainer, test)
    difference, error = paired_difference(before, after)
    result = {
        "key": key,
        "arm": arm.name,
        "seed": seed,
        "before": float(np.mean(before)),
        "score": float(np.mean(after)),
        "difference": difference,
        "standard_error": error,
        "share_of_5_before": float(np.mean(np.array(before) >= 4.5)),
        "share_of_5": float(np.mean(np.array(after) >= 4.5)),
        **{task: float(np.mean([s for t, s in zip(test["task"], after, strict=True) if t == task])) for task in TASKS},
        "train_cases": len(train),
        "wall_seconds": round(wall_seconds, 1),
        "curve": learning_curve(trainer),
    }
    file.write_text(json.dumps(result))
    return result


def run_experiment(
    name: str, arms: Sequence[Arm], seeds: Sequence[int], config: Path, results: Path, num_cases: int = 1500,
    processes: int = 2, folder: Path = Path("outputs/experiments"), x: str = "step",
) -> list[dict[str, Any]]:  # fmt: skip
    """
    Runs every arm with every seed, one core each, and writes the results as `name.json`, `name.csv`, `name.md` and
    `name.png`. It can be stopped at any time: finished runs are kept in `folder/name` and are not done again.

    Args:
        name (`str`):
            The experiment's name.
        arms (`Sequence[Arm]`):
            The recipes.
        seeds (`Sequence[int]`):
            The seeds; each arm runs with each.
        config (`Path`):
            YAML file with the recipe that the arms have in common.
        results (`Path`):
            Folder for the results.
        num_cases (`int`, *optional*, defaults to `1500`):
            Number of training cases, before filtering.
        processes (`int`, *optional*, defaults to `2`):
            Number of runs at a time.
        folder (`Path`, *optional*, defaults to `outputs/experiments`):
            Folder for the runs themselves.
        x (`str`, *optional*, defaults to `"step"`):
            What the figure's curves are drawn over: `"step"`, `"thousand_passes"` or `"seconds"`.

    Returns:
        `list[dict]`: one per run.
    """
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    if any(arm.filtered for arm in arms):
        hard_cases(config, num_cases, folder)  # once, before the runs that read it
    runs = []
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    with ProcessPoolExecutor(processes, mp_context=spawn) as executor:
        jobs = [executor.submit(run_arm, arm, seed, config, num_cases, folder) for seed in seeds for arm in arms]
        for job in tqdm(as_completed(jobs), name, total=len(jobs)):
            runs.append(job.result())
    order = [arm.name for arm in arms]
    runs.sort(key=lambda run: (order.index(run["arm"]), run["seed"]))
    columns = [column for column in runs[0] if column not in ("key", "curve")]
    with (results / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(runs)
    summary = summarise(runs)
    record = {"summary": summary, "runs": runs, "config": yaml.safe_load(config.read_text()), **environment()}
    (results / f"{name}.json").write_text(json.dumps(record, indent=1))
    (results / f"{name}.md").write_text(summary_table(summary))
    draw_figure(runs, summary, x, results / f"{name}.png")
    print(summary_table(summary))
    return runs


def command(name: str, arms: Sequence[Arm], config: Path, description: str, x: str = "step") -> None:
    """Runs an experiment from the command line: its options are seeds, processes, config and the folder of results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=config, help="the recipe that the arms have in common")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder for the results")
    args = parser.parse_args()
    run_experiment(name, arms, args.seeds, args.config, args.results, processes=args.processes, x=x)


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each arm the mean over its seeds, and the standard error of that mean."""
    summary = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        rows = [run for run in runs if run["arm"] == arm]
        line: dict[str, Any] = {"arm": arm, "seeds": len(rows)}
        for name in ("before", "score", "difference", "share_of_5", *TASKS, "wall_seconds"):
            values = np.array([row[name] for row in rows])
            line[name] = round(float(values.mean()), 4)
            if name in ("score", "difference") and len(rows) > 1:
                line[f"{name}_se"] = round(float(values.std(ddof=1) / len(rows) ** 0.5), 4)
        summary.append(line)
    return summary


def summary_table(summary: list[dict[str, Any]]) -> str:
    """Markdown table of a summary: mean scores and gains over the seeds, with the standard error of those means."""
    lines = [
        "| arm | seeds | before | after | gain | share of 5 | " + " | ".join(TASKS) + " | minutes |",
        "|---" * (7 + len(TASKS)) + "|",
    ]
    for line in summary:
        errors = [f" ± {line[f'{name}_se']:.3f}" if f"{name}_se" in line else "" for name in ("score", "difference")]
        lines.append(
            f"| {line['arm']} | {line['seeds']} | {line['before']:.3f} | {line['score']:.3f}{errors[0]} "
            f"| {line['difference']:+.3f}{errors[1]} | {line['share_of_5']:.2f} | "
            + " | ".join(f"{line[task]:.2f}" for task in TASKS)
            + f" | {line['wall_seconds'] / 60:.1f} |"
        )
    return "\n".join(lines) + "\n"


def draw_figure(runs: list[dict[str, Any]], summary: list[dict[str, Any]], x: str, path: Path) -> None:
    """Validation scores over the training, mean and spread over the seeds, beside the test scores of each run."""
    from matplotlib.figure import Figure

    label = {"step": "update", "thousand_passes": "transformer passes (thousands)", "seconds": "seconds on one core"}[
        x
    ]
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
    styles = ("-", "--", ":", "-.")
    for i, line in enumerate(summary):
        rows = [run for run in runs if run["arm"] == line["arm"]]
        places = np.mean([[point[x] for point in run["curve"]] for run in rows], axis=0)
        scores = np.array([[point["score"] for point in run["curve"]] for run in rows])
        style = {"color": f"C{i % 10}", "linestyle": styles[i // 4 % 4]}
        curves.plot(places, scores.mean(0), label=line["arm"], **style)
        curves.fill_between(places, scores.min(0), scores.max(0), color=style["color"], alpha=0.12, linewidth=0)
        ends.plot([run["score"] for run in rows], [i] * len(rows), "o", color=style["color"], alpha=0.4)
        ends.errorbar(line["score"], i, xerr=line.get("score_se"), fmt="D", color=style["color"], capsize=4)
    curves.set(xlabel=label, ylabel="score on validation cases (task-aware)")
    curves.grid(alpha=0.3)
    curves.legend(fontsize="small")
    ends.axvline(np.mean([run["before"] for run in runs]), color="grey", linestyle=":", label="before training")
    ends.set(xlabel="score on test cases: each seed, mean ± standard error", yticks=range(len(summary)))
    ends.set_yticklabels([line["arm"] for line in summary], fontsize="small")
    ends.invert_yaxis()
    ends.grid(alpha=0.3)
    ends.legend(fontsize="small")
    figure.savefig(path)


def environment() -> dict[str, Any]:
    """What a result has to name so that it can be repeated: command, commit, versions, machine."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "commit": commit or "unknown",
        "versions": {name: version(name) for name in ("torch", "transformers", "diffusers", "peft", "trl")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
    }
