"""
Judges: vision-language models that answer a scorer prompt. One runs in this process, one behind an OpenAI-compatible
server. How a model is reached is nobody else's business.
"""

import base64
import io
import logging
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from accelerate import PartialState
from PIL import Image
from qwen_vl_utils import fetch_image
from transformers import AutoModelForImageTextToText, AutoProcessor


logger = logging.getLogger(__name__)

DIGITS = ("0", "1", "2", "3", "4", "5")
ScoreMode = Literal["integer", "expected"]


@dataclass(frozen=True)
class Judgement:
    """
    A judge's verdict on one case.

    Args:
        score (`float` or `None`):
            The score in [0, 5]; `None` if there is none, never a guess.
        answer (`str`):
            What the judge answered, or what went wrong.
    """

    score: float | None
    answer: str


class Judge(Protocol):
    """What [`HPScorerReward`] needs of a judge."""

    def load(self) -> None:
        """Gets ready to judge. Raises if that is impossible; called before any rollout."""

    def __call__(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        """
        Judges conversations in the chat format of transformers: messages with a `role` and a list of `content` parts,
        which are `{"type": "text", "text": ...}` or `{"type": "image", "image": PIL.Image}`.
        """


def parse_score(answer: str) -> float | None:
    """
    The score in a judge's answer, or `None` if it does not hold exactly one.

    Accepts a digit from 0 to 5, alone or as in `"Score: 4"`, `"4/5"`, `"4.0"` or `"**4**"`, after any reasoning that is
    closed by `</think>`. Everything else could only be guessed at.
    """
    text = re.sub(r"[*_`\s]+", " ", answer.rpartition("</think>")[2]).strip()
    match = re.fullmatch(r"(?:(?:final |overall )?(?:score|rating|grade|answer)\s*(?:is|:|=)?\s*)?([0-5])(?:\.0)?(?: ?/ ?5)?\.?", text, re.IGNORECASE)  # fmt: skip
    return float(match[1]) if match else None


def _check_score_mode(score_mode: str) -> None:
    if score_mode not in ("integer", "expected"):
        raise ValueError(f"score_mode={score_mode!r} is not known: use 'integer' or 'expected'.")


def _fitted(image: Image.Image, max_pixels: int) -> Image.Image:
    """The image in RGB, scaled down to `max_pixels` if it is larger."""
    scale = math.sqrt(max_pixels / (image.width * image.height))
    if scale < 1:
        image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    return image.convert("RGB")


def _expected_score(weights: list[float], min_digit_mass: float) -> Judgement:
    """Expectation over the probabilities of the digits 0 to 5 as the next token."""
    mass = sum(weights)
    if mass == 0 or mass < min_digit_mass:
        return Judgement(None, f"the digits 0 to 5 together have a probability of only {mass:.3g}")
    score = sum(digit * weight for digit, weight in enumerate(weights)) / mass
    return Judgement(score, f"expected {score:.3f}, digits have a probability of {mass:.3g}")


def _trial() -> list[dict[str, Any]]:
    """A conversation that any judge must be able to answer."""
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    pictures = [{"type": "image", "image": grey}, {"type": "image", "image": grey}]
    return [
        {"role": "system", "content": [{"type": "text", "text": "Answer with one digit from 0 to 5."}]},
        {"role": "user", "content": [{"type": "text", "text": "How alike are these two images?"}, *pictures]},
    ]


class TransformersJudge:
    """
    A chat vision-language model in this process: anything that `AutoModelForImageTextToText` loads.

    Args:
        model (`str`):
            Hub id or local folder, e.g. `"Qwen/Qwen3-VL-32B-Instruct"`.
        score_mode (`str`, *optional*, defaults to `"integer"`):
            `"integer"`: the digit that the model answers. `"expected"`: the expectation over the probabilities that the
            model gives to the digits 0 to 5 as its next token, which has no ties and costs no generation.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of cases judged together.
        max_new_tokens (`int`, *optional*, defaults to `16`):
            Longest answer in the mode `"integer"`; raise it for models that reason aloud.
        max_pixels (`int`, *optional*, defaults to `1048576`):
            Larger images are scaled down to this area before the judge sees them.
        min_digit_mass (`float`, *optional*, defaults to `0.5`):
            In the mode `"expected"`: where the digits together are less probable than this, the model is not about to
            answer with a score, and there is none.
        device (`torch.device` or `str`, *optional*):
            Where it runs. By default this process's accelerator.
        model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained`, e.g. `{"dtype": "bfloat16", "revision": "..."}`.

    Raises:
        `ValueError`: If the model cannot be found, or its vocabulary lacks a token for a score.
    """

    def __init__(
        self,
        model: str,
        score_mode: ScoreMode = "integer",
        batch_size: int = 8,
        max_new_tokens: int = 16,
        max_pixels: int = 1024 * 1024,
        min_digit_mass: float = 0.5,
        device: torch.device | str | None = None,
        model_init_kwargs: dict | None = None,
    ):
        _check_score_mode(score_mode)
        self.name = model
        self.score_mode = score_mode
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.max_pixels = max_pixels
        self.min_digit_mass = min_digit_mass
        self.device = device
        self.model_init_kwargs = {"dtype": "auto", **(model_init_kwargs or {})}
        try:
            self.processor = AutoProcessor.from_pretrained(model, revision=self.model_init_kwargs.get("revision"))
        except (OSError, ValueError) as error:
            raise ValueError(f"The judge {model!r} has no processor that transformers can load: {error}") from error
        if not hasattr(self.processor, "image_processor"):
            raise ValueError(f"The judge {model!r} takes no images: use a vision-language model.")
        if self.processor.chat_template is None:
            raise ValueError(f"The judge {model!r} has no chat template: use an instruction-tuned model.")
        self.digit_ids = []
        for digit in DIGITS:
            ids = self.processor.tokenizer(digit, add_special_tokens=False)["input_ids"]
            if len(ids) != 1 or ids[0] == self.processor.tokenizer.unk_token_id:
                raise ValueError(
                    f"The judge {model!r} has no single token for the score {digit!r}, so it cannot be used here: "
                    "use a model whose tokenizer keeps digits apart."
                )
            self.digit_ids.append(ids[0])

    @cached_property
    def model(self):
        device = self.device or PartialState().device
        model = AutoModelForImageTextToText.from_pretrained(self.name, **self.model_init_kwargs)
        return model.requires_grad_(False).eval().to(device)

    def load(self) -> None:
        """Loads the weights and asks for one judgement of two grey squares."""
        self([_trial()])

    @torch.no_grad()
    def __call__(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        judgements: dict[int, Judgement] = {}
        fitted = {}
        for index, conversation in enumerate(conversations):
            try:
                fitted[index] = self._fit(conversation)
            except ValueError as error:  # e.g. an image a hundred times as wide as high
                judgements[index] = Judgement(None, f"{type(error).__name__}: {error}")
        readable = list(fitted)
        for start in range(0, len(readable), self.batch_size):
            members = readable[start : start + self.batch_size]
            judged = self._judge([fitted[index] for index in members])
            judgements.update(zip(members, judged, strict=True))
        return [judgements[index] for index in range(len(conversations))]

    def _judge(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            # A reloaded tokenizer may pad on the right, where the next token would be predicted from padding.
            processor_kwargs={"padding": True, "padding_side": "left", "return_tensors": "pt"},
        ).to(self.model.device)
        if self.score_mode == "expected":
            probabilities = self.model(**inputs, logits_to_keep=1).logits[:, -1].float().softmax(-1)
            return [_expected_score(row, self.min_digit_mass) for row in probabilities[:, self.digit_ids].tolist()]
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        answers = self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [Judgement(parse_score(answer), answer) for answer in answers]

    def _fit(self, conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
        patch_size = getattr(self.processor.image_processor, "patch_size", 14)

        def fit(part: dict[str, Any]) -> dict[str, Any]:
            if part["type"] != "image":
                return part
            image = _fitted(part["image"], self.max_pixels)
            return {"type": "image", "image": fetch_image({"image": image}, image_patch_size=patch_size)}

        return [{**message, "content": [fit(part) for part in message["content"]]} for message in conversation]


class ServerJudge:
    """
    A vision-language model behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve` or a hosted API.

    Needs the extra `server` (`pip install "hp-edit-trl[server]"`). Requests that time out, are refused for their rate or
    meet a server error are repeated with growing pauses; what still fails is a missing score.

    Args:
        model (`str`):
            Name of the model on the server.
        base_url (`str`):
            Address of the API, e.g. `"http://localhost:8000/v1"`.
        score_mode (`str`, *optional*, defaults to `"integer"`):
            As in [`TransformersJudge`]. `"expected"` needs a server that returns `top_logprobs`; a digit that is not
            among the 20 likeliest tokens counts as impossible.
        api_key (`str`, *optional*):
            Key of a hosted API. By default the environment variable `OPENAI_API_KEY`, or none.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds after which one attempt is given up.
        max_retries (`int`, *optional*, defaults to `4`):
            Number of further attempts.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Largest number of requests under way at once, from this process.
        max_new_tokens (`int`, *optional*, defaults to `16`):
            Longest answer in the mode `"integer"`; raise it for models that reason aloud.
        max_pixels (`int`, *optional*, defaults to `1048576`):
            Larger images are scaled down to this area before they are sent.
        min_digit_mass (`float`, *optional*, defaults to `0.5`):
            As in [`TransformersJudge`].

    Raises:
        `ImportError`: If the extra is not installed.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        score_mode: ScoreMode = "integer",
        api_key: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 4,
        max_concurrency: int = 16,
        max_new_tokens: int = 16,
        max_pixels: int = 1024 * 1024,
        min_digit_mass: float = 0.5,
    ):
        _check_score_mode(score_mode)
        try:
            import openai
        except ImportError as error:
            raise ImportError('A judge on a server needs the extra: pip install "hp-edit-trl[server]"') from error
        self.name = model
        self.base_url = base_url
        self.score_mode = score_mode
        self.max_concurrency = max_concurrency
        self.max_new_tokens = max_new_tokens
        self.max_pixels = max_pixels
        self.min_digit_mass = min_digit_mass
        self._errors = (openai.APIError,)
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none",
            timeout=timeout,
            max_retries=max_retries,
        )

    def load(self) -> None:
        """
        Asks for one judgement of two grey squares, without retries: an address where nobody listens, an unknown model, a
        wrong key, a model that takes no images or a server that returns no probabilities all show before the training
        starts.
        """
        try:
            judgement = self._ask(_trial(), self._client.with_options(max_retries=0))
        except (*self._errors, ValueError) as error:
            raise ConnectionError(
                f"The judge {self.name!r} at {self.base_url} gives no judgements: {type(error).__name__}: {error}"
            ) from error
        if judgement.score is None:
            logger.warning(f"The judge {self.name!r} answered a trial without a score: {judgement.answer!r}.")

    def __call__(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        def judge(conversation: list[dict[str, Any]]) -> Judgement:
            try:
                return self._ask(conversation, self._client)
            except (*self._errors, ValueError) as error:
                return Judgement(None, f"{type(error).__name__}: {error}")

        with ThreadPoolExecutor(self.max_concurrency) as pool:
            return list(pool.map(judge, conversations))

    def _ask(self, conversation: list[dict[str, Any]], client) -> Judgement:
        messages = [
            {"role": message["role"], "content": [self._as_openai(part) for part in message["content"]]}
            for message in conversation
        ]
        options: dict[str, Any] = (
            {"max_tokens": self.max_new_tokens}
            if self.score_mode == "integer"
            else {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        )
        reply = client.chat.completions.create(model=self.name, messages=messages, temperature=0, **options)
        try:
            choice = reply.choices[0]
            content = choice.message.content or ""
            answer = content if isinstance(content, str) else "".join(part["text"] for part in content)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"the server's reply is no chat completion: {str(reply)[:200]}") from error
        if self.score_mode == "integer":
            return Judgement(parse_score(answer), answer)
        if choice.logprobs is None or not choice.logprobs.content or not choice.logprobs.content[0].top_logprobs:
            raise ValueError("the server returned no top_logprobs, which score_mode='expected' needs; use 'integer'")
        likeliest = choice.logprobs.content[0].top_logprobs
        weights = [sum(math.exp(t.logprob) for t in likeliest if t.token.strip() == digit) for digit in DIGITS]
        return _expected_score(weights, self.min_digit_mass)

    def _as_openai(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        buffer = io.BytesIO()
        _fitted(part["image"], self.max_pixels).save(buffer, "PNG", compress_level=1)
        data = base64.b64encode(buffer.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
