"""Rating edits in Label Studio: its tasks and labeling interface, and the ratings in its export."""

import hashlib
import json
import logging
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..cases import EditKey, case_images, check_edits, edit_keys, without_decoding
from ..ratings import SCORES, Rating, ratings_by_edit
from ..utils.images import UnreadableImageError, read_image
from ..utils.secrets import redacted
from .display import data_url, shown_jpeg, side_by_side
from .rubric import Rubric
from .session import annotator_name


logger = logging.getLogger(__name__)


def _edit_hash(key: EditKey) -> str:
    """Identifies an edit in Label Studio without revealing its editor."""
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
    Makes Label Studio tasks of edits, for the interface of [`label_studio_config`]. Neither the tasks nor their order
    reveal an editor.

    Args:
        dataset ([`~datasets.Dataset`]):
            The edits.
        ratings (`Iterable[Rating]`, *optional*):
            Existing ratings, which become annotations.
        rubric (`str`):
            Revision of the rubric that annotators will see.
        image_folder (`str` or `Path`, *optional*):
            Folder that the images are written to. By default, they are embedded in the tasks, which suits some hundred
            edits.
        image_url (`str`, *optional*):
            Address of that folder for Label Studio, e.g. `"/data/local-files/?d=edits/images"` or
            `"https://example.org/images"`.

    Returns:
        `list[dict]`: the tasks, to be written as JSON. Several reference images are joined side by side. Edits with an
        image that cannot be decoded are left out and reported.

    Raises:
        `ValueError`: If the dataset does not contain a rated edit, only one of `image_folder` and `image_url` is
            given, or the address holds a password or token.
    """
    check_edits(dataset, "dataset", on_bad_case=None)
    if (image_folder is None) != (image_url is None):
        raise ValueError("Pass both image_folder and image_url: where images are written, and where they are found.")
    if image_url is not None and redacted(image_url) != image_url:
        raise ValueError(
            f"image_url={redacted(image_url)!r} holds a password or token, which would be in every task. Use an "
            "address without one, e.g. Label Studio's own storage (/data/local-files/?d=...)."
        )
    dataset = without_decoding(dataset)
    tasks = []
    for row, (key, of_edit) in zip(dataset, ratings_by_edit(ratings, dataset).items(), strict=True):
        name = _edit_hash(key)
        try:
            images = {
                "reference": side_by_side(case_images(row, key[0])),
                "edit": read_image(row["edit"], f"The edit of case {key[0]!r} by {key[1]!r}"),
            }
        except UnreadableImageError as error:
            logger.warning("Left out: %s", error)
            continue
        data = {"edit_hash": name, "rubric": rubric}
        for column, image in images.items():
            if image_folder is None:
                data[column] = data_url(image)
            else:
                Path(image_folder).mkdir(parents=True, exist_ok=True)
                (Path(image_folder) / f"{name}-{column}.jpg").write_bytes(shown_jpeg(image))
                data[column] = f"{image_url}/{name}-{column}.jpg"
        data |= {column: row[column] or "" for column in ("prompt", "task", "requirement") if column in row}
        tasks.append({"data": data, "annotations": [_annotation(rating) for rating in of_edit]})
    return sorted(tasks, key=lambda task: task["data"]["edit_hash"])


def _annotation(rating: Rating) -> dict[str, Any]:
    # Label Studio gives imported annotations a new user and a new time, but keeps their `meta`.
    meta: dict[str, Any] = {"annotator": rating.annotator, "rubric": rating.rubric, "time": rating.time}
    if rating.aspects:
        meta["aspects"] = rating.aspects
    base = {"to_name": "edit", "meta": meta}
    result: list[dict[str, Any]] = []
    if rating.score is not None:
        result.append({**base, "from_name": "score", "type": "choices", "value": {"choices": [str(rating.score)]}})
    if rating.comment or rating.score is None:
        result.append({**base, "from_name": "comment", "type": "textarea", "value": {"text": [rating.comment]}})
    return {"result": result, "was_cancelled": rating.score is None, "created_at": rating.time}


def label_studio_config(dataset: Dataset, rubric: Rubric) -> str:
    """
    Returns the labeling interface for [`to_label_studio`] as XML: both images, the prompt, the scores 0 to 5 with
    their keys, and a comment. The scores are choices, because Label Studio's stars have no 0.

    Args:
        dataset ([`~datasets.Dataset`]):
            The edits.
        rubric ([`Rubric`]):
            The meaning of the scores; its labels are shown.
    """
    view = ET.Element("View")
    for column in ("task", "prompt", "requirement"):
        if column in dataset.features:
            ET.SubElement(view, "Text", name=column, value=f"${column}")
    pictures = ET.SubElement(view, "View", style="display: flex; gap: 12px")
    for column, heading in (("reference", "Source"), ("edit", "Edit")):  # words of the rubric
        side = ET.SubElement(pictures, "View", style="flex: 1")
        ET.SubElement(side, "Header", value=heading)
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
    Reads the ratings in an export of Label Studio in the format JSON (not JSON-MIN or CSV). Invalid annotations are
    left out and reported.

    The score of an annotation is the answer of its control `score`, or of the only control of type `choices` or
    `rating`; its text is the comment; a cancelled annotation is a skipped edit. Drafts and predictions are ignored.

    Args:
        file (`str` or `Path`):
            The export.
        dataset ([`~datasets.Dataset`]):
            The edits. The edit of a task is found by the `edit_hash` that [`to_label_studio`] wrote into its data, or
            else by `id` and `editor` in its data or `meta`.
        rubric (`str`, *optional*):
            Revision of the rubric, for tasks whose data does not name it. Defaults to `"label-studio"`.

    Returns:
        `tuple[list[Rating], list[str]]`: the ratings, sorted by time; and a list of what was left out, each with task
        and reason.

    Raises:
        `FileNotFoundError`: If the file does not exist.
        `ValueError`: If it is not a JSON export of Label Studio.
    """
    check_edits(dataset, "dataset", on_bad_case=None)
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
            f"{file} is not a list of tasks with `data` and `annotations`: export from Label Studio in the format "
            "JSON, not JSON-MIN."
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
                revision = task["data"].get("rubric") or rubric or "label-studio"
                ratings.append(_read_annotation(annotation, key, revision))
            except ValueError as error:
                number = annotation.get("id", "without id") if isinstance(annotation, dict) else annotation
                problems.append(f"{name}, annotation {number}: {error}")
    return sorted(ratings, key=Rating.timestamp), problems


def _find_edit(task: dict[str, Any], by_hash: dict[str, EditKey], known: set[EditKey]) -> EditKey:
    meta = task.get("meta") if isinstance(task.get("meta"), dict) else {}
    values = {**(meta or {}), **task["data"]}
    if "edit_hash" in values:
        if str(values["edit_hash"]) not in by_hash:
            raise ValueError(f"the dataset has no edit {values['edit_hash']!r}: it was exported from another dataset")
        return by_hash[str(values["edit_hash"])]
    if values.get("id") is None:
        raise ValueError("it has neither `edit_hash` nor `id` in its data")
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
        raise ValueError("its `completed_by` names no user")
    annotator = meta.get("annotator") or (f"label-studio-{user}" if isinstance(user, int) else str(user))
    time = meta.get("time") or annotation.get("updated_at") or annotation.get("created_at")
    comment = "\n".join(line for result in results if result.get("type") == "textarea" for line in _read_text(result))
    score = None if annotation.get("was_cancelled") else _read_score(results)
    revision = str(meta.get("rubric") or rubric)
    aspects = meta.get("aspects", {})
    if not isinstance(aspects, dict) or any(type(one) is not int or one not in SCORES for one in aspects.values()):
        raise ValueError(f"the aspects in its `meta`, {aspects!r}, are not scores from 0 to 5 by name")
    rating = Rating(annotator_name(str(annotator)), *key, score, revision, str(time), comment, aspects)
    try:
        rating.timestamp()
    except ValueError as error:
        raise ValueError(f"its `created_at` {time!r} is not a time in ISO 8601") from error
    return rating


def _read_text(result: dict[str, Any]) -> list[str]:
    value = result.get("value")
    text = value.get("text") if isinstance(value, dict) else value
    lines = [text] if isinstance(text, str) else text
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"the comment {text!r} is not text")
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
    if str(score) not in map(str, SCORES):
        raise ValueError(f"the score {given!r} is not an integer from 0 to 5")
    return int(score)  # type: ignore[arg-type]
