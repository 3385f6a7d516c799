"""One judge on several servers: how they share the requests, and what becomes of one that fails."""

import itertools
import json
import logging
import math
import threading
import time
from collections import Counter

import pytest

from hp_edit_trl.judges import CachedJudge, JudgeRefusedError, JudgeTally, ServerJudge, load_judge
from hp_edit_trl.judges import server as module
from hp_edit_trl.judges.server import _Call, server_addresses
from tests.helpers import photo

from .faults import FAULTS, FaultyServer, completion, error, http, logprobs


DEAD = "http://127.0.0.1:9/v1"
KEYS = {"api_key": "key"}


def chat(group, edit=0):
    """A conversation about the edit with this number of the case with this number."""
    pictures = [{"type": "image", "image": photo(16, 16, seed=seed)} for seed in (1000 + group, edit)]
    text = {"role": "system", "content": [{"type": "text", "text": f"Score {group}"}]}
    return [text, {"role": "user", "content": [pictures[0], {"type": "text", "text": "B:"}, pictures[1]]}]


def answer(score="4", model="m"):
    return http(200, completion(score) | {"model": model})


def together(count):
    """Answers when so many requests are open, at all servers that are given it."""
    barrier = threading.Barrier(count)

    def serve(connection):
        barrier.wait(20)
        connection.sendall(answer())

    return serve


@pytest.fixture
def servers():
    """Starts servers that do what they are given; without anything, they answer."""
    started = []

    def start(*serves):
        started.extend(FaultyServer(answer() if serve is None else serve) for serve in serves)
        return started[-len(serves) :]

    yield start
    for one in started:
        one.socket.close()


@pytest.fixture
def short_rests(monkeypatch):
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.05)


def urls(started):
    return [one.url for one in started]


@pytest.mark.parametrize(("count", "concurrency"), [(2, 6), (3, 6), (2, 24)])
def test_requests_about_one_case_are_shared_evenly(servers, count, concurrency):
    started = servers(*[together(concurrency)] * count)
    judge = ServerJudge("m", urls(started), max_concurrency=concurrency)
    tally = JudgeTally().add(judge([chat(0, edit) for edit in range(24)]))
    shares = [len(one.requests) for one in started]
    assert shares == [24 // count] * count
    # The log and the summaries say so
    names = [one.url.removeprefix("http://") for one in started]
    assert tally.by_server == dict(sorted(zip(names, shares, strict=True)))
    assert tally.metrics[f"judge/requests/{names[0]}"] == shares[0] and f"{shares[0]} to {names[0]}" in str(tally)


def test_requests_about_one_case_go_to_one_server_as_long_as_there_is_room(servers, monkeypatch):
    started = servers(None, None)
    for rank in ("0", "1"):  # in all processes to the same one, in whichever order it is listed
        monkeypatch.setenv("RANK", rank)
        judge = ServerJudge("m", urls(started)[:: 1 - 2 * int(rank)])
        for group in range(20):
            judge([chat(group)])
            judge([chat(group, 1)])
    told = [Counter(json.loads(body)["messages"][0]["content"][0]["text"] for _, body in s.requests) for s in started]
    assert all(told) and not told[0].keys() & told[1].keys() and {*told[0].values(), *told[1].values()} == {4}


def test_among_equals_processes_begin_with_different_servers(monkeypatch):
    judge = ServerJudge("m", [f"http://judge-{i}/v1" for i in range(3)])
    first = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        call = _Call(None, 3, open=Counter(dict.fromkeys(judge._servers, 1)))
        first.append(judge._choose(judge._servers, b"", call).name)
    assert first == ["judge-0/v1", "judge-1/v1", "judge-2/v1", "judge-0/v1"]


def test_a_server_that_dies_in_the_middle_loses_no_score_and_comes_back(servers, short_rests, caplog):
    count = itertools.count()
    other, dying = servers(None, lambda connection: next(count) < 4 and connection.sendall(answer()))
    name = dying.url.removeprefix("http://")
    judge = ServerJudge("m", urls([other, dying]), max_concurrency=4, max_retries=1)
    chats = [chat(group) for group in range(30)]
    judged = judge(chats)
    assert [one.score for one in judged] == [4.0] * 30
    tally = JudgeTally().add(judged)
    assert 0 < tally.retries == tally.requests - 30 and tally.by_server[name] == 4 + tally.retries
    assert f"The judge's server {dying.url} rests for 0.05 s: connection" in caplog.text

    dying.serve = answer()
    time.sleep(0.06)
    judged = judge(chats)
    assert [one.score for one in judged] == [4.0] * 30 and JudgeTally().add(judged).by_server[name] > 1
    assert f"The judge's server {dying.url} answers again" in caplog.text


SOME = {
    "HTTP 500, 502, 503 or 504", "HTTP 400 (the request is refused)", "HTTP 404 (another model)", "redirect",
    "no choices", "HTTP 429 with a Retry-After that is no number", "connection reset within the reply", "no reply",
    "empty content",
    "compressed reply (a gzip bomb)", "reply of 40 MB", "HTML page",
}  # fmt: skip


@pytest.mark.parametrize("fault", [one for one in FAULTS if one.name in SOME], ids=lambda one: one.name)
def test_a_fault_of_one_server_is_made_up_for_by_another(servers, fault, monkeypatch):
    pauses, sleep = [], module.asyncio.sleep
    monkeypatch.setattr(module.asyncio, "sleep", lambda delay, *rest: pauses.append(delay) or sleep(delay, *rest))
    bad, good = servers(fault.serve, None)
    judge = ServerJudge("m", urls([bad, good]), timeout=1.0, max_retries=1, max_concurrency=2)
    scores = [one.score for one in judge([chat(group) for group in range(20)])]
    if fault.failure in ("http 400", "empty"):  # of the request, or of the model: no other server is asked
        assert scores.count(None) == len(bad.requests) > 0 and not judge._servers[0].failures
    else:
        assert scores == [4.0] * 20 and bad.requests and judge._servers[0].failures
    assert max(pauses, default=0) < 0.5  # nothing waits while there is another server


def test_a_server_rests_longer_after_each_failure_and_then_takes_one_request(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    judge = ServerJudge("m", ["http://a/v1", "http://b/v1"])
    one, other = judge._servers
    rests, call = [], _Call(None, 16)
    for _ in range(8):
        for _ in range(3):  # that were under way together
            assert module._rest(one, module._Failure("timeout", "late", retry=True))
        assert not module._is_ready(one, call) and judge._choose(judge._servers, b"", call) is other
        rests.append(one.rests_until - now[0])
        now[0] = one.rests_until
    assert rests == [1, 2, 4, 8, 16, 32, 60, 60]
    assert module._is_ready(one, call)
    call.open[one] = 1
    assert not module._is_ready(one, call)
    # A rest that the server asks for
    module._rest(other, module._Failure("rate limit", "slow down", retry=True, pause=7.0))
    assert other.rests_until - now[0] == 7 and judge._choose(judge._servers, b"", call) is one
    assert not module._rest(other, module._Failure("empty", "nothing"))
    # Time that was lost; any number of failures
    one.failures, now[0] = 5000, 1000.0
    for seconds, rest in ((0.5, 60), (120.0, 1200)):
        module._rest(one, module._Failure("timeout", "late", retry=True), seconds)
        assert one.rests_until - now[0] == rest
        now[0] = one.rests_until


def test_a_server_that_never_answers_rests_for_ten_times_the_time_that_it_cost(servers):
    silent = servers(lambda connection: time.sleep(2))[0]
    judge = ServerJudge("m", [silent.url, DEAD], timeout=1.1, max_retries=1)
    judge([chat(0)])
    rests = {one.shown: one.rests_until - time.monotonic() for one in judge._servers}
    assert rests[silent.url] > 9 and rests[DEAD] < 1


def test_all_servers_dead(servers):
    listed = [DEAD, "http://127.0.0.1:10/v1"]
    judge = ServerJudge("m", listed, max_retries=1)
    with pytest.raises(
        ConnectionError, match="2 of 2 servers of the judge 'm' give no judgements of 3 images"
    ) as told:
        judge.load(3)
    assert all(url in str(told.value) for url in listed)
    (judgement,) = judge([chat(0)])
    assert (judgement.score, judgement.failure, judgement.requests) == (None, "connection", 2)


def test_a_dead_server_in_the_list_is_named_at_the_start(servers):
    good, missing, late = servers(None, error(404, "model m does not exist"), lambda connection: time.sleep(2))
    listed = urls([good, missing, late])
    with pytest.raises(
        ConnectionError, match="^3 of 4 servers .* Start them, or leave them out of judge_base"
    ) as told:
        ServerJudge("m", [DEAD, *listed], max_retries=0, timeout=1.0).load()
    parts = (f"{DEAD}: connection", f"{missing.url}: http 404: ", f"{late.url}: timeout")
    assert all(part in str(told.value) for part in parts) and good.url not in str(told.value)
    ServerJudge("m", good.url).load()
    (refusing,) = servers(error(401, "bad key"))
    with pytest.raises(
        JudgeRefusedError, match=f"^1 of 2 servers .*{refusing.url}: refused: .* OPENAI_API_KEY. Start"
    ):
        ServerJudge("m", urls([good, refusing])).load()
    judge = ServerJudge("m", urls([good, refusing]))
    failures = {one.failure for one in judge([chat(group) for group in range(20)])}
    assert failures <= {None, "refused"} and "refused" in failures


def test_a_server_with_another_model(servers):
    one, other = servers(answer(model="m"), answer("1", model="m-small"))
    with pytest.raises(ConnectionError, match=f"different models: {one.url}: 'm', {other.url}: 'm-small'"):
        ServerJudge("m", urls([one, other])).load()
    # It changes in the middle of the run.
    other.serve = answer(model="m")
    judge = ServerJudge("m", urls([one, other]), max_concurrency=2)
    judge.load()
    other.serve = answer("1", model="m-small")
    assert [a.score for a in judge([chat(group) for group in range(20)])] == [4.0] * 20
    # A server that does not say, or a single one that calls it another name
    other.serve = http(200, completion())
    judge.load()
    ServerJudge("m", servers(answer(model="m@main"))[0].url).load()


def test_servers_without_probabilities_make_the_judge_one_of_whole_scores(servers, caplog):
    one, other = servers(http(200, completion("4", logprobs=logprobs({"4": 0.0}))), answer())
    judge = ServerJudge("m", urls([one, other]), "expected")
    judge.load()
    assert judge.score_mode == "integer" and f"no top_logprobs ({other.url})" in caplog.text


@pytest.mark.parametrize("unusable", [None, logprobs({"4": math.nan}), logprobs({"4": 0.0, "3": 0.0})])
def test_unusable_probabilities_of_one_server_are_made_up_for_by_another(servers, unusable):
    choice = {} if unusable is None else {"logprobs": unusable}
    bad, good = servers(
        http(200, completion("4", **choice)), http(200, completion("4", logprobs=logprobs({"4": 0.0})))
    )
    judge = ServerJudge("m", urls([bad, good]), "expected", max_retries=1, max_concurrency=2)
    assert [one.score for one in judge([chat(group) for group in range(10)])] == [4.0] * 10
    assert bad.requests and judge._servers[0].failures


def test_what_is_recorded_does_not_depend_on_the_server(servers, tmp_path):
    started = servers(None, None)
    several = CachedJudge(ServerJudge("m", urls(started)), tmp_path / "cache")
    judged = several([chat(group) for group in range(6)])
    single = CachedJudge(ServerJudge("m", DEAD), tmp_path / "cache")
    again = single([chat(group) for group in range(6)])
    assert several.identity == single.identity and all(one.cached and not one.servers for one in again)
    assert [one.score for one in again] == [one.score for one in judged]


def test_secrets_stay_with_their_server(servers, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-env-1")
    one, other = servers(error(400, "s3cret-of-one is wrong"), error(400, "key-of-env-1 is wrong"))
    with_user = one.url.replace("//", "//me:s3cret-of-one@")  # not a secret
    judge = ServerJudge("m", f"{with_user}?token=t0ken-of-one, {other.url}")
    judged = [judge([chat(group)])[0] for group in range(20)]
    assert one.requests and other.requests
    assert {b"basic" in head.lower() for head, _ in one.requests} == {True}
    assert {b"bearer key-of-env-1" in head.lower() for head, _ in other.requests} == {True}
    with pytest.raises(ConnectionError) as told:
        judge.load()
    shown = f"{judged} {told.value} {judge.identity}"
    assert not any(secret in shown for secret in ("s3cret-of-one", "t0ken-of-one", "key-of-env-1"))


@pytest.mark.parametrize(
    "given", [["http://a:1/v1", "http://b/v1"], "http://a:1/v1,http://b/v1", " http://a:1/v1 \n http://b/v1, "]
)
def test_addresses_are_a_list_or_a_text(given):
    assert server_addresses(given) == ["http://a:1/v1", "http://b/v1"]
    assert [one.name for one in load_judge("m", given)._servers] == ["a:1/v1", "b/v1"]


def test_a_password_may_hold_a_comma():
    listed = ["http://me:pa55,w0rd@a/v1", "http://b/v1"]  # not a secret
    assert server_addresses(", ".join(listed)) == listed


@pytest.mark.parametrize(
    "given",
    [
        "http://me:pa55,w0rd@a:port/v1",  # not a secret
        "http://me:pa55 w0rd@a/v1",
        "me:pa55,w0rd@a/v1",
        ["me:pa55@w0rd@a/v1"],
        "http://b/v1,c,http://me:pa55,w0rd@a/v1",  # not a secret
    ],
)
def test_an_error_shows_no_part_of_a_password(given):
    with pytest.raises(ValueError, match="is not an address") as told:
        server_addresses(given)
    assert "pa55" not in str(told.value) and "w0rd" not in str(told.value)


@pytest.mark.parametrize(
    "given",
    [
        [], "", " , ", (), ["http://a/v1", ""], ["http://a/v1", None], "http://a/v1,b:8000", ["http://a/v1 http://b/v1"],
        {"http://a/v1": 2}, 8000, ["http://a:port/v1"], "http://a:99999/v1", ["ftp://a/v1"], "http://[a/v1", [[DEAD]],
    ],
)  # fmt: skip
def test_what_is_no_list_of_addresses(given):
    with pytest.raises(ValueError, match="is not an address such as .*, or a list of such addresses"):
        load_judge("m", given)


def test_a_server_that_is_listed_twice_is_one(caplog):
    with caplog.at_level(logging.WARNING):
        judge = ServerJudge("m", [DEAD, "http://b/v1", f"{DEAD}/"], **KEYS)
    assert [one.name for one in judge._servers] == ["127.0.0.1:9/v1", "b/v1"]
    assert f"judge_base_url names {DEAD} more than once" in caplog.text
