"""Imports of functions and classes that a user names."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from .secrets import redact_error, redacted


def import_object(path: str, option: str) -> Any:
    """
    Imports what a path such as `"file.py:name"` or `"package.module:name"` stands for.

    Args:
        path (`str`):
            The file or module, a colon, and the name in it.
        option (`str`):
            Name of the option for errors, e.g. `"editor"`.

    Raises:
        `ValueError`: If it cannot be imported.
    """
    where, _, name = path.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        else:
            module = importlib.import_module(where)
        return vars(module)[name]
    except (ImportError, KeyError, OSError, ValueError) as error:
        redact_error(error)
        raise ValueError(
            f"{option}={redacted(path)!r} cannot be imported ({type(error).__name__}: {error}): use file.py:name or "
            "package.module:name."
        ) from error
