"""A judge, or a reward function, that fails in the middle of a run."""

import asyncio
import math
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

from hp_edit_trl import FlowGRPOEditTrainer, HPScorerReward
from hp_edit_trl.judges import Judgement, JudgeRefusedError
from hp_edit_trl.miniature.tiny import tiny_pipeline
from tests.helpers import RuleJudge, make_cases, make_config, redness
from tests.processes import Script


@pytest.fixture
def make_trainer(tmp_path):
    def make(reward_funcs, eval_dataset=None, **kwargs):
        return FlowGRPOEditTrainer(
            model=tiny_pipeline(),
            reward_funcs=reward_funcs,
            args=make_config(tmp_path / "out", **{"max_steps": 6, **kwargs}),
            train_dataset=make_cases(),
            eval_dataset=eval_dataset,
            peft_config=LoraConfig(r=4, lora_alpha=8),
        )

    return make


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


class Server(RuleJudge):
    """A judge whose answers go by the redness of the edit until it is gone, from some call on."""

    def __init__(self, gone_from=math.inf, kind="http 500"):
        super().__init__()
        self.calls, self.gone_from, self.kind, self.loaded_with = 0, gone_from, kind, None

    def load(self, num_images=2):
        self.loaded_with = num_images

    def __call__(self, conversations):
        self.calls += 1
        if self.calls <= self.gone_from:
            pictures = [chat[1]["content"][-1]["image"] for chat in conversations]
            return [Judgement(5 * (0.5 + score / 2), "x") for score in redness(pictures)]
        if self.kind == "refused":
            raise JudgeRefusedError("The judge 'm' at http://x cannot be used: the server answered 401.")
        lost = dict(requests=5, retries=4, seconds_lost=2.0)
        return [Judgement(None, f"{self.kind}: no", answered=False, failure=self.kind, **lost) for _ in conversations]


def test_a_judge_that_is_gone_stops_the_run_with_a_checkpoint_that_resumes_exactly(make_trainer, tmp_path):
    whole = make_trainer(HPScorerReward(Server()), max_steps=3)
    whole.train()

    trainer = make_trainer(HPScorerReward(Server(gone_from=2)), max_failed_batches=1)
    message = (
        "Too many rewards of the generation batches are missing: 1 in a row .*8 http 500 .http 500: no.*resume from "
        "the last checkpoint"
    )
    with pytest.raises(ConnectionError, match=message):
        trainer.train()
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-2" and trainer.state.global_step == 2
    # The batch without rewards is sampled again: nothing is lost.
    resumed = make_trainer(HPScorerReward(Server()), max_steps=3)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert equal(weights(whole), weights(resumed))


def test_updates_without_rewards_leave_the_weights_and_are_logged(make_trainer):
    trainer = make_trainer(HPScorerReward(Server(gone_from=2)), max_failed_batches=3, logging_steps=1)
    states = []
    accumulate = trainer._accumulate_gradients
    trainer._accumulate_gradients = lambda *args: (states.append(weights(trainer)), accumulate(*args))[1]
    with pytest.raises(ConnectionError, match="are missing: 3 in a row"):
        trainer.train()
    assert trainer.state.global_step == 4  # two without rewards, and a third batch that was not trained on
    assert equal(states[-1], weights(trainer)) and equal(states[-4], states[-1]) and not equal(states[0], states[-1])
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[0]["judge/failures"] == 0
    lost = {"requests": 40, "retries": 32, "seconds_lost": 16.0, "failures": 8, "failures/http_500": 8}
    assert {name: logs[2][f"judge/{name}"] for name in lost} == lost and logs[2]["frac_reward_missing"] == 1


@pytest.mark.parametrize("kind", ["refused", "http 500"])
def test_inside_an_update_the_run_stops_when_it_is_finished(make_trainer, tmp_path, kind):
    # Generation batches of one microbatch, four of them in an update
    options = dict(steps_per_generation=1, gradient_accumulation_steps=4, max_failed_batches=1)
    trainer = make_trainer(HPScorerReward(Server(gone_from=5, kind=kind)), **options)
    with pytest.raises(ConnectionError, match="401" if kind == "refused" else "1 in a row"):
        trainer.train()
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-2" and trainer.state.global_step == 2
    resumed = make_trainer(HPScorerReward(Server()), **options | {"max_steps": 3})
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 3 and not equal(weights(trainer), weights(resumed))


def test_a_refused_key_stops_at_once(make_trainer, tmp_path):
    trainer = make_trainer(HPScorerReward(Server(gone_from=1, kind="refused")))
    with pytest.raises(ConnectionError, match="the server answered 401.*resume from the last checkpoint"):
        trainer.train()
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    # In an evaluation too
    other = make_trainer(HPScorerReward(Server(gone_from=2, kind="refused")), make_cases(2), eval_strategy="steps",
                         eval_steps=2)  # fmt: skip
    with pytest.raises(ConnectionError, match="the server answered 401"):
        other.train()
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_a_dead_judge_is_not_made_up_for_by_another_function(make_trainer):
    trainer = make_trainer([HPScorerReward(Server(gone_from=1)), redness], max_failed_batches=2)
    with pytest.raises(ConnectionError, match="2 in a row"):
        trainer.train()
    # A function that does not apply is no failure.
    trainer = make_trainer(
        [redness, lambda completions, **columns: [None] * len(completions)], max_failed_batches=1, max_steps=2
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_more_missing_rewards_than_the_option_allows(make_trainer):
    def flaky(completions, trainer_state, **columns):
        missing = 4 if trainer_state.global_step else 0
        return [None if i < missing else reward for i, reward in enumerate(redness(completions))]

    trainer = make_trainer(flaky, max_missing_rewards=0.4, max_steps=20)
    with pytest.raises(RuntimeError, match="are missing: 44% of the last 8 .*returned None: .*raise these two"):
        trainer.train()
    for option in ({"max_failed_batches": 0}, {"max_missing_rewards": 1.1}, {"max_missing_rewards": -0.1}):
        with pytest.raises(ValueError, match="max_failed_batches=.* must be at least 1, and max_missing_rewards="):
            make_trainer(flaky, **option)


def test_a_reward_function_that_raises(make_trainer, caplog):
    def broken(completions, trainer_state, **columns):
        if trainer_state.global_step == broken.at:
            raise KeyError("target")
        return redness(completions)

    broken.at = 0
    with pytest.raises(RuntimeError, match="'broken' failed for the cases case-.*KeyError: 'target'") as caught:
        make_trainer(broken).train()
    assert isinstance(caught.value.__cause__, KeyError)
    broken.at = 2
    trainer = make_trainer(broken, logging_steps=1, max_steps=4)
    trainer.train()
    assert "The reward function 'broken' failed for the cases case-" in caplog.text
    log = [log for log in trainer.state.log_history if "loss" in log][2]
    assert log["frac_reward_missing"] == 1 and log["judge/failures/broken:_KeyError"] == 8

    async def later(completions, trainer_state, **columns):
        if trainer_state.global_step >= 1:
            sys.exit("gone")
        return redness(completions)

    with pytest.raises(RuntimeError, match="2 in a row.*16 later: RuntimeError .RuntimeError: SystemExit: gone"):
        make_trainer(later, max_failed_batches=2).train()

    async def wrong(completions, trainer_state, **columns):
        return redness(completions) if trainer_state.global_step < 1 else {}["target"]

    with pytest.raises(
        RuntimeError, match=r"16 wrong: KeyError .KeyError: 'target' \(test_rewards_gone.py, line \d+\)"
    ):
        make_trainer(wrong, max_failed_batches=2).train()


def test_an_event_loop_that_has_ended_is_not_waited_for(make_trainer):
    with asyncio.Runner() as runner, pytest.raises(RuntimeError, match="has ended the event loop"):

        async def reward(**columns):
            pass

        FlowGRPOEditTrainer._answer(SimpleNamespace(async_loop=runner.get_loop(), reward_funcs=[reward]), 0, Future())


def test_the_trial_has_the_pictures_of_the_largest_case(make_trainer):
    judge = Server()
    make_trainer(HPScorerReward(judge))
    assert judge.loaded_with is None or judge.loaded_with == 2
    cases = make_cases(2)
    several = cases.map(lambda row: {"images": [row["image"]] * 2}, remove_columns="image")
    make_trainer(HPScorerReward(judge), several)
    assert judge.loaded_with == 3


SCRIPT = """
import sys
import torch
from peft import LoraConfig
from hp_edit_trl import FlowGRPOEditTrainer
from hp_edit_trl.judges import JudgeRefusedError
from hp_edit_trl.miniature.tiny import tiny_pipeline
from tests.helpers import make_cases, make_config, redness

def say(text):  # as one piece, although both processes write to one file
    sys.stdout.flush()
    print(f"\\n{text}", flush=True)

def reward(completions, trainer_state, **columns):
    if trainer.accelerator.process_index == 1 and ("evaluation" in sys.argv) == (len(completions) == 1):
        if trainer_state.global_step == 1:
            sys.exit(0)
        if trainer_state.global_step == 2:
            raise JudgeRefusedError("the server answered 401")
    return redness(completions)

trainer = FlowGRPOEditTrainer(
    model=tiny_pipeline(), reward_funcs=reward, train_dataset=make_cases(), eval_dataset=make_cases(2),
    args=make_config(sys.argv[1], max_steps=6, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=1,
                     gradient_accumulation_steps=1, logging_steps=1),
    peft_config=LoraConfig(r=4, lora_alpha=8),
)
try:
    trainer.train()
except ConnectionError as error:
    missing = [log["frac_reward_missing"] for log in trainer.state.log_history if "loss" in log]
    say(f"rank {trainer.accelerator.process_index} stopped at {trainer.state.global_step} {missing}: {error}")

def velocity(*args):
    if trainer.accelerator.process_index == 1:
        raise torch.OutOfMemoryError("not enough memory")
    return policy_velocity(*args)

policy_velocity, trainer.policy.velocity = trainer.policy.velocity, velocity
try:
    trainer.train()
except (ValueError, torch.OutOfMemoryError) as error:
    say(f"rollout of {trainer.accelerator.process_index}: {error}")
"""


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_what_fails_in_one_process_stops_all(tmp_path, where):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {"ACCELERATE_USE_CPU": "true"}
    done = Script(script, tmp_path / "out", where, environment=environment, processes=2).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    # In training, rank 1 lost its half of the second batch before its judge was refused.
    missing = "[0.0, 0.5]" if where == "training" else "[0.0, 0.0]"
    for rank in (0, 1):
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"rank {rank} "))
        assert f"stopped at 2 {missing}: " in line and "the server answered 401" in line
    assert "rollout of 1: not enough memory" in done.stdout
    assert "rollout of 0: Process 1 failed: OutOfMemoryError: not enough memory" in done.stdout
    assert (tmp_path / "out" / "checkpoint-2" / "manifest.json").exists()


def test_an_interrupted_training_says_how_it_is_resumed(make_trainer, tmp_path):
    def interrupted(completions, trainer_state, **columns):
        if trainer_state.global_step == 2:
            raise KeyboardInterrupt
        return redness(completions)

    with pytest.raises(KeyboardInterrupt) as caught:
        make_trainer(interrupted).train()
    (note,) = caught.value.__notes__
    assert "Stopped after update 2." in note and "train(resume_from_checkpoint=True)` goes on from" in note
