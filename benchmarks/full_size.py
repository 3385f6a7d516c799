"""
Qwen-Image-Edit-2509 at its published size on one GPU, with random weights: what a pass takes, and what updates of a
recipe take, beside what `hp-edit plan` says of them.

    python benchmarks/full_size.py write --folder /data/editor                      # 57 GB, once, on a GPU
    python benchmarks/full_size.py passes --folder /data/editor
    python benchmarks/full_size.py updates --folder /data/editor --config examples/configs/qwen_image_edit_2509.yaml
    python benchmarks/full_size.py updates --folder /data/editor --config ... --resolution 1024

`--tiny` runs the same code with small models, on a CPU as well. Everything is real but weights, pictures and rewards:
the files are loaded by the library's own code, the config is read by the command's own parser, and the trainer trains.
Tokenizer and prompt are small; the prompt's text tokens and those of the picture that the text encoder sees are as
many as in a plan.

Operations are those of matrix products, convolutions and attention, with what gradient checkpointing computes again.
Utilization is their number per second over that of a large bfloat16 matrix product timed in the same run.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from datasets import Dataset
from diffusers import QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback
from trl import get_peft_config

from hp_edit_trl import DPOEditTrainer, FlowGRPOEditConfig, FlowGRPOEditTrainer
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.policies import EditConditions, rollout
from hp_edit_trl.scripts.plan import TRAINERS, choose_trainer
from hp_edit_trl.scripts.utils import ScriptParser
from hp_edit_trl.trainer.online_edit_trainer import Sample
from hp_edit_trl.utils.dry_run import Meter
from hp_edit_trl.utils.seeding import seeded_generator


CUDA = torch.cuda.is_available()
COLORS = ["red", "blue", "green", "white", "black", "gray", "pink", "brown"]


def synchronize() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function, repeats: int) -> float:
    """Median seconds, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = synchronize()
        function()
        times.append(synchronize() - start)
    return float(np.median(times[1:]))


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if CUDA else float("nan")


def reset_peak() -> None:
    if CUDA:
        torch.cuda.reset_peak_memory_stats()


def header() -> tuple[str, float]:
    """The machine, and its operations per second in a bfloat16 matrix product."""
    size, device = (8192, "cuda") if CUDA else (512, "cpu")
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    peak = 2 * size**3 / timed(lambda: a @ b, 20)
    card = torch.cuda.get_device_name() if CUDA else "CPU"
    return (
        f"{time.strftime('%Y-%m-%d')}, {card}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"transformers {transformers.__version__}; matrix product {peak / 1e12:.3g} TFLOP/s"
    ), peak


def write(folder: Path, tiny: bool) -> None:
    """Writes a pipeline with random weights in bfloat16, as it lies on the Hub."""
    if tiny:
        tiny_pipeline().to(torch.bfloat16).save_pretrained(folder)
        return
    from tests.full_size import full_size_folder

    full_size_folder("qwen_image_edit_2509", folder, short=False)
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("transformer", "vae", "text_encoder"):
        library, class_name = index[name]
        kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            if library == "diffusers":
                module = kind.from_config(kind.load_config(folder, subfolder=name))
            else:
                module = kind._from_config(transformers.AutoConfig.from_pretrained(folder / name))
        torch.set_default_dtype(torch.float32)
        print(f"{name}: {sum(p.numel() for p in module.parameters()) / 1e9:.2f}B", flush=True)
        module.save_pretrained(folder / name, max_shard_size="5GB")
        del module
        torch.cuda.empty_cache()


# Passes


def passes_trainer(folder: Path, tiny: bool) -> FlowGRPOEditTrainer:
    transformer = QwenImageTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", dtype=torch.bfloat16, device_map=None if tiny else "cuda"
    )
    pipeline = QwenImageEditPlusPipeline(**{**tiny_pipeline().components, "transformer": transformer.eval()})
    args = FlowGRPOEditConfig(
        output_dir=tempfile.mkdtemp(), bf16=True, use_cpu=not CUDA, report_to="none", num_generations=2,
        per_device_train_batch_size=1, gradient_accumulation_steps=2, save_strategy="no", num_inference_steps=3,
        sde_window_size=1,
    )  # fmt: skip
    cases = Dataset.from_list([{"prompt": "unused", "image": Image.new("RGB", (64, 64))}])
    trainer = FlowGRPOEditTrainer(pipeline, brightness, args, cases, peft_config=LoraConfig(r=32, lora_alpha=64))
    transformer.enable_gradient_checkpointing()
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def random_conditions(trainer, resolution: int, text_tokens: int) -> EditConditions:
    device = trainer.accelerator.device
    generator = torch.Generator(device).manual_seed(0)
    tokens, config = (resolution // 16) ** 2, trainer.policy.pipeline.transformer.config

    def noise(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)

    tensors = {
        "prompt_embeds": noise(text_tokens, config.joint_attention_dim),
        "negative_prompt_embeds": noise(text_tokens - 20, config.joint_attention_dim),
        "image_latents": noise(tokens, config.in_channels),
    }
    return EditConditions(resolution, resolution, tokens, config.in_channels, ((resolution, resolution),), tensors)


def counted(operations: dict, name: tuple, function):
    """Runs a function, the first time for a name with its operations counted: compiled code does not show them."""
    if name in operations:
        return function()
    with Meter() as meter:
        result = function()
    operations[name] = sum(meter.phase.counts.values())
    return result


def measure(
    trainer, resolution: int, cfg: float, batch: int, train_batch: int, repeats: int, peak: float, operations: dict
) -> list:
    policy, model, steps = trainer.policy, trainer.model, trainer.args.num_inference_steps
    trainer.true_cfg_scale = cfg
    conditions = random_conditions(trainer, resolution, 220)

    def roll():
        with trainer._without_casts(), trainer.accelerator.autocast():
            return rollout(
                policy, model, [conditions] * batch, [seeded_generator(i) for i in range(batch)],
                num_inference_steps=steps, true_cfg_scale=cfg, batch_size=batch, dynamics="flow_sde", noise_level=1.0,
                steps=range(0, 1),
            )  # fmt: skip

    def train():
        with trainer._without_casts():
            trainer._accumulate_gradients(trainer.model_wrapped, samples)

    model.eval()
    reset_peak()
    trajectory = counted(operations, (resolution, cfg, batch, "rollout"), roll)[0]
    rolled = timed(roll, repeats) / steps / batch
    row = [resolution, f"{cfg:g}", batch, f"{rolled * 1000:.0f}", f"{peak_gib():.1f}"]
    row += [f"{operations[resolution, cfg, batch, 'rollout'] / steps / batch / rolled / peak:.0%}"]
    samples = [Sample("case", 0, 0, conditions, trajectory, 1.0, 1.0)] * train_batch
    model.train()
    reset_peak()
    checkpointed = trainer.policy.pipeline.transformer.is_gradient_checkpointing
    counted(operations, (resolution, cfg, train_batch, checkpointed), train)
    trained = timed(train, repeats) / train_batch
    row += [train_batch, f"{trained * 1000:.0f}", f"{peak_gib():.1f}"]
    row += [f"{operations[resolution, cfg, train_batch, checkpointed] / train_batch / trained / peak:.0%}"]
    model.zero_grad()
    return [*row, f"{trainer._sample_stats.pop('logp_diff/step_0')[-1]:.1e}"]


def kernels(trainer, resolution: int, batch: int) -> str:
    """Shares of the GPU's time in a pass with guidance, without gradients."""
    policy, conditions = trainer.policy, random_conditions(trainer, resolution, 220)
    batched = policy.collate([conditions] * batch)
    latents = torch.randn(batch, conditions.num_tokens, 64, device="cuda")

    def run():
        with trainer._without_casts(), trainer.accelerator.autocast(), torch.no_grad():
            policy.velocity(trainer.model, latents, torch.tensor(0.5), batched, 4.0)

    run()
    trainer.model.eval()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds = -synchronize()
        run()
        seconds += synchronize()
    times, number = defaultdict(float), 0
    for event in profile.key_averages():
        name, spent = event.key.lower(), event.self_device_time_total / 1e6
        attention = any(word in name for word in ("flash", "fmha", "attention", "cudnn_generated"))
        product = any(word in name for word in ("gemm", "nvjet", "cutlass", "xmma"))
        times["attention" if attention else "matrix products" if product else "others"] += spent
        number += event.count
    busy = sum(times.values())
    shares = ", ".join(f"{name} {spent / busy:.0%}" for name, spent in sorted(times.items()))
    return f"{resolution} px, {batch} samples, CFG: {number} kernels, {busy / seconds:.0%} of the time busy: {shares}"


def passes(options: argparse.Namespace) -> None:
    head, peak = header()
    trainer = passes_trainer(options.folder, options.tiny)
    operations: dict[tuple, int] = {}
    print(head + "\n")
    print("| | px | CFG | batch | ms / step | GiB | util. | trained batch | ms / step | GiB | util. | log-ratio |")
    print("|---" * 12 + "|")

    def show(kind: str, *shape):
        row = measure(trainer, *shape, options.repeats, peak, operations)
        print("| " + " | ".join(map(str, [kind, *row])) + " |", flush=True)

    if options.tiny:
        show("eager", 64, 4.0, 2, 1)
        return
    shapes = [(512, 4.0, 1, 1), (512, 4.0, 8, 2), (512, 1.0, 8, 2), (1024, 4.0, 1, 1), (1024, 4.0, 2, 2)]
    for shape in shapes:
        show("eager", *shape)
    print(kernels(trainer, 512, 8) + "\n" + kernels(trainer, 1024, 2), flush=True)
    transformer = trainer.policy.pipeline.transformer
    transformer.disable_gradient_checkpointing()
    with contextlib.suppress(torch.OutOfMemoryError):
        show("not checkpointed", 512, 4.0, 1, 1)
    transformer.enable_gradient_checkpointing()
    transformer.compile_repeated_blocks()
    show("compiled", *shapes[1])


# Updates


class Phases:
    """Peak memory and seconds of the phases of a run."""

    def __init__(self):
        self.peak, self.reserved, self.seconds = defaultdict(float), defaultdict(float), defaultdict(float)

    @contextlib.contextmanager
    def measured(self, name: str):
        name = {"encode": "encoding", "decode": "decoding", "train": "training"}.get(name, name)
        start = synchronize()
        reset_peak()
        yield
        self.seconds[name] += synchronize() - start
        self.peak[name] = max(self.peak[name], peak_gib())
        if CUDA:
            self.reserved[name] = max(self.reserved[name], torch.cuda.max_memory_reserved() / 2**30)


class OptimizerSteps(TrainerCallback):
    def __init__(self, phases: Phases):
        self.phases, self.stack = phases, contextlib.ExitStack()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.stack.enter_context(self.phases.measured("optimizer"))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.stack.close()

    def on_step_end(self, args, state, control, **kwargs):
        # What a run that is cut off has measured is not lost.
        phases = (f"{name} {gib:.1f} GiB {self.phases.seconds[name]:.1f} s" for name, gib in self.phases.peak.items())
        print(f"after update {state.global_step}: {', '.join(phases)}; in all {peak_gib():.1f} GiB", flush=True)


def brightness(completions, **_) -> list[float]:
    return [float(np.asarray(image).mean()) + number for number, image in enumerate(completions)]


def updates(options: argparse.Namespace, further: list[str]) -> None:
    name, _ = choose_trainer(["--config", options.config])
    group = options.edits
    words = ["--config", options.config, "--model_name_or_path", str(options.folder), "--max_steps", "2"]
    words += ["--dataset_name", "none", *further]
    words += ["--report_to", "none", "--log_completions", "false"] if name == "grpo" else ["--report_to", "none"]
    if options.tiny:
        words += ["--use_cpu", str(not CUDA).lower(), "--resolution", "64"]
    parser = ScriptParser(name, TRAINERS[name][0])
    parsed, _ = parser.parse([*words, "--output_dir", tempfile.mkdtemp()])
    each = parsed["per_device_train_batch_size"]
    sizes = ["--gradient_accumulation_steps", str(group // each)]
    # All are trained, so that memory and time are those of whole passes
    sizes += ["--num_generations", str(group), "--num_trained_generations", str(group)] if name == "grpo" else []
    words += [*sizes, "--save_strategy", "no"]
    plan = Path(tempfile.mkdtemp()) / "plan.json"
    planning = subprocess.Popen(
        [sys.executable, "-m", "hp_edit_trl.cli", "plan", name, *words, "--output", str(plan)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    _, args, model_args = parser.parse_dict(parser.parse([*words, "--output_dir", tempfile.mkdtemp()])[0])
    args.model_init_kwargs = model_args.init_kwargs(args)
    head, peak = header()
    size = args.resolution
    noise = np.random.default_rng(0)

    def picture() -> Image.Image:
        return Image.fromarray(noise.integers(0, 255, (size, size, 3), dtype=np.uint8))

    rows = [{"prompt": " ".join(COLORS * 8), "image": picture()} for _ in range(max(2, group))]
    if name == "dpo":
        rows = [row | {"chosen": picture(), "rejected": picture()} for row in rows]
    phases = Phases()
    kind = FlowGRPOEditTrainer if name == "grpo" else DPOEditTrainer
    start = time.perf_counter()
    trainer = kind(
        model=model_args.model_name_or_path, args=args, train_dataset=Dataset.from_list(rows),
        peft_config=get_peft_config(model_args), **({"reward_funcs": brightness} if name == "grpo" else {}),
    )  # fmt: skip
    loaded = synchronize() - start
    if name == "grpo":
        own = trainer._timed

        @contextlib.contextmanager
        def both(phase: str):
            with own(phase), phases.measured(phase):
                yield

        trainer._timed = both
    trainer.add_callback(OptimizerSteps(phases))
    reset_peak()
    whole = Phases()
    with whole.measured("training"):
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    with phases.measured("evaluation"):
        trainer.sample_edits([trainer._read_case(trainer.train_dataset, row) for row in range(2)])
    with phases.measured("saving"):
        trainer.save_model()
    planning.wait()
    planned = json.loads(plan.read_text()) if plan.is_file() else {}
    print(head)
    print(f"{options.config} {' '.join(words[8:])}; loaded in {loaded:.0f} s\n")
    print("| phase | GiB | reserved | planned GiB | planned with allowance | s / update | util. |")
    print("|---" * 7 + "|")
    for phase, gib in (phases if name == "grpo" else whole).peak.items():
        expected = planned.get("phases", {}).get(phase, {})
        seconds = phases.seconds[phase] / (1 if phase in ("evaluation", "saving") else 2)
        flops = planned.get("update", {}).get("flops", {}).get(phase)
        print(
            f"| {phase} | {gib:.1f} | {phases.reserved[phase]:.1f} | {expected.get('peak', np.nan) / 2**30:.1f} "
            f"| {expected.get('needed', np.nan) / 2**30:.1f} | {seconds:.1f} "
            f"| {'' if not flops or not seconds else f'{flops / seconds / peak:.0%}'} |"
        )
    print(f"\nWhole run: {whole.seconds['training']:.1f} s, {whole.peak['training']:.1f} GiB", flush=True)
    if not planned:
        print("No plan:", planning.stderr.read().strip().splitlines()[-1:], flush=True)
    for log in logs:
        print({key: value for key, value in log.items() if key.startswith(("loss", "grad", "logp_diff", "reward"))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["write", "passes", "updates"])
    folder = Path(tempfile.gettempdir(), "full_size_editor")
    parser.add_argument("--folder", type=Path, default=folder, help="of the pipeline: 57 GB, on a fast disk")
    parser.add_argument("--tiny", action="store_true", help="small models, on the CPU")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--config", help="recipe; further options are those of the training command")
    parser.add_argument("--edits", type=int, default=8, help="edits (or pairs) per update")
    options, words = parser.parse_known_args()
    start = time.perf_counter()
    if options.tiny:
        options.folder = Path(tempfile.mkdtemp())
    if options.part == "write" or options.tiny:
        write(options.folder, options.tiny)
    if options.part == "passes":
        passes(options)
    elif options.part == "updates":
        updates(options, words)
    print(f"{options.part}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
