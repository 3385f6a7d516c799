"""Loading of a pipeline by several processes of a machine, without a copy of the weights in the memory of each."""

import contextlib
import ctypes
import gc
import importlib
import math
import os
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
    The folder is gone when they have; its pages stay as long as they are used. If it cannot be written, there is a
    warning, and each process makes its own copy.

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
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hp-edit-trl-"))
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


def write_converted(model: str, options: dict[str, Any], folder: str) -> dict[str, tuple[str, str]]:
    """
    Writes those components of a pipeline that are large and have to be converted, converted, each in a folder of its
    own below `folder`. Returns library and class of each.

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
        name: size for name, size in sizes.items() if size >= SHARED_FROM and isinstance(index.get(name), list | tuple)
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
            Variant of the files.
    """
    sizes: Counter[str] = Counter()
    for file in Path(folder).glob("*/*.safetensors"):
        if variant is None or f".{variant}" in file.name:
            with safe_open(file, framework="pt") as weights:
                for part in map(weights.get_slice, weights.keys()):
                    if FLOATS.get(part.get_dtype(), dtype) != dtype:
                        sizes[file.parent.name] += math.prod(part.get_shape()) * dtype.itemsize
    return dict(sizes)


def _free() -> None:
    """Returns unused memory to the system, of which glibc would keep a part."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _kind(library: str, name: str) -> Any:
    return getattr(importlib.import_module(library), name)
