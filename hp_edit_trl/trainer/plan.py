"""What a training run takes, before it is started: memory, passes, time and cost, from a dry run of the trainer."""

import copy
import io
import math
from dataclasses import asdict, dataclass, replace
from enum import Enum
from importlib.metadata import version
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from rich import box
from rich.console import Console
from rich.table import Table

from ..utils.quantization import in_bits
from ..utils.secrets import redacted
from .dpo_edit_config import DPOEditConfig
from .flow_grpo_edit_config import FlowGRPOEditConfig
from .flow_nft_edit_config import FlowNFTEditConfig
from .online_edit_config import OnlineEditConfig
from .rehearsal import Rehearsal, alone


@dataclass(frozen=True)
class Card:
    """
    A kind of GPU.

    Args:
        name (`str`):
            Its name.
        memory (`float`):
            Its memory in GiB, as the driver reports it.
        flops (`float`):
            Dense bfloat16 matrix operations per second, as the vendor states them.
    """

    name: str
    memory: float
    flops: float


CARDS = {
    "h100": Card("NVIDIA H100 SXM", 79.2, 989e12),
    "h200": Card("NVIDIA H200", 140.4, 989e12),
    "b200": Card("NVIDIA B200", 178.4, 2250e12),
    "a100": Card("NVIDIA A100 80GB", 79.3, 312e12),
    "a100-40": Card("NVIDIA A100 40GB", 39.6, 312e12),
    "l40s": Card("NVIDIA L40S", 45.0, 362e12),
    "rtx5090": Card("NVIDIA RTX 5090", 31.8, 210e12),
    "rtx4090": Card("NVIDIA RTX 4090", 24.0, 165e12),
    "l4": Card("NVIDIA L4", 22.5, 121e12),
}

# What is taken beyond the tensors: CUDA's context, workspaces of the libraries, and fragmentation of the allocator.
WORKSPACES = 2**30
FRAGMENTATION = 0.05

PHASES = ("placing", "encoding", "rollout", "decoding", "training", "optimizer", "evaluation", "saving")


def parse_card(name: str, memory: float | None = None) -> Card:
    """
    Finds a kind of GPU.

    Args:
        name (`str`):
            One of `CARDS`, in any spelling of case and dashes.
        memory (`float`, *optional*):
            Its memory in GB, if it is another. Defaults to that of the card.

    Raises:
        `ValueError`: If it is not known, or the memory is not positive.
    """

    def plain(text: str) -> str:
        return "".join(filter(str.isalnum, text.lower()))

    known = {plain(key): card for key, card in CARDS.items()}
    if plain(name) not in known:
        raise ValueError(
            f"gpu={name!r} is not known: use one of {', '.join(CARDS)}, with gpu_memory for another size of memory."
        )
    card = known[plain(name)]
    if memory is None:
        return card
    if not memory > 0 or not math.isfinite(memory):
        raise ValueError(f"gpu_memory={memory} must be a number of GB above 0.")
    return replace(card, name=f"{card.name} with {memory:g} GB", memory=float(memory))


@dataclass
class TrainingPlan:
    """
    What a training run takes. All figures are estimates; sizes are in bytes, and those of memory per process.

    Args:
        trainer (`str`):
            Name of the algorithm.
        model (`str`):
            The editor.
        gpu (`dict`):
            Name, memory in GiB, and matrix operations per second of the card.
        num_processes (`int`):
            Number of processes, each with a card of its own.
        utilization (`float`):
            Share of the card's matrix operations that is assumed to be reached.
        settings (`dict`):
            The options that figures depend on most.
        weights (`dict[str, int]`):
            Bytes of each part of the model.
        phases (`dict[str, dict]`):
            For each phase: `peak`, its `parts`, `needed` with the allowance for workspaces and fragmentation, and
            whether it `fits`.
        host (`dict[str, int]`):
            CPU memory while loading: `page_cache` of the weights' files, which the processes of a node share, also
            where the weights have to be converted, and `per_process`.
        update (`dict`):
            Of one update: passes through the transformer, prefixes of cases that are computed once for many of them,
            floating-point operations of each process, seconds, calls of the judge.
        run (`dict`):
            Of the whole run: number of updates, hours, GPU-hours, cost, calls of the judge; `None` where unknown.
        checkpoint (`dict[str, int]`):
            Bytes of each kind of file of a checkpoint.
        advice (`dict`):
            If it does not fit: options with which it does, what is needed then, and cards with enough memory.
        versions (`dict[str, str]`):
            Versions of the libraries.
    """

    trainer: str
    model: str
    gpu: dict[str, Any]
    num_processes: int
    utilization: float
    settings: dict[str, Any]
    weights: dict[str, int]
    phases: dict[str, dict[str, Any]]
    host: dict[str, int]
    update: dict[str, Any]
    run: dict[str, Any]
    checkpoint: dict[str, int]
    advice: dict[str, Any]
    versions: dict[str, str]

    @property
    def fits(self) -> bool:
        """Whether every phase fits the card."""
        return all(phase["fits"] for phase in self.phases.values())

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON's types."""
        return {"fits": self.fits, **asdict(self)}

    def __str__(self) -> str:
        return plan_text(self)


def plan_training(
    trainer_type: Any,
    model: str | DiffusionPipeline,
    args: FlowGRPOEditConfig | FlowNFTEditConfig | DPOEditConfig,
    options: dict[str, Any],
    peft_config: LoraConfig | None = None,
    *,
    num_processes: int | None = None,
    gpu: str = "h100",
    gpu_memory: float | None = None,
    utilization: float = 0.2,
    price_per_gpu_hour: float | None = None,
    num_cases: int | None = None,
    num_references: int = 1,
    prompt_tokens: int = 64,
    num_answers: int = 1,
    judge: str | None = None,
    judge_revision: str | None = None,
    is_sharded: bool = False,
) -> TrainingPlan:
    """
    Plans a training run: a dry run of the trainer's own code at full size, on any machine. Weights are neither read
    nor allocated.

    Args:
        trainer_type (`type`):
            [`FlowGRPOEditTrainer`], [`FlowNFTEditTrainer`] or [`DPOEditTrainer`].
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The editor: a Hub id, a local folder, which needs no weights, or a loaded pipeline.
        args ([`FlowGRPOEditConfig`], [`FlowNFTEditConfig`] or [`DPOEditConfig`]):
            The trainer's configuration, made within [`alone`] or in the process that trains.
        options (`dict`):
            What the pipeline is loaded with, see `loading_options`.
        peft_config ([`~peft.LoraConfig`], *optional*):
            The LoRA to train. Defaults to the trainer's.
        num_processes (`int`, *optional*):
            Number of processes. Defaults to that of this launch.
        gpu (`str`, *optional*, defaults to `"h100"`):
            The card, see [`parse_card`].
        gpu_memory (`float`, *optional*):
            Its memory in GB, if it is another.
        utilization (`float`, *optional*, defaults to `0.2`):
            Share of the card's matrix operations that is assumed to be reached.
        price_per_gpu_hour (`float`, *optional*):
            Price of a card for an hour.
        num_cases (`int`, *optional*):
            Number of rows of the training set. Needed where `num_train_epochs` decides the number of updates.
        num_references (`int`, *optional*, defaults to `1`):
            Number of reference images of a case.
        prompt_tokens (`int`, *optional*, defaults to `64`):
            Number of tokens of a prompt.
        num_answers (`int`, *optional*, defaults to `1`):
            Number of answers of the judge for each edit.
        judge (`str`, *optional*):
            Hub id or folder of a judge that is loaded in each process. Its weights are counted, its work is not.
        judge_revision (`str`, *optional*):
            Its revision.
        is_sharded (`bool`, *optional*, defaults to `False`):
            Whether the transformer is sharded over the processes (FSDP2). Needs `gradient_checkpointing`.

    Raises:
        `ValueError`: If an option, the card or the model is not usable.
    """
    card = parse_card(gpu, gpu_memory)
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization={utilization} must be above 0 and at most 1.")
    for name, value in (("price_per_gpu_hour", price_per_gpu_hour), ("num_cases", num_cases)):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} must not be negative.")
    if prompt_tokens < 1:
        raise ValueError(f"prompt_tokens={prompt_tokens} must be at least 1.")
    num_processes = args.world_size if num_processes is None else num_processes
    is_plain = args.gradient_checkpointing and args.num_checkpointed_blocks is None and not args.offload_transformer
    if is_sharded and (num_processes < 2 or not is_plain or options.get("quantization_config")):
        raise ValueError(
            "FSDP can be planned with several processes, with gradient_checkpointing of all blocks, and without "
            "quantization or offload_transformer."
        )
    with alone(num_processes):
        rehearsal = Rehearsal(
            trainer_type, model, options, peft_config, judge, judge_revision, num_references, prompt_tokens, is_sharded
        )
        figures = rehearsal.measure(args)
        phases = judged(figures["phases"], card)
        update = _update(figures, args, card, utilization, num_answers)
        run = _run_figures(figures, update, args, card, utilization, num_cases, price_per_gpu_hour)
        advised = {} if all(phase["fits"] for phase in phases.values()) else advice(rehearsal, args, card, phases)
    files = rehearsal.file_bytes
    streamed = figures["weights"]["transformer"] if args.offload_transformer else 0
    converted = (
        options.get("dtype", torch.bfloat16).itemsize > torch.bfloat16.itemsize if isinstance(model, str) else False
    )
    names = (
        "resolution", "per_device_train_batch_size", "gradient_accumulation_steps", "rollout_batch_size",
        "gradient_checkpointing", "num_checkpointed_blocks", "offload_encoders", "offload_transformer", "bf16",
        "num_generations", "num_inference_steps", "sde_window_size",
        "num_trained_generations", "same_latent", "num_finish_steps", "num_train_sigmas",
        "true_cfg_scale", "beta", "num_iterations", "optim",
    )  # fmt: skip
    chosen = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return TrainingPlan(
        trainer=trainer_type._name,
        model=redacted(model)
        if isinstance(model, str)
        else str(model.config.get("_name_or_path") or type(model).__name__),
        gpu={"name": card.name, "memory": card.memory, "flops": card.flops},
        num_processes=num_processes,
        utilization=utilization,
        settings={
            **{name: value.value if isinstance(value, Enum) else value for name, value in chosen.items()},
            "fsdp2": is_sharded,
            "num_references": num_references,
            "prompt_tokens": prompt_tokens,
        },
        weights=figures["weights"],
        phases=phases,
        host={"page_cache": files, "per_process": (files if converted and num_processes == 1 else 0) + streamed},
        update=update,
        run=run,
        checkpoint={
            name: size * (num_processes if name == "rollouts" else 1) for name, size in figures["files"].items()
        },
        advice=advised,
        versions={name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
    )


def judged(phases: dict[str, dict[str, Any]], card: Card) -> dict[str, dict[str, Any]]:
    """The phases in their order, with what they need on a card, and whether they fit."""
    result = {}
    for name in PHASES:
        if name in phases:
            peak, parts = phases[name]["peak"], {k: v for k, v in phases[name]["parts"].items() if v > 0}
            needed = round(peak * (1 + FRAGMENTATION)) + WORKSPACES
            result[name] = {"peak": peak, "parts": parts, "needed": needed, "fits": needed <= card.memory * 2**30}
    return result


def _flops(counts: dict[str, int]) -> int:
    return sum(counts.get(kind, 0) for kind in ("forward", "recompute", "backward"))


def _update(figures: dict[str, Any], args: Any, card: Card, utilization: float, num_answers: int) -> dict[str, Any]:
    """Figures of one update. Passes are those of single samples, of all processes; operations those of one process."""
    counts = {name: phase["counts"] for name, phase in figures["phases"].items()}
    microbatches = args.gradient_accumulation_steps
    times = dict.fromkeys(("encoding", "rollout", "decoding"), 0.0)
    times["training"] = float(microbatches)
    judge_calls = 0.0
    if isinstance(args, OnlineEditConfig):
        assert args.steps_per_generation and args.generation_batch_size
        generations = microbatches / (args.steps_per_generation * args.num_iterations)  # in one update
        times |= dict.fromkeys(("encoding", "rollout", "decoding"), generations)
        passes = args.sde_window_size if isinstance(args, FlowGRPOEditConfig) else args.num_train_sigmas
        times["training"] *= passes or 1  # the config has set it
        judge_calls = args.generation_batch_size * generations * num_answers
    flops = {name: round(_flops(counts[name]) * number) for name, number in times.items() if name in counts and number}
    training, world = counts["training"], args.world_size
    rollout_passes = counts.get("rollout", {}).get("passes", 0) * times["rollout"] * world
    trained_passes = training["passes"] * times["training"] * world
    forward = training["forward"] / training["passes"]  # of one pass
    prefixes = sum(counts.get(name, {}).get("prefixes", 0) * times.get(name, 0) for name in ("rollout", "training"))
    return {
        "rollout_passes": round(rollout_passes),
        "trained_passes": round(trained_passes),
        "prefixes": round(prefixes * world),
        "forward_equivalents": round(rollout_passes + _flops(training) / forward * times["training"] * world),
        "judge_calls": round(judge_calls),
        "flops": flops,
        "seconds": {name: number / (card.flops * utilization) for name, number in flops.items()},
    }


def _run_figures(
    figures: dict[str, Any], update: dict[str, Any], args: Any, card: Card, utilization: float, num_cases: int | None,
    price: float | None,
) -> dict[str, Any]:  # fmt: skip
    world, is_online = args.world_size, isinstance(args, OnlineEditConfig)
    updates: int | None = args.max_steps if args.max_steps > 0 else None
    if updates is None and num_cases is not None:
        if is_online:
            batches = num_cases // (args.generation_batch_size // args.num_generations)
            steps = batches * args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps
        else:
            steps = math.ceil(
                num_cases / (args.per_device_train_batch_size * world * args.gradient_accumulation_steps)
            )
        updates = math.ceil(steps * args.num_train_epochs)
    hours = cost = None
    if updates is not None:
        seconds = updates * sum(update["seconds"].values())
        if not is_online and num_cases is not None:  # every pair is encoded once
            seconds += (
                math.ceil(num_cases / world)
                * _flops(figures["phases"]["encoding"]["counts"])
                / (card.flops * utilization)
            )
        hours = seconds / 3600
        cost = None if price is None else hours * world * price
    return {
        "updates": updates,
        "hours": hours,
        "gpu_hours": None if hours is None else hours * world,
        "cost": cost,
        "judge_calls": None if updates is None else update["judge_calls"] * updates,
    }


def advice(rehearsal: Rehearsal, args: Any, card: Card, phases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """
    Options with which the run fits, found by planning it again with each change; and what 4 bits would take in place
    of a transformer that is not whole on the card.
    """
    args = copy.copy(args)
    changes: dict[str, Any] = {}
    while not all(phase["fits"] for phase in phases.values()):
        failing = {name for name, phase in phases.items() if not phase["fits"]}
        change: dict[str, Any]
        if "training" in failing and not args.gradient_checkpointing:
            change = {"gradient_checkpointing": True}
        elif "training" in failing and args.num_checkpointed_blocks is not None:
            change = {"num_checkpointed_blocks": None}
        elif "training" in failing and args.per_device_train_batch_size > 1 and "placing" not in failing:
            size = args.per_device_train_batch_size
            smaller = next(n for n in range(size // 2, 0, -1) if size % n == 0)
            change = {
                "per_device_train_batch_size": smaller,
                "gradient_accumulation_steps": args.gradient_accumulation_steps * size // smaller,
            }
        elif failing <= {"rollout", "decoding", "evaluation"} and args.rollout_batch_size > 1:
            change = {"rollout_batch_size": args.rollout_batch_size // 2}
        elif not args.offload_encoders:
            change = {"offload_encoders": True}
        elif (
            rehearsal.is_sharded
            or args.offload_transformer
            or rehearsal.quantization
            or not args.gradient_checkpointing
            or args.num_checkpointed_blocks is not None
        ):
            break
        elif args.world_size > 1:
            change = {"fsdp2": True}
            rehearsal.is_sharded = True
        else:
            change = {"offload_transformer": True}
        if "per_device_train_batch_size" in change and isinstance(args, OnlineEditConfig):
            assert args.steps_per_generation
            args.steps_per_generation *= args.per_device_train_batch_size // change["per_device_train_batch_size"]
        for name, value in change.items():
            if name != "fsdp2":  # which is an option of the launch
                setattr(args, name, value)
        changes |= change
        phases = judged(rehearsal.measure(args, light=True)["phases"], card)
    needed = max(phase["needed"] for phase in phases.values())
    quantized, way = None, "fsdp2" if rehearsal.is_sharded else "offload_transformer"
    if rehearsal.is_sharded or args.offload_transformer:
        rehearsal.is_sharded, args.offload_transformer = False, False
        rehearsal.quantize(in_bits(True, False))
        quantized = judged(rehearsal.measure(args, light=True)["phases"], card)
        quantized = max(phase["needed"] for phase in quantized.values())
    return {
        "options": changes,
        "fits": all(phase["fits"] for phase in phases.values()),
        "needed": needed,
        "needed_in_4_bits": quantized,
        "in_place_of": None if quantized is None else way,
        "serve_the_judge": rehearsal.judge is not None,
        "gpus": [name for name, other in CARDS.items() if needed <= other.memory * 2**30],
    }


def _size(number: float) -> str:
    return f"{number / 2**30:.1f}"


def plan_text(plan: TrainingPlan) -> str:
    """The plan as tables, for a terminal."""
    text = io.StringIO()
    console = Console(file=text, width=110, highlight=False)
    settings = ", ".join(f"{name} {value}" for name, value in plan.settings.items() if value is not None)
    console.print(
        f"{plan.trainer} of {plan.model} on {plan.num_processes} x {plan.gpu['name']} ({plan.gpu['memory']:g} GiB). "
        f"Estimates of a dry run: {settings}.\n"
    )
    kinds = {
        "weights": (*plan.weights.keys() - {"adapter"},),
        "adapter": ("adapter", "gradients", "gradient buckets", "optimizer"),
        "samples": ("samples",),
        "activations": ("activations", "prefixes"),
    }
    table = Table("GiB on the card", *kinds, "peak", "needed", "", box=box.SIMPLE_HEAD)
    for column in table.columns[1:-1]:
        column.justify = "right"
    for name, phase in plan.phases.items():
        parts = [_size(sum(phase["parts"].get(part, 0) for part in members)) for members in kinds.values()]
        table.add_row(name, *parts, _size(phase["peak"]), _size(phase["needed"]), "" if phase["fits"] else "too much")
    console.print(table)
    console.print(
        "'adapter' with gradients, DDP's copies of them, and optimizer; 'needed' with "
        f"{_size(WORKSPACES)} GiB for CUDA "
        f"and {FRAGMENTATION:.0%} for fragmentation.\n"
        f"Weights in GiB: {', '.join(f'{name} {_size(size)}' for name, size in plan.weights.items())}.\n"
        f"Loading, CPU memory of a node: {_size(plan.host['page_cache'])} GiB of page cache that its processes share, "
        "and "
        f"{_size(plan.host['per_process'])} GiB for each process.\n"
        f"A checkpoint: {_size(sum(plan.checkpoint.values()))} GiB "
        f"({', '.join(f'{name} {_size(size)}' for name, size in plan.checkpoint.items() if size)})."
    )
    table = Table("one update", "PFLOP per process", "seconds", box=box.SIMPLE_HEAD)
    for name, flops in plan.update["flops"].items():
        table.add_row(name, f"{flops / 1e15:,.2f}", f"{plan.update['seconds'][name]:,.1f}")
    table.add_row(
        "sum", f"{sum(plan.update['flops'].values()) / 1e15:,.2f}", f"{sum(plan.update['seconds'].values()):,.1f}"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    shared = (
        f" The prefixes of cases are computed {plan.update['prefixes']:,} times." if plan.update["prefixes"] else ""
    )
    console.print(
        f"Passes through the transformer: {plan.update['rollout_passes']:,} in rollout and "
        f"{plan.update['trained_passes']:,} trained ones, together as much as {plan.update['forward_equivalents']:,} "
        f"forward passes.{shared} Calls of the judge: {plan.update['judge_calls']:,}. Seconds at a utilization of "
        f"{plan.utilization:.0%}, without waiting, saving and evaluation."
    )
    run = plan.run
    if run["updates"] is None:
        console.print("The whole run: set max_steps or num_cases.")
    else:
        cost = "" if run["cost"] is None else f", cost {run['cost']:,.0f}"
        console.print(
            f"The whole run: {run['updates']:,} updates, {run['hours']:,.1f} hours, {run['gpu_hours']:,.0f} GPU-hours"
            f"{cost}, {run['judge_calls']:,} calls of the judge."
        )
    if plan.fits:
        console.print("\nIt fits the card.")
    else:
        console.print(f"\nIt does not fit the card. {advice_text(plan.advice)}")
    return text.getvalue()


def advice_text(advice: dict[str, Any]) -> str:
    """The advice of a plan that does not fit, in a sentence or two."""
    way = {"fsdp2": "FSDP2 (examples/accelerate/fsdp2.yaml)"}
    shown = {"True": "true", "False": "false", "None": "null"}
    options = ", ".join(
        way.get(name) or f"{name}: {shown.get(str(value), value)}" for name, value in advice["options"].items()
    )
    served = " Serve the judge on another machine (judge_base_url)." if advice["serve_the_judge"] else ""
    if advice["needed_in_4_bits"] is not None:
        served = (
            f" With load_in_4bit: true in place of {way.get(advice['in_place_of'], advice['in_place_of'])} it takes "
            f"{_size(advice['needed_in_4_bits'])} GiB.{served}"
        )
    if advice["fits"]:
        return f"With {options} it takes {_size(advice['needed'])} GiB and fits.{served}"
    cards = (
        f"which these have: {', '.join(advice['gpus'])}" if advice["gpus"] else "which no card has that is known here"
    )
    tried = f"Even with {options} it" if options else "It"
    return f"{tried} takes {_size(advice['needed'])} GiB, {cards}.{served}"
