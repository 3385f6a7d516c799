import pytest

from hp_edit_trl.rewards import OCRReward
from hp_edit_trl.rewards.ocr import text_similarity
from tests.judges.test_judges import completion, serve  # noqa: F401
from tests.rewards.helpers import AnswersJudge, call, images_of


@pytest.mark.parametrize(
    ("wanted", "found", "similarity"),
    [
        ("OPEN", "We are\nopen today", 1.0),
        ("open now", "open\n  now", 1.0),
        ("OPEN", "OPFN", 0.75),
        ("OPEN", "OPEEN", 0.75),
        ("OPEN", "OEN", 0.75),
        ("OPEN", "", 0.0),
        ("ab", "xyz", 0.0),
        ("Ⅳ", "iv", 1.0),
        ("咖啡", "今天的咖啡", 1.0),
    ],
)
def test_how_exactly_a_text_occurs(wanted, found, similarity):
    assert text_similarity(wanted, found) == pytest.approx(similarity)


def test_the_edit_is_read_without_knowing_what_it_should_say(serve):  # noqa: F811
    server = serve(lambda body, count: (200, completion("OPEN" if count == 1 else "4")))
    reward = OCRReward("m", server.url)
    reward.judge.max_concurrency = 1
    rewards, metrics, extra = call(reward, 4, text=["open", "4", None, " "])
    assert rewards == [1.0, 1.0, None, None] and rewards.failed == [False] * 4 and not rewards.tally.failures
    assert extra == {"ocr_text": ["OPEN", "4", None, None]} and metrics == {"ocr_similarity": 1.0}
    assert len(server.requests) == 2 and "open" not in str(server.requests[0]["messages"]).replace("base64", "")[:900]
    assert call(reward, 1)[0] == [None]  # no column `text`
    judge = AnswersJudge(lambda chat: "<think>Is it open?</think>(No text)")
    assert call(OCRReward(judge), 1, text=["not"])[0] == [0.0]


def test_a_failure_is_missing():
    judge = AnswersJudge(lambda chat: None)
    rewards, _, _ = call(OCRReward(judge), 1, text=["open"])
    assert rewards == [None] and rewards.failed == [True] and rewards.tally.failures == {"connection": 1}
    assert len(images_of(judge.seen[0])) == 1  # the edit alone
