"""
Ratings of edits by people: a JSON Lines file for each annotator, one line for each rating, written the moment it is given.
"""

import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from datasets import Dataset

from .cases import edit_keys
from .utils.files import append_jsonl, read_jsonl


logger = logging.getLogger(__name__)

SCORES = range(6)


@dataclass(frozen=True)
class Rating:
    """
    What one person said of one edit.

    Args:
        annotator (`str`):
            Who rated.
        id (`str`):
            Id of the case.
        editor (`str` or `None`):
            Which model's edit of the case; `None` in a dataset without a column `editor`.
        score (`int` or `None`):
            A whole number from 0 to 5; `None` if the edit was skipped.
        rubric (`str`):
            Revision of the rubric that was shown.
        time (`str`):
            When, in ISO 8601 with its time zone.
        comment (`str`, *optional*, defaults to `""`):
            What else the annotator wrote.
    """

    annotator: str
    id: str
    editor: str | None
    score: int | None
    rubric: str
    time: str
    comment: str = ""


def append_rating(file: str | Path, rating: Rating) -> None:
    """Appends a rating to a file and waits until it is on disk. A line that a crash cut off before it is closed first."""
    append_jsonl(file, [asdict(rating)])


def read_ratings(
    path: str | Path, dataset: Dataset | None = None, rubric: str | None = None
) -> tuple[list[Rating], list[str]]:
    """
    Reads ratings. Of several by one annotator on one edit, the last line counts. Lines that cannot be used are left out and
    reported; the files stay as they are.

    Args:
        path (`str` or `Path`):
            A file, or a folder whose `ratings-*.jsonl` are read.
        dataset ([`~datasets.Dataset`], *optional*):
            The edits that were rated. With it, ratings of edits that it does not hold are left out and reported.
        rubric (`str`, *optional*):
            Take only ratings made with this revision of the rubric.

    Returns:
        `tuple[list[Rating], list[str]]`: the ratings in the order of their edits' first lines, skipped edits included (their
        score is `None`); and what was left out, each with file, line and reason.

    Raises:
        `FileNotFoundError`: If there are no files.
        `ValueError`: If the ratings were made with several revisions of the rubric, and `rubric` does not choose one.
    """
    path = Path(path)
    files = sorted(path.glob("ratings-*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise FileNotFoundError(f"No ratings at {path}: name a file, or a folder with files ratings-*.jsonl.")
    known = None if dataset is None else set(edit_keys(dataset))
    ratings: dict[tuple, Rating] = {}
    problems = []
    names = {field.name for field in fields(Rating)}
    for file in files:
        for number, values, line in read_jsonl(file):
            try:
                if values is None:
                    raise TypeError
                rating = Rating(**{name: values[name] for name in names & values.keys()})
                texts = (rating.annotator, rating.id, rating.rubric, rating.time, rating.comment, rating.editor or "")
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError
            except TypeError:  # a crash in the middle of a line
                problems.append(
                    f"{file.name}, line {number}: not a whole rating: {line[:60].decode(errors='replace')!r}"
                )
                continue
            key = rating.annotator, rating.id, rating.editor
            if rating.score is not None and (type(rating.score) is not int or rating.score not in SCORES):
                problems.append(
                    f"{file.name}, line {number}: the score {rating.score!r} is no whole number from 0 to 5"
                )
            elif known is not None and (rating.id, rating.editor) not in known:
                of = "" if rating.editor is None else f" by {rating.editor!r}"
                problems.append(f"{file.name}, line {number}: the dataset has no edit of case {rating.id!r}{of}")
            elif rubric is None or rating.rubric == rubric:
                ratings[key] = rating
            else:
                problems.append(f"{file.name}, line {number}: made with the rubric {rating.rubric!r}, not {rubric!r}")
    for problem in problems:
        logger.warning("Left out: %s.", problem)
    found = sorted({rating.rubric for rating in ratings.values()})
    if len(found) > 1:
        raise ValueError(
            f"The ratings at {path} were made with {len(found)} revisions of the rubric, {', '.join(found)}: what a score meant is "
            "not the same in all of them. Choose one with rubric=."
        )
    return list(ratings.values()), problems
