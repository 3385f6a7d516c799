"""Experiments in miniature: compare several recipes, each with several seeds, and write the results to files."""

import argparse
import contextlib
import csv
import functools
import hashlib
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback

import hp_edit_trl
from hp_edit_trl.data import mine_preference_pairs
from hp_edit_trl.miniature.comparison import edit_dataset, evaluate_before_after, score_edits
from hp_edit_trl.miniature.policy import WEIGHTS, load_pipeline
from hp_edit_trl.miniature.scorers import CoarseScorer, RuleScorer
from hp_edit_trl.miniature.world import load_dataset
from hp_edit_trl.rewards.checks import as_reward_funcs
from hp_edit_trl.scripts.rewards import make_reward, named_rewards
from hp_edit_trl.tasks import TASKS
from hp_edit_trl.trainer.base_edit_trainer import BaseEditTrainer
from hp_edit_trl.trainer.dpo_edit_config import DPOEditConfig
from hp_edit_trl.trainer.dpo_edit_trainer import DPOEditTrainer
from hp_edit_trl.trainer.flow_grpo_edit_config import FlowGRPOEditConfig
from hp_edit_trl.trainer.flow_grpo_edit_trainer import FlowGRPOEditTrainer
from hp_edit_trl.trainer.flow_nft_edit_config import FlowNFTEditConfig
from hp_edit_trl.trainer.flow_nft_edit_trainer import FlowNFTEditTrainer
from hp_edit_trl.utils.files import read_json, write_json, write_text
from hp_edit_trl.utils.statistics import paired_difference


@dataclass(frozen=True)
class Arm:
    """
    One of the recipes that an experiment compares.

    Args:
        name (`str`):
            Name in tables and figures.
        options (`dict[str, Any]`, *optional*):
            Options that differ from the experiment's config: arguments of the configuration of the arm's trainer, or
            `lora_r`, `lora_alpha`.
        task_aware (`bool`, *optional*, defaults to `True`):
            Whether the reward is [`RuleScorer`] or [`CoarseScorer`].
        filtered (`bool`, *optional*, defaults to `False`):
            Whether to train only on hard cases, those whose edit by the pretrained policy scores below 4.5.
        method (`str`, *optional*, defaults to `"grpo"`):
            `"grpo"`; `"nft"`; `"dpo"`, on pairs mined from the same cases; or `"none"`, which evaluates the pretrained
            policy.
        rewards (`tuple`, *optional*):
            Names of reward functions in place of that reward, see [`~hp_edit_trl.scripts.rewards.make_reward`], and
            `RuleScorer` and `CoarseScorer`. They are weighted by the option `reward_weights`. DPO takes one.
        min_gap (`float`, *optional*):
            Smallest difference in score of a pair of DPO. Defaults to 0.5 of the scorers' 5, and to 0.1 of others.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    task_aware: bool = True
    filtered: bool = False
    method: str = "grpo"
    rewards: tuple[Any, ...] = ()
    min_gap: float | None = None

    @property
    def folder(self) -> str:
        """Beginning of the names of the folders of its runs."""
        return self.name.replace(" ", "_").replace("/", "-")


SCORERS = {"RuleScorer": RuleScorer, "CoarseScorer": CoarseScorer}
TRAINERS = {
    "grpo": (FlowGRPOEditTrainer, FlowGRPOEditConfig),
    "nft": (FlowNFTEditTrainer, FlowNFTEditConfig),
    "dpo": (DPOEditTrainer, DPOEditConfig),
}


def arm_rewards(arm: Arm) -> list[Any]:
    """The reward functions of an arm. Raises `ValueError` if one cannot be made, or DPO has several."""
    scorer = RuleScorer if arm.task_aware else CoarseScorer
    made = as_reward_funcs([make_reward(named, SCORERS) for named in arm.rewards] or [scorer()])
    if arm.method == "dpo" and len(made) > 1:
        raise ValueError("DPO mines its pairs by one reward: name one, e.g. a Gate of two.")
    return made


def training_options(
    config: Path, options: dict[str, Any], output_dir: Path, seed: int, method: str
) -> tuple[Any, LoraConfig]:
    """
    The configuration of a trainer, and its LoRA, from a YAML file for Flow-GRPO and options that override it. Raises
    `ValueError` if the trainer has no such option, or a value is not valid.
    """
    values = yaml.safe_load(config.read_text())
    lora = {name: options.get(name, values.pop(name)) for name in ("lora_r", "lora_alpha")}
    config_type = TRAINERS[method][1]
    names = {f.name for f in fields(config_type) if f.init}
    if unknown := [name for name in options if name not in names | set(lora)]:
        raise ValueError(f"{config_type.__name__} has no option {', '.join(map(str, unknown))}.")
    known = names - ({"learning_rate"} if method == "dpo" else set())
    values = {name: value for name, value in values.items() if name in known}
    values |= {"output_dir": str(output_dir), "seed": seed}
    values |= {name: value for name, value in options.items() if name not in lora}
    try:
        return config_type(**values), LoraConfig(r=lora["lora_r"], lora_alpha=lora["lora_alpha"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_type.__name__} does not take these options: {error}") from error


def make_trainer(
    config: Path,
    options: dict[str, Any],
    output_dir: Path,
    seed: int,
    reward: Any,
    train: Dataset,
    method: str = "grpo",
) -> BaseEditTrainer:
    """Makes a trainer of the miniature from a YAML file for Flow-GRPO and options that override it."""
    args, peft_config = training_options(config, options, output_dir, seed, method)
    rewards = {} if reward is None else {"reward_funcs": reward}
    return TRAINERS[method][0](load_pipeline(), **rewards, args=args, train_dataset=train, peft_config=peft_config)


def fingerprint(*parts: Any) -> str:
    """A hash of `parts` and of what every run depends on: the package's code and the miniature's weights."""
    digest = hashlib.sha256(repr(parts).encode())
    package = Path(hp_edit_trl.__file__).parent
    for path in sorted([*package.rglob("*.py"), *WEIGHTS.rglob("*.safetensors")]):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def hard_cases(config: Path, num_cases: int, folder: Path) -> tuple[list[int], float]:
    """
    Finds the first training cases whose edit by the pretrained policy scores below 4.5. Returns their indices, and the
    CPU seconds that this took.
    """
    file = folder / f"base_scores_{fingerprint(config.read_bytes(), num_cases)}.json"
    kept = read_json(file)
    if kept is None:
        train = load_dataset("train", num_cases)
        trainer = make_trainer(config, {"save_strategy": "no"}, folder / "base", 0, RuleScorer(), train)
        began = time.process_time()
        scores = score_edits(edit_dataset(trainer.sample_edits, train), train)
        kept = {"scores": scores, "cpu_seconds": time.process_time() - began}
        write_json(file, kept)
    return [i for i, score in enumerate(kept["scores"]) if score < 4.5], kept["cpu_seconds"]


class Progress(TrainerCallback):
    """
    Records the validation score against the work done so far: transformer passes in thousands of images, which are
    counted (backward passes are not), and CPU seconds of this process, without those of the evaluation.

    Args:
        trainer ([`BaseEditTrainer`]):
            The trainer.
        dataset (`~datasets.Dataset`):
            The validation cases.
        every (`int`):
            Number of updates between two evaluations.
        passes (`float`, *optional*, defaults to `0.0`):
            Transformer passes before training.
        seconds (`float`, *optional*, defaults to `0.0`):
            CPU seconds used before training.
    """

    def __init__(
        self,
        trainer: BaseEditTrainer,
        dataset: Dataset,
        every: int,
        passes: float = 0.0,
        seconds: float = 0.0,
    ):
        self.trainer, self.dataset, self.every = trainer, dataset, every
        self.passes, self.seconds = passes, seconds
        self.counted = {"sampling": 0, "training": 0}
        self.evaluates = False
        self.curve: list[dict[str, float]] = []
        self.started = time.process_time()
        trainer.policy.pipeline.transformer.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.evaluates:
            self.counted["training" if transformer.training else "sampling"] += len(kwargs["hidden_states"])

    def evaluate(self, step: int) -> None:
        self.evaluates = True
        scores = score_edits(edit_dataset(self.trainer.sample_edits, self.dataset), self.dataset)
        self.evaluates = False
        self.curve.append(
            {
                "step": step,
                "thousand_passes": (self.passes + sum(self.counted.values())) / 1000,
                "cpu_seconds": round(self.seconds, 1),
                "score": float(np.mean(scores)),
            }
        )

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds += time.process_time() - self.started  # in which DPO has encoded its pairs
        self.evaluate(0)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.process_time() - self.started
        if state.global_step % self.every == 0:
            self.evaluate(state.global_step)


def run_arm(
    arm: Arm, seed: int, config: Path, num_cases: int, folder: Path, num_test_cases: int, num_validation_cases: int
) -> dict[str, Any]:
    """Trains one arm with one seed and scores it on the test cases, unless the same run has finished already."""
    output_dir = folder / f"{arm.folder}-{seed}"
    file = output_dir / "result.json"
    key = fingerprint(arm, seed, num_cases, num_test_cases, num_validation_cases, config.read_bytes())
    result = read_json(file)
    if result is not None and result["key"] == key:
        return result
    torch.set_num_threads(1)
    where = environment()
    train, validation = load_dataset("train", num_cases), load_dataset("validation", num_validation_cases)
    # Seed 1, because the recipes were chosen with the first test cases of seed 0
    test = load_dataset("test", num_test_cases, 1)
    shared = yaml.safe_load(config.read_text())
    passes = seconds = 0.0  # before training
    if arm.filtered:
        hard, seconds = hard_cases(config, num_cases, folder)
        train, passes = train.select(hard), float(num_cases * shared["num_inference_steps"])
    rewards = arm_rewards(arm)
    options = {"save_strategy": "no", "disable_tqdm": True, **arm.options}
    began, started = time.time(), time.process_time()
    if arm.method == "dpo":
        shutil.rmtree(output_dir / "mining", ignore_errors=True)  # the work of a stopped run was not counted
        (scorer,) = rewards
        score_name = scorer.log_name if isinstance(scorer, tuple(SCORERS.values())) else None
        thresholds = {"min_gap": 0.5} if score_name is not None else {"min_gap": 0.1, "min_chosen_score": 0.0}
        thresholds |= {} if arm.min_gap is None else {"min_gap": arm.min_gap}
        pairs = mine_preference_pairs(
            load_pipeline(), scorer, train, output_dir / "mining", score_name=score_name, **thresholds,
            resolution=32, num_inference_steps=shared["num_inference_steps"], true_cfg_scale=1.0, batch_size=100,
            cases_per_round=20, seed=seed,
        )  # fmt: skip
        passes += 5.0 * len(train) * shared["num_inference_steps"]
        seconds += time.process_time() - started
        options["latents_cache_dir"] = str(output_dir / "mining" / "latents")
        trainer = make_trainer(config, options, output_dir, seed, None, pairs, "dpo")
    else:
        method = "grpo" if arm.method == "none" else arm.method
        trainer = make_trainer(config, options, output_dir, seed, rewards, train, method)
    every = arm.options.get("eval_steps", shared["eval_steps"])
    progress = Progress(trainer, validation, every, passes, seconds)
    if arm.method == "none":
        progress.evaluate(0)
    else:
        trainer.add_callback(progress)
        trainer.train()
    wall_seconds = time.time() - began
    progress.evaluates = True
    before, after = evaluate_before_after(trainer, test)
    difference, error = paired_difference(before, after)
    clipped = [log["clip_ratio/region_mean"] for log in trainer.state.log_history if "clip_ratio/region_mean" in log]
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
        "sampling_passes": progress.counted["sampling"],
        "training_passes": progress.counted["training"],
        "clip_fraction": float(np.mean(clipped)) if clipped else 0.0,
        "cpu_seconds": round(progress.seconds, 1),
        "wall_seconds": round(wall_seconds, 1),
        "commit": where["commit"],
        "machine": where["machine"],
        "curve": progress.curve,
        "scores": after,
        "environment": where,
    }
    write_json(file, result)
    return result


def read_arms(file: Path, config: Path) -> list[Arm]:
    """
    Reads the arms of an experiment from a YAML file: a list of mappings of the fields of [`Arm`]. Each is checked as
    its run would be, before the first run.

    Args:
        file (`Path`):
            The file.
        config (`Path`):
            YAML file with the options that the arms share.

    Raises:
        `ValueError`: If it cannot be read, or an arm has an unknown field, method, option or reward, a value that is
            not valid, or the name of another one.
    """
    try:
        listed = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{file} must hold a list of arms, each with a name.")
    known = {f.name: f.type for f in fields(Arm)}
    arms: list[Arm] = []
    for one in listed:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise ValueError(f"{file}: each arm needs a name, but one is {one!r}.")
        where = f"{file}: the arm {one['name']!r}"
        if unknown := [name for name in one if name not in known]:
            raise ValueError(f"{where} has no field {', '.join(map(str, unknown))}; it has {', '.join(known)}.")
        try:
            arm = Arm(**one | {"rewards": tuple(named_rewards(one["rewards"]))} if "rewards" in one else one)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if arm.method not in (*TRAINERS, "none"):
            raise ValueError(f"{where} has method={arm.method!r}: use {', '.join(TRAINERS)} or none.")
        if not isinstance(arm.options, dict):
            raise ValueError(f"{where}: its options must be a mapping, but are {arm.options!r}.")
        if arm.folder in [other.folder for other in arms]:
            raise ValueError(f"{where} is there twice: names must differ.")
        try:
            rewards = arm_rewards(arm)
            if arm.method != "none":
                args, _ = training_options(config, arm.options, Path("outputs/checked"), 0, arm.method)
                weights = getattr(args, "reward_weights", None)
                if weights is not None and len(weights) != len(rewards):
                    raise ValueError(f"reward_weights has {len(weights)} entries for {len(rewards)} rewards.")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        arms.append(arm)
    return arms


def run_experiment(
    name: str, arms: Sequence[Arm], seeds: Sequence[int], config: Path, output_dir: Path, num_cases: int = 1500,
    processes: int = 2, runs_dir: Path = Path("outputs/experiments"), num_test_cases: int = 400,
    num_validation_cases: int = 100,
) -> list[dict[str, Any]]:  # fmt: skip
    """
    Runs every arm with every seed, one core each, and writes the results as `name.json`, `name.csv`,
    `name_curves.csv`, `name.md` and `name.png`. It can be stopped at any time: finished runs are kept in
    `runs_dir/name`, and are only repeated if the code, the weights or the recipe have changed.

    Args:
        name (`str`):
            Name of the experiment.
        arms (`Sequence[Arm]`):
            The recipes. All are compared with the first.
        seeds (`Sequence[int]`):
            The seeds. Each arm runs with each seed.
        config (`Path`):
            YAML file with the options that the arms share.
        output_dir (`Path`):
            Folder for the results.
        num_cases (`int`, *optional*, defaults to `1500`):
            Number of training cases, before filtering.
        processes (`int`, *optional*, defaults to `2`):
            Number of runs at a time.
        runs_dir (`Path`, *optional*, defaults to `outputs/experiments`):
            Folder for the runs.
        num_test_cases (`int`, *optional*, defaults to `400`):
            Number of test cases.
        num_validation_cases (`int`, *optional*, defaults to `100`):
            Number of validation cases.

    Returns:
        `list[dict]`: the result of each run.
    """
    folder = runs_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    if any(arm.filtered for arm in arms):
        hard_cases(config, num_cases, folder)  # once, before the runs that read it
    runs = []
    # A plain fork would inherit torch's threads, and a new interpreter would import everything again.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hp_edit_trl.trainer.flow_grpo_edit_trainer", "hp_edit_trl.miniature"])
    with ProcessPoolExecutor(processes, mp_context=context) as executor:
        rest = config, num_cases, folder, num_test_cases, num_validation_cases
        jobs = [executor.submit(run_arm, arm, seed, *rest) for seed in seeds for arm in arms]
        for job in tqdm(as_completed(jobs), name, total=len(jobs)):
            runs.append(job.result())
    order = [arm.name for arm in arms]
    runs.sort(key=lambda run: (order.index(run["arm"]), run["seed"]))
    columns = [column for column in runs[0] if column not in ("key", "curve", "scores", "environment")]
    write_csv(output_dir / f"{name}.csv", columns, runs)
    points = [{"arm": run["arm"], "seed": run["seed"], **point} for run in runs for point in run["curve"]]
    write_csv(output_dir / f"{name}_curves.csv", list(points[0]), points)
    summary = summarize(runs)
    record = {
        "command": shown_command(),
        "config": yaml.safe_load(config.read_text()),
        "summary": summary,
        "runs": runs,
    }
    write_json(output_dir / f"{name}.json", record)
    write_text(output_dir / f"{name}.md", summary_page(name, summary, runs))
    draw_figure(runs, summary, output_dir / f"{name}.png")
    print(summary_table(summary))
    return runs


def write_csv(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def command(name: str, arms: Sequence[Arm], config: Path, description: str, num_cases: int = 1500) -> None:
    """Runs an experiment from the command line, which sets config, seeds, processes and the folder for the results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=config, help="YAML file with the options that the arms share")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="number of runs at a time, one core each")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="folder for the results")
    args = parser.parse_args()
    run_experiment(name, arms, args.seeds, args.config, args.output_dir, num_cases, args.processes)


def at_budget(run: dict[str, Any], budget: str, limit: float) -> float:
    """Validation score of a run when it had used `limit` of a budget, interpolated between evaluations."""
    curve = run["curve"]
    return float(np.interp(limit, [point[budget] for point in curve], [point["score"] for point in curve]))


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Summarizes each arm: means over its seeds with their standard error; the difference from the first arm, paired by
    case and averaged over seeds, with its standard error over the cases; and validation scores at equal budgets, when
    all arms had used as many transformer passes, or CPU seconds, as the cheapest arm used in total; and the gain per
    thousand passes.
    """
    trained = [run for run in runs if len(run["curve"]) > 1]
    limits = {
        budget: min(run["curve"][-1][budget] for run in trained) for budget in ("thousand_passes", "cpu_seconds")
    }
    summary = []
    first = None
    for arm in dict.fromkeys(run["arm"] for run in runs):
        rows = [run for run in runs if run["arm"] == arm]
        line: dict[str, Any] = {"arm": arm, "seeds": len(rows)}
        names = ("before", "score", "difference", "share_of_5", *TASKS, "clip_fraction", "cpu_seconds", "wall_seconds")
        for name in names:
            values = np.array([row[name] for row in rows])
            line[name] = round(float(values.mean()), 4)
            if name in ("score", "difference", *TASKS) and len(rows) > 1:
                line[f"{name}_se"] = round(float(values.std(ddof=1) / len(rows) ** 0.5), 4)
        per_case = np.mean([row["scores"] for row in rows], axis=0)
        first = per_case if first is None else first
        line["against_first"], line["against_first_se"] = (
            round(x, 4) for x in paired_difference(first.tolist(), per_case.tolist())
        )
        line["thousand_passes"] = round(float(np.mean([row["curve"][-1]["thousand_passes"] for row in rows])), 2)
        if line["thousand_passes"]:
            line["gain_per_thousand_passes"] = round(line["difference"] / line["thousand_passes"], 5)
        for budget, limit in limits.items():
            line[f"at_{budget}"] = round(float(np.mean([at_budget(row, budget, limit) for row in rows])), 4)
        summary.append(line)
    return summary


def summary_table(summary: list[dict[str, Any]]) -> str:
    """Makes the Markdown table of a summary."""
    columns = ["arm", "seeds", "before", "after", "gain", "against the first", "share of 5", *TASKS]
    columns += ["at equal passes", "at equal CPU seconds", "clipped", "CPU minutes", "thousand passes"]
    columns += ["gain per thousand passes"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for line in summary:
        seeds = {name: f" ± {line[f'{name}_se']:.3f}" if line["seeds"] > 1 else "" for name in ("score", "difference")}
        cells = [line["arm"], str(line["seeds"]), f"{line['before']:.3f}", f"{line['score']:.3f}{seeds['score']}"]
        cells += [f"{line['difference']:+.3f}{seeds['difference']}"]
        cells += [f"{line['against_first']:+.3f} ± {line['against_first_se']:.3f}", f"{line['share_of_5']:.2f}"]
        cells += [
            f"{line[task]:.2f}" + (f" ± {line[f'{task}_se']:.2f}" if line["seeds"] > 1 else "") for task in TASKS
        ]
        cells += [f"{line['at_thousand_passes']:.3f}", f"{line['at_cpu_seconds']:.3f}", f"{line['clip_fraction']:.3f}"]
        cells += [f"{line['cpu_seconds'] / 60:.1f}", f"{line['thousand_passes']:.1f}"]
        cells += [f"{line['gain_per_thousand_passes']:.4f}" if line["thousand_passes"] else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def summary_page(name: str, summary: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """Makes the page of an experiment: the table, the meaning of its columns, and the command and machine."""
    commits, machines = ({run[key] for run in runs} for key in ("commit", "machine"))
    note = " (**runs of several commits**)" if len(commits) > 1 else ""
    return f"""# {name}

{summary_table(summary)}
Scores are those of RuleScorer (0 to 5) on {len(runs[0]["scores"])} test cases. *gain*: difference from the pretrained
policy with the same noise. ± of *after*, *gain* and the tasks: standard error over the seeds. *against the first*:
difference from the first arm, paired by case, ± its standard error over the cases. *at equal passes*, *at equal CPU
seconds*: validation scores when each arm had used as much as the cheapest arm used in total. *clipped*: share of
trained steps that were clipped. *thousand passes*: forward passes through the transformer, of one image each, in the
whole run without its evaluations; backward passes are not counted.

![Validation scores over passes and CPU seconds; test scores of each run]({name}.png)

Made by `{shown_command()}` at commit {", ".join(sorted(commits))}{note} on {"; ".join(sorted(machines))}.
"""


def draw_figure(runs: list[dict[str, Any]], summary: list[dict[str, Any]], path: Path) -> None:
    """Draws validation scores over transformer passes and CPU seconds (mean and range over seeds), and test scores."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), dpi=100, layout="constrained")
    by_passes, by_seconds, ends = figure.subplots(1, 3)
    styles = ("-", "--", ":", "-.")
    for i, line in enumerate(summary):
        rows = [run for run in runs if run["arm"] == line["arm"]]
        scores = np.array([[point["score"] for point in run["curve"]] for run in rows])
        color, style = f"C{i % 10}", styles[i // 4 % 4]
        for axes, budget in ((by_passes, "thousand_passes"), (by_seconds, "cpu_seconds")):
            places = np.mean([[point[budget] for point in run["curve"]] for run in rows], axis=0)
            axes.plot(places, scores.mean(0), label=line["arm"], color=color, linestyle=style)
            axes.fill_between(places, scores.min(0), scores.max(0), color=color, alpha=0.12, linewidth=0)
        ends.plot([run["score"] for run in rows], [i] * len(rows), "o", color=color, alpha=0.4)
        ends.errorbar(line["score"], i, xerr=line.get("score_se"), fmt="D", color=color, capsize=4)
    by_passes.set(xlabel="transformer passes (thousands)", ylabel="score on validation cases")
    by_seconds.set(xlabel="CPU seconds")
    figure.legend(*by_passes.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize="small")
    ends.axvline(np.mean([run["before"] for run in runs]), color="grey", linestyle=":", label="before training")
    ends.set(xlabel="score on test cases: each seed, mean ± standard error", yticks=range(len(summary)))
    ends.set_yticklabels([line["arm"] for line in summary], fontsize="small")
    ends.invert_yaxis()
    ends.legend(fontsize="small")
    for axes in (by_passes, by_seconds, ends):
        axes.grid(alpha=0.3)
    figure.savefig(path)


def shown_command() -> str:
    return " ".join(["python", *sys.argv])


def environment() -> dict[str, Any]:
    """What a result has to name to be reproducible: commit, versions, machine."""
    commit, root = "unknown", Path(__file__).parents[2]
    if (root / ".git").exists():
        git = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True)
        with contextlib.suppress(OSError):
            commit = git(["git", "describe", "--always"]).stdout.strip() or commit
            # Results of the experiments before are no change of the code
            if git(["git", "status", "--porcelain", "--untracked-files=no", ".", ":!docs/results"]).stdout:
                commit += "-dirty"
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "commit": commit,
        "versions": {name: version(name) for name in ("torch", "transformers", "diffusers", "peft", "trl")},
        "machine": f"{processor}, {os.cpu_count()} cores, {platform.system()}",
    }
