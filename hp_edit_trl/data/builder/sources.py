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

# The keys that a source of each kind may have besides `source` and `license`
SOURCE_KEYS: dict[str, tuple[str, ...]] = {
    "folder": (),
    "dataset": ("name", "split", "revision", "image_column", "license_column", "image_root"),
    "parquet": ("image_column", "license_column", "image_root"),
    "webdataset": ("image_column", "license_column", "image_root"),
}


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
            repository) and `license`. All but folders also take `image_column` (defaults to the only column of images)
            and `license_column` (the license of each row, instead of `license`). Images that are named by their path
            must be files of the dataset, or lie below `image_root`. Links in a folder are followed.

    Raises:
        `ValueError`: If an entry is not valid or has no images.
        `FileNotFoundError`: If a folder does not exist.
    """

    def __init__(self, specs: list[dict[str, Any]]):
        if not isinstance(specs, list) or not specs:
            raise ValueError(f"sources={redacted(specs)!r} must be a list of sources, e.g. [{{'folder': 'photos'}}].")
        remember_secrets(specs)
        self._parts: list[_Folder | _Rows] = []
        for number, spec in enumerate(specs):
            name = f"sources[{number}]"
            kind, options = _checked(spec, name)
            name = redacted(f"{name} ({kind}: {options[kind]})")
            part = _Folder(options, name) if kind == "folder" else _Rows(kind, options, name)
            if len(part) == 0:
                raise ValueError(f"{name} has no images: put some there, or leave the source out.")
            if "license" not in options and "license_column" not in options:
                logger.warning(
                    "%s has no license, so the card will call it unknown: set `license` or `license_column`.", name
                )
            self._parts.append(part)
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
            `license` and `file` (the path inside the folder, or the number of the row).

        Raises:
            `OSError`: If a disk fails. The image is not rejected, because the next attempt may succeed.
        """
        batch: Batch = {name: [] for name in ImageCheck.inputs}
        for part, first in zip(self._parts, self._starts, strict=False):
            here, there = max(start - first, 0), min(stop - first, len(part))
            if here < there:
                for name, values in part.read(here, there).items():
                    batch[name] += values
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
    known = (kinds[0], "source", "license", *SOURCE_KEYS[kinds[0]])
    if unknown := sorted(str(key) for key in options if key not in known):
        raise ValueError(f"{name} has unknown keys {unknown}; a {kinds[0]} may have {list(known)}.")
    for key, value in options.items():
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


class _Folder:
    """The image files of a folder."""

    def __init__(self, options: dict[str, Any], name: str):
        self.root = Path(options["folder"])
        if not self.root.is_dir():
            raise FileNotFoundError(f"{name} is not a folder: correct the path, or mount the disk.")
        self.source = options.get("source", self.root.resolve().name)
        self.license = options.get("license")

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
        self.files = sorted(sizes)
        self.sizes = [sizes[file] for file in self.files]
        # Names and sizes only: hashing the content of millions of files would take hours.
        listing = repr(list(zip(self.files, self.sizes, strict=True))).encode()
        self.digest = {"files": len(self.files), "digest": hashlib.sha256(listing).hexdigest()[:16]}

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> Batch:
        contents, problems = [], []
        for file, size in zip(self.files[start:stop], self.sizes[start:stop], strict=True):
            content, problem = _read_file(self.root / file)
            if content is None and size >= 0 and not os.path.exists(self.root / file):
                raise FileNotFoundError(
                    f"{self.root / file} existed when the build started and is gone: check that the disk is mounted, "
                    "and run again to resume."
                )
            contents.append(content)
            problems.append(problem)
        count = stop - start
        return {
            "content": contents,
            "problem": problems,
            "source": [self.source] * count,
            "license": [self.license] * count,
            # Arrow tables hold only names that are valid UTF-8.
            "file": [os.fsencode(file).decode("utf-8", "backslashreplace") for file in self.files[start:stop]],
        }


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
        columns = filter(None, [options.get("image_column")])
        check_image_paths(dataset, str(where), folders, options.get("image_root"), [*IMAGE_COLUMNS, *columns])

        images = [column for column, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
        column = options.get("image_column") or (images[0] if len(images) == 1 else None)
        if column is None or column not in dataset.features:
            problem = f"there is no column {column!r}" if column else f"{len(images)} columns hold images {images}"
            raise ValueError(f"{name}: {problem}. Set image_column to one of its columns {list(dataset.features)}.")
        feature = dataset.features[column]
        is_struct = isinstance(feature, dict) and {"bytes", "path"} & feature.keys()
        is_bytes = isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")
        if not (isinstance(feature, ImageFeature) or is_struct or is_bytes or is_text(feature)):
            raise ValueError(f"{name}: the column {column!r} must hold images, bytes or paths, but is {feature}.")
        license_column = options.get("license_column")
        if license_column is not None and not is_text(dataset.features.get(license_column)):
            raise ValueError(
                f"{name} has no column {license_column!r} of text: set license_column to one of "
                f"{list(dataset.features)}, or set `license`."
            )
        dataset = dataset.select_columns([column, *filter(None, [license_column])])
        self.dataset = dataset.cast_column(column, ImageFeature(decode=False))
        self.image_column, self.license_column = column, license_column
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
        rows = self.dataset[start:stop]
        contents, problems = [], []
        for value in rows[self.image_column]:
            content, problem = (value or {}).get("bytes"), None
            if content is None and value and value.get("path"):
                content, problem = _read_file(value["path"])
            contents.append(content)
            problems.append(problem or ("the row has no image" if content is None else None))
        count = stop - start
        licenses = rows[self.license_column] if self.license_column else [self.license] * count
        return {
            "content": contents,
            "problem": problems,
            "source": [self.source] * count,
            "license": [license or None for license in licenses],
            "file": [str(number) for number in range(start, stop)],
        }


class _Rejected(Exception):
    """An image that can be read, but is not suitable."""


class ImageCheck(Stage):
    """
    Normalizes images to upright 8-bit sRGB without alpha, and rejects those that cannot be used.

    Images that need no change keep their bytes, with all metadata. Other images are encoded as PNG, without metadata;
    only a JPEG that is scaled down is stored as JPEG.

    The column `image_id` is a hash of the pixels, and `image_hash` the perceptual hash `imagehash.phash`.

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

    Raises:
        `ValueError`: If an option is not valid.
    """

    name = "sources"
    inputs = ("content", "problem", "source", "license", "file")
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
        }
    )

    def __init__(
        self, min_side: int = 256, max_side: int = 16384, resolution: int | None = None, batch_size: int = 32
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

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("min_side", "max_side", "resolution")}

    def __call__(self, batch: Batch) -> Batch:
        done: Batch = {name: [] for name in [*self.features, "reason"]}
        for name in ("source", "license", "file"):
            done[name] = list(batch[name])
        for content, problem in zip(batch["content"], batch["problem"], strict=True):
            row: dict[str, Any] = dict.fromkeys(("image", "image_id", "image_hash", "width", "height", "reason"))
            try:
                if content is None:
                    raise _Rejected(f"unreadable: {problem}")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # e.g. about odd metadata, or a size that `max_side` allows
                    stored, picture = self._read(content)
                    row |= {
                        "image": {"bytes": stored, "path": None},
                        "image_id": image_digest(picture).hex()[:16],
                        "image_hash": str(imagehash.phash(picture)),
                        "width": picture.width,
                        "height": picture.height,
                    }
            except _Rejected as rejected:
                row["reason"] = str(rejected)
            except TooLargeImageError as error:
                row["reason"] = f"too large: {error}"
            except UnreadableImageError as error:
                row["reason"] = f"unreadable: {error}"
            except Exception as error:  # Pillow's decoders raise many types of errors on broken files
                row["reason"] = f"unreadable: {type(error).__name__}: {error}"
            for name, value in row.items():
                done[name].append(value)
        return done

    def _read(self, content: bytes) -> tuple[bytes, Image.Image]:
        """The bytes to store of an image, and the picture that they encode."""
        image = open_image(content)
        self._check_size(*image.size)
        # Pillow defines `n_frames` only for formats that can have several.
        frames = 1 if image.format in JPEGS else getattr(image, "n_frames", 1)
        if frames > 1:
            raise _Rejected(f"animated: {frames} frames")
        stored = raw_mode(image)
        load_whole(image)
        if alpha_channel(image, stored) is not None:
            raise _Rejected("transparent: not all of its pixels are opaque")

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
            raise _Rejected(f"too large: {width} x {height} pixels, at most {self.max_side}")
        fitted = self._fitted(width, height)
        if min(fitted) < self.min_side:
            scaled = f", scaled down to {fitted[0]} x {fitted[1]}" if fitted != (width, height) else ""
            raise _Rejected(f"too small: {width} x {height} pixels{scaled}, at least {self.min_side}")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise _Rejected(f"too narrow: {width} x {height} pixels, sides of up to {MAX_ASPECT_RATIO}:1 are used")

    def _fitted(self, width: int, height: int) -> tuple[int, int]:
        """The size after scaling down."""
        if self.resolution is None or width * height <= self.resolution**2:
            return width, height
        scale = self.resolution / (width * height) ** 0.5
        return max(1, int(width * scale)), max(1, int(height * scale))


def _same_pixels(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()
