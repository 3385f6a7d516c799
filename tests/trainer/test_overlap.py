"""Reward functions that wait for others are called while the next edits are sampled."""

import threading

import pytest
import torch
from peft import LoraConfig

from hp_edit_trl import FlowGRPOEditTrainer, HPScorerReward
from hp_edit_trl.judges import CachedJudge, ServerJudge
from hp_edit_trl.miniature.tiny import tiny_pipeline
from tests.helpers import make_cases, make_config, redness
from tests.judges.faults import FaultyServer, completion, http


def make_trainer(folder, reward_funcs, **kwargs):
    # Two groups of four edits, sampled and decoded one after the other
    args = make_config(folder, **{"rollout_batch_size": 4, "true_cfg_scale": 1.0, "max_steps": 1, **kwargs})
    lora = LoraConfig(r=4, lora_alpha=8)
    return FlowGRPOEditTrainer(tiny_pipeline(), reward_funcs, args, make_cases(4), peft_config=lora)


def test_judges_work_while_the_next_edits_are_sampled(tmp_path):
    called = threading.Event()
    calls = []

    async def reward(completions, id, log_extra, **kwargs):
        called.set()
        calls.append(id)
        log_extra("case", id)
        return redness(completions)

    with FaultyServer(http(200, completion("4"))) as server:
        scorer = HPScorerReward(CachedJudge(ServerJudge("m", server.url), tmp_path / "cache.sqlite"))
        assert scorer.is_remote
        trainer = make_trainer(tmp_path, [reward, scorer], log_completions=True)
        trials = len(server.requests)
        decode, overlapped = trainer.policy.decode, []

        def decode_and_look(latents, conditions):
            if overlapped:  # the second batch: the rewards of the first must have begun
                overlapped.append(called.wait(60))
                while len(server.requests) == trials:
                    assert called.wait(60)
            overlapped.append(called.is_set())
            return decode(latents, conditions)

        trainer.policy.decode = decode_and_look
        trainer.train()
        assert overlapped[:2] == [False, True]
        assert len(server.requests) >= trials + 8  # more if a connection was lost
    assert [len(ids) for ids in calls] == [4, 4] and len({*calls[0]}) == len({*calls[1]}) == 1
    log = trainer.state.log_history[0]
    assert log["hp_score"] == 4 and log["frac_reward_missing"] == 0
    assert log["judge/requests"] - log["judge/retries"] == 8


def test_it_changes_no_result(tmp_path, capsys):
    weights, shown, metrics = [], [], []
    for name in ("together", "by case"):

        def reward(completions, id, log_extra, log_metric, **kwargs):
            log_extra("shown", id)
            log_metric("redness", sum(redness(completions)) / len(completions))
            return redness(completions)

        async def waiting(reward=reward, **kwargs):
            return reward(**kwargs)

        trainer = make_trainer(tmp_path / name, reward if name == "together" else waiting)
        _, rows = trainer._generate_and_score([0] * 4 + [2] * 4, 0), trainer._completions
        trainer = make_trainer(tmp_path / name, reward if name == "together" else waiting, log_completions=True)
        trainer.train()
        shown.append([(row["id"], row["shown"]) for row in rows])
        weights.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
        metrics.append(trainer.state.log_history[0]["redness"])
    assert shown[0] == shown[1]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-12)  # a mean, and the mean of the means of the calls
    assert all(one.equal(other) for one, other in zip(*weights, strict=True))


def test_a_call_that_fails_costs_its_own_samples(tmp_path):
    batches = []

    async def reward(completions, id, **kwargs):
        batches.append(id[0])
        if len(batches) == 4:  # in the first generation batch it would be an error of the program
            raise ValueError("not this one")
        return redness(completions)

    trainer = make_trainer(tmp_path, reward, max_steps=2)
    trainer.train()
    first, second = (log for log in trainer.state.log_history if "reward" in log)
    assert (first["frac_reward_missing"], second["frac_reward_missing"]) == (0, 0.5)
    missing = {sample.case_id for sample in trainer._buffered_samples if not trainer._learns(sample)}
    assert missing == {batches[3]}
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters() if p.requires_grad)
