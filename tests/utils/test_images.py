import hashlib
import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from hp_edit_trl.utils.images import TooLargeImageError, UnreadableImageError, image_digest, png_bytes, read_image
from tests.helpers import photo


def test_an_image_is_read_from_every_form(tmp_path):
    image = photo(20, 10)
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    forms = (
        image,
        str(tmp_path / "a.png"),
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
    )
    for form in forms:
        assert np.array_equal(np.asarray(read_image(form, "x")), np.asarray(image))
    # Cameras store the rotation beside the pixels.
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.convert("L").save(buffer, "JPEG", exif=exif)
    upright = read_image({"bytes": buffer.getvalue(), "path": None}, "x")
    assert upright.size == (10, 20) and upright.mode == "RGB"
    for broken in (str(tmp_path / "nothing.png"), {"bytes": content[:40], "path": None}, 3):
        with pytest.raises(UnreadableImageError, match="The edit of case 'a' cannot be decoded"):
            read_image(broken, "The edit of case 'a'")


def test_a_digest_is_that_of_the_stored_image(tmp_path):
    image = photo(20, 10)
    (tmp_path / "a.png").write_bytes(png_bytes(image))
    content = (tmp_path / "a.png").read_bytes()
    expected = hashlib.sha256(content).digest()
    path = str(tmp_path / "a.png")
    for form in ({"bytes": content, "path": "elsewhere.png"}, {"bytes": None, "path": path}, path):
        assert image_digest(form) == expected
    assert image_digest(image) == image_digest(image.copy()) != image_digest(photo(20, 10, seed=1))
    assert image_digest("nothing.png") != image_digest(None)


PHOTO = photo(48, 32)
GREY = np.asarray(PHOTO.convert("L"))


def stored(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def png(width, height, depth, color, values=b"", *more):
    """A PNG by hand: of 16 bits per color, or of more pixels than it has."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)), *more]
    chunks += [(b"IDAT", zlib.compress(values)), (b"IEND", b"")]
    parts = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return {"bytes": b"\x89PNG\r\n\x1a\n" + b"".join(parts), "path": None}


def with_alpha(mode):
    image = PHOTO.convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
    return image


def on_white(colors):
    opacity = np.asarray(Image.linear_gradient("L").resize(PHOTO.size), float)[..., None] / 255
    return np.atleast_3d(np.asarray(colors, float)) * opacity + 255 * (1 - opacity)


def turned(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def palette_with_alpha():
    palette = PHOTO.quantize(16)
    return palette, stored(palette, transparency=bytes(range(0, 256, 16)))


def to_lab(image):
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")


def swapped_profile():
    """An RGB profile in which red and blue are exchanged: the columns of sRGB's matrix."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


def magenta_profile():
    """A CMYK profile in which the magenta alone decides: none is white, all of it is black."""
    corners = b"".join(bytes([0 if corner >> 2 & 1 else 255, 128, 128]) for corner in range(16))  # CIELAB
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table += bytes(range(256)) * 4 + corners + bytes(range(256)) * 3
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    start = 128 + 4 + 2 * 12
    index = struct.pack(">I4sII4sII", 2, b"A2B0", start, len(table), b"wtpt", start + len(table), len(white))
    size = start + len(table) + len(white)
    header = struct.pack(
        ">I4sI4s4s4s12s4s", size, b"\0" * 4, 0x02200000, b"prtr", b"CMYK", b"Lab ", b"\0" * 12, b"acsp"
    )
    header += b"\0" * 28 + white[8:]
    return header.ljust(128, b"\0") + index + table + white


def faults():
    """For each fault of the table an image with it, and the pixels that are to be read; `None` if it is refused."""
    deep = (np.asarray(PHOTO).astype(int) * 257).astype(">u2")
    colors = png(48, 32, 16, 2, b"".join(b"\0" + row.tobytes() for row in deep))
    palette, seen_through = palette_with_alpha()
    opacity = np.asarray(palette)[..., None] * 16 / 255
    key = tuple(int(value) for value in np.asarray(PHOTO)[0, 0])
    keyed = np.where((np.asarray(PHOTO) == key).all(-1, keepdims=True), 255, np.asarray(PHOTO))
    pale = Image.fromarray((np.asarray(PHOTO) // 4 + 96).astype(np.uint8))
    moving = stored(pale.convert("P"), "GIF", save_all=True, append_images=[PHOTO.convert("P")])
    whole = stored(photo(200, 200), "JPEG")["bytes"]
    upright = np.rot90(np.asarray(PHOTO), -1)
    eps = stored(PHOTO, "EPS")
    negative = stored(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF")
    tag = struct.pack("<HHIH", 262, 3, 1, 1)  # PhotometricInterpretation
    assert negative["bytes"].count(tag) == 1
    negative["bytes"] = negative["bytes"].replace(tag, struct.pack("<HHIH", 262, 3, 1, 0))
    drawn = np.random.default_rng(0).integers(0, 256, (32, 48, 4), dtype=np.uint8)
    drawn[..., 1] = 255 * (drawn[..., 1] > 127)
    inks = Image.fromarray(drawn, "CMYK")
    return {
        "orientation in EXIF": (stored(PHOTO, exif=turned(6)), upright),
        "16 bits, grayscale": (stored(Image.fromarray(GREY.astype(np.uint16) * 257)), GREY),
        "16 bits, grayscale, 0 is white": (negative, 255 - GREY),
        "16 bits, color": (colors, np.asarray(PHOTO)),
        "32-bit integers that hold 16 bits": (Image.fromarray(GREY.astype(np.int32) * 257), GREY),
        "32-bit integers up to 255": (PHOTO.convert("I"), None),
        "32-bit integers above 65,535": (Image.fromarray(GREY.astype(np.int32) * 70000), None),
        "floating-point values": (Image.fromarray(GREY.astype(np.float32) / 255), None),
        "alpha channel": (stored(with_alpha("RGB")), on_white(PHOTO)),
        "alpha channel of a grayscale image": (stored(with_alpha("L")), on_white(GREY)),
        "transparent palette color": (
            stored(palette, "GIF", transparency=int(np.asarray(palette)[0, 0])),
            np.where((np.asarray(palette) == np.asarray(palette)[0, 0])[..., None], 255, palette.convert("RGB")),
        ),
        "palette with an alpha channel": (
            seen_through, np.asarray(palette.convert("RGB")) * opacity + 255 * (1 - opacity),
        ),
        "transparent color of an RGB image": (stored(PHOTO, transparency=key), keyed),
        "CMYK with a profile": (
            stored(inks, "TIFF", icc_profile=magenta_profile()), 255 * (np.asarray(inks)[..., 1] == 0),
        ),
        "CMYK without a profile": (stored(PHOTO.convert("CMYK"), "TIFF"), np.asarray(PHOTO)),
        "wide-gamut RGB profile": (stored(PHOTO, icc_profile=swapped_profile()), np.asarray(PHOTO)[..., ::-1]),
        "broken profile": (stored(PHOTO, icc_profile=b"no profile"), np.asarray(PHOTO)),
        "LAB": (stored(to_lab(PHOTO), "TIFF"), np.asarray(PHOTO)),
        "animation": (moving, np.asarray(pale.convert("P").convert("RGB"))),
        "too many pixels": (png(9_500, 9_500, 8, 0), None),
        "far too many pixels": (png(30_000, 30_000, 8, 2), None),
        "EPS": (eps, None),
        "opened EPS": (Image.open(io.BytesIO(eps["bytes"])), None),
        "other formats": (stored(PHOTO, "TGA"), None),
        "truncated file": ({"bytes": whole[: len(whole) // 2], "path": None}, None),
        "empty file": ({"bytes": b"", "path": None}, None),
        "no file": ("/nowhere/a.png", None),
        "text": ({"bytes": b"This is not a picture.", "path": None}, None),
        "no pixels": (Image.new("RGB", (0, 5)), None),
    }  # fmt: skip


def test_every_fault_ends_as_the_table_says():
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    section = re.split(r"^## ", page, flags=re.MULTILINE)
    (section,) = (text for text in section if text.startswith("Pictures\n"))
    table = dict(re.findall(r"^\| (.+?) \| ((?:read|refused): .+?) \|$", section, re.MULTILINE))
    tried = faults()
    assert table.keys() == tried.keys()
    for fault, (value, wanted) in tried.items():
        if wanted is None:
            with pytest.raises(UnreadableImageError) as error:
                read_image(value, "The edit of case 'a'")
            told = table[fault].removeprefix("refused: ")
            assert str(error.value).startswith("The edit of case 'a' cannot be decoded: "), fault
            assert told in str(error.value), (fault, error.value)
            assert isinstance(error.value, TooLargeImageError) == fault.endswith("too many pixels")
            continue
        assert table[fault].startswith("read: "), fault
        image = read_image(value, "x")
        assert image.mode == "RGB" and image.info == {} and not image.getexif(), fault
        wanted = np.broadcast_to(np.atleast_3d(wanted), (image.height, image.width, 3))
        assert np.abs(np.asarray(image) - wanted.astype(float)).max() <= (
            20 if fault in ("LAB", "animation") else 3
        ), fault
        again = read_image(image, "x")  # nothing is done twice
        assert again is not image and again.tobytes() == image.tobytes()


@pytest.mark.parametrize("number", range(1, 9))
def test_orientations_of_files_and_of_opened_images(number):
    value = stored(PHOTO, "TIFF" if number % 2 else "PNG", exif=turned(number))
    by_hand = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90,
    }[number]  # fmt: skip
    opened = Image.open(io.BytesIO(value["bytes"]))
    for form in (value, opened, opened.copy()):
        assert np.array_equal(np.asarray(read_image(form, "x")), by_hand(np.asarray(PHOTO)))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(opened)))), by_hand(np.asarray(PHOTO)))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000"])
def test_half_an_image_is_refused_whatever_pillow_was_told(format, monkeypatch):
    content = stored(photo(64, 64), format)["bytes"]
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UnreadableImageError):
        read_image({"bytes": content[: len(content) // 2], "path": None}, "x")
    assert read_image({"bytes": content, "path": None}, "x").size == (64, 64)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_the_limit_is_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 32 - 1)
    for form in (PHOTO, stored(PHOTO)):
        with pytest.raises(TooLargeImageError, match="48 x 32 pixels, more than the 1535 .* Scale it down, or raise"):
            read_image(form, "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(PHOTO, "x").size == (48, 32)


def test_a_digest_tells_apart_what_is_read_differently():
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    forms = [PHOTO, with_alpha("RGB"), deep, Image.open(io.BytesIO(stored(PHOTO, exif=turned(3))["bytes"]))]
    assert len({image_digest(form) for form in forms}) == 4
    for form in forms:
        assert image_digest(form) == image_digest(read_image(form, "x"))
    with pytest.raises(UnreadableImageError):
        image_digest(PHOTO.convert("F"))
