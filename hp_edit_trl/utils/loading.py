"""Loading of a pipeline by several processes of a machine, without a copy of the weights in the memory of each."""

import contextlib
import ctypes
import gc
import glob
import importlib
import math
import os
import platform
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from safetensors import safe_open


logger = get_logger(__name__)

SHARED_FROM = 2**30  # bytes of a component that has to be converted; a smaller one is copied by each process
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Options of a pipeline that say which files are read
FILES = ("revision", "token", "cache_dir", "variant", "use_safetensors", "local_files_only")


def load_shared_pipeline(model: str, options: dict[str, Any]) -> DiffusionPipeline:
    """
    Loads a pipeline as [`~diffusers.DiffusionPipeline.from_pretrained`] does. All processes of a launch must call it.

    Weights in the type that they are stored in are pages of their files, which the processes of a machine share. To
    convert them, each process would copy them into memory of its own. Therefore the first process of each machine
    converts large components one by one and writes them into a temporary folder (`TMPDIR`), from which all read them.
    The folder is gone when they have; its pages stay as long as they are used. What a killed start has left is removed
    by the next one. If it cannot be written, there is a warning, and each process makes its own copy.

    Args:
        model (`str`):
            Hub id or local folder.
        options (`dict`):
            Keyword arguments of [`~diffusers.DiffusionPipeline.from_pretrained`], among them `dtype`.
    """
    state = PartialState()
    # Quantized weights are no pages of files anyway.
    if state.num_processes == 1 or options.get("quantization_config") is not None:
        return DiffusionPipeline.from_pretrained(model, **options)
    first = state.process_index - state.local_process_index  # of the machine's processes
    neighbours = gather_object([first]).count(first)
    with contextlib.ExitStack() as stack:
        written: dict[str, tuple[str, str]] = {}
        folder, components, failure = "", {}, None
        try:
            if state.is_local_main_process and neighbours > 1:
                # An error while it is removed would leave the other processes waiting.
                prefix = f"{_prefix()}{os.getpid()}-"
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True))
                remove_left_folders(folder)
                written = write_converted(model, options, folder)
        except Exception as error:  # what is wrong with the model is said below
            failure = f"{type(error).__name__}: {error}"
        folder, written, failure = gather_object([(folder, written, failure)])[first]
        try:
            if failure is None:
                for name, kind in written.items():
                    components[name] = _kind(*kind).from_pretrained(f"{folder}/{name}", dtype=options["dtype"])
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        failures = [told for told in gather_object([failure]) if told is not None]
        if failures:
            components = {}
            logger.warning(
                f"The converted weights could not be shared, so each process holds its own in CPU memory while it "
                f"loads the model: {failures[0]}"
            )
    return DiffusionPipeline.from_pretrained(model, **options, **components)


def remove_left_folders(folder: str) -> None:
    """
    Removes the folders of converted weights that killed processes of this user and machine have left.

    Args:
        folder (`str`):
            This process's own folder. The others lie beside it.
    """
    user = os.stat(folder).st_uid
    for other in Path(folder).parent.glob(f"{glob.escape(_prefix())}*"):
        process = re.match(r"(\d+)-", other.name.removeprefix(_prefix()))
        with contextlib.suppress(PermissionError, FileNotFoundError):  # it is another's, or another start removes it
            if process and other.stat().st_uid == user and not _is_alive(int(process[1])):
                shutil.rmtree(other, ignore_errors=True)


def write_converted(model: str, options: dict[str, Any], folder: str) -> dict[str, tuple[str, str]]:
    """
    Writes those components of a pipeline that are large and have to be converted, converted, each in a folder of its
    own below `folder`. Components that `options` give are left out. Returns library and class of each.

    Args:
        model (`str`):
            Hub id or local folder.
        options (`dict`):
            See [`load_shared_pipeline`].
        folder (`str`):
            The folder.

    Raises:
        `OSError`: If the disk has no room for them, or they cannot be read.
    """
    files = {name: options[name] for name in FILES if name in options}
    path = model if os.path.isdir(model) else DiffusionPipeline.download(model, **files)
    index = DiffusionPipeline.load_config(path)
    sizes = converted_bytes(path, options["dtype"], options.get("variant"))
    sizes = {
        name: size
        for name, size in sizes.items()
        if size >= SHARED_FROM and isinstance(index.get(name), list | tuple) and name not in options
    }
    if (free := shutil.disk_usage(folder).free) < sum(sizes.values()):
        raise OSError(
            f"they take {sum(sizes.values()) / 2**30:.0f} GiB, but {folder} has only {free / 2**30:.0f} GiB of room. "
            "Set TMPDIR to another disk of this machine."
        )
    written = {}
    for name in sizes:
        library, kind = written[name] = (index[name][0], index[name][1])
        module = _kind(library, kind).from_pretrained(
            path, subfolder=name, dtype=options["dtype"], **{k: files[k] for k in ("variant",) if k in files}
        )
        module.save_pretrained(f"{folder}/{name}")
        del module
        _free()
    return written


def converted_bytes(folder: str | Path, dtype: torch.dtype, variant: str | None = None) -> dict[str, int]:
    """
    The size that weights take in memory which are stored in another type, by component. Only the heads of safetensors
    files are read.

    Args:
        folder (`str` or `Path`):
            Folder of a pipeline.
        dtype (`torch.dtype`):
            Type that the weights are loaded in.
        variant (`str`, *optional*):
            Variant of the files. By default those of no variant count.
    """
    sizes: Counter[str] = Counter()
    for file in Path(folder).glob("*/*.safetensors"):
        # `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`, `model-00001-of-00002.fp16.safetensors`
        name = re.sub(r"-\d+-of-\d+", "", file.name.removesuffix(".safetensors"))
        if name.partition(".")[2] == (variant or ""):
            with safe_open(file, framework="pt") as weights:
                for part in map(weights.get_slice, weights.keys()):
                    if FLOATS.get(part.get_dtype(), dtype) != dtype:
                        sizes[file.parent.name] += math.prod(part.get_shape()) * dtype.itemsize
    return dict(sizes)


def _prefix() -> str:
    """Of this machine's temporary folders; machines may share a disk, and a process id is that of one machine."""
    return f"hp-edit-trl-{platform.node()}-"


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # where this signal would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _free() -> None:
    """Returns unused memory to the system, of which glibc would keep a part."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _kind(library: str, name: str) -> Any:
    return getattr(importlib.import_module(library), name)
