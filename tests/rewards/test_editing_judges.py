import json

import pytest

from hp_edit_trl.rewards import (
    EditScoreReward,
    FIRMReward,
    RationalReward,
    SpatialReward,
    UnifiedPairReward,
    UnifiedReward,
)
from tests.helpers import photo
from tests.judges.test_judges import completion, serve  # noqa: F401
from tests.rewards.helpers import ASPECTS, FIRM, PAIRWISE, POINTWISE, QUALITY, RATIONAL, SPATIAL, VIE_PROMPTS, call


FILES = {
    "vie_prompts.py": VIE_PROMPTS,
    "edit_pointwise_instruction_following.py": POINTWISE,
    "edit_pointwise_quality.py": QUALITY,
    "edit_pairwise_rank.py": PAIRWISE,
    "train_qwen_edit_rationalrewards.py": RATIONAL,
    "prompt_template.py": FIRM,
    "spatial_reward_scorer.py": SPATIAL,
}
TWO = 'CONTEXT for 10 years {\n"reasoning" : "...",\n"score" : [...]\n}\n\n'


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def asked(server):
    """The messages of each request, with `0`, `1` … for its images."""
    requests = []
    for body in server.requests:
        numbers = iter(range(9))
        messages = []
        for message in body["messages"]:
            parts = [part["text"] if part["type"] == "text" else next(numbers) for part in message["content"]]
            messages.append((message["role"], parts))
        requests.append(messages)
    return sorted(requests, key=lambda messages: -len(json.dumps(messages)))


def pair(score):
    return completion(json.dumps({"reasoning": "x", "score": score}))


def test_editscore(folder, serve):  # noqa: F811
    server = serve(lambda body, count: (200, pair([20, 16] if "Editing instruction" in str(body) else [25, 9])))
    rewards, metrics, _ = call(EditScoreReward(folder / "vie_prompts.py", "m", server.url))
    assert rewards == [pytest.approx((16 / 2.5 * 9 / 2.5) ** 0.5 / 10)]
    assert metrics == {"editscore_sc": 16, "editscore_sc_failed": 0, "editscore_pq": 9, "editscore_pq_failed": 0}
    rule = "RULES: two pictures.\n\n\nFrom 0 to 25: success and overediting.\nEditing instruction: Add a cat\n"
    assert asked(server) == [
        [("user", ["<img1>: ", 0, "<img2>: ", 1, TWO + rule])],
        [("user", ["<img1>: ", 0, f"{TWO}RULES: one picture.\nFrom 0 to 25: naturalness and artifacts.\n"])],
    ]
    assert {body["max_tokens"] for body in server.requests} == {512}


def test_unified_reward(folder, serve):  # noqa: F811
    answers = {True: '{\n\n"reasoning" : "a "b"",\n"score" : [10, 20],\n}', False: '{"score": [25, 25]}'}
    server = serve(lambda body, count: (200, completion(answers["instruction" in str(body)])))
    assert call(UnifiedReward(folder, "m", server.url))[0] == [pytest.approx((10 * 25) ** 0.5 / 25)]
    text = 'JUDGE it {\n"score" : [...],\n}\n0 to 25.\nEditing instruction:Add a cat\n'
    assert asked(server) == [[("user", [0, 1, text])], [("user", [0, "JUDGE one picture, 0 to 25."])]]


def test_unified_reward_of_pairs(folder, serve):  # noqa: F811
    server = serve(lambda body, count: (200, completion("Edited image 1 is better.")))  # whatever is shown first
    assert call(UnifiedPairReward(folder, "m", server.url), 2, id=["a", "a"])[0] == [0.5, 0.5]
    assert asked(server)[0] == [("user", [0, 1, 2, "COMPARE two.\nText instruction - Add a cat\n"])]


def test_rational_rewards(folder, serve):  # noqa: F811
    server = serve(lambda body, count: (200, completion(ASPECTS)))
    assert call(RationalReward(folder, "m", server.url))[0] == [pytest.approx(2.4 / 3)]
    task = ["User Instruction: Add a cat\n1. Source Image ", 0, "\n2. Edited Image ", 1]
    assert asked(server) == [
        [("system", ["You are an evaluator."]), ("user", [*task, "\n\nJudge. \n\nGUIDE from 1 to 4."])]
    ]


def test_firm(folder, serve):  # noqa: F811
    server = serve(lambda body, count: (200, pair([4] if "EXECUTION" in str(body) else [2])))
    assert call(FIRMReward(folder, "m", server.url))[0] == [pytest.approx(0.75 * (0.6 + 0.4 * 0.25))]
    assert call(FIRMReward(folder, "m", server.url, execution_weight=1.0))[0] == [0.75]
    form = 'Instruction: Add a cat\n{\n"score" : [1/2/3/4/5]\n}\n'
    assert asked(server)[0] == [("user", [0, 1, f"CONSISTENCY\n{form}"])]
    with pytest.raises(ValueError, match="execution_weight=2 must be from 0 to 1"):
        FIRMReward(folder, "m", server.url, execution_weight=2)


def test_spatialreward(folder, serve):  # noqa: F811
    region = '{"edit_region": [{"id": 0, "bbox_2d": [1, 2, 3, 4]}], "reasoning": "<|bbox_0|> x", "score": [16, 25]}'
    server = serve(lambda body, count: (200, completion(region) if "WHERE" in str(body) else pair([25, 25])))
    assert call(SpatialReward(folder, "m", server.url), prompts=["Add <|im_end|>"])[0] == [pytest.approx(20 / 25)]
    text = 'WHERE {"id": 0~n} and how, 0 to 25.\n- <|bbox_{id}|> before each region\n- <|global|> before the whole\n'
    assert asked(server) == [  # tokens of the authors' prompt stay, and those of the case do not
        [("user", [0, 1, f"{text}Editing instruction:\nAdd < |im_end|>"])],
        [("user", [0, '{{\n"score" : [...]\n}}\n0 to 25.\n'])],
    ]


def test_an_answer_in_another_format_is_missing(folder, serve):  # noqa: F811
    server = serve(lambda body, count: (200, completion('{"score": [4]}')))
    rewards, metrics, _ = call(EditScoreReward(folder, "m", server.url))
    assert rewards == [None] and rewards.failed == [True] and metrics["editscore_sc_failed"] == 1


def test_files_that_are_not_the_authors(folder, tmp_path, serve):  # noqa: F811
    with pytest.raises(FileNotFoundError, match="must be the authors' vie_prompts.py, or a folder that holds it"):
        EditScoreReward(tmp_path / "none", "m")
    (folder / "vie_prompts.py").write_text("_prompts_0shot_rule_PQ = 'x'")
    with pytest.raises(ValueError, match="has no text _context_no_delimit_reasoning_first, _prompts_0shot_tie"):
        EditScoreReward(folder, "m")
    (folder / "vie_prompts.py").write_text("not python at all")
    with pytest.raises(ValueError, match="is no Python file"):
        EditScoreReward(folder, "m")
    (folder / "prompt_template.py").write_text(FIRM.replace("{prompt}", "{other}"))
    with pytest.raises(ValueError, match="prompt for firm_execution has another form"):
        FIRMReward(folder, "m")
    (folder / "prompt_template.py").write_text(FIRM.replace("{prompt}", "it"))
    with pytest.raises(ValueError, match="prompt for firm_execution has no place for the instruction"):
        FIRMReward(folder, "m")


def test_more_references_than_the_prompts_have_a_place_for(folder, serve):  # noqa: F811
    reward = EditScoreReward(folder, "m", serve(lambda body, count: (200, pair([1, 1]))).url)
    reward.load(2)
    with pytest.raises(ValueError, match="The largest case has 2 references, but EditScoreReward judges 1"):
        reward.load(3)
    with pytest.raises(ValueError, match="Case 'a' has 2 references"):
        reward(["x"], [photo(8, 8)], images=[[photo(8, 8)] * 2], id=["a"])
