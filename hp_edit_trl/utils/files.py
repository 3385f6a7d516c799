"""
Files that survive a kill: written completely or not at all, or appended line by line. Secrets that this process knows
are left out of texts, see [`~hp_edit_trl.utils.secrets.without_known_secrets`].
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .secrets import redacted, without_known_secrets


LONGEST_NAME = 150  # characters; most file systems allow 255, with suffixes and those of temporary files
# Devices of Windows, with any suffix
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def shipped_folder(name: str, in_checkout: str) -> Path:
    """
    A folder of files that come with the package: inside it in a wheel, elsewhere in a checkout of the repository.

    Args:
        name (`str`):
            Its name in the package.
        in_checkout (`str`):
            Its path in a checkout.
    """
    package = Path(__file__).parents[1]
    return package / name if (package / name).is_dir() else package.parent / in_checkout


def file_name(name: str) -> str:
    """
    A name as (part of) a file name: characters that file names do not allow are percent-encoded as in URLs, and so is
    a dot at the beginning and the first letter of a device of Windows. It never leads to another folder, and different
    names stay different: those that are empty, long or have capital letters, which some file systems ignore, end in a
    hash, e.g. `A=559aead08264d579`.
    """
    encoded = quote(name, safe="", errors="surrogatepass")
    if encoded.startswith(".") or _DEVICE.match(encoded):
        encoded = f"%{ord(encoded[0]):02X}{encoded[1:]}"
    if 0 < len(encoded) <= LONGEST_NAME and not re.search("[A-Z]", name):
        return encoded
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{encoded[:LONGEST_NAME]}={digest[:16]}"


def is_below(path: str | Path, folder: str | Path) -> bool:
    """Returns whether a path leads into a folder, after links and `..` are resolved."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except ValueError:  # a character that no path has
        return False


def write_atomically(file: str | Path, write: Callable[[Path], Any]) -> None:
    """
    Writes a file completely or not at all: to a temporary file in the same folder, which is synced and then renamed.

    Args:
        file (`str` or `Path`):
            The file.
        write (`Callable[[Path], Any]`):
            Writes the content to the path that it is given, which ends in `.part`.

    Raises:
        `OSError`: If it cannot be written. An older file is left as it was.
    """
    file = Path(file)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")  # other processes may write the same file
    try:
        write(part)
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        part.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        message = (
            f"{file} cannot be written ({error.strerror or error}). Earlier files are kept: free space, run again"
        )
        raise OSError(error.errno, message) from error


def write_text(file: str | Path, text: str) -> None:
    """Writes a text file in UTF-8, completely or not at all."""
    write_atomically(file, lambda part: part.write_text(without_known_secrets(text), encoding="utf-8"))


def write_json(file: str | Path, value: Any) -> None:
    """Writes a JSON file, completely or not at all. Raises `ValueError` if a number in it is not finite."""
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(file: str | Path) -> dict[str, Any] | None:
    """Reads a JSON object. Returns `None` if there is no such file, or it does not hold a complete object."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def append_jsonl(file: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends a line for each row and syncs the file. A line that a crash cut off before is closed first."""
    with open(file, "ab+") as lines:
        if lines.seek(0, os.SEEK_END) > 0:
            lines.seek(-1, os.SEEK_END)
            if lines.read() != b"\n":
                lines.write(b"\n")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        lines.write(without_known_secrets(text).encode("utf-8", "replace"))
        lines.flush()
        os.fsync(lines.fileno())


def read_jsonl(file: str | Path) -> Iterator[tuple[int, Any, bytes]]:
    """
    Yields the number, the JSON object (`None` if the line is not a complete one) and the bytes of each non-empty line.
    """
    for number, line in enumerate(Path(file).read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield number, value if isinstance(value, dict) else None, line


def check_unchanged(what: str, before: dict[str, Any], now: dict[str, Any], remedy: str) -> None:
    """
    Raises an error if files were made with other settings than the present ones.

    Args:
        what (`str`):
            What the error says of the files, e.g. `"outputs/a holds samples"`.
        before (`dict`):
            The settings that the files were made with.
        now (`dict`):
            The present settings. Values are compared as JSON would return them, and without secrets.
        remedy (`str`):
            What to do about it, e.g. `"choose another output_dir"`.

    Raises:
        `ValueError`: If a setting differs; it lists each with its old and its new value.
    """
    before, now = redacted(before), redacted(json.loads(json.dumps(now, default=str)))
    changed = [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in before | now
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(f"{what} made with other settings ({'; '.join(changed)}): {remedy}.")
