import csv
import json
import runpy
from dataclasses import fields
from pathlib import Path

import compare
import experiments
import pytest
import yaml
from experiments import Arm, run_experiment, summarize
from PIL import Image

from hp_edit_trl import FlowGRPOEditConfig


GATE = {"Gate": {"reward": "RuleScorer", "test": {"IdentityReward": {"model": None}}, "threshold": 0.5}}
NFT = {"num_train_sigmas": 1, "beta": 0.0, "reward_weights": [1.0, 0.1]}
CONFIG = Path(__file__).parents[3] / "examples" / "miniature" / "experiment.yaml"


@pytest.fixture
def config(tmp_path):
    values = yaml.safe_load(CONFIG.read_text()) | {
        "num_generations": 4, "per_device_train_batch_size": 4, "steps_per_generation": 1, "max_steps": 1,
        "eval_steps": 1, "logging_steps": 1, "num_inference_steps": 3, "sde_window_size": 1,
        "sde_window_range": [0, 1],
    }  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.slow
def test_an_experiment_writes_its_results_and_resumes(config, tmp_path):
    arms = [
        Arm("plain"),
        Arm("filtered, coarse", {"lora_r": 4, "lora_alpha": 8}, task_aware=False, filtered=True),
        Arm("pairs", {"beta": 500.0}, method="dpo", rewards=(GATE,), min_gap=0.05),
        Arm("base", method="none"),
        Arm("nft", NFT, method="nft", rewards=("RuleScorer", {"IdentityReward": {"model": None}})),
    ]
    where = {
        "output_dir": tmp_path / "results", "runs_dir": tmp_path / "runs", "num_cases": 16, "num_test_cases": 16,
        "num_validation_cases": 8,
    }  # fmt: skip
    runs = run_experiment("trial", arms, [3], config, **where)
    assert [(run["arm"], run["seed"]) for run in runs] == [(arm.name, 3) for arm in arms]
    assert runs[0]["train_cases"] == 16 and 0 < runs[1]["train_cases"] < 16
    assert all(0 < run["score"] < 5 for run in runs) and [len(run["curve"]) for run in runs] == [2, 2, 2, 1, 2]
    assert runs[3]["score"] == runs[3]["before"] == runs[0]["before"] != runs[2]["score"]
    # DPO has mined its pairs when it starts: 16 cases * 5 edits * 3 steps.
    start, end = (point["thousand_passes"] for point in runs[2]["curve"])
    assert start == 0.24 and end == pytest.approx(start + runs[2]["training_passes"] / 1000)
    assert runs[2]["training_passes"] % 4 == 0 < runs[2]["training_passes"]  # two edits, by policy and reference
    assert runs[2]["curve"][0]["cpu_seconds"] > 0
    # NFT samples 4 edits in 3 steps, and trains those with an advantage: a pass of the policy and one of the old one.
    assert (runs[4]["sampling_passes"], runs[4]["training_passes"] % 2) == (12, 0) and runs[4]["training_passes"] <= 8
    record = json.loads((tmp_path / "results" / "trial.json").read_text())
    assert record["runs"] == runs and record["config"]["max_steps"] == 1
    assert all(run["commit"] and {"versions", "machine"} <= set(run["environment"]) for run in record["runs"])
    assert all(len(run["scores"]) == 16 for run in runs) and all(run["cpu_seconds"] > 0 for run in runs[:3])
    with (tmp_path / "results" / "trial_curves.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 9
    with (tmp_path / "results" / "trial.csv").open() as file:
        assert [row["arm"] for row in csv.DictReader(file)] == [run["arm"] for run in runs]
    assert "| filtered, coarse | 1 |" in (tmp_path / "results" / "trial.md").read_text()
    assert min(Image.open(tmp_path / "results" / "trial.png").size) > 300

    # What is there is not done again, unless what it was made with has changed.
    done = {path: path.stat().st_mtime for path in (tmp_path / "runs").rglob("result.json")}
    where["processes"] = 1  # one start instead of two
    run_experiment("trial", arms, [3], config, **where)
    assert {path: path.stat().st_mtime for path in done} == done
    other = [arms[0], Arm(arms[1].name, {"lora_r": 8, "lora_alpha": 8}, task_aware=False, filtered=True), *arms[2:]]
    run_experiment("trial", other, [3], config, **where)
    changed = [path.parent.name for path in done if path.stat().st_mtime != done[path]]
    assert changed == ["filtered,_coarse-3"]


def test_a_summary_pairs_arms_and_compares_equal_budgets():
    def run(arm, seed, gain, scores, passes):
        curve = [
            {"step": 10 * i, "thousand_passes": passes * i, "cpu_seconds": 5.0 * i, "score": 4.0 + i} for i in range(3)
        ]
        values = {"before": 4.0, "score": 4.0 + gain, "difference": gain, "share_of_5": 0.5, "clip_fraction": 0.1}
        values |= dict.fromkeys([*experiments.TASKS, "cpu_seconds", "wall_seconds"], 1.0)
        return {"arm": arm, "seed": seed, "scores": scores, "curve": curve, **values}

    runs = [
        run("a", 0, 0.1, [1.0, 2.0, 3.0], 2.0),
        run("a", 1, 0.3, [3.0, 2.0, 3.0], 2.0),
        run("b", 0, 0.2, [3.0, 4.0, 4.0], 1.0),
    ]
    a, b = summarize(runs)
    assert (a["seeds"], a["score"], a["difference_se"], a["against_first"]) == (2, 4.2, 0.1, 0.0)
    assert b["seeds"] == 1 and "score_se" not in b
    # Per case: 3, 4, 4 against the means over seeds 2, 2, 3.
    assert b["against_first"] == pytest.approx(4 / 3, abs=1e-4)
    assert b["against_first_se"] == pytest.approx(1 / 3, abs=1e-4)
    # b ends after 2 thousand passes, where a has made one of its two steps.
    assert (a["at_thousand_passes"], b["at_thousand_passes"], a["at_cpu_seconds"]) == (5.0, 6.0, 6.0)
    assert "+1.333 ± 0.333" in experiments.summary_table([a, b])


def test_passes_of_grpo_are_counted(config, tmp_path):
    # One generation batch of 8 edits, trained on twice in microbatches of 4: 8 * 3 passes to sample, and one each time
    # to train, if an edit has an advantage.
    options = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 4, "save_strategy": "no"}
    data = experiments.load_dataset("train", 8)
    trainer = experiments.make_trainer(config, options, tmp_path / "run", 0, experiments.RuleScorer(), data)
    progress = experiments.Progress(trainer, data.select(range(4)), 4)
    trainer.add_callback(progress)
    trainer.train()
    learning = sum(map(trainer._learns, trainer._buffered_samples))
    assert progress.counted == {"sampling": 8 * 3, "training": 2 * learning} and learning > 0
    start, end = progress.curve
    assert (start["thousand_passes"], end["step"]) == (0, 4)
    assert end["thousand_passes"] * 1000 == sum(progress.counted.values())
    assert 0 < end["cpu_seconds"] == round(progress.seconds, 1)


def test_passes_of_dpo_are_counted(config, tmp_path):
    cases = experiments.load_dataset("train", 8)
    pairs = cases.map(lambda case: {"chosen": case["target"], "rejected": case["image"]})
    options = {"max_steps": 3, "save_strategy": "no"}
    trainer = experiments.make_trainer(config, options, tmp_path / "run", 0, None, pairs, "dpo")
    assert (trainer.args.resolution, trainer.args.per_device_train_batch_size) == (32, 4)
    progress = experiments.Progress(trainer, cases, 4)
    trainer.train()
    # Chosen and rejected edit, by policy and reference model
    assert progress.counted == {"sampling": 0, "training": 3 * 4 * 4}


def test_arms_of_a_file(tmp_path, monkeypatch, capsys):
    arms = experiments.read_arms(CONFIG.with_name("learners_and_rewards.yaml"), CONFIG)
    assert [arm.method for arm in arms] == ["none", "grpo", "grpo", "nft", "dpo", "dpo"]
    assert [type(experiments.arm_rewards(arm)[0]).__name__ for arm in arms[1:3]] == ["RuleScorer", "Gate"]

    def read(*listed):
        (tmp_path / "arms.yaml").write_text(yaml.safe_dump(list(listed)))
        return experiments.read_arms(tmp_path / "arms.yaml", CONFIG)

    assert read({"name": "a", "method": "nft", "options": NFT, "rewards": ["RuleScorer", "CoarseScorer"]})
    for arm, message in (
        ({"name": "a", "method": "ppo"}, "the arm 'a' has method='ppo': use grpo, nft, dpo or none"),
        ({"name": "a", "steps": 3}, "the arm 'a' has no field steps; it has name, options, "),
        ({"name": "a", "options": {"num_train_sigmas": 1}}, "'a': FlowGRPOEditConfig has no option num_train_sigmas"),
        ({"name": "a", "method": "dpo", "options": {"noise_level": 1}}, "DPOEditConfig has no option noise_level"),
        ({"name": "a", "options": {"noise_level": "high"}}, "'a': FlowGRPOEditConfig does not take these options"),
        ({"name": "a", "options": [1]}, "its options must be a mapping"),
        ({"name": "a", "rewards": ["Rule"]}, "'a': reward_funcs: there is no reward 'Rule': use .*RuleScorer"),
        ({"name": "a", "rewards": []}, "'a': reward_funcs is empty"),
        ({"name": "a", "rewards": [{"RuleScorer": {"gamma": 1}}]}, "there is no reward|has no option gamma"),
        ({"name": "a", "method": "dpo", "rewards": ["RuleScorer", "CoarseScorer"]}, "mines its pairs by one reward"),
        ({"name": "a", "options": {"reward_weights": [1.0, 2.0]}}, "reward_weights has 2 entries for 1 rewards"),
        ({"method": "grpo"}, "each arm needs a name"),
        (3, "each arm needs a name, but one is 3"),
    ):
        with pytest.raises(ValueError, match=message):
            read({"name": "first"}, arm)
    with pytest.raises(ValueError, match="the arm 'a/b' is there twice"):
        read({"name": "a-b"}, {"name": "a/b"})
    (tmp_path / "arms.yaml").write_text("a: [")
    for text in ("a: [", "{}", "[]"):
        (tmp_path / "arms.yaml").write_text(text)
        with pytest.raises(ValueError, match="cannot be read|must hold a list of arms"):
            experiments.read_arms(tmp_path / "arms.yaml", CONFIG)
    started = []
    monkeypatch.setattr(compare, "run_experiment", lambda *arguments: started.append(arguments))
    with pytest.raises(SystemExit, match="compare.py: .*must hold a list of arms"):
        compare.main(["--arms", str(tmp_path / "arms.yaml")])
    compare.main(["--arms", str(CONFIG.with_name("learners_and_rewards.yaml")), "--seeds", "0"])
    assert [arguments[0] for arguments in started] == ["learners_and_rewards"] and started[0][1] == arms


@pytest.mark.parametrize(
    "script",
    ["compare_dpo_grpo.py", "fewer_passes.py", "filtering_and_scorer.py", "learning_speed.py", "lora_rank.py"],
)
def test_every_experiment_has_arms_that_can_be_trained(script, tmp_path):
    folder = Path(experiments.__file__).parent
    arms = runpy.run_path(str(folder / script))["ARMS"]
    assert len({arm.name for arm in arms}) == len(arms) > 2
    for arm in arms:
        if arm.method == "grpo":
            config = yaml.safe_load((folder / "experiment.yaml").read_text()) | arm.options
            names = {field.name for field in fields(FlowGRPOEditConfig)}
            options = {name: value for name, value in config.items() if name in names}
            FlowGRPOEditConfig(**options | {"output_dir": str(tmp_path), "report_to": "none"})
            assert set(arm.options) <= names | {"lora_r", "lora_alpha"}
