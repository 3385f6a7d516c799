"""Revisions of models, folders and datasets, which tell them apart from others of the same name."""

import hashlib
import os
import re
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import AutoConfig

from .dtypes import plain_values


EDGE = 65536  # bytes at either end of a file that are read


def folder_revision(folder: str | Path) -> str:
    """
    The commit of a snapshot that was downloaded from the Hub. For any other folder a hash of its files: names, sizes,
    and first and last 64 KiB of each.
    """
    folder = Path(folder)
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        size = file.stat().st_size
        with open(file, "rb") as content:
            edges = content.read(EDGE)
            content.seek(max(size - EDGE, 0))
            edges += content.read(EDGE)
        digest.update(repr((str(file.relative_to(folder)), size)).encode() + hashlib.sha256(edges).digest())
    return f"files {digest.hexdigest()[:12]}"


def model_revision(model: str, revision: str | None = None) -> str | None:
    """
    The revision of a transformers model.

    Args:
        model (`str`):
            Hub id or local folder.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.

    Returns:
        `str` or `None`: the commit on the Hub if it is known, or [`folder_revision`] of a folder.
    """
    if os.path.isdir(model):
        return folder_revision(model)
    try:
        return AutoConfig.from_pretrained(model, revision=revision)._commit_hash
    except (OSError, ValueError):
        return revision


def dataset_revision(dataset: Dataset) -> tuple[str | None, str | None]:
    """Repository and commit that a dataset was loaded from, each `None` where its cached files do not tell."""
    # `load_dataset` prepares a dataset in a folder named after the commit. That path changes the repository's name
    # ("50K" becomes "50_k"), so the name is taken from the Hub cache, where the same commit was downloaded to.
    parts = {part for file in dataset.cache_files for part in Path(file["filename"]).parts}
    commits = [part for part in parts if re.fullmatch(r"[0-9a-f]{40}", part)]
    if len(commits) != 1:
        return None, None
    for snapshot in Path(HF_HUB_CACHE).glob(f"datasets--*/snapshots/{commits[0]}"):
        return snapshot.parent.parent.name.removeprefix("datasets--").replace("--", "/"), commits[0]
    return None, commits[0]


def weights_digest(model: torch.nn.Module) -> str:
    """A hash of a model's weights, LoRAs included: names, shapes, and the first 64 values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        first = plain_values(tensor).flatten()[:64].to("cpu", torch.float32).numpy().tobytes()
        digest.update(repr((name, tuple(tensor.shape))).encode() + first)
    return digest.hexdigest()[:16]
