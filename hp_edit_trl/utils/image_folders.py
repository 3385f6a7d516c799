"""Folders of images with `metadata.jsonl`: what is wrong with a file that cannot be read, and what it leaves out."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from .texts import shortened


METADATA = "metadata.jsonl"
EXAMPLE = '{"file_name": "cup.jpg", "prompt": "Make the cup red"}'
KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def _names_images(key: str) -> bool:
    return key in ("file_name", "file_names") or key.endswith(("_file_name", "_file_names"))


def metadata_fault(folder: str) -> str | None:
    """
    What is wrong with the `metadata.jsonl` files of a folder: file, line and remedy of the first fault. `None` if
    nothing is found.

    Args:
        folder (`str`):
            The folder.
    """
    for file in sorted(Path(folder).rglob(METADATA)):
        seen: dict[str, tuple[str, int]] = {}  # kind of each key's values, and a line that has it
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            return f"{file} is not UTF-8 ({error}): save it as UTF-8."
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                return (
                    f"{where} is no JSON: {error.msg} at character {error.pos + 1} of {shortened(line)}. Each line is "
                    f"an object like {EXAMPLE}."
                )
            if not isinstance(row, dict):
                return f"{where} is {KINDS.get(type(row), 'null')}, but each line is an object like {EXAMPLE}."
            if not any(map(_names_images, row)):
                return (
                    f"{where} names no image; its keys are {list(row)}. Name the file by 'file_name' (and those of "
                    f"other columns by e.g. 'mask_file_name'), as in {EXAMPLE}."
                )
            for key, value in row.items():
                if value is None:
                    continue
                kind = KINDS[type(value)]
                other, line_of_other = seen.setdefault(key, (kind, number))
                if kind != other:
                    return f"{where}: {key!r} is {kind}, but {other} in line {line_of_other}. Write the same in all."
    return None


def unlisted_images(folder: str) -> list[Path]:
    """
    The images of a folder that none of its `metadata.jsonl` files names, so that they are left out. None if there is
    no such file.

    Args:
        folder (`str`):
            The folder.
    """
    files = sorted(Path(folder).rglob(METADATA))
    if not files:
        return []
    listed: set[Path] = set()
    for file in files:
        for line in filter(str.strip, file.read_text(encoding="utf-8").splitlines()):
            listed |= {(file.parent / name).resolve() for name in _names(json.loads(line))}
    suffixes = Image.registered_extensions()
    return [
        path
        for path in sorted(Path(folder).rglob("*"))
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.resolve() not in listed
    ]


def _names(row: dict[str, Any]) -> list[str]:
    names = []
    for key, value in row.items():
        if _names_images(key):
            names += value if isinstance(value, list) else [value]
    return [name for name in names if name is not None]
