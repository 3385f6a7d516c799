"""The schema of a dataset of cases, and loading with a check of every row."""

import hashlib
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError

from ..cases import check_cases, check_edits, is_text, load_split, prompt_problem
from ..utils.secrets import redacted


logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1

TEXT = Value("string")

# Columns of every case
CASE_FEATURES = Features(
    {
        "schema_version": Value("int32"),
        "id": TEXT,
        "image": ImageFeature(),
        "prompt": TEXT,
        "task": TEXT,
        "category": TEXT,
        "requirement": TEXT,
        "language": TEXT,
        "source": TEXT,
        "license": TEXT,
        "image_id": TEXT,
        "image_hash": TEXT,
        "width": Value("int32"),
        "height": Value("int32"),
        "writer": TEXT,
        "writer_prompt": TEXT,
    }
)
# Columns that some cases have besides: what an edit should look like, and a picture of the style that it should have
GUIDE_FEATURES = Features({"target": ImageFeature(), "style_image": ImageFeature()})
# Further columns of a case with an edit
EDIT_FEATURES = Features(
    {"edit": ImageFeature(), "editor": TEXT, "editor_revision": TEXT, "edit_seed": Value("int64")}
)
# Further columns of an edit with a score
SCORE_FEATURES = Features(
    {
        "score": Value("float32"),
        "answer": TEXT,
        "judge": TEXT,
        "scorer_prompt": TEXT,
        "scorer_prompt_sha": TEXT,
        "score_mode": TEXT,
    }
)
REQUIRED = ("id", "image", "prompt", "task")


def load_realpref(
    repo_or_folder: str,
    split: str = "train",
    revision: str | None = None,
    *,
    streaming: bool = False,
    token: str | None = None,
    image_root: str | None = None,
    on_bad_case: str | None = "error",
) -> Dataset | IterableDataset:
    """
    Loads a dataset of cases, checks every row against the schema, and casts its columns. Images are opened, but not
    decoded.

    The schema is `CASE_FEATURES`, plus `EDIT_FEATURES` if there is a column `edit`, `SCORE_FEATURES` if there is a
    column `score`, and those of `GUIDE_FEATURES` that there are. Other columns are kept. A dataset without
    `schema_version` was written before there was a schema: the missing columns are added, without values.

    Args:
        repo_or_folder (`str`):
            Hub repository, a folder that [`~datasets.load_dataset`] reads, or one that
            [`~datasets.Dataset.save_to_disk`] wrote.
        split (`str`, *optional*, defaults to `"train"`):
            The split to load.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        streaming (`bool`, *optional*, defaults to `False`):
            Return a stream, without downloading the files first. Each row is checked when it is read.
        token (`str`, *optional*):
            Token for a private repository. Defaults to the token of the logged-in user.
        image_root (`str`, *optional*):
            Where images may lie outside the dataset, see [`~hp_edit_trl.cases.load_split`].
        on_bad_case (`str`, *optional*, defaults to `"error"`):
            `"error"` refuses bad cases, see [`~hp_edit_trl.cases.check_cases`]; `None` does not look for them. Of a
            stream, bad prompts and missing images are always errors.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`].

    Raises:
        `FileNotFoundError`: If the folder, repository or revision does not exist, or is private.
        `ValueError`: If the split does not exist, or a row, a column or the version does not fit the schema, or a row
            names an image outside the dataset; it names row and column.
    """
    options = {"revision": revision, "streaming": streaming, "token": token, "image_root": image_root}
    dataset = _load(repo_or_folder, split, options)
    if isinstance(dataset, Dataset):
        dataset = _complete(dataset, repo_or_folder)
        check_realpref(dataset, repo_or_folder, on_bad_case)
        return _cast(dataset)
    return _checked_stream(dataset, repo_or_folder)


def _load(path: str, split: str, options: dict[str, Any]) -> Dataset | IterableDataset:
    try:
        dataset = load_split(path, split, **options)
    except (pa.ArrowInvalid, DatasetGenerationError) as error:
        raise ValueError(
            f"{redacted(path)} cannot be read: {error.__cause__ or error} A file is broken or cut off, or its columns "
            "differ from those of the others, or the disk is full."
        ) from error
    if dataset.features is None:  # a stream of files without a schema
        dataset = dataset._resolve_features()
    return dataset


def _missing_columns(dataset: Dataset | IterableDataset, name: str) -> list[str]:
    try:
        return _check_features(dataset.features, name)
    except ValueError:
        # If a newer version with other columns wrote it, the remedy is an upgrade.
        if "schema_version" in dataset.features:
            for row in dataset.select_columns(["schema_version"]).take(1):
                if isinstance(version := row["schema_version"], int) and version > SCHEMA_VERSION:
                    raise ValueError(f"Row 0 of {name}, column 'schema_version': {_newer(version)}") from None
        raise


def _newer(version: int) -> str:
    return f"{version} was written by a newer hp-edit-trl, but this one reads {SCHEMA_VERSION}: upgrade it."


def _expected(columns: list[str]) -> Features:
    """The schema of a dataset with these columns."""
    features = dict(CASE_FEATURES)
    features |= EDIT_FEATURES if "edit" in columns else {}
    features |= SCORE_FEATURES if "score" in columns else {}
    features |= {name: feature for name, feature in GUIDE_FEATURES.items() if name in columns}
    return Features(features)


def _check_features(features: Features, name: str) -> list[str]:
    """The missing columns. Raises `ValueError` if a required column is missing, or one cannot be cast."""
    if missing := [column for column in REQUIRED if column not in features]:
        raise ValueError(
            f"{name} has no column {', '.join(map(repr, missing))}; its columns are {list(features)}. A case needs "
            f"{list(REQUIRED)}: rename or add columns."
        )
    expected = _expected(list(features))
    for column, wanted in expected.items():
        found = features.get(column)
        if found is None or found == wanted:
            continue
        if isinstance(wanted, ImageFeature):
            is_struct = isinstance(found, dict) and {"bytes", "path"} <= found.keys()
            fits = isinstance(found, ImageFeature) or is_text(found) or is_struct
        elif wanted == TEXT:
            fits = is_text(found) or found == Value("null")
        else:
            kinds = ("int", "uint", "null") if wanted.dtype.startswith("int") else ("int", "uint", "float", "null")
            fits = isinstance(found, Value) and found.dtype.startswith(kinds)
        if not fits:
            what = "images or their paths" if isinstance(wanted, ImageFeature) else wanted.dtype
            raise ValueError(f"The column {column!r} of {name} must hold {what}, but is {found}.")
    return [column for column in expected if column not in features]


def _complete(dataset: Dataset, name: str) -> Dataset:
    missing = _missing_columns(dataset, name)
    if "schema_version" in missing:
        logger.warning(
            "%s has no column 'schema_version', so it was written before there was a schema. The columns %s are "
            "added, without values.",
            name,
            missing,
        )
    expected = _expected(dataset.column_names)
    for column in missing:
        value = SCHEMA_VERSION if column == "schema_version" else None
        array = pa.array([value] * len(dataset), expected[column]() if column != "image" else None)
        dataset = dataset.add_column(column, array, feature=expected[column])
    return dataset


def _cast(dataset: Dataset) -> Dataset:
    expected = _expected(dataset.column_names)
    wrong = [column for column, feature in expected.items() if dataset.features[column] != feature]
    light = [column for column in wrong if not isinstance(expected[column], ImageFeature)]
    for column in set(wrong) - set(light):
        dataset = dataset.cast_column(column, expected[column])
    if light:
        # A cast copies what it casts to the cache: these columns only, not the images.
        names = dataset.column_names
        cast = dataset.select_columns(light).cast(Features({column: expected[column] for column in light}))
        parts = [dataset.remove_columns(light), cast]
        dataset = concatenate_datasets(parts, split=dataset.split, axis=1).select_columns(names)
    return dataset


def check_realpref(dataset: Dataset, name: str, on_bad_case: str | None = "error") -> None:
    """
    Checks a dataset against the schema. Images are opened, but not decoded.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            Its name in the error.
        on_bad_case (`str`, *optional*, defaults to `"error"`):
            `"error"` refuses bad cases, see [`~hp_edit_trl.cases.check_cases`]; `None` does not look for them.

    Raises:
        `ValueError`: If a row, a column or the version does not fit; it names the first such row and column.
        [`~hp_edit_trl.cases.BadCaseError`]: If there are bad cases. It names the first of them and their number.
    """
    if missing := _missing_columns(dataset, name):
        raise ValueError(f"{name} has no columns {missing}: load it with load_realpref, which adds them.")
    expected = _expected(dataset.column_names)
    checked = ("schema_version", "id", "task", "editor", "edit_seed", "score", "width", "height")
    light = [column for column in checked if column in expected and column in dataset.features]
    seen: dict[tuple, int] = {}
    rows = dataset.select_columns(light).with_format("arrow")
    for start in range(0, len(rows), 1000):
        table = rows[start : start + 1000]
        columns = {column: table[column].to_pylist() for column in light}
        for i in range(len(table)):
            check_schema({column: values[i] for column, values in columns.items()}, start + i, name, seen)
    check = check_edits if "edit" in dataset.features else check_cases
    check(dataset, name, on_bad_case)


def check_row(row: dict[str, Any], number: int, name: str, seen: dict[tuple, int]) -> None:
    """
    Checks a row against the schema, and its prompt and images as far as they are not to be opened.

    Args:
        row, number, name, seen:
            As in [`check_schema`], but with `True` or `False` in place of its images, see [`with_presence`].

    Raises:
        `ValueError`: If the row does not fit.
    """
    check_schema(row if "edit" in row else {**row, "editor": None}, number, name, seen)
    if problem := prompt_problem(row["prompt"]):
        raise ValueError(f"Row {number} of {name}, column 'prompt': case {row['id']!r} {problem}")
    for column in ("image", "edit"):
        if column in row and not row[column]:
            raise ValueError(f"Row {number} of {name}, column {column!r}: has no image.")


def check_schema(row: dict[str, Any], number: int, name: str, seen: dict[tuple, int]) -> None:
    """
    Checks a row against the schema, apart from its prompt and its images.

    Args:
        row (`dict`):
            The row. Images are not needed.
        number (`int`):
            Its number in the error.
        name (`str`):
            The name of the dataset in the error.
        seen (`dict[tuple, int]`):
            The ids and editors of earlier rows. Those of this row are added.

    Raises:
        `ValueError`: If the row does not fit.
    """

    def fail(column: str, problem: str) -> None:
        raise ValueError(f"Row {number} of {name}, column {column!r}: {problem}")

    version = row["schema_version"]
    if version != SCHEMA_VERSION:
        if isinstance(version, int) and version > SCHEMA_VERSION:
            fail("schema_version", _newer(version))
        fail("schema_version", f"{version!r} is not a version; this hp-edit-trl writes {SCHEMA_VERSION}.")
    for column in ("id", "task"):
        if not (row[column] or "").strip():
            fail(column, "is empty.")
    for column in ("width", "height"):
        if row.get(column) is not None and not 1 <= row[column] < 2**31:
            fail(column, f"{row[column]} is not a number of pixels.")
    seed = row.get("edit_seed")
    if seed is not None and not -(2**63) <= seed < 2**63:
        fail("edit_seed", f"{seed} does not fit 64 bits with a sign.")
    score = row.get("score")
    if score is not None and not 0 <= score <= 5:
        fail("score", f"{score:g} is not between 0 and 5.")
    key = (row["id"], row.get("editor"))
    if key in seen:
        fail("id", f"row {seen[key]} has {row['id']!r}, too{', and the same editor' if key[1] else ''}.")
    seen[key] = number


def _checked_stream(dataset: IterableDataset, name: str) -> IterableDataset:
    missing = _missing_columns(dataset, name)
    if "schema_version" in missing:
        logger.warning("%s has no column 'schema_version': the columns %s are added, without values.", name, missing)
    expected = _expected(list(dataset.features))
    features = Features({**dataset.features, **expected})
    undecoded = dataset
    for column in ("image", "edit"):
        if isinstance(dataset.features.get(column), ImageFeature):
            undecoded = undecoded.cast_column(column, ImageFeature(decode=False))

    # A partial, which can be pickled, because a stream may be sent to the workers of a DataLoader
    return IterableDataset.from_generator(partial(_checked_rows, undecoded, missing, name), features=features)


def _checked_rows(dataset: IterableDataset, missing: list[str], name: str) -> Iterator[dict[str, Any]]:
    seen: dict[tuple, int] = {}
    for number, row in enumerate(dataset):
        row = {**dict.fromkeys(missing), **row}
        if "schema_version" in missing:
            row["schema_version"] = SCHEMA_VERSION
        check_row(with_presence(row), number, name, seen)
        yield row


def with_presence(row: dict[str, Any]) -> dict[str, Any]:
    """The row with `True` or `False` in place of its images: whether there is one."""
    return {**row, **{column: _is_there(row[column]) for column in ("image", "edit") if column in row}}


def _is_there(value: Any) -> bool:
    return any(value.values()) if isinstance(value, dict) else bool(value)


def content_description(folder: Path) -> str:
    """
    A description of a card's configuration that changes with the content of the Parquet files in a folder.
    `load_dataset` finds a local folder in its cache by its name and its card, so without this it would return the rows
    of another dataset in a folder of the same name.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.parquet")):
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"content {digest.hexdigest()[:16]}"
