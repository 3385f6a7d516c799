"""Images as annotators see them: scaled down and encoded again, so that nothing else in their files is revealed."""

import base64
import io

from PIL import Image


MAX_SIDE = 1600


def shown_jpeg(image: Image.Image) -> bytes:
    """
    Encodes an image as JPEG with at most `MAX_SIDE` pixels a side, without visible artifacts. Names, paths and
    comments of the original file, which could reveal the editor, are left out.
    """
    image = image.copy()
    image.info = {}
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=95, subsampling=0)
    return content.getvalue()


def data_url(image: Image.Image) -> str:
    """Returns an image as a data URL, to be embedded in a page."""
    return f"data:image/jpeg;base64,{base64.b64encode(shown_jpeg(image)).decode()}"


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """Joins images side by side, at the height of the first."""
    if len(images) == 1:
        return images[0]
    height = images[0].height
    scaled = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in images]
    gap = height // 40
    together = Image.new("RGB", (sum(image.width for image in scaled) + gap * (len(scaled) - 1), height), "white")
    left = 0
    for image in scaled:
        together.paste(image, (left, 0))
        left += image.width + gap
    return together
