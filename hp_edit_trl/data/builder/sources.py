"""The stages that read images: where they come from, which of them can be used, and which of them look alike."""

import hashlib
import io
import logging
import os
import stat
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from ...cases import is_text, load_split
from ...utils.images import read_image
from .engine import Batch


logger = logging.getLogger(__name__)

# Files with other endings are not looked at. Pillow may not read all of these; then they are rejected, and so not overlooked.
IMAGE_SUFFIXES = {
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif",
    ".tiff", ".webp",
}  # fmt: skip

# What a file may be, whatever its name says. Pillow knows more, and starts Ghostscript for some of it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# A JPEG with a preview or a gain map behind it, as telephones write them, is an "MPO".
JPEGS = ("JPEG", "MPO")
KEPT_FORMATS = (*JPEGS, "PNG", "WEBP")

# The keys that a source of each kind may have beside `source` and `license`
OPTIONS: dict[str, tuple[str, ...]] = {
    "folder": (),
    "dataset": ("name", "split", "revision", "image_column", "license_column"),
    "parquet": ("image_column", "license_column"),
    "webdataset": ("image_column", "license_column"),
}


class Sources:
    """
    The images of a build, in a fixed order.

    Args:
        specs (`list[dict]`):
            Where they come from. Each has one of the keys

            - `folder`: a folder; all image files in it and below, sorted by name, without hidden ones;
            - `dataset`: a Hub repository, or a local folder that [`~datasets.load_dataset`] or [`~datasets.load_from_disk`] reads,
              optionally with `name` (its configuration), `split` (defaults to `"train"`) and `revision`;
            - `parquet`: a path or pattern of Parquet files, or a list of them;
            - `webdataset`: a path, URL or pattern of `.tar` files, or a list of them;

            and optionally `source` (what the column `source` says; defaults to the name of the folder or repository) and
            `license`. All but folders also take `image_column` (defaults to the only column of images) and `license_column`
            (each row's license, in place of `license`).

    Raises:
        `ValueError`: If a spec is not usable or has no images.
        `FileNotFoundError`: If a folder is not there.
    """

    def __init__(self, specs: list[dict[str, Any]]):
        if not isinstance(specs, list) or not specs:
            raise ValueError(
                f"sources={specs!r} must be a list with at least one source, e.g. [{{'folder': 'photos'}}]."
            )
        self._parts: list[_Folder | _Rows] = []
        for number, spec in enumerate(specs):
            name = f"sources[{number}]"
            kind, options = _checked(spec, name)
            name = f"{name} ({kind}: {options[kind]})"
            part = _Folder(options, name) if kind == "folder" else _Rows(kind, options, name)
            if len(part) == 0:
                raise ValueError(f"{name} has no images: put some there, or leave the source out.")
            if "license" not in options and "license_column" not in options:
                logger.warning(
                    "%s has no license, so the card will call it unknown: state it with `license` or `license_column`.",
                    name,
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
        Reads some images.

        Args:
            start (`int`):
                Number of the first one.
            stop (`int`):
                Number of the one after the last.

        Returns:
            `dict[str, list]`: `content` (the bytes of the file, or `None`), `problem` (why there are none), `source`, `license` and
            `file` (the path inside the folder, or the number of the row).

        Raises:
            `OSError`: If a disk fails, as the image may be there the next time.
        """
        batch: Batch = {name: [] for name in ImageCheck.inputs}
        for part, first in zip(self._parts, self._starts, strict=False):
            here, there = max(start - first, 0), min(stop - first, len(part))
            if here < there:
                for name, values in part.read(here, there).items():
                    batch[name] += values
        return batch


def _checked(spec: Any, name: str) -> tuple[str, dict[str, Any]]:
    """The kind of a source, and its keys that have a value."""
    if not isinstance(spec, dict):
        raise ValueError(f"{name} must be a mapping with one of the keys {list(OPTIONS)}, but is {spec!r}.")
    options = {key: value for key, value in spec.items() if value is not None}
    kinds = [kind for kind in OPTIONS if kind in options]
    if len(kinds) != 1:
        raise ValueError(
            f"{name} must have exactly one of the keys {list(OPTIONS)}, but has {sorted(map(str, spec))}."
        )
    known = (kinds[0], "source", "license", *OPTIONS[kinds[0]])
    if unknown := sorted(str(key) for key in options if key not in known):
        raise ValueError(f"{name} has unknown keys {unknown}; a {kinds[0]} may have {list(known)}.")
    for key, value in options.items():
        values = value if isinstance(value, list) and key in ("parquet", "webdataset") else [value]
        if not values or any(not isinstance(one, str) or not one for one in values):
            raise ValueError(f"{name}: {key} must be text, but is {value!r}. In YAML, put it in quotes.")
    if "license" in options and "license_column" in options:
        raise ValueError(f"{name} has `license` and `license_column`: leave one out.")
    return kinds[0], options


def _read_file(path: str | Path) -> tuple[bytes | None, str | None]:
    """The bytes of a file, or what is wrong with this one. A failing disk is not a matter of the file, and raises."""
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
            raise OSError(error.errno, f"{name} cannot be read wholly: {error}. Give permission, or remove the folder")

        sizes: dict[str, int] = {}
        visited = set()
        for folder, subfolders, files in os.walk(self.root, onerror=fail, followlinks=True):
            if (place := os.path.realpath(folder)) in visited:  # linked to twice, or from inside itself
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
                        sizes[path.relative_to(self.root).as_posix()] = -1  # a link to nowhere
                        continue
                    if stat.S_ISREG(found.st_mode):  # to read a pipe is to wait forever
                        sizes[path.relative_to(self.root).as_posix()] = found.st_size
        self.files = sorted(sizes)
        self.sizes = [sizes[file] for file in self.files]
        # Not their content: a look at millions of files must not take hours.
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
                    f"{self.root / file} was there when the build started and is gone: is the disk still mounted? Run again to "
                    "go on."
                )
            contents.append(content)
            problems.append(problem)
        count = stop - start
        return {
            "content": contents,
            "problem": problems,
            "source": [self.source] * count,
            "license": [self.license] * count,
            # A name that is no UTF-8 cannot be written to a table.
            "file": [os.fsencode(file).decode("utf-8", "backslashreplace") for file in self.files[start:stop]],
        }


class _Rows:
    """The images of a dataset."""

    def __init__(self, kind: str, options: dict[str, Any], name: str):
        where = options[kind]
        try:
            if kind == "dataset":
                names = ("name", "split", "revision")
                dataset = load_split(where, **{name: options[name] for name in names if name in options})
            else:
                dataset = load_dataset(kind, data_files=where, split="train")
        except Exception as error:  # datasets raises errors of many kinds, the cause of some of them is in `__cause__`
            cause = f": {error.__cause__}" if error.__cause__ else ""
            raise ValueError(
                f"{name} cannot be loaded: {type(error).__name__}: {error}{cause}. Check its path or name, and its options."
            ) from error
        # Taken now, as it is that of the data alone
        self.digest = {"rows": len(dataset), "fingerprint": dataset._fingerprint}

        images = [column for column, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
        column = options.get("image_column") or (images[0] if len(images) == 1 else None)
        if column is None or column not in dataset.features:
            raise ValueError(
                f"{name}: {'there is no column ' + repr(column) if column else f'{len(images)} columns hold images {images}'}. Set "
                f"image_column to one of its columns {list(dataset.features)}."
            )
        feature = dataset.features[column]
        is_struct = isinstance(feature, dict) and {"bytes", "path"} & feature.keys()
        is_bytes = isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")
        if not (isinstance(feature, ImageFeature) or is_struct or is_bytes or is_text(feature)):
            raise ValueError(f"{name}: the column {column!r} must hold images, bytes or paths, but is {feature}.")
        license_column = options.get("license_column")
        if license_column is not None and not is_text(dataset.features.get(license_column)):
            raise ValueError(
                f"{name} has no column {license_column!r} of text: set license_column to one of {list(dataset.features)}, or state "
                "the license with `license`."
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
        self.source = options.get("source", default)

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
    """An image that can be read and must not be used."""


class ImageCheck:
    """
    Stage `sources`: brings images into one form, upright and in 8-bit sRGB without alpha, and rejects those that cannot be used.

    Bytes that need no change are kept as they are, with all metadata. All others are encoded anew without metadata, as PNG; only a
    JPEG that is scaled down becomes a JPEG again.

    Args:
        min_side (`int`, *optional*, defaults to `256`):
            Images with a shorter side, in pixels, are rejected.
        max_side (`int`, *optional*, defaults to `16384`):
            Images with a longer side, in pixels, are rejected before they are decoded.
        resolution (`int`, *optional*):
            Images larger than its square are scaled down to that area. By default all keep their size.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of images at once.

    Raises:
        `ValueError`: If an option is not usable.
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
                f"resolution={resolution} is below min_side={min_side}, so what is scaled down would be rejected: lower min_side."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        self.min_side = min_side
        self.max_side = max_side
        self.resolution = resolution
        self.batch_size = batch_size

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("min_side", "max_side", "resolution")}

    def load(self) -> None:
        """There is nothing to get ready."""

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
                    warnings.simplefilter("ignore")  # e.g. of odd metadata, or of many pixels, which `max_side` allows
                    stored, picture = self._read(content)
                    row |= {
                        "image": {"bytes": stored, "path": None},
                        "image_id": _pixel_digest(picture),
                        "image_hash": f"{perceptual_hash(picture):016x}",
                        "width": picture.width,
                        "height": picture.height,
                    }
            except _Rejected as rejected:
                row["reason"] = str(rejected)
            except UnidentifiedImageError:  # its text has an address in memory, which differs from run to run
                row["reason"] = f"unreadable: {'no image that is known here' if content else 'the file is empty'}"
            except Image.DecompressionBombError as error:
                row["reason"] = f"too large: {error}"
            except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
                row["reason"] = f"unreadable: {type(error).__name__}: {error}"
            for name, value in row.items():
                done[name].append(value)
        return done

    def _read(self, content: bytes) -> tuple[bytes, Image.Image]:
        """The bytes to keep of an image, and the picture that they hold."""
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        self._check_size(*image.size)
        frames = 1 if image.format in JPEGS else getattr(image, "n_frames", 1)
        if frames > 1:
            raise _Rejected(f"animated: {frames} frames")
        image.load()
        is_turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        # Pillow decodes such colors to 8 bits without a word.
        is_deep = image.format == "PNG" and content[24] == 16
        if _is_transparent(image, is_deep):
            raise _Rejected("transparent: not all of its pixels are opaque")

        upright = ImageOps.exif_transpose(image) if is_turned else image
        colors = _plain_colors(upright)
        profile = image.info.get("icc_profile")
        to_srgb = _to_srgb(profile, colors.mode) if profile else None
        size = self._fitted(*upright.size)
        is_scaled = size != upright.size
        has_changed = is_turned or is_deep or image.has_transparency_data or to_srgb is not None or is_scaled
        if image.format in KEPT_FORMATS and image.mode == "RGB" and not has_changed:
            return content, image

        picture = ImageCms.applyTransform(colors, to_srgb) if to_srgb else colors.convert("RGB")
        assert picture is not None
        if is_scaled:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        picture.info = {}  # Pillow would write the old profile and comment
        buffer = io.BytesIO()
        if is_scaled and image.format in JPEGS:
            picture.save(buffer, "JPEG", quality=95, subsampling=0)
            # What a reader will see
            picture = read_image({"bytes": buffer.getvalue(), "path": None}, "A scaled image")
        else:
            picture.save(buffer, "PNG")
        return buffer.getvalue(), picture

    def _check_size(self, width: int, height: int) -> None:
        if max(width, height) > self.max_side:
            raise _Rejected(f"too large: {width} x {height} pixels, at most {self.max_side}")
        fitted = self._fitted(width, height)
        if min(fitted) < self.min_side:
            scaled = f", scaled down to {fitted[0]} x {fitted[1]}" if fitted != (width, height) else ""
            raise _Rejected(f"too small: {width} x {height} pixels{scaled}, at least {self.min_side}")

    def _fitted(self, width: int, height: int) -> tuple[int, int]:
        """The size after scaling down."""
        if self.resolution is None or width * height <= self.resolution**2:
            return width, height
        scale = self.resolution / (width * height) ** 0.5
        return max(1, int(width * scale)), max(1, int(height * scale))


def _is_transparent(image: Image.Image, is_deep: bool) -> bool:
    """Whether any pixel is."""
    key = image.info.get("transparency")
    if image.mode.startswith("I"):
        return key is not None and bool((np.asarray(image) == key).any())
    if not image.has_transparency_data:
        return False
    if is_deep and isinstance(key, tuple):
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)  # as its colors have been
    return image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def _plain_colors(image: Image.Image) -> Image.Image:
    """The image in 8 bits without alpha, in grey, RGB or CMYK."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise _Rejected(f"unreadable: values from {values.min()} to {values.max()}, which are not of 16 bits")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise _Rejected("unreadable: floating-point values, whose range is not known")
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")


@lru_cache(maxsize=64)  # thousands of photographs share a few profiles
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The way from a color profile to sRGB; `None` if it is sRGB, or does not fit such pixels."""
    try:
        transform = ImageCms.buildTransform(io.BytesIO(profile), ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "RGB":
        # There are many profiles of sRGB, with as many names. What counts is whether colors change.
        levels = np.linspace(0, 255, 9).astype(np.uint8)
        colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
        moved = ImageCms.applyTransform(Image.fromarray(colors), transform)
        if np.abs(np.asarray(moved).astype(int) - colors).max() <= 2:
            return None
    return transform


def _pixel_digest(picture: Image.Image) -> str:
    size = f"{picture.width} x {picture.height}".encode()
    return hashlib.sha256(size + picture.tobytes()).hexdigest()[:16]


def perceptual_hash(image: Image.Image) -> int:
    """
    A hash of 64 bits that changes little when an image is scaled, compressed or slightly brightened: which of the lowest 8 x 8
    frequencies (DCT-II) of the image in 32 x 32 grey pixels lie above their median, the mean brightness left out of the median.
    After C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010.

    Args:
        image (`PIL.Image.Image`):
            The image.

    Returns:
        `int`: its first bit, the highest, is the mean brightness; the others follow row by row.
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    frequencies, places = np.arange(8)[:, None], np.arange(32)[None, :]
    cosines = np.cos(np.pi * frequencies * (2 * places + 1) / 64)
    # Rounded, as many are exactly zero in plain or symmetric images, and noise would decide their bits.
    spectrum = np.round(cosines @ grey @ cosines.T, 6).flatten()
    bits = spectrum > np.median(spectrum[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def find_near_duplicates(hashes: Sequence[int], max_distance: int) -> list[int | None]:
    """
    Finds hashes that are close to an earlier one. Those that are found do not count as earlier ones of others, so that a chain of
    similar images does not collapse into its first one.

    Two hashes of 64 bits that differ in `max_distance` bits or fewer agree wholly in one of any `max_distance + 1` parts of
    them. So only those that share a part are compared, and none is missed.

    Args:
        hashes (`Sequence[int]`):
            Hashes of 64 bits.
        max_distance (`int`):
            The largest number of bits in which two of them differ that are close.

    Returns:
        `list[int | None]`: for each hash the number of the first kept one that is close to it, or `None` if it is kept itself.
    """
    values = np.array([int(value) for value in hashes], dtype=np.uint64)
    parts = max_distance + 1
    edges = [64 * part // parts for part in range(parts + 1)]
    # For each part, the hashes that agree in it have a run of places, which fills up with the kept ones.
    buckets = []
    for low, high in zip(edges, edges[1:], strict=False):
        mask = np.uint64(2 ** (high - low) - 1)
        _, which, counts = np.unique(values >> np.uint64(low) & mask, return_inverse=True, return_counts=True)
        starts = np.cumsum(counts) - counts
        buckets.append((which.tolist(), starts.tolist(), starts.tolist(), np.empty(len(values), dtype=np.int64)))
    found: list[int | None] = []
    for i, value in enumerate(values):
        near = []
        for which, starts, ends, kept in buckets:
            candidates = kept[starts[which[i]] : ends[which[i]]]
            if len(candidates):
                close = np.flatnonzero(np.bitwise_count(values[candidates] ^ value) <= max_distance)
                near += [int(candidates[close[0]])] if len(close) else []
        found.append(min(near, default=None))
        if not near:
            for which, _, ends, kept in buckets:
                kept[ends[which[i]]] = i
                ends[which[i]] += 1
    return found


class Duplicates:
    """
    Stage `duplicates`: rejects images with the pixels of an earlier one, and those that look like an earlier one.

    Args:
        max_distance (`int`, *optional*, defaults to `4`):
            Two images look alike if their perceptual hashes differ in at most this number of their 64 bits.

    Raises:
        `ValueError`: If it is not in 0..64.
    """

    name = "duplicates"
    inputs = ("image_id", "image_hash")
    features = Features({})
    batch_size = None

    def __init__(self, max_distance: int = 4):
        if not 0 <= max_distance <= 64:
            raise ValueError(f"max_distance={max_distance} must be in 0..64.")
        self.max_distance = max_distance

    @property
    def settings(self) -> dict[str, Any]:
        return {"max_distance": self.max_distance}

    def load(self) -> None:
        """There is nothing to get ready."""

    def __call__(self, batch: Batch) -> Batch:
        ids = batch["image_id"]
        reasons: list[str | None] = [f"duplicate: same pixels as {image_id}" for image_id in ids]
        first: dict[str, int] = {}
        for row, image_id in enumerate(ids):
            first.setdefault(image_id, row)
        rows = list(first.values())
        hashes = [int(batch["image_hash"][row], 16) for row in rows]
        for i, near in enumerate(find_near_duplicates(hashes, self.max_distance)):
            reasons[rows[i]] = None
            if near is not None:
                bits = (hashes[i] ^ hashes[near]).bit_count()
                reasons[rows[i]] = f"near duplicate: {bits} bits from {ids[rows[near]]}"
        return {"reason": reasons}
