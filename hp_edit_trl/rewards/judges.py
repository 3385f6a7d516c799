"""
Judges: vision-language models that answer a scorer prompt. One runs in this process, one behind an OpenAI-compatible
server. How a model is reached is nobody else's business.
"""

import base64
import hashlib
import io
import logging
import math
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import PartialState
from PIL import Image
from qwen_vl_utils import fetch_image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, DynamicCache


logger = logging.getLogger(__name__)

DIGITS = ("0", "1", "2", "3", "4", "5")
ScoreMode = Literal["integer", "expected"]
Parser = Callable[[str], float | None]

# Models that are known to read their pictures as one run of patches each, with rotary positions from `get_rope_index`
SHARES_PREFIX = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


@dataclass(frozen=True)
class Judgement:
    """
    A judge's verdict on one case.

    Args:
        score (`float` or `None`):
            The score, in [0, 5] unless the judge takes another kind of answer; `None` if there is none, never a guess.
        answer (`str`):
            What the judge answered, or what went wrong.
        answered (`bool`, *optional*, defaults to `True`):
            Whether there was an answer at all. A time-out, a refused request or a picture that the judge cannot take is none.
        seconds (`float`, *optional*, defaults to `0.0`):
            How long it took; its share of the time, if it was judged together with others.
        input_tokens (`int`, *optional*, defaults to `0`):
            Number of tokens that the judge read, as far as known.
        output_tokens (`int`, *optional*, defaults to `0`):
            Number of tokens that it wrote.
        cached (`bool`, *optional*, defaults to `False`):
            Whether it was known from before, see [`CachedJudge`].
        unparsed (`int`, *optional*, defaults to `0`):
            How many of several answers, whose scores were averaged, held none.
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
        # Half a character, which servers cut off at times, cannot be written to any file.
        object.__setattr__(self, "answer", self.answer.encode("utf-8", "replace").decode())


class Judge(Protocol):
    """What [`HPScorerReward`] needs of a judge."""

    @property
    def identity(self) -> dict[str, Any]:
        """Whatever decides what the judge answers: model, revision, mode, settings. Scores of different ones do not mix."""

    def load(self) -> None:
        """Gets ready to judge. Raises if that is impossible; called before any rollout."""

    def __call__(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        """
        Judges conversations in the chat format of transformers: messages with a `role` and a list of `content` parts,
        which are `{"type": "text", "text": ...}` or `{"type": "image", "image": PIL.Image}`.
        """


def describe_judge(judge: Judge) -> str:
    """Whatever decides a judge's answers, in one line, e.g. `"ServerJudge m, score_mode integer, ..."`."""
    identity = getattr(judge, "identity", None)
    if identity is None:  # a judge of the user's own may have none
        known = {name: getattr(judge, name) for name in ("name", "score_mode") if hasattr(judge, name)}
        identity = {"judge": type(judge).__name__, **known}
    return ", ".join(f"{name} {value}" for name, value in identity.items() if value is not None)


def parse_score(answer: str) -> float | None:
    """
    The score in a judge's answer, or `None` if it does not hold exactly one.

    Accepts a digit from 0 to 5, alone or as in `"Score: 4"`, `"4/5"`, `"4.0"` or `"**4**"`, after any reasoning that is
    closed by `</think>`. Everything else could only be guessed at.
    """
    text = re.sub(r"[*_`\s]+", " ", answer.rpartition("</think>")[2]).strip()
    match = re.fullmatch(r"(?:(?:final |overall )?(?:score|rating|grade|answer)\s*(?:is|:|=)?\s*)?([0-5])(?:\.0)?(?: ?/ ?5)?\.?", text, re.IGNORECASE)  # fmt: skip
    return float(match[1]) if match else None


def _check_settings(score_mode: str, num_samples: int, temperature: float, parse: Parser, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1.")
    if score_mode not in ("integer", "expected"):
        raise ValueError(f"score_mode={score_mode!r} is not known: use 'integer' or 'expected'.")
    if num_samples < 1 or temperature <= 0:
        raise ValueError(
            f"num_samples={num_samples} and temperature={temperature} must be above zero; num_samples=1 answers greedily."
        )
    if score_mode == "expected" and parse is not parse_score:
        raise ValueError(
            f"score_mode='expected' reads the probabilities of the digits 0 to 5, so parse={parse.__name__} has no meaning: use "
            "score_mode='integer'."
        )
    if score_mode == "expected" and num_samples > 1:
        raise ValueError(
            f"num_samples={num_samples} has no meaning with score_mode='expected', which reads the probabilities themselves: "
            "use one of them."
        )


def _pictures(conversation: list[dict[str, Any]]) -> int:
    """Number of pictures in the last message."""
    return sum(part["type"] == "image" for part in conversation[-1]["content"])


def _mean_score(answers: list[str], parse: Parser) -> Judgement:
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
                picture = part["image"].convert("RGB")
                digest.update(repr(picture.size).encode() + picture.tobytes())
            else:
                digest.update(repr(part["text"]).encode())
    return digest.digest()


def _model_revision(model: str, revision: str | None) -> str | None:
    """What tells the weights of a model from others of the same name."""
    if not os.path.isdir(model):
        try:
            return AutoConfig.from_pretrained(model, revision=revision)._commit_hash
        except (OSError, ValueError):
            return revision
    files = sorted(path for path in Path(model).iterdir() if path.is_file())
    described = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"files {hashlib.sha256(repr(described).encode()).hexdigest()[:12]}"


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

    Conversations that differ in their last picture alone, such as the edits of one case, are read up to that picture once
    (with the models in `SHARES_PREFIX`); all others are batched as they are.

    Args:
        model (`str`):
            Hub id or local folder, e.g. `"Qwen/Qwen3-VL-32B-Instruct"`.
        score_mode (`str`, *optional*, defaults to `"integer"`):
            `"integer"`: the digit that the model answers. `"expected"`: the expectation over the probabilities that the
            model gives to the digits 0 to 5 as its next token, which has no ties and costs no generation.
        num_samples (`int`, *optional*, defaults to `1`):
            In the mode `"integer"`: number of answers that are drawn for each case, whose scores are averaged. A single
            answer is greedy.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature at which several answers are drawn.
        seed (`int`, *optional*, defaults to `0`):
            Seed of several answers. They depend on the case, not on what else is judged.
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
        parse (`Callable[[str], float | None]`, *optional*, defaults to [`parse_score`]):
            Takes the score out of an answer, `None` if there is none. Scoring prompts of other kinds than HP-Scorer's need one.

    Raises:
        `ValueError`: If the model cannot be found, or its vocabulary lacks a token for a score.
    """

    def __init__(
        self,
        model: str,
        score_mode: ScoreMode = "integer",
        num_samples: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 8,
        max_new_tokens: int = 16,
        max_pixels: int = 1024 * 1024,
        min_digit_mass: float = 0.5,
        device: torch.device | str | None = None,
        model_init_kwargs: dict | None = None,
        parse: Parser = parse_score,
    ):
        counts = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "max_pixels": max_pixels}
        _check_settings(score_mode, num_samples, temperature, parse, **counts)
        self.name = model
        self.score_mode = score_mode
        self.num_samples = num_samples
        self.parse = parse
        self.temperature = temperature
        self.seed = seed
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

    @cached_property
    def revision(self) -> str | None:
        """Commit of the model on the Hub, or what tells the files of a local folder from others."""
        return _model_revision(self.name, self.model_init_kwargs.get("revision"))

    @property
    def identity(self) -> dict[str, Any]:
        names = ["name", "revision", "score_mode", "max_pixels"]
        names += ["min_digit_mass"] if self.score_mode == "expected" else ["num_samples", "max_new_tokens"]
        names += ["temperature", "seed"] if self.num_samples > 1 else []
        parser = {} if self.parse is parse_score else {"parse": self.parse.__name__}
        loaded = {name: str(value) for name, value in sorted(self.model_init_kwargs.items()) if name != "revision"}
        return {"judge": "TransformersJudge", **{name: getattr(self, name) for name in names}, **loaded, **parser}

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
                judgements[index] = Judgement(None, f"{type(error).__name__}: {error}", answered=False)
        for members in self._batches(fitted):
            start = time.perf_counter()
            judged = self._judge([fitted[index] for index in members])
            seconds = (time.perf_counter() - start) / len(members)
            judgements.update(zip(members, (replace(one, seconds=seconds) for one in judged), strict=True))
        return [judgements[index] for index in range(len(conversations))]

    def _batches(self, conversations: dict[int, list[dict[str, Any]]]) -> list[list[int]]:
        """Batches of numbers of conversations; those that share all but the pixels of their last picture are neighbours."""
        if self.num_samples > 1:
            return [[index] for index in conversations]
        groups: dict[bytes, list[int]] = {}
        for index, conversation in conversations.items():
            key = self._beginning(conversation) if _pictures(conversation) > 1 else str(index).encode()
            groups.setdefault(key, []).append(index)
        batches, rest = [], []
        for members in groups.values():
            several = [members[i : i + self.batch_size] for i in range(0, len(members), self.batch_size)]
            batches += [batch for batch in several if len(batch) > 1 and self._shares_prefix]
            rest += [index for batch in several if len(batch) == 1 or not self._shares_prefix for index in batch]
        return batches + [rest[i : i + self.batch_size] for i in range(0, len(rest), self.batch_size)]

    def _beginning(self, conversation: list[dict[str, Any]]) -> bytes:
        """A digest of all but the pixels of a conversation's last picture."""
        *before, last = conversation
        pictures = [i for i, part in enumerate(last["content"]) if part["type"] == "image"]
        blank = {"type": "image", "image": Image.new("RGB", last["content"][pictures[-1]]["image"].size)}
        content = [*last["content"][: pictures[-1]], blank, *last["content"][pictures[-1] + 1 :]]
        return conversation_digest([*before, {**last, "content": content}])

    @property
    def _shares_prefix(self) -> bool:
        return self.model.config.model_type in SHARES_PREFIX

    def _judge(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            # A reloaded tokenizer may pad on the right, where the next token would be predicted from padding.
            processor_kwargs={"padding": True, "padding_side": "left", "return_tensors": "pt"},
        ).to(self.model.device)
        read = inputs["attention_mask"].sum(-1).tolist()
        if (
            len(conversations) > 1
            and self._shares_prefix
            and _pictures(conversations[0]) > 1 == len(set(map(self._beginning, conversations)))
        ):
            return self._judge_by_prefix(inputs, read)
        if self.score_mode == "expected":
            return self._expected(self.model(**inputs, logits_to_keep=1).logits, read)
        if self.num_samples > 1:
            return [self._draw(inputs, conversations[0], read[0])]
        tokens = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, repetition_penalty=1.0
        )
        return self._answers(tokens[:, inputs["input_ids"].shape[1] :], read)

    def _draw(self, inputs: dict[str, Any], conversation: list[dict[str, Any]], read: int) -> Judgement:
        """Mean score of several answers to one conversation, drawn from the model's own probabilities."""
        key = repr(self.seed).encode() + conversation_digest(conversation)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # `generate` takes no generator
            torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)
            tokens = self.model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=True,
                temperature=self.temperature,
                top_p=1.0,
                top_k=0,
                repetition_penalty=1.0,
                num_return_sequences=self.num_samples,
            )
        drawn = self._answers(tokens[:, inputs["input_ids"].shape[1] :], [read] * self.num_samples)
        written = sum(judgement.output_tokens for judgement in drawn)
        mean = _mean_score([judgement.answer for judgement in drawn], self.parse)
        return replace(mean, input_tokens=read, output_tokens=written)

    def _expected(self, logits: torch.Tensor, read: list[int]) -> list[Judgement]:
        """Scores from the logits of the next token, of shape `(batch, 1, vocabulary)`."""
        rows = logits[:, -1].float().softmax(-1)[:, self.digit_ids].tolist()
        return [
            replace(_expected_score(row, self.min_digit_mass), input_tokens=count)
            for row, count in zip(rows, read, strict=True)
        ]

    def _answers(self, tokens: torch.Tensor, read: list[int]) -> list[Judgement]:
        """Scores from answers, as tokens of shape `(batch, length)`."""
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        written = (tokens != self.processor.tokenizer.pad_token_id).sum(-1).tolist()
        return [
            Judgement(self.parse(text), text, input_tokens=count, output_tokens=new)
            for text, count, new in zip(texts, read, written, strict=True)
        ]

    def _judge_by_prefix(self, inputs: dict[str, torch.Tensor], read: list[int]) -> list[Judgement]:
        """
        Judges conversations that differ in the pixels of their last picture alone. All rows have the same tokens, so nothing
        is padded: one pass reads the beginning, one all last pictures with what follows them, from the same cache.
        """
        model, ids, grids = self.model, inputs["input_ids"], inputs["image_grid_thw"]
        count, per_row = len(ids), len(grids) // len(ids)
        is_picture = inputs["mm_token_type_ids"][0] != 0
        # The last token before the last run of picture tokens
        cut = int((is_picture[1:] & ~is_picture[:-1]).nonzero()[-1]) + 1
        positions, _ = model.model.get_rope_index(
            ids, mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=grids
        )
        patches = inputs["pixel_values"].split(grids.prod(-1).tolist())
        last = [row * per_row + per_row - 1 for row in range(count)]

        cache = DynamicCache(config=model.config.get_text_config())
        model(
            input_ids=ids[:1, :cut],
            position_ids=positions[:, :1, :cut],
            pixel_values=torch.cat(patches[: per_row - 1]),
            image_grid_thw=grids[: per_row - 1],
            past_key_values=cache,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(count)
        logits = model(
            input_ids=ids[:, cut:],
            position_ids=positions[:, :, cut:],
            pixel_values=torch.cat([patches[i] for i in last]),
            image_grid_thw=grids[last],
            past_key_values=cache,
            logits_to_keep=1,
        ).logits
        # Tokens really read: the beginning once
        read = [read[0], *[length - cut for length in read[1:]]]
        if self.score_mode == "expected":
            return self._expected(logits, read)

        ends = model.generation_config.eos_token_id
        ends = torch.as_tensor([] if ends is None else ends, device=ids.device).reshape(-1)
        padding = self.processor.tokenizer.pad_token_id
        done = torch.zeros(count, dtype=torch.bool, device=ids.device)
        position = positions.amax((0, 2)) + 1  # text after a picture goes on from its largest position
        tokens: list[torch.Tensor] = []
        while True:
            token = logits[:, -1].argmax(-1).masked_fill(done, padding)
            done |= torch.isin(token, ends)
            tokens.append(token)
            if done.all() or len(tokens) == self.max_new_tokens:
                return self._answers(torch.stack(tokens, dim=1), read)
            step = position + len(tokens) - 1
            logits = model(
                input_ids=token[:, None], position_ids=step.expand(3, -1)[..., None], past_key_values=cache
            ).logits

    def _fit(self, conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
        patch_size = getattr(self.processor.image_processor, "patch_size", 14)

        def fit(part: dict[str, Any]) -> dict[str, Any]:
            if part["type"] != "image":
                return part
            image = _fitted(part["image"], self.max_pixels)
            return {"type": "image", "image": fetch_image({"image": image}, image_patch_size=patch_size)}

        return [{**message, "content": [fit(part) for part in message["content"]]} for message in conversation]


class _NoProbabilitiesError(ValueError):
    """A server's reply has no `top_logprobs`."""


class ServerJudge:
    """
    A vision-language model behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve` or a hosted API.

    Needs the extra `server` (`pip install "hp-edit-trl[server]"`). Requests that time out, are refused for their rate or
    meet a server error are repeated with growing pauses; what still fails is a missing score. A server that returns no
    probabilities for the trial of `load` in the mode `"expected"` is asked for whole scores instead, with a warning.

    Args:
        model (`str`):
            Name of the model on the server.
        base_url (`str`):
            Address of the API, e.g. `"http://localhost:8000/v1"`.
        score_mode (`str`, *optional*, defaults to `"integer"`):
            As in [`TransformersJudge`]. `"expected"` needs a server that returns `top_logprobs`; a digit that is not
            among the 20 likeliest tokens counts as impossible.
        num_samples (`int`, *optional*, defaults to `1`):
            As in [`TransformersJudge`]. The server is asked for all answers at once (`n`), and again for those that it did
            not give.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature at which several answers are drawn.
        seed (`int`, *optional*, defaults to `0`):
            Seed that is sent along with requests for several answers; whether it counts is up to the server.
        revision (`str`, *optional*):
            What tells the model from others that a server calls by the same name. Only written beside the scores.
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
        parse (`Callable[[str], float | None]`, *optional*, defaults to [`parse_score`]):
            As in [`TransformersJudge`].

    Raises:
        `ImportError`: If the extra is not installed.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        score_mode: ScoreMode = "integer",
        num_samples: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
        revision: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 4,
        max_concurrency: int = 16,
        max_new_tokens: int = 16,
        max_pixels: int = 1024 * 1024,
        min_digit_mass: float = 0.5,
        parse: Parser = parse_score,
    ):
        counts = {"max_concurrency": max_concurrency, "max_new_tokens": max_new_tokens, "max_pixels": max_pixels}
        _check_settings(score_mode, num_samples, temperature, parse, **counts)
        try:
            import openai
        except ImportError as error:
            raise ImportError('A judge on a server needs the extra: pip install "hp-edit-trl[server]"') from error
        self.name = model
        self.base_url = base_url
        self.score_mode = score_mode
        self.num_samples = num_samples
        self.parse = parse
        self.temperature = temperature
        self.seed = seed
        self.revision = revision
        self.max_concurrency = max_concurrency
        self.max_new_tokens = max_new_tokens
        self.max_pixels = max_pixels
        self.min_digit_mass = min_digit_mass
        self._errors = (openai.APIError,)
        self._access: dict[str, Any] = {
            "base_url": base_url,
            "api_key": api_key or os.environ.get("OPENAI_API_KEY") or "none",
            "timeout": timeout,
            "max_retries": max_retries,
        }
        self._client  # noqa: B018  # an address that is none shows now

    @cached_property
    def _client(self):
        import openai

        return openai.OpenAI(**self._access)

    def __getstate__(self) -> dict[str, Any]:
        # Connections cannot be sent to another process.
        return {name: value for name, value in self.__dict__.items() if name != "_client"}

    @property
    def identity(self) -> dict[str, Any]:
        names = ["name", "revision", "score_mode", "max_pixels"]
        names += ["min_digit_mass"] if self.score_mode == "expected" else ["num_samples", "max_new_tokens"]
        names += ["temperature", "seed"] if self.num_samples > 1 else []
        parser = {} if self.parse is parse_score else {"parse": self.parse.__name__}
        return {"judge": "ServerJudge", **{name: getattr(self, name) for name in names}, **parser}

    def load(self) -> None:
        """
        Asks for one judgement of two grey squares, without retries: an address where nobody listens, an unknown model, a
        wrong key or a model that takes no images all show before the work starts. If the server returns no probabilities,
        `score_mode` becomes `"integer"`.
        """
        client = self._client.with_options(max_retries=0)
        try:
            try:
                judgement = self._ask(_trial(), client)
            except _NoProbabilitiesError:
                logger.warning(
                    f"The server of {self.name!r} returned no top_logprobs, which score_mode='expected' needs: it is asked "
                    "for whole scores instead (score_mode='integer')."
                )
                self.score_mode = "integer"
                judgement = self._ask(_trial(), client)
        except (*self._errors, ValueError) as error:
            raise ConnectionError(
                f"The judge {self.name!r} at {self.base_url} gives no judgements: {type(error).__name__}: {error}"
            ) from error
        if judgement.score is None and self.parse is parse_score:
            logger.warning(f"The judge {self.name!r} answered a trial without a score: {judgement.answer!r}.")

    def __call__(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        def judge(conversation: list[dict[str, Any]]) -> Judgement:
            start = time.perf_counter()
            try:
                judgement = self._ask(conversation, self._client)
            except (*self._errors, ValueError) as error:
                judgement = Judgement(None, f"{type(error).__name__}: {error}", answered=False)
            return replace(judgement, seconds=time.perf_counter() - start)

        with ThreadPoolExecutor(self.max_concurrency) as pool:
            return list(pool.map(judge, conversations))

    def _ask(self, conversation: list[dict[str, Any]], client) -> Judgement:
        messages = [
            {"role": message["role"], "content": [self._as_openai(part) for part in message["content"]]}
            for message in conversation
        ]
        options: dict[str, Any] = {"max_tokens": self.max_new_tokens, "temperature": 0}
        if self.score_mode == "expected":
            options |= {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        elif self.num_samples > 1:
            options |= {"temperature": self.temperature}
        answers: list[str] = []
        read = written = 0
        while len(answers) < self.num_samples:
            if self.num_samples > 1:
                options |= {"n": self.num_samples - len(answers), "seed": self.seed + len(answers)}
            reply = client.chat.completions.create(model=self.name, messages=messages, **options)
            try:
                choices = reply.choices[: self.num_samples - len(answers)]
                first = choices[0]
                contents = [choice.message.content or "" for choice in choices]
                answers += [
                    content if isinstance(content, str) else "".join(part["text"] for part in content)
                    for content in contents
                ]
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                raise ValueError(f"the server's reply is no chat completion: {str(reply)[:200]}") from error
            usage = getattr(reply, "usage", None)
            read += getattr(usage, "prompt_tokens", None) or 0
            written += getattr(usage, "completion_tokens", None) or 0
        if self.score_mode == "integer":
            return replace(_mean_score(answers, self.parse), input_tokens=read, output_tokens=written)
        try:
            likeliest = first.logprobs.content[0].top_logprobs if first.logprobs and first.logprobs.content else None
            if not likeliest:
                raise _NoProbabilitiesError("the server returned no top_logprobs, which score_mode='expected' needs")
            weights = [sum(math.exp(t.logprob) for t in likeliest if t.token.strip() == digit) for digit in DIGITS]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"the server's logprobs cannot be read: {str(first.logprobs)[:200]}") from error
        return replace(_expected_score(weights, self.min_digit_mass), input_tokens=read, output_tokens=written)

    def _as_openai(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        buffer = io.BytesIO()
        _fitted(part["image"], self.max_pixels).save(buffer, "PNG", compress_level=1)
        data = base64.b64encode(buffer.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
