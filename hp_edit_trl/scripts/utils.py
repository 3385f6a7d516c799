"""What the training scripts share: options of dataset and judge, the parser, and the training itself."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset, IterableDataset
from trl import ScriptArguments, TrlParser, get_peft_config

from ..cases import load_split
from ..data import load_realpref
from ..judges import load_judge
from ..judges.base import ScoreMode
from ..rewards import HPScorerReward
from ..trainer.base_edit_trainer import BaseEditTrainer
from ..trainer.model_config import EditModelConfig
from ..trainer.online_edit_config import OnlineEditConfig
from ..utils.files import shipped_folder
from ..utils.quantization import check_quantization
from ..utils.secrets import redacted


@dataclass
class DatasetArguments(ScriptArguments):
    """
    [`~trl.ScriptArguments`] of a dataset of images. [`load_cases`] loads it.

    Args:
        image_root (`str`, *optional*):
            Folder, or beginning of an address, below which images may lie that are not files of the dataset itself.
    """

    image_root: str | None = field(
        default=None,
        metadata={
            "help": "Folder, or beginning of an address, below which images may lie that are not files of the dataset "
            "itself."
        },
    )


@dataclass
class EditScriptArguments(DatasetArguments):
    """
    [`DatasetArguments`] with the options of an HP-Scorer reward. [`load_cases`] loads the dataset that they name, and
    [`load_scorer`] the reward.

    Args:
        judge (`str`, *optional*, defaults to `"Qwen/Qwen3-VL-32B-Instruct"`):
            Hub id or folder of the judge, or the name of the model on a server.
        judge_base_url (`str` or `list[str]`, *optional*):
            Address of an OpenAI-compatible server that serves the judge; several as a list, or with commas between
            them. By default the judge is loaded in each process.
        judge_revision (`str`, *optional*):
            Branch, tag or commit of the judge's repository. With a server, a label that tells models of one name
            apart.
        score_mode (`str`, *optional*, defaults to `"integer"`):
            `"integer"`: the score that the judge answers. `"expected"`: the expectation over the probabilities of the
            digits.
        num_answers (`int`, *optional*, defaults to `1`):
            Number of answers whose scores are averaged.
        judge_max_new_tokens (`int`, *optional*, defaults to `16`):
            Longest answer of the judge.
        judge_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds after which a request to the judge's server is given up.
        judge_max_concurrency (`int`, *optional*, defaults to `16`):
            Largest number of concurrent requests of each process to the judge's servers.
        scorer_prompts (`str`, *optional*):
            Folder or Hub repository of scorer prompts. Defaults to the prompts of this package.
        scorer_prompts_revision (`str`, *optional*):
            Branch, tag or commit of that repository.
        scorer_task (`str`, *optional*):
            Task whose scorer prompt is used for all cases; `"base"` is the paper's base scorer.
        reward_alpha (`float`, *optional*, defaults to `2.0`):
            Scale of the reward's sigmoid.
        reward_beta (`float`, *optional*, defaults to `5.0`):
            Shift of the reward's sigmoid.
    """

    judge: str = field(
        default="Qwen/Qwen3-VL-32B-Instruct",
        metadata={"help": "Hub id or folder of the judge, or the name of the model on a server."},
    )
    judge_base_url: list[str] | str | None = field(  # the parser takes the second kind, a YAML file may hold either
        default=None,
        metadata={
            "help": "Address of an OpenAI-compatible server that serves the judge, e.g. http://localhost:8000/v1, or "
            "several with commas between them. By default the judge is loaded in each process."
        },
    )
    judge_revision: str | None = field(
        default=None,
        metadata={
            "help": "Branch, tag or commit of the judge's repository. With a server, a label that tells models of one "
            "name apart."
        },
    )
    score_mode: ScoreMode = field(
        default="integer",
        metadata={
            "help": "'integer': the score that the judge answers. 'expected': the expectation over the digits' "
            "probabilities."
        },
    )
    num_answers: int = field(default=1, metadata={"help": "Number of answers whose scores are averaged."})
    judge_max_new_tokens: int = field(
        default=16, metadata={"help": "Longest answer of the judge; raise it for judges that reason aloud."}
    )
    judge_timeout: float = field(
        default=120.0, metadata={"help": "Seconds after which a request to the judge's server is given up."}
    )
    judge_max_concurrency: int = field(
        default=16, metadata={"help": "Largest number of concurrent requests of each process to the judge's servers."}
    )
    scorer_prompts: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub repository of scorer prompts. Defaults to the prompts of this package."},
    )
    scorer_prompts_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of that repository."}
    )
    scorer_task: str | None = field(
        default=None,
        metadata={
            "help": "Task whose scorer prompt is used for all cases; 'base' is the paper's base scorer. By default "
            "each case is scored with the prompt of its own task."
        },
    )
    reward_alpha: float = field(default=2.0, metadata={"help": "Scale of the reward's sigmoid."})
    reward_beta: float = field(default=5.0, metadata={"help": "Shift of the reward's sigmoid."})


def load_cases(
    script_args: ScriptArguments, split: str, image_root: str | None = None, revision: str | None = None
) -> Dataset | IterableDataset:
    """
    Loads one split of the dataset that a script's options name: with `dataset_streaming` as a stream, otherwise as a
    dataset. If a dataset has a column `schema_version`, every row is checked against the schema of RealPref first, see
    [`load_realpref`].

    Args:
        script_args ([`~trl.ScriptArguments`]):
            The options: `dataset_name` (Hub id or local folder), `dataset_config` and `dataset_streaming` are read.
        split (`str`):
            Which split.
        image_root (`str`, *optional*):
            Where images may lie outside the dataset, see [`~hp_edit_trl.cases.load_split`].
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.

    Raises:
        `FileNotFoundError`: If there is no such dataset.
        `ValueError`: If there is no such split, or a row does not fit the schema or names an image outside.
    """
    name, config = script_args.dataset_name, script_args.dataset_config
    options = {"name": config, "revision": revision, "streaming": script_args.dataset_streaming}
    dataset = load_split(name, split, image_root, **options)
    # `load_realpref` takes no configuration: datasets with several are not the cases of RealPref.
    if config is None and isinstance(dataset, Dataset) and "schema_version" in dataset.column_names:
        # The trainer looks for bad cases, with its own option.
        return load_realpref(name, split, revision, image_root=image_root, on_bad_case=None)
    return dataset


def refuse_stream(script_args: ScriptArguments) -> None:
    """Raises `ValueError` if the options of a command that cannot read a stream ask for one."""
    if script_args.dataset_streaming:
        raise ValueError(
            "dataset_streaming is for grpo and nft: this command needs all rows before it begins. Leave it out."
        )


def load_scorer(script_args: EditScriptArguments) -> HPScorerReward:
    """
    Builds the HP-Scorer reward that a script's options name.

    Args:
        script_args ([`EditScriptArguments`]):
            The options.

    Raises:
        `ValueError`: If an option or a scorer prompt is not valid, or the judge cannot be used.
        `ImportError`: If there is an address and the extra `server` is not installed.
    """
    judge = load_judge(
        script_args.judge,
        script_args.judge_base_url,
        script_args.judge_revision,
        script_args.score_mode,
        num_answers=script_args.num_answers,
        max_new_tokens=script_args.judge_max_new_tokens,
        timeout=script_args.judge_timeout,
        max_concurrency=script_args.judge_max_concurrency,
    )
    return HPScorerReward(
        judge,
        scorer_prompts=script_args.scorer_prompts,
        scorer_prompts_revision=script_args.scorer_prompts_revision,
        task=script_args.scorer_task,
        alpha=script_args.reward_alpha,
        beta=script_args.reward_beta,
    )


def trainer_options(script_args: Any, training_args: Any, model_args: EditModelConfig) -> dict[str, Any]:
    """
    What all trainers are made of by the commands: the model's name, the configuration, the datasets and the LoRA.

    Args:
        script_args ([`DatasetArguments`] or [`EditScriptArguments`]):
            The options of the dataset.
        training_args ([`FlowGRPOEditConfig`], [`FlowNFTEditConfig`] or [`DPOEditConfig`]):
            The configuration, whose `model_init_kwargs` are set. An evaluation set is loaded if it is evaluated.
        model_args ([`EditModelConfig`]):
            The options of the model.

    Returns:
        `dict`: arguments of the trainer.

    Raises:
        `ValueError`: If the quantization or the dataset cannot be used.
    """
    if not isinstance(training_args, OnlineEditConfig):
        refuse_stream(script_args)
    training_args.model_init_kwargs = model_args.init_kwargs(training_args)
    check_quantization(training_args.model_init_kwargs.get("quantization_config"), training_args.device)
    train_dataset = load_cases(script_args, script_args.dataset_train_split, script_args.image_root)
    eval_dataset = None
    if training_args.eval_strategy != "no":  # of a fixed size, so no stream
        whole = replace(script_args, dataset_streaming=False)
        eval_dataset = load_cases(whole, script_args.dataset_test_split, script_args.image_root)
    return {
        "model": model_args.model_name_or_path,
        "args": training_args,
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "peft_config": get_peft_config(model_args),
    }


def run_training(trainer: BaseEditTrainer) -> None:
    """
    Trains, saves the LoRA with its card and pictures, and pushes them with `--push_to_hub`.

    Args:
        trainer ([`FlowGRPOEditTrainer`], [`FlowNFTEditTrainer`] or [`DPOEditTrainer`]):
            The trainer.

    Raises:
        `RuntimeError`: If training fails. Unlike a wrong option, this needs a stack trace.
    """
    args = trainer.args
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
    except KeyboardInterrupt:
        sys.exit(
            f"Stopped after step {trainer.state.global_step}. To resume from the last checkpoint in "
            f"{args.output_dir}, add --resume_from_checkpoint True."
        )
    except (ValueError, OSError, ImportError) as error:
        raise RuntimeError(
            f"Training failed after step {trainer.state.global_step}: {redacted(str(error))}"
        ) from error
    trainer.accelerator.print(f"The LoRA, its card, the reward curve and pictures are in {args.output_dir}")
    trainer.accelerator.end_training()


class ScriptParser(TrlParser):
    """
    [`~trl.TrlParser`] of a training script. It also takes the options of `accelerate launch`, on the command line and
    in the YAML file, and reports an error in one line.

    Args:
        name (`str`):
            The command, e.g. `"grpo"`. The script is the module `hp_edit_trl.scripts.<name>`, with underscores.
        dataclass_types (`Sequence[type]`):
            The dataclasses whose fields are the script's options.
    """

    NEEDED = {
        "model_name_or_path": "the Hub id or folder of an image editor",
        "dataset_name": "the Hub id or folder of a dataset",
    }

    def __init__(self, name: str, dataclass_types: Sequence[type]):
        super().__init__(
            dataclass_types,
            prog=f"hp-edit {name}",
            usage=f"hp-edit {name} [--config FILE] [--option VALUE ...]",
            allow_abbrev=False,
            epilog="With --num_processes N, --accelerate_config FILE_OR_NAME (a file, or one of TRL's configurations, "
            "e.g. multi_gpu or zero2) or any other option of `accelerate launch`, accelerate launches the script.",
        )
        self.module = f"hp_edit_trl.scripts.{name.replace('-', '_')}"
        self.add_argument(
            "--config",
            help="YAML file with options, or the name of a recipe, e.g. qwen_image_edit_2509; options on the "
            "command line take precedence.",
        )

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {redacted(message)}", file=sys.stderr)
        sys.exit(2)

    def parse(self, words: list[str]) -> tuple[dict[str, Any], argparse.Namespace | None]:
        """
        Parses options, without creating the dataclasses: `parser.parse_dict(options)` does that. The process that
        launches others needs none, and they would initialize the GPU.

        Args:
            words (`list[str]`):
                The command line.

        Returns:
            `tuple[dict[str, Any], argparse.Namespace | None]`: the options of the script, and the arguments of
            `accelerate launch` if there is any of its options.
        """
        for_launch = self._read_config(words)
        namespace, rest = self.parse_known_args(words)
        options = vars(namespace)
        options.pop("config")

        launcher = launch_command_parser()
        launcher.error = self.error  # type: ignore[method-assign]
        launcher.add_argument("--accelerate_config")
        # The module stands where `accelerate launch` expects the script; what comes before it must be options.
        launch, unknown = launcher.parse_known_args([*rest, self.module, *words])
        if unknown or launch.training_script != self.module:
            self.error(f"unrecognized arguments: {' '.join(unknown or [launch.training_script])}")
        if wrong := [name for name in for_launch if name not in vars(launch)]:
            self.error(f"--config: there is no option {', '.join(wrong)}.")
        for name, what in self.NEEDED.items():
            if options[name] is None:
                self.error(f"--{name} is needed: {what}.")
        if not rest and not for_launch:
            return options, None

        launcher.set_defaults(**for_launch)
        launch = launcher.parse_args([*rest, self.module, *words])
        # An accelerate config must not overwrite what the recipe says.
        launch.nondefault = {*vars(launch).get("nondefault", ()), *for_launch}
        launch.module = launch.quiet = True
        if launch.accelerate_config is not None:
            launch.config_file = self._accelerate_config(launch.accelerate_config)
        return options, launch

    def _read_config(self, words: list[str]) -> dict[str, Any]:
        """Makes the options of the YAML file the parser's defaults. Returns those that are not the script's own."""
        first = argparse.ArgumentParser(self.prog, add_help=False, allow_abbrev=False)
        first.error = self.error  # type: ignore[method-assign]
        first.add_argument("--config")
        file = first.parse_known_args(words)[0].config
        if file is None:
            return {}
        try:
            config = yaml.safe_load(self._config(file).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.error(f"--config {file} cannot be read: {' '.join(str(error).split())}")
        if not isinstance(config, dict):
            self.error(f"--config {file} must hold options, one per line, as in `learning_rate: 3.0e-4`.")
        environment = config.pop("env", None) or {}
        if not isinstance(environment, dict):
            self.error(f"--config {file}: `env` must hold environment variables, as in `WANDB_PROJECT: edits`.")
        os.environ.update({name: str(value) for name, value in environment.items()})
        own = {f.name for dataclass_type in self.dataclass_types for f in fields(dataclass_type) if f.init}
        self.set_defaults(**{name: value for name, value in config.items() if name in own})
        return {name: value for name, value in config.items() if name not in own}

    def _config(self, config: str) -> Path:
        """The file of `--config`, which is a path or the name of a recipe: they come with the package."""
        recipes = {file.stem: file for file in sorted(shipped_folder("recipes", "examples/configs").glob("*.yaml"))}
        if config not in recipes and not Path(config).exists():
            self.error(f"--config {config} is neither a file nor one of the recipes {', '.join(recipes)}.")
        return Path(config) if Path(config).exists() else recipes[config]

    def _accelerate_config(self, config: str) -> str:
        """The file of `--accelerate_config`, which is a path or the name of one of TRL's configurations."""
        if Path(config).is_file():
            return config
        named = {Path(file.name).stem: str(file) for file in files("trl").joinpath("accelerate_configs").iterdir()}
        if config not in named:
            self.error(f"--accelerate_config {config} is neither a file nor one of {', '.join(sorted(named))}.")
        return named[config]
