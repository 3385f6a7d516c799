"""How an image is shown: decoded, scaled down, and encoded anew, so that nothing of its file comes along."""

import base64
import io

from PIL import Image


MAX_SIDE = 1600


def shown_jpeg(image: Image.Image) -> bytes:
    """
    The image as a JPEG of at most `MAX_SIDE` pixels a side, at a quality that adds nothing one could see. Names, paths and
    comments in the file that it was read from, which could tell the editor, are gone.
    """
    image = image.copy()
    image.info = {}
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=95, subsampling=0)
    return content.getvalue()


def data_url(image: Image.Image) -> str:
    """The image within an address, for a page that needs no file."""
    return f"data:image/jpeg;base64,{base64.b64encode(shown_jpeg(image)).decode()}"


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """Several images in one, at the height of the first."""
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
