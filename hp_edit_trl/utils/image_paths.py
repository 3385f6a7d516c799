"""
Which files a dataset may name as its images. A dataset of others could otherwise name any picture of this machine, or
an address, and have it shown, scored or published.
"""

import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Image, IterableDataset, LargeList, List
from huggingface_hub.constants import HF_HUB_CACHE

from .files import is_below


# The columns that are read as images also if they hold text
IMAGE_COLUMNS = ("image", "images", "edit", "chosen", "rejected")


def check_image_paths(
    dataset: Any, name: str, folders: Sequence[str], image_root: str | None, columns: Sequence[str] = IMAGE_COLUMNS
) -> Any:
    """
    Checks that the images of a dataset that are named by their path are files of the dataset. No image is read.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset. A stream is checked row by row, when it is read.
        name (`str`):
            Its Hub repository, folder or file. It is its name in errors.
        folders (`Sequence[str]`):
            The local folders that hold the dataset.
        image_root (`str`, *optional*):
            A folder, or the beginning of an address, below which other images may lie.
        columns (`Sequence[str]`, *optional*, defaults to `IMAGE_COLUMNS`):
            Columns of text that hold paths of images, besides all columns of images.

    Returns:
        The dataset.

    Raises:
        `ValueError`: If an image is named that is neither in the dataset nor below `image_root`.
    """
    # Files that `datasets` downloaded or extracted for this dataset, and files of the repository in a stream
    cache = datasets.config.DOWNLOADED_DATASETS_PATH
    repository = os.path.join(HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
    allowed = [*folders, str(cache), repository, f"hf://datasets/{name}/", f"hf://datasets/{name}@"]
    if image_root is not None:
        allowed.append(f"{image_root.rstrip('/')}/" if urlparse(image_root).scheme else image_root)
    if isinstance(dataset, IterableDataset):
        return _checked_stream(dataset, name, allowed, columns)
    for column, feature in dataset.features.items():
        if _holds_images(feature, column, columns):
            row = 0
            for chunk in dataset.data.column(column).chunks:
                for place, path in _paths(chunk, feature):
                    _check(path, f"Row {row + place} of {name}", column, allowed)
                row += len(chunk)
    return dataset


def _holds_images(feature: Any, column: str, columns: Sequence[str]) -> bool:
    while isinstance(feature, List | LargeList):
        feature = feature.feature
    return isinstance(feature, Image) or column in columns


def _paths(array: pa.Array, feature: Any) -> Iterator[tuple[int, str]]:
    """The paths in an array of images that have no bytes, each with its row."""
    if isinstance(feature, List | LargeList):
        rows = pc.list_parent_indices(array)
        for place, path in _paths(pc.list_flatten(array), feature.feature):
            yield rows[place].as_py(), path
        return
    if pa.types.is_struct(array.type) and {"bytes", "path"} <= {field.name for field in array.type}:
        is_named = pc.is_null(pc.struct_field(array, "bytes"))  # the bytes themselves are not read
        array = pc.struct_field(array, "path")
        array = pc.if_else(is_named, array, None)
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        for place in pc.indices_nonzero(array.is_valid()).to_pylist():
            yield place, array[place].as_py()


def _check(path: str, row: str, column: str, allowed: Sequence[str]) -> None:
    *members, outer = path.split("::")  # zip://photo.png::archive.zip
    known = all(re.match(r"(zip|tar|gzip|bz2|xz|zstd|lz4)://", member) for member in members)
    if urlparse(outer).scheme:
        known &= any(outer.startswith(root) for root in allowed if urlparse(root).scheme) and ".." not in outer
    else:
        known &= any(is_below(outer, root) for root in allowed if not urlparse(root).scheme)
    if not known:
        raise ValueError(
            f"{row}: the column {column!r} names {path!r}, which is not a file of the dataset. A dataset could have "
            "private pictures shown or published in this way. If it may name this one, pass image_root= "
            "(--image_root) with its folder, or with the beginning of its address."
        )


def _checked_stream(
    stream: IterableDataset, name: str, allowed: Sequence[str], columns: Sequence[str]
) -> IterableDataset:
    features = stream.features or stream._resolve_features().features
    held = [column for column, feature in features.items() if _holds_images(feature, column, columns)]
    for column in held:
        stream = stream.cast_column(column, _undecoded(features[column]))
    stream = stream.map(partial(_check_row, name=name, allowed=allowed, columns=held), with_indices=True)
    return stream.cast(features)


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, List | LargeList):
        return type(feature)(_undecoded(feature.feature))
    return Image(decode=False) if isinstance(feature, Image) else feature


def _check_row(
    row: dict[str, Any], number: int, name: str, allowed: Sequence[str], columns: Sequence[str]
) -> dict[str, Any]:
    for column in columns:
        values = [row[column]]
        while any(isinstance(value, list) for value in values):
            values = [one for value in values for one in (value if isinstance(value, list) else [value])]
        for value in values:
            path = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else value
            if isinstance(path, str):
                _check(path, f"Row {number} of {name}", column, allowed)
    return row


def source_folders(files: str | Sequence[str]) -> list[str]:
    """The folders of files that are named by their paths or by patterns."""
    patterns = [files] if isinstance(files, str) else files
    return [str(Path(re.split(r"[*?\[{]", pattern)[0] + "x").absolute().parent) for pattern in patterns]
