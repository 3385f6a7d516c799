import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from hp_edit_trl.utils.images import UnreadableImageError, image_digest, png_bytes, read_image
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
