"""What a trainer uploads to the Hub: an allow-list, without anything pickled and without secrets."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import CommitInfo, CommitScheduler, DatasetCard, DatasetCardData, HfApi
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy

from ..utils.files import is_below, write_text
from ..utils.hub import create_repository
from ..utils.secrets import redacted, remember_secrets


MODEL_FILES = (
    LORA_WEIGHT_NAME_SAFE, "adapter_model.safetensors", "adapter_config.json", "README.md", "reward_curve.png",
    TRAINER_STATE_NAME,
)  # fmt: skip
CARD_PICTURES = ("before_after.png", "images/*_before.png", "images/*_after.png", "images/*_prompt.txt")
COMPLETIONS = ("completions_*.parquet", "references/*.webp")


def check_hub_options(args: Any) -> None:
    """
    Checks the options of a configuration that decide what is uploaded, and remembers its tokens, so that they are left
    out of everything that is written.

    Args:
        args ([`FlowGRPOEditConfig`], [`FlowNFTEditConfig`] or [`DPOEditConfig`]):
            The configuration.

    Raises:
        `ValueError`: If `hub_strategy` would upload whole checkpoints, or `num_sample_edits` is negative.
    """
    remember_secrets(vars(args))
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"hub_strategy={args.hub_strategy.value!r} would upload whole checkpoints: pickled files, which whoever "
            "downloads them must trust, and encoded images of your cases. Use 'every_save', which uploads the LoRA of "
            "each checkpoint, and copy checkpoints to storage of your own to resume elsewhere."
        )
    if args.num_sample_edits < 0:
        raise ValueError(f"num_sample_edits={args.num_sample_edits} must not be negative.")


def write_published_state(state: Path, folder: Path) -> None:
    """Writes a trainer's state to the folder that is uploaded, without secrets and without local folders."""
    content = redacted(json.loads(state.read_text(encoding="utf-8")))
    if content.get("best_model_checkpoint"):
        content["best_model_checkpoint"] = Path(content["best_model_checkpoint"]).name
    write_text(folder / TRAINER_STATE_NAME, json.dumps(content, indent=2, sort_keys=True) + "\n")


def copy_published(checkpoint: Path, folder: Path) -> list[str]:
    """
    Copies what is uploaded of a checkpoint to the output folder, because the checkpoint may be deleted while the
    upload is going on.

    Args:
        checkpoint (`Path`):
            The checkpoint.
        folder (`Path`):
            The output folder.

    Returns:
        `list[str]`: names of the files.
    """
    names = [name for name in MODEL_FILES if (checkpoint / name).is_file()]
    for name in names:
        if name == TRAINER_STATE_NAME:
            write_published_state(checkpoint / name, folder)
        else:
            shutil.copy(checkpoint / name, folder)
    return names


def upload(folder: str, args: Any, repo_id: str, files: list[str], message: str | None, **options: Any) -> CommitInfo:
    """
    Uploads files of a folder, as far as they exist. Links to files elsewhere are left out. `options` are those of
    [`~huggingface_hub.HfApi.upload_folder`], which returns a `Future` with `run_as_future=True`.
    """
    options = {"token": args.hub_token, "revision": args.hub_revision} | options
    names = [name for name in files if (Path(folder) / name).is_file() and is_below(Path(folder) / name, folder)]
    return HfApi().upload_folder(
        repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message=message, **options
    )


def card_pictures(folder: Path) -> list[str]:
    """The names of the pictures that the model card shows. Other files beside them are the user's own."""
    names = sorted(file.name for file in (folder / "images").glob("*"))
    ours = [name for name in names if re.fullmatch(r"\d+_((before|after)\.png|prompt\.txt)", name)]
    return ["before_after.png", *(f"images/{name}" for name in ours)]


def completions_scheduler(args: Any) -> CommitScheduler:
    """
    Creates the dataset repository `log_completions_hub_repo`, and uploads new sample edits to it every two minutes and
    at the end of the process.

    Args:
        args ([`OnlineEditConfig`]):
            The configuration.

    Raises:
        `ValueError`: If `hub_private_repo` is not `False`, but the repository exists and is public.
    """
    private = args.hub_private_repo is not False
    repo_id = create_repository(args.log_completions_hub_repo, private=private, token=args.hub_token)
    kinds = {"completions": COMPLETIONS[0], "references": COMPLETIONS[1]}
    configs = [{"config_name": name, "data_files": files} for name, files in kinds.items()]
    data = DatasetCardData(tags=["hp-edit-trl", "completions"], configs=configs)
    text = "Sample edits of a training run with hp-edit-trl. `reference` names the file of the source image."
    DatasetCard(f"---\n{data}\n---\n\n# Sample edits\n\n{text}\n").push_to_hub(repo_id, token=args.hub_token)
    return CommitScheduler(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=Path(args.output_dir) / "completions",
        every=2,
        private=private,
        token=args.hub_token,
        allow_patterns=list(COMPLETIONS),
    )
