"""Reward functions that are named on the command line or in a file."""

import pytest
import yaml

from hp_edit_trl.cli import main
from hp_edit_trl.rewards import Gate, HPScorerReward, IdentityReward, TournamentReward
from hp_edit_trl.scripts import grpo, nft
from hp_edit_trl.scripts.rewards import NAMES, OnlineScriptArguments, load_rewards, make_reward


MODEL = ["--model_name_or_path", "someone/editor", "--dataset_name", "someone/cases"]
CPU = ["--use_cpu", "true", "--bf16", "false"]
URL = "http://127.0.0.1:9/v1"
SERVED = {"judge": "t", "judge_base_url": URL}
GATE = {"Gate": {"reward": "HPScorerReward", "test": {"IdentityReward": {"model": None}}, "threshold": 0.8}}


def named(*names, **options):
    return load_rewards(OnlineScriptArguments(reward_funcs=list(names), judge="m", judge_base_url=URL, **options))


def test_rewards_by_name_with_options_and_gates(tmp_path):
    (default,) = load_rewards(OnlineScriptArguments(judge="m", judge_base_url=URL, reward_alpha=1.0))
    assert isinstance(default, HPScorerReward) and default.alpha == 1.0
    (tmp_path / "own.py").write_text("def red(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n")
    gate, identity, tournament, function, hub, other = named(
        GATE, "IdentityReward: {model: null, unchanged: 0.7}", {"TournamentReward": SERVED},
        f"{tmp_path}/own.py:red", "Qwen/Qwen3-VL-8B-Instruct", {"HPScorerReward": SERVED | {"alpha": 4.0}},
        reward_alpha=3.0,
    )  # fmt: skip
    assert isinstance(gate, Gate) and (gate.threshold, gate.reward.alpha) == (0.8, 3.0)
    assert isinstance(gate.test, IdentityReward) and gate.reward.judge.identity["name"] == "m"
    assert isinstance(identity, IdentityReward) and identity.unchanged == 0.7
    assert isinstance(tournament, TournamentReward) and hub == "Qwen/Qwen3-VL-8B-Instruct"
    assert function(["a"], [None]) == [1.0] and other.alpha == 4.0  # with options of its own
    (http,) = named({"HTTPReward": {"url": "http://127.0.0.1:9/score", "normalize": "math:tanh"}})
    assert http.normalize(0) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("IdentityRewards", "there is no reward 'IdentityRewards': use AestheticReward, .*Gate, .*file.py:name"),
        ({"Sharpness": {"a": 1}}, "there is no reward 'Sharpness'"),
        ({"IdentityReward": {"tresh": 1}}, "IdentityReward has no option tresh; it has model, "),
        ("TournamentReward", "TournamentReward needs judge, as in `TournamentReward: {judge: ...}`"),
        ({"Gate": {"reward": "HPScorerReward", "threshold": 1}}, "Gate needs test"),
        ({"Gate": GATE["Gate"] | {"reward": "Nothing"}}, "there is no reward 'Nothing'"),
        ({"Gate": GATE["Gate"] | {"reward": "a/judge"}}, "must name a reward function: write `HPScorerReward"),
        ({"Gate": GATE["Gate"] | {"threshold": "high"}}, "Gate cannot be made with"),
        ({"IdentityReward": {"unchanged": 3}}, "unchanged=3"),
        ({"IdentityReward": [1]}, "must be a name, or a mapping of a name to its options"),
        ({"IdentityReward": {}, "Gate": {}}, "must be a name, or a mapping of a name"),
        (3, "3 must be a name, or a mapping"),
        ("Gate: {", "is no YAML"),
        ("none.py:red", "reward_funcs='none.py:red' cannot be imported"),
        ({"HTTPReward": {"url": "http://a/", "normalize": "none.py:f"}}, "normalize='none.py:f' cannot be imported"),
    ],
)
def test_wrong_names_and_options(wrong, message):
    with pytest.raises(ValueError, match=message):
        named(wrong)


def test_an_empty_list_and_every_name():
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        named()
    assert {"HPScorerReward", "EditScoreReward", "Gate", "OCRReward"} <= set(NAMES) and "Reward" not in NAMES
    assert make_reward("Mine", {"Mine": lambda: "made"}) == "made"


@pytest.mark.parametrize("command", ["grpo", "nft"])
def test_both_commands_take_them(command, tmp_path, monkeypatch):
    runs = []
    script = {"grpo": grpo, "nft": nft}[command]
    monkeypatch.setattr(script, "trainer_options", lambda *arguments: {"args": arguments[1]})
    trainer = "FlowGRPOEditTrainer" if command == "grpo" else "FlowNFTEditTrainer"
    monkeypatch.setattr(script, trainer, lambda **options: runs.append(options))
    monkeypatch.setattr(script, "run_training", lambda trainer: None)
    judge = ["--judge", "m", "--judge_base_url", URL]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"reward_funcs": [GATE, "IdentityReward"], "reward_weights": [1.0, 0.0]}))
    main([command, *MODEL, *CPU, *judge, "--config", str(file)])
    words = ["--reward_funcs", "HPScorerReward", "IdentityReward: {model: null}", "--reward_weights", "1", "0.5"]
    main([command, *MODEL, *CPU, *judge, *words])
    assert [[type(func) for func in run["reward_funcs"]] for run in runs] == [
        [Gate, IdentityReward],
        [HPScorerReward, IdentityReward],
    ]
    assert [run["args"].reward_weights for run in runs] == [[1.0, 0.0], [1.0, 0.5]]
    with pytest.raises(SystemExit, match="there is no reward 'Nothing'"):
        main([command, *MODEL, *CPU, "--reward_funcs", "Nothing"])
    assert len(runs) == 2
