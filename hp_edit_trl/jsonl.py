"""Files of JSON lines that are appended to while work goes on, and may be cut off by a crash anywhere."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def append_lines(file: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends a line for each row and waits until they are on disk. A line that a crash cut off before is closed first."""
    with open(file, "ab+") as lines:
        if lines.seek(0, os.SEEK_END) > 0:
            lines.seek(-1, os.SEEK_END)
            if lines.read() != b"\n":
                lines.write(b"\n")
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        lines.flush()
        os.fsync(lines.fileno())


def read_lines(file: str | Path) -> Iterator[tuple[int, Any, bytes]]:
    """For each line that is not empty: its number, what it holds (`None` if it is not a whole JSON object), and its bytes."""
    for number, line in enumerate(Path(file).read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            yield number, value if isinstance(value, dict) else None, line
