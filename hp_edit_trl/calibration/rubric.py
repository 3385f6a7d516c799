"""The rubric: the meaning of the scores 0 to 5, as a Markdown file with a revision."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml


LABELS = ("", "", "", "", "", "")


@dataclass(frozen=True)
class Rubric:
    """
    Instructions for annotators.

    Args:
        revision (`str`):
            Origin and revision of the text, e.g. `"hp-edit-trl:rubric:1"`. It is saved with every rating.
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
    file = Path(__file__).with_name("rubric.md") if path is None else Path(path)
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"The rubric {file} is not a text file in UTF-8: {error}.") from error
    parts = re.match(r"---\n(.*?)\n---\n(.*)", content, re.DOTALL)
    try:
        header = yaml.safe_load(parts[1]) if parts else None
    except yaml.YAMLError as error:
        raise ValueError(f"The header of the rubric {file} is not valid YAML: {error}") from error
    if parts is None or not isinstance(header, dict) or header.get("revision") is None or not parts[2].strip():
        raise ValueError(
            f"The rubric {file} must begin with a header that has its revision: '---', 'revision: 1', '---', and then "
            "the text. Increase the revision when the text changes: ratings made with different revisions are not "
            "mixed."
        )
    labels = header.get("labels", LABELS)
    if not isinstance(labels, list | tuple) or len(labels) != 6:
        raise ValueError(f"The rubric {file} has labels {labels!r}: it needs six, for the scores 0 to 5, or none.")
    origin = "hp-edit-trl:rubric" if path is None else file.name
    return Rubric(f"{origin}:{header['revision']}", parts[2].strip(), tuple(map(str, labels)))
