import base64
import io
import json
import math

import pytest
from PIL import Image

from hp_edit_trl.judges import CachedJudge, JudgeRefusedError, ScoreServer
from hp_edit_trl.rewards import HTTPReward
from tests.helpers import photo
from tests.judges.faults import FaultyServer, http
from tests.judges.test_judges import serve  # noqa: F401
from tests.rewards.helpers import call


GRAY = "How alike are these images?"  # of the trial


def picture(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))


def test_what_is_sent_and_what_comes_back(serve):  # noqa: F811
    server = serve(lambda body, count: (200, {"score": picture(body["edit"]).getpixel((0, 0))[0], "model": "m"}))
    reward = HTTPReward(server.url, lambda score: score / 255)
    reward.load()
    server.requests.clear()
    before, other = photo(16, 16, 1), photo(16, 16, 2)
    edits = [Image.new("RGB", (16, 16), (red, 0, 0)) for red in (51, 255)]
    rewards, metrics, extra = call(
        reward, 2, completions=edits, images=[[before, other]] * 2, requirement=[None, "black"]
    )
    assert rewards == [0.2, 1.0] and extra == {"http_score": [51, 255]} and metrics["http_score"] == 153
    first, second = sorted(server.requests, key=lambda body: body["requirement"] is not None)
    assert first.keys() == {"prompt", "requirement", "images", "edit"}
    assert (first["prompt"], first["requirement"], second["requirement"]) == ("Add a cat", None, "black")
    assert [picture(one).tobytes() for one in first["images"]] == [before.tobytes(), other.tobytes()]
    assert reward.is_remote and reward.prompt_revisions == [] and "ScoreServer" in reward.description


@pytest.mark.parametrize(
    "reply",
    [
        {"scores": [1.0]},
        {"score": "3"},
        {"score": True},
        {"score": [3]},
        {"score": math.nan},
        {"score": math.inf},
        {},
        [1.0],
        "<html>",
    ],
)
def test_another_schema_shows_before_the_first_step(reply):
    with FaultyServer(http(200, reply)) as server, pytest.raises(ConnectionError, match="malformed: the server's"):
        HTTPReward(server.url).load()


def test_retries_and_failures_are_those_of_judges(serve, tmp_path):  # noqa: F811
    replies = {1: (500, {}), 2: (200, {"score": None}), 3: (400, {"error": "no"})}
    server = serve(lambda body, count: replies.get(count, (200, {"score": 0.0})))
    judge = ScoreServer(server.url, max_retries=1, max_concurrency=1)
    rewards, metrics, _ = call(HTTPReward(CachedJudge(judge, tmp_path / "c.sqlite")), 3)
    assert rewards == [None, None, 0.0] and rewards.failed == [True, True, False]  # 0 is a score
    assert rewards.tally.failures == {"no score": 1, "http 400": 1}
    assert rewards.tally.retries == 1 and metrics["http_score_failed"] == pytest.approx(2 / 3)
    assert call(HTTPReward(CachedJudge(judge, tmp_path / "c.sqlite")), 3)[0] == [None, 0.0, 0.0]
    assert len(server.requests) == 5  # of those before, the failed request alone is repeated


def test_a_key_is_only_sent_if_it_is_given(serve, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    with FaultyServer(http(401, {"error": {"message": "bad key"}})) as server:
        with pytest.raises(JudgeRefusedError, match=r"Set the key of the API, with api_key=\."):
            HTTPReward(server.url).load()
        with pytest.raises(JudgeRefusedError):
            HTTPReward(ScoreServer(server.url, api_key="mine")).load()
        heads = [head.decode() for head, _ in server.requests]
    assert "sk-of" not in heads[0] and "Bearer mine" in heads[1]


def test_bad_addresses():
    with pytest.raises(ValueError, match="url='localhost:8000' is not an address"):
        HTTPReward("localhost:8000")
    with pytest.raises(ConnectionError, match="gives no judgements of 2 images: connection"):
        HTTPReward(ScoreServer("http://127.0.0.1:9/score", max_retries=0)).load()


def test_the_server_for_editreward_speaks_this_schema(monkeypatch):
    from http.server import ThreadingHTTPServer
    from threading import Thread

    import editreward_server

    class Inferencer:
        def reward(self, prompts, image_src, image_paths):
            assert all(Image.open(one).size == (32, 32) for one in (*image_src, *image_paths) if prompts[0] != GRAY)
            return [[float(len(prompt)), 0.0] for prompt in prompts]

    server = ThreadingHTTPServer(("127.0.0.1", 0), editreward_server.handler(Inferencer()))
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    reward = HTTPReward(f"http://127.0.0.1:{server.server_address[1]}/score")
    reward.load()
    assert call(reward, 2, prompts=["ab", "abc"])[0] == [2.0, 3.0]
    broken = json.dumps({"prompt": "x"})
    assert editreward_server.score(Inferencer(), broken)[0] == 400
    server.shutdown()
    server.server_close()
