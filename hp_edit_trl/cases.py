"""
What a case is: a row with `prompt`, `image` or `images`, and optionally `id`, `task`, `category`, `requirement`. A preference
pair is a case with two edits of it, `chosen` and `rejected`.
"""

from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageOps


class UnreadableImageError(ValueError):
    """An image of a case cannot be decoded."""


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
    if "id" in features:
        seen: dict[Any, int] = {}
        for row, case_id in enumerate(dataset["id"][:]):
            if case_id is None or case_id in seen:
                what = "has no id" if case_id is None else f"has the id {case_id!r} of row {seen[case_id]}"
                raise ValueError(f"Row {row} of {name} {what}. Ids must be there and unique, or leave the column out.")
            seen[case_id] = row


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
    for column in ("image", "chosen", "rejected"):
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


def read_image(value: Any, name: str) -> PILImage.Image:
    """
    An image, decoded, turned upright, in RGB.

    Args:
        value (`PIL.Image.Image`, `str` or `dict`):
            A PIL image, a path, or datasets' encoded form.
        name (`str`):
            What an error calls it.

    Raises:
        [`UnreadableImageError`]: If it cannot be decoded.
    """
    try:
        if isinstance(value, str):
            value = {"path": value, "bytes": None}
        image = value if isinstance(value, PILImage.Image) else Image().decode_example(value)
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
        raise UnreadableImageError(f"{name} cannot be decoded: {type(error).__name__}: {error}") from error


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
