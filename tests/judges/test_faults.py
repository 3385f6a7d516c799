"""What becomes of the faults of a judge's server, one by one and in the callers."""

import asyncio
import json
import logging
import resource
import time
from pathlib import Path

import pytest

from hp_edit_trl.judges import CachedJudge, FailureLimit, Judgement, JudgeRefusedError, JudgeTally, ServerJudge
from hp_edit_trl.judges.base import LONGEST_ANSWER, digit_of_token, expected_score
from hp_edit_trl.judges.server import _pause
from tests.helpers import photo

from .faults import FAULTS, FaultyServer, completion, error, http, logprobs


def chat(text="Score it", count=2):
    pictures = [{"type": "image", "image": photo(16, 16, seed=i)} for i in range(count)]
    return [
        {"role": "system", "content": [{"type": "text", "text": text}]},
        {"role": "user", "content": [{"type": "text", "text": "Image A:"}, *pictures]},
    ]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_of_the_server_is_a_missing_score_with_its_kind(fault, tmp_path):
    with FaultyServer(fault.serve) as server:
        judge = ServerJudge("m", server.url, timeout=0.3, max_retries=1, **fault.options)
        cached = CachedJudge(judge, tmp_path / "cache")
        start = time.perf_counter()
        if fault.stops:
            cannot = f"refused: The judge 'm' at {server.url} cannot be used: the server answered 40"
            judged = cached([chat(), chat("Another")])
            assert all(one.answer.startswith(cannot) and one.failure == "refused" for one in judged)
            with pytest.raises(JudgeRefusedError, match="api_key= or .* OPENAI_API_KEY. Run again.$"):
                FailureLimit().check([GOOD], "edits", "Run again.", judged)
            with pytest.raises(JudgeRefusedError, match="^The judge 'm' at .*: the server answered 40"):
                judge.load()
            return
        (judgement,) = cached([chat()])
        assert time.perf_counter() - start < 2.5  # two attempts and a pause
        assert (judgement.score, judgement.failure) == (fault.score, fault.failure)
        assert judgement.answered == (fault.failure is None) and len(judgement.answer) <= LONGEST_ANSWER
        assert judgement.requests == len(server.requests) == fault.attempts
        assert judgement.retries == fault.attempts - 1 and (judgement.seconds_lost > 0 or fault.attempts == 1)
        if fault.failure is not None:
            assert judgement.answer.startswith(f"{fault.failure}: ") and len(judgement.answer) < 700
            # It is asked again when the server is mended.
            mended = http(200, completion("3", logprobs=logprobs({"3": 0.0})))
            server.serve = mended
            assert cached([chat()])[0].score == 3
            server.serve = fault.serve
            assert cached([chat()])[0].cached
            with pytest.raises(ConnectionError) if judgement.failure != "malformed" else _either():
                judge.load()


class _either:
    """For a trial that is answered another way than a judgement."""

    def __enter__(self):
        return self

    def __exit__(self, kind, *args):
        return kind is None or issubclass(kind, ConnectionError)


def test_a_key_that_is_refused_on_the_way_loses_no_answer(tmp_path):
    replies = [http(200, completion("3")), http(200, completion("4")), error(401)]
    count = iter(range(99))

    def serve(connection):
        connection.sendall(replies[min(next(count), 2)])

    with FaultyServer(serve) as server:
        judge = CachedJudge(ServerJudge("m", server.url, max_concurrency=1), tmp_path / "cache")
        judged = judge([chat(str(i)) for i in range(9)])
        assert [one.score for one in judged] == [3, 4] + [None] * 7 and len(server.requests) == 3
        assert {one.failure for one in judged[2:]} == {"refused"}
        server.serve = http(200, completion("5"))
        assert [one.score for one in judge([chat(str(i)) for i in range(9)])] == [3, 4] + [5] * 7
        assert len(server.requests) == 10


def test_the_table_of_the_documentation_has_a_row_for_each_fault():
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    section = page.partition("## Judges\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")]
    assert rows[0] == "Fault" and len(rows) == len(set(rows)) and not any("---" in row for row in rows)
    others = {
        "nobody listens at the address",
        "a judge that is gone in the middle of a run",
        "a judge that is mended",
        "an answer without a score",
        "one of several servers is dead at the start, or refuses the key",
        "one of several servers has another model",
        "one of several servers fails: connections, timeouts, 404, 408, 409, 429, 5xx, or replies that are no answer",
        "all of several servers fail",
        "one of several servers refuses the key later",
        "a server is listed twice",
        # tests/rewards/test_http.py
        "a server with scores (`ScoreServer`) answers with another schema, a text, a boolean, NaN or infinity",
        "a server with scores answers `null`",
    }
    assert set(rows[1:]) == {fault.name for fault in FAULTS} | others


def test_nobody_listens():
    judge = ServerJudge("m", "http://127.0.0.1:9/v1", max_retries=1)
    judgements = judge([chat(), chat("Another")])
    assert [one.failure for one in judgements] == ["connection"] * 2
    tally = JudgeTally().add(judgements)
    assert (tally.requests, tally.retries, tally.failures) == (4, 2, {"connection": 2})
    assert tally.seconds_lost > 1 and "2 connection" in str(tally)  # each paused half a second


def test_what_is_sent_asks_for_no_compression_and_names_no_key_in_errors(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with FaultyServer(error(400, "the key sk-secret is wrong")) as server:
        (judgement,) = ServerJudge("m", server.url + "/?version=sk-secret")([chat()])
    head = server.requests[0][0].decode().lower()
    assert "accept-encoding: identity" in head and "authorization: bearer sk-secret" in head
    assert head.startswith("post /v1/chat/completions?version=") and "sk-secret" not in judgement.answer
    with pytest.raises(ConnectionError) as caught:
        ServerJudge("m", "http://me:sk-secret@127.0.0.1:9/v1", api_key="x").load()  # not a secret
    assert "sk-secret" not in str(caught.value)
    for url in ("localhost:8000", "ftp://x/v1", "http://", ""):
        with pytest.raises(ValueError, match="is not an address"):
            ServerJudge("m", url)
    for options in ({"timeout": 0}, {"timeout": float("nan")}, {"timeout": float("inf")}, {"max_retries": -1}):
        with pytest.raises(ValueError, match="must be above 0, and max_retries"):
            ServerJudge("m", "http://127.0.0.1:9/v1", **options)


def test_a_netrc_does_not_take_the_place_of_the_key_and_proxies_are_used(monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password other\n")  # not a secret
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with FaultyServer(http(200, completion("3"))) as server:
        assert ServerJudge("m", server.url, api_key="key")([chat()])[0].score == 3
        monkeypatch.setenv("http_proxy", server.url.replace("//", "//you:there@"))  # not a secret
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert ServerJudge("m", "http://judge.invalid/v1", api_key="key")([chat()])[0].score == 3
        assert ServerJudge("m", server.url, api_key="key")([chat()])[0].score == 3
    direct, proxied, bypassed = (head.decode().lower() for head, _ in server.requests)
    assert all("\r\nauthorization: bearer key\r\n" in head for head in (direct, proxied, bypassed))
    assert proxied.startswith("post http://judge.invalid/v1/chat/completions ") and "proxy-auth" in proxied
    assert "proxy-auth" not in direct + bypassed and bypassed.startswith("post /v1")


def test_a_flood_takes_no_memory_and_no_line_of_a_log_is_long(caplog):
    flood = next(fault for fault in FAULTS if fault.name == "reply of 40 MB")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with FaultyServer(flood.serve) as server:
        ServerJudge("m", server.url, timeout=5)([chat()] * 4)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80_000  # KiB, of 160 MB
    with caplog.at_level(logging.WARNING), FaultyServer(http(200, completion("x" * 2**20))) as server:
        ServerJudge("m", server.url).load()
    assert "answered a trial without a score" in caplog.text and len(caplog.text) < 1000


def test_a_judge_works_inside_a_running_event_loop():
    async def inside():
        with FaultyServer(http(200, completion("3"))) as server:
            return ServerJudge("m", server.url)([chat()] * 3)

    assert [one.score for one in asyncio.run(inside())] == [3, 3, 3]


def test_the_pause_that_a_server_asks_for_is_kept_within_reason():
    assert [_pause(text) for text in ("2", "0", "-5", "1e9")] == [2, 0, 0, 60]
    assert [_pause(text) for text in (None, "", "soon", "nan", "Mon, 32 Foo 2026")] == [None] * 5
    assert _pause("Wed, 21 Oct 2015 07:28:00 GMT") == 0 and _pause("Wed, 21 Oct 2095 07:28:00 GMT") == 60
    with FaultyServer(error(429, headers="Retry-After: 0.6\r\n")) as server:
        start = time.perf_counter()
        (judgement,) = ServerJudge("m", server.url, max_retries=1)([chat()])
        assert 0.6 <= judgement.seconds_lost <= time.perf_counter() - start


def test_the_trial_has_as_many_images_as_the_largest_case():
    with FaultyServer(http(200, completion())) as server:
        ServerJudge("m", server.url).load(5)
        ServerJudge("m", server.url).load()
    sent = [json.loads(body)["messages"][1]["content"] for _, body in server.requests]
    assert [sum(part["type"] == "image_url" for part in content) for content in sent] == [5, 2]
    with FaultyServer(error(400, "at most 2 images")) as server:
        with pytest.raises(ConnectionError, match="no judgements of 4 images: http 400: .*at most 2 images"):
            ServerJudge("m", server.url).load(4)


@pytest.mark.parametrize("content", ["", None, "<think>Let me see", "<think>4</think>", " \n\u200b\ufeff\u3164"])
def test_a_model_that_only_thinks_fails_its_trial(content):
    with FaultyServer(http(200, completion(content))) as server:
        with pytest.raises(
            ConnectionError, match="empty.*needs more than max_new_tokens=16, or its reasoning switched"
        ):
            ServerJudge("m", server.url).load()


@pytest.mark.parametrize(
    ("token", "digit"),
    [
        ("4", 4), (" 4", 4), ("▁4", 4), ("Ġ4", 4), ("4Ċ", 4), ("\n0", 0), ("<0x35>", 5), ("<0x34>", 4),
        ("4.", None), ("10", None), ("6", None), ("<4>", None), ("<0x41>", None), ("", None), ("▁", None), ("٤", None),
        ("²", None), ("４", None), ("-4", None),
    ],
)  # fmt: skip
def test_tokens_of_digits(token, digit):
    assert digit_of_token(token) == digit


@pytest.mark.parametrize(
    ("answer", "is_score"),
    [
        ("4", True), (" 4", True), ("4.", True), ("4.0", True), ("4/5", True), ("4 / 5.", True), ("4, because", True),
        ("4\n\n3", True), ("4 - good", True), ("", True), ("10", False), (" 10", False), ("100", False),
        ("4.5", False), ("4,5", False), ("4/10", False), ("4 / 50", False), ("4-5", False), ("3 – 4", False),
        ("4.0/10", False), ("50%", False), ("5 %", False),
    ],
)  # fmt: skip
def test_a_number_that_only_begins_with_a_digit_is_no_score(answer, is_score):
    assert (expected_score([0, 0.3, 0, 0, 0.7, 0], 0.5, answer).score is not None) == is_score


def failed(kind="timeout"):
    return Judgement(None, f"{kind}: gone", answered=False, failure=kind)


GOOD = Judgement(4.0, "4")


def test_the_limit_of_failures():
    FailureLimit().check([failed()] * 7 + [GOOD] + [failed()] * 7, "edits", "")
    with pytest.raises(
        ConnectionError, match="many edits: 9 in a row.*5 timeout .timeout: gone., 4 http 500.* Resume."
    ):
        FailureLimit().check([failed()] * 5 + [failed("http 500")] * 4, "edits", "Resume.")
    limit = FailureLimit()  # over several calls
    limit.check([failed()] * 5, "edits", "")
    with pytest.raises(ConnectionError, match="8 in a row"):
        limit.check([failed()] * 3, "edits", "")
    # A judge that fails more than every other time, but never eight times in a row
    flaky = FailureLimit()
    flaky.check(([failed()] * 2 + [GOOD]) * 21, "edits", "")
    with pytest.raises(ConnectionError, match="67% of the last 64"):
        flaky.check([failed()], "edits", "")
    FailureLimit().check([failed(), GOOD] * 100, "edits", "")
    # Neither images that cannot be shown nor answers without a score are a judge that is gone.
    FailureLimit().check([failed("image"), Judgement(None, "I like it")] * 100, "edits", "")


def test_a_tally_adds_up():
    one = Judgement(None, "x" * 999, answered=False, failure="timeout", requests=3, retries=2, seconds_lost=1.5)
    tally = JudgeTally().add([one, GOOD, Judgement(None, "prose")]).merge(JudgeTally().add([one]))
    assert tally.metrics == {
        "judge/requests": 6, "judge/retries": 4, "judge/seconds_lost": 3.0, "judge/failures": 3,
        "judge/failures/timeout": 2, "judge/failures/no_score": 1,
    }  # fmt: skip
    assert tally.by_kind() == "2 timeout, 1 no score" and len(tally.by_kind(reasons=True)) < 300
