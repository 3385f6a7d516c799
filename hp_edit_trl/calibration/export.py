"""Ratings as a dataset that can be shared, and to and from Label Studio."""

import hashlib
import json
import logging
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from ..cases import case_images, check_edits, edit_keys, is_text, without_decoding
from ..ratings import SCORES, Rating, append_rating, read_ratings
from ..utils.images import UnreadableImageError, read_image
from .display import data_url, shown_jpeg, side_by_side
from .rubric import Rubric
from .session import EditKey, annotator_name, ratings_file


logger = logging.getLogger(__name__)

RATING = {"annotator": "string", "score": "int64", "comment": "string", "rubric": "string", "time": "string"}
COLUMNS = {
    "human_score": Value("float64"),
    "num_ratings": Value("int64"),
    "ratings": List({name: Value(kind) for name, kind in RATING.items()}),
}


def ratings_dataset(ratings: Iterable[Rating], dataset: Dataset) -> Dataset:
    """
    Puts ratings beside the edits that they are of.

    Args:
        ratings (`Iterable[Rating]`):
            The ratings, see [`read_ratings`].
        dataset ([`~datasets.Dataset`]):
            The edits.

    Returns:
        [`~datasets.Dataset`]: the edits, and for each of them `human_score`, the mean over those who scored it (`None` if nobody
        did), `num_ratings`, their number, and `ratings`, a list of `{annotator, score, comment, rubric, time}` in which the
        score of someone who skipped is `None`. Images that were paths are images, so that `push_to_hub` and `save_to_disk` take
        them along.

    Raises:
        `ValueError`: If a rating is of an edit that the dataset does not hold, or the dataset has one of these columns already.
    """
    check_edits(dataset, "dataset")
    if taken := sorted(COLUMNS.keys() & set(dataset.column_names)):
        raise ValueError(f"dataset has columns {taken} already, which the ratings would have: rename or remove them.")
    by_edit = _by_edit(ratings, dataset)
    values: dict[str, list] = {name: [] for name in COLUMNS}
    for of_edit in by_edit.values():
        scores = [rating.score for rating in of_edit if rating.score is not None]
        values["human_score"].append(sum(scores) / len(scores) if scores else None)
        values["num_ratings"].append(len(scores))
        values["ratings"].append([{name: getattr(rating, name) for name in RATING} for rating in of_edit])
    for name, feature in COLUMNS.items():
        dataset = dataset.add_column(name, values[name], feature=feature)
    features = dict(dataset.features)
    for name in ("image", "edit"):
        if name in features and (is_text(features[name]) or isinstance(features[name], Image)):
            features[name] = Image()
    if isinstance(features.get("images"), List):
        features["images"] = List(Image())
    return dataset.cast(Features(features))


def _by_edit(ratings: Iterable[Rating], dataset: Dataset) -> dict[EditKey, list[Rating]]:
    by_edit: dict[EditKey, list[Rating]] = {key: [] for key in edit_keys(dataset)}
    for rating in ratings:
        key = rating.id, rating.editor
        if key not in by_edit:
            raise ValueError(
                f"{rating.annotator} rated an edit of case {rating.id!r} by {rating.editor!r}, which the dataset does not hold: "
                "name the dataset that was rated, or read the ratings with read_ratings(..., dataset), which leaves others out."
            )
        by_edit[key].append(rating)
    return by_edit


def _edit_hash(key: EditKey) -> str:
    """Names an edit in Label Studio without telling its editor."""
    return hashlib.sha256(repr(("label studio", *key)).encode()).hexdigest()[:24]


def to_label_studio(
    dataset: Dataset,
    ratings: Iterable[Rating] = (),
    *,
    rubric: str,
    image_folder: str | Path | None = None,
    image_url: str | None = None,
) -> list[dict[str, Any]]:
    """
    Makes Label Studio tasks of edits, for the labels of [`label_studio_config`]. They are in an order that has nothing to do with
    editors, whose names are nowhere in them.

    Args:
        dataset ([`~datasets.Dataset`]):
            The edits.
        ratings (`Iterable[Rating]`, *optional*):
            Ratings that are there already. They become annotations.
        rubric (`str`):
            Revision of the rubric that annotators will see.
        image_folder (`str` or `Path`, *optional*):
            Folder to write the images to. By default they are within the tasks, which is fine for some hundred.
        image_url (`str`, *optional*):
            Where Label Studio will find that folder, e.g. `"/data/local-files/?d=edits/images"` or `"https://example.org/images"`.

    Returns:
        `list[dict]`: the tasks, to be written as JSON. Several references are in one picture, side by side. Edits with an image
        that cannot be decoded are left out and reported.

    Raises:
        `ValueError`: If a rating is of an edit that the dataset does not hold, or only one of `image_folder` and `image_url` is
            there.
    """
    check_edits(dataset, "dataset")
    if (image_folder is None) != (image_url is None):
        raise ValueError(
            "image_folder and image_url belong together: where the images are written, and where they are found."
        )
    dataset = without_decoding(dataset)
    by_edit = _by_edit(ratings, dataset)
    tasks = []
    for row, (key, of_edit) in zip(dataset, by_edit.items(), strict=True):
        name = _edit_hash(key)
        try:
            pictures = {
                "source": side_by_side(case_images(row, key[0])),
                "edit": read_image(row["edit"], f"The edit of case {key[0]!r} by {key[1]!r}"),
            }
        except UnreadableImageError as error:
            logger.warning("Left out: %s", error)
            continue
        data = {"edit": name, "rubric": rubric}
        for column, picture in pictures.items():
            if image_folder is None:
                data[column] = data_url(picture)
            else:
                Path(image_folder).mkdir(parents=True, exist_ok=True)
                (Path(image_folder) / f"{name}-{column}.jpg").write_bytes(shown_jpeg(picture))
                data[column] = f"{image_url}/{name}-{column}.jpg"
        data |= {column: row[column] or "" for column in ("prompt", "task", "requirement") if column in row}
        tasks.append({"data": data, "annotations": [_annotation(rating) for rating in of_edit]})
    return sorted(tasks, key=lambda task: task["data"]["edit"])


def _annotation(rating: Rating) -> dict[str, Any]:
    # Label Studio gives annotations that it imports a new user and a new time. What stands in `meta` stays.
    base = {"to_name": "edit", "meta": {"annotator": rating.annotator, "rubric": rating.rubric, "time": rating.time}}
    result: list[dict[str, Any]] = []
    if rating.score is not None:
        result.append({**base, "from_name": "score", "type": "choices", "value": {"choices": [str(rating.score)]}})
    if rating.comment or rating.score is None:
        result.append({**base, "from_name": "comment", "type": "textarea", "value": {"text": [rating.comment]}})
    return {"result": result, "was_cancelled": rating.score is None, "created_at": rating.time}


def label_studio_config(dataset: Dataset, rubric: Rubric) -> str:
    """
    The labelling interface for [`to_label_studio`], as XML: both pictures, the instruction, the scores 0 to 5 with their keys, a
    comment. Label Studio's own stars have no 0, so the scores are choices.

    Args:
        dataset ([`~datasets.Dataset`]):
            The edits.
        rubric ([`Rubric`]):
            What the scores mean; its labels are shown.
    """
    view = ET.Element("View")
    for column in ("task", "prompt", "requirement"):
        if column in dataset.features:
            ET.SubElement(view, "Text", name=column, value=f"${column}")
    pictures = ET.SubElement(view, "View", style="display: flex; gap: 12px")
    for column in ("source", "edit"):
        side = ET.SubElement(pictures, "View", style="flex: 1")
        ET.SubElement(side, "Header", value="Source" if column == "source" else "Edit")
        ET.SubElement(side, "Image", name=column, value=f"${column}", zoom="true", zoomControl="true")
    if any(rubric.labels):
        scale = "; ".join(f"{score}: {label}" for score, label in enumerate(rubric.labels))
        ET.SubElement(view, "Header", value=scale, size="5")
    scores = ET.SubElement(
        view, "Choices", name="score", toName="edit", choice="single-radio", showInline="true", required="true"
    )
    for score, label in enumerate(rubric.labels):
        ET.SubElement(scores, "Choice", value=str(score), hotkey=str(score), hint=label)
    ET.SubElement(view, "TextArea", name="comment", toName="edit", placeholder="Comment (optional)", rows="2")
    ET.indent(view)
    return ET.tostring(view, encoding="unicode") + "\n"


def from_label_studio(file: str | Path, dataset: Dataset, rubric: str | None = None) -> tuple[list[Rating], list[str]]:
    """
    Reads the ratings in an export of Label Studio in its format JSON (not JSON-MIN or CSV). What cannot be used is left out and
    reported.

    An annotation's score is the answer of its control `score`, or of the only control of type `choices` or `rating`; the text in
    it is the comment; a task that was cancelled was skipped. Drafts and predictions are no ratings.

    Args:
        file (`str` or `Path`):
            The export.
        dataset ([`~datasets.Dataset`]):
            The edits. Tasks are found by the `edit` in their data that [`to_label_studio`] gave them, or else by `id` and `editor`
            in their data or `meta`.
        rubric (`str`, *optional*):
            Revision of the rubric, for tasks whose data does not tell it; `"label-studio"` if nobody does.

    Returns:
        `tuple[list[Rating], list[str]]`: the ratings, sorted by time; and what was left out, with task and reason.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If it is no JSON export of Label Studio.
    """
    check_edits(dataset, "dataset")
    keys = edit_keys(dataset)
    known = set(keys)
    by_hash = {_edit_hash(key): key for key in keys}
    try:
        tasks = json.loads(Path(file).read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): export from Label Studio in the format JSON.") from error
    if not isinstance(tasks, list) or not all(
        isinstance(task, dict) and isinstance(task.get("data"), dict) and isinstance(task.get("annotations"), list)
        for task in tasks
    ):
        raise ValueError(
            f"{file} is no list of tasks with `data` and `annotations`: export from Label Studio in the format JSON, not JSON-MIN."
        )
    ratings, problems = [], []
    for number, task in enumerate(tasks, start=1):
        name = f"task {task.get('id', number)}"
        try:
            key = _find_edit(task, by_hash, known)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        for annotation in task["annotations"]:
            try:
                ratings.append(
                    _read_annotation(annotation, key, task["data"].get("rubric") or rubric or "label-studio")
                )
            except ValueError as error:
                number = annotation.get("id", "without id") if isinstance(annotation, dict) else annotation
                problems.append(f"{name}, annotation {number}: {error}")
    return sorted(ratings, key=lambda rating: _time(rating.time)), problems


def _find_edit(task: dict[str, Any], by_hash: dict[str, EditKey], known: set[EditKey]) -> EditKey:
    meta = task.get("meta") if isinstance(task.get("meta"), dict) else {}
    values = {**(meta or {}), **task["data"]}
    if "edit" in values:
        if str(values["edit"]) not in by_hash:
            raise ValueError(f"the dataset has no edit {values['edit']!r}: it was exported from another one")
        return by_hash[str(values["edit"])]
    if values.get("id") is None:
        raise ValueError("it has neither `edit` nor `id` in its data")
    editor = values.get("editor")
    key = str(values["id"]), None if editor is None else str(editor)
    if key not in known:
        raise ValueError(f"the dataset has no edit of case {key[0]!r} by {key[1]!r}")
    return key


def _read_annotation(annotation: Any, key: EditKey, rubric: str) -> Rating:
    if not isinstance(annotation, dict) or not isinstance(annotation.get("result"), list):
        raise ValueError("it has no `result`: export in the format JSON")
    results = [result for result in annotation["result"] if isinstance(result, dict)]
    meta: dict[str, Any] = {}
    for result in results:
        if isinstance(result.get("meta"), dict):
            meta |= result["meta"]
    user = annotation.get("completed_by")
    if isinstance(user, dict):
        user = user.get("email") or user.get("id")
    if user is None and "annotator" not in meta:
        raise ValueError("nobody stands in `completed_by`")
    annotator = meta.get("annotator") or (f"label-studio-{user}" if isinstance(user, int) else str(user))
    time = meta.get("time") or annotation.get("updated_at") or annotation.get("created_at")
    try:
        _time(str(time))
    except ValueError as error:
        raise ValueError(f"its `created_at` {time!r} is no time in ISO 8601") from error
    comment = "\n".join(line for result in results if result.get("type") == "textarea" for line in _read_text(result))
    score = None if annotation.get("was_cancelled") else _read_score(results)
    return Rating(annotator_name(str(annotator)), *key, score, str(meta.get("rubric") or rubric), str(time), comment)


def _read_text(result: dict[str, Any]) -> list[str]:
    value = result.get("value")
    text = value.get("text") if isinstance(value, dict) else value
    lines = [text] if isinstance(text, str) else text
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"the comment {text!r} is no text")
    return lines


def _read_score(results: list[dict[str, Any]]) -> int:
    answers = [result for result in results if result.get("type") in ("choices", "rating")]
    if len(answers) > 1:
        answers = [result for result in answers if result.get("from_name") == "score"] or answers
    if len(answers) != 1:
        raise ValueError(f"it has {len(answers)} answers of type choices or rating, not one; name the control 'score'")
    value = answers[0].get("value", {})
    given = value.get("choices", value.get("rating")) if isinstance(value, dict) else value
    score = given[0] if isinstance(given, list) and len(given) == 1 else given
    text = str(score)
    if text not in map(str, SCORES):
        raise ValueError(f"the score {given!r} is no whole number from 0 to 5")
    return int(text)


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def add_ratings(ratings: Iterable[Rating], ratings_dir: str | Path) -> int:
    """
    Adds ratings to the files of a folder, one for each annotator. What is there already is not added again, and never takes the
    place of a later rating.

    Args:
        ratings (`Iterable[Rating]`):
            The ratings, sorted by time.
        ratings_dir (`str` or `Path`):
            The folder; made if it is missing.

    Returns:
        `int`: how many were added.

    Raises:
        `ValueError`: If that would mix revisions of the rubric. Nothing is added then.
    """
    ratings = list(ratings)
    folder = Path(ratings_dir)
    folder.mkdir(parents=True, exist_ok=True)
    there = read_ratings(folder)[0] if any(folder.glob("ratings-*.jsonl")) else []
    rubrics = sorted({rating.rubric for rating in [*there, *ratings]})
    if len(rubrics) > 1:
        raise ValueError(
            f"Together with what is in {folder} these ratings were made with the rubrics {', '.join(rubrics)}: what a score means "
            "is not the same. Name another folder for each."
        )
    last = {(rating.annotator, rating.id, rating.editor): rating for rating in there}
    added = 0
    for rating in ratings:
        key = rating.annotator, rating.id, rating.editor
        if key in last:
            same = (rating.score, rating.comment) == (last[key].score, last[key].comment)
            if same or _time(rating.time) <= _time(last[key].time):
                continue
        append_rating(ratings_file(folder, rating.annotator), rating)
        last[key] = rating
        added += 1
    return added
