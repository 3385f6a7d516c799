"""A judge behind one or several OpenAI-compatible servers."""

import asyncio
import base64
import hashlib
import io
import json
import logging
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit
from urllib.request import Request, getproxies, proxy_bypass, urlopen

from PIL import Image

from ..utils.images import image_digest
from ..utils.secrets import HIDDEN, redacted, remember_secrets, without_known_secrets
from ..utils.texts import shortened, without_control_tokens
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
    is_empty,
    mean_score,
    parse_score,
    trial_conversation,
)
from .failures import REFUSED, JudgeRefusedError


logger = logging.getLogger(__name__)

T = TypeVar("T")

LONGEST_REPLY = 4 * 2**20  # bytes that are read of a reply; 20,000 characters in each of 16 answers are a tenth of it
LONGEST_PAUSE = 60.0  # seconds; a server that asks for a longer one is asked again after it
OTHER_MODEL = "other model"
# Failures that another attempt at the same server would meet again, and another server need not
OF_THE_SERVER = ("http 404", "redirect", "encoding", "too large", "malformed", OTHER_MODEL)


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
    servers: tuple[str, ...] = ()


@dataclass(eq=False)
class _Server:
    """One of a judge's servers: where requests go, what is shown of that, and how it has fared."""

    url: str
    shown: str  # without a password or a key in it
    model: str | None = None  # as the server calls it
    failures: int = 0  # in a row
    rests_until: float = 0.0

    @property
    def name(self) -> str:
        return self.shown.partition("://")[2]


@dataclass
class _Call:
    """What the requests of a call share: their largest number at a time, encoded images, open requests by server."""

    session: Any
    places: int = 1
    encoded: dict[bytes, asyncio.Task[str]] = field(default_factory=dict)
    open: Counter[_Server] = field(default_factory=Counter)


def server_addresses(base_url: str | Sequence[str], option: str = "judge_base_url") -> list[str]:
    """
    The addresses of a judge's servers.

    Args:
        base_url (`str` or `Sequence[str]`):
            An address, several with commas or spaces between them, or a list of addresses. In a text, each begins
            with `http://` or `https://`, so that a password may hold a comma.
        option (`str`, *optional*, defaults to `"judge_base_url"`):
            Name of the option, for errors.

    Raises:
        `ValueError`: If there is none, or one of them is no address.
    """
    addresses: Sequence[Any] = base_url
    if isinstance(base_url, str):
        addresses = re.split(r"[,\s]+(?=https?://)", re.sub(r"^[,\s]+|[,\s]+$", "", base_url))
    if not isinstance(addresses, Sequence) or not addresses:
        addresses = [base_url]
    for one in addresses:
        try:
            address = urlsplit(one)
            usable = address.scheme in ("http", "https") and address.hostname and address.port != 0
            usable = usable and not any(sign.isspace() for sign in one)
            usable = usable and "," not in f"{address.hostname}{address.path}"
        except (ValueError, TypeError, AttributeError):  # a port that is no number, or no text at all
            usable = False
        if not usable:
            # What stands before the "@" may be a password, of any signs
            shown = re.sub(r"^(https?://)?.*@", rf"\1{HIDDEN}@", one, flags=re.DOTALL) if isinstance(one, str) else one
            raise ValueError(
                f"{option}={redacted(shown)!r} is not an address such as 'http://localhost:8000/v1', or a list "
                "of such addresses."
            )
    return list(addresses)


def served_model(base_url: str, timeout: float = 10.0) -> str:
    """
    Asks a server for the name of the one model that it serves.

    Args:
        base_url (`str`):
            Address of an OpenAI-compatible API, e.g. `"http://localhost:8000/v1"`. The key is the environment variable
            `OPENAI_API_KEY`, if it is set.
        timeout (`float`, *optional*, defaults to `10.0`):
            Seconds after which the attempt is given up.

    Raises:
        `ConnectionError`: If it does not answer, or serves no model or several.
        `ValueError`: If the address is not valid.
    """
    remember_secrets([base_url])
    (address,) = server_addresses([base_url])
    key = os.environ.get("OPENAI_API_KEY")
    remedy = "Start it, or name both: HPScorerReward('MODEL', judge_base_url='ADDRESS')."
    request = Request(
        f"{address.rstrip('/')}/models", headers={} if key is None else {"Authorization": f"Bearer {key}"}
    )
    try:
        with urlopen(request, timeout=timeout) as reply:
            models = [model["id"] for model in json.loads(reply.read(LONGEST_REPLY))["data"]]
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        told = f"The server {address!r} does not say what it serves ({type(error).__name__}: {error}). {remedy}"
        raise ConnectionError(redacted(told)) from None  # its own text may hold a key
    if len(models) != 1 or not isinstance(models[0], str):
        raise ConnectionError(redacted(f"The server {address!r} serves {len(models)} models: {models}. {remedy}"))
    return models[0]


class ServerJudge:
    """
    A vision-language model behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve` or a hosted API.

    Needs the extra `server` (`pip install "hp-edit-trl[server]"`). A request that takes longer than `timeout`, is
    rate-limited, loses its connection or meets a server error is repeated after a pause: the one that the server asks
    for (at most a minute), or else 0.5 s that double each time up to 8 s. If it still fails, the score is missing, and
    the judgement says which kind of failure it was. A reply is read up to 4 MiB and uncompressed, and redirects are
    not followed. A server that returns no probabilities for the trial of `load` in the mode `"expected"` is asked for
    whole scores instead, with a warning.

    Several servers of one model share the requests. Those about one case go to the same server, whose cache then holds
    what they have in common, as long as it has no more than its share of the open requests; others go to the server
    with the fewest. A server that fails rests for a second, twice as long after each further failure, up to a minute,
    and at least 10 times as long as an attempt that took more than a second. The request is repeated at another server
    at once, if `max_retries` allows. After the rest one request tries the server.
    Which server answers changes neither the judge's identity nor what is recorded.

    Args:
        model (`str`):
            Name of the model on the server.
        base_url (`str` or `Sequence[str]`):
            Address of the API, e.g. `"http://localhost:8000/v1"`; several as a list, or with commas or spaces between
            them.
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
            Key of a hosted API. By default user and password in the server's address, or else the environment variable
            `OPENAI_API_KEY`, or none.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds after which one attempt is given up, from the connection to the last byte of the reply.
        max_retries (`int`, *optional*, defaults to `4`):
            Number of further attempts.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Largest number of concurrent requests of a call, to all servers together.
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
        `ValueError`: If an option or an address is not valid.
    """

    # Of judges behind servers of another kind, see `ScoreServer`
    _path = "/chat/completions"
    _option = "judge_base_url"
    _key_variable: str | None = "OPENAI_API_KEY"
    _reply = "chat completion"

    def __init__(
        self,
        model: str,
        base_url: str | Sequence[str],
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
        addresses = server_addresses(base_url, self._option)
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
        self._api_key = api_key or (os.environ.get(self._key_variable) if self._key_variable else None)
        remember_secrets({"api_key": self._api_key, "base_url": addresses})
        servers: dict[str, _Server] = {}
        for address in map(urlsplit, addresses):
            host = address.netloc.rpartition("@")[2]
            address = address._replace(netloc=host) if api_key else address
            url = urlunsplit(address._replace(path=f"{address.path.rstrip('/')}{self._path}"))
            shown = urlunsplit(address._replace(netloc=host, path=address.path.rstrip("/"), query="", fragment=""))
            if url in servers:
                logger.warning(f"{self._option} names {shown} more than once: it is one server, with one share.")
            servers.setdefault(url, _Server(url, shown))
        self._servers = list(servers.values())
        self._model: str | None = None  # as all of several servers call it

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
        Several servers are asked at once, and all must answer: a smaller pool would only show as a slower run.

        Args:
            num_images (`int`, *optional*, defaults to `2`):
                Number of squares: as many as the largest case has images, its edit included.

        Raises:
            `ConnectionError`: If there is no judgement of a server, or several servers have different models.
        """
        self._model = None
        trial = trial_conversation(num_images)
        replies = self._run(self._try(trial))
        without = [server for server, reply in replies.items() if isinstance(reply, _NoProbabilities)]
        if without:
            which = ", ".join(server.shown for server in without)
            logger.warning(
                f"The server of {self.name!r} returned no top_logprobs ({which}), which score_mode='expected' needs: "
                "the judge is asked for whole scores instead (score_mode='integer')."
            )
            self.score_mode = "integer"
            replies = self._run(self._try(trial))
        self._check_trial(replies, num_images)
        for judgement in replies.values():
            if judgement.score is None and self.parse is parse_score:
                logger.warning(f"The judge {self.name!r} answered a trial without a score: {judgement.excerpt!r}.")

    def _check_trial(self, replies: dict[_Server, Any], num_images: int) -> None:
        """Raises an error unless all servers have given a judgement, and of the same model."""
        failed = {server: reply for server, reply in replies.items() if isinstance(reply, _Failure)}
        if len(replies) == 1:
            for server, failure in failed.items():
                if failure.kind == REFUSED:
                    raise JudgeRefusedError(str(failure)) from None
                raise ConnectionError(
                    f"The judge {self.name!r} at {server.shown} gives no judgements of {num_images} images: "
                    f"{failure.kind}: {failure}"
                ) from failure
        elif failed:
            told = "; ".join(f"{server.shown}: {failure.kind}: {failure}" for server, failure in failed.items())
            refused = any(failure.kind == REFUSED for failure in failed.values())
            raise (JudgeRefusedError if refused else ConnectionError)(
                f"{len(failed)} of {len(replies)} servers of the judge {self.name!r} give no judgements of "
                f"{num_images} images: {told.rstrip('.')}. Start them, or leave them out of {self._option}."
            )
        else:
            known = [server for server in replies if server.model is not None]
            if len({server.model for server in known}) > 1:
                told = ", ".join(f"{server.shown}: {shortened(str(server.model))!r}" for server in known)
                raise ConnectionError(
                    f"The servers of the judge {self.name!r} have different models: {told}. Their scores must not be "
                    f"mixed: leave the others out of {self._option}."
                )
            self._model = known[0].model if known else None

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

        return aiohttp.ClientSession(
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
            auto_decompress=False,
            trust_env=False,  # a ~/.netrc would take the place of the key; proxies are looked up below
            timeout=aiohttp.ClientTimeout(total=None),  # that of `asyncio.timeout` bounds all of an attempt
            connector=aiohttp.TCPConnector(limit=self.max_concurrency),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    def _options_of(self, server: _Server) -> dict[str, Any]:
        """Of a request to a server: its authorization, and the proxy that the environment names for it."""
        address = urlsplit(server.url)
        headers = {} if "@" in address.netloc else {"Authorization": f"Bearer {self._api_key or 'none'}"}
        proxy = None if proxy_bypass(address.hostname or "") else getproxies().get(address.scheme)
        return {"headers": headers, "proxy": proxy}

    async def _try(self, conversation: list[dict[str, Any]]) -> dict[_Server, Any]:
        """What each server makes of a conversation, asked at once: a [`Judgement`] or a `_Failure`."""
        async with self._session() as session:
            call, retries = _Call(session), min(2, self.max_retries)
            asked = [self._ask(conversation, call, _Cost(), retries, [server]) for server in self._servers]
            replies = await asyncio.gather(*asked, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException) and not isinstance(reply, _Failure):
                raise reply
        return dict(zip(self._servers, replies, strict=True))

    async def _judge(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        places = asyncio.Semaphore(self.max_concurrency)
        judged: dict[int, Judgement] = {}

        async def judge(index: int, call: _Call) -> None:
            async with places:
                start, cost = time.perf_counter(), _Cost()
                try:
                    judgement = await self._ask(conversations[index], call, cost, self.max_retries, self._servers)
                except _Failure as failure:
                    reason = f"{failure.kind}: {failure}"
                    judgement = Judgement(None, reason, answered=False, failure=failure.kind)
                judged[index] = replace(judgement, seconds=time.perf_counter() - start, **vars(cost))
                if judgement.failure == REFUSED:
                    raise JudgeRefusedError(judgement.answer)  # cancels the other requests

        refused = None
        async with self._session() as session:
            call = _Call(session, min(self.max_concurrency, len(conversations)))
            try:
                async with asyncio.TaskGroup() as group:
                    for index in range(len(conversations)):
                        group.create_task(judge(index, call))
            except ExceptionGroup as several:
                refused = several.exceptions[0]
                if not isinstance(refused, JudgeRefusedError):
                    raise refused from None
        rest = Judgement(None, str(refused), answered=False, failure=REFUSED)
        return [judged.get(index, rest) for index in range(len(conversations))]

    async def _ask(
        self,
        conversation: list[dict[str, Any]],
        call: _Call,
        cost: _Cost,
        max_retries: int,
        servers: list[_Server],
    ) -> Judgement:
        messages = []
        for message in conversation:
            content = [await self._as_openai(part, call.encoded) for part in message["content"]]
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
            body = json.dumps(self._body(messages, options)).encode()
            reply, found = await self._request(call, body, cost, max_retries, servers)
            answers += found[: self.num_answers - len(answers)]
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

    async def _request(
        self, call: _Call, body: bytes, cost: _Cost, max_retries: int, servers: list[_Server]
    ) -> tuple[dict[str, Any], list[str]]:
        """The reply of one of the servers and the answers in it, after retries. Raises `_Failure` if there is none."""
        # What the edits of a case have in common comes before the last image.
        group = hashlib.sha256(body[: body.rfind(b'"image_url"')]).digest() if len(servers) > 1 else b""
        for attempt in range(max_retries + 1):
            server = self._choose(servers, group, call)
            start = time.perf_counter()
            cost.requests += 1
            cost.retries += attempt > 0
            cost.servers += (server.name,)
            call.open[server] += 1
            try:
                reply = await self._attempt(server, call.session, body)
            except _Failure as failure:
                call.open[server] -= 1
                moves = len(servers) > 1 and _rest(server, failure, time.perf_counter() - start)
                moves = moves and any(_is_ready(other, call) for other in servers)
                again = (failure.retry or moves) and attempt < max_retries
                if again and not moves:
                    await asyncio.sleep(min(0.5 * 2**attempt, 8.0) if failure.pause is None else failure.pause)
                cost.seconds_lost += time.perf_counter() - start
                if not again:
                    raise
            else:
                call.open[server] -= 1
                if server.failures:
                    logger.warning(f"The judge's server {server.shown} answers again.")
                server.failures, server.rests_until = 0, 0.0
                return reply
        raise AssertionError("the last attempt returns or raises")

    def _choose(self, servers: list[_Server], group: bytes, call: _Call) -> _Server:
        """The server for a request: that of its group, or the one with the fewest open requests."""
        ready = [server for server in servers if _is_ready(server, call)]
        if not ready:
            return min(servers, key=lambda server: (server.rests_until, call.open[server]))
        # Each group has an order of servers of its own, in all processes the same. A loss moves no group but its own.
        own = max(ready, key=lambda server: hashlib.sha256(group + server.url.encode()).digest())
        if call.open[own] < math.ceil(call.places / len(ready)):
            return own
        first = int(os.environ.get("RANK", 0))  # processes do not all begin with the same one
        places = {server: (place - first) % len(servers) for place, server in enumerate(servers)}
        return min(ready, key=lambda server: (call.open[server], places[server]))

    async def _attempt(self, server: _Server, session, body: bytes) -> tuple[dict[str, Any], list[str]]:
        import aiohttp

        try:
            async with asyncio.timeout(self.timeout):
                post = session.post(server.url, data=body, allow_redirects=False, **self._options_of(server))
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
            self._raise_for_status(server, status, headers, text)
        try:
            reply = json.loads(text)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise _Failure("malformed", f"the server's reply is no {self._reply}: {shortened(redacted(text))!r}")
        answers = self._answers(reply)
        server.model = reply["model"] if isinstance(reply.get("model"), str) else None
        if None not in (self._model, server.model) and server.model != self._model:
            raise _Failure(
                OTHER_MODEL, f"the server answers with the model {shortened(str(server.model))!r}, not {self._model!r}"
            )
        if self.score_mode == "expected" and not all(map(is_empty, answers)):
            _digit_weights(reply)  # raises `_Failure`
        return reply, answers

    def _body(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
        """What is sent for a conversation."""
        return {"model": self.name, "messages": messages, **options}

    def _answers(self, reply: dict[str, Any]) -> list[str]:
        """The texts of a reply, at least one. Raises `_Failure` if it has another schema."""
        return _answers(reply)

    def _check_headers(self, status: int, headers) -> None:
        """Raises `_Failure` if a reply must not be read."""
        if 300 <= status < 400:
            raise _Failure(
                "redirect",
                f"the server redirects to {shortened(headers.get('Location', 'nowhere'))!r}, which is not followed "
                "because it would be sent the images and the key: if that address is right, name it as "
                f"{self._option}",
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

    def _raise_for_status(self, server: _Server, status: int, headers, text: str) -> None:
        reason = f"the server answered {status}: {shortened(without_known_secrets(_error_message(text)))}"
        if status in (401, 403):
            raise _Failure(
                REFUSED,
                f"The judge {self.name!r} at {server.shown} cannot be used: {reason}. Set the key of the API, with "
                f"api_key={f' or the environment variable {self._key_variable}' if self._key_variable else ''}.",
            )
        if status == 429:
            raise _Failure("rate limit", reason, retry=True, pause=_pause(headers.get("Retry-After")))
        retry = status in (408, 409) or status >= 500
        pause = _pause(headers.get("Retry-After")) if retry else None
        raise _Failure(f"http {status}", reason, retry=retry, pause=pause)

    async def _as_openai(self, part: dict[str, Any], encoded: dict[bytes, asyncio.Task[str]]) -> dict[str, Any]:
        if part["type"] != "image":
            text = part["text"] if part.get("trusted") else without_control_tokens(part["text"])
            return {"type": part["type"], "text": text}
        # The edits of a case share its references. By content, because each edit may come with copies of its own.
        key = await asyncio.to_thread(image_digest, part["image"])
        if key not in encoded:
            encoded[key] = asyncio.create_task(asyncio.to_thread(self._data_url, part["image"]))
        return {"type": "image_url", "image_url": {"url": await encoded[key]}}

    def _data_url(self, image: Image.Image) -> str:
        buffer = io.BytesIO()
        fit_image(image, self.max_pixels).save(buffer, "PNG", compress_level=1)
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_number(answer: str) -> float | None:
    """Reads the score of a [`ScoreServer`], `None` if it gave none."""
    return None if answer == "null" else float(answer)


class ScoreServer(ServerJudge):
    """
    A model of any kind behind a server that answers with scores: one that needs an environment of its own, e.g.
    because of old pins. Requests are sent, repeated and bounded as by a [`ServerJudge`].

    The server gets a `POST` for each edit with a JSON object: `prompt` (text), `requirement` (text or `null`),
    `images` (the references) and `edit`, as data URLs of PNG files. It answers with a JSON object that has a `score`:
    a finite number, or `null` if it cannot score this edit. Other keys are ignored.

    Args:
        url (`str` or `Sequence[str]`):
            Address that is posted to, e.g. `"http://localhost:8000/score"`; several as a list, or with commas or
            spaces between them.
        name (`str`, *optional*, defaults to `"score server"`):
            Name of the model, which is recorded with the scores.
        revision (`str`, *optional*):
            Label that tells models of one name apart.
        api_key (`str`, *optional*):
            Key that is sent as a bearer token. By default user and password in the server's address, or none.
        timeout, max_retries, max_concurrency, max_pixels:
            See [`ServerJudge`].

    Raises:
        `ImportError`: If the extra `server` is not installed.
        `ValueError`: If an option or an address is not valid.
    """

    _path = ""
    _option = "url"
    _key_variable = None
    _reply = "JSON object"

    def __init__(
        self,
        url: str | Sequence[str],
        name: str = "score server",
        revision: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 4,
        max_concurrency: int = 16,
        max_pixels: int = 1024 * 1024,
    ):
        super().__init__(
            name,
            url,
            revision=revision,
            api_key=api_key,
            timeout=timeout,
            max_retries=max_retries,
            max_concurrency=max_concurrency,
            max_pixels=max_pixels,
            parse=read_number,
        )

    @property
    def identity(self) -> dict[str, Any]:
        return {"judge": "ScoreServer", **{name: getattr(self, name) for name in ("name", "revision", "max_pixels")}}

    def _body(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
        content = messages[-1]["content"]
        texts = [part["text"] for part in content if part["type"] == "text"]
        *images, edit = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        requirement = texts[1] if len(texts) > 1 else None
        return {"prompt": texts[0], "requirement": requirement, "images": images, "edit": edit}

    def _answers(self, reply: dict[str, Any]) -> list[str]:
        score = reply.get("score", False)
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        if score is not None and not (is_number and abs(score) <= 1e18):  # NaN neither
            raise _Failure(
                "malformed",
                "the server's reply must be a JSON object with a `score` that is a finite number or null, but is "
                f"{shortened(redacted(str(reply)))!r}",
            )
        return [json.dumps(score)]


def _is_ready(server: _Server, call: _Call) -> bool:
    """Whether a server takes a request: it does not rest, and one that has failed takes one at a time."""
    return server.rests_until <= time.monotonic() and not (server.failures and call.open[server])


def _rest(server: _Server, failure: _Failure, seconds: float = 0.0) -> bool:
    """
    Lets a server rest if it and not the request is the cause of a failure: a second that doubles with each failure
    after a rest, longer if it asks for that, and 10 times as long as an attempt that took more than a second. Returns
    whether it is the cause.
    """
    if not failure.retry and failure.kind not in OF_THE_SERVER:
        return False
    now = time.monotonic()
    if server.rests_until <= now:  # else one of the requests that failed together has said so
        pause = max(min(2.0 ** min(server.failures, 6), LONGEST_PAUSE), failure.pause or 0.0)
        if seconds > 1.0:  # a server that accepts requests and never answers costs about a tenth of the time
            pause = max(pause, 10 * seconds)
        server.failures += 1
        server.rests_until = now + pause
        logger.warning(f"The judge's server {server.shown} rests for {pause:g} s: {failure.kind}: {failure}")
    return True


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
