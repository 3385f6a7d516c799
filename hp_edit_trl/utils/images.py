"""Reading, hashing, encoding and arranging images."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

from datasets import Image as ImageFeature
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .secrets import redact_error


class UnreadableImageError(ValueError):
    """An image of a case cannot be decoded."""


def read_image(value: Any, name: str) -> Image.Image:
    """
    Reads an image: decoded, turned upright, in RGB.

    Args:
        value (`PIL.Image.Image`, `str` or `dict`):
            A PIL image, a path, or the encoded form of `datasets`.
        name (`str`):
            What an error calls it.

    Raises:
        [`UnreadableImageError`]: If it cannot be decoded.
    """
    try:
        if isinstance(value, str):
            value = {"path": value, "bytes": None}
        image = value if isinstance(value, Image.Image) else ImageFeature().decode_example(value)
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
        redact_error(error)  # an address may hold a token
        raise UnreadableImageError(f"{name} cannot be decoded: {type(error).__name__}: {error}") from error


def image_digest(value: Any) -> bytes:
    """
    SHA-256 of an image as it is stored: of the encoded bytes, of its file's content, or of the pixels of a PIL image.
    Images are not decoded for it; of a path without a file, the path is hashed.
    """
    if isinstance(value, Image.Image):
        pixels = value.convert("RGB")
        return hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).digest()
    content = value.get("bytes") if isinstance(value, dict) else None
    path = value.get("path") if isinstance(value, dict) else value
    if content is None and isinstance(path, str) and os.path.isfile(path):
        content = Path(path).read_bytes()
    return hashlib.sha256(content if content is not None else repr(path).encode()).digest()


def png_bytes(image: Image.Image, compress_level: int = 6) -> bytes:
    """The image in RGB as the content of a PNG file."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def comparison_sheet(rows: list[tuple[str, list[Image.Image]]], headings: list[str], height: int = 256) -> Image.Image:
    """
    Arranges images in a sheet: one row per case with its text below, one column per heading.

    Args:
        rows (`list[tuple[str, list[PIL.Image.Image]]]`):
            Text and images of each case.
        headings (`list[str]`):
            Heading of each column.
        height (`int`, *optional*, defaults to `256`):
            Height of each image in the sheet; small images are enlarged without smoothing.
    """
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
        limit = sheet.width - 2 * gap
        while text and draw.textlength(text, font=font) > limit:
            text = text[:-2].rstrip("….") + "…"
        draw.text((gap, top + height + 3), text, fill="black", font=font)
    return sheet
