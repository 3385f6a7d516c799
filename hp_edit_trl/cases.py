"""
Cases, edits and preference pairs: their columns, checks, and images.

A case is a row to be edited: `prompt`, the reference image `image` or a list of them in `images`, and optionally `id`,
`task`, `requirement`, `category` and `source`. An edit is a case with an edited image of it, `edit`, and optionally
`editor`, the name of what made it. A preference pair is a case with two edits of it, `chosen` and `rejected`.
"""

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image, List, Value, load_dataset, load_from_disk
from PIL import Image as PILImage

from .utils.images import UnreadableImageError, read_image
from .utils.secrets import redact_error, remember_secrets


EditKey = tuple[str, str | None]  # id of the case, and editor


def is_text(feature: Any) -> bool:
    """Returns whether a feature of a dataset holds strings."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def check_cases(dataset: Dataset, name: str) -> None:
    """
    Checks that a dataset is a dataset of cases. No image is read.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            Its name in errors, e.g. `"train_dataset"`.

    Raises:
        `TypeError`: If it is not a map-style [`~datasets.Dataset`]. `ValueError`: If it is empty, a column is missing
        or has the wrong type, a prompt is missing, or an id is missing
            or not unique.
    """
    _check_columns(dataset, name)
    if "id" in dataset.features:
        _check_unique(dataset, name, ["id"])


def _check_columns(dataset: Dataset, name: str) -> None:
    if isinstance(dataset, dict):
        raise TypeError(f"{name} is a dictionary of splits {list(dataset)}: choose one, e.g. {name}['train'].")
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset, whose rows can be read in any order, but is a "
            f"{type(dataset).__name__}. Convert a stream with `Dataset.from_list(list(stream.take(n)))`."
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
            f"{name} has no column 'image' (one reference image per case) or 'images' (a list of them); its "
            f"columns are {list(features)}."
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
            same = " and ".join(f"{column} {value!r}" for column, value in zip(columns, key, strict=True))
            what = "has no id" if key[0] is None else f"has the {same} of row {seen[key]}"
            remedy = "and unique, or leave the column out" if len(columns) == 1 else "and unique for each editor"
            raise ValueError(f"Row {row} of {name} {what}. Ids must be there {remedy}.")
        seen[key] = row


def edit_keys(dataset: Dataset) -> list[EditKey]:
    """Returns what identifies each edit of a dataset: the id of its case, as a string, and its editor."""
    editors = dataset["editor"][:] if "editor" in dataset.features else [None] * len(dataset)
    return list(zip(map(str, dataset["id"][:]), editors, strict=True))


def check_edits(dataset: Dataset, name: str) -> None:
    """
    Checks that a dataset is a dataset of edits. No image is read.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            Its name in errors, e.g. `"dataset"`.

    Raises:
        `TypeError`: If it is not a map-style [`~datasets.Dataset`].
        `ValueError`: If it is not a dataset of cases, see [`check_cases`], has no images in `edit`, or its `id` is
            missing or not unique for each `editor`.
    """
    _check_columns(dataset, name)
    feature = dataset.features.get("edit")
    if feature is None or not (is_text(feature) or isinstance(feature, Image | dict)):
        raise ValueError(
            f"{name} must have a column 'edit' with images or their paths; its columns are {dict(dataset.features)}."
        )
    if "id" not in dataset.features:
        raise ValueError(
            f"{name} has no column 'id', by which ratings and scores find their edit; its columns are "
            f"{list(dataset.features)}."
        )
    _check_unique(dataset, name, ["id"] + ["editor"] * ("editor" in dataset.features))


def load_split(path: str, split: str = "train", **options: Any) -> Any:
    """
    Loads one split of a dataset from a folder or the Hub.

    Args:
        path (`str`):
            A folder written by [`~datasets.Dataset.save_to_disk`], any other local folder that
            [`~datasets.load_dataset`] reads, or a Hub repository.
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split.
        **options:
            Options of [`~datasets.load_dataset`].

    Returns:
        [`~datasets.Dataset`], or [`~datasets.IterableDataset`] with `streaming=True`.

    Raises:
        `FileNotFoundError`: If there is no dataset at `path`.
        `ValueError`: If it has no such split.
    """
    if not any((Path(path) / name).exists() for name in ("dataset_dict.json", "state.json")):
        remember_secrets([path, options])  # an address may hold a token
        try:
            return load_dataset(path, split=split, **options)
        except Exception as error:  # datasets raises errors of many types
            redact_error(error)
            raise
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
    Loads a dataset of edits. Its images stay encoded.

    Args:
        path (`str`):
            A folder or a Hub repository, see [`load_split`].
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.

    Returns:
        [`~datasets.Dataset`]: with `id`, `image` or `images`, `edit`, `prompt` and all other columns.

    Raises:
        `FileNotFoundError`: If there is no dataset at `path`.
        `ValueError`: If it has no such split, or is not a dataset of edits, see [`check_edits`].
    """
    dataset = load_split(path, split, revision=revision)
    check_edits(dataset, path)
    return without_decoding(dataset)


def check_pairs(dataset: Dataset, name: str) -> None:
    """
    Checks that a dataset is a dataset of preference pairs. No image is read.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            Its name in errors, e.g. `"train_dataset"`.

    Raises:
        `TypeError`: If it is not a map-style [`~datasets.Dataset`]. `ValueError`: If it is not a dataset of cases, see
        [`check_cases`], or has no images in `chosen` and `rejected`.
    """
    check_cases(dataset, name)
    for column in ("chosen", "rejected"):
        feature = dataset.features.get(column)
        if feature is None:
            raise ValueError(
                f"{name} has no column {column!r}: a preference pair has two edits of one case, `chosen` and "
                f"`rejected`; its columns are {list(dataset.features)}."
            )
        if not (is_text(feature) or isinstance(feature, Image | dict)):
            raise ValueError(f"The column {column!r} of {name} must hold images or their paths, but is {feature}.")


def check_references(dataset: Dataset, name: str, limit: int | None) -> None:
    """
    Checks that no case has more reference images than a pipeline takes. No image is read.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            Its name in errors.
        limit (`int` or `None`):
            Largest number of reference images; `None` for no limit.

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
                f"{case} of {name} has {count} reference images, but the pipeline takes at most {limit}: leave "
                "it out, or train a pipeline that takes several."
            )


def without_decoding(dataset: Dataset) -> Dataset:
    """
    Returns the dataset with its images encoded, so that a broken image is an error of its case ([`case_images`]) and
    not of the dataset.
    """
    for column in ("image", "edit", "chosen", "rejected"):
        if isinstance(dataset.features.get(column), Image):
            dataset = dataset.cast_column(column, Image(decode=False))
    images = dataset.features.get("images")
    if isinstance(images, List) and isinstance(images.feature, Image):
        dataset = dataset.cast_column("images", List(Image(decode=False)))
    return dataset


def case_images(row: dict[str, Any], case_id: Any) -> list[PILImage.Image]:
    """
    Reads the reference images of a case, see [`~hp_edit_trl.utils.images.read_image`].

    Args:
        row (`dict`):
            The case. If it has `images`, `image` is ignored.
        case_id (`Any`):
            Name of the case in errors.

    Raises:
        [`UnreadableImageError`]: If there is no image, or one cannot be decoded.
    """
    values = row.get("images") if row.get("images") is not None else [row.get("image")]
    if not values or any(value is None for value in values):
        raise UnreadableImageError(f"Case {case_id!r} has no image.")
    return [read_image(value, f"An image of case {case_id!r}") for value in values]


def pair_images(row: dict[str, Any], case_id: Any) -> tuple[PILImage.Image, PILImage.Image]:
    """
    Reads the chosen and the rejected edit of a preference pair, see [`~hp_edit_trl.utils.images.read_image`].

    Args:
        row (`dict`):
            The pair, with `chosen` and `rejected`.
        case_id (`Any`):
            Name of the pair in errors.

    Raises:
        [`UnreadableImageError`]: If an image is missing or cannot be decoded, or their sizes differ.
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
            f"{rejected.width} x {rejected.height}, but they must have the same size. Crop them, or leave "
            "the pair out."
        )
    return chosen, rejected
