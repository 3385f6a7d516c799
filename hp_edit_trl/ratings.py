"""
Ratings of edits by people: a JSON Lines file per annotator with a line per rating, appended when it is given; and a
dataset with its ratings.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from datasets import Dataset, Features, Image, List, Value

from .cases import EditKey, check_edits, edit_keys, is_text
from .utils.files import append_jsonl, read_jsonl


logger = logging.getLogger(__name__)

SCORES = range(6)
RATING = {"annotator": "string", "score": "int64", "comment": "string", "rubric": "string", "time": "string"}
COLUMNS = {
    "human_score": Value("float64"),
    "num_ratings": Value("int64"),
    "ratings": List(
        {
            **{name: Value(kind) for name, kind in RATING.items()},
            "aspects": List({"name": Value("string"), "score": Value("int64")}),
        }
    ),
}


@dataclass(frozen=True)
class Rating:
    """
    The rating of one edit by one person.

    Args:
        annotator (`str`):
            Name of the person.
        id (`str`):
            Id of the case.
        editor (`str` or `None`):
            Editor that made the edit; `None` in a dataset without a column `editor`.
        score (`int` or `None`):
            An integer from 0 to 5; `None` if the edit was skipped.
        rubric (`str`):
            Revision of the rubric that was shown.
        time (`str`):
            Time of the rating, in ISO 8601.
        comment (`str`, *optional*, defaults to `""`):
            Comment of the annotator.
        aspects (`dict[str, int]`, *optional*, defaults to `{}`):
            Further scores from 0 to 5 by name, e.g. of the image quality.
    """

    annotator: str
    id: str
    editor: str | None
    score: int | None
    rubric: str
    time: str
    comment: str = ""
    aspects: dict[str, int] = field(default_factory=dict)

    @property
    def value(self) -> int | None:
        """The score."""
        return self.score

    @property
    def edit(self) -> EditKey:
        """What identifies the edit: id of the case and editor."""
        return self.id, self.editor

    def timestamp(self) -> datetime:
        """Parses `time`, in UTC if it has no time zone. Raises `ValueError` if it is not in ISO 8601."""
        time = datetime.fromisoformat(self.time)
        return time if time.tzinfo else time.replace(tzinfo=UTC)


class Answer(Protocol):
    """What a person said about an edit or a case: a [`Rating`] or a [`~hp_edit_trl.reviews.Review`]."""

    @property
    def annotator(self) -> str:
        """Name of the person."""

    @property
    def comment(self) -> str:
        """Comment of the person."""

    @property
    def value(self) -> Any:
        """The answer itself, e.g. a score; `None` if it was skipped."""

    @property
    def edit(self) -> EditKey:
        """What it is about."""


OneAnswer = TypeVar("OneAnswer", bound=Answer)


def answers_file(output_dir: str | Path, annotator: str, kind: str) -> Path:
    """
    Returns the file of an annotator's `"ratings"` or `"reviews"`. Two names never share one, even on file systems that
    ignore case.
    """
    part = annotator
    if not re.fullmatch(r"[a-z0-9_-]{1,60}", annotator):
        readable = re.sub(r"[^a-z0-9_-]+", "-", annotator.lower())[:40].strip("-")
        part = f"{readable}.{hashlib.sha256(annotator.encode()).hexdigest()[:12]}"
    return Path(output_dir) / f"{kind}-{part}.jsonl"


def ratings_file(output_dir: str | Path, annotator: str) -> Path:
    """Returns the file of an annotator's ratings, see [`answers_file`]."""
    return answers_file(output_dir, annotator, "ratings")


def append_answer(file: str | Path, answer: Any) -> None:
    """Appends a [`Rating`] or a [`~hp_edit_trl.reviews.Review`] to a file and returns once it is on disk."""
    append_jsonl(file, [asdict(answer)])


def read_answers(
    path: str | Path,
    kind: str,
    make: Callable[[dict[str, Any]], OneAnswer],
    problem: Callable[[OneAnswer], str | None],
) -> tuple[list[OneAnswer], list[str]]:
    """
    Reads the answers of annotators. If an annotator answered several times, the last line counts. Invalid lines are
    left out and reported; the files are not changed.

    Args:
        path (`str` or `Path`):
            A file, or a folder with files `<kind>-*.jsonl`.
        kind (`str`):
            `"ratings"` or `"reviews"`.
        make (`Callable`):
            Makes an answer of a line's values. Raises `TypeError` if the line is not complete.
        problem (`Callable`):
            Returns why an answer is left out; `None` if it counts.

    Returns:
        `tuple[list, list[str]]`: the answers in the order of the first lines about each edit or case; and a list of
        what was left out, each with file, line and reason.

    Raises:
        `FileNotFoundError`: If there are no files.
    """
    path = Path(path)
    files = sorted(path.glob(f"{kind}-*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise FileNotFoundError(f"No {kind} at {path}: pass a file, or a folder with files {kind}-*.jsonl.")
    answers: dict[Hashable, OneAnswer] = {}
    problems = []
    for file in files:
        for number, values, line in read_jsonl(file):
            where = f"{file.name}, line {number}"
            try:
                if not isinstance(values, dict):
                    raise TypeError
                answer = make(values)
            except TypeError:  # e.g. a crash in the middle of a line
                what = kind.removesuffix("s")
                problems.append(f"{where}: not a complete {what}: {line[:60].decode(errors='replace')!r}")
                continue
            if (reason := problem(answer)) is not None:
                problems.append(f"{where}: {reason}")
            else:
                answers[answer.annotator, *answer.edit] = answer
    for one in problems:
        logger.warning("Left out: %s.", one)
    return list(answers.values()), problems


def read_ratings(
    path: str | Path, dataset: Dataset | None = None, rubric: str | None = None
) -> tuple[list[Rating], list[str]]:
    """
    Reads ratings. If an annotator rated an edit several times, the last line counts. Invalid lines are left out and
    reported; the files are not changed.

    Args:
        path (`str` or `Path`):
            A file, or a folder with files `ratings-*.jsonl`.
        dataset ([`~datasets.Dataset`], *optional*):
            The rated edits. With it, ratings of other edits are left out and reported.
        rubric (`str`, *optional*):
            Read only ratings made with this revision of the rubric.

    Returns:
        `tuple[list[Rating], list[str]]`: the ratings in the order of their edits' first lines, including skipped edits
        (with the score `None`); and a list of what was left out, each with file, line and reason.

    Raises:
        `FileNotFoundError`: If there are no files.
        `ValueError`: If the ratings were made with several revisions of the rubric, and `rubric` is not given.
    """
    known = None if dataset is None else set(edit_keys(dataset))
    names = {one.name for one in fields(Rating)}

    def make(values: dict[str, Any]) -> Rating:
        rating = Rating(**{name: values[name] for name in names & values.keys()})
        texts = (rating.annotator, rating.id, rating.rubric, rating.time, rating.comment, rating.editor or "")
        if not all(isinstance(text, str) for text in texts) or not isinstance(rating.aspects, dict):
            raise TypeError
        return rating

    def problem(rating: Rating) -> str | None:
        if rating.score is not None and (type(rating.score) is not int or rating.score not in SCORES):
            return f"the score {rating.score!r} is not an integer from 0 to 5"
        for name, score in rating.aspects.items():
            if type(score) is not int or score not in SCORES:
                return f"the score {score!r} of the aspect {name!r} is not an integer from 0 to 5"
        if known is not None and rating.edit not in known:
            of = "" if rating.editor is None else f" by {rating.editor!r}"
            return f"the dataset has no edit of case {rating.id!r}{of}"
        if rubric is not None and rating.rubric != rubric:
            return f"made with the rubric {rating.rubric!r}, not {rubric!r}"
        return None

    ratings, problems = read_answers(path, "ratings", make, problem)
    found = sorted({rating.rubric for rating in ratings})
    if len(found) > 1:
        raise ValueError(
            f"The ratings at {path} were made with {len(found)} revisions of the rubric, {', '.join(found)}, in which "
            "a score may mean different things. Choose one with rubric=."
        )
    return ratings, problems


def add_ratings(ratings: Iterable[Rating], output_dir: str | Path) -> int:
    """
    Adds ratings to the files of a folder. Ratings that are already there are not added again, and a later rating of
    the same edit is never replaced by an earlier one.

    Args:
        ratings (`Iterable[Rating]`):
            The ratings, sorted by time.
        output_dir (`str` or `Path`):
            The folder. It is created if it does not exist.

    Returns:
        `int`: the number of ratings that were added.

    Raises:
        `ValueError`: If the folder would hold ratings made with several revisions of the rubric. Then nothing is
            added.
    """
    ratings = list(ratings)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    there = read_ratings(folder)[0] if any(folder.glob("ratings-*.jsonl")) else []
    rubrics = sorted({rating.rubric for rating in [*there, *ratings]})
    if len(rubrics) > 1:
        raise ValueError(
            f"{folder} would hold ratings made with the rubrics {', '.join(rubrics)}, in which a score may mean "
            "different things: choose another output_dir for each."
        )
    last = {(rating.annotator, *rating.edit): rating for rating in there}
    added = 0
    for rating in ratings:
        earlier = last.get((rating.annotator, *rating.edit))
        if earlier is not None:
            same = all(getattr(rating, name) == getattr(earlier, name) for name in ("score", "comment", "aspects"))
            if same or rating.timestamp() <= earlier.timestamp():
                continue
        append_answer(ratings_file(folder, rating.annotator), rating)
        last[rating.annotator, *rating.edit] = rating
        added += 1
    return added


def ratings_by_edit(ratings: Iterable[Rating], dataset: Dataset) -> dict[EditKey, list[Rating]]:
    """
    Groups ratings by edit, in the order of the dataset. Edits without ratings have an empty list.

    Raises:
        `ValueError`: If the dataset does not contain a rated edit.
    """
    by_edit: dict[EditKey, list[Rating]] = {key: [] for key in edit_keys(dataset)}
    for rating in ratings:
        if rating.edit not in by_edit:
            raise ValueError(
                f"{rating.annotator} rated an edit of case {rating.id!r} by {rating.editor!r}, which the dataset does "
                "not contain: pass the dataset that was rated, or leave other ratings out with read_ratings(..., "
                "dataset)."
            )
        by_edit[rating.edit].append(rating)
    return by_edit


def ratings_dataset(ratings: Iterable[Rating], dataset: Dataset) -> Dataset:
    """
    Adds ratings to a dataset of edits as columns.

    Args:
        ratings (`Iterable[Rating]`):
            The ratings, see [`read_ratings`].
        dataset ([`~datasets.Dataset`]):
            The edits.

    Returns:
        [`~datasets.Dataset`]: the edits with the columns `human_score` (the mean over the annotators who scored the
        edit, `None` without any), `num_ratings` (their number) and `ratings` (a list of `{annotator, score, comment,
        rubric, time, aspects}`; the score is `None` if the annotator skipped the edit). Paths of images become images,
        so that `push_to_hub` and `save_to_disk` include them.

    Raises:
        `ValueError`: If the dataset does not contain a rated edit, or already has one of these columns.
    """
    check_edits(dataset, "dataset", on_bad_case=None)
    if taken := sorted(COLUMNS.keys() & set(dataset.column_names)):
        raise ValueError(f"dataset has columns {taken} already, which ratings are written to: rename or remove them.")
    values: dict[str, list] = {name: [] for name in COLUMNS}
    for of_edit in ratings_by_edit(ratings, dataset).values():
        scores = [rating.score for rating in of_edit if rating.score is not None]
        values["human_score"].append(sum(scores) / len(scores) if scores else None)
        values["num_ratings"].append(len(scores))
        values["ratings"].append(
            [
                {name: asdict(one)[name] for name in RATING}
                | {"aspects": [{"name": name, "score": score} for name, score in one.aspects.items()]}
                for one in of_edit
            ]
        )
    for name, feature in COLUMNS.items():
        dataset = dataset.add_column(name, values[name], feature=feature)
    features = dict(dataset.features)
    for name in ("image", "edit"):
        if name in features and (is_text(features[name]) or isinstance(features[name], Image)):
            features[name] = Image()
    if isinstance(features.get("images"), List):
        features["images"] = List(Image())
    return dataset.cast(Features(features))
