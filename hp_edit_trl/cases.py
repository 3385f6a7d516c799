"""
What a case is: a row with `prompt`, `image` or `images`, and optionally `id`, `task`, `category`, `requirement`. A preference
pair is a case with two edits of it, `chosen` and `rejected`. An edit is a case with `edit`, one picture made from it, and
optionally `editor`, the name of the model that made it.
"""

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image, List, Value, load_dataset, load_from_disk
from PIL import Image as PILImage

from .utils.images import UnreadableImageError, read_image


def is_text(feature: Any) -> bool:
    """Whether a feature of a dataset holds strings."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def check_columns(dataset: Dataset, name: str) -> None:
    """
    Raises an error that says what is wrong with a dataset of cases.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            What the error calls it, e.g. `"train_dataset"`.

    Raises:
        `TypeError`: If it is not a map-style [`~datasets.Dataset`].
        `ValueError`: If it is empty, a column is missing or not of the right type, a prompt is missing, or an id is
            missing or not unique.
    """
    _check_cases(dataset, name)
    if "id" in dataset.features:
        _check_unique(dataset, name, ["id"])


def _check_cases(dataset: Dataset, name: str) -> None:
    if isinstance(dataset, dict):
        raise TypeError(f"{name} is a dictionary of splits {list(dataset)}: choose one, e.g. {name}['train'].")
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset, whose rows can be drawn in any order, but is a "
            f"{type(dataset).__name__}. A stream can be made one with `Dataset.from_list(list(stream.take(n)))`."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty.")
    features = dataset.features

    if "prompt" not in features:
        raise ValueError(f"{name} has no column 'prompt' with the instruction; its columns are {list(features)}.")
    if not is_text(features["prompt"]):
        raise ValueError(f"The column 'prompt' of {name} must hold strings, but is {features['prompt']}.")
    if "image" not in features and "images" not in features:
        raise ValueError(
            f"{name} has no column 'image' (one source image per case) or 'images' (a list of them); its columns are "
            f"{list(features)}."
        )
    for column in ("image", "images"):
        feature = features.get(column)
        item = feature.feature if column == "images" and isinstance(feature, List) else feature
        if feature is not None and not (isinstance(item, Image) or is_text(item) or isinstance(item, dict)):
            raise ValueError(f"The column {column!r} of {name} must hold images or their paths, but is {feature}.")
    if None in (prompts := dataset["prompt"][:]):
        raise ValueError(f"Row {prompts.index(None)} of {name} has no prompt.")


def _check_unique(dataset: Dataset, name: str, columns: list[str]) -> None:
    seen: dict[Any, int] = {}
    for row, key in enumerate(zip(*(dataset[column][:] for column in columns), strict=True)):
        if key[0] is None or key in seen:
            what = "has no id" if key[0] is None else f"has the {_named(columns, key)} of row {seen[key]}"
            remedy = (
                "be there and unique, or leave the column out"
                if len(columns) == 1
                else "be there, and unique for each editor"
            )
            raise ValueError(f"Row {row} of {name} {what}. Ids must {remedy}.")
        seen[key] = row


def _named(columns: list[str], key: tuple) -> str:
    return " and ".join(f"{column} {value!r}" for column, value in zip(columns, key, strict=True))


def edit_keys(dataset: Dataset) -> list[tuple[str, str | None]]:
    """The name of each edit of a dataset: the id of its case, as a string, and its editor."""
    editors = dataset["editor"][:] if "editor" in dataset.features else [None] * len(dataset)
    return list(zip(map(str, dataset["id"][:]), editors, strict=True))


def check_edits(dataset: Dataset, name: str) -> None:
    """
    Raises an error that says what is wrong with a dataset of edits. No image is read.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            What the error calls it, e.g. `"dataset"`.

    Raises:
        `TypeError`: If it is not a map-style [`~datasets.Dataset`].
        `ValueError`: If it is not a dataset of cases, see [`check_columns`], has no images `edit`, or no column `id` that
            is unique for each `editor`.
    """
    _check_cases(dataset, name)
    feature = dataset.features.get("edit")
    if feature is None or not (is_text(feature) or isinstance(feature, Image | dict)):
        raise ValueError(
            f"{name} must have a column 'edit' that holds images or their paths; its columns are {dict(dataset.features)}."
        )
    if "id" not in dataset.features:
        raise ValueError(
            f"{name} has no column 'id': ratings and scores find their edit by it; its columns are {list(dataset.features)}."
        )
    _check_unique(dataset, name, ["id"] + ["editor"] * ("editor" in dataset.features))


def load_split(path: str, split: str = "train", **options: Any) -> Any:
    """
    Loads one split of whatever holds a dataset.

    Args:
        path (`str`):
            A folder that [`~datasets.Dataset.save_to_disk`] wrote, any other local folder that [`~datasets.load_dataset`] reads, or
            a Hub repository.
        split (`str`, *optional*, defaults to `"train"`):
            Which split.
        **options:
            Of [`~datasets.load_dataset`].

    Returns:
        [`~datasets.Dataset`], or [`~datasets.IterableDataset`] with `streaming=True`.

    Raises:
        `FileNotFoundError`: If there is nothing at `path`.
        `ValueError`: If there is no such split.
    """
    if not any((Path(path) / name).exists() for name in ("dataset_dict.json", "state.json")):
        return load_dataset(path, split=split, **options)
    dataset = load_from_disk(path)
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(f"{path} has no split {split!r}; its splits are {list(dataset)}.")
        dataset = dataset[split]
    elif split not in ("train", str(dataset.split)):
        raise ValueError(f"{path} holds one dataset without splits, so there is no split {split!r}: leave it out.")
    return dataset.to_iterable_dataset() if options.get("streaming") else dataset


def load_edits(path: str, split: str = "train", revision: str | None = None) -> Dataset:
    """
    Loads a dataset of edits: a folder that [`~datasets.Dataset.save_to_disk`] wrote, any local folder that
    [`~datasets.load_dataset`] reads (parquet, image folder), or a Hub repository. Its images are left encoded.

    Args:
        path (`str`):
            The folder or the repository.
        split (`str`, *optional*, defaults to `"train"`):
            Which split.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.

    Returns:
        [`~datasets.Dataset`]: with the columns `id`, `image` or `images`, `edit`, `prompt` and what else there is.

    Raises:
        `FileNotFoundError`: If there is nothing at `path`.
        `ValueError`: If there is no such split, or it is not a dataset of edits, see [`check_edits`].
    """
    dataset = load_split(path, split, revision=revision)
    check_edits(dataset, path)
    return without_decoding(dataset)


def check_pairs(dataset: Dataset, name: str) -> None:
    """
    Raises an error that says what is wrong with a dataset of preference pairs. No image is read.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            What the error calls it, e.g. `"train_dataset"`.

    Raises:
        `TypeError`: If it is not a map-style [`~datasets.Dataset`].
        `ValueError`: If it is not a dataset of cases, see [`check_columns`], or has no images `chosen` and `rejected`.
    """
    check_columns(dataset, name)
    for column in ("chosen", "rejected"):
        feature = dataset.features.get(column)
        if feature is None:
            raise ValueError(
                f"{name} has no column {column!r}: a preference pair has two edits of one case, `chosen` and `rejected`; its "
                f"columns are {list(dataset.features)}."
            )
        if not (is_text(feature) or isinstance(feature, Image | dict)):
            raise ValueError(f"The column {column!r} of {name} must hold images or their paths, but is {feature}.")


def check_references(dataset: Dataset, name: str, limit: int | None) -> None:
    """
    Raises an error if a case has more reference images than a pipeline takes. No image is read.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            What the error calls it.
        limit (`int`, *optional*):
            The largest number of references, if there is one.

    Raises:
        `ValueError`: If a case has more.
    """
    if limit is None or "images" not in dataset.features:
        return
    counts = pc.list_value_length(dataset.data.column("images"))
    if dataset._indices is not None:  # rows were selected or shuffled
        counts = counts.take(dataset._indices.column(0))
    for row, count in enumerate(counts.to_pylist()):
        if count is not None and count > limit:
            case = f"Case {dataset['id'][row]!r}" if "id" in dataset.features else f"Row {row}"
            raise ValueError(
                f"{case} of {name} has {count} reference images, but the pipeline takes at most {limit}: leave it out, or "
                "train a pipeline that takes several."
            )


def without_decoding(dataset: Dataset) -> Dataset:
    """The dataset with its images left encoded, so that a broken one is met case by case by [`case_images`]."""
    for column in ("image", "edit", "chosen", "rejected"):
        if isinstance(dataset.features.get(column), Image):
            dataset = dataset.cast_column(column, Image(decode=False))
    images = dataset.features.get("images")
    if isinstance(images, List) and isinstance(images.feature, Image):
        dataset = dataset.cast_column("images", List(Image(decode=False)))
    return dataset


def case_images(row: dict[str, Any], case_id: Any) -> list[PILImage.Image]:
    """
    The source images of a case: decoded, turned upright, in RGB.

    Args:
        row (`dict`):
            The case. `images` counts before `image`. Each image is a PIL image, a path, or datasets' encoded form.
        case_id (`Any`):
            What an error calls the case.

    Raises:
        [`UnreadableImageError`]: If there is no image, or one cannot be decoded.
    """
    values = row.get("images") if row.get("images") is not None else [row.get("image")]
    if not values or any(value is None for value in values):
        raise UnreadableImageError(f"Case {case_id!r} has no image.")
    return [read_image(value, f"An image of case {case_id!r}") for value in values]


def pair_images(row: dict[str, Any], case_id: Any) -> tuple[PILImage.Image, PILImage.Image]:
    """
    The chosen and the rejected edit of a preference pair: decoded, turned upright, in RGB.

    Args:
        row (`dict`):
            The pair, with `chosen` and `rejected`.
        case_id (`Any`):
            What an error calls the pair.

    Raises:
        [`UnreadableImageError`]: If one is missing, cannot be decoded, or has another size than the other.
    """
    images = []
    for column in ("chosen", "rejected"):
        if row[column] is None:
            raise UnreadableImageError(f"Pair {case_id!r} has no {column} image.")
        images.append(read_image(row[column], f"The {column} image of pair {case_id!r}"))
    chosen, rejected = images
    if chosen.size != rejected.size:
        raise UnreadableImageError(
            f"The chosen image of pair {case_id!r} has {chosen.width} x {chosen.height} pixels and the rejected one "
            f"{rejected.width} x {rejected.height}: two edits of one case have one size. Crop them, or leave the pair out."
        )
    return chosen, rejected
