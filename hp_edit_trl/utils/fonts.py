"""Fonts with Chinese, Japanese and Korean characters, which the fonts of matplotlib and Pillow lack."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from PIL import ImageFont


logger = logging.getLogger(__name__)

# Of Linux, macOS and Windows, in order of preference
CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Heiti SC", "Microsoft YaHei",
    "SimHei", "Arial Unicode MS",
)  # fmt: skip


@cache
def cjk_font() -> str | None:
    """Name of an installed font with Chinese characters. `None`, with a warning, if there is none."""
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    found = next((name for name in CJK_FONTS if name in installed), None)
    if found is None:
        logger.warning(
            "No font with Chinese characters was found, so that they show as boxes: install fonts-noto-cjk."
        )
    return found


def has_cjk(text: str) -> bool:
    """Whether a text has characters of Chinese, Japanese or Korean, or their punctuation."""
    return any(
        "\u2e80" <= sign <= "\u9fff"
        or "\uac00" <= sign <= "\ud7ff"
        or "\uf900" <= sign <= "\uffef"
        or "\U00020000" <= sign <= "\U0003ffff"
        for sign in text
    )


@contextmanager
def readable_text(*texts: str) -> Iterator[None]:
    """
    Within it matplotlib draws Chinese characters with a font that has them, if there are any in `texts`. A figure is
    made and saved within it.
    """
    name = cjk_font() if any(map(has_cjk, texts)) else None
    if name is None:
        yield
        return
    import matplotlib

    with matplotlib.rc_context({"font.family": [*matplotlib.rcParams["font.family"], name]}):
        yield


def image_font(text: str, size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """The font that Pillow draws a text with: its own, or one with Chinese characters if the text has some."""
    name = cjk_font() if has_cjk(text) else None
    if name is None:
        return ImageFont.load_default(size=size)
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont(name), size)
