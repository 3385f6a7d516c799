"""Faults in the middle of a run: missing and broken rewards, losses and gradients that are not finite."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from hp_edit_trl import DPOEditConfig, DPOEditTrainer, FlowGRPOEditTrainer
from hp_edit_trl.miniature.tiny import tiny_pipeline
from tests.helpers import make_cases, make_config, photo, redness


LORA = LoraConfig(r=4, lora_alpha=8)


@pytest.fixture
def make_trainer(tmp_path):
    def make(reward_funcs=redness, eval_dataset=None, **kwargs):
        return FlowGRPOEditTrainer(
            model=tiny_pipeline(),
            reward_funcs=reward_funcs,
            args=make_config(tmp_path / "out", **kwargs),
            train_dataset=make_cases(),
            eval_dataset=eval_dataset,
            peft_config=copy.deepcopy(LORA),
        )

    return make


@pytest.fixture
def make_dpo_trainer(tmp_path):
    cases = make_cases(4, sizes=((64, 64),)).to_list()
    pairs = [
        case | {"chosen": photo(64, 64, 10 + i), "rejected": photo(64, 64, 20 + i)} for i, case in enumerate(cases)
    ]
    options = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True)

    def make(**kwargs):
        args = DPOEditConfig(
            str(tmp_path / "dpo"), resolution=64, num_inference_steps=2, per_device_train_batch_size=2,
            gradient_accumulation_steps=1, learning_rate=1e-3, logging_steps=1, **options, **kwargs,
        )  # fmt: skip
        return DPOEditTrainer(tiny_pipeline(), args, Dataset.from_list(pairs), peft_config=copy.deepcopy(LORA))

    return make


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


NAN = math.nan


def test_a_sample_without_one_of_its_rewards_is_left_out_of_its_group(make_trainer):
    trainer = make_trainer([redness, lambda completions, **columns: [1.0] * len(completions)])
    trainer.num_generations = 4
    group = torch.tensor([[0.993, 0.50], [0.993, 0.51], [NAN, 0.52], [0.993, 0.51]])
    rewards, advantages, flat = trainer._compute_advantages(group)
    assert math.isnan(rewards[2]) and advantages[2] == 0 and flat.tolist() == [False, False, True, False]
    # The others are compared among themselves: 1.493, 1.503, 1.503.
    others = group[[0, 1, 3]].sum(1)
    expected = (others - others.mean()) / (others.std() + 1e-4)
    assert torch.allclose(advantages[[0, 1, 3]], expected, atol=1e-4) and advantages.abs().max() < 1.3

    # A function without a reward in the whole group does not apply there; in the other group it does.
    several = torch.tensor(
        [[1.0, NAN], [2.0, NAN], [3.0, NAN], [4.0, NAN], [1.0, 1.0], [1.0, NAN], [1.0, 2.0], [NAN, NAN]]
    )
    rewards, advantages, flat = trainer._compute_advantages(several)
    assert rewards[:4].tolist() == [1, 2, 3, 4] and rewards[[4, 6]].tolist() == [2, 3]
    assert rewards[[5, 7]].isnan().all() and flat.tolist() == [False] * 5 + [True, False, True]
    assert advantages[:4].abs().min() > 0.3 and advantages[[5, 7]].tolist() == [0, 0]

    # A function with a weight of 0 only measures: what it lacks, or fails at, decides nothing.
    trainer.reward_weights = torch.tensor([0.0, 1.0])
    rewards, advantages, flat = trainer._compute_advantages(group, failed=group.isnan())
    assert rewards.tolist() == pytest.approx([0.50, 0.51, 0.52, 0.51]) and not flat.any()
    for useless in ([0.0, 0.0], [1.0, NAN]):
        with pytest.raises(ValueError, match="reward_weights=.* must be finite, and at least one of them not 0"):
            make_trainer([redness, redness], reward_weights=useless)


def test_a_missing_reward_does_not_move_an_evaluation(make_trainer):
    def answers(completions, id, log_extra, log_metric, **columns):
        for name in ("rewards", "task", "reward"):  # these are the trainer's own
            log_extra(name, np.full(len(id), 7.0))
        log_metric("of_numpy", np.float32(0.5))
        return [None if case == "case-1" else 1.0 for case in id]

    def bonus(completions, task, **columns):
        return [1.0 if name == "add" else None for name in task]  # applies to one task only

    cases = make_cases(3)
    trainer = make_trainer([answers, bonus], cases, reward_weights=[1.0, 0.5])
    metrics = trainer.evaluate()
    # case-0 (add): 1 + 0.5; case-1 (remove): no answer; case-2 (swap): 1, where the bonus does not apply
    assert metrics["eval_reward"] == pytest.approx((1.5 + 1.0) / 2)
    assert metrics["eval_reward/add"] == 1.5 and metrics["eval_reward/swap"] == 1.0
    assert "eval_reward/remove" not in metrics
    assert metrics["eval_frac_reward_missing"] == pytest.approx(1 / 3)
    assert metrics["eval_rewards/answers/mean"] == 1.0 and metrics["eval_rewards/bonus/mean"] == 1.0
    assert metrics["eval_of_numpy"] == 0.5 and json.dumps(metrics)  # as in the trainer's state
    with pytest.raises(TypeError, match="log_extra.'x', ...* takes a list"):
        trainer._log_extra("x", 0.5, [0])


def test_infinite_rewards_stop_the_run_or_are_missing(make_trainer):
    def broken(completions, **columns):
        return [math.inf if i == 1 else float(i) for i in range(len(completions))]

    with pytest.raises(ValueError, match="'broken' returned inf for case 'case-.'.*on_bad_reward='missing'"):
        make_trainer(broken).train()
    trainer = make_trainer(broken, on_bad_reward="missing", max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["frac_reward_missing"] == pytest.approx(1 / 8) and math.isfinite(log["loss"])
    assert all(weight.isfinite().all() for weight in weights(trainer).values())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_skipped_and_named(make_trainer, monkeypatch, caplog, where):
    trainer = make_trainer(max_steps=3, logging_steps=1)
    seen = []
    accumulate = trainer._accumulate_gradients

    def spoil(model, *samples):
        loss = accumulate(model, *samples)
        seen.append(weights(trainer))
        if trainer.state.global_step == 1 and len(seen) % 2:  # one microbatch of the second update
            if where == "loss":
                return loss * math.nan
            next(p for p in trainer.model.parameters() if p.requires_grad).grad.view(-1)[0] = math.nan
        return loss

    monkeypatch.setattr(trainer, "_accumulate_gradients", spoil)
    trainer.train()
    # Two microbatches per update: the second update did not move the weights, and the others did.
    assert not equal(seen[0], seen[2]) and equal(seen[2], seen[4]) and not equal(seen[4], weights(trainer))
    assert "Update 2 was skipped" in caplog.text and "case-" in caplog.text
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log.get("skipped_updates") for log in logs] == [None, 1, 1]
    if where == "loss":  # it is seen in the log
        assert math.isnan(logs[1]["loss"])


def test_a_run_whose_updates_stay_broken_stops_with_its_last_good_checkpoint(make_trainer, monkeypatch, tmp_path):
    trainer = make_trainer(
        max_steps=10, save_strategy="steps", save_steps=1, save_total_limit=1, max_skipped_updates=2
    )
    accumulate = trainer._accumulate_gradients

    def spoil(model, *samples):
        loss = accumulate(model, *samples)
        return loss * math.nan if trainer.state.global_step >= 2 else loss

    monkeypatch.setattr(trainer, "_accumulate_gradients", spoil)
    with pytest.raises(RuntimeError, match="3 updates in a row were not finite.*Lower learning_rate.*last checkpoint"):
        trainer.train()
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    resumed = make_trainer(max_steps=int(checkpoint.name.split("-")[1]) + 1)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert all(weight.isfinite().all() for weight in weights(resumed).values())


def test_nothing_that_is_not_finite_is_saved(make_trainer, tmp_path):
    trainer = make_trainer()
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).view(-1)[0] = math.inf
    with pytest.raises(ValueError, match="lora_A.* has values that are not finite at step 0: the LoRA is not saved"):
        trainer.save_model(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").glob("*.safetensors"))


def test_an_update_without_advantages_does_not_move_the_weights(make_trainer):
    def once(completions, trainer_state, **columns):
        if trainer_state.global_step == 0:
            return redness(completions)
        return [None] * len(completions)

    trainer = make_trainer(once, max_steps=3)
    states = []
    trainer.add_callback(_Remember(lambda: states.append(weights(trainer))))
    trainer.train()
    # Adam's momentum alone would go on.
    assert equal(states[0], states[1]) and equal(states[1], states[2])
    assert trainer.state.log_history[1]["frac_reward_missing"] == 1.0


class _Remember(TrainerCallback):
    def __init__(self, remember):
        self.remember = remember

    def on_step_end(self, *args, **kwargs):
        self.remember()


def test_an_evaluation_without_scores_is_not_the_best(make_trainer, caplog):
    def sometimes(completions, trainer_state, **columns):
        return [None] * len(completions) if trainer_state.global_step == 2 else redness(completions)

    trainer = make_trainer(
        sometimes, make_cases(2), max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, lr_scheduler_type="reduce_lr_on_plateau",
        load_best_model_at_end=True, metric_for_best_model="reward", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    for use in ("best model", "scheduler"):
        assert f"Step 2 is not a candidate for the {use}: its evaluation has no eval_reward. It has: " in caplog.text
    assert trainer.lr_scheduler.last_epoch == 2  # evaluations that it has seen
    assert trainer.state.best_global_step in (1, 3)


def test_the_best_model_needs_a_metric(tmp_path):
    options = dict(
        load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1
    )
    with pytest.raises(ValueError, match="need metric_for_best_model: an evaluation has no loss"):
        make_config(tmp_path, **options)
    for metric in ("", "eval_", "loss"):
        with pytest.raises(ValueError, match="need metric_for_best_model"):
            make_config(tmp_path, **options, metric_for_best_model=metric)
    with pytest.raises(ValueError, match="need metric_for_best_model"):
        make_config(tmp_path, eval_strategy="steps", eval_steps=1, lr_scheduler_type="reduce_lr_on_plateau")
    with pytest.raises(ValueError, match="on_bad_reward='ignore' is not known"):
        make_config(tmp_path, on_bad_reward="ignore")
    with pytest.raises(ValueError, match="max_skipped_updates=-1 must not be negative"):
        make_config(tmp_path, max_skipped_updates=-1)


def test_dpo_skips_updates_that_are_not_finite_and_resumes_exactly(make_dpo_trainer, caplog, tmp_path):
    def make():
        trainer = make_dpo_trainer(save_strategy="steps", save_steps=1, lr_scheduler_type="linear", max_steps=4)
        losses = trainer._losses

        def spoil(model, pairs, generators):
            values, metrics = losses(model, pairs, generators)
            return (values * math.nan if trainer.state.global_step in (1, 2) else values), metrics

        trainer._losses = spoil
        return trainer

    trainer, states = make(), []
    trainer.add_callback(_Remember(lambda: states.append(weights(trainer))))
    trainer.train()
    assert equal(states[0], states[1]) and equal(states[0], states[2]) and not equal(states[2], states[3])
    assert "Update 2 was skipped" in caplog.text and "case-" in caplog.text
    # The schedule goes on with the steps, and a resumed run knows of the skipped ones.
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "dpo" / "checkpoint-2"))
    assert equal(weights(trainer), weights(resumed))
    for run in (trainer, resumed):
        logs = [log for log in run.state.log_history if "loss" in log]
        assert [log["learning_rate"] for log in logs] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
        assert [log.get("skipped_updates") for log in logs] == [None, 1, 2, 2]


def test_a_reward_function_that_changes_what_it_is_given_changes_it_for_nobody_else(make_trainer):
    seen = []

    def paints(prompts, completions, image, **columns):
        for picture in [*completions, *image]:
            picture.paste("red", (0, 0, *picture.size))
        for names in columns["tags"]:
            names.clear()
        return [0.0] * len(prompts)

    async def looks(prompts, completions, image, **columns):
        seen.append(([picture.tobytes() for picture in [*completions, *image]], columns["tags"]))
        return [0.0] * len(prompts)

    trainer = make_trainer([paints, looks, looks])
    row = make_cases(1)[0] | {"tags": ["kept"]}
    edits = [photo(32, 32, seed) for seed in range(2)]
    before = [image.tobytes() for image in [*edits, row["image"], row["image"]]]
    for _ in range(2):
        trainer._calculate_rewards([row, row], edits)
    assert seen == [(before, [["kept"], ["kept"]])] * 4
