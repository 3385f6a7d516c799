"""Checkpoints that are whole or not there: written beside their place, listed with sizes and hashes, then renamed."""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..utils.files import read_json, write_json


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Folder for what is being written. Neither Trainer nor an upload takes it for a checkpoint.
UNFINISHED = "_unfinished"

WEIGHTS = "adapter_model.safetensors"
COPIES = "adapter_copies.pt"  # of the adapter, where a run has some
ESSENTIAL = (TRAINER_STATE_NAME, WEIGHTS)  # without which a folder is no checkpoint

# Files that are read when a run resumes, if they are there: none of them may be left out of a manifest.
READ = (
    "adapter_config.json", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "rollouts_*.pt", COPIES,
    "stream.json",
)  # fmt: skip

# Types of a trainer's state in its file; without a step it is none
STATE_TYPES: dict[str, Any] = {
    "global_step": int,
    "epoch": int | float | None,
    "max_steps": int,
    "logging_steps": int | float,
    "eval_steps": int | float,
    "save_steps": int | float,
    "train_batch_size": int | None,
    "num_train_epochs": int | float,
    "num_input_tokens_seen": int,
    "total_flos": int | float,
    "log_history": list | None,
    "best_metric": int | float | None,
    "best_global_step": int | None,
    "best_model_checkpoint": str | None,
    "stateful_callbacks": dict | None,
}


@contextlib.contextmanager
def save_errors(what: str | Path) -> Iterator[None]:
    """Context for saving: whatever a full or failing disk makes of it becomes an `OSError` that says what to do."""
    try:
        yield
    except HfHubHTTPError:  # an OSError too
        raise
    # safetensors and torch have errors of their own for a file that cannot be written.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"{what} could not be saved: {type(error).__name__}: {' '.join(str(error).split())}. Earlier checkpoints "
            "are kept. If the disk is full, free space; then resume with resume_from_checkpoint=True."
        ) from error


@contextlib.contextmanager
def restoring(checkpoint: str | None) -> Iterator[None]:
    """Context for loading optimizer, scheduler and others: what does not fit the run becomes one `ValueError`."""
    try:
        yield
    except Exception as error:  # these loaders do not check what they are given
        raise ValueError(
            f"What {checkpoint} holds of optimizer, scheduler, random numbers and rollouts does not fit this run: "
            f"{type(error).__name__}: {error}. Resume with the options of the checkpoint, or choose another one."
        ) from error


def files_below(folder: str | Path) -> list[str]:
    """Names of all files in a folder and its subfolders, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def write_manifest(folder: str | Path, names: Iterable[str], manifest: str = MANIFEST, **values: Any) -> None:
    """
    Syncs files of a folder, then writes a list of them.

    Args:
        folder (`str` or `Path`):
            The folder.
        names (`Iterable[str]`):
            Its files that are listed, with size and SHA-256.
        manifest (`str`, *optional*, defaults to `"manifest.json"`):
            Name of the file that is written.
        **values:
            Further values to write into it.

    Raises:
        `OSError`: If a file is missing or cannot be synced, or the list cannot be written.
    """
    folder = Path(folder)
    files = {}
    for name in names:
        _sync(folder / name)
        files[name] = {"size": (folder / name).stat().st_size, "sha256": _digest(folder / name)}
    write_json(folder / manifest, {**values, "files": files})
    for path in {folder, *((folder / name).parent for name in files)}:
        _sync(path)


def find_fault(folder: str | Path, manifest: str = MANIFEST, essential: Iterable[str] = ESSENTIAL) -> str | None:
    """
    Checks the files of a folder against its manifest, byte by byte, and a trainer's state among them.

    Args:
        folder (`str` or `Path`):
            The folder.
        manifest (`str`, *optional*, defaults to `"manifest.json"`):
            Name of the list of its files.
        essential (`Iterable[str]`, *optional*, defaults to `("trainer_state.json", "adapter_model.safetensors")`):
            Files that must be listed.

    Returns:
        `str`, *optional*: the first fault, by file name, e.g. `"optimizer.pt is truncated (100 of 5,120 bytes)"`.
        `None` if the folder is whole.
    """
    folder = Path(folder)
    try:
        if not folder.is_dir():
            return "there is no such folder"
        if not (folder / manifest).is_file():
            return f"{manifest} is missing, which is written last"
        listed = (read_json(folder / manifest) or {}).get("files")
        if (
            not listed
            or not isinstance(listed, dict)
            or not all(
                isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("sha256"), str)
                for entry in listed.values()
            )
        ):
            return f"{manifest} is damaged"
        for name in listed:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                return f"{manifest} lists {name!r}, which is not in the folder"
        read = [file.name for pattern in READ for file in folder.glob(pattern)] if manifest == MANIFEST else []
        for name in (*essential, *read):
            if name not in listed:
                return f"{name} is not listed in {manifest}"
        for name, entry in listed.items():  # sizes first, which costs nothing
            if not (folder / name).is_file():
                return f"{name} is missing"
            size = (folder / name).stat().st_size
            if size < entry["size"]:
                return f"{name} is truncated ({size:,} of {entry['size']:,} bytes)"
        for name, entry in listed.items():
            if _digest(folder / name) != entry["sha256"]:
                return f"{name} has changed since it was saved"
    except (OSError, ValueError) as error:
        return f"a file cannot be read ({error})"
    return _fault_of_state(folder / TRAINER_STATE_NAME) if TRAINER_STATE_NAME in listed else None


def _fault_of_state(file: Path) -> str | None:
    """What is wrong with the file of a trainer's state, if something is."""
    values = read_json(file)
    if values is None:
        return f"{file.name} is truncated or damaged"
    if "global_step" not in values:
        return f"{file.name} has no global_step"
    unknown = sorted(values.keys() - TrainerState.__dataclass_fields__.keys())
    if unknown:
        return f"{file.name} has {unknown[0]!r}, which this version of transformers does not know"
    for name, kind in STATE_TYPES.items():
        value = values.get(name, 0)
        if name in values and (isinstance(value, bool) or not isinstance(value, kind)):
            return f"{file.name} has a {name} of a wrong type ({type(value).__name__})"
    callbacks = [
        state
        for states in (values.get("stateful_callbacks") or {}).values()
        for state in (states if isinstance(states, list) else [states])
    ]
    parts = [state.get(part, {}) for state in callbacks if isinstance(state, dict) for part in ("args", "attributes")]
    for name, entries in (
        ("log_history", values.get("log_history") or []),
        ("stateful_callbacks", [*callbacks, *parts]),
    ):
        if not all(isinstance(entry, dict) for entry in entries):
            return f"{file.name} has a {name} of a wrong form"
    if values["global_step"] < 0 or not 0 <= (values.get("epoch") or 0) < math.inf:
        return f"{file.name} has a step or an epoch that cannot be"
    return None


def can_be_read(file: str | Path) -> bool:
    """
    Whether a JSON, safetensors or torch file is complete, without anything that was noted when it was written. A
    changed byte is seen in torch's files, which hold checksums that torch does not look at.
    """
    try:
        if Path(file).suffix == ".json":
            json.loads(Path(file).read_bytes())
        elif Path(file).suffix == ".safetensors":
            with safe_open(file, "np"):
                pass
        else:
            with zipfile.ZipFile(file) as archive:
                return archive.testzip() is None
    except Exception:  # damaged bytes break these readers in many ways
        return False
    return True


def move_into_place(folder: str | Path, place: str | Path) -> None:
    """
    Renames a checkpoint that is complete to its place, and syncs the folder that it is in. An older one of that name
    is deleted afterwards.

    Args:
        folder (`str` or `Path`):
            The checkpoint, in the folder `_unfinished`, which is deleted.
        place (`str` or `Path`):
            Its place.
    """
    folder, place = Path(folder), Path(place)
    if place.exists():
        place.rename(folder.with_name("replaced"))
    folder.rename(place)
    _sync(place.parent)
    shutil.rmtree(folder.parent, ignore_errors=True)


def clean_up(output_dir: str | Path) -> None:
    """
    Tidies up after a kill: moves a checkpoint into place if only that was missing, and deletes what is unfinished.
    """
    for folder in sorted(Path(output_dir, UNFINISHED).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        if find_fault(folder) is None:
            move_into_place(folder, Path(output_dir, folder.name))
    shutil.rmtree(Path(output_dir, UNFINISHED), ignore_errors=True)


def newest_whole(output_dir: str | Path) -> tuple[str | None, list[str]]:
    """
    Finds the newest checkpoint that is whole.

    Returns:
        `tuple[str | None, list[str]]`: the checkpoint, if there is one, and what is wrong with each newer one.
    """
    matches = (
        (re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir()
    )
    faults: list[str] = []
    for _, folder in sorted(((int(match[1]), path) for match, path in matches if match), reverse=True):
        fault = find_fault(folder)
        if fault is None:
            return str(folder), faults
        faults.append(f"{folder} is not whole: {fault}.")
    return None, faults


def checkpoint_to_resume(
    resume_from_checkpoint: str | bool | None, output_dir: str | Path, needed: Iterable[str]
) -> str | None:
    """
    Chooses the checkpoint that a run resumes from, and verifies it. Warns if the run will not be exact.

    Args:
        resume_from_checkpoint (`str` or `bool`, *optional*):
            A checkpoint; or `True` (or `"true"`) for the newest whole one of `output_dir`.
        output_dir (`str` or `Path`):
            The trainer's output folder.
        needed (`Iterable[str]`):
            Names of the files that an exact resume needs besides the weights.

    Returns:
        `str`, *optional*: the checkpoint. `None` to start over.

    Raises:
        `ValueError`: If the named checkpoint is not whole. It names the fault and the newest whole checkpoint.
    """
    if str(resume_from_checkpoint).lower() in ("none", "false", "true"):  # command lines know no types
        if str(resume_from_checkpoint).lower() != "true":
            return None
        chosen, faults = newest_whole(output_dir)
        for fault in faults:
            logger.warning(f"{fault} It is not resumed from.")
        if chosen is None:
            logger.warning(f"There is no whole checkpoint in {output_dir}: the run starts over.")
            return None
        logger.warning(f"Resuming from {chosen}, the newest whole checkpoint.")
        folder = Path(chosen)
    else:
        folder = Path(str(resume_from_checkpoint))
        problem = find_fault(folder)
        unlisted = folder.is_dir() and not (folder / MANIFEST).is_file()
        if unlisted:  # saved by something else, or the list was deleted
            missing = [name for name in ESSENTIAL if not (folder / name).is_file()]
            there = [name for name in (*ESSENTIAL, *needed) if (folder / name).is_file()]
            problem = (
                next((f"{name} is missing" for name in missing), None)
                or next((f"{name} is truncated or damaged" for name in there if not can_be_read(folder / name)), None)
                or _fault_of_state(folder / TRAINER_STATE_NAME)
            )
        if problem is not None:
            newest, _ = newest_whole(folder.absolute().parent)
            remedy = f"The newest whole checkpoint there is {newest}." if newest else "No checkpoint there is whole."
            raise ValueError(
                f"resume_from_checkpoint={str(folder)!r} cannot be resumed from: {problem}. {remedy} "
                "resume_from_checkpoint=True takes the newest whole one, or starts over."
            )
        if unlisted:
            logger.warning(f"{folder} has no {MANIFEST}: whether its files are as they were saved is not known.")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        logger.warning(
            f"{folder} has no {', '.join(missing)}: it was saved with save_only_model, with another number of "
            "processes, or these files were deleted. What they hold starts anew: the resumed run will not be exact."
        )
    return str(folder)
