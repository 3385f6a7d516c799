"""
Scorers of edits in the small world, where the target of every prompt is known. A task-aware scorer stands for
HP-Scorer, and a coarse and noisy one for the paper's base scorer. Both are reward functions.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ..utils.images import read_image


def _array(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(read_image(image, "An image").resize(size), dtype=float) / 255


def _ramp(value, low: float, high: float):
    return np.clip((value - low) / (high - low), 0, 1)


class RuleScorer:
    r"""
    Task-aware scorer: was the target reached, and was the rest preserved?

    \\( s = 5 \, a \, p \\). \\( a \\) is how far the pixels that the prompt changes went from the reference to the
    target (each counts from 30 % of the way, and fully at 80 %). \\( p \\) is the share of all other pixels that were
    kept (each counts fully up to a deviation of 0.06, and not at all from 0.18). The untouched reference scores 0, the
    target 5.

    It is a reward function, called with `completions` and the columns `image` and `target` of the dataset. The reward
    is \\( 1 / (1 + e^{-\alpha s + \beta}) \\), as in [`HPScorerReward`].

    Args:
        alpha (`float`, *optional*, defaults to `2.0`):
            Scale of the reward's sigmoid.
        beta (`float`, *optional*, defaults to `5.0`):
            Shift of the reward's sigmoid.
    """

    log_name = "score"

    def __init__(self, alpha: float = 2.0, beta: float = 5.0):
        self.alpha = alpha
        self.beta = beta

    def parts(self, edit: Image.Image, reference: Image.Image, target: Image.Image) -> tuple[float, float]:
        """How far the target was reached, and how much of the rest was preserved: a and p, in [0, 1]."""
        after, before, wanted = (_array(image, target.size) for image in (edit, reference, target))
        way = np.abs(wanted - before).max(-1)
        missing = np.abs(after - wanted).max(-1)
        changed = way > 0.06
        reached = _ramp(1 - missing[changed] / way[changed], 0.3, 0.8).mean()
        kept = (1 - _ramp(missing[~changed], 0.06, 0.18)).mean() if (~changed).any() else 1.0
        return float(_ramp(reached, 0.1, 0.95)), float(_ramp(kept, 0.5, 0.97))

    def score(self, edit: Image.Image, reference: Image.Image, target: Image.Image) -> float:
        """Scores one edit, from 0 to 5."""
        reached, kept = self.parts(edit, reference, target)
        return 5 * reached * kept

    def __call__(
        self,
        completions: list[Image.Image],
        image: list[Image.Image],
        target: list[Image.Image],
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        scores = [self.score(*images) for images in zip(completions, image, target, strict=True)]
        if log_extra is not None:
            log_extra(self.log_name, scores)
        if log_metric is not None:
            log_metric(self.log_name, sum(scores) / len(scores))
        return [1 / (1 + math.exp(self.beta - self.alpha * score)) for score in scores]


class CoarseScorer(RuleScorer):
    """
    Coarse, generous and noisy scorer, a stand-in for a scorer with one scorer prompt for all tasks.

    It compares averages over blocks of 8 by 8 pixels with those of the target. Small objects and details therefore
    count for little, and an untouched reference scores well. The noise that it adds depends on the picture alone: the
    same edit always gets the same score.

    Args:
        noise (`float`, *optional*, defaults to `0.5`):
            Standard deviation of the noise.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the noise.
        alpha (`float`, *optional*, defaults to `2.0`):
            Scale of the reward's sigmoid.
        beta (`float`, *optional*, defaults to `5.0`):
            Shift of the reward's sigmoid.
    """

    log_name = "coarse_score"

    def __init__(self, noise: float = 0.5, seed: int = 0, alpha: float = 2.0, beta: float = 5.0):
        super().__init__(alpha, beta)
        self.noise = noise
        self.seed = seed

    def score(self, edit: Image.Image, reference: Image.Image, target: Image.Image) -> float:
        """Scores one edit, from 0 to 5."""
        after, wanted = (_array(image, target.size) for image in (edit, target))
        rows, columns = after.shape[0] // 8, after.shape[1] // 8
        blocks = [a[: rows * 8, : columns * 8].reshape(rows, 8, columns, 8, 3).mean((1, 3)) for a in (after, wanted)]
        distance = np.abs(blocks[0] - blocks[1]).mean()
        key = hashlib.sha256(repr(self.seed).encode() + after.tobytes()).digest()
        noise = np.random.default_rng(np.frombuffer(key, dtype=np.uint32)).normal(0, self.noise)
        return float(np.clip(5 * (1 - distance / 0.35) + noise, 0, 5))
