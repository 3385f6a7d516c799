"""
Plans a training run before it is started: what memory it takes on a GPU, how long and how much, and what to change if
it does not fit. No GPU and no weights are needed.

    hp-edit plan --config recipe.yaml --gpu h100 --num_processes 8
"""

import warnings
from argparse import Namespace
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import diffusers
import transformers
import yaml
from trl import get_peft_config

from ..trainer.base_edit_trainer import loading_options
from ..trainer.dpo_edit_config import DPOEditConfig
from ..trainer.dpo_edit_trainer import DPOEditTrainer
from ..trainer.flow_grpo_edit_config import FlowGRPOEditConfig
from ..trainer.flow_grpo_edit_trainer import FlowGRPOEditTrainer
from ..trainer.flow_nft_edit_config import FlowNFTEditConfig
from ..trainer.flow_nft_edit_trainer import FlowNFTEditTrainer
from ..trainer.plan import plan_training
from ..trainer.rehearsal import alone
from ..trainer.sharding import check_fsdp_version
from ..utils.files import write_json
from . import dpo, grpo, nft
from .utils import ScriptParser


TRAINERS = {
    "grpo": (grpo.ARGUMENTS, FlowGRPOEditTrainer),
    "nft": (nft.ARGUMENTS, FlowNFTEditTrainer),
    "dpo": (dpo.ARGUMENTS, DPOEditTrainer),
}


@dataclass
class PlanArguments:
    """
    Options of `hp-edit plan`, besides those of the training command.

    Args:
        gpu (`str`, *optional*, defaults to `"h100"`):
            The card: h100, h200, b200, a100, a100-40, l40s, rtx5090, rtx4090 or l4.
        gpu_memory (`float`, *optional*):
            Its memory in GB, if it is another.
        utilization (`float`, *optional*, defaults to `0.2`):
            Share of the card's matrix operations that is assumed to be reached.
        price_per_gpu_hour (`float`, *optional*):
            Price of a card for an hour.
        num_cases (`int`, *optional*):
            Number of rows of the training set, where `num_train_epochs` decides how long the run is.
        num_references (`int`, *optional*, defaults to `1`):
            Number of reference images of a case.
        prompt_tokens (`int`, *optional*, defaults to `64`):
            Number of tokens of a prompt.
        output (`str`, *optional*):
            File that the plan is written to as JSON.
    """

    gpu: str = field(
        default="h100",
        metadata={"help": "The card: h100, h200, b200, a100, a100-40, l40s, rtx5090, rtx4090 or l4."},
    )
    gpu_memory: float | None = field(default=None, metadata={"help": "Its memory in GB, if it is another."})
    utilization: float = field(
        default=0.2, metadata={"help": "Share of the card's matrix operations that is assumed to be reached."}
    )
    price_per_gpu_hour: float | None = field(default=None, metadata={"help": "Price of a card for an hour."})
    num_cases: int | None = field(
        default=None,
        metadata={"help": "Rows of the training set, where `num_train_epochs` decides how long the run is."},
    )
    num_references: int = field(default=1, metadata={"help": "Number of reference images of a case."})
    prompt_tokens: int = field(default=64, metadata={"help": "Number of tokens of a prompt."})
    output: str | None = field(default=None, metadata={"help": "File that the plan is written to as JSON."})


class PlanParser(ScriptParser):
    """[`ScriptParser`] of `hp-edit plan`, which needs no dataset."""

    NEEDED = {"model_name_or_path": ScriptParser.NEEDED["model_name_or_path"]}


def choose_trainer(words: list[str]) -> tuple[str, list[str]]:
    """
    The trainer that a command line is for, and the command line without its name.

    Args:
        words (`list[str]`):
            The command line. Its first word may name the trainer; otherwise the options tell, and those of its
            `--config`: it is DPO or NFT if one of them is an option of DPO or NFT alone.
    """
    if words and words[0] in TRAINERS:
        return words[0], words[1:]
    names = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--config" or word.startswith("--config="):
            file = Path(word.partition("=")[2] or following)
            if file.is_file():
                try:
                    config = yaml.safe_load(file.read_text(encoding="utf-8"))
                except (ValueError, yaml.YAMLError):  # the parser will say so
                    continue
                names |= set(config) if isinstance(config, dict) else set()
    of_grpo = {f.name for f in fields(FlowGRPOEditConfig)}
    for name, kind in (("dpo", DPOEditConfig), ("nft", FlowNFTEditConfig)):
        if names & ({f.name for f in fields(kind)} - of_grpo):
            return name, words
    return "grpo", words


def read_launch(launch: Namespace | None) -> tuple[int, bool]:
    """Number of processes that the options of `accelerate launch` ask for, and whether they ask for FSDP."""
    if launch is None:
        return 1, False
    file = Path(launch.config_file) if launch.config_file is not None else None
    config: Any = yaml.safe_load(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else None
    config = config or {}
    is_sharded = bool(launch.use_fsdp) or config.get("distributed_type") == "FSDP"
    if is_sharded:
        check_fsdp_version((config.get("fsdp_config") or {}).get("fsdp_version") or launch.fsdp_version)
    return int(launch.num_processes or config.get("num_processes") or 1), is_sharded


def parse(words: list[str]) -> tuple[dict[str, Any], str | None]:
    """
    The arguments of [`~hp_edit_trl.trainer.plan.plan_training`] that a command line stands for, and the file that the
    plan is written to.

    Args:
        words (`list[str]`):
            The command line after the name of the command.
    """
    name, words = choose_trainer(words)
    arguments, trainer_type = TRAINERS[name]
    parser = PlanParser("plan", (*arguments, PlanArguments))
    options, launch = parser.parse(words)
    options |= {"use_cpu": True, "tf32": None, "report_to": "none", "push_to_hub": False}
    if options.get("fp16"):  # sizes are those of bfloat16, which a CPU has too
        options |= {"fp16": False, "bf16": True, "dtype": options["dtype"] or "float32"}
    processes, is_sharded = read_launch(launch)
    with alone(processes):
        script_args, training_args, model_args, plan_args = parser.parse_dict(options)
    training_args.model_init_kwargs = model_args.init_kwargs(training_args)
    given: dict[str, Any] = dict(vars(plan_args))
    output = given.pop("output")
    if name != "dpo" and (script_args.reward_funcs is None or "HPScorerReward" in str(script_args.reward_funcs)):
        given["num_answers"] = script_args.num_answers
        if script_args.judge_base_url is None:
            given |= {"judge": script_args.judge, "judge_revision": script_args.judge_revision}
    return {
        "trainer_type": trainer_type,
        "model": model_args.model_name_or_path,
        "args": training_args,
        "options": loading_options(training_args),
        "peft_config": get_peft_config(model_args),
        "num_processes": processes,
        "is_sharded": is_sharded,
        **given,
    }, output


def plan(words: list[str]) -> bool:
    """
    Runs `hp-edit plan`.

    Args:
        words (`list[str]`):
            The command line after the name of the command.

    Returns:
        `bool`: whether the run fits the card.
    """
    diffusers.utils.logging.disable_progress_bar()
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments, output = parse(words)
        made = plan_training(**arguments)
    print(made)
    if output is not None:
        write_json(output, made.to_dict())
        print(f"The plan is in {output}.")
    return made.fits
