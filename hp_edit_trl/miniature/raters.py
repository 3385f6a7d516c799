"""
Simulated raters and judges for the small world: edits of known quality, raters with known noise, and a judge that
looks at what its scorer prompt asks for. Their agreement is known in closed form.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from ..bench.gedit import as_judged
from ..judges import Judgement, parse_score
from ..ratings import Rating
from ..utils.seeding import seeded_generator
from .scorers import RuleScorer
from .world import to_image


RUBRIC = "miniature:rubric:1"
KEPT = "Is everything that the instruction does not speak of the same in Image B as in Image A? It should be."
# Questions of the simulated proposer. Only KEPT makes the judge look at something new.
IDEAS = ("Are the colors of Image B cheerful? They should be.", KEPT, "Would Image B look well on a wall? It should.")


def seeded_rng(*key: int | str) -> np.random.Generator:
    """A NumPy generator for one purpose, see [`~hp_edit_trl.utils.seeding.seeded_generator`]."""
    return np.random.default_rng(seeded_generator(*key).initial_seed())


def flawed_edits(dataset: Dataset, editors: dict[str, float], seed: int = 0) -> Dataset:
    """
    Makes edits that go part of the way to the target and spoil something else.

    Args:
        dataset ([`~datasets.Dataset`]):
            Cases of [`load_dataset`].
        editors (`dict[str, float]`):
            Name of each simulated editor, and its carelessness from 0 to 1: the probability that an edit stops on the
            way, and the probability that it tints what it should leave alone.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the flaws.

    Returns:
        [`~datasets.Dataset`]: the cases with the columns `edit` and `editor`.
    """
    rows = []
    for row in dataset:
        reference, target = (np.asarray(row[name], dtype=float) / 255 for name in ("image", "target"))
        elsewhere = (np.abs(target - reference).max(-1) <= 0.06)[..., None]
        for editor, carelessness in editors.items():
            rng = seeded_rng(seed, "flaws", row["id"], editor)
            stops, tints = rng.uniform(size=2) < carelessness
            way = rng.uniform(0.3, 0.9) if stops else 1.0
            tint = rng.uniform(-0.25, 0.25, size=3) if tints else np.zeros(3)
            edit = reference + way * (target - reference) + tint * elsewhere
            rows.append({**row, "edit": to_image(edit), "editor": editor})
    return Dataset.from_list(rows).cast_column("edit", ImageFeature())


def true_scores(edits: Dataset) -> list[float]:
    """The score that [`RuleScorer`] gives each edit."""
    scorer = RuleScorer()
    return [scorer.score(row["edit"], row["image"], row["target"]) for row in edits]


def simulate_ratings(edits: Dataset, noise: dict[str, float], seed: int = 0) -> list[Rating]:
    """
    Simulates raters who see the true score with a normal error, and round it to 0..5.

    Args:
        edits ([`~datasets.Dataset`]):
            Edits of [`flawed_edits`].
        noise (`dict[str, float]`):
            Name of each rater, and the standard deviation of the rater's error.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the errors.
    """
    ratings = []
    for row, truth in zip(edits, true_scores(edits), strict=True):
        for name, sigma in noise.items():
            error = seeded_rng(seed, "rating", name, row["id"], row["editor"]).normal(0, sigma)
            score = int(np.clip(math.floor(truth + error + 0.5), 0, 5))
            ratings.append(Rating(name, row["id"], row["editor"], score, RUBRIC, "2026-01-01T00:00:00+00:00"))
    return ratings


def known_pearson(truths: Sequence[float], scores: Sequence[float], noise: Sequence[float]) -> float:
    r"""
    Pearson's correlation between a scorer and the mean of simulated raters, in closed form.

    A rater with noise \\( \sigma \\) rates \\( k \\) with the probability that a normal variable of mean \\( t \\)
    falls into \\( [k - .5, k + .5) \\); values below 0 count as 0, and those above 5 as 5. With the mean \\( e_i \\)
    and the variance \\( v_i \\) of the raters' mean on edit \\( i \\),
    \\( \rho = \operatorname{cov}(s, e) / \sqrt{\operatorname{var}(s) (\operatorname{var}(e) + \bar v)} \\).

    Args:
        truths (`Sequence[float]`):
            The true score of each edit.
        scores (`Sequence[float]`):
            The scorer's score of each edit.
        noise (`Sequence[float]`):
            The standard deviation of each rater's error.
    """
    grades = np.arange(6)
    edges = grades[1:] - 0.5
    means, variances = [], []
    for truth in truths:
        mean = variance = 0.0
        for sigma in noise:
            below = np.array([0.5 * (1 + math.erf((edge - truth) / (sigma * math.sqrt(2)))) for edge in edges])
            probabilities = np.diff(below, prepend=0.0, append=1.0)
            first = float(probabilities @ grades)
            mean += first / len(noise)
            variance += (float(probabilities @ grades**2) - first**2) / len(noise) ** 2
        means.append(mean)
        variances.append(variance)
    covariance = np.cov(scores, means, bias=True)
    return float(covariance[0, 1] / math.sqrt(covariance[0, 0] * (covariance[1, 1] + np.mean(variances))))


def read_conversation(conversation: list[dict[str, Any]]) -> tuple[str, str, list[Image.Image]]:
    """Returns what a judge is given: the text of the scorer prompt, the instruction in it, and the images in order."""
    text = conversation[0]["content"][0]["text"]
    found = re.search(r"^Instruction: (.*)$", text, re.MULTILINE)
    instruction = "" if found is None else found[1]
    if instruction.startswith('"'):  # HP-Scorer's prompts quote it, those of benchmarks do not
        instruction = json.loads(instruction)
    images = [part["image"] for part in conversation[-1]["content"] if part["type"] == "image"]
    return text, instruction, images


class SimulatedJudge:
    """
    A judge of the small world. It always sees how far an edit went. It sees whether the rest was kept only if its
    scorer prompt asks for that.

    Args:
        dataset ([`~datasets.Dataset`]):
            The cases whose targets it knows.
    """

    def __init__(self, dataset: Dataset):
        self.targets = {(row["image"].tobytes(), row["prompt"]): row["target"] for row in dataset}

    @property
    def identity(self) -> dict[str, Any]:
        return {"judge": "SimulatedJudge", "name": "miniature", "score_mode": "integer"}

    def load(self, num_images: int = 2) -> None:
        pass

    def __call__(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        return [self._judge(*read_conversation(conversation)) for conversation in conversations]

    def _judge(self, text: str, instruction: str, images: list[Image.Image]) -> Judgement:
        reference, edit = images
        target: Image.Image | None = self.targets.get((reference.tobytes(), instruction))
        if target is None:
            return Judgement(None, "I do not know this picture.")
        reached, kept = RuleScorer().parts(edit, reference, target)
        score = math.floor(5 * reached * (kept if KEPT in text else 1.0) + 0.5)
        return Judgement(float(score), str(score))


class TargetJudge:
    """
    A judge of the small world that knows what every prompt asks for. To a scorer prompt of HP-Scorer it answers with
    the score of [`RuleScorer`] as a whole number. To a scorer prompt of GEdit-Bench it answers with two numbers from 0
    to 10: how far the target was reached and how much of the rest was kept; or, for an edit alone, twice how close it
    is to any picture of its cases.

    Args:
        dataset ([`~datasets.Dataset`]):
            The cases whose targets it knows.
        parse (`Callable[[str], float | None]`, *optional*, defaults to [`parse_score`]):
            Reads the score from its answers: [`parse_score`] or [`parse_pair`].
    """

    def __init__(self, dataset: Dataset, parse: Callable[[str], float | None] = parse_score):
        self.parse = parse
        self.size = dataset[0]["image"].size
        seen = [
            [self._small(row[name] if parse is parse_score else as_judged(row[name])) for name in ("image", "target")]
            for row in dataset
        ]
        self.targets = {
            (image.tobytes(), prompt): target for prompt, (image, target) in zip(dataset["prompt"], seen, strict=True)
        }
        self.pictures = np.stack([np.asarray(picture, np.float32) / 255 for pictures in seen for picture in pictures])

    @property
    def identity(self) -> dict[str, Any]:
        return {"judge": "TargetJudge", "name": "miniature", "parse": self.parse.__name__}

    def load(self, num_images: int = 2) -> None:
        pass

    def __call__(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        answers = [self._answer(*read_conversation(conversation)[1:]) for conversation in conversations]
        return [Judgement(self.parse(answer), answer) for answer in answers]

    def _small(self, image: Image.Image) -> Image.Image:
        """A picture at the size of the cases: GEdit-Bench shows larger ones."""
        return image if image.size == self.size else image.resize(self.size, Image.Resampling.BOX)

    def _answer(self, instruction: str, images: list[Image.Image]) -> str:
        *references, edit = map(self._small, images)
        if not references:
            away = np.abs(self.pictures - np.asarray(edit, np.float32) / 255).mean((1, 2, 3)).min()
            return json.dumps([round(10 * max(0.0, 1 - float(away) / 0.1))] * 2)
        target = self.targets.get((references[0].tobytes(), instruction))
        if target is None:
            return "I do not know this picture."
        reached, kept = RuleScorer().parts(edit, references[0], target)
        if self.parse is parse_score:
            return str(math.floor(5 * reached * kept + 0.5))
        return json.dumps([round(10 * reached), round(10 * kept)])


class SimulatedProposer:
    """A stand-in for a model that proposes questions: it proposes the first of a few ideas that was not tried yet."""

    def __call__(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        text = conversations[0][0]["content"][0]["text"]
        return [Judgement(None, json.dumps([idea for idea in IDEAS if idea not in text][:1]))]
