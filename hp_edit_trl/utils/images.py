"""Reading, hashing, encoding and arranging images."""

import hashlib
import io
import os
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFile, ImageFont, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from .fonts import image_font
from .secrets import redact_error, redacted


# Formats that are decoded, whatever a file's name says. Pillow knows more, and starts Ghostscript for one of them.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# Pillow calls a JPEG with an appended preview or gain map, as phones write them, an "MPO".
JPEGS = ("JPEG", "MPO")

LOADING = threading.Lock()

# What turns an image upright, by the number of its EXIF orientation
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(ValueError):
    """An image of a case cannot be decoded."""


class TooLargeImageError(UnreadableImageError):
    """An image has more pixels than are decoded."""


def read_image(value: Any, name: str) -> Image.Image:
    """
    Reads an image: decoded, upright, in 8-bit sRGB, without transparency. This is the one way in which images are
    read, so that an editor, a judge and a person see the same. `docs/pictures.md` describes the rules.

    Args:
        value (`PIL.Image.Image`, `str`, `Path` or `dict`):
            A PIL image, a path, or the encoded form of `datasets`.
        name (`str`):
            What an error calls it.

    Returns:
        `PIL.Image.Image`: a new image in mode `"RGB"`, without metadata.

    Raises:
        [`UnreadableImageError`]: If it cannot be decoded: it is missing, broken, of a format that is not read, has
            more than `PIL.Image.MAX_IMAGE_PIXELS` pixels, or values of an unknown range.
    """
    try:
        return to_rgb(value if isinstance(value, Image.Image) else open_image(_content(value)))
    except UnreadableImageError as error:
        raise type(error)(f"{name} cannot be decoded: {with_path(error, value)}") from error
    except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
        redact_error(error)  # an address may hold a token
        told = f"{type(error).__name__}: {with_path(error, value)}"
        raise UnreadableImageError(f"{name} cannot be decoded: {told}") from error


def with_path(error: Exception, value: Any) -> str:
    """The text of an error about an image, with the image's file where it has one that the text does not name."""
    path = value.get("path") if isinstance(value, dict) else value
    named = redacted(str(path)) if isinstance(path, str | os.PathLike) else ""
    return str(error) if not named or named in str(error) else f"{error} (in {named!r})"


def _content(value: Any) -> bytes:
    """The encoded bytes of an image that `datasets` holds, or of a path."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"]
        value = value.get("path")
    if not isinstance(value, str | os.PathLike):
        what = "None" if value is None else f"of the type {type(value).__name__}"  # not its content, which may be long
        raise TypeError(f"it must be a PIL image, a path, or a dictionary with 'bytes' or 'path', but is {what}")
    if os.path.exists(value):
        return Path(value).read_bytes()
    with fsspec.open(str(value), "rb") as file:  # remote, or inside of an archive, as `datasets` names its files
        return file.read()


def open_image(content: bytes) -> Image.Image:
    """
    Opens the content of an image file. Its pixels are not decoded yet.

    Raises:
        [`UnreadableImageError`]: If its format is not one of `FORMATS`, or it is too large.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:  # its message has a memory address
        raise UnreadableImageError(
            f"not an image of a known format ({', '.join(FORMATS)})" if content else "the file is empty"
        ) from None
    except Image.DecompressionBombError as error:
        raise TooLargeImageError(f"{error}. Scale it down.") from None
    _check(image)
    return image


def _check(image: Image.Image) -> None:
    """Raises an error for an image that should not be decoded."""
    if image.format is not None and image.format not in (*FORMATS, *JPEGS):
        raise UnreadableImageError(f"its format is {image.format}; formats that are read: {', '.join(FORMATS)}")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise TooLargeImageError(
            f"{image.width} x {image.height} pixels, more than the {limit} that are decoded. Scale it down, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS."
        )
    if 0 in image.size:
        raise UnreadableImageError(f"it is empty: {image.width} x {image.height} pixels")


def raw_mode(image: Image.Image) -> str:
    """How the pixels of an image that is not decoded yet are stored, e.g. `"RGB;16B"`. Empty if it is decoded."""
    tile = image.tile if isinstance(image, ImageFile.ImageFile) else None
    arguments = tile[0].args if tile else None
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments or "")


def load_whole(image: Image.Image) -> None:
    """Decodes the pixels of an image. A truncated one raises an error."""
    if not ImageFile.LOAD_TRUNCATED_IMAGES:
        image.load()
        return
    # Some library in this process has told Pillow to fill up what is missing. Half an image would be trained on.
    with LOADING:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            image.load()
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = True


def to_rgb(image: Image.Image, stored: str = "") -> Image.Image:
    """
    Decodes an image: turned upright by its EXIF orientation, 16 bits scaled to 8, converted to sRGB with its color
    profile, and laid on white where it is transparent. Of several frames, the present one is taken.

    Args:
        image (`PIL.Image.Image`):
            The image. It is not modified.
        stored (`str`, *optional*):
            [`raw_mode`] of the image before it was decoded, if it is.

    Returns:
        `PIL.Image.Image`: a new image in mode `"RGB"`, without metadata.

    Raises:
        [`UnreadableImageError`]: If it is of a format that is not read, too large, empty, or has values of an unknown
            range. A broken image raises whatever Pillow raises.
    """
    _check(image)
    stored = stored or raw_mode(image)
    load_whole(image)
    alpha = alpha_channel(image, stored)
    colors = _eight_bits(image, stored)
    profile = image.info.get("icc_profile")
    to_srgb = _srgb_transform(profile, colors.mode) if profile or colors.mode == "LAB" else None
    picture = ImageCms.applyTransform(colors, to_srgb) if to_srgb else colors.convert("RGB")
    assert picture is not None
    if alpha is not None:
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=alpha)
        picture = white
    turn = TURNS.get(_orientation(image))
    if turn is not None:
        picture = picture.transpose(turn)
    picture.info = {}  # what is said there has been done, or would be written to files
    return picture


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken metadata, which viewers ignore as well
        return None


def alpha_channel(image: Image.Image, stored: str = "") -> Image.Image | None:
    """
    The opacity of each pixel of a decoded image, in mode `"L"`; `None` if all are opaque.

    Args:
        image (`PIL.Image.Image`):
            The image.
        stored (`str`, *optional*):
            [`raw_mode`] of the image before it was decoded: the transparent color of 16-bit images has 16 bits.
    """
    key = image.info.get("transparency")
    if image.mode.startswith("I"):
        if key is None:
            return None
        alpha = Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
    elif not image.has_transparency_data:
        return None
    else:
        if isinstance(key, tuple) and (";16" in stored or max(key) > 255):
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in key)  # like its colors
        alpha = _straight(image).convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _straight(image: Image.Image) -> Image.Image:
    """The image with colors that are not multiplied by alpha."""
    return image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode]) if image.mode in ("La", "RGBa") else image


def _eight_bits(image: Image.Image, stored: str) -> Image.Image:
    """The image in 8 bits without alpha, in grayscale, RGB, CMYK or LAB."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        low, high = values.min(), values.max()
        if low < 0 or high > 65535:
            raise UnreadableImageError(f"values from {low} to {high}, which do not fit 16 bits")
        # Of files in these formats, Pillow scales the values to 16 bits.
        if image.mode == "I" and image.format not in ("PNG", "PPM") and 0 < high < 256:
            raise UnreadableImageError(f"32-bit values up to {high}, which may be 8 or 16 bits: convert it to mode L")
        top = 4095 if stored == "I;12" else 65535
        # Pillow turns TIFF files in which 0 is white the right way up only if they have at most 8 bits.
        if isinstance(image, TiffImageFile) and image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == 0:
            values = top - values
        return Image.fromarray(((values * 255 + top // 2) // top).astype(np.uint8))
    if image.mode == "F":
        raise UnreadableImageError("floating-point values of unknown range: convert it to 8 bits")
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # Pillow warns of palettes with opacities that are converted to RGB
    return _straight(image).convert("L" if image.mode in ("1", "LA", "La") else "RGB")


@lru_cache(maxsize=64)  # thousands of photographs share a few profiles
def _srgb_transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a color profile to sRGB; `None` if it is sRGB already, or does not apply to such pixels."""
    try:
        source = io.BytesIO(profile) if profile else ImageCms.createProfile("LAB")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return _srgb_transform(None, mode) if profile and mode == "LAB" else None
    if mode == "RGB":
        # There are many sRGB profiles with different names, so the colors are compared.
        levels = np.linspace(0, 255, 9).astype(np.uint8)
        colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
        moved = ImageCms.applyTransform(Image.fromarray(colors), transform)
        if np.abs(np.asarray(moved).astype(int) - colors).max() <= 2:
            return None
    return transform


def image_digest(value: Any) -> bytes:
    """
    SHA-256 of an image as it is stored: of the encoded bytes, of its file's content, or of the pixels of a PIL image
    as [`read_image`] reads it. Images that are stored encoded are not decoded for it; of a path without a file, the
    path is hashed.

    Raises:
        [`UnreadableImageError`]: If it is a PIL image that cannot be read.
    """
    if isinstance(value, Image.Image):
        pixels = read_image(value, "An image")
        return hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).digest()
    content = value.get("bytes") if isinstance(value, dict) else None
    path = value.get("path") if isinstance(value, dict) else value
    if content is None and isinstance(path, str) and os.path.isfile(path):
        content = Path(path).read_bytes()
    return hashlib.sha256(content if content is not None else repr(path).encode()).digest()


def png_bytes(image: Image.Image, compress_level: int = 6) -> bytes:
    """The image, see [`read_image`], as the content of a PNG file."""
    buffer = io.BytesIO()
    read_image(image, "An image").save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def comparison_sheet(
    rows: list[tuple[str, list[Image.Image]]], headings: list[str], height: int = 256, across: int = 1
) -> Image.Image:
    """
    Arranges images in a sheet: one row per case with its text below, one column per heading.

    Args:
        rows (`list[tuple[str, list[PIL.Image.Image]]]`):
            Text and images of each case.
        headings (`list[str]`):
            Heading of each column.
        height (`int`, *optional*, defaults to `256`):
            Height of each image in the sheet; small images are enlarged without smoothing.
        across (`int`, *optional*, defaults to `1`):
            Number of cases side by side.
    """
    if across > 1:
        parts = [comparison_sheet(rows[i::across], headings, height) for i in range(min(across, len(rows)))]
        sheet = Image.new("RGB", (sum(part.width for part in parts), parts[0].height), "white")
        for i, part in enumerate(parts):
            sheet.paste(part, (sum(before.width for before in parts[:i]), 0))
        return sheet
    font = ImageFont.load_default(size=15)
    scaled = []
    for text, images in rows:
        fitted = []
        for image in images:
            method = Image.Resampling.NEAREST if image.height < height else Image.Resampling.LANCZOS
            fitted.append(image.resize((max(1, round(image.width * height / image.height)), height), method))
        scaled.append((text, fitted))
    columns = [max(images[i].width for _, images in scaled) for i in range(len(headings))]
    gap, line = 10, 26
    sheet = Image.new(
        "RGB", (sum(columns) + gap * (len(columns) + 1), line + gap + len(rows) * (height + line)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    left = gap
    for heading, width in zip(headings, columns, strict=True):
        draw.text((left, 6), heading, fill="black", font=font)
        left += width + gap
    for i, (text, images) in enumerate(scaled):
        top, left = line + i * (height + line), gap
        for image, width in zip(images, columns, strict=True):
            sheet.paste(image, (left, top))
            left += width + gap
        limit, font = sheet.width - 2 * gap, image_font(text, 15)
        while text and draw.textlength(text, font=font) > limit:
            text = text[:-2].rstrip("….") + "…"
        draw.text((gap, top + height + 3), text, fill="black", font=font)
    return sheet
