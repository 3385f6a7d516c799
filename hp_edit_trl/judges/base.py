"""The judge interface, its answers, and what all backends share."""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from PIL import Image

from ..utils.images import read_image
from ..utils.texts import is_blank, shortened


DIGITS = ("0", "1", "2", "3", "4", "5")
ScoreMode = Literal["integer", "expected"]
Parser = Callable[[str], float | None]

LONGEST_ANSWER = 20_000  # characters; a model that writes more is stuck in a loop

# Tokens that score_mode="expected" reads the beginning of an answer from: whether a number goes on after its digit
NUM_ANSWER_TOKENS = 4
# A number that begins with a digit from 0 to 5 but is no score: 10, 4.5, 4/10, 4-5, 40 %
_OTHER_NUMBER = re.compile(r"\s*[0-5](?:\d|[.,]\d*[1-9]|(?:[.,]0*)?\s*(?:/\s*(?!5(?!\d))\d|[-–]\s*\d|%))")


@dataclass(frozen=True)
class Judgement:
    """
    A judge's answer about one edit, and the score in it.

    Args:
        score (`float` or `None`):
            The score, in [0, 5] unless the judge takes another kind of answer; `None` if there is none, never a guess.
        answer (`str`):
            The judge's answer, or the reason why there is none. Cut off after 20,000 characters.
        answered (`bool`, *optional*, defaults to `True`):
            Whether there was an answer. A timeout, a refused request, an empty answer or an image that the judge
            cannot read counts as no answer.
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
        failure (`str`, *optional*):
            The kind of failure, if there was no answer: `"timeout"`, `"connection"`, `"rate limit"`, `"http 500"` (or
            another status), `"refused"` (the key), `"too large"`, `"encoding"`, `"redirect"`, `"empty"`,
            `"malformed"`, `"image"` (it cannot be shown to the judge) or, if the judge does not say, `"no answer"`.
        requests (`int`, *optional*, defaults to `0`):
            Number of requests to a server.
        retries (`int`, *optional*, defaults to `0`):
            Number of these that repeated a failed one.
        seconds_lost (`float`, *optional*, defaults to `0.0`):
            Seconds that failed requests and the pauses after them took.
        servers (`tuple[str, ...]`, *optional*, defaults to `()`):
            The server of each request.
    """

    score: float | None
    answer: str
    answered: bool = True
    seconds: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    cached: bool = False
    unparsed: int = 0
    failure: str | None = None
    requests: int = 0
    retries: int = 0
    seconds_lost: float = 0.0
    servers: tuple[str, ...] = ()

    def __post_init__(self):
        if self.score is not None and not math.isfinite(self.score):
            object.__setattr__(self, "score", None)
        # Half a character, which servers cut off at times, cannot be written to any file.
        answer = self.answer.encode("utf-8", "replace").decode()
        object.__setattr__(self, "answer", shortened(answer, LONGEST_ANSWER))
        if self.score is None and is_blank(answer):
            object.__setattr__(self, "answered", False)
            object.__setattr__(self, "failure", self.failure or "empty")
        elif not self.answered and self.failure is None:
            object.__setattr__(self, "failure", "no answer")

    @property
    def excerpt(self) -> str:
        """The beginning of the answer, for a log line or an error."""
        return shortened(self.answer)


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

    def load(self, num_images: int = 2) -> None:
        """
        Gets ready to judge, and judges a trial with `num_images` images, the largest number that a case of the run
        has. Raises an error if that is impossible; called before any rollout.
        """

    def __call__(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        """
        Judges conversations in the chat format of transformers: messages with a `role` and a list of `content` parts,
        which are `{"type": "text", "text": ...}` or `{"type": "image", "image": PIL.Image}`. What looks like a control
        token in a text is broken up. A text with `"trusted": True` may hold those that are none of the model's own.
        """


def describe_judge(judge: Judge) -> str:
    """The identity of a judge in one line, e.g. `"judge ServerJudge, name m, score_mode integer, ..."`."""
    return ", ".join(f"{name} {value}" for name, value in judge.identity.items() if value is not None)


def without_reasoning(answer: str) -> str:
    """The part of an answer after the reasoning that `</think>` closes; the whole answer if there is none."""
    return answer.rpartition("</think>")[2]


def is_empty(answer: str) -> bool:
    """Whether an answer holds nothing, or nothing but reasoning, closed or cut off."""
    return is_blank(without_reasoning(answer).partition("<think>")[0])


def load_for(judge: Judge, num_images: int) -> None:
    """
    Gets a judge ready for cases with up to `num_images` images. Two, a reference and an edit, are what `load` tries by
    itself.
    """
    if num_images > 2:
        judge.load(num_images)
    else:
        judge.load()


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


def mean_score(answers: list[str], parse: Parser, max_new_tokens: int) -> Judgement:
    """Mean of the scores in several answers; none if most of them hold none, and no answer if all are empty."""
    if all(map(is_empty, answers)):
        reason = (
            f"the answer is empty, or holds nothing but reasoning: a model that reasons needs more than "
            f"max_new_tokens={max_new_tokens}, or its reasoning switched off. It wrote {shortened(answers[0])!r}."
        )
        return Judgement(None, reason, answered=False, failure="empty")
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


def digit_of_token(token: str) -> int | None:
    """
    The digit from 0 to 5 that a token stands for, with any space or mark of a tokenizer around it: `"4"`, `" 4"`,
    `"▁4"`, `"Ġ4"`, `"4Ċ"` and `"<0x34>"` are a 4. `"4."`, `"10"` and `"<4>"` are no digit.
    """
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    text = chr(int(byte[1], 16)) if byte else token
    text = re.sub("[ĠĊĉč▁]", " ", text).strip()
    return int(text) if text in DIGITS else None


def expected_score(weights: list[float], min_digit_mass: float, answer: str = "") -> Judgement:
    """
    Expectation over the probabilities of the digits 0 to 5 as the next token.

    There is no score if the digits together are less probable than `min_digit_mass`, or if the answer itself begins
    with a number that is no score: 10, which many models write as a 1 and a 0, must not count as a 1. Only the
    likeliest digit can be checked in this way; what would follow another digit is not known.

    Args:
        weights (`list[float]`):
            Probabilities of the digits 0 to 5.
        min_digit_mass (`float`):
            Smallest sum of them.
        answer (`str`, *optional*, defaults to `""`):
            The beginning of the likeliest answer.
    """
    mass = sum(weights)
    if not mass > 0 or mass < min_digit_mass:  # nor NaN
        return Judgement(None, f"the digits 0 to 5 together have a probability of only {mass:.3g}")
    if _OTHER_NUMBER.match(answer):
        return Judgement(None, f"the answer begins with a number that is no score: {shortened(answer)!r}")
    score = sum(digit * weight for digit, weight in enumerate(weights)) / mass
    return Judgement(score, f"expected {score:.3f}, digits have a probability of {mass:.3g}")


def trial_conversation(num_images: int = 2) -> list[dict[str, Any]]:
    """A conversation that any judge must be able to answer, with `num_images` gray images."""
    pictures = [{"type": "image", "image": Image.new("RGB", (64, 64), (128, 128, 128))} for _ in range(num_images)]
    return [
        {"role": "system", "content": [{"type": "text", "text": "Answer with one digit from 0 to 5."}]},
        {"role": "user", "content": [{"type": "text", "text": "How alike are these images?"}, *pictures]},
    ]
