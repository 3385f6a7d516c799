"""Formulas as SVG, set by matplotlib while the site is built, so that a page needs no script of others for them."""

import html
import re

from matplotlib import rc_context
from matplotlib.path import Path
from matplotlib.textpath import TextPath


# With what must not be parted from it
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>([,.;:)]*)', re.DOTALL)
# What matplotlib does not know
OTHERS = (
    (re.compile(r"\\tfrac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\tfrac"), r"\\frac"),
    (re.compile(r"\\math(cal|bf) (\w)"), r"\\math\1{\2}"),
    (re.compile(r"\\le\b"), r"\\leq"),
    (re.compile(r"\\!"), ""),
)
COMMANDS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
SIZE = 10.0
EM = SIZE / 1.12  # units of a drawing to the em of the text, whose letters are larger


def draw_formulas(page: str) -> str:
    """Replaces the formulas in a page's HTML, as `pymdownx.arithmatex` leaves them, by drawings."""

    def draw(found: re.Match[str]) -> str:
        svg = to_svg(html.unescape(found[2]).strip())
        return f'<{found[1]} class="formula">{svg}{found[3]}</{found[1]}>'

    return FORMULA.sub(draw, page)


def to_svg(tex: str) -> str:
    """
    A formula as an SVG element in the color of its text.

    Args:
        tex (`str`):
            The formula in TeX, without dollars.

    Raises:
        `ValueError`: If matplotlib cannot set the formula.
    """
    words = " ".join(tex.split())
    for pattern, replacement in OTHERS:
        words = pattern.sub(replacement, words)
    with rc_context({"mathtext.fontset": "stix"}):
        try:
            path = TextPath((0, 0), f"${words}$", size=SIZE)
        except ValueError as error:
            raise ValueError(f"The formula {tex!r} cannot be set: {error}") from None
    box = path.get_extents().padded(0.3)
    drawing = "".join(
        COMMANDS[code] + " ".join(f"{x:.2f} {-y:.2f}" for x, y in points.reshape(-1, 2)) if code != 79 else "Z"
        for points, code in path.iter_segments(simplify=False)
    )
    return (
        f'<svg role="img" aria-label="{html.escape(tex)}" viewBox="{box.x0:.2f} {-box.y1:.2f} {box.width:.2f} '
        f'{box.height:.2f}" style="width:{box.width / EM:.3f}em;height:{box.height / EM:.3f}em;'
        f'vertical-align:{box.y0 / EM:.3f}em"><path d="{drawing}"/></svg>'
    )
