"""A judge behind an OpenAI-compatible server."""

import asyncio
import base64
import hashlib
import io
import json
import logging
import math
import os
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from PIL import Image

from ..utils.secrets import redacted, remember_secrets, without_known_secrets
from ..utils.texts import without_control_tokens
from .base import (
    DIGITS,
    NUM_ANSWER_TOKENS,
    Judgement,
    Parser,
    ScoreMode,
    check_judge_options,
    digit_of_token,
    expected_score,
    fit_image,
    mean_score,
    parse_score,
    shortened,
    trial_conversation,
)
from .failures import REFUSED, JudgeRefusedError


logger = logging.getLogger(__name__)

T = TypeVar("T")

LONGEST_REPLY = 4 * 2**20  # bytes that are read of a reply; 20,000 characters in each of 16 answers are a tenth of it
LONGEST_PAUSE = 60.0  # seconds; a server that asks for a longer one is asked again after it


class _Failure(Exception):
    """A request without a usable reply: its kind and reason, and whether another attempt may help."""

    def __init__(self, kind: str, reason: str, retry: bool = False, pause: float | None = None):
        super().__init__(without_known_secrets(reason))  # a server may repeat its key
        self.kind = kind
        self.retry = retry
        self.pause = pause


class _NoProbabilities(_Failure):
    """A server's reply has no `top_logprobs`."""


@dataclass
class _Cost:
    """What one judgement has cost so far, see [`Judgement`]."""

    requests: int = 0
    retries: int = 0
    seconds_lost: float = 0.0


class ServerJudge:
    """
    A vision-language model behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve` or a hosted API.

    Needs the extra `server` (`pip install "hp-edit-trl[server]"`). A request that takes longer than `timeout`, is
    rate-limited, loses its connection or meets a server error is repeated after a pause: the one that the server asks
    for (at most a minute), or else 0.5 s that double each time up to 8 s. If it still fails, the score is missing, and
    the judgement says which kind of failure it was. A reply is read up to 4 MiB and uncompressed, and redirects are
    not followed. A server that returns no probabilities for the trial of `load` in the mode `"expected"` is asked for
    whole scores instead, with a warning.

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
            Key of a hosted API. By default user and password in `base_url`, or else the environment variable
            `OPENAI_API_KEY`, or none.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds after which one attempt is given up, from the connection to the last byte of the reply.
        max_retries (`int`, *optional*, defaults to `4`):
            Number of further attempts.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Largest number of concurrent requests of a call.
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
        `ValueError`: If an option or the address is not valid.
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
        if not 0 < timeout < math.inf or max_retries < 0:
            raise ValueError(f"timeout={timeout} must be above 0, and max_retries={max_retries} not negative.")
        try:
            import aiohttp  # noqa: F401  # it is imported where it is used, so that a judge can be pickled
        except ImportError as error:
            raise ImportError('A judge on a server needs the extra: pip install "hp-edit-trl[server]"') from error
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(
                f"judge_base_url={redacted(base_url)!r} is not an address such as 'http://localhost:8000/v1'."
            )
        self.name = model
        self.base_url = base_url
        self.score_mode = score_mode
        self.num_answers = num_answers
        self.parse = parse
        self.temperature = temperature
        self.seed = seed
        self.revision = revision
        self.timeout = timeout
        self.max_retries = max_retries
        self.max_concurrency = max_concurrency
        self.max_new_tokens = max_new_tokens
        self.max_pixels = max_pixels
        self.min_digit_mass = min_digit_mass
        # A request has one authorization: the key that is given, else what the address holds, else the environment's
        if api_key:
            address = address._replace(netloc=address.netloc.rpartition("@")[2])
        self._api_key = api_key or (None if "@" in address.netloc else os.environ.get("OPENAI_API_KEY"))
        remember_secrets({"api_key": self._api_key, "base_url": base_url})
        self._url = urlunsplit(address._replace(path=f"{address.path.rstrip('/')}/chat/completions"))
        # As it is shown: without a password or a key in it
        self._shown_url = urlunsplit(address._replace(netloc=address.netloc.rpartition("@")[2], query="", fragment=""))

    @property
    def identity(self) -> dict[str, Any]:
        names = ["name", "revision", "score_mode", "max_pixels"]
        names += ["min_digit_mass"] if self.score_mode == "expected" else ["num_answers", "max_new_tokens"]
        names += ["temperature", "seed"] if self.num_answers > 1 else []
        parser = {} if self.parse is parse_score else {"parse": self.parse.__name__}
        return {"judge": "ServerJudge", **{name: getattr(self, name) for name in names}, **parser}

    def load(self, num_images: int = 2) -> None:
        """
        Asks for one judgement of gray squares, with at most two retries: an address where nobody listens, an unknown
        model, a wrong key, a model that takes no images or not so many, and one that spends its answer on reasoning
        all show before the work starts. If the server returns no probabilities, `score_mode` becomes `"integer"`.

        Args:
            num_images (`int`, *optional*, defaults to `2`):
                Number of squares: as many as the largest case has images, its edit included.

        Raises:
            `ConnectionError`: If there is no judgement.
        """
        trial = trial_conversation(num_images)
        try:
            try:
                judgement = self._run(self._try(trial))
            except _NoProbabilities:
                logger.warning(
                    f"The server of {self.name!r} returned no top_logprobs, which score_mode='expected' needs: it is "
                    "asked for whole scores instead (score_mode='integer')."
                )
                self.score_mode = "integer"
                judgement = self._run(self._try(trial))
        except _Failure as failure:
            if failure.kind == REFUSED:
                raise JudgeRefusedError(str(failure)) from None
            raise ConnectionError(
                f"The judge {self.name!r} at {self._shown_url} gives no judgements of {num_images} images: "
                f"{failure.kind}: {failure}"
            ) from failure
        if judgement.score is None and self.parse is parse_score:
            logger.warning(f"The judge {self.name!r} answered a trial without a score: {judgement.excerpt!r}.")

    def __call__(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        """
        Judges conversations, see [`Judge`]. If the server refuses the key (401 or 403), no further request is sent:
        the remaining judgements are missing, of the kind `"refused"`.
        """
        return self._run(self._judge(conversations)) if conversations else []

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in a thread of its own, because the caller's may have a running event loop."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="ServerJudge", daemon=True)
        thread.start()
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        finally:
            future.cancel()  # after Ctrl-C
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def _session(self):
        import aiohttp

        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if "@" not in urlsplit(self._url).netloc:
            headers["Authorization"] = f"Bearer {self._api_key or 'none'}"
        return aiohttp.ClientSession(
            headers=headers,
            auto_decompress=False,
            trust_env=False,  # a ~/.netrc would take the place of the key; proxies are looked up below
            timeout=aiohttp.ClientTimeout(total=None),  # that of `asyncio.timeout` bounds all of an attempt
            connector=aiohttp.TCPConnector(limit=self.max_concurrency),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    def _proxy(self) -> str | None:
        """The proxy that the environment names for the server."""
        address = urlsplit(self._url)
        return None if proxy_bypass(address.hostname or "") else getproxies().get(address.scheme)

    async def _try(self, conversation: list[dict[str, Any]]) -> Judgement:
        async with self._session() as session:
            return await self._ask(conversation, session, _Cost(), min(2, self.max_retries), {})

    async def _judge(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        places = asyncio.Semaphore(self.max_concurrency)
        encoded: dict[tuple, asyncio.Task[str]] = {}
        judged: dict[int, Judgement] = {}

        async def judge(index: int, session) -> None:
            async with places:
                start, cost = time.perf_counter(), _Cost()
                try:
                    judgement = await self._ask(conversations[index], session, cost, self.max_retries, encoded)
                except _Failure as failure:
                    reason = f"{failure.kind}: {failure}"
                    judgement = Judgement(None, reason, answered=False, failure=failure.kind)
                judged[index] = replace(judgement, seconds=time.perf_counter() - start, **vars(cost))
                if judgement.failure == REFUSED:
                    raise JudgeRefusedError(judgement.answer)  # cancels the other requests

        refused = None
        async with self._session() as session:
            try:
                async with asyncio.TaskGroup() as group:
                    for index in range(len(conversations)):
                        group.create_task(judge(index, session))
            except ExceptionGroup as several:
                refused = several.exceptions[0]
                if not isinstance(refused, JudgeRefusedError):
                    raise refused from None
        rest = Judgement(None, str(refused), answered=False, failure=REFUSED)
        return [judged.get(index, rest) for index in range(len(conversations))]

    async def _ask(
        self,
        conversation: list[dict[str, Any]],
        session,
        cost: _Cost,
        max_retries: int,
        encoded: dict[tuple, asyncio.Task[str]],
    ) -> Judgement:
        messages = []
        for message in conversation:
            content = [await self._as_openai(part, encoded) for part in message["content"]]
            messages.append({"role": message["role"], "content": content})
        options: dict[str, Any] = {"max_tokens": self.max_new_tokens, "temperature": 0}
        if self.score_mode == "expected":
            options |= {"max_tokens": NUM_ANSWER_TOKENS, "logprobs": True, "top_logprobs": 20}
        elif self.num_answers > 1:
            options |= {"temperature": self.temperature}
        answers: list[str] = []
        read = written = 0
        while len(answers) < self.num_answers:
            if self.num_answers > 1:
                options |= {"n": self.num_answers - len(answers), "seed": self.seed + len(answers)}
            body = json.dumps({"model": self.name, "messages": messages, **options}).encode()
            reply = await self._request(session, body, cost, max_retries)
            found = _answers(reply)[: self.num_answers - len(answers)]
            answers += found
            usage = reply.get("usage")
            usage = usage if isinstance(usage, dict) else {}
            read += _count(usage.get("prompt_tokens"))
            written += _count(usage.get("completion_tokens"))
        judgement = mean_score(answers, self.parse, options["max_tokens"])
        if self.score_mode == "expected" and judgement.answered:
            judgement = expected_score(_digit_weights(reply), self.min_digit_mass, answers[0])
        if not judgement.answered:
            raise _Failure("empty", judgement.answer)
        return replace(judgement, input_tokens=read, output_tokens=written)

    async def _request(self, session, body: bytes, cost: _Cost, max_retries: int) -> dict[str, Any]:
        """A server's reply, after retries. Raises `_Failure` if there is none."""
        for attempt in range(max_retries + 1):
            start = time.perf_counter()
            cost.requests += 1
            cost.retries += attempt > 0
            try:
                return await self._attempt(session, body)
            except _Failure as failure:
                again = failure.retry and attempt < max_retries
                if again:
                    await asyncio.sleep(min(0.5 * 2**attempt, 8.0) if failure.pause is None else failure.pause)
                cost.seconds_lost += time.perf_counter() - start
                if not again:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, session, body: bytes) -> dict[str, Any]:
        import aiohttp

        try:
            async with asyncio.timeout(self.timeout):
                post = session.post(self._url, data=body, allow_redirects=False, proxy=self._proxy())
                async with post as response:
                    status, headers = response.status, response.headers
                    self._check_headers(status, headers)
                    text = await self._read(response)
        except TimeoutError:
            reason = f"there was no complete reply within timeout={self.timeout:g} s"
            raise _Failure("timeout", reason, retry=True) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:  # a ValueError: headers that are not HTTP
            reason = without_known_secrets(f"{type(error).__name__}: {error}")
            raise _Failure("connection", shortened(reason), retry=True) from error
        if status != 200:
            self._raise_for_status(status, headers, text)
        try:
            reply = json.loads(text)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise _Failure("malformed", f"the server's reply is no chat completion: {shortened(redacted(text))!r}")
        return reply

    def _check_headers(self, status: int, headers) -> None:
        """Raises `_Failure` if a reply must not be read."""
        if 300 <= status < 400:
            raise _Failure(
                "redirect",
                f"the server redirects to {shortened(headers.get('Location', 'nowhere'))!r}, which is not followed "
                "because it would be sent the images and the key: if that address is right, name it as "
                "judge_base_url",
            )
        if (encoding := headers.get("Content-Encoding", "identity").strip().lower()) not in ("", "identity"):
            raise _Failure(
                "encoding", f"the server compressed its reply ({shortened(encoding)!r}), which it was not asked to do"
            )

    async def _read(self, response) -> str:
        data = bytearray()
        async for chunk in response.content.iter_any():
            data += chunk
            if len(data) > LONGEST_REPLY:
                response.close()
                raise _Failure("too large", f"the server's reply has more than {LONGEST_REPLY // 2**20} MiB")
        return data.decode("utf-8", "replace")

    def _raise_for_status(self, status: int, headers, text: str) -> None:
        reason = f"the server answered {status}: {shortened(without_known_secrets(_error_message(text)))}"
        if status in (401, 403):
            raise _Failure(
                REFUSED,
                f"The judge {self.name!r} at {self._shown_url} cannot be used: {reason}. Set the key of the API, with "
                "api_key= or the environment variable OPENAI_API_KEY.",
            )
        if status == 429:
            raise _Failure("rate limit", reason, retry=True, pause=_pause(headers.get("Retry-After")))
        retry = status in (408, 409) or status >= 500
        pause = _pause(headers.get("Retry-After")) if retry else None
        raise _Failure(f"http {status}", reason, retry=retry, pause=pause)

    async def _as_openai(self, part: dict[str, Any], encoded: dict[tuple, asyncio.Task[str]]) -> dict[str, Any]:
        if part["type"] != "image":
            return {**part, "text": without_control_tokens(part["text"])}
        # The edits of a case share its references. By content, because each edit may come with copies of its own.
        key = await asyncio.to_thread(_content, part["image"])
        if key not in encoded:
            encoded[key] = asyncio.create_task(asyncio.to_thread(self._data_url, part["image"]))
        return {"type": "image_url", "image_url": {"url": await encoded[key]}}

    def _data_url(self, image: Image.Image) -> str:
        buffer = io.BytesIO()
        fit_image(image, self.max_pixels).save(buffer, "PNG", compress_level=1)
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _content(image: Image.Image) -> tuple:
    """What tells an image from others."""
    return image.mode, image.size, tuple(image.getpalette() or ()), hashlib.sha256(image.tobytes()).digest()


def _answers(reply: dict[str, Any]) -> list[str]:
    """The texts of a chat completion, at least one."""
    try:
        answers = []
        for choice in reply["choices"]:
            content = choice["message"].get("content") or ""
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            answers.append(without_known_secrets(text))
        if answers:
            return answers
    except (AttributeError, KeyError, TypeError):
        pass
    raise _Failure("malformed", f"the server's reply is no chat completion: {shortened(redacted(str(reply)))}")


def _count(value: Any) -> int:
    """A number of tokens, 0 if the server names none."""
    return value if isinstance(value, int) and value > 0 else 0


def _digit_weights(reply: dict[str, Any]) -> list[float]:
    """The probabilities of the digits 0 to 5 as the first token of an answer."""
    logprobs = reply["choices"][0].get("logprobs")
    try:
        likeliest = logprobs["content"][0]["top_logprobs"] if logprobs and logprobs["content"] else None
        if not likeliest:
            raise _NoProbabilities(
                "malformed", "the server returned no top_logprobs, which score_mode='expected' needs"
            )
        if not all(token["logprob"] <= 1e-3 for token in likeliest):  # nor NaN; rounding may leave 0 a little behind
            raise _Failure(
                "malformed", f"the server's logprobs are above 0 or not a number: {shortened(str(likeliest))}"
            )
        weights = [0.0] * len(DIGITS)
        for token in likeliest:
            digit = digit_of_token(token["token"])
            if digit is not None:
                weights[digit] += math.exp(token["logprob"])
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        reason = f"the server's logprobs cannot be read: {shortened(str(logprobs))}"
        raise _Failure("malformed", reason) from error
    if sum(weights) > 1.01:
        raise _Failure("malformed", f"the server's probabilities add up to {sum(weights):.3g}")
    return weights


def _error_message(text: str) -> str:
    """The message in the body of an error, or the body."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        return text


def _pause(retry_after: str | None) -> float | None:
    """The pause that a server asks for, in seconds; `None` if it does not, or not in a way that can be read."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after or "").timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), LONGEST_PAUSE)
