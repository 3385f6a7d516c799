"""The languages of prompts, and the styles that the task `style` draws from, with pictures of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .sources import ImageCheck, ImageFolder, RejectedImageError


LANGUAGES = {"en": "English", "zh": "Simplified Chinese"}


@dataclass(frozen=True)
class Style:
    """
    A style that an image can be turned into.

    Args:
        name (`str`):
            Its English name, as prompts use it.
        chinese (`str`):
            Its Chinese name.
        description (`str`):
            Its appearance, in one English sentence.
    """

    name: str
    chinese: str
    description: str


STYLES = (
    # Painting and print
    Style("Impressionism", "印象派",
          "Short, visible dabs of pure color catch the light of a moment, and outlines dissolve."),
    Style("Post-Impressionism", "后印象派",
          "Thick, swirling strokes and heightened colors carry mood more than likeness."),
    Style("Pointillism", "点彩派",
          "Countless small dots of unmixed color lie side by side and blend only from a distance."),
    Style("Expressionism", "表现主义",
          "Distorted shapes, rough strokes and harsh, unnatural colors show strong feeling."),
    Style("Fauvism", "野兽派", "Flat, wild areas of bright color that nature does not have, with simplified drawing."),
    Style("Cubism", "立体主义",
          "Things are broken into angular facets and seen from several sides at once, in muted tones."),
    Style("Surrealism", "超现实主义",
          "A dreamlike scene painted with precise realism, in eerie light and with odd proportions."),
    Style("Baroque", "巴洛克", "Dark grounds, deep contrasts of light and shade, and rich warm colors in oil."),
    Style("Renaissance", "文艺复兴",
          "Balanced, finely modelled oil painting with soft transitions and calm earthen colors."),
    Style("Rococo", "洛可可", "Light pastel colors, airy brushwork and playful, curling ornament."),
    Style("Romanticism", "浪漫主义", "Dramatic skies, glowing light and grand, moody nature in oil."),
    Style("Art Nouveau", "新艺术运动",
          "Flowing plant-like lines, ornamental borders and flat, muted colors of a poster."),
    Style("Art Deco", "装饰艺术", "Sleek symmetrical geometry, stepped forms and gold or black accents."),
    Style("Bauhaus", "包豪斯", "Plain circles, squares and triangles in primary colors on a clear grid."),
    Style("De Stijl", "风格派", "A grid of black lines with rectangles in red, yellow, blue and white."),
    Style("oil painting", "油画", "Thick, glossy paint with visible brush marks and rich, blended colors on canvas."),
    Style("watercolor", "水彩画",
          "Thin transparent washes that run into one another, with white paper shining through."),
    Style("gouache", "水粉画", "Matt, opaque layers of paint with flat shapes and soft, chalky colors."),
    Style("ink wash painting", "水墨画", "Black ink in many dilutions, sparse strokes and much empty paper."),
    Style("gongbi", "工笔画", "Fine even outlines filled with delicate, layered color on silk."),
    Style("ukiyo-e", "浮世绘", "Woodblock print with firm dark outlines, flat colors and patterned surfaces."),
    Style("Dunhuang mural", "敦煌壁画",
          "Flowing lines and weathered mineral greens, blues and ochres on an old plaster wall."),
    Style("Byzantine mosaic", "拜占庭镶嵌画",
          "Small glass and gold tiles with visible joints, and stern frontal figures."),
    Style("stained glass", "彩色玻璃", "Bright translucent pieces of glass divided by thick dark lines of lead."),
    Style("woodcut", "木刻版画", "Bold black and white print with the marks of the gouge and strong contrast."),
    Style("copperplate engraving", "铜版画", "Tone made wholly of fine parallel and crossed lines in dark ink."),
    Style("fresco", "湿壁画", "Matt, slightly faded colors sunk into plaster, with fine cracks."),
    # Drawing
    Style("pencil sketch", "铅笔素描", "Grey graphite lines and soft hatching on white paper, without color."),
    Style("charcoal drawing", "炭笔画", "Deep smudged blacks, soft grey tones and grainy strokes on rough paper."),
    Style("pastel drawing", "粉彩画", "Powdery, soft strokes of bright chalk that show the grain of the paper."),
    Style("crayon drawing", "蜡笔画", "Waxy, uneven strokes in plain bright colors, as by a child's hand."),
    Style("line art", "线稿", "Clean black outlines of even width on white, with no shading or fill."),
    Style("blueprint", "蓝图", "Thin white technical lines on a deep blue ground."),
    # Comics, games and film
    Style("anime", "日本动漫", "Clean outlines, large shaded areas of clear color and big expressive eyes."),
    Style("manga", "黑白漫画", "Black ink lines, dotted grey tones and speed lines on white."),
    Style("American comic book", "美式漫画",
          "Heavy ink outlines, strong shadows and saturated colors with printed dots."),
    Style("pop art", "波普艺术", "Flat loud colors, thick outlines and rows of print dots, as in an advertisement."),
    Style("pixel art", "像素画", "Large square pixels in a small palette, as in an early video game."),
    Style("low poly", "低多边形", "Surfaces made of few flat triangles, each in one plain shade."),
    Style("voxel art", "体素艺术", "Everything is built of small equal cubes, seen in three dimensions."),
    Style("3D cartoon", "3D卡通",
          "Smooth rounded computer-rendered shapes, soft light and exaggerated, friendly features."),
    Style("flat illustration", "扁平插画",
          "Simple shapes in a few even colors, with no texture and hardly any shading."),
    Style("isometric illustration", "等距插画",
          "Neat shapes drawn from an oblique angle above, with no vanishing point."),
    Style("cyberpunk", "赛博朋克", "Neon pink and cyan light, wet reflections and dense technology in the dark."),
    Style("steampunk", "蒸汽朋克", "Brass, copper, rivets, gears and steam in warm brown tones."),
    Style("vaporwave", "蒸汽波", "Pink, purple and turquoise gradients with grids and nostalgic computer graphics."),
    Style("film noir", "黑色电影", "Black and white photography with hard shadows, strong contrast and a tense mood."),
    Style("vintage photograph", "老照片", "Faded brownish tones, soft focus, grain and worn edges of an old print."),
    Style("graffiti", "涂鸦艺术", "Sprayed bright colors, thick outlines, drips and overlaps on a wall."),
    # Crafts and materials
    Style("LEGO bricks", "乐高积木", "Everything is assembled from shiny plastic toy bricks with visible studs."),
    Style("claymation", "黏土动画",
          "Hand-kneaded modelling clay with fingerprints and rounded edges, lit like a small stage."),
    Style("origami", "折纸", "Folded colored paper with sharp creases and flat facets."),
    Style("paper cut", "剪纸", "Flat shapes cut from paper, with crisp edges and openwork patterns."),
    Style("felted wool", "羊毛毡", "Soft fuzzy wool in rounded toy-like shapes, with stray fibres."),
    Style("embroidery", "刺绣", "Dense colored stitches of thread that follow the shapes, on woven cloth."),
    Style("knitted yarn", "毛线编织", "Loops of thick yarn in regular rows form every surface."),
    Style("blue and white porcelain", "青花瓷", "Cobalt blue painting under a smooth white glaze."),
    Style("wood carving", "木雕", "Relief cut in wood, with visible grain and tool marks."),
)  # fmt: skip


def styles_by_name(styles: Sequence[Style]) -> dict[str, Style]:
    """The styles by their English name. Raises `ValueError` if there are none, or two have the same name."""
    by_name = {style.name: style for style in styles}
    if len(by_name) < max(len(styles), 1):
        raise ValueError(f"styles must not be empty and have distinct names, but are {[s.name for s in styles]}.")
    return by_name


class StyleImages:
    """
    Pictures of styles, for the writer of the prompts: a folder with one subfolder per style, named as the style is in
    English. Styles without a folder have none.

    Args:
        root (`str`):
            The folder.
        styles (`Sequence[Style]`):
            The styles that there are.
        resolution (`int`, *optional*):
            Larger pictures are scaled down to the area of a square with this side, in pixels.

    Raises:
        `FileNotFoundError`: If there is no such folder.
        `ValueError`: If it has a subfolder of no style or without images, images outside of subfolders, or an image
            that cannot be used. It names all of them.
    """

    def __init__(self, root: str, styles: Sequence[Style], resolution: int | None = None):
        self._check = ImageCheck(min_side=1, resolution=resolution)
        self._folder = ImageFolder(root, f"style_images={root}")
        known = {name.casefold(): name for name in styles_by_name(styles)}
        problems = []
        self.files: dict[str, list[str]] = {}
        for folder in sorted(path for path in Path(root).iterdir() if path.is_dir() and path.name[0] != "."):
            style = known.get(folder.name.casefold())
            files = [file for file in self._folder.files if file.startswith(f"{folder.name}/")]
            if style is None:
                problems.append(f"{folder.name!r} is no style")
            elif style in self.files:
                problems.append(f"{folder.name!r} is a second folder of the style {style!r}")
            elif not files:
                problems.append(f"{folder.name!r} has no images")
            else:
                self.files[style] = files
        problems += [f"{file!r} is in no folder of a style" for file in self._folder.files if "/" not in file]
        for file in sum(self.files.values(), []) if not problems else []:
            try:
                self.read(file)
            except RejectedImageError as rejected:
                problems.append(f"{file!r} cannot be used ({rejected})")
        if not self.files:
            problems.append("it has no folders of styles")
        if problems:
            more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise ValueError(
                f"style_images={root}: {'; '.join(problems[:10])}{more}. Each folder must have the name of "
                f"a style and images of it: rename or remove what does not. The styles are {list(known.values())}."
            )

    @property
    def digest(self) -> str:
        return self._folder.digest

    def read(self, file: str) -> bytes:
        """The bytes of a picture, as a build stores it. Raises `RejectedImageError` if it cannot be used."""
        return self._check.normalized(*self._folder.read(file))[0]
