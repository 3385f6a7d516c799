"""
The rubric, which gives the meaning of the scores 0 to 5, and the guidelines for the review of cases: Markdown files
with a revision.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


LABELS = ("", "", "", "", "", "")
MAX_REASONS = 9  # one digit each


@dataclass(frozen=True)
class Rubric:
    """
    Instructions for annotators.

    Args:
        revision (`str`):
            Origin and revision of the text, e.g. `"hp-edit-trl:rubric:2"`. It is saved with every rating.
        text (`str`):
            The instructions, in Markdown.
        labels (`tuple[str, ...]`, *optional*):
            A short label for each of the scores 0 to 5. Defaults to none.
    """

    revision: str
    text: str
    labels: tuple[str, ...] = LABELS


def load_rubric(path: str | Path | None = None) -> Rubric:
    """
    Loads a rubric: a Markdown file with a YAML header that has a `revision` and optionally `labels` for the six
    scores.

    Args:
        path (`str` or `Path`, *optional*):
            The file. Defaults to the rubric of this package, which has the scale of its scorer prompts.

    Raises:
        `FileNotFoundError`: If the file does not exist.
        `ValueError`: If the header is missing or not valid, or the text is empty.
    """
    file, header, text = _read(path, "rubric")
    labels = header.get("labels", LABELS)
    if not isinstance(labels, list | tuple) or len(labels) != 6:
        raise ValueError(f"The rubric {file} has labels {labels!r}: it needs six, for the scores 0 to 5, or none.")
    return Rubric(_revision(path, "rubric", header), text, tuple(map(str, labels)))


def load_guidelines(path: str | Path | None = None) -> Rubric:
    """
    Loads guidelines for the review of cases: a Markdown file with a YAML header that has a `revision` and `reasons`,
    for which a case can be rejected.

    Args:
        path (`str` or `Path`, *optional*):
            The file. Defaults to the guidelines of this package.

    Returns:
        [`Rubric`]: with the reasons as `labels`.

    Raises:
        `FileNotFoundError`: If the file does not exist.
        `ValueError`: If the header is missing or not valid, or the text is empty.
    """
    file, header, text = _read(path, "guidelines")
    reasons = header.get("reasons")
    if (
        not isinstance(reasons, list)
        or not 1 <= len(reasons) <= MAX_REASONS
        or not all(isinstance(reason, str) and reason.strip() for reason in reasons)
        or len({*reasons, "other"}) <= len(reasons)
    ):
        raise ValueError(
            f"The guidelines {file} have reasons {reasons!r}: they need a list of 1 to {MAX_REASONS} different texts "
            "for which a case can be rejected. 'other' is always there."
        )
    return Rubric(_revision(path, "guidelines", header), text, tuple(reasons))


def _revision(path: str | Path | None, kind: str, header: dict[str, Any]) -> str:
    origin = f"hp-edit-trl:{kind}" if path is None else Path(path).name
    return f"{origin}:{header['revision']}"


def _read(path: str | Path | None, kind: str) -> tuple[Path, dict[str, Any], str]:
    """File, header and text of a rubric or of guidelines."""
    file = Path(__file__).with_name(f"{kind}.md") if path is None else Path(path)
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"The {kind} {file} is not a text file in UTF-8: {error}.") from error
    parts = re.match(r"---\n(.*?)\n---\n(.*)", content, re.DOTALL)
    try:
        header = yaml.safe_load(parts[1]) if parts else None
    except yaml.YAMLError as error:
        raise ValueError(f"The header of the {kind} {file} is not valid YAML: {error}") from error
    if parts is None or not isinstance(header, dict) or header.get("revision") is None or not parts[2].strip():
        raise ValueError(
            f"The {kind} {file} must begin with a header that has its revision: '---', 'revision: 1', '---', and then "
            "the text. Increase the revision when the text changes: answers given with different revisions are not "
            "mixed."
        )
    return file, header, parts[2].strip()
