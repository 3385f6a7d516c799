"""The rubric: what the scores from 0 to 5 mean, in a Markdown file with a revision."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml


LABELS = ("", "", "", "", "", "")


@dataclass(frozen=True)
class Rubric:
    """
    What annotators are told.

    Args:
        revision (`str`):
            Where the text came from and which revision it is, e.g. `"hp-edit-trl:rubric:1"`. It is written beside every
            rating.
        text (`str`):
            The rubric, in Markdown.
        labels (`tuple[str, ...]`, *optional*):
            A word or two for each of the scores 0 to 5; none by default.
    """

    revision: str
    text: str
    labels: tuple[str, ...] = LABELS


def load_rubric(path: str | Path | None = None) -> Rubric:
    """
    Loads a rubric: a Markdown file with a YAML header that names its `revision`, and optionally six `labels` for the scores 0 to
    5.

    Args:
        path (`str` or `Path`, *optional*):
            The file. By default the rubric of this package, which is the scale of its scorer prompts.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If the header is missing or not valid, or there is no text.
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
            f"The rubric {file} must begin with a header that names its revision, followed by the text: '---', 'revision: 1', "
            "'---'. Count the revision up when the text changes: ratings made with different ones are not mixed."
        )
    labels = header.get("labels", LABELS)
    if not isinstance(labels, list | tuple) or len(labels) != 6:
        raise ValueError(f"The rubric {file} has labels {labels!r}: name six of them, for the scores 0 to 5, or none.")
    origin = "hp-edit-trl:rubric" if path is None else file.name
    return Rubric(f"{origin}:{header['revision']}", parts[2].strip(), tuple(map(str, labels)))
