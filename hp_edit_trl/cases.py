"""
Cases, edits and preference pairs: their columns, checks, and images.

A case is a row to be edited: `prompt`, the reference image `image` or a list of them in `images`, and optionally `id`,
`task`, `requirement`, `category` and `source`. An edit is a case with an edited image of it, `edit`, and optionally
`editor`, the name of what made it. A preference pair is a case with two edits of it, `chosen` and `rejected`.

A bad case is a row that cannot be edited or judged. [`check_cases`], [`check_edits`] and [`check_pairs`] find what can
be known without decoding images, before any model is loaded, and either refuse the dataset or name the rows to be left
out.
"""

import contextlib
import copy
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, Image, LargeList, List, Value, load_dataset, load_from_disk
from PIL import Image as PILImage
from tqdm.auto import tqdm

from .utils.hub import check_reachable, hub_options
from .utils.image_folders import is_saved_dataset, metadata_fault
from .utils.image_paths import check_image_paths
from .utils.images import FORMATS, UnreadableImageError, open_image, read_image, to_rgb, with_path
from .utils.secrets import redact_error, redacted, remember_secrets
from .utils.texts import is_blank


logger = logging.getLogger(__name__)

EditKey = tuple[str, str | None]  # id of the case, and editor

# The longest side of an image over its shortest. The image processors of Qwen2-VL to Qwen3-VL, which are in judges and
# in the text encoder of Qwen-Image-Edit, refuse more than 200. Sides are rounded to whole patches before, which makes
# an image up to 1.5 times as narrow: one of 137:1 may be refused. The policies of FLUX pipelines have no such limit.
MAX_ASPECT_RATIO = 100
# No text encoder of a policy reads more than 1,024 tokens, which are about 4,000 letters. What the tokens of a shorter
# instruction come to is for the policy to say, see `check_prompt_lengths`.
MAX_PROMPT_CHARACTERS = 4000
# Bad cases that a message describes; the others are counted.
NAMED_CASES = 5
# Beginnings of the types of columns whose values name nothing
NO_NAMES = ("bool", "binary", "large_binary")


class BadCaseError(ValueError):
    """
    A case cannot be used.

    Args:
        message (`str`):
            What is wrong, and what can be done.
        case_id (`str`, *optional*):
            The id of the case, if it is one.
    """

    def __init__(self, message: str, case_id: str | None = None):
        super().__init__(message)
        self.case_id = case_id


class Encoded(NamedTuple):
    """
    An encoded image in a dataset.

    Args:
        content (`pyarrow.Buffer` or `None`):
            Its bytes; `None` if they are in the file.
        path (`str` or `None`):
            The file, or where the bytes came from.
    """

    content: pa.Buffer | None
    path: Any


def is_text(feature: Any) -> bool:
    """Returns whether a feature of a dataset holds strings."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def check_cases(
    dataset: Dataset, name: str, on_bad_case: str | None = "error", decode: bool = False
) -> dict[int, str]:
    """
    Checks that a dataset is a dataset of cases, and each of its rows. Images are opened, but not decoded unless asked.

    A bad case has no instruction that can be read (empty, blank, without a visible character, longer than
    `MAX_PROMPT_CHARACTERS`), no image, or an image that cannot be opened or is narrower than 1:`MAX_ASPECT_RATIO`.
    Images in columns of any name are checked, also in lists. Addresses on the web are not.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            Its name in errors, e.g. `"train_dataset"`.
        on_bad_case (`str`, *optional*, defaults to `"error"`):
            `"error"` refuses a dataset with bad cases, `"skip"` warns of them. `None` checks the columns only.
        decode (`bool`, *optional*, defaults to `False`):
            Whether to decode the images, too. Only this finds files that are cut off or damaged behind their header.

    Returns:
        `dict[int, str]`: the numbers of the rows that are bad cases, and what is wrong with each. [`leave_out`] leaves
        them out.

    Raises:
        `TypeError`: If it is not a map-style [`~datasets.Dataset`].
        `ValueError`: If it is empty, a column is missing or has the wrong type, or an id is missing or not unique as
            text.
        [`BadCaseError`]: If there are bad cases and they are not to be skipped, or there are no others.
    """
    _check_columns(dataset, name)
    if "id" in dataset.features:
        _check_unique(dataset, name, ["id"])
    return _check_rows(dataset, name, on_bad_case, decode)


def _check_rows(
    dataset: Dataset, name: str, on_bad_case: str | None, decode: bool, edits: Sequence[str] = ()
) -> dict[int, str]:
    if on_bad_case is None:
        return {}
    bad = find_bad_cases(dataset, name, edits, decode)
    report_bad_cases(bad, len(dataset), name, on_bad_case)
    return bad


def find_bad_cases(dataset: Dataset, name: str, edits: Sequence[str] = (), decode: bool = False) -> dict[int, str]:
    """
    Finds the rows of a dataset of cases that cannot be used, see [`check_cases`].

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            Its name, for the progress bar that appears after a few seconds.
        edits (`Sequence[str]`, *optional*):
            Columns that must have an image besides the references: `edit`, or `chosen` and `rejected`.
        decode (`bool`, *optional*, defaults to `False`):
            As in [`check_cases`].

    Returns:
        `dict[int, str]`: the number of each bad row, and what is wrong, in sentences that name the case.
    """
    features = dataset.features
    rows = _positions(dataset)
    ids = dataset["id"][:] if "id" in features else range(len(dataset))
    prompts = dataset["prompt"][:]
    known = [column for column in ("image", "images", *edits) if column in features]
    others = [column for column, feature in features.items() if column not in known and _holds_images(feature)]
    columns = {column: dataset.data.column(column) for column in (*known, *others)}
    bad: dict[int, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about sizes that are refused here
        for row, case_id in enumerate(tqdm(ids, f"Checking {name}", unit="case", delay=5)):
            problems = [prompt_problem(prompts[row])]
            cells = {column: values[rows[row]] for column, values in columns.items()}
            several = "images" in cells and cells["images"].is_valid
            sizes: dict[str, tuple[int, int]] = {}
            for column, cell in cells.items():
                pictures = list(_pictures(cell))
                if column == "images" and several and not pictures:
                    problems.append("has an empty list of images: add one, or leave the case out.")
                needed = column in edits or (column == "images" and several) or (column == "image" and not several)
                if needed and any(picture is None for picture in pictures):
                    what = {"image": "image", "images": "image in one place of its list"}
                    missing = what.get(column, f"{column} image" if column != "edit" else "edit")
                    problems.append(f"has no {missing}: add it, or leave the case out.")
                for picture in pictures:
                    if picture is not None:
                        found = _picture_problem(picture, column in known, decode)
                        if isinstance(found, str):
                            problems.append(f"has {_a_picture(column)} that {found}")
                        elif found is not None:
                            sizes[column] = found
            if "image" not in cells and not several:
                problems.append("has no image: add it, or leave the case out.")
            # An image may lie on its side until it is turned upright.
            shapes = [sorted(sizes[column]) for column in edits if column in sizes]
            if len(shapes) == 2 and shapes[0] != shapes[1]:
                (width, height), other = sizes["chosen"], sizes["rejected"]
                problems.append(
                    f"has a chosen image of {width} x {height} pixels and a rejected one of {other[0]} x {other[1]}, "
                    "but they must have the same size: crop them, or leave the pair out."
                )
            if texts := [problem for problem in problems if problem is not None]:
                bad[row] = " ".join(f"{_case(dataset, row, case_id)} {text}" for text in texts)
    return bad


def report_bad_cases(bad: dict[int, str], count: int, name: str, on_bad_case: str) -> None:
    """
    Raises one error, or gives one warning, about all bad cases of a dataset.

    Args:
        bad (`dict[int, str]`):
            The numbers of their rows, and what is wrong.
        count (`int`):
            Number of cases of the dataset.
        name (`str`):
            Its name.
        on_bad_case (`str`):
            `"error"` or `"skip"`.

    Raises:
        [`BadCaseError`]: If `on_bad_case` is `"error"`, or all cases are bad.
    """
    if not bad:
        return
    listed = " ".join(list(bad.values())[:NAMED_CASES])
    listed += f" And {len(bad) - NAMED_CASES} more." if len(bad) > NAMED_CASES else ""
    if len(bad) == count:
        raise BadCaseError(f"No case of {name} can be used. {listed}")
    told = f"{len(bad)} of {count} cases of {name} cannot be used. {listed}"
    if on_bad_case == "error":
        raise BadCaseError(f"{told} on_bad_case='skip' leaves them out, where it is an option.")
    logger.warning("%s They are left out.", told)


def leave_out(dataset: Dataset, bad: dict[int, str]) -> Dataset:
    """
    Returns a dataset without its bad cases.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        bad (`dict[int, str]`):
            What [`check_cases`] returned. Without a column `id` the others keep their row numbers as ids.
    """
    if not bad:
        return dataset
    if "id" not in dataset.features:
        dataset = dataset.add_column("id", list(range(len(dataset))))
    return dataset.select([row for row in range(len(dataset)) if row not in bad])


def prompt_problem(prompt: Any) -> str | None:
    """
    What is wrong with an instruction, as the end of a sentence that begins with the case; `None` if nothing is.

    Args:
        prompt (`Any`):
            The instruction.
    """
    remedy = "write an instruction, or leave the case out."
    if prompt is None:
        return f"has no prompt: {remedy}"
    if not isinstance(prompt, str):
        return f"has a prompt that is no text, but a {type(prompt).__name__}: {remedy}"
    if not prompt.strip():
        return f"has a{'n empty' if not prompt else ' blank'} prompt: {remedy}"
    # Controls, separators, and characters that only format others, have none, or are private
    if is_blank(prompt):
        return f"has a prompt without a visible character, {prompt[:20]!r}: {remedy}"
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        return (
            f"has a prompt of {len(prompt)} characters, but no editor reads more than {MAX_PROMPT_CHARACTERS}: "
            "shorten it, or leave the case out."
        )
    return None


def _positions(dataset: Dataset) -> Sequence[int]:
    """Where each row lies in the dataset's table, which differs if rows were selected or shuffled."""
    return range(len(dataset)) if dataset._indices is None else dataset._indices.column(0).to_pylist()


def _case(dataset: Dataset, row: int, case_id: Any) -> str:
    return f"Case {case_id!r}" if "id" in dataset.features else f"Row {row}"


def _a_picture(column: str) -> str:
    names = {"image": "an image", "images": "an image", "edit": "an edit"}
    return names.get(column, f"a {column} image" if column in ("chosen", "rejected") else f"an image in {column!r}")


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_holds_images, feature.values()))
    return _holds_images(feature.feature) if isinstance(feature, List | LargeList) else isinstance(feature, Image)


def _pictures(cell: Any) -> Iterator[Any]:
    """The encoded images in a cell of a table, as [`Encoded`], `None` where there is none. Nothing is copied."""
    if isinstance(cell, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        for item in cell if cell.is_valid else ():
            yield from _pictures(item)
    elif not cell.is_valid:
        yield None
    elif not isinstance(cell, pa.StructScalar):
        yield Encoded(None, cell.as_py())
    elif {"bytes", "path"} <= set(cell):
        content, path = (cell["bytes"].as_buffer() if cell["bytes"].is_valid else None), cell["path"].as_py()
        yield None if content is None and path is None else Encoded(content, path)
    else:
        for name in cell:
            if pa.types.is_nested(cell[name].type):
                yield from _pictures(cell[name])


def _header(picture: Encoded) -> tuple[int, int, str]:
    """Width, height and mode of an encoded image."""
    if picture.content is None:
        with PILImage.open(picture.path, formats=FORMATS) as image:
            return *image.size, image.mode
    # Nothing is copied. Pillow may seek behind the end, though, which only a copy can take.
    with contextlib.suppress(Exception), PILImage.open(pa.BufferReader(picture.content), formats=FORMATS) as image:
        return *image.size, image.mode
    with PILImage.open(io.BytesIO(picture.content.to_pybytes()), formats=FORMATS) as image:
        return *image.size, image.mode


def _decode(picture: Encoded, is_read: bool) -> None:
    """Decodes an image as it is when it is used. Raises errors of many kinds if it is broken."""
    content = Path(picture.path).read_bytes() if picture.content is None else picture.content.to_pybytes()
    image = open_image(content)
    if is_read:
        to_rgb(image)
    else:
        image.load()


def _picture_problem(picture: Encoded, is_read: bool, decode: bool) -> str | tuple[int, int] | None:
    """
    What the header of an encoded image tells against it, with `decode` also its pixels, as the end of a sentence; or
    else its width and height. `None` for an address on the web, which is not asked. `is_read` says whether it is read
    by [`~hp_edit_trl.utils.images.read_image`], and not passed on in its own mode.
    """
    path = picture.path
    if picture.content is None and ("://" in path or "::" in path):
        return None
    where = f" {path!r}" if path else ""
    try:
        width, height, mode = _header(picture)
    except FileNotFoundError:
        return f"does not exist: {path!r}. Put the file there, or leave the case out."
    except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
        reason = "it is no image of a known format" if isinstance(error, PILImage.UnidentifiedImageError) else error
        return f"cannot be decoded{where}: {type(error).__name__}: {reason}. Repair it, or leave the case out."
    if mode == "F" and is_read:
        return "has floating-point values of unknown range. Convert it to 8 bits, or leave the case out."
    if not width or not height:
        return f"is empty: {width} x {height} pixels. Repair it, or leave the case out."
    if PILImage.MAX_IMAGE_PIXELS is not None and width * height > PILImage.MAX_IMAGE_PIXELS:
        return (
            f"is too large: {width} x {height} pixels, more than the {PILImage.MAX_IMAGE_PIXELS} that are decoded. "
            "Scale it down, or leave the case out."
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        return (
            f"is too narrow: {width} x {height} pixels, but editors and judges take sides of up to "
            f"{MAX_ASPECT_RATIO}:1. Crop it, or leave the case out."
        )
    try:
        if decode:
            _decode(picture, is_read)
    except Exception as error:
        return f"cannot be decoded{where}: {type(error).__name__}: {error}. Repair it, or leave the case out."
    return width, height


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
        folder = " Has the folder a metadata.jsonl?" if set(features) <= {"image", "label"} else ""
        raise ValueError(
            f"{name} has no column 'prompt' with the instruction; its columns are {list(features)}. Rename yours: "
            f"dataset.rename_column('instruction', 'prompt').{folder}"
        )
    if not is_text(features["prompt"]):
        what = "a conversation" if "content" in str(features["prompt"]) else f"{features['prompt']}"
        raise ValueError(
            f"The column 'prompt' of {name} must hold strings, but is {what}: write the instruction as text, e.g. "
            "'Make the car red'."
        )
    if "image" not in features and "images" not in features:
        raise ValueError(
            f"{name} has no column 'image' (one reference image per case) or 'images' (a list of them); its "
            f"columns are {list(features)}. Rename yours: dataset.rename_column('source_img', 'image')."
        )
    for column in ("image", "images"):
        feature = features.get(column)
        item = feature.feature if column == "images" and isinstance(feature, List) else feature
        if feature is not None and not (isinstance(item, Image) or is_text(item) or isinstance(item, dict)):
            raise ValueError(f"The column {column!r} of {name} must hold images or their paths, but is {feature}.")
    for column in ("task", "requirement"):  # what judges are given
        feature = features.get(column)
        if feature is not None and not (is_text(feature) or feature == Value("null")):
            raise ValueError(f"The column {column!r} of {name} must hold strings, but is {feature}.")
    id_type = features.get("id")
    if id_type is not None and (not isinstance(id_type, Value) or id_type.dtype.startswith(NO_NAMES)):
        raise ValueError(
            f"The column 'id' of {name} must hold names or numbers, but is {id_type}: convert it to strings, or leave "
            "it out."
        )


def _check_unique(dataset: Dataset, name: str, columns: list[str]) -> None:
    seen: dict[Any, int] = {}
    problems: list[str] = []
    for row, values in enumerate(zip(*(dataset[column][:] for column in columns), strict=True)):
        case_id, *others = values
        key = (str(case_id), *others)  # everything that is made of a case is named by its id as text
        if case_id is None or case_id != case_id or not key[0].strip():
            problems.append(f"Row {row} of {name} has no id.")
        elif not key[0].isprintable():
            problems.append(
                f"Row {row} of {name} has the id {case_id!r}, which has characters that cannot be printed."
            )
        elif key in seen:
            same = " and ".join(f"{column} {value!r}" for column, value in zip(columns, values, strict=True))
            problems.append(f"Row {row} of {name} has the {same} of row {seen[key]}.")
        seen.setdefault(key, row)
    if problems:
        more = f" And {len(problems) - NAMED_CASES} more." if len(problems) > NAMED_CASES else ""
        remedy = "and unique, or leave the column out" if len(columns) == 1 else "and unique for each editor"
        raise ValueError(f"{' '.join(problems[:NAMED_CASES])}{more} Ids must be there {remedy}.")


def edit_keys(dataset: Dataset) -> list[EditKey]:
    """Returns what identifies each edit of a dataset: the id of its case, as a string, and its editor."""
    editors = dataset["editor"][:] if "editor" in dataset.features else [None] * len(dataset)
    return list(zip(map(str, dataset["id"][:]), editors, strict=True))


def check_edits(
    dataset: Dataset, name: str, on_bad_case: str | None = "error", decode: bool = False
) -> dict[int, str]:
    """
    Checks that a dataset is a dataset of edits, and each of its rows, see [`check_cases`].

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            Its name in errors, e.g. `"dataset"`.
        on_bad_case (`str`, *optional*, defaults to `"error"`):
            As in [`check_cases`].
        decode (`bool`, *optional*, defaults to `False`):
            As in [`check_cases`].

    Returns:
        `dict[int, str]`: the bad cases, as [`check_cases`] returns them.

    Raises:
        `TypeError`: If it is not a map-style [`~datasets.Dataset`].
        `ValueError`: If it is not a dataset of cases, see [`check_cases`], has no column of images `edit`, or its `id`
            is missing or not unique for each `editor`.
        [`BadCaseError`]: If a row has no edit, or is a bad case for another reason.
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
    return _check_rows(dataset, name, on_bad_case, decode, ["edit"])


def load_split(path: str, split: str = "train", image_root: str | None = None, **options: Any) -> Any:
    """
    Loads one split of a dataset from a folder or the Hub.

    Args:
        path (`str`):
            A folder written by [`~datasets.Dataset.save_to_disk`], any other local folder that
            [`~datasets.load_dataset`] reads, or a Hub repository.
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split.
        image_root (`str`, *optional*):
            Images that are named by their path must be files of the dataset itself: of the folder, or of the Hub
            repository. With this they may also lie below another folder, or have an address that begins with it, e.g.
            `"https://example.org/photos/"`.
        **options:
            Options of [`~datasets.load_dataset`].

    Returns:
        [`~datasets.Dataset`], or [`~datasets.IterableDataset`] with `streaming=True`.

    Raises:
        `FileNotFoundError`: If there is no dataset at `path`.
        `ConnectionError`: If it is on the Hub, which cannot be reached, and not in the cache.
        `ValueError`: If it has no such split, or names an image that is neither its own nor below `image_root`.
    """
    folders = [path] if Path(path).is_dir() else []
    return check_image_paths(_load_split(path, split, **options), path, folders, image_root)


def _load_split(path: str, split: str, **options: Any) -> Any:
    if not is_saved_dataset(path):
        remember_secrets([path, options])  # an address may hold a token
        if Path(path).is_file():
            raise ValueError(
                f"{path} is a file, but a dataset is a folder or a Hub repository: name the file's folder."
            )
        check_reachable(path, "dataset", **hub_options(options))
        try:
            return load_dataset(path, split=split, **options)
        except FileNotFoundError as error:
            redact_error(error)
            at_revision = f" at revision {options['revision']!r}" if options.get("revision") else ""
            raise FileNotFoundError(
                f"There is no dataset {redacted(path)!r}{at_revision}, neither a folder nor on the Hub, or it is "
                f"private and needs a token: {error}"
            ) from error
        except Exception as error:  # datasets raises errors of many types
            redact_error(error)
            if found := re.search(r"(?:Unknown|Bad) split.*?\[(.*)\]", str(error)):
                raise ValueError(_no_split(path, split, found[1])) from error
            if Path(path).is_dir() and (fault := metadata_fault(path)):
                raise ValueError(fault) from error
            raise
    dataset = load_from_disk(path)
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(_no_split(path, split, ", ".join(map(repr, dataset))))
        dataset = dataset[split]
    elif split not in ("train", str(dataset.split)):
        raise ValueError(f"{path} holds one dataset without splits, so there is no split {split!r}: leave it out.")
    return dataset.to_iterable_dataset() if options.get("streaming") else dataset


def _no_split(path: str, split: str, splits: str) -> str:
    return (
        f"{redacted(path)} has no split {split!r}; its splits are [{splits}]. Name one of them: --split, or for a "
        "training --dataset_train_split and --dataset_test_split."
    )


def load_edits(path: str, split: str = "train", revision: str | None = None, image_root: str | None = None) -> Dataset:
    """
    Loads a dataset of edits. Its images stay encoded.

    Args:
        path (`str`):
            A folder or a Hub repository, see [`load_split`].
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        image_root (`str`, *optional*):
            Where images may lie outside the dataset, see [`load_split`].

    Returns:
        [`~datasets.Dataset`]: with `id`, `image` or `images`, `edit`, `prompt` and all other columns.

    Raises:
        `FileNotFoundError`: If there is no dataset at `path`.
        `ValueError`: If it has no such split, is not a dataset of edits, see [`check_edits`], or names images outside.
    """
    dataset = load_split(path, split, image_root, revision=revision)
    check_edits(dataset, path, on_bad_case=None)
    return without_decoding(dataset)


def check_pairs(
    dataset: Dataset, name: str, on_bad_case: str | None = "error", decode: bool = False
) -> dict[int, str]:
    """
    Checks that a dataset is a dataset of preference pairs, and each of its rows, see [`check_cases`].

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            Its name in errors, e.g. `"train_dataset"`.
        on_bad_case (`str`, *optional*, defaults to `"error"`):
            As in [`check_cases`].
        decode (`bool`, *optional*, defaults to `False`):
            As in [`check_cases`].

    Returns:
        `dict[int, str]`: the bad cases, as [`check_cases`] returns them.

    Raises:
        `TypeError`: If it is not a map-style [`~datasets.Dataset`].
        `ValueError`: If it is not a dataset of cases, see [`check_cases`], or has no columns of images `chosen` and
            `rejected`.
        [`BadCaseError`]: If a pair lacks an image, its edits differ in size, or it is a bad case for another reason.
    """
    if isinstance(dataset, Dataset):  # before a column is missed that such datasets do not have
        _check_no_text(dataset, name)
    check_cases(dataset, name, on_bad_case=None)
    for column in ("chosen", "rejected"):
        feature = dataset.features.get(column)
        if feature is None:
            raise ValueError(
                f"{name} has no column {column!r}: a preference pair has two edits of one case, `chosen` and "
                f"`rejected`; its columns are {list(dataset.features)}."
            )
        if not (is_text(feature) or isinstance(feature, Image | dict)):
            raise ValueError(f"The column {column!r} of {name} must hold images or their paths, but is {feature}.")
    return _check_rows(dataset, name, on_bad_case, decode, ["chosen", "rejected"])


def _check_no_text(dataset: Dataset, name: str) -> None:
    """Raises `ValueError` if edits are answers of a language model, as in TRL's preference datasets."""
    for column in ("chosen", "rejected"):
        feature = dataset.features.get(column)
        item = feature.feature if isinstance(feature, List | LargeList) else None
        conversation = isinstance(item, dict) and "content" in item
        values = dataset[:20][column] if is_text(feature) else []
        values = [value for value in values if value is not None and value.strip()]
        if conversation or (values and not any(map(_may_be_path, values))):
            shown = "conversations" if conversation else f"text, e.g. {values[0][:40]!r}"
            raise ValueError(
                f"The column {column!r} of {name} holds {shown}, as in TRL's datasets for language models. Here "
                "`chosen` and `rejected` are the better and the worse edited image (datasets.Image, or paths of "
                "files), `prompt` is the instruction as text, and `image` the reference image."
            )


def _may_be_path(value: str) -> bool:
    suffix = Path(value).suffix.lower()
    return "://" in value or suffix in PILImage.registered_extensions() or os.path.exists(value)


def check_dataset(dataset: Dataset, name: str) -> str:
    """
    Checks a dataset as what uses it does: with `chosen` and `rejected` as preference pairs, with `id` and `edit` as
    edits, otherwise as cases. All images are decoded.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            Its name in errors.

    Returns:
        `str`: what it is for.

    Raises:
        `ValueError`: If it is not usable, see [`check_pairs`], [`check_edits`] and [`check_cases`].
        [`BadCaseError`]: If there are bad cases.
    """
    columns = set(dataset.column_names)
    if {"chosen", "rejected"} <= columns:
        check_pairs(dataset, name, decode=True)
        return "DPO"
    if {"id", "edit"} <= columns:
        check_edits(dataset, name, decode=True)
        return "scoring, rating and training"
    check_cases(dataset, name, decode=True)
    return "training and benchmarks"


def check_references(dataset: Dataset, name: str, limit: int | None, on_bad_case: str = "error") -> dict[int, str]:
    """
    Checks that no case has more reference images than a pipeline takes. No image is read.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            Its name in errors.
        limit (`int` or `None`):
            Largest number of reference images; `None` for no limit.
        on_bad_case (`str`, *optional*, defaults to `"error"`):
            As in [`check_cases`].

    Returns:
        `dict[int, str]`: the bad cases, as [`check_cases`] returns them.

    Raises:
        [`BadCaseError`]: If a case has more, and is not to be skipped.
    """
    ids = dataset["id"][:] if "id" in dataset.features else range(len(dataset))
    bad = {
        row: f"{_case(dataset, row, ids[row])} has {count} reference images, but the pipeline takes at most {limit}: "
        "leave it out, or train a pipeline that takes several."
        for row, count in enumerate(_reference_counts(dataset))
        if limit is not None and count > limit
    }
    report_bad_cases(bad, len(dataset), name, on_bad_case)
    return bad


def max_references(dataset: Dataset) -> int:
    """Largest number of reference images of a case. No image is read."""
    return max([1, *_reference_counts(dataset)])


def _reference_counts(dataset: Dataset) -> list[int]:
    """Number of reference images of each case, 0 for one in the column `image`; empty without the column `images`."""
    if "images" not in dataset.features:
        return []
    counts = pc.list_value_length(dataset.data.column("images")).take(pa.array(_positions(dataset)))
    return [count or 0 for count in counts.to_pylist()]


def without_decoding(dataset: Dataset) -> Dataset:
    """
    Returns the dataset with all its images encoded, in columns of any name and in lists, so that a broken image is an
    error of its case ([`case_images`], [`decoded`]) and not of the dataset.
    """
    features = encoded_features(dataset.features)
    if features == dataset.features:
        return dataset
    # Images and encoded images are stored alike. `Dataset.cast` would write lists of them to a new file.
    fingerprint = f"{dataset._fingerprint}-encoded"
    dataset = copy.copy(dataset)
    dataset._info = copy.deepcopy(dataset._info)
    dataset._info.features = features
    dataset._data = dataset._data.cast(features.arrow_schema)
    dataset._fingerprint = fingerprint
    return dataset


def encoded_features(features: Features) -> Features:
    """Returns the features of a dataset with all its images encoded."""
    return Features({name: _encoded(feature) for name, feature in features.items()})


def _encoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _encoded(part) for name, part in feature.items()}
    if isinstance(feature, Image):
        return Image(mode=feature.mode, decode=False)
    if isinstance(feature, List | LargeList):
        feature = copy.copy(feature)
        feature.feature = _encoded(feature.feature)
    return feature


def decoded(row: dict[str, Any], features: Features, case_id: Any) -> dict[str, Any]:
    """
    Decodes the images in columns of the user's own, as `datasets` does, in their own mode.

    Args:
        row (`dict`):
            A row of a dataset of [`without_decoding`].
        features ([`~datasets.Features`]):
            The dataset's features.
        case_id (`Any`):
            Name of the case in errors.

    Raises:
        [`BadCaseError`]: If one cannot be decoded.
    """

    def decode(value: Any, feature: Any) -> Any:
        if value is None or not _holds_images(feature):
            return value
        if isinstance(feature, dict):
            return {name: decode(value[name], part) for name, part in feature.items()}
        if isinstance(feature, Image):
            image = Image(mode=feature.mode).decode_example(value)
            image.load()
            return image
        return [decode(item, feature.feature) for item in value]

    row = dict(row)
    for column in row.keys() - {"image", "images", "edit", "chosen", "rejected"}:
        try:
            row[column] = decode(row[column], features.get(column))
        except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
            raise BadCaseError(
                f"An image in {column!r} of case {case_id!r} cannot be decoded: {type(error).__name__}: "
                f"{with_path(error, row[column])}",
                str(case_id),
            ) from error
    return row


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
            f"{rejected.width} x {rejected.height}, but they must have the same size: crop them."
        )
    return chosen, rejected
