"""Stage `sources`: reads images from folders and datasets, normalizes them, and rejects those that cannot be used."""

import hashlib
import io
import logging
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
from datasets import Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from ...cases import MAX_ASPECT_RATIO, is_text, load_split
from ...tasks import TASKS
from ...utils.config import check_positive
from ...utils.image_paths import IMAGE_COLUMNS, check_image_paths, source_folders
from ...utils.images import (
    JPEGS,
    TooLargeImageError,
    UnreadableImageError,
    alpha_channel,
    image_digest,
    load_whole,
    open_image,
    png_bytes,
    raw_mode,
    read_image,
    to_rgb,
)
from ...utils.secrets import redact_error, redacted, remember_secrets
from .engine import Batch, Stage


logger = logging.getLogger(__name__)

# Files with other suffixes are ignored. Those that Pillow cannot read are rejected, so that they are counted.
IMAGE_SUFFIXES = {
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm",
    ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip

KEPT_FORMATS = (*JPEGS, "PNG", "WEBP")

# The keys that a source of each kind may have besides `source`, `license` and `tasks`
_COLUMNS = ("image_column", "target_column", "license_column", "image_root")
SOURCE_KEYS: dict[str, tuple[str, ...]] = {
    "folder": ("targets",),
    "dataset": ("name", "split", "revision", *_COLUMNS),
    "parquet": _COLUMNS,
    "webdataset": _COLUMNS,
}

MAX_SHAPE_DIFFERENCE = 0.01  # of the aspect ratios of an image and its target, relative


class Sources:
    """
    The images of a build, in a fixed order.

    Args:
        specs (`list[dict]`):
            Where they come from. Each entry has one of the keys

            - `folder`: a folder. All image files in it and its subfolders are read, sorted by name; hidden ones are
            not;
            - `dataset`: a Hub repository, or a local folder that [`~datasets.load_dataset`] or
              [`~datasets.load_from_disk`] reads, optionally with `name` (its configuration), `split` (defaults to
              `"train"`) and `revision`;
            - `parquet`: a path or pattern of Parquet files, or a list of them;
            - `webdataset`: a path, URL or pattern of `.tar` files, or a list of them;

            and optionally `source` (the value of the column `source`; defaults to the name of the folder or
            repository), `license` and `tasks` (a list of the tasks that its images are for; without it they are for
            all tasks that no other source names). All but folders also take `image_column` (defaults to the only
            column of images) and `license_column` (the license of each row, instead of `license`). Images that are
            named by their path must be files of the dataset, or lie below `image_root`. Links in a folder are
            followed.

            Images may have a target each, a picture of what an edit should look like, e.g. of the same scene with
            bokeh: `targets` is a folder of files with the same names as those of `folder`, up to their suffix;
            `target_column` is a column. Such a source names the one task of its targets.

    Raises:
        `ValueError`: If an entry is not valid, has no images, or has images without targets or targets without images.
        `FileNotFoundError`: If a folder does not exist.
    """

    def __init__(self, specs: list[dict[str, Any]]):
        if not isinstance(specs, list) or not specs:
            raise ValueError(f"sources={redacted(specs)!r} must be a list of sources, e.g. [{{'folder': 'photos'}}].")
        remember_secrets(specs)
        self._parts: list[_Folder | _Rows] = []
        checked = [_checked(spec, f"sources[{number}]") for number, spec in enumerate(specs)]
        named = {task for _, options in checked for task in options.get("tasks", [])}
        rest = [task for task in TASKS if task not in named]
        self._tasks: list[list[str]] = []  # of each part
        for number, (kind, options) in enumerate(checked):
            name = redacted(f"sources[{number}] ({kind}: {options[kind]})")
            self._tasks.append([task for task in TASKS if task in options.get("tasks", rest)])
            if not self._tasks[-1]:
                raise ValueError(f"{name} serves no task, because other sources name all of them: set its `tasks`.")
            part = _Folder(options, name) if kind == "folder" else _Rows(kind, options, name)
            if len(part) == 0:
                raise ValueError(f"{name} has no images: put some there, or leave the source out.")
            if "license" not in options and "license_column" not in options:
                logger.warning(
                    "%s has no license, so the card will call it unknown: set `license` or `license_column`.", name
                )
            self._parts.append(part)
        self.tasks = {task for tasks in self._tasks for task in tasks}
        self.have_targets = any(part.has_targets for part in self._parts)
        self._starts = np.cumsum([0, *map(len, self._parts)]).tolist()
        self.settings: dict[str, Any] = {
            "sources": [{**spec, **part.digest} for spec, part in zip(specs, self._parts, strict=True)]
        }

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Batch:
        """
        Reads a range of images.

        Args:
            start (`int`):
                Number of the first image.
            stop (`int`):
                Number after the last image.

        Returns:
            `dict[str, list]`: `content` (the bytes of the file, or `None`), `problem` (why there are none), `source`,
            `license`, `file` (the path inside the folder, or the number of the row), `tasks` (the tasks that it is
            for, joined by commas), and `target` and `target_problem`, both `None` if the source has no targets.

        Raises:
            `OSError`: If a disk fails. The image is not rejected, because the next attempt may succeed.
        """
        batch: Batch = {name: [] for name in (*ImageCheck.inputs, *TARGET_INPUTS)}
        for part, tasks, first in zip(self._parts, self._tasks, self._starts, strict=False):
            here, there = max(start - first, 0), min(stop - first, len(part))
            if here < there:
                values = dict.fromkeys(TARGET_INPUTS, [None] * (there - here)) | part.read(here, there)
                for name, column in (values | {"tasks": [",".join(tasks)] * (there - here)}).items():
                    batch[name] += column
        return batch


def _checked(spec: Any, name: str) -> tuple[str, dict[str, Any]]:
    """The kind of a source, and those of its keys that have a value."""
    if not isinstance(spec, dict):
        raise ValueError(
            f"{name} must be a mapping with one of the keys {list(SOURCE_KEYS)}, but is {redacted(spec)!r}."
        )
    options = {key: value for key, value in spec.items() if value is not None}
    kinds = [kind for kind in SOURCE_KEYS if kind in options]
    if len(kinds) != 1:
        raise ValueError(
            f"{name} must have exactly one of the keys {list(SOURCE_KEYS)}, but has {sorted(map(str, spec))}."
        )
    known = (kinds[0], "source", "license", "tasks", *SOURCE_KEYS[kinds[0]])
    if unknown := sorted(str(key) for key in options if key not in known):
        raise ValueError(f"{name} has unknown keys {unknown}; a {kinds[0]} may have {list(known)}.")
    tasks = options.get("tasks", list(TASKS))
    known_tasks = isinstance(tasks, list) and [task for task in tasks if isinstance(task, str) and task in TASKS]
    if not tasks or known_tasks != tasks:
        raise ValueError(
            f"{name}: tasks must be a list of tasks, but is {redacted(tasks)!r}. Correct it; there are {list(TASKS)}."
        )
    if ("targets" in options or "target_column" in options) and len({*tasks}) != 1:
        raise ValueError(f"{name} has targets, so it must name the one task that they are for, e.g. `tasks: [bokeh]`.")
    for key, value in options.items():
        if key == "tasks":
            continue
        values = value if isinstance(value, list) and key in ("parquet", "webdataset") else [value]
        if not values or any(not isinstance(one, str) or not one for one in values):
            raise ValueError(
                f"{name}: {key} must be text, but is {redacted({key: value})[key]!r}. In YAML, put it in quotes."
            )
    if "license" in options and "license_column" in options:
        raise ValueError(f"{name} has `license` and `license_column`: leave one out.")
    return kinds[0], options


def _read_file(path: str | Path) -> tuple[bytes | None, str | None]:
    """The bytes of a file, or what is wrong with it. Errors of the disk are raised."""
    try:
        return Path(path).read_bytes(), None
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        return None, f"{error.strerror}"


class ImageFolder:
    """
    The image files of a folder and its subfolders, by name. Hidden ones are ignored.

    Args:
        root (`str`):
            The folder.
        name (`str`):
            Its name in errors.

    Raises:
        `FileNotFoundError`: If there is no such folder.
        `OSError`: If a subfolder cannot be read.
    """

    def __init__(self, root: str, name: str):
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{name} is not a folder: correct the path, or mount the disk.")

        def fail(error: OSError) -> None:
            raise OSError(
                error.errno, f"{name} cannot be read completely: {error}. Grant permission, or remove the folder"
            )

        sizes: dict[str, int] = {}
        visited = set()
        for folder, subfolders, files in os.walk(self.root, onerror=fail, followlinks=True):
            if (place := os.path.realpath(folder)) in visited:  # linked twice, or from inside itself
                subfolders.clear()
                continue
            visited.add(place)
            subfolders[:] = sorted(each for each in subfolders if not each.startswith("."))
            for file in files:
                path = Path(folder, file)
                if not file.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES:
                    try:
                        found = path.stat()
                    except OSError:
                        sizes[path.relative_to(self.root).as_posix()] = -1  # a broken link
                        continue
                    if stat.S_ISREG(found.st_mode):  # reading a pipe would block
                        sizes[path.relative_to(self.root).as_posix()] = found.st_size
        self.sizes = dict(sorted(sizes.items()))
        self.files = list(self.sizes)

    @property
    def digest(self) -> str:
        # Names and sizes only: hashing the content of millions of files would take hours.
        return hashlib.sha256(repr(list(self.sizes.items())).encode()).hexdigest()[:16]

    def read(self, file: str) -> tuple[bytes | None, str | None]:
        """The bytes of a file, or what is wrong with it."""
        content, problem = _read_file(self.root / file)
        if content is None and self.sizes[file] >= 0 and not os.path.exists(self.root / file):
            raise FileNotFoundError(
                f"{self.root / file} existed when the build started and is gone: check that the disk is mounted, and "
                "run again to resume."
            )
        return content, problem


class _Folder:
    """The images of a folder, and their targets."""

    def __init__(self, options: dict[str, Any], name: str):
        self.images = ImageFolder(options["folder"], name)
        self.source = options.get("source", self.images.root.resolve().name)
        self.license = options.get("license")
        self.digest = {"files": len(self.images.files), "digest": self.images.digest}
        self.has_targets = "targets" in options
        if self.has_targets:
            self.targets = ImageFolder(options["targets"], f"{name}: targets={options['targets']}")
            if self.targets.root.resolve() == self.images.root.resolve():
                raise ValueError(f"{name}: targets is the folder of the images itself; name the one of their targets.")
            self.target_of = _paired(self.images, self.targets, name)
            self.digest["targets_digest"] = self.targets.digest

    def __len__(self) -> int:
        return len(self.images.files)

    def read(self, start: int, stop: int) -> Batch:
        files, count = self.images.files[start:stop], stop - start
        found = [self.images.read(file) for file in files]
        batch: Batch = {
            "content": [content for content, _ in found],
            "problem": [problem for _, problem in found],
            "source": [self.source] * count,
            "license": [self.license] * count,
            # Arrow tables hold only names that are valid UTF-8.
            "file": [os.fsencode(file).decode("utf-8", "backslashreplace") for file in files],
        }
        if self.has_targets:
            found = [self.targets.read(self.target_of[file]) for file in files]
            batch |= {name: list(values) for name, values in zip(TARGET_INPUTS, zip(*found, strict=True), strict=True)}
        return batch


def _paired(images: ImageFolder, targets: ImageFolder, name: str) -> dict[str, str]:
    """The target of each image: the file with the same name, up to its suffix. Raises `ValueError` if any is alone."""
    by_stem: list[dict[str, str]] = [{}, {}]
    for folder, files in zip((images, targets), by_stem, strict=True):
        for file in folder.files:
            other = files.setdefault(os.path.splitext(file)[0], file)
            if other != file:
                raise ValueError(
                    f"{name}: {folder.root} has {other} and {file}, so it is not clear which one is of the pair: "
                    "remove or rename one."
                )
    images_by_stem, targets_by_stem = by_stem
    for here, there, words in (
        (images_by_stem, targets_by_stem, "images have no target"),
        (targets_by_stem, images_by_stem, "targets have no image"),
    ):
        if alone := [file for stem, file in here.items() if stem not in there]:
            raise ValueError(
                f"{name}, targets: {targets.root}: {len(alone)} of {len(here)} {words}, e.g. {alone[0]}. Give both "
                "files of a pair the same name, and move those that are alone elsewhere."
            )
    return {file: targets_by_stem[stem] for stem, file in images_by_stem.items()}


class _Rows:
    """The images of a dataset."""

    def __init__(self, kind: str, options: dict[str, Any], name: str):
        where = options[kind]
        try:
            if kind == "dataset":
                names = ("name", "split", "revision", "image_root")
                dataset = load_split(where, **{name: options[name] for name in names if name in options})
            else:
                dataset = load_dataset(kind, data_files=where, split="train")
        except Exception as error:  # datasets raises many types of errors, some with the cause chained
            redact_error(error)
            cause = f": {error.__cause__}" if error.__cause__ else ""
            raise ValueError(
                f"{name} cannot be loaded: {type(error).__name__}: {error}{cause}. Check its path or name, and its "
                "options."
            ) from error
        # Before columns are selected and cast, which would change the fingerprint
        self.digest = {"rows": len(dataset), "fingerprint": dataset._fingerprint}
        folders = [where] if kind == "dataset" and os.path.isdir(where) else []
        if kind != "dataset":
            folders = source_folders(where)
        columns = filter(None, [options.get("image_column"), options.get("target_column")])
        target = options.get("target_column")
        check_image_paths(dataset, str(where), folders, options.get("image_root"), [*IMAGE_COLUMNS, *columns])

        images = [column for column, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
        images = [column for column in images if column != target]
        column = options.get("image_column") or (images[0] if len(images) == 1 else None)
        if column is None or column not in dataset.features:
            problem = f"there is no column {column!r}" if column else f"{len(images)} columns hold images {images}"
            raise ValueError(f"{name}: {problem}. Set image_column to one of its columns {list(dataset.features)}.")
        if target is not None and (target not in dataset.features or target == column):
            problem = "is the column of the images" if target == column else "does not exist"
            raise ValueError(
                f"{name}: target_column={target!r} {problem}. Set it to another one of {list(dataset.features)}."
            )
        pictures = [column, *filter(None, [target])]
        for picture in pictures:
            feature = dataset.features[picture]
            is_struct = isinstance(feature, dict) and {"bytes", "path"} & feature.keys()
            is_bytes = isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")
            if not (isinstance(feature, ImageFeature) or is_struct or is_bytes or is_text(feature)):
                raise ValueError(f"{name}: the column {picture!r} must hold images, bytes or paths, but is {feature}.")
        license_column = options.get("license_column")
        if license_column is not None and not is_text(dataset.features.get(license_column)):
            raise ValueError(
                f"{name} has no column {license_column!r} of text: set license_column to one of "
                f"{list(dataset.features)}, or set `license`."
            )
        self.dataset = dataset.select_columns([*pictures, *filter(None, [license_column])])
        for picture in pictures:
            self.dataset = self.dataset.cast_column(picture, ImageFeature(decode=False))
        self.image_column, self.target_column, self.license_column = column, target, license_column
        self.has_targets = target is not None
        self.license = options.get("license")
        pattern = where[0] if isinstance(where, list) else where
        if kind != "dataset":  # the folder of the files
            default = Path(pattern.partition("*")[0] + "x").absolute().parent.name
        else:
            default = Path(pattern).resolve().name if os.path.isdir(pattern) else pattern
        self.source = redacted(options.get("source", default))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, start: int, stop: int) -> Batch:
        rows, count = self.dataset[start:stop], stop - start
        found = [_read_cell(value, "image") for value in rows[self.image_column]]
        licenses = rows[self.license_column] if self.license_column else [self.license] * count
        batch: Batch = {
            "content": [content for content, _ in found],
            "problem": [problem for _, problem in found],
            "source": [self.source] * count,
            "license": [license or None for license in licenses],
            "file": [str(number) for number in range(start, stop)],
        }
        if self.target_column is not None:
            found = [_read_cell(value, "target") for value in rows[self.target_column]]
            batch |= {name: list(values) for name, values in zip(TARGET_INPUTS, zip(*found, strict=True), strict=True)}
        return batch


def _read_cell(value: dict[str, Any] | None, what: str) -> tuple[bytes | None, str | None]:
    """The bytes of an image in a row, or what is wrong with it."""
    content, problem = (value or {}).get("bytes"), None
    if content is None and value and value.get("path"):
        content, problem = _read_file(value["path"])
    return content, problem or (f"the row has no {what}" if content is None else None)


# The columns of a target: its bytes, and why there are none
TARGET_INPUTS = ("target", "target_problem")


class RejectedImageError(ValueError):
    """An image that cannot be used. The message is the reason of its rejection."""


class ImageCheck(Stage):
    """
    Normalizes images to upright 8-bit sRGB without alpha, and rejects those that cannot be used.

    Images that need no change keep their bytes, with all metadata. Other images are encoded as PNG, without metadata;
    only a JPEG that is scaled down is stored as JPEG.

    The column `image_id` is a hash of the pixels, and `image_hash` the perceptual hash `imagehash.phash`.

    A target gets the size of its image. Images are rejected with their target if it cannot be used, if it has another
    aspect ratio, because resizing would distort it, or if it is the image itself.

    Args:
        min_side (`int`, *optional*, defaults to `256`):
            Images with a shorter side, in pixels, are rejected.
        max_side (`int`, *optional*, defaults to `16384`):
            Images with a longer side, in pixels, are rejected before they are decoded.
        resolution (`int`, *optional*):
            Larger images are scaled down to the area of a square with this side, in pixels. By default images keep
            their size.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of images per batch.
        with_targets (`bool`, *optional*, defaults to `False`):
            Whether images may have targets: adds the column `target`.

    Raises:
        `ValueError`: If an option is not valid.
    """

    name = "sources"
    inputs: tuple[str, ...] = ("content", "problem", "source", "license", "file", "tasks")
    features = Features(
        {
            "image": ImageFeature(),
            "image_id": Value("string"),
            "image_hash": Value("string"),
            "width": Value("int32"),
            "height": Value("int32"),
            "source": Value("string"),
            "license": Value("string"),
            "file": Value("string"),
            "tasks": Value("string"),
        }
    )

    def __init__(
        self,
        min_side: int = 256,
        max_side: int = 16384,
        resolution: int | None = None,
        batch_size: int = 32,
        with_targets: bool = False,
    ):
        if not 1 <= min_side <= max_side:
            raise ValueError(f"min_side={min_side} must be at least 1 and at most max_side={max_side}.")
        if resolution is not None and resolution < min_side:
            raise ValueError(
                f"resolution={resolution} is below min_side={min_side}, so all images that are scaled down would be "
                "rejected: lower min_side."
            )
        check_positive(batch_size=batch_size)
        self.min_side = min_side
        self.max_side = max_side
        self.resolution = resolution
        self.batch_size = batch_size
        self.with_targets = with_targets
        if with_targets:
            self.inputs += TARGET_INPUTS
            self.features = Features({**self.features, "target": ImageFeature()})

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("min_side", "max_side", "resolution")}

    def __call__(self, batch: Batch) -> Batch:
        done: Batch = {name: [] for name in [*self.features, "reason"]}
        copied = ("source", "license", "file", "tasks")
        for name in copied:
            done[name] = list(batch[name])
        for i, (content, problem) in enumerate(zip(batch["content"], batch["problem"], strict=True)):
            row: dict[str, Any] = {name: None for name in done if name not in copied}
            try:
                stored, picture = self.normalized(content, problem)
                digest = image_digest(picture)
                target = None
                if self.with_targets and (batch["target"][i] is not None or batch["target_problem"][i] is not None):
                    target = {
                        "bytes": self._target(batch["target"][i], batch["target_problem"][i], picture),
                        "path": None,
                    }
                row |= {
                    "image": {"bytes": stored, "path": None},
                    "image_id": digest.hex()[:16],
                    "image_hash": str(imagehash.phash(picture)),
                    "width": picture.width,
                    "height": picture.height,
                }
                if self.with_targets:
                    row["target"] = target
            except RejectedImageError as rejected:
                row["reason"] = str(rejected)
            for name, value in row.items():
                done[name].append(value)
        return done

    def normalized(self, content: bytes | None, problem: str | None = None) -> tuple[bytes, Image.Image]:
        """
        The bytes to store of an image, and the picture that they encode.

        Args:
            content (`bytes` or `None`):
                The bytes of its file.
            problem (`str`, *optional*):
                Why there are none.

        Raises:
            [`RejectedImageError`]: If it cannot be used.
        """
        if content is None:
            raise RejectedImageError(f"unreadable: {problem}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # e.g. about odd metadata, or a size that `max_side` allows
                return self._read(content)
        except RejectedImageError:
            raise
        except TooLargeImageError as error:
            raise RejectedImageError(f"too large: {error}") from error
        except UnreadableImageError as error:
            raise RejectedImageError(f"unreadable: {error}") from error
        except Exception as error:  # Pillow's decoders raise many types of errors on broken files
            raise RejectedImageError(f"unreadable: {type(error).__name__}: {error}") from error

    def _target(self, content: bytes | None, problem: str | None, image: Image.Image) -> bytes:
        """The bytes to store of the target of an image."""
        try:
            stored, target = self.normalized(content, problem)
        except RejectedImageError as rejected:
            raise RejectedImageError(f"target {rejected}") from rejected
        ratio = target.width * image.height / (target.height * image.width)
        if not 1 / (1 + MAX_SHAPE_DIFFERENCE) <= ratio <= 1 + MAX_SHAPE_DIFFERENCE:
            raise RejectedImageError(
                f"target of another shape: {target.width} x {target.height} pixels, its image has {image.width} x "
                f"{image.height}"
            )
        if target.size != image.size:
            stored = png_bytes(target.resize(image.size, Image.Resampling.LANCZOS))
        elif target.tobytes() == image.tobytes():
            raise RejectedImageError("target equals its image: a pair needs two pictures")
        return stored

    def _read(self, content: bytes) -> tuple[bytes, Image.Image]:
        """The bytes to store of an image, and the picture that they encode."""
        image = open_image(content)
        self._check_size(*image.size)
        # Pillow defines `n_frames` only for formats that can have several.
        frames = 1 if image.format in JPEGS else getattr(image, "n_frames", 1)
        if frames > 1:
            raise RejectedImageError(f"animated: {frames} frames")
        stored = raw_mode(image)
        load_whole(image)
        if alpha_channel(image, stored) is not None:
            raise RejectedImageError("transparent: not all of its pixels are opaque")

        picture = to_rgb(image, stored)
        size = self._fitted(*picture.size)
        is_scaled = size != picture.size
        # Pillow silently decodes 16 bits per color to 8.
        is_plain = image.format in KEPT_FORMATS and image.mode == "RGB" and ";16" not in stored
        if is_plain and not is_scaled and not image.has_transparency_data and _same_pixels(image, picture):
            return content, picture
        if is_scaled:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        if not (is_scaled and image.format in JPEGS):
            return png_bytes(picture), picture
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.getvalue(), read_image({"bytes": buffer.getvalue(), "path": None}, "A scaled image")

    def _check_size(self, width: int, height: int) -> None:
        if max(width, height) > self.max_side:
            raise RejectedImageError(f"too large: {width} x {height} pixels, at most {self.max_side}")
        fitted = self._fitted(width, height)
        if min(fitted) < self.min_side:
            scaled = f", scaled down to {fitted[0]} x {fitted[1]}" if fitted != (width, height) else ""
            raise RejectedImageError(f"too small: {width} x {height} pixels{scaled}, at least {self.min_side}")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise RejectedImageError(
                f"too narrow: {width} x {height} pixels, sides of up to {MAX_ASPECT_RATIO}:1 are used"
            )

    def _fitted(self, width: int, height: int) -> tuple[int, int]:
        """The size after scaling down."""
        if self.resolution is None or width * height <= self.resolution**2:
            return width, height
        scale = self.resolution / (width * height) ** 0.5
        return max(1, int(width * scale)), max(1, int(height * scale))


def _same_pixels(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()
