"""
What an update takes: CPU seconds beside those of the bare model calls; how they grow with each setting, beside counted
passes and operations; what score a thousand passes gain; what an update of the full-size recipe takes if passes are
left out; and what is saved where passes of a case share a prefix.

    python benchmarks/bench.py --write           # all parts, into docs/performance.md and its plot
    python benchmarks/bench.py growth --write    # one part; the others stay as they were measured

Models are random Qwen-Image-Edit pipelines on one CPU thread, in fp32. `learning` trains nothing: it reads what
`examples/miniature/fewer_passes.py` has written. `recipe` and `prefix` are `hp-edit plan`, on tensors without bytes.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock


os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import psutil
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

from hp_edit_trl import FlowGRPOEditConfig, FlowGRPOEditTrainer
from hp_edit_trl.miniature.tiny import tiny_pipeline, tiny_qwen_image_21_pipeline
from hp_edit_trl.policies import QwenImage21Policy
from hp_edit_trl.scripts.plan import plan
from hp_edit_trl.utils.dry_run import Meter
from hp_edit_trl.utils.files import read_json, write_json, write_text
from hp_edit_trl.utils.tables import markdown_table


ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- written by benchmarks/bench.py: {} -->\n", "<!-- end -->\n"
PHASES = {"encode": "encoding", "rollout": "rollout", "decode": "decoding", "train": "training"}

SMALL = {"num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 16}
MEDIUM = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32}
LARGE = {"num_layers": 4, "num_attention_heads": 8, "attention_head_dim": 64}
# What differs from the defaults of `make_trainer`, by model
EDITS = {"cases": 2, "steps": 4, "window": 3}
OVERHEAD = [
    (SMALL, {**EDITS, "pixels": 64}),
    (MEDIUM, {**EDITS, "pixels": 64}),
    (MEDIUM, {**EDITS, "pixels": 64, "batch": 1}),
    (MEDIUM, {**EDITS, "pixels": 64, "cfg": 4.0}),
    (MEDIUM, {**EDITS, "pixels": 128}),
    (MEDIUM, {**EDITS, "pixels": 128, "cfg": 4.0}),
    (LARGE, {"pixels": 128, "steps": 2}),
]
GROWTH = {
    "edits per case": ("group", [4, 8, 16, 32], {}),
    "steps": ("steps", [4, 8, 16, 32], {}),
    "trained steps": ("window", [1, 2, 4, 8], {"steps": 10}),
    "pixels per side": ("pixels", [32, 64, 128, 256], {}),
    "references": ("references", [1, 2, 4], {}),
    "cases": ("cases", [1, 2, 4, 8], {}),
}
RECIPE = ROOT / "examples" / "configs" / "qwen_image_edit_2509.yaml"
FEWER = {
    "none": {},
    "`same_latent`": {"same_latent": True},
    "`num_finish_steps` 2": {"num_finish_steps": 2},
    "half trained (`num_trained_generations`)": {"half": True},
    "all three": {"same_latent": True, "num_finish_steps": 2, "half": True},
}

PREFIX_RECIPE = ROOT / "examples" / "configs" / "qwen_image_21.yaml"
PREFIX_PROCESSES = 4
SIZES = [(512, 1), (1024, 1), (512, 4)]  # pixels per side, references


def brightness(completions: list[Image.Image], **_: Any) -> list[float]:
    return [float(np.asarray(image).mean()) + number for number, image in enumerate(completions)]


def make_trainer(
    model: dict[str, int], cases: int = 1, group: int = 4, steps: int = 4, window: int = 1, pixels: int = 64,
    references: int = 1, batch: int = 4, cfg: float = 1.0,
) -> FlowGRPOEditTrainer:  # fmt: skip
    """A trainer that has trained for one update, so that it is as Trainer prepares it, with warm caches."""
    noise = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"make the image more red, variant {number}",
            "images": [
                Image.fromarray(noise.integers(0, 255, (pixels, pixels, 3), dtype=np.uint8)) for _ in range(references)
            ],
        }
        for number in range(cases)
    ]
    args = FlowGRPOEditConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        num_generations=group, per_device_train_batch_size=batch, gradient_accumulation_steps=cases * group // batch,
        rollout_batch_size=batch, resolution=pixels, num_inference_steps=steps, true_cfg_scale=cfg, noise_level=0.7,
        sde_window_size=window, sde_window_range=[0, window], max_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = FlowGRPOEditTrainer(
        tiny_pipeline(**model), brightness, args, Dataset.from_list(rows), peft_config=LoraConfig(r=8)
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return trainer


def update(trainer: FlowGRPOEditTrainer) -> None:
    """Samples, judges and trains one generation batch."""
    trainer._step = 0
    indices = [case for case in range(trainer.cases_per_batch) for _ in range(trainer.num_generations)]
    for _ in range(trainer.args.gradient_accumulation_steps):
        trainer.training_step(trainer.model, indices)
    step(trainer)


def step(trainer: FlowGRPOEditTrainer) -> None:
    trainer.optimizer.step()
    trainer.model.zero_grad()


def cpu_seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def busy_seconds() -> float:
    """CPU seconds that everything on the machine has used."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0)


# Ratios to the bare model calls


def record(trainer: FlowGRPOEditTrainer) -> dict[str, list[Callable[[], Any]]]:
    """The calls of the models in an update, by phase, each with the tensors that it was made with."""
    pipeline = trainer.policy.pipeline
    calls: dict[str, list[Callable[[], Any]]] = defaultdict(list)
    phase = "none"

    def recording(function: Callable) -> Callable:
        def call(*args, **kwargs):
            calls[phase].append(partial(function, *args, **kwargs))
            return function(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def entered(name: str) -> Iterator[None]:
        nonlocal phase
        phase = name
        yield

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(trainer, "_timed", entered))
        for owner, name in (
            (pipeline.transformer, "forward"), (pipeline.text_encoder, "forward"), (pipeline.vae, "encode"),
            (pipeline.vae, "decode"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, recording(getattr(owner, name))))
        update(trainer)
    return calls


def bare(trainer: FlowGRPOEditTrainer, calls: dict[str, list[Callable[[], Any]]]) -> dict[str, float]:
    """CPU seconds of the same calls with nothing around them, but backward passes and the optimizer's step."""
    seconds = {}
    for phase in PHASES:
        trainer.model.train(phase == "train")

        def replay(phase=phase):
            for call in calls[phase]:
                out = call()
                if phase == "train":
                    out[0].square().mean().backward()

        with torch.set_grad_enabled(phase == "train"):
            seconds[phase] = cpu_seconds(replay)
    seconds["update"] = sum(seconds.values()) + cpu_seconds(lambda: step(trainer))
    return seconds


def own(trainer: FlowGRPOEditTrainer) -> dict[str, float]:
    """CPU seconds of an update and its phases."""
    seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def timed(phase: str) -> Iterator[None]:
        start = time.process_time()
        yield
        seconds[phase] += time.process_time() - start

    with mock.patch.object(trainer, "_timed", timed):
        seconds["update"] = cpu_seconds(lambda: update(trainer))
    return seconds


def overhead(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for model, setting in OVERHEAD[:1] if quick else OVERHEAD:
        trainer = make_trainer(model, **setting)
        parameters = sum(p.numel() for p in trainer.policy.pipeline.transformer.parameters() if not p.requires_grad)
        calls = record(trainer)
        turns = [(own(trainer), bare(trainer, calls)) for _ in range(1 if quick else 7)]
        rows.append(
            {
                "parameters": parameters,
                **setting,
                "seconds": statistics.median(mine["update"] for mine, _ in turns),
                **{
                    name: statistics.median(mine[phase] / other[phase] for mine, other in turns)
                    for phase, name in {"update": "update", **PHASES}.items()
                },
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def overhead_table(rows: list[dict[str, Any]]) -> str:
    return markdown_table(
        ["transformer", "px", "CFG", "batch", "CPU s", "update", *PHASES.values()],
        [
            [
                f"{row['parameters'] / 1e6:.1f}M", row["pixels"], f"{row.get('cfg', 1.0):g}", row.get("batch", 4),
                f"{row['seconds']:.2f}", *(f"{row[name]:.2f}" for name in ("update", *PHASES.values())),
            ]
            for row in rows
        ],
    )  # fmt: skip


# Growth


def count(trainer: FlowGRPOEditTrainer) -> dict[str, float]:
    """Passes of single samples through the transformer, operations, and bytes of new tensors in an update."""
    meter = Meter()
    transformer = trainer.policy.pipeline.transformer

    def count_passes(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        meter.count("passes", len(kwargs["hidden_states"]))

    hook = transformer.register_forward_pre_hook(count_passes, with_kwargs=True)
    with meter:
        update(trainer)
    hook.remove()
    counts = dict(meter.phase.counts)
    return {"passes": counts.pop("passes"), "operations": sum(counts.values()), "bytes": meter.phase.peak}


def mean_seconds(trainer: FlowGRPOEditTrainer, times: int) -> float:
    return cpu_seconds(lambda: [update(trainer) for _ in range(times)]) / times


def growth(quick: bool) -> dict[str, list[dict[str, Any]]]:
    families = {}
    for family, (option, values, others) in list(GROWTH.items())[: 1 if quick else None]:
        values = values[:2] if quick else values
        trainers = [make_trainer(MEDIUM, **{**others, option: value}) for value in values]
        points = [{"value": value, **count(trainer)} for value, trainer in zip(values, trainers, strict=True)]
        # Small settings several times, so that other work on the machine slows all down alike
        times = [min(8, round(points[-1]["operations"] / point["operations"])) for point in points]
        turns = [[mean_seconds(*one) for one in zip(trainers, times, strict=True)] for _ in range(1 if quick else 5)]
        for place, point in enumerate(points):
            point["seconds"] = statistics.median(turn[place] for turn in turns)
        families[family] = points
        print(family, families[family], file=sys.stderr, flush=True)
    return families


def growth_table(families: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for family, points in families.items():
        first = points[0]
        for point in points:
            relative = [f"{point[name] / first[name]:.2f}" for name in ("passes", "operations", "seconds")]
            rows.append([f"{family} {point['value']}", point["passes"], f"{point['operations'] / 1e9:.2f}"])
            rows[-1] += [f"{point['bytes'] / 2**20:.1f}", f"{point['seconds']:.3f}", *relative]
    return markdown_table(
        ["setting", "passes", "GFLOP", "MiB held", "CPU s", "passes ×", "operations ×", "CPU s ×"], rows
    )


# Score per thousand passes


def learning(file: Path) -> list[dict[str, Any]] | None:
    """The arms of the experiment with fewer passes, means over their seeds. `None` if it has not been run."""
    record = read_json(file)
    if record is None:
        return None
    arms = []
    for arm in dict.fromkeys(run["arm"] for run in record["runs"]):
        runs = [run for run in record["runs"] if run["arm"] == arm]
        passes = [run["curve"][-1]["thousand_passes"] for run in runs]
        gains = [run["difference"] for run in runs]
        arms.append(
            {
                "arm": arm,
                "seeds": len(runs),
                "passes": statistics.mean(passes),
                "trained": statistics.mean(run["training_passes"] / 1000 for run in runs),
                "gain": estimate(gains),
                "per_thousand": estimate([gain / spent for gain, spent in zip(gains, passes, strict=True)]),
                "curve": [
                    [statistics.mean(point[name] for point in points) for name in ("thousand_passes", "score")]
                    for points in zip(*(run["curve"] for run in runs), strict=True)
                ],
            }
        )
    return arms


def estimate(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def learning_table(arms: list[dict[str, Any]] | None) -> str:
    if arms is None:
        return "Not measured yet: `python examples/miniature/fewer_passes.py` trains the arms.\n"
    return markdown_table(
        ["options", "seeds", "thousand passes", "of them trained", "of the first", "gain", "gain per thousand passes"],
        [
            [
                arm["arm"], arm["seeds"], f"{arm['passes']:.1f}", f"{arm['trained']:.1f}",
                f"{arm['passes'] / arms[0]['passes']:.0%}", "{:+.3f} ± {:.3f}".format(*arm["gain"]),
                "{:+.4f} ± {:.4f}".format(*arm["per_thousand"]),
            ]
            for arm in arms
        ],
    )  # fmt: skip


# The full-size recipe with fewer passes


def recipe(quick: bool) -> dict[str, dict[str, Any]]:
    """Figures of `hp-edit plan` for an update of the recipe, by the options that leave out passes."""
    from tests.full_size import full_size_folder

    shipped = yaml.safe_load(RECIPE.read_text())
    sampled = shipped["num_generations"]
    shipped["gradient_accumulation_steps"] *= sampled // (shipped.pop("num_trained_generations", None) or sampled)
    shipped |= {"same_latent": False, "num_finish_steps": None}
    updates = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        if quick:
            tiny_pipeline().save_pretrained(model)
            shipped |= {"resolution": 64, "num_generations": 2, "gradient_accumulation_steps": 2}
        else:
            full_size_folder("qwen_image_edit_2509", model)  # its text encoder is short: only encoding differs
        for name, options in list(FEWER.items())[-1 if quick else 0 :]:
            options = dict(options)
            if options.pop("half", False):
                options["num_trained_generations"] = shipped["num_generations"] // 2
                options["gradient_accumulation_steps"] = shipped["gradient_accumulation_steps"] // 2
            config, output = Path(folder, "config.yaml"), Path(folder, "plan.json")
            config.write_text(yaml.safe_dump(shipped | options))
            words = ["--config", str(config), "--model_name_or_path", str(model), "--output", str(output)]
            with contextlib.redirect_stdout(io.StringIO()):
                plan([*words, "--num_processes", "8", "--num_sample_edits", "0"])
            updates[name] = read_json(output)["update"]
            print(name, updates[name], file=sys.stderr, flush=True)
    return updates


def petaflop(update: dict[str, Any], phase: str) -> float:
    """Operations of an update, of all 8 processes, in PFLOP."""
    return 8 * update["flops"][phase] / 1e15


def recipe_table(updates: dict[str, dict[str, Any]]) -> str:
    rows = []
    phases = ("rollout", "decoding", "training")
    for name, figures in updates.items():
        work = [petaflop(figures, phase) for phase in phases]
        first = [petaflop(next(iter(updates.values())), phase) for phase in phases]
        rows.append([name, f"{figures['rollout_passes']:,}", f"{figures['trained_passes']:,}"])
        rows[-1] += [*(f"{number:.0f}" for number in work), f"{sum(work) / sum(first):.0%}"]
    return markdown_table(
        ["passes left out by", "rollout passes", "trained passes", *(f"{phase} PFLOP" for phase in phases), "of all"],
        rows,
    )


# A prefix that passes of a case share


def prefix(quick: bool) -> list[dict[str, Any]]:
    """Figures of `hp-edit plan` for an update of Qwen-Image-2.1's recipe, with shared prefixes and without."""
    from tests.full_size import full_size_folder

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model, output = Path(folder, "model"), Path(folder, "plan.json")
        words = ["--config", str(PREFIX_RECIPE), "--model_name_or_path", str(model), "--output", str(output)]
        words += ["--num_processes", str(PREFIX_PROCESSES), "--num_sample_edits", "0", "--gpu", "h200"]
        if quick:
            tiny_qwen_image_21_pipeline().save_pretrained(model)
            words += ["--num_generations", "2", "--num_trained_generations", "1", "--gradient_accumulation_steps", "2"]
        else:
            full_size_folder("qwen_image_21", model)  # its text encoder is short: only encoding differs
        for pixels, references in [(64, 1)] if quick else SIZES:
            own = ["--resolution", str(pixels), "--num_references", str(references)]
            for shared in (True, False):
                never = mock.patch.object(QwenImage21Policy, "has_prefix", property(lambda _: False, lambda *_: None))
                with contextlib.redirect_stdout(io.StringIO()), contextlib.nullcontext() if shared else never:
                    plan([*words, *own])
                made = read_json(output)
                training = made["phases"]["training"]["peak"] / 2**30
                rows.append(
                    {
                        "pixels": pixels, "references": references, "shared": shared, "training_gib": training,
                        "update": made["update"],
                    }
                )  # fmt: skip
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def prefix_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for shared, alone in zip(rows[::2], rows[1::2], strict=True):
        lines.append([shared["pixels"], shared["references"], f"{shared['update']['prefixes']:,}"])
        for phases in (["rollout"], ["training"], ["rollout", "training"]):
            with_it, without = (
                PREFIX_PROCESSES * sum(row["update"]["flops"][phase] for phase in phases) / 1e15
                for row in (shared, alone)
            )
            lines[-1] += [f"{without:.1f}", f"{with_it:.1f}"] if len(phases) == 1 else [f"{with_it / without:.0%}"]
        lines[-1] += [f"{alone['training_gib']:.1f}", f"{shared['training_gib']:.1f}"]
    return markdown_table(
        [
            "px", "references", "prefixes", "rollout PFLOP, in each pass", "shared", "training PFLOP, in each pass",
            "shared", "of all", "training GiB, in each pass", "shared",
        ],
        lines,
    )  # fmt: skip


# The page


def draw(results: dict[str, Any], arms: list[dict[str, Any]] | None, path: Path) -> None:
    """Draws all parts that there are results of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 13 if arms else 9), dpi=100, layout="constrained")
    top, middle, *bottom = figure.subfigures(2 + bool(arms), 1, height_ratios=[4, 5.5, 4][: 2 + bool(arms)])
    ratios, operations = top.subplots(1, 2)

    if rows := results.get("overhead", {}).get("result"):
        labels = [
            f"{row['parameters'] / 1e6:.1f}M, {row['pixels']} px, batch {row.get('batch', 4)}"
            + (", CFG" if row.get("cfg", 1.0) > 1 else "")
            for row in rows
        ]
        for name, style in (("rollout", "oC0"), ("training", "sC1"), ("update", "Dk")):
            ratios.plot([row[name] for row in rows], range(len(rows)), style, label=name)
        ratios.axvline(1, color="grey", linewidth=1)
        ratios.set(yticks=range(len(rows)), yticklabels=labels, title="CPU seconds, as a multiple of the bare calls'")
        ratios.set_xlim(min(0.9, ratios.get_xlim()[0]), max(1.25, ratios.get_xlim()[1]))
        ratios.grid(alpha=0.3)
        ratios.invert_yaxis()
        ratios.legend(fontsize="small", loc="lower right")

    if updates := results.get("recipe", {}).get("result"):
        left = np.zeros(len(updates))
        for phase, color in (("rollout", "C0"), ("training", "C1")):
            widths = [petaflop(figures, phase) for figures in updates.values()]
            operations.barh(range(len(updates)), widths, left=left, color=color, label=phase)
            left += widths
        for place, total in enumerate(left):
            operations.text(total, place, f" {total / left[0]:.0%}", va="center", fontsize="small")
        names = [name.replace("`", "").replace(" (", "\n(") for name in updates]
        operations.set(yticks=range(len(updates)), yticklabels=names, xlim=(0, left[0] * 1.12))
        operations.set(title="An update of the full-size recipe", xlabel="PFLOP")
        operations.invert_yaxis()
        operations.legend(fontsize="small", loc="lower right")

    if families := results.get("growth", {}).get("result"):
        middle.suptitle("An update, as a multiple of the smallest setting's")
        panels = middle.subplots(2, 3).flat
        for axes, (family, points) in zip(panels, families.items(), strict=False):
            values = [point["value"] for point in points]
            for name, style in (("passes", ":C7"), ("operations", "--C0"), ("seconds", "o-C3")):
                axes.plot(values, [point[name] / points[0][name] for point in points], style, label=name)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set(xticks=values, xticklabels=values, xlabel=family)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
            axes.minorticks_off()
        middle.axes[0].legend(fontsize="small")

    if arms:
        curves, gains = bottom[0].subplots(1, 2)
        for place, arm in enumerate(arms):
            curves.plot(
                *zip(*arm["curve"], strict=True), marker="o", markersize=3, color=f"C{place}", label=arm["arm"]
            )
            value, error = arm["per_thousand"]
            gains.barh(place, value, xerr=error, color=f"C{place}", capsize=3)
        curves.set(xlabel="thousand passes through the transformer", ylabel="score on validation cases")
        curves.set_title("Miniature: score over passes")
        curves.grid(alpha=0.3)
        curves.legend(fontsize="small")
        gains.set(yticks=range(len(arms)), yticklabels=[arm["arm"] for arm in arms])
        gains.set_title("Miniature: gain per thousand passes")
        gains.invert_yaxis()
    for axes in figure.axes:
        axes.set_visible(axes.has_data())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures = {"overhead": overhead, "growth": growth, "recipe": recipe, "prefix": prefix}
    tables = {"overhead": overhead_table, "growth": growth_table, "recipe": recipe_table, "prefix": prefix_table}
    parser.add_argument("parts", nargs="*", help=f"{', '.join(measures)} or learning; by default all")
    parser.add_argument("--quick", action="store_true", help="smallest settings, once, with a tiny recipe")
    parser.add_argument("--write", action="store_true", help="write figures and plot into the documentation")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the documentation")
    args = parser.parse_args()
    if unknown := set(args.parts) - {*measures, "learning"}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "examples" / "miniature"))
    from experiments import environment

    kept = args.docs / "results" / "performance.json"
    results = read_json(kept) or {}
    texts = {}
    for part in args.parts or [*measures, "learning"]:
        if part == "learning":
            continue
        where, start, busy, used = environment(), time.time(), busy_seconds(), time.process_time()
        result = measures[part](args.quick)
        seconds = time.time() - start
        others = (busy_seconds() - busy - (time.process_time() - used)) / seconds
        versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "diffusers", "transformers"))
        results[part] = {
            "measured": f"{time.strftime('%Y-%m-%d')}, {where['machine']}, {versions}; in "
            f"{seconds:.0f} s, beside other work on {others:.1f} of {os.cpu_count()} cores.",
            "result": result,
        }
        texts[part] = f"Measured on {results[part]['measured']}\n\n{tables[part](result)}"
    arms = learning(args.docs / "results" / "fewer_passes.json")
    if not args.parts or "learning" in args.parts:
        texts["learning"] = learning_table(arms)
    for part, text in texts.items():
        print(f"{part}\n\n{text}")
    if args.write:
        write_json(kept, results)
        page = args.docs / "performance.md"
        content = page.read_text()
        for part, text in texts.items():
            before, begin, rest = content.partition(BEGIN.format(part))
            content = before + begin + text + "\n" + END + rest.partition(END)[2]
        write_text(page, content)
        draw(results, arms, args.docs / "assets" / "performance.png")


if __name__ == "__main__":
    main()
