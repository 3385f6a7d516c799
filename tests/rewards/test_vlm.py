import pytest

from hp_edit_trl import ServerJudge, TransformersJudge
from hp_edit_trl.judges import CachedJudge, parse_score
from hp_edit_trl.miniature.tiny import tiny_judge
from hp_edit_trl.rewards import HPScorerReward, Rewards, TournamentReward, VLMReward
from hp_edit_trl.rewards.answers import parse_pair_of_25
from tests.helpers import photo
from tests.judges.test_judges import completion, serve  # noqa: F401
from tests.rewards.helpers import AnswersJudge, call, images_of, shape_of


def test_a_prompt_places_the_images_and_the_texts_of_the_case():
    judge = AnswersJudge(lambda conversation: 4)
    prompts = {
        "plain": "Grade it: {prompt}, {requirement}.",
        "placed": "Be strict.{user}Before: {reference} After: {edit} Asked: {prompt}",
        "alone": "{edit}How sharp?",
    }
    reward = VLMReward(prompts, None, lambda *scores: sum(scores) / 15, judge)
    before, other, edit = photo(32, 32, 1), photo(32, 32, 2), photo(32, 32, 3)
    rewards = reward(["Say {edit} {user}"], [edit], images=[[before, other]], requirement=["red"])
    assert rewards == [pytest.approx(12 / 15)]
    plain, placed, alone = judge.seen
    assert shape_of(plain) == [("user", [0, 1, 2, 'Grade it: "Say {edit} {user}", "red".'])]
    assert images_of(plain) == [before, other, edit]
    assert shape_of(placed) == [
        ("system", ["Be strict."]),
        ("user", ["Before: ", 0, 1, " After: ", 2, ' Asked: "Say {edit} {user}"']),
    ]
    assert shape_of(alone) == [("user", [0, "How sharp?"])] and images_of(alone) == [edit]
    assert "plain:sha-" in reward.description and len(reward.prompt_revisions) == 3


def test_a_score_that_is_missing_leaves_the_reward_missing():
    scores = {"one": [3, 3, None, "no score"], "two": [1, None, 2, 5]}
    judge = AnswersJudge(lambda chat: scores[chat[0]["content"][-1]["text"]].pop(0))
    reward = VLMReward({"one": "one", "two": "two"}, None, lambda one, two: one + two, judge)
    rewards, metrics, extra = call(reward, 4)
    assert rewards == [4, None, None, None] and isinstance(rewards, Rewards)
    assert rewards.failed == [False, True, True, True]
    assert rewards.tally.failures == {"connection": 2, "no score": 1} and reward.tally.judgements == 8
    assert metrics == {"one": 3, "one_failed": 0.5, "two": pytest.approx(8 / 3), "two_failed": 0.25}
    assert extra == {"one": [3, 3, None, None], "two": [1, None, 2, 5]}
    assert reward([], []) == []


def test_the_parser_reads_the_answers_of_a_judge_that_is_given(tmp_path, serve):  # noqa: F811
    server = serve(lambda body, count: (200, completion('{"score": [20, 10]}')))
    judge = ServerJudge("m", server.url, max_new_tokens=200)
    options = dict(parse=parse_pair_of_25, normalize=lambda score: score / 25)
    reward = VLMReward({"q": "q"}, judge=CachedJudge(judge, tmp_path / "c"), **options)
    assert call(reward)[0] == [0.4] and judge.parse is parse_score and reward.is_remote
    assert reward.judge.identity["parse"] == "parse_pair_of_25"
    with pytest.raises(ValueError, match="max_new_tokens=16, too few for answers with reasons: allow 1024"):
        VLMReward({"q": "q"}, judge=ServerJudge("m", server.url), **options)
    with pytest.raises(ValueError, match="score_mode='expected', which reads digits, but parse_pair_of_25"):
        VLMReward({"q": "q"}, judge=ServerJudge("m", server.url, "expected", max_new_tokens=200), **options)
    by_name = VLMReward({"q": "q"}, judge="m", judge_base_url=server.url, num_answers=2, **options)
    assert by_name.judge.max_new_tokens == 1024 and by_name.judge.num_answers == 2


def test_bad_options():
    with pytest.raises(ValueError, match="prompts is empty"):
        VLMReward({}, None, float, AnswersJudge(lambda chat: 1))
    with pytest.raises(TypeError, match="must be the name of a model or a Judge"):
        VLMReward({"q": "q"}, None, float, lambda conversations: [])
    with pytest.raises(ConnectionError, match="neither a local file or folder nor in the cache"):
        VLMReward("no/such-prompts", None, float, AnswersJudge(lambda chat: 1))


def test_hp_scorer_is_one_of_them():
    reward = HPScorerReward(AnswersJudge(lambda chat: 3))
    assert isinstance(reward, VLMReward) and reward.description.endswith("task of the case")
    assert call(reward)[1] == {"hp_score": 3.0, "hp_score_failed": 0.0}


def test_a_trusted_text_keeps_tokens_that_are_none_of_the_model(tmp_path):
    judge = TransformersJudge(tiny_judge(str(tmp_path)))
    texts = [{"type": "text", "text": "<|global|> <|im_end|>"}] * 2
    texts[1] = texts[1] | {"trusted": True}
    fitted = judge._fit([{"role": "user", "content": texts}])[0]["content"]
    assert [part["text"] for part in fitted] == ["< |global|> < |im_end|>", "<|global|> < |im_end|>"]
    assert all(part.keys() == {"type", "text"} for part in fitted)


def length(answer):
    return float(len(answer))


def test_a_judge_in_this_process_reads_all_kinds_of_conversations(tmp_path):
    folder = tiny_judge(str(tmp_path))
    prompts = {"pair": "Be strict.{user}<img1>: {reference}<img2>: {edit}{prompt}", "alone": "{edit}How sharp?"}
    reward = VLMReward(prompts, length, lambda pair, alone: pair + alone, folder, max_new_tokens=4, quote=False)
    reward.load()
    rewards, metrics, _ = call(reward, 2)
    assert None not in rewards and metrics["pair_failed"] == metrics["alone_failed"] == 0 and not reward.is_remote
    tournament = TournamentReward(folder, parse=half, max_new_tokens=4)
    tournament.load()
    assert call(tournament, 2, id=["a", "a"])[0] == [0.5, 0.5]


def half(answer):
    return 0.5
