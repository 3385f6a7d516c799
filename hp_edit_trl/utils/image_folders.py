"""Folders of images with `metadata.jsonl`: what is wrong with a file that cannot be read, and what it leaves out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .texts import shortened


EXAMPLE = '{"file_name": "cup.jpg", "prompt": "Make the cup red"}'
KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def is_saved_dataset(folder: str) -> bool:
    """Whether a folder was written by [`~datasets.Dataset.save_to_disk`]."""
    return any((Path(folder) / name).exists() for name in ("dataset_dict.json", "state.json"))


def _files(folder: str, pattern: str) -> list[Path]:
    """The files of a folder and its subfolders, hidden ones left out as the loader does."""
    return [
        path
        for path in sorted(Path(folder).rglob(pattern))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(encoding="utf-8-sig", newline="\n") as lines:  # other separators may be part of a text
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


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
    for file in _files(folder, "metadata.jsonl"):
        seen: dict[str, tuple[str, int]] = {}  # kind of each key's values, and a line that has it
        try:
            lines = list(_lines(file))
        except UnicodeDecodeError as error:
            return f"{file} is not UTF-8 ({error}): save it as UTF-8."
        for number, line in lines:
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                return (
                    f"{where} is no JSON: {error.msg} at character {error.pos + 1} of {shortened(line.strip())}. Each "
                    f"line is an object like {EXAMPLE}."
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
    no such file, or one is not of an object per line.

    Args:
        folder (`str`):
            The folder.
    """
    files = _files(folder, "metadata.jsonl")
    if not files or is_saved_dataset(folder):
        return []
    listed: set[Path] = set()
    for file in files:
        for _, line in _lines(file):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                return []
            if not isinstance(row, dict):
                return []
            listed |= {(file.parent / name).resolve() for name in _names(row)}
    return [
        path
        for path in _files(folder, "*")
        if path.suffix.lower() in ImageFolder.EXTENSIONS and path.resolve() not in listed
    ]


def _names(row: dict[str, Any]) -> list[str]:
    names = []
    for key, value in row.items():
        if _names_images(key):
            names += value if isinstance(value, list) else [value]
    return [name for name in names if isinstance(name, str)]
