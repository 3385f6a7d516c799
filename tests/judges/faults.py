"""
Faults of a judge's server, in one list: what the server does, and what becomes of it. `docs/reliability.md` has a row
for each.
"""

import gzip
import json
import math
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


def completion(content: Any = "4", **choice: Any) -> dict[str, Any]:
    """A chat completion."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}} | choice
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


def logprobs(*positions: dict[str, float]) -> dict[str, Any]:
    """The probabilities of the likeliest tokens, position by position; the first token of each is the one written."""
    content = []
    for tokens in positions:
        entries = [{"token": token, "logprob": value, "bytes": None} for token, value in tokens.items()]
        content.append({**entries[0], "top_logprobs": entries})
    return {"content": content}


def http(status: int, body: bytes | str | Any, headers: str = "", kind: str = "application/json") -> bytes:
    """A whole reply."""
    data = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    head = f"HTTP/1.1 {status} Status\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n"
    return f"{head}Connection: close\r\n{headers}\r\n".encode() + data


def error(status: int, message: str = "out of order", headers: str = "") -> bytes:
    return http(status, {"error": {"message": message}}, headers)


def trickle(connection: socket.socket, data: bytes) -> None:
    """Sends a byte at a time, faster than any timeout of a single read."""
    for byte in data:
        connection.sendall(bytes([byte]))
        time.sleep(0.02)


def reset(connection: socket.socket) -> None:
    """Half a reply, and no goodbye."""
    connection.sendall(http(200, completion())[:120])
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def flood(connection: socket.socket) -> None:
    """A reply of 40 MB, in chunks, as long as somebody reads."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(40):
        connection.sendall(b"100000\r\n" + b"4" * 2**20 + b"\r\n")
    connection.sendall(b"0\r\n\r\n")


@dataclass
class Fault:
    """
    Args:
        name (`str`):
            Its name in the table.
        serve (`bytes` or `Callable`):
            The reply, or what is done with the connection after the request was read.
        failure (`str`, *optional*):
            The kind that the judgement says; `None` if there is an answer.
        attempts (`int`, *optional*, defaults to `1`):
            How often the server is asked, with one retry.
        score (`float`, *optional*):
            The score, if there is one all the same.
        options (`dict`, *optional*):
            Options of the judge.
        stops (`bool`, *optional*, defaults to `False`):
            Whether it stops at once.
    """

    name: str
    serve: bytes | Callable[[socket.socket], None]
    failure: str | None = None
    attempts: int = 1
    score: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    stops: bool = False


RUBBISH = json.dumps(completion("4 \ud83d")).encode()[:-1] + b', "x": "\xff"}'
MARKED = logprobs({token: math.log(0.2) for token in (" 4", "Ġ4", "▁4", "4Ċ", "<0x34>")})
EXPECTED = {"score_mode": "expected"}
P = math.log
FAULTS = [
    Fault("HTTP 500, 502, 503 or 504", error(500, headers="Retry-After: 0\r\n"), "http 500", 2),
    Fault("HTTP 400 (the request is refused)", error(400, "too many images"), "http 400"),
    Fault("HTTP 404 (another model)", error(404, "model m does not exist"), "http 404"),
    Fault("HTTP 401", error(401, "bad key"), stops=True),
    Fault("HTTP 403", error(403, "no access"), stops=True),
    Fault("HTTP 429 with Retry-After", error(429, "slow down", "Retry-After: 0.1\r\n"), "rate limit", 2),
    Fault(
        "HTTP 429 with a Retry-After that is no number", error(429, headers="Retry-After: soon\r\n"), "rate limit", 2
    ),
    Fault("connection closed without a reply", lambda connection: None, "connection", 2),
    Fault("connection reset within the reply", reset, "connection", 2),
    Fault("reply that is not HTTP", b"\x00\x01SSH-2.0-server\r\n\r\n", "connection", 2),
    Fault("headers that trickle", lambda c: trickle(c, b"HTTP/1.1 200 OK\r\n" * 99), "timeout", 2),
    Fault(
        "reply that trickles", lambda c: (c.sendall(http(200, "4" * 999)[:150]), trickle(c, b" " * 999)), "timeout", 2
    ),
    Fault("no reply", lambda connection: time.sleep(2), "timeout", 2),
    Fault("reply of 40 MB", flood, "too large"),
    Fault(
        "compressed reply (a gzip bomb)",
        http(200, gzip.compress(b"4" * 2**20), "Content-Encoding: gzip\r\n"),
        "encoding",
    ),
    Fault("redirect", http(307, "", "Location: http://127.0.0.2:9/v1/chat/completions\r\n"), "redirect"),
    Fault("empty content", http(200, completion("")), "empty"),
    Fault("blank content", http(200, completion(" \n\t ")), "empty"),
    Fault("null content", http(200, completion(None)), "empty"),
    Fault("content that is reasoning alone", http(200, completion("<think>It is a 4, or a 5")), "empty"),
    Fault("reasoning without an answer", http(200, completion("<think>It is a 4</think>\n")), "empty"),
    Fault("no choices", http(200, {**completion(), "choices": []}), "malformed"),
    Fault("HTML page", http(200, "<html>Welcome</html>", kind="text/html"), "malformed"),
    Fault("JSON that is cut off", http(200, json.dumps(completion())[:-9]), "malformed"),
    Fault("JSON that is nested too deeply", http(200, "[" * 200_000), "malformed"),
    Fault("JSON of wrong types", http(200, {"choices": {"message": "4"}, "usage": 7}), "malformed"),
    Fault("token counts of wrong types", http(200, completion() | {"usage": {"prompt_tokens": "many"}}), score=4.0),
    Fault(
        "half a character, and bytes that are no UTF-8",
        http(200, RUBBISH),
    ),
    Fault("answer of 1 MB", http(200, completion("4" * 2**20))),
    Fault(
        "NaN as a log-probability",
        http(200, completion(logprobs=logprobs({"4": math.nan}))),
        "malformed",
        options=EXPECTED,
    ),
    Fault(
        "log-probability above 0", http(200, completion(logprobs=logprobs({"4": 0.7}))), "malformed", options=EXPECTED
    ),
    Fault(
        "probabilities that add up to more than 1",
        http(200, completion(logprobs=logprobs({"4": 0.0, "3": 0.0}))),
        "malformed",
        options=EXPECTED,
    ),
    Fault("no log-probabilities after the trial", http(200, completion()), "malformed", options=EXPECTED),
    Fault(
        "tokens with spaces or byte marks around the digit",
        http(200, completion(logprobs=MARKED)),
        score=4.0,
        options=EXPECTED,
    ),
    Fault(
        "token of a digit and more, e.g. `4.`",
        http(200, completion("4.5", logprobs=logprobs({"4.": P(0.9), "4": P(0.1)}))),
        options=EXPECTED,
    ),
    Fault(
        "10 in two tokens, or 4.5, 4/10, 40 %",
        http(200, completion("10", logprobs=logprobs({"1": P(0.9), "4": P(0.1)}, {"0": 0.0}))),
        options=EXPECTED,
    ),
]


def _received(connection: socket.socket) -> bytes:
    data = connection.recv(2**16)
    if not data:
        raise ConnectionError("the judge has hung up")
    return data


class FaultyServer:
    """A server on loopback that does one of the faults to every request."""

    def __init__(self, serve: bytes | Callable[[socket.socket], None]):
        self.serve = serve
        self.requests: list[tuple[bytes, bytes]] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection = self.socket.accept()[0]
            except OSError:  # closed
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                data = b""
                while b"\r\n\r\n" not in data:
                    data += _received(connection)
                head, _, body = data.partition(b"\r\n\r\n")
                length = next(
                    int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
                )
                while len(body) < length:
                    body += _received(connection)
                self.requests.append((head, body))
                if isinstance(self.serve, bytes):
                    connection.sendall(self.serve)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(1)
                else:
                    self.serve(connection)
            except OSError:  # the judge has hung up
                pass

    def __enter__(self) -> "FaultyServer":
        return self

    def __exit__(self, *args: Any) -> None:
        self.socket.close()
