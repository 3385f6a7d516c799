"""The judge interface, its answers, and what all backends share."""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from PIL import Image

from ..utils.images import read_image


DIGITS = ("0", "1", "2", "3", "4", "5")
ScoreMode = Literal["integer", "expected"]
Parser = Callable[[str], float | None]


@dataclass(frozen=True)
class Judgement:
    """
    A judge's answer about one edit, and the score in it.

    Args:
        score (`float` or `None`):
            The score, in [0, 5] unless the judge takes another kind of answer; `None` if there is none, never a guess.
        answer (`str`):
            The judge's answer, or the reason why there is none.
        answered (`bool`, *optional*, defaults to `True`):
            Whether there was an answer. A timeout, a refused request or an image that the judge cannot read counts as
            no answer.
        seconds (`float`, *optional*, defaults to `0.0`):
            How long it took; its share of the time, if it was judged together with others.
        input_tokens (`int`, *optional*, defaults to `0`):
            Number of tokens that the judge read, if known.
        output_tokens (`int`, *optional*, defaults to `0`):
            Number of tokens that it wrote.
        cached (`bool`, *optional*, defaults to `False`):
            Whether it came from the cache, see [`CachedJudge`].
        unparsed (`int`, *optional*, defaults to `0`):
            Number of answers without a score among those that were averaged.
    """

    score: float | None
    answer: str
    answered: bool = True
    seconds: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    cached: bool = False
    unparsed: int = 0

    def __post_init__(self):
        if self.score is not None and not math.isfinite(self.score):
            object.__setattr__(self, "score", None)
        # Half a character, which servers cut off at times, cannot be written to any file.
        object.__setattr__(self, "answer", self.answer.encode("utf-8", "replace").decode())


@runtime_checkable
class Judge(Protocol):
    """
    A vision-language model that answers a prompt about images. Callers do not need to know which backend is used.
    """

    @property
    def identity(self) -> dict[str, Any]:
        """
        Everything that decides the answers: `judge` (the kind of judge), `name`, `revision`, `score_mode` and other
        settings, as far as they apply. Scores of judges with different identities are never mixed.
        """

    def load(self) -> None:
        """Gets ready to judge. Raises an error if that is impossible; called before any rollout."""

    def __call__(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        """
        Judges conversations in the chat format of transformers: messages with a `role` and a list of `content` parts,
        which are `{"type": "text", "text": ...}` or `{"type": "image", "image": PIL.Image}`.
        """


def describe_judge(judge: Judge) -> str:
    """The identity of a judge in one line, e.g. `"judge ServerJudge, name m, score_mode integer, ..."`."""
    return ", ".join(f"{name} {value}" for name, value in judge.identity.items() if value is not None)


def without_reasoning(answer: str) -> str:
    """The part of an answer after the reasoning that `</think>` closes; the whole answer if there is none."""
    return answer.rpartition("</think>")[2]


def parse_score(answer: str) -> float | None:
    """
    The score in a judge's answer, or `None` if it does not hold exactly one.

    Accepts a digit from 0 to 5, alone or as in `"Score: 4"`, `"4/5"`, `"4.0"` or `"**4**"`, after any reasoning that
    is closed by `</think>`. Other answers have no score: it could only be guessed.
    """
    text = re.sub(r"[*_`\s]+", " ", without_reasoning(answer)).strip()
    label = r"(?:(?:final |overall )?(?:score|rating|grade|answer)\s*(?:is|:|=)?\s*)?"
    match = re.fullmatch(label + r"([0-5])(?:\.0)?(?: ?/ ?5)?\.?", text, re.IGNORECASE)
    return float(match[1]) if match else None


def check_judge_options(score_mode: str, num_answers: int, temperature: float, parse: Parser, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1.")
    if score_mode not in ("integer", "expected"):
        raise ValueError(f"score_mode={score_mode!r} is not known: use 'integer' or 'expected'.")
    if num_answers < 1 or temperature <= 0:
        raise ValueError(
            f"num_answers={num_answers} and temperature={temperature} must be above zero; a single answer is greedy."
        )
    if score_mode == "expected" and parse is not parse_score:
        raise ValueError(
            "score_mode='expected' reads the probabilities of the digits 0 to 5 and cannot use "
            f"parse={parse.__name__}: use score_mode='integer'."
        )
    if score_mode == "expected" and num_answers > 1:
        raise ValueError(
            f"num_answers={num_answers} has no meaning with score_mode='expected', which reads the "
            "probabilities themselves: use one of them."
        )


def count_pictures(conversation: list[dict[str, Any]]) -> int:
    """Number of pictures in the last message."""
    return sum(part["type"] == "image" for part in conversation[-1]["content"])


def mean_score(answers: list[str], parse: Parser) -> Judgement:
    """Mean of the scores in several answers; none if most of them hold none."""
    scores = [score for score in map(parse, answers) if score is not None]
    text = " | ".join(answers)
    if 2 * len(scores) < len(answers):
        return Judgement(None, text)
    return Judgement(sum(scores) / len(scores), text, unparsed=len(answers) - len(scores))


def conversation_digest(conversation: list[dict[str, Any]]) -> bytes:
    """A digest of a conversation: its texts, and the pixels of its pictures."""
    digest = hashlib.sha256()
    for message in conversation:
        digest.update(repr(message["role"]).encode())
        for part in message["content"]:
            if part["type"] == "image":
                picture = read_image(part["image"], "An image of the conversation")
                digest.update(repr(picture.size).encode() + picture.tobytes())
            else:
                digest.update(repr(part["text"]).encode())
    return digest.digest()


def fit_image(image: Image.Image, max_pixels: int) -> Image.Image:
    """The image, see [`~hp_edit_trl.utils.images.read_image`], scaled down to `max_pixels` if it is larger."""
    image = read_image(image, "An image of the conversation")
    scale = math.sqrt(max_pixels / (image.width * image.height))
    if scale < 1:
        image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    return image


def expected_score(weights: list[float], min_digit_mass: float) -> Judgement:
    """Expectation over the probabilities of the digits 0 to 5 as the next token."""
    mass = sum(weights)
    if not mass > 0 or mass < min_digit_mass:  # nor NaN
        return Judgement(None, f"the digits 0 to 5 together have a probability of only {mass:.3g}")
    score = sum(digit * weight for digit, weight in enumerate(weights)) / mass
    return Judgement(score, f"expected {score:.3f}, digits have a probability of {mass:.3g}")


def trial_conversation() -> list[dict[str, Any]]:
    """A conversation that any judge must be able to answer."""
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    pictures = [{"type": "image", "image": grey}, {"type": "image", "image": grey}]
    return [
        {"role": "system", "content": [{"type": "text", "text": "Answer with one digit from 0 to 5."}]},
        {"role": "user", "content": [{"type": "text", "text": "How alike are these two images?"}, *pictures]},
    ]
