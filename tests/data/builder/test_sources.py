"""Images of every kind and origin: which are kept, with which pixels, and why others are rejected."""

import io
import json
import logging
import os
import pickle
import random
import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import imagehash
import numpy as np
import pyarrow as pa
import pytest
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from huggingface_hub import HfApi
from PIL import Image, ImageCms, ImageOps, ImageSequence

from hp_edit_trl.data.builder.duplicates import Duplicates
from hp_edit_trl.data.builder.engine import WorkFolder, run_stage
from hp_edit_trl.data.builder.sources import ImageCheck, Sources
from hp_edit_trl.tasks import TASKS
from hp_edit_trl.utils.images import image_digest, read_image
from tests.fake_hub import fake_hub
from tests.helpers import photo
from tests.processes import Script


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def check(*contents: bytes, **options) -> list[dict]:
    """What becomes of files. No warning of Pillow gets out."""
    count = len(contents)
    batch = {
        "content": list(contents),
        "problem": [None] * count,
        "source": ["test"] * count,
        "license": [None] * count,
        "tasks": ["add"] * count,
    }
    stage = ImageCheck(**{"min_side": 8, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = stage({**batch, "file": [str(i) for i in range(count)]})
    assert done.keys() == {*stage.features, "reason"} and {len(values) for values in done.values()} == {count}
    return [dict(zip(done, values, strict=True)) for values in zip(*done.values(), strict=True)]


def pixels(row: dict) -> np.ndarray:
    """The pixels of a row that was kept. Its other columns fit them."""
    assert row["reason"] is None, row["reason"]
    image = read_image(row["image"], "The image")
    assert image.size == (row["width"], row["height"])
    assert row["image_id"] == image_digest(image).hex()[:16] and row["image_hash"] == str(imagehash.phash(image))
    return np.asarray(image).astype(int)


def png(width: int, height: int, depth: int, color: int, lines: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand, for what Pillow cannot write."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    written = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def deep_png(values: np.ndarray, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG with 16 bits a value, grey or in color."""
    rows = values.astype(">u2").reshape(len(values), -1)
    color = {2: 0, 3: {3: 2, 4: 6}.get(values.shape[-1])}[values.ndim]
    return png(values.shape[1], values.shape[0], 16, color, b"".join(b"\0" + row.tobytes() for row in rows), *more)


PHOTO = photo(48, 32)


@pytest.fixture(autouse=True)
def no_trace_in_the_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


# What is kept as it is


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_bytes_that_need_no_change_are_kept(format):
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    content = encoded(PHOTO, format, exif=exif)
    (row,) = check(content)
    assert row["image"] == {"bytes": content, "path": None}
    assert (pixels(row) == np.asarray(Image.open(io.BytesIO(content)))).all()
    assert (row["source"], row["license"], row["file"]) == ("test", None, "0")


def test_a_jpeg_with_a_second_picture_behind_it_is_a_photograph():
    content = encoded(PHOTO, "MPO", save_all=True, append_images=[photo(24, 16)])
    assert Image.open(io.BytesIO(content)).n_frames == 2
    (row,) = check(content)
    assert row["image"]["bytes"] == content and pixels(row).shape == (32, 48, 3)


# What is encoded anew


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_every_orientation_is_applied(format, orientation):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "a camera"
    content = encoded(PHOTO, format, exif=exif)
    (row,) = check(content)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert (pixels(row) == np.asarray(upright)).all()
    # Against numpy, as the above is what the package calls: https://exiftool.org/TagNames/EXIF.html
    by_hand = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    assert (pixels(row) == by_hand(np.asarray(Image.open(io.BytesIO(content))))).all()
    assert (row["image"]["bytes"] == content) == (orientation == 1)
    if orientation > 1:
        assert not Image.open(io.BytesIO(row["image"]["bytes"])).getexif()


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.random.default_rng(0).integers(0, 65536, (16, 16, 3))
    values[0, :3, 0] = 0, 65535, 300
    grey, color, alpha = values[..., 0], values, np.dstack([values, np.full((16, 16), 65535)])
    tiff = encoded(Image.fromarray(grey.astype(np.uint16)), "TIFF")
    wide = encoded(Image.fromarray(grey.astype(np.int32)), "TIFF")  # 32 bits that hold 16
    rows = check(deep_png(grey), tiff, wide, deep_png(color), deep_png(alpha))
    for row, true in zip(rows, [grey, grey, grey, color, color], strict=True):
        true = true if true.ndim == 3 else np.repeat(true[..., None], 3, axis=2)
        assert np.abs(pixels(row) - true / 257).max() <= 1
        assert Image.open(io.BytesIO(row["image"]["bytes"])).format == "PNG"
        assert row["image"]["bytes"][24] == 8  # bits


def test_values_of_an_unknown_range_are_rejected():
    values = np.random.default_rng(0).random((16, 16), dtype=np.float32)
    large = (values * 2**24).astype(np.int32)
    reals, integers, negative = check(*(encoded(Image.fromarray(one), "TIFF") for one in (values, large, -large)))
    assert reals["reason"].startswith("unreadable: floating-point values of unknown range")
    assert "which do not fit 16 bits" in integers["reason"] and "unreadable: values from -" in negative["reason"]


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format):
    content = encoded(PHOTO.convert("CMYK"), format, **({"quality": 95} if format == "JPEG" else {}))
    (row,) = check(content)
    assert np.abs(pixels(row) - np.asarray(PHOTO)).mean() < 3
    assert Image.open(io.BytesIO(row["image"]["bytes"])).mode == "RGB"
    # A profile that is none, or of other colors, does no harm.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (b"no profile", srgb):
        (other,) = check(encoded(PHOTO.convert("CMYK"), format, icc_profile=profile))
        assert np.abs(pixels(other) - np.asarray(PHOTO)).mean() < 6


def test_grey_palette_and_bilevel_become_rgb():
    grey, palette = PHOTO.convert("L"), PHOTO.quantize(16)
    bilevel = PHOTO.convert("1")
    for image in (grey, palette, bilevel):
        for format in ("PNG", "TIFF", "GIF"):
            (row,) = check(encoded(image, format))
            assert (pixels(row) == np.asarray(image.convert("RGB"))).all(), (image.mode, format)
    (row,) = check(encoded(grey, "JPEG", quality=100))
    assert np.ptp(pixels(row), axis=2).max() == 0


D65, D50 = np.array([0.95047, 1, 1.08883]), np.array([0.9642, 1, 0.8249])


def to_xyz(red: tuple[float, float]) -> np.ndarray:
    """The matrix from linear values to XYZ, for the primaries of sRGB with another red."""
    columns = [[x / y, 1, (1 - x - y) / y] for x, y in (red, (0.30, 0.60), (0.15, 0.06))]
    matrix = np.array(columns).T
    return matrix * np.linalg.solve(matrix, D65)


def gamma_profile(gamma: float | None, red: tuple[float, float] = (0.64, 0.33), space: bytes = b"RGB ") -> bytes:
    """An ICC profile by hand: primaries of sRGB or another red, and as curve a power or that of sRGB as a table."""
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    adapted = np.linalg.inv(bradford) @ np.diag(bradford @ D50 / (bradford @ D65)) @ bradford
    matrix = adapted @ to_xyz(red)

    def fixed(*numbers: float) -> bytes:
        return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)

    values = np.linspace(0, 1, 1024)
    table = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4) * 65535
    numbers = [round(gamma * 256), 0] if gamma else table.round().astype(int).tolist()
    curve = b"curv\0\0\0\0" + struct.pack(f">I{len(numbers)}H", 1 if gamma else 1024, *numbers)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50), b"kTRC": curve}
    for i, name in enumerate(b"rgb" if space == b"RGB " else b""):
        tags[bytes([name]) + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*matrix[:, i])
        tags[bytes([name]) + b"TRC"] = curve
    index, data = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        index += name + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(value))
        data += value
    header = struct.pack(
        ">I4sI4s4s4s12s4s",
        128 + len(index) + len(data),
        b"\0" * 4,
        0x02200000,
        b"mntr",
        space,
        b"XYZ ",
        b"\0" * 12,
        b"acsp",
    )
    return (header + b"\0" * 28 + fixed(*D50)).ljust(128, b"\0") + index + data


def gamma_of_srgb(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(("gamma", "red"), [(1.0, (0.64, 0.33)), (1.8, (0.64, 0.33)), (2.2, (0.68, 0.32))])
def test_other_profiles_are_converted_to_srgb(gamma, red):
    (row,) = check(encoded(PHOTO, "PNG", icc_profile=gamma_profile(gamma, red)))
    linear = (np.asarray(PHOTO) / 255) ** gamma @ (np.linalg.inv(to_xyz((0.64, 0.33))) @ to_xyz(red)).T
    assert np.abs(pixels(row) - 255 * gamma_of_srgb(linear.clip(0, 1))).max() <= 2
    assert np.abs(pixels(row) - np.asarray(PHOTO)).max() > 5
    assert "icc_profile" not in Image.open(io.BytesIO(row["image"]["bytes"])).info


def test_a_grey_profile():
    grey = PHOTO.convert("L")
    (row,) = check(encoded(grey, "PNG", icc_profile=gamma_profile(1.0, space=b"GRAY")))
    assert np.abs(pixels(row)[..., 1] - 255 * gamma_of_srgb(np.asarray(grey) / 255)).max() <= 2


def test_srgb_under_any_name_is_kept():
    contents = [
        encoded(PHOTO, format, icc_profile=profile)
        for format in ("JPEG", "PNG", "WEBP")
        for profile in (
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
            gamma_profile(None),
            gamma_profile(None, space=b"GRAY"),  # does not fit such pixels
            b"no profile",
        )
    ]
    for row, content in zip(check(*contents), contents, strict=True):
        assert row["image"]["bytes"] == content


# Alpha, and more than one picture


def test_an_opaque_alpha_channel_is_dropped_and_any_other_is_rejected():
    opaque, seen_through = PHOTO.copy(), PHOTO.copy()
    opaque.putalpha(255)
    mask = Image.new("L", PHOTO.size, 255)
    mask.putpixel((3, 4), 254)
    seen_through.putalpha(mask)
    for format in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        kept, rejected = check(encoded(opaque, format, **options), encoded(seen_through, format, **options))
        assert (pixels(kept) == np.asarray(PHOTO)).all()
        assert Image.open(io.BytesIO(kept["image"]["bytes"])).mode == "RGB"
        assert rejected["reason"] == "transparent: not all of its pixels are opaque" and rejected["image"] is None
    kept, rejected = check(encoded(opaque.convert("LA"), "PNG"), encoded(seen_through.convert("LA"), "PNG"))
    assert (pixels(kept) == np.asarray(PHOTO.convert("L").convert("RGB"))).all()
    assert rejected["reason"].startswith("transparent: ")


def test_transparent_colors():
    palette = PHOTO.quantize(16)
    used, unused = int(np.asarray(palette)[0, 0]), 15 if 15 not in np.asarray(palette) else 200
    for format in ("PNG", "GIF"):
        kept, rejected = check(
            encoded(palette, format, transparency=unused), encoded(palette, format, transparency=used)
        )
        assert (pixels(kept) == np.asarray(palette.convert("RGB"))).all()
        assert rejected["reason"].startswith("transparent: ")
    grey = np.asarray(PHOTO.convert("L"))
    (kept, rejected) = (
        check(encoded(Image.fromarray(grey), "PNG", transparency=value))[0]
        for value in (next(value for value in range(256) if value not in grey), int(grey[0, 0]))
    )
    assert (pixels(kept)[..., 0] == grey).all() and rejected["reason"].startswith("transparent: ")
    (kept,) = check(encoded(PHOTO, "PNG", transparency=(1, 2, 3)))  # a color that no pixel has
    assert (pixels(kept) == np.asarray(PHOTO)).all()
    assert "transparency" not in Image.open(io.BytesIO(kept["image"]["bytes"])).info
    deep = np.random.default_rng(0).integers(0, 60000, (16, 16, 3))
    for values in (deep, deep[..., 0]):
        key = np.atleast_1d(values[0, 0])
        used, unused = (struct.pack(f">{len(key)}H", *one) for one in (key, np.full(len(key), 65535)))
        kept, rejected = check(deep_png(values, (b"tRNS", unused)), deep_png(values, (b"tRNS", used)))
        assert pixels(kept).shape == (16, 16, 3) and rejected["reason"].startswith("transparent: ")


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animated_images_are_rejected(format):
    frames = [photo(16, 16, seed) for seed in range(3)]
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(content))))) == 3
    one, several = check(encoded(frames[0], format), content)
    assert one["reason"] is None and several["reason"] == "animated: 3 frames"
    assert several["image"] is several["image_id"] is several["width"] is None and several["file"] == "1"


# Sizes


def test_sizes():
    rows = check(*(encoded(photo(*size), "PNG") for size in [(8, 20), (20, 7), (1, 1), (40, 9), (41, 9)]), max_side=40)
    assert [row["reason"] for row in rows] == [
        None,
        "too small: 20 x 7 pixels, at least 8",
        "too small: 1 x 1 pixels, at least 8",
        None,
        "too large: 41 x 9 pixels, at most 40",
    ]


def test_large_images_are_rejected_by_their_header():
    wide = encoded(Image.new("L", (20_000, 300)), "PNG")
    # What says that it has 30,000 x 30,000 pixels has none.
    bomb, empty = png(30_000, 30_000, 8, 2, b""), png(16_000, 5_000, 8, 2, b"")
    many = png(9_500, 9_500, 8, 0, b"")  # Pillow would only warn of these 90 megapixels
    rows = check(wide, bomb, empty, many, max_side=16384)
    assert rows[0]["reason"] == "too large: 20000 x 300 pixels, at most 16384"
    assert rows[1]["reason"].startswith("too large: ")
    assert rows[2]["reason"].startswith("unreadable: ") and rows[3]["reason"].startswith("too large: 9500 x 9500 ")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_large_images_are_scaled_down_to_an_area(format):
    large = photo(300, 180)
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    options = {"comment": b"a comment"} if format == "JPEG" else {}
    content = encoded(large, format, exif=exif, **options, **({"lossless": True} if format == "WEBP" else {}))
    small = encoded(photo(64, 64), format)
    row, kept = check(content, small, resolution=64)
    scale = 64 / (300 * 180) ** 0.5
    assert (row["width"], row["height"]) == (int(300 * scale), int(180 * scale)) == (82, 49)
    stored = Image.open(io.BytesIO(row["image"]["bytes"]))
    decoded = Image.open(io.BytesIO(content)).resize((82, 49), Image.Resampling.LANCZOS)
    difference = np.abs(pixels(row) - np.asarray(decoded))
    if format == "JPEG":
        assert stored.format == "JPEG" and difference.mean() < 2
        assert [component[1:3] for component in stored.layer] == [(1, 1)] * 3  # 4:4:4
        assert stored.quantization == Image.open(io.BytesIO(encoded(decoded, "JPEG", quality=95))).quantization
    else:
        assert stored.format == "PNG" and difference.max() == 0
    assert not stored.getexif() and "comment" not in stored.info
    assert kept["image"]["bytes"] == small


def test_a_rotated_image_is_scaled_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    (row,) = check(encoded(photo(300, 200), "JPEG", exif=exif), resolution=64)
    assert pixels(row).shape == (78, 52, 3)


def test_what_is_too_small_after_scaling_is_rejected():
    content = encoded(photo(400, 10), "PNG")
    long, kept = check(content, content, resolution=20)[0], check(content)[0]
    assert (
        long["reason"] == "too small: 400 x 10 pixels, scaled down to 126 x 3, at least 8" and kept["reason"] is None
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_side": 0}, "min_side=0 must be at least 1"),
        ({"min_side": 9, "max_side": 8}, "min_side=9 .* at most max_side=8"),
        ({"resolution": 7}, "resolution=7 is below min_side=8.*lower min_side"),
        ({"batch_size": 0}, "batch_size=0 must be an integer of at least 1"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        check(**options)


# What cannot be read


def test_broken_files_are_rejected_whatever_is_wrong_with_them():
    whole = {
        format: encoded(photo(64, 64), format) for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000")
    }
    contents = {f"half a {format}": content[: len(content) // 2] for format, content in whole.items()}
    contents |= {f"the head of a {format}": content[:20] for format, content in whole.items()}
    contents |= {"empty": b"", "text": b"This is not a picture.", "zeros": bytes(1000)}
    contents["an icon, which Pillow could read"] = encoded(photo(64, 64), "ICO")
    contents["postscript"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n"
    damaged = bytearray(whole["PNG"])
    damaged[len(damaged) // 2] ^= 0xFF
    contents["a PNG with a wrong checksum"] = bytes(damaged)
    for name, row in zip(contents, check(*contents.values()), strict=True):
        assert row["reason"] and row["reason"].startswith("unreadable: "), (name, row["reason"])
        assert row["image"] is None and row["image_id"] is None and row["source"] == "test"
        assert "0x" not in row["reason"]  # nor anything else that changes from run to run
    assert check(b"")[0]["reason"] == "unreadable: the file is empty"


def test_no_damage_raises():
    draw = random.Random(0)
    icc = gamma_profile(1.8)
    wholes = [encoded(photo(24, 24), format, icc_profile=icc) for format in ("JPEG", "PNG", "WEBP", "TIFF")]
    wholes += [
        encoded(photo(24, 24), "GIF"),
        encoded(photo(24, 24).convert("CMYK"), "TIFF"),
        deep_png(np.ones((9, 9, 3))),
    ]
    contents = []
    for content in wholes * 40:
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 3, 20])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        contents.append(bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])]))
    rows = check(*contents)
    kept = [row for row in rows if row["reason"] is None]
    assert 0 < len(kept) < len(rows)
    for row in kept:  # and what is kept, a later stage can read
        pixels(row)
    assert {row["reason"].partition(":")[0] for row in rows if row["reason"]} <= {
        "unreadable", "too large", "too small", "transparent", "animated",
    }  # fmt: skip


# Folders


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "Photos"
    (root / "b").mkdir(parents=True)
    (root / ".thumbnails").mkdir()
    (root / "ein Ordner.jpg").mkdir()
    content = encoded(PHOTO, "PNG")
    for name in (
        "b/2.png",
        "b/10.PNG",
        "猫 ü.webp",
        "a.jpg",
        ".hidden.png",
        ".thumbnails/a.png",
        "ein Ordner.jpg/c.jpeg",
    ):
        (root / name).write_bytes(content)
    (root / "text.jpg").write_text("not a picture")
    (root / "notes.txt").write_text("no image")
    (root / "empty.gif").touch()
    (root / "nowhere.png").symlink_to(root / "gone")
    os.mkfifo(root / "pipe.png")
    return root


def test_a_folder(folder, caplog):
    sources = Sources([{"folder": str(folder), "license": "cc0-1.0"}])
    files = [
        "a.jpg",
        "b/10.PNG",
        "b/2.png",
        "ein Ordner.jpg/c.jpeg",
        "empty.gif",
        "nowhere.png",
        "text.jpg",
        "猫 ü.webp",
    ]
    batch = sources.read(0, len(sources))
    assert batch["file"] == files and len(sources) == len(files)
    assert batch["source"] == ["Photos"] * 8 and batch["license"] == ["cc0-1.0"] * 8
    assert batch["problem"] == [None] * 5 + ["No such file or directory"] + [None] * 2
    assert batch["content"][5] is None and batch["content"][4] == b"" and batch["content"][0] == encoded(PHOTO, "PNG")
    assert sources.read(2, 4) == {name: values[2:4] for name, values in batch.items()}
    done = ImageCheck(min_side=8)(batch)
    assert [reason and reason.partition(":")[0] for reason in done["reason"]] == [None] * 4 + ["unreadable"] * 3 + [
        None
    ]
    assert done["reason"][5] == "unreadable: No such file or directory"
    assert not caplog.records
    other = pickle.loads(pickle.dumps(sources))  # as a worker gets it
    assert other.read(0, 8) == batch and other.settings == sources.settings


def test_linked_folders_are_followed_once(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "d.png").write_bytes(b"")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    files = Sources([{"folder": str(folder)}]).read(0, 100)["file"]
    assert files.count("linked/d.png") == 1 and len(files) == 9


def test_a_name_that_is_no_text(tmp_path):
    (tmp_path / os.fsdecode(b"\xff\xfe.png")).write_bytes(encoded(PHOTO, "PNG"))
    batch = Sources([{"folder": str(tmp_path)}]).read(0, 1)
    assert batch["file"] == ["\\xff\\xfe.png"] and batch["content"][0]
    pa.array(batch["file"])


def test_a_source_that_changes_is_another_one(folder, tmp_path):
    spec = {"folder": str(folder)}
    before = Sources([spec]).settings
    assert Sources([spec]).settings == before == json.loads(json.dumps(before))
    assert Sources([{**spec, "license": "mit"}]).settings != before
    (folder / "a.jpg").write_bytes(b"another one")
    changed = Sources([spec]).settings
    (folder / "a.jpg").rename(folder / "z.jpg")
    assert before != changed != Sources([spec]).settings != before


def test_a_disk_that_is_gone_is_no_reason_to_reject(folder):
    (folder / "0.png").symlink_to(folder / "b" / "2.png")
    sources = Sources([{"folder": str(folder)}])
    (folder / "a.jpg").unlink()
    (folder / "b" / "2.png").unlink()
    for number, name in ((1, "a.jpg"), (0, "0.png")):
        with pytest.raises(
            FileNotFoundError, match=f"{name} existed when the build started and is gone: .* run again"
        ):
            sources.read(number, number + 1)


# Datasets


def rows(count: int = 5) -> Dataset:
    values = [{"photo": photo(16, 16, seed=i), "terms": "cc0" if i % 2 else None, "n": i} for i in range(count)]
    return Dataset.from_list(values, on_mixed_types=None).cast_column("photo", ImageFeature())


def same_pictures(batch: dict, count: int = 5) -> None:
    assert batch["file"] == [str(i) for i in range(count)] and batch["problem"] == [None] * count
    for i, content in enumerate(batch["content"]):
        assert (np.asarray(Image.open(io.BytesIO(content))) == np.asarray(photo(16, 16, seed=i))).all()


def write_archives(folder: Path, per_archive: int) -> None:
    for i in range(5):
        with tarfile.open(folder / f"{i // per_archive}.tar", "a") as archive:
            for name, content in (
                (f"{i:03d}.png", encoded(photo(16, 16, seed=i), "PNG")),
                (f"{i:03d}.txt", b"a text"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def test_datasets_from_everywhere(tmp_path):
    dataset = rows()
    (tmp_path / "shards").mkdir()
    for i in range(2):
        dataset.select(range(3 * i, min(5, 3 * i + 3))).to_parquet(str(tmp_path / "shards" / f"{i}.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"old": dataset}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "tars").mkdir()
    write_archives(tmp_path / "tars", per_archive=3)
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        photo(16, 16, seed=i).save(tmp_path / "pictures" / f"{i}.png")
    specs = [
        {"parquet": str(tmp_path / "shards" / "*.parquet"), "license_column": "terms"},
        {"parquet": [str(tmp_path / "shards" / f"{i}.parquet") for i in range(2)], "image_column": "photo"},
        {"dataset": str(tmp_path / "saved"), "license": "mit", "source": "mine"},
        {"dataset": str(tmp_path / "splits"), "split": "old"},
        {"dataset": str(tmp_path / "shards"), "split": "train[:5]"},
        {"webdataset": str(tmp_path / "tars" / "*.tar")},
        {"dataset": str(tmp_path / "pictures")},  # paths, no bytes
    ]
    names = ["shards", "shards", "mine", "splits", "shards", "tars", "pictures"]
    sources = Sources(specs)
    assert len(sources) == 35 and len({json.dumps(one) for one in sources.settings["sources"]}) == 7
    assert Sources(specs).settings == sources.settings
    batch = sources.read(0, 35)
    for number, name in enumerate(names):
        part = {column: values[5 * number : 5 * number + 5] for column, values in batch.items()}
        same_pictures(part)
        assert part["source"] == [name] * 5
        terms = {0: [None, "cc0"] * 2 + [None], 2: ["mit"] * 5}.get(number, [None] * 5)
        assert part["license"] == terms
    # Across the border of two sources, and from another process
    assert pickle.loads(pickle.dumps(sources)).read(3, 12) == {name: values[3:12] for name, values in batch.items()}


def on_the_hub(folder: str) -> None:
    """Called in a process that knows the local Hub."""
    commit = rows().push_to_hub("someone/photos")
    HfApi().create_repo("someone/tars", repo_type="dataset")
    HfApi().upload_file(
        path_or_fileobj=f"{folder}/0.tar", path_in_repo="0.tar", repo_id="someone/tars", repo_type="dataset"
    )
    url = f"{os.environ['HF_ENDPOINT']}/datasets/someone/tars/resolve/main/0.tar"
    specs = [{"dataset": "someone/photos", "revision": commit.oid}, {"webdataset": url}]
    sources = Sources(specs)
    assert len(sources) == 10
    same_pictures(sources.read(0, 5))
    same_pictures(sources.read(5, 10))
    assert set(sources.read(0, 5)["source"]) == {"someone/photos"} and set(sources.read(5, 10)["source"]) == {"main"}
    # A later commit is another source, unless the first is asked for.
    rows(6).push_to_hub("someone/photos")
    assert Sources(specs).settings == sources.settings
    newest = [{"dataset": "someone/photos"}]
    assert len(Sources(newest)) == 6 and Sources(newest).settings != sources.settings


def test_rows_without_a_picture(tmp_path):
    there = tmp_path / "there.png"
    PHOTO.save(there)
    values = [str(there), str(tmp_path / "gone.png"), None]
    Dataset.from_dict({"path": values}).to_parquet(str(tmp_path / "paths.parquet"))
    Dataset.from_dict({"raw": [there.read_bytes(), b"", None]}).to_parquet(str(tmp_path / "bytes.parquet"))
    paths, raw = (
        {"parquet": str(tmp_path / f"{name}.parquet"), "image_column": column}
        for name, column in (("paths", "path"), ("bytes", "raw"))
    )
    batch = Sources([paths, raw]).read(0, 6)
    content = there.read_bytes()
    assert batch["content"] == [content, None, None, content, b"", None]
    assert batch["problem"] == [
        None,
        "No such file or directory",
        "the row has no image",
        None,
        None,
        "the row has no image",
    ]


@pytest.mark.slow
def test_a_pinned_repository_and_an_archive_behind_a_url(tmp_path):
    write_archives(tmp_path, per_archive=5)
    with fake_hub() as hub:
        code = f"import tests.data.builder.test_sources as t; t.on_the_hub({str(tmp_path)!r})"
        done = Script("-c", code, environment=hub.env).wait()
    assert done.returncode == 0, done.stderr


def test_a_source_without_a_license_is_mentioned_once(folder, caplog):
    with caplog.at_level(logging.WARNING):
        sources = Sources([{"folder": str(folder)}, {"folder": str(folder / "b"), "license": "cc0-1.0"}])
        sources.read(0, len(sources))
    (record,) = caplog.records
    assert record.getMessage().startswith(f"sources[0] (folder: {folder}) has no license")


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ([], ValueError, r"sources=\[\] must be a list of sources"),
        ({"folder": "here"}, ValueError, "must be a list"),
        (["here"], ValueError, r"sources\[0\] must be a mapping with one of the keys \['folder', .* but is 'here'"),
        ([{"license": "mit"}], ValueError, r"sources\[0\] must have exactly one of the keys .* has \['license'\]"),
        ([{"folder": "a", "dataset": "b"}], ValueError, "exactly one"),
        ([{"folder": "HERE", "split": "train"}], ValueError, r"unknown keys \['split'\]; a folder may have"),
        ([{"folder": "HERE", "licence": "mit"}], ValueError, r"unknown keys \['licence'\]"),
        ([{"dataset": "HERE", "revision": 1234567}], ValueError, "revision must be text, but is 1234567.*quotes"),
        ([{"parquet": []}], ValueError, r"parquet must be text, but is \[\]"),
        ([{"dataset": "d", "license": "a", "license_column": "b"}], ValueError, "leave one out"),
        ([{"folder": "HERE/none"}], FileNotFoundError,
            r"sources\[0\] \(folder: .*none\) is not a folder: correct the path"),
        ([{"folder": "HERE/nothing"}], ValueError, "nothing.* has no images: put some there, or leave"),
        ([{"parquet": "HERE/none-*.parquet"}], ValueError,
            r"sources\[0\] \(parquet: .*cannot be loaded: .* Check its path"),
        ([{"parquet": "HERE/broken.parquet"}], ValueError, "broken.* cannot be loaded: "),
        ([{"webdataset": "HERE/broken.parquet"}], ValueError, "webdataset: .* cannot be loaded: "),
        ([{"dataset": "HERE/one", "split": "old"}], ValueError, "one.* cannot be loaded: .*no split 'old'"),
        ([{"dataset": "HERE/many", "split": "old"}], ValueError, r"no split 'old'; its splits are \['train'\]"),
        ([{"dataset": "HERE/one", "image_column": "image"}], ValueError,
            r"no column 'image'. Set image_column to one of .*'photo'"),
        ([{"dataset": "HERE/one", "image_column": "n"}], ValueError,
            "'n' must hold images, bytes or paths, but is Value"),
        ([{"dataset": "HERE/two"}], ValueError, r"2 columns hold images \['photo', 'again'\]. Set image_column"),
        ([{"dataset": "HERE/none-at-all"}], ValueError, "none-at-all.* cannot be loaded"),
        ([{"parquet": "HERE/empty.parquet"}], ValueError, "empty.* cannot be loaded: .* no data"),
        ([{"dataset": "HERE/one", "license_column": "n"}], ValueError, "no column 'n' of text: set license_column"),
        ([{"dataset": "HERE/one", "license_column": "x"}], ValueError, "no column 'x' of text"),
        ([{"dataset": "someone/photos"}], ValueError, r"sources\[0\] \(dataset: someone/photos\) cannot be loaded"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be_used(tmp_path_factory, spec, kind, message):
    here = tmp_path_factory.getbasetemp() / "unusable"
    if not here.exists():
        (here / "nothing").mkdir(parents=True)
        (here / "nothing" / "notes.txt").touch()
        (here / "broken.parquet").write_bytes(b"PAR1 nothing")
        dataset = rows(2)
        dataset.save_to_disk(str(here / "one"))
        dataset.select([]).to_parquet(str(here / "empty.parquet"))
        dataset.add_column("again", dataset.with_format("arrow")["photo"][:].to_pylist()).cast_column(
            "again", ImageFeature()
        ).save_to_disk(str(here / "two"))
        DatasetDict({"train": dataset}).save_to_disk(str(here / "many"))
    if isinstance(spec, list):
        spec = [
            {key: value.replace("HERE", str(here)) if isinstance(value, str) else value for key, value in one.items()}
            if isinstance(one, dict)
            else one
            for one in spec
        ]
    with pytest.raises(kind, match=message):
        Sources(spec)


@pytest.fixture
def pairs(tmp_path):
    """Photos, sharp and with a blurred target: of the same size, of half the size, and not in every case usable."""
    for folder in ("sharp/a", "bokeh/a"):
        (tmp_path / folder).mkdir(parents=True)
    contents = {
        "a/1": (photo(64, 48, 1), encoded(photo(64, 48, 1).convert("L"), "PNG")),
        "2": (photo(64, 48, 2), encoded(photo(32, 24, 9), "PNG")),
        "3": (photo(64, 48, 3), encoded(photo(48, 48, 9), "PNG")),
        "4": (photo(64, 48, 4), encoded(photo(64, 48, 4), "PNG")),
        "5": (photo(64, 48, 5), b"no picture"),
    }
    for name, (image, target) in contents.items():
        (tmp_path / f"sharp/{name}.png").write_bytes(encoded(image, "PNG"))
        (tmp_path / f"bokeh/{name}.jpg").write_bytes(target)
    return {"folder": str(tmp_path / "sharp"), "targets": str(tmp_path / "bokeh"), "tasks": ["bokeh"]}


def test_pairs_in_folders_and_columns(pairs, folder, tmp_path):
    sources = Sources([pairs, {"folder": str(folder)}])
    assert sources.have_targets and sources.tasks == {*TASKS}
    batch = sources.read(0, 6)
    rest = ",".join(task for task in TASKS if task != "bokeh")
    assert batch["tasks"] == ["bokeh"] * 5 + [rest] and batch["target"][5] is batch["target_problem"][5] is None
    files, contents = batch["file"][:5], batch["target"][:5]
    dataset = {
        name: [{"bytes": content, "path": None} for content in batch[name][:5]] for name in ("content", "target")
    }
    Dataset.from_dict(dataset).cast_column("content", ImageFeature()).to_parquet(str(tmp_path / "pairs.parquet"))
    columns = {"image_column": "content", "target_column": "target", "tasks": ["bokeh"]}
    stored = Sources([{"parquet": str(tmp_path / "pairs.parquet"), **columns}]).read(0, 5)
    assert stored["target"] == contents and stored["tasks"] == ["bokeh"] * 5
    done = ImageCheck(min_side=8, with_targets=True)(batch)
    found = dict(zip(files, zip(done["target"], done["reason"], strict=False), strict=False))
    assert read_image(found["a/1.png"][0], "The target").size == (64, 48) == read_image(found["2.png"][0], "It").size
    assert found["3.png"] == (None, "target of another shape: 48 x 48 pixels, its image has 64 x 48")
    assert found["4.png"][1].startswith("target equals its image") and "target unreadable: " in found["5.png"][1]
    assert done["target"][5] is None is done["reason"][5]
    # What is scaled down, is scaled down together.
    small = ImageCheck(min_side=8, resolution=32, with_targets=True)(batch)
    sizes = {read_image(small[name][files.index("a/1.png")], name).size for name in ("image", "target")}
    assert len(sizes) == 1 and sizes.pop()[0] < 64
    # Other files are other pairs: a build that has begun does not mix them.
    Path(pairs["targets"], "2.jpg").write_bytes(b"another")
    assert Sources([pairs]).settings != sources.settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["bokhe"]}, r"sources\[0\]: tasks must be a list of tasks, but is \['bokhe'\]. Correct it"),
        ({"tasks": []}, r"tasks must be a list of tasks, but is \[\]"),
        ({"tasks": "bokeh"}, "tasks must be a list of tasks, but is 'bokeh'"),
        ({"tasks": [3]}, r"but is \[3\]"),
        ({"tasks": [["bokeh"]]}, r"but is \[\['bokeh'\]\]"),
        ({"tasks": {"bokeh": 1}}, r"but is \{'bokeh': 1\}"),
        ({"tasks": None}, "has targets, so it must name the one task that they are for"),
        ({"tasks": ["bokeh", "relight"]}, "must name the one task that they are for"),
        ({"targets": "HERE/sharp"}, "targets is the folder of the images itself"),
        ({"targets": "HERE/nowhere"}, "nowhere is not a folder: correct the path"),
        ({"targets": "HERE/sharp/a"}, r"5 of 5 images have no target, e.g. 2.png. Give both files of a pair the same"),
        ({"folder": "HERE/fewer"}, r"4 of 5 targets have no image, e.g. 3.jpg"),
        ({"folder": "HERE/twice"}, "twice has 2.jpg and 2.png, so it is not clear which one is of the pair"),
        ({"target_column": "x"}, r"has unknown keys \['target_column'\]; a folder may have"),
    ],
)
def test_pairs_that_cannot_be_used(pairs, tmp_path, change, message):
    for name, files in (("fewer", ["2.png"]), ("twice", ["2.png", "2.jpg"])):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes(encoded(PHOTO, "PNG"))
    change = {
        key: value.replace("HERE", str(tmp_path)) if isinstance(value, str) else value for key, value in change.items()
    }
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Sources([{**pairs, **change}])


def test_sources_that_leave_others_no_task(folder, tmp_path):
    with pytest.raises(ValueError, match=r"sources\[1\] .* serves no task, because other sources name all of them"):
        Sources([{"folder": str(folder), "tasks": list(TASKS)}, {"folder": str(folder)}])
    rows(2).save_to_disk(str(tmp_path / "one"))
    for column, problem in (("x", "does not exist"), ("photo", "is the column of the images")):
        with pytest.raises(ValueError, match=f"target_column='{column}' {problem}. Set it to another one of"):
            options = {"image_column": "photo", "target_column": column, "tasks": ["bokeh"]}
            Sources([{"dataset": str(tmp_path / "one"), **options}])


def test_through_the_engine(folder, tmp_path):
    work = WorkFolder(tmp_path / "work", Sources([{"folder": str(folder), "license": "cc0-1.0"}]))
    accelerator = Accelerator()
    assert run_stage(work, ImageCheck(min_side=8, batch_size=3), accelerator) == {"unreadable": 3}
    assert run_stage(work, Duplicates(), accelerator) == {"duplicate": 4}
    batch = work.read(work.live, ["image", "file", "width", "license"])
    assert batch["file"] == ["a.jpg"] and batch["width"] == [48] and batch["license"] == ["cc0-1.0"]
    assert [row["file"] for row in work.rejected() if row["stage"] == "sources"] == [
        "empty.gif",
        "nowhere.png",
        "text.jpg",
    ]


# Hashes


def test_the_hash_against_another_transform():
    fft = pytest.importorskip("scipy.fft")
    for image in (photo(300, 200), photo(31, 500, seed=3), photo(32, 32, seed=5).convert("L")):
        grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=float)
        low = fft.dctn(grey, norm="ortho")[:8, :8]
        # An orthonormal transform weighs its first row and column less: that of the hash does not.
        low[0] *= 2**0.5
        low[:, 0] *= 2**0.5
        text = "".join(str(int(value > np.median(low))) for value in low.flatten())
        (row,) = check(encoded(image, "PNG"))
        assert row["image_hash"] == f"{int(text, 2):016x}"


def hash_of(image: Image.Image) -> int:
    (row,) = check(encoded(image, "PNG"))
    return int(row["image_hash"], 16)


def test_what_looks_alike_has_a_close_hash():
    from skimage import data

    images = {name: Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")}
    hashes = {name: hash_of(image) for name, image in images.items()}
    for name, image in images.items():
        changed = [
            image.resize((200, 150)),
            Image.open(io.BytesIO(encoded(image, "JPEG", quality=30))),
            image.point(lambda value: min(255, int(value * 1.1))),
        ]
        for other in changed:
            assert (hashes[name] ^ hash_of(other)).bit_count() <= 6
        for other_name in images.keys() - {name}:
            assert (hashes[name] ^ hashes[other_name]).bit_count() > 16
    assert hash_of(Image.new("RGB", (50, 50), (9, 80, 3))) == hash_of(Image.new("L", (300, 90), 200)) == 2**63
