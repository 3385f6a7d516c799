"""
Stand-ins for building a dataset: pictures to build from, a writer of prompts for scenes of the small world, and a
judge that knows what each prompt asks for. For photographs the writer has a few sentences, and the judge a simple
rule.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.builder.instructions import load_instruction_templates
from ..data.builder.styles import Style
from ..judges import Judgement
from ..tasks import TASKS
from ..utils.images import read_image
from .photographs import load_photographs
from .raters import read_conversation, seeded_rng
from .scorers import RuleScorer
from .world import COLORS, LIGHTS, PLACES, SHAPES, STYLES, TONES, Scene, draw, draw_case, instruct, stylized, to_image


# Patterns for what a prompt of the small world names
_THING = rf"(?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})"
_WORDS = {
    "place": "|".join(PLACES),
    "color": rf"(?:{'|'.join(COLORS)})$",
    "background": r"(?<=background to ).*|(?<=background with ).*",
    "direction": "|".join(LIGHTS),
    "quality": "|".join(TONES),
}


# Answers of the writer for the photographs
PHOTOGRAPHS: dict[tuple[str, str], dict[str, str]] = {
    ("astronaut", "add"): {
        "instruction": "Put a small silver star badge on the collar of the suit",
        "object": "small silver star badge", "place": "on the collar of the suit",
    },
    ("astronaut", "remove"): {"instruction": "Remove the flag behind the woman", "object": "the flag"},
    ("astronaut", "swap"): {
        "instruction": "Replace the white helmet with a red beach ball", "object": "white helmet",
        "replacement": "red beach ball",
    },
    ("astronaut", "background"): {
        "instruction": "Replace the background with a desert at sunset", "background": "a desert at sunset",
    },
    ("astronaut", "color"): {
        "instruction": "Change the color of the space suit to deep red", "object": "space suit", "color": "deep red",
    },
    ("astronaut", "bokeh"): {
        "instruction": "Keep the woman in the space suit sharp and blur all behind her",
        "subject": "the woman in the space suit",
    },
    ("astronaut", "relight"): {
        "instruction": "Relight the portrait with warm evening sun from the left", "direction": "from the left",
        "quality": "warm",
    },
    ("chelsea", "add"): {
        "instruction": "Put a small orange bow tie below the chin of the cat", "object": "small orange bow tie",
        "place": "below the chin of the cat",
    },
    ("chelsea", "color"): {
        "instruction": "Make the eyes of the cat bright blue", "object": "eyes of the cat", "color": "bright blue",
    },
    ("chelsea", "background"): {
        "instruction": "Replace the background with a green meadow", "background": "a green meadow",
    },
    ("chelsea", "bokeh"): {
        "instruction": "Keep the face of the cat sharp and blur the rest", "subject": "the face of the cat",
    },
    ("chelsea", "relight"): {
        "instruction": "Light the cat with soft daylight from the right", "direction": "from the right",
        "quality": "soft",
    },
    ("coffee", "add"): {
        "instruction": "Lay a small brown biscuit on the saucer", "object": "small brown biscuit",
        "place": "on the saucer",
    },
    ("coffee", "remove"): {"instruction": "Remove the spoon from the saucer", "object": "the spoon"},
    ("coffee", "swap"): {
        "instruction": "Replace the cup with a red clay bowl", "object": "the cup", "replacement": "red clay bowl",
    },
    ("coffee", "color"): {"instruction": "Make the saucer dark green", "object": "the saucer", "color": "dark green"},
    ("coffee", "bokeh"): {"instruction": "Keep the cup sharp and blur the table", "subject": "the cup"},
    ("coffee", "relight"): {
        "instruction": "Light the table with warm candlelight from the right", "direction": "from the right",
        "quality": "warm",
    },
    ("rocket", "remove"): {"instruction": "Remove the tall towers beside the rocket", "object": "tall towers"},
    ("rocket", "background"): {
        "instruction": "Put an orange evening sky behind the rocket", "background": "an orange evening sky",
    },
    ("rocket", "color"): {"instruction": "Make the rocket bright red", "object": "the rocket", "color": "bright red"},
    ("rocket", "relight"): {
        "instruction": "Light the scene with cool moonlight from the left", "direction": "from the left",
        "quality": "cool",
    },
}  # fmt: skip

# The six styles that the miniature's policy has learned
MINIATURE_STYLES = (
    Style("black and white", "黑白", "Greys alone, as on an old film."),
    Style("sepia", "棕褐色", "Brown tones, as of a faded print."),
    Style("negative", "负片", "Every color is its opposite."),
    Style("poster", "海报", "A few flat, strong colors."),
    Style("mosaic", "马赛克", "Large square tiles of one color each."),
    Style("faded", "褪色", "Pale and low in contrast."),
)


def save_pictures(folder: str | Path, num_scenes: int, seed: int = 0) -> None:
    """
    Writes pictures to build a dataset from: scenes of the small world, four photographs, and some pictures that
    filters must reject.

    Args:
        folder (`str` or `Path`):
            Folder in which the folders `scenes` and `photographs` are made.
        num_scenes (`int`):
            Number of scenes.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the scenes.

    Raises:
        `ImportError`: If scikit-image, which contains the photographs, is not installed.
    """
    scenes, photographs = Path(folder) / "scenes", Path(folder) / "photographs"
    for path in (scenes, photographs):
        path.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(_scenes(num_scenes, seed)):
        to_image(draw(scene)).save(scenes / f"{number:05d}.png")
    for row in load_photographs():
        row["image"].save(photographs / f"{row['source'].split()[-1]}.png")
    whole = (photographs / "chelsea.png").read_bytes()
    (photographs / "cut-off.png").write_bytes(whole[: len(whole) // 2])
    (photographs / "the-same-cat.png").write_bytes(whole)
    coffee = read_image(photographs / "coffee.png", "The coffee")
    coffee.resize((450, 300)).save(photographs / "smaller-coffee.jpg", quality=80)
    Image.new("RGB", (1, 1)).save(photographs / "dot.png")


def _scenes(count: int, seed: int) -> list[Scene]:
    return [draw_case(list(TASKS)[i % len(TASKS)], "train", seed, i).scene for i in range(count)]


class SimulatedWriter:
    """
    A stand-in for the vision-language model that writes prompts. It answers in the form that the templates ask for,
    with prompts that the miniature's policy understands.

    Args:
        num_scenes (`int`):
            Number of scenes that [`save_pictures`] wrote.
        seed (`int`, *optional*, defaults to `0`):
            Seed that [`save_pictures`] was given.
    """

    def __init__(self, num_scenes: int, seed: int = 0):
        self.num_scenes = num_scenes
        self.seed = seed
        self.scenes = {to_image(draw(scene)).tobytes(): scene for scene in _scenes(num_scenes, seed)}
        self.photographs = {row["source"].split()[-1]: _thumbnail(row["image"]) for row in load_photographs()}
        self.questions = {}
        for task, template in load_instruction_templates().items():
            pieces = re.split(r"\{(?:category|language|style|style_description|task|prompt)\}", template.text)
            self.questions[task] = re.compile("(.*)".join(map(re.escape, pieces)), re.DOTALL)

    @property
    def identity(self) -> dict[str, Any]:
        return {"judge": "SimulatedWriter", "name": "miniature", "num_scenes": self.num_scenes, "seed": self.seed}

    def load(self, num_images: int = 2) -> None:
        pass

    def __call__(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        return [Judgement(None, json.dumps(self._answer(conversation))) for conversation in conversations]

    def target(self, image: Image.Image, task: str, style: str | None = None) -> tuple[str, Image.Image] | None:
        """The prompt for a scene and a task, and the picture that it asks for; `None` if the scene is unknown."""
        scene = self.scenes.get(image.tobytes())
        if scene is None:
            return None
        if style is not None:
            return f"Turn the picture into {style} style", to_image(stylized(draw(scene), style))
        prompt, _, picture = instruct(seeded_rng(self.seed, "instruction", repr(scene), task), scene, task)
        return prompt, to_image(picture)

    def _answer(self, conversation: list[dict[str, Any]]) -> dict[str, Any]:
        text = conversation[0]["content"][0]["text"]
        image, *_ = (part["image"] for part in conversation[-1]["content"] if part["type"] == "image")
        task, found = next(
            (name, match) for name, pattern in self.questions.items() if (match := pattern.fullmatch(text))
        )
        if task == "feasibility":
            task, prompt = found.groups()
            return self._feasibility(image, task, json.loads(prompt))
        written = self.target(image, task, found[2] if task == "style" else None)
        if written is None:
            here = _thumbnail(image)
            name = min(self.photographs, key=lambda name: np.abs(self.photographs[name] - here).mean())
            return PHOTOGRAPHS.get((name, task), {"instruction": "", "problem": "nothing comes to mind"})
        things = re.findall(_THING, written[0])
        names = {"object": things[:1], "subject": things[:1], "replacement": things[1:2]}
        names |= {name: re.findall(pattern, written[0])[-1:] for name, pattern in _WORDS.items()}
        return {"instruction": written[0]} | {name: values[0] for name, values in names.items() if values}

    def _feasibility(self, image: Image.Image, task: str, prompt: str) -> dict[str, Any]:
        style = next((name for name in STYLES if prompt == f"Turn the picture into {name} style"), None)
        written = self.target(image, task, style)
        if written is not None:
            before, after = (np.asarray(picture, dtype=float) / 255 for picture in (image, written[1]))
            if (np.abs(after - before).max(-1) > 0.1).mean() < 0.02:
                return {"feasible": False, "reason": "It would change nothing that can be seen."}
        return {"feasible": True, "reason": "All of it is there."}


def _thumbnail(image: Image.Image) -> np.ndarray:
    return np.asarray(read_image(image, "An image").resize((8, 8)), dtype=float)


class SceneJudge:
    """
    A stand-in for the judge. Edits of scenes are scored by [`RuleScorer`], because their target is known. The score of
    an edited photograph only says how much of the photograph was kept.

    Args:
        writer ([`SimulatedWriter`]):
            The writer of the prompts, which knows the target of each scene.
    """

    def __init__(self, writer: SimulatedWriter):
        self.writer = writer

    @property
    def identity(self) -> dict[str, Any]:
        return {"judge": "SceneJudge", "name": "miniature", "score_mode": "integer"}

    def load(self, num_images: int = 2) -> None:
        pass

    def __call__(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        return [self._judge(*read_conversation(conversation)) for conversation in conversations]

    def _judge(self, text: str, instruction: str, images: list[Image.Image]) -> Judgement:
        reference, edit = images
        tasks = [(task, None) for task in TASKS if task != "style"] + [("style", style) for style in STYLES]
        targets = [self.writer.target(reference, *task) for task in tasks]
        known = [target for target in targets if target is not None and target[0] == instruction]
        if known:
            score = RuleScorer().score(edit, reference, known[0][1])
        else:
            size = (32, 32)
            before, after = (np.asarray(picture.resize(size), dtype=float) / 255 for picture in (reference, edit))
            score = 5 * max(0.0, 1 - 4 * float(np.abs(after - before).mean()))
        return Judgement(float(math.floor(score + 0.5)), str(math.floor(score + 0.5)))
