"""A judge behind an OpenAI-compatible server."""

import base64
import io
import logging
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

from ..utils.secrets import redact_error, redact_record, redacted, remember_secrets, without_known_secrets
from .base import (
    DIGITS,
    Judgement,
    Parser,
    ScoreMode,
    check_judge_options,
    expected_score,
    fit_image,
    mean_score,
    parse_score,
    trial_conversation,
)


logger = logging.getLogger(__name__)


class _NoProbabilitiesError(ValueError):
    """A server's reply has no `top_logprobs`."""


class ServerJudge:
    """
    A vision-language model behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve` or a hosted API.

    Needs the extra `server` (`pip install "hp-edit-trl[server]"`). Requests
    that time out, are rate-limited or meet a server error are retried with growing pauses; if they still fail, the
    score is missing. A server that returns no probabilities for the trial of `load` in the mode `"expected"` is asked
    for whole scores instead, with a warning.

    Args:
        model (`str`):
            Name of the model on the server.
        base_url (`str`):
            Address of the API, e.g. `"http://localhost:8000/v1"`.
        score_mode (`str`, *optional*, defaults to `"integer"`):
            As in [`TransformersJudge`]. `"expected"` needs a server that returns `top_logprobs`; a digit that is not
            among the 20 likeliest tokens counts as impossible.
        num_answers (`int`, *optional*, defaults to `1`):
            As in [`TransformersJudge`]. The server is asked for all answers at once (`n`), and again for those that it
            did not give.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature at which several answers are drawn.
        seed (`int`, *optional*, defaults to `0`):
            Seed that is sent along with requests for several answers; whether it counts is up to the server.
        revision (`str`, *optional*):
            Label that tells models of one name apart. It is recorded with the scores and not sent to the server.
        api_key (`str`, *optional*):
            Key of a hosted API. By default the environment variable `OPENAI_API_KEY`, or none.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds after which one attempt is given up.
        max_retries (`int`, *optional*, defaults to `4`):
            Number of further attempts.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Largest number of concurrent requests from this process.
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
        num_answers: int = 1,
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
        check_judge_options(score_mode, num_answers, temperature, parse, **counts)
        try:
            import openai
        except ImportError as error:
            raise ImportError('A judge on a server needs the extra: pip install "hp-edit-trl[server]"') from error
        self.name = model
        self.base_url = base_url
        self.score_mode = score_mode
        self.num_answers = num_answers
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
        remember_secrets(self._access)  # a server may repeat its key
        for client in ("httpx", "httpx2", "openai._base_client"):  # they log addresses
            logging.getLogger(client).addFilter(redact_record)
        self._client  # noqa: B018  # an invalid address fails here

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
        names += ["min_digit_mass"] if self.score_mode == "expected" else ["num_answers", "max_new_tokens"]
        names += ["temperature", "seed"] if self.num_answers > 1 else []
        parser = {} if self.parse is parse_score else {"parse": self.parse.__name__}
        return {"judge": "ServerJudge", **{name: getattr(self, name) for name in names}, **parser}

    def load(self) -> None:
        """
        Asks for one judgement of two grey squares, without retries: an address where nobody listens, an unknown model,
        a wrong key or a model that takes no images all show before the work starts. If the server returns no
        probabilities, `score_mode` becomes `"integer"`.
        """
        client = self._client.with_options(max_retries=0)
        try:
            try:
                judgement = self._ask(trial_conversation(), client)
            except _NoProbabilitiesError:
                logger.warning(
                    f"The server of {self.name!r} returned no top_logprobs, which score_mode='expected' needs: it is "
                    "asked for whole scores instead (score_mode='integer')."
                )
                self.score_mode = "integer"
                judgement = self._ask(trial_conversation(), client)
        except (*self._errors, ValueError) as error:
            redact_error(error)
            raise ConnectionError(
                f"The judge {self.name!r} at {redacted(self.base_url)} gives no judgements: {type(error).__name__}: "
                f"{error}"
            ) from error
        if judgement.score is None and self.parse is parse_score:
            logger.warning(f"The judge {self.name!r} answered a trial without a score: {judgement.answer!r}.")

    def __call__(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        def judge(conversation: list[dict[str, Any]]) -> Judgement:
            start = time.perf_counter()
            try:
                judgement = self._ask(conversation, self._client)
            except (*self._errors, ValueError) as error:
                redact_error(error)
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
        elif self.num_answers > 1:
            options |= {"temperature": self.temperature}
        answers: list[str] = []
        read = written = 0
        while len(answers) < self.num_answers:
            if self.num_answers > 1:
                options |= {"n": self.num_answers - len(answers), "seed": self.seed + len(answers)}
            reply = client.chat.completions.create(model=self.name, messages=messages, **options)
            try:
                choices = reply.choices[: self.num_answers - len(answers)]
                first = choices[0]
                contents = [choice.message.content or "" for choice in choices]
                answers += [
                    without_known_secrets(content if isinstance(content, str) else "".join(p["text"] for p in content))
                    for content in contents
                ]
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                raise ValueError(f"the server's reply is no chat completion: {redacted(str(reply))[:200]}") from error
            if reply.usage is not None:
                read += reply.usage.prompt_tokens or 0
                written += reply.usage.completion_tokens or 0
        if self.score_mode == "integer":
            return replace(mean_score(answers, self.parse), input_tokens=read, output_tokens=written)
        try:
            likeliest = first.logprobs.content[0].top_logprobs if first.logprobs and first.logprobs.content else None
            if not likeliest:
                raise _NoProbabilitiesError("the server returned no top_logprobs, which score_mode='expected' needs")
            if not all(t.logprob <= 1e-3 for t in likeliest):  # nor NaN; rounding may leave 0 a little behind
                raise ValueError(
                    f"the server's logprobs are above 0 or not a number: {redacted(str(likeliest))[:200]}"
                )
            weights = [sum(math.exp(t.logprob) for t in likeliest if t.token.strip() == digit) for digit in DIGITS]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"the server's logprobs cannot be read: {redacted(str(first.logprobs))[:200]}") from error
        return replace(expected_score(weights, self.min_digit_mass), input_tokens=read, output_tokens=written)

    def _as_openai(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        buffer = io.BytesIO()
        fit_image(part["image"], self.max_pixels).save(buffer, "PNG", compress_level=1)
        data = base64.b64encode(buffer.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
