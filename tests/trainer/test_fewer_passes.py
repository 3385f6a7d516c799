"""What saves passes through the model changes no gradient, or only which samples have one."""

import copy

import pytest
import torch
from peft import LoraConfig

from hp_edit_trl import FlowGRPOEditTrainer
from hp_edit_trl.miniature.tiny import tiny_pipeline
from tests.helpers import make_cases, make_config, redness
from tests.processes import Script


def flat_for_one(completions, id, **kwargs):
    """Redness, but 1 for all edits of one case."""
    return [1.0 if case == "case-1" else reward for case, reward in zip(id, redness(completions), strict=True)]


def make_trainer(folder, reward=redness, **kwargs):
    options = dict(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1, optim="sgd", learning_rate=20.0,
        max_grad_norm=0.0, true_cfg_scale=1.0, sde_window_size=2,
        num_inference_steps=6, sde_window_mode="fixed", sde_window_range=[1, 4], num_finish_steps=None,
    )  # fmt: skip
    lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian")
    args = make_config(folder, **{**options, **kwargs})
    trainer = FlowGRPOEditTrainer(tiny_pipeline(), reward, args, make_cases(2), peft_config=copy.deepcopy(lora))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # or the KL divergence would be 0
                parameter.normal_(std=0.1, generator=generator)
    return trainer


def train(trainer):
    """Trains, and returns the LoRA's change, the samples, and numbers of passes of single samples."""
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    passes = {"sampled": 0, "trained": 0}

    def count(module, args, kwargs):
        passes["trained" if module.training else "sampled"] += len(kwargs["hidden_states"])

    hook = trainer.policy.pipeline.transformer.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    hook.remove()
    after = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
    return torch.cat([(b - a).flatten() for a, b in zip(before, after, strict=True)]), passes


def one_by_one(trainer):
    """Makes a pass of its own for each step of each sample."""

    def passes(samples, update):
        return [([sample], [sample], [0], range(len(sample.trajectory.steps))) for sample in samples]

    trainer._passes = passes
    return trainer


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_samples_of_one_start_share_passes_and_have_the_same_gradient(tmp_path, cfg):
    options = dict(same_latent=True, true_cfg_scale=cfg, beta=0.01)
    trainer = make_trainer(tmp_path, **options)
    shared, passes = train(trainer)
    alone, all_passes = train(one_by_one(make_trainer(tmp_path, **options)))
    assert shared.norm() > 0.01
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-5 * shared.abs().max().item())
    predictions = 1 + (cfg > 1)
    # Two cases of 4 edits: 1 step before the window, its first step; then for each edit 1 and 3 after the window.
    assert passes["sampled"] == predictions * (2 * 2 + 8 * (1 + 3)) == all_passes["sampled"]
    with_reference = 2  # for the KL divergence
    assert passes["trained"] == predictions * with_reference * (2 + 8)
    assert all_passes["trained"] == predictions * with_reference * 16
    for group in (0, 1):
        starts = [s.trajectory.latents[0] for s in trainer._buffered_samples if s.group == group]
        assert len(starts) == 4 and all(start.equal(starts[0]) for start in starts)
        ends = [s.trajectory.latents[1] for s in trainer._buffered_samples if s.group == group]
        assert not ends[0].equal(ends[1])


@pytest.mark.parametrize("same_latent", [False, True])
def test_samples_without_an_advantage_have_no_pass(tmp_path, same_latent):
    options = dict(reward=flat_for_one, same_latent=same_latent)
    trained, passes = train(make_trainer(tmp_path, **options))
    alone, all_passes = train(one_by_one(make_trainer(tmp_path, **options)))
    assert trained.norm() > 0.01
    torch.testing.assert_close(trained, alone, rtol=0, atol=1e-5 * trained.abs().max().item())
    assert all_passes["trained"] == 16
    assert passes["trained"] == (5 if same_latent else 8)


def test_an_update_without_any_advantage_has_no_pass_and_moves_nothing(tmp_path):
    trained, passes = train(make_trainer(tmp_path, reward=lambda completions, **_: [1.0] * len(completions)))
    assert passes["trained"] == 0 and trained.count_nonzero() == 0


def test_the_samples_with_the_largest_advantages_are_trained(tmp_path):
    rewards = [0.0, 0.5, 0.52, 1.0, 0.1, 0.2, 0.3, 0.9]

    def reward(completions, **kwargs):
        return rewards[: len(completions)]

    trainer = make_trainer(tmp_path, reward, num_trained_generations=2, gradient_accumulation_steps=2)
    assert trainer.args.generation_batch_size == 8 and trainer.args.steps_per_generation == 2
    _, passes = train(trainer)
    assert passes["trained"] == 8
    kept = sorted((sample.group, round(sample.advantage, 2)) for sample in trainer._buffered_samples)
    means, spreads = [0.505, 0.375], [torch.tensor(rewards[i : i + 4]).std().item() for i in (0, 4)]
    expected = [(0, 0.0), (0, 1.0), (1, 0.1), (1, 0.9)]
    assert kept == [(g, round((r - means[g]) / (spreads[g] + 1e-4), 2)) for g, r in expected]
    # Places of a group without spread go to others.
    rewards[4:] = [0.7] * 4
    trainer = make_trainer(tmp_path, reward, num_trained_generations=2, gradient_accumulation_steps=2)
    train(trainer)
    assert [sample.group for sample in trainer._buffered_samples] == [0] * 4


def test_it_resumes_exactly_inside_a_generation_batch(tmp_path):
    options = dict(
        same_latent=True, num_trained_generations=2, num_finish_steps=2, gradient_accumulation_steps=1,
        steps_per_generation=2, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=4,
    )  # fmt: skip
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    weights = [[p for p in t.model.parameters() if p.requires_grad] for t in (whole, resumed)]
    assert all(one.equal(other) for one, other in zip(*weights, strict=True))


IDLE = """
import sys, torch
torch.set_num_threads(1)
from tests.trainer.test_fewer_passes import make_trainer, train
from tests.helpers import redness

def reward(completions, trainer_state, **kwargs):  # nothing to learn on the second process
    return redness(completions) if trainer.accelerator.is_main_process else [1.0] * len(completions)

trainer = make_trainer(sys.argv[1], reward, gradient_accumulation_steps=2, ddp_timeout=30, max_steps=2)
change, passes = train(trainer)
print(trainer.accelerator.process_index, passes["trained"], trainer._skipped_updates)
assert change.norm() > 0.01
"""


def test_a_process_without_an_advantage_does_not_hold_up_the_others(tmp_path):
    (tmp_path / "script.py").write_text(IDLE)
    done = Script(tmp_path / "script.py", tmp_path / "out", processes=2).wait()
    assert done.returncode == 0, done.stderr[-4000:]
    # Two updates of 4 edits and 2 steps; the other process makes the one pass that an update waits for.
    assert sorted(line for line in done.stdout.splitlines() if line[0] in "01") == ["0 16 0", "1 2 0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_trained_generations=5), "num_trained_generations=5 must be between 1 and num_generations=4"),
        (dict(num_trained_generations=0), "num_trained_generations=0 must be between"),
        (dict(num_trained_generations=3), r"10 edits .*\* 4 / 3 of which are trained on\) must be divisible"),
        (dict(num_trained_generations=1, generation_batch_size=4), "1/4 of generation_batch_size=4 must be divis"),
        (dict(num_finish_steps=0), "num_finish_steps=0 must be at least 1"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, **options})
