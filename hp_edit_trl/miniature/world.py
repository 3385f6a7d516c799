"""
A small world in which every edit has a right answer: scenes of colored shapes on plain and patterned backgrounds, with
prompts for the eight tasks of HP-Edit.

A case is drawn from a seed alone, together with its target, the picture that its prompt asks for. Targets make it
possible to score an edit without a judge (see `scorers.py`) and to pretrain a small policy.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from ..tasks import TASKS


SIZE = 32  # pixels; pictures are drawn at four times the size and averaged, which makes edges soft
SUPERSAMPLING = 4

COLORS = {
    "red": (0.86, 0.16, 0.16),
    "orange": (0.95, 0.55, 0.10),
    "yellow": (0.93, 0.86, 0.18),
    "green": (0.16, 0.62, 0.24),
    "cyan": (0.15, 0.75, 0.80),
    "blue": (0.16, 0.30, 0.86),
    "purple": (0.55, 0.22, 0.75),
    "pink": (0.95, 0.55, 0.75),
}
BACKGROUNDS = {
    "white": (0.92, 0.92, 0.92),
    "grey": (0.55, 0.55, 0.58),
    "black": (0.12, 0.12, 0.14),
    "beige": (0.85, 0.76, 0.60),
    "olive": (0.42, 0.45, 0.22),
    "navy": (0.14, 0.18, 0.38),
}
PATTERNS = ("plain", "checkered", "striped")
SHAPES = ("circle", "square", "triangle", "diamond")
PLACES = {
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
}
LIGHTS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "top": (0.0, -1.0), "bottom": (0.0, 1.0)}
TONES = {"warm": (1.12, 0.98, 0.72), "cool": (0.74, 0.96, 1.14)}
STYLES = ("black and white", "sepia", "negative", "poster", "mosaic", "faded")
SPLITS = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}


@dataclass(frozen=True)
class Thing:
    """One object: its kind, its position (in units of the picture) and its radius (half its extent)."""

    shape: str
    color: str
    place: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects on a background; the first is the lowest."""

    things: tuple[Thing, ...]
    pattern: str
    background: str

    @property
    def split(self) -> str:
        """The split of this scene, which a hash of its content decides: no scene is in two splits."""
        digit = int(hashlib.sha256(repr(self).encode()).hexdigest(), 16) % 10
        return next(split for split, digits in SPLITS.items() if digit in digits)


@dataclass(frozen=True)
class Case:
    """A prompt for a scene, with the picture before and the target (float arrays in [0, 1])."""

    scene: Scene
    task: str
    prompt: str
    category: str
    reference: np.ndarray
    target: np.ndarray


def _grid() -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(SIZE * SUPERSAMPLING) + 0.5) / (SIZE * SUPERSAMPLING)
    return np.meshgrid(axis, axis)


def _averaged(picture: np.ndarray) -> np.ndarray:
    return picture.reshape(SIZE, SUPERSAMPLING, SIZE, SUPERSAMPLING, -1).mean((1, 3))


def coverage(thing: Thing) -> np.ndarray:
    """The share of each pixel that the object covers, of shape `(SIZE, SIZE, 1)`."""
    columns, rows = _grid()
    dx, dy = (columns - thing.x) / thing.radius, (rows - thing.y) / thing.radius
    inside = {
        "circle": dx**2 + dy**2 <= 1,
        "square": np.maximum(abs(dx), abs(dy)) <= 0.88,
        "triangle": (dy <= 0.85) & (abs(dx) * 1.8 <= dy + 1),
        "diamond": abs(dx) + abs(dy) <= 1.1,
    }[thing.shape]
    return _averaged(inside[..., None].astype(float))


def draw_background(pattern: str, color: str) -> np.ndarray:
    columns, rows = _grid()
    dark = {
        "plain": np.zeros_like(columns, dtype=bool),
        "checkered": (np.floor(columns * 6) + np.floor(rows * 6)) % 2 == 1,
        "striped": np.floor((columns + rows) * 5) % 2 == 1,
    }[pattern]
    base = np.array(BACKGROUNDS[color])
    other = base * 0.62 if base.mean() > 0.3 else base + 0.25
    return _averaged(np.where(dark[..., None], other, base))


def draw(scene: Scene) -> np.ndarray:
    """Draws a scene: a float array of shape `(SIZE, SIZE, 3)` in [0, 1]."""
    picture = draw_background(scene.pattern, scene.background)
    for thing in scene.things:
        cover = coverage(thing)
        picture = picture * (1 - cover) + np.array(COLORS[thing.color]) * cover
    return picture


def blur(picture: np.ndarray, sigma: float = 2.0) -> np.ndarray:
    """Gaussian blur with mirrored borders."""
    reach = int(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        padding = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(picture, padding, mode="symmetric")
        picture = sum(w * np.take(padded, range(k, k + SIZE), axis) for k, w in enumerate(weights))
    return picture


def relit(picture: np.ndarray, side: str, tone: str) -> np.ndarray:
    """The picture with light of one tone from one side: bright on that side, dark on the other."""
    axis = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
    columns, rows = np.meshgrid(axis, axis)
    dx, dy = LIGHTS[side]
    strength = 0.85 + 0.45 * (columns * dx + rows * dy)
    return np.clip(picture * strength[..., None] * np.array(TONES[tone]), 0, 1)


def stylized(picture: np.ndarray, style: str) -> np.ndarray:
    """The picture in one of `STYLES`."""
    grey = (picture @ np.array([0.3, 0.59, 0.11]))[..., None]
    if style == "black and white":
        return np.repeat(grey, 3, axis=2)
    if style == "sepia":
        return np.clip(grey * np.array([1.08, 0.82, 0.55]) + 0.04, 0, 1)
    if style == "negative":
        return 1 - picture
    if style == "poster":
        return np.round(picture * 2) / 2
    if style == "mosaic":
        tiles = picture.reshape(SIZE // 4, 4, SIZE // 4, 4, 3).mean((1, 3))
        return np.repeat(np.repeat(tiles, 4, 0), 4, 1)
    return 0.45 * picture + 0.45  # faded


def _choice(rng: np.random.Generator, options):
    options = list(options)
    return options[rng.integers(len(options))]


def _thing(rng: np.random.Generator, place: str, taken: set[str]) -> Thing:
    while True:
        x, y = (center + rng.uniform(-0.05, 0.05) for center in PLACES[place])
        thing = Thing(_choice(rng, SHAPES), _choice(rng, COLORS), place, x, y, rng.uniform(0.13, 0.2))
        if thing.name not in taken:
            return thing


def _scene(rng: np.random.Generator, task: str) -> Scene:
    # One place stays free for something to add, and blurring needs a pattern.
    count = rng.integers(1, 4)
    patterns = PATTERNS[1:] if task == "bokeh" else PATTERNS
    things: list[Thing] = []
    for place in rng.permutation(list(PLACES))[:count]:
        things.append(_thing(rng, str(place), {thing.name for thing in things}))
    return Scene(tuple(things), _choice(rng, patterns), _choice(rng, BACKGROUNDS))


def instruct(rng: np.random.Generator, scene: Scene, task: str) -> tuple[str, str, np.ndarray]:
    """Draws a prompt of one task for a scene. Returns the prompt, its category and the target picture."""
    things = scene.things
    index = int(rng.integers(len(things)))
    thing = things[index]

    def with_thing(new: Thing) -> np.ndarray:
        return draw(replace(scene, things=(*things[:index], new, *things[index + 1 :])))

    if task == "add":
        place = _choice(rng, [place for place in PLACES if place not in {t.place for t in things}])
        x, y = PLACES[place]
        new = replace(_thing(rng, place, {t.name for t in things}), x=x, y=y, radius=0.17)
        prompt = _choice(rng, (f"Add a {new.name} in the {place}", f"Put a {new.name} into the {place} corner"))
        return prompt, new.shape, draw(replace(scene, things=(*things, new)))
    if task == "remove":
        prompt = _choice(rng, (f"Remove the {thing.name}", f"Take the {thing.name} away", f"Erase the {thing.name}"))
        return prompt, thing.shape, draw(replace(scene, things=things[:index] + things[index + 1 :]))
    if task == "swap":
        shape = _choice(rng, [s for s in SHAPES if s != thing.shape])
        color = _choice(
            rng, [c for c in COLORS if c != thing.color and f"{c} {shape}" not in {t.name for t in things}]
        )
        prompt = _choice(
            rng, (f"Replace the {thing.name} with a {color} {shape}", f"Swap the {thing.name} for a {color} {shape}")
        )
        return prompt, thing.shape, with_thing(replace(thing, shape=shape, color=color))
    if task == "background":
        pattern, color = scene.pattern, scene.background
        while color == scene.background:
            pattern, color = _choice(rng, PATTERNS), _choice(rng, BACKGROUNDS)
        name = {"plain": f"plain {color}", "checkered": f"a {color} checkerboard", "striped": f"{color} stripes"}[
            pattern
        ]
        prompt = _choice(rng, (f"Change the background to {name}", f"Replace the background with {name}"))
        return prompt, thing.shape, draw(replace(scene, pattern=pattern, background=color))
    if task == "color":
        names = {t.name for t in things}
        color = _choice(rng, [c for c in COLORS if c != thing.color and f"{c} {thing.shape}" not in names])
        prompt = _choice(rng, (f"Make the {thing.name} {color}", f"Change the colour of the {thing.name} to {color}"))
        return prompt, thing.shape, with_thing(replace(thing, color=color))
    picture = draw(scene)
    if task == "bokeh":
        cover = coverage(thing)
        rest = draw(replace(scene, things=things[:index] + things[index + 1 :]))
        prompt = _choice(
            rng, (f"Keep the {thing.name} sharp and blur the rest", f"Blur everything behind the {thing.name}")
        )
        return prompt, thing.shape, blur(rest) * (1 - cover) + np.array(COLORS[thing.color]) * cover
    if task == "relight":
        side, tone = _choice(rng, LIGHTS), _choice(rng, TONES)
        prompt = _choice(
            rng, (f"Light the scene with {tone} light from the {side}", f"Relight it: {tone} light, from the {side}")
        )
        return prompt, thing.shape, relit(picture, side, tone)
    style = _choice(rng, STYLES)
    prompt = _choice(rng, (f"Turn the picture into {style} style", f"Make it look like {style}"))
    return prompt, thing.shape, stylized(picture, style)


def draw_case(task: str, split: str, seed: int, index: int) -> Case:
    """
    Draws one case, which depends on the arguments alone.

    Args:
        task (`str`):
            One of `TASKS`.
        split (`str`):
            `"train"`, `"validation"` or `"test"`. Scenes are assigned to splits by their content.
        seed (`int`):
            Seed of the stream.
        index (`int`):
            Position in the stream.

    Returns:
        [`Case`]: a case whose target differs visibly from its reference.
    """
    key = hashlib.sha256(repr((task, split, seed, index)).encode()).digest()
    rng = np.random.default_rng(np.frombuffer(key, dtype=np.uint32))
    while True:
        scene = _scene(rng, task)
        if scene.split != split:
            continue
        reference = draw(scene)
        prompt, category, target = instruct(rng, scene, task)
        changed = np.abs(target - reference).max(-1) > 0.1
        if changed.mean() >= 0.02:
            return Case(scene, task, prompt, category, reference, target)


def stream(split: str, seed: int = 0, tasks: tuple[str, ...] = tuple(TASKS)) -> Iterator[Case]:
    """
    Yields cases without end, the tasks in turn.

    Args:
        split (`str`):
            `"train"`, `"validation"` or `"test"`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the stream.
        tasks (`tuple[str, ...]`, *optional*):
            The tasks. All eight by default.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not known: use one of {', '.join(SPLITS)}.")
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"Unknown tasks {unknown}: there are {', '.join(TASKS)}.")
    index = 0
    while True:
        yield draw_case(tasks[index % len(tasks)], split, seed, index)
        index += 1


def to_image(picture: np.ndarray) -> Image.Image:
    """Converts a float array in [0, 1] to a PIL image."""
    return Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))


def load_dataset(split: str, num_cases: int = 400, seed: int = 0, tasks: tuple[str, ...] = tuple(TASKS)) -> Dataset:
    """
    Makes a dataset of the first cases of a stream.

    Args:
        split (`str`):
            `"train"`, `"validation"` or `"test"`. No scene is in two splits, also with different seeds.
        num_cases (`int`, *optional*, defaults to `400`):
            Number of cases.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the stream.
        tasks (`tuple[str, ...]`, *optional*):
            The tasks. All eight by default.

    Returns:
        [`~datasets.Dataset`] with `id`, `image`, `prompt`, `task`, `category` (the kind of object), `requirement`,
        `source`, and `target` (the picture that the prompt asks for, which the scorers read).

    Raises:
        `ValueError`: If the split or a task is not known.
    """
    rows = []
    for index, case in zip(range(num_cases), stream(split, seed, tasks), strict=False):
        rows.append(
            {
                "id": f"miniature-{split}-{seed}-{index}",
                "image": to_image(case.reference),
                "prompt": case.prompt,
                "task": case.task,
                "category": case.category,
                "requirement": "",
                "source": "hp_edit_trl.miniature",
                "target": to_image(case.target),
            }
        )
    text = {name: Value("string") for name in ("id", "prompt", "task", "category", "requirement", "source")}
    return Dataset.from_list(rows, features=Features({**text, "image": ImageFeature(), "target": ImageFeature()}))
