import contextlib
import copy
import math
import os
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as pipeline_module
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_dataset
from diffusers import QwenImageEditPlusPipeline
from peft import LoraConfig
from PIL import Image as PILImage

from hp_edit_trl import FlowGRPOEditConfig, FlowGRPOEditTrainer, HPScorerReward, TransformersJudge
from hp_edit_trl.flow.dynamics import log_prob, transition
from hp_edit_trl.miniature.tiny import tiny_judge, tiny_kontext_pipeline, tiny_pipeline
from hp_edit_trl.policies import edit_policy
from tests.helpers import make_cases, make_config, photo, redness, write_model_index


LORA = LoraConfig(r=4, lora_alpha=8)


@pytest.fixture
def make_trainer(tmp_path):
    def make(reward_funcs=redness, dataset=None, pipeline=None, peft_config=LORA, eval_dataset=None, **kwargs):
        return FlowGRPOEditTrainer(
            model=pipeline or tiny_pipeline(),
            reward_funcs=reward_funcs,
            args=make_config(kwargs.pop("output_dir", tmp_path / "out"), **kwargs),
            train_dataset=make_cases() if dataset is None else dataset,
            eval_dataset=eval_dataset,
            peft_config=copy.deepcopy(peft_config),
        )

    return make


def adapter_weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("dynamics", ["flow_sde", "cps", "dance_sde"])
def test_train(make_trainer, dynamics):
    trainer = make_trainer(dynamics=dynamics, max_steps=3)
    before = adapter_weights(trainer)
    trainer.train()
    # Every parameter that can move moved: the policy's own list leaves out those that never get a gradient.
    assert [name for name, weight in adapter_weights(trainer).items() if torch.equal(weight, before[name])] == []
    assert any(".1.attn.to_out" in name for name in before)
    assert not any(".1.attn.to_add_out" in name or ".1.txt_mlp" in name for name in before)
    log = trainer.state.log_history[0]
    for name in [
        "reward", "reward_std", "frac_reward_zero_std", "rewards/redness/mean", "rewards/redness/std", "step_time",
        "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max",
        "clip_ratio/region_mean", "time/encode", "time/rollout", "time/decode", "time/reward", "time/train",
        "images_per_second", "logp_diff/step_0", "logp_diff/step_1",
    ]:  # fmt: skip
        assert isinstance(log[name], float), name


def test_the_base_model_is_left_alone(make_trainer):
    pipeline = tiny_pipeline()
    trainer = make_trainer(pipeline=pipeline)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(weight, now[name]) for name, weight in frozen.items())


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize(("rollout_batch_size", "tolerance"), [(4, 1e-6), (3, 1e-5)])
def test_the_first_ratio_is_one(make_trainer, cfg, rollout_batch_size, tolerance):
    # Mixed aspect ratios and prompts of different lengths; a warm adapter, or every ratio would be trivially one.
    trainer = make_trainer(true_cfg_scale=cfg, rollout_batch_size=rollout_batch_size, max_steps=1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    trainer.train()
    log = trainer.state.log_history[0]
    assert max(log["logp_diff/step_0"], log["logp_diff/step_1"]) < tolerance
    ratios = trainer_ratios(trainer)
    assert (ratios - 1).abs().max() > 100 * tolerance  # after the update it is not: the check can fail


def trainer_ratios(trainer):
    """Ratio of every buffered sample at every trained step, one sample at a time."""
    ratios = []
    trainer.model.eval()
    for sample in trainer._buffered_samples:
        path, batch = sample.trajectory, trainer.policy.collate([sample.conditions])
        for k, step in enumerate(path.steps):
            with torch.no_grad():
                mean, std = trainer._transition(trainer.model, path.latents[k][None], path, step, batch)
            new = log_prob(trainer.args.dynamics, path.latents[k + 1][None], mean, std)
            ratios.append((new - path.log_probs[k]).exp())
    return torch.cat(ratios)


def test_an_update_raises_the_log_probability_of_better_samples(make_trainer):
    trainer = make_trainer(
        max_steps=1, learning_rate=1e-3, gradient_accumulation_steps=1, per_device_train_batch_size=8
    )
    trainer.train()
    samples = trainer._buffered_samples
    gains = trainer_ratios(trainer).view(len(samples), -1).log().mean(1)
    advantages = torch.tensor([sample.advantage for sample in samples])
    assert (gains * advantages).sum() > 0
    assert torch.corrcoef(torch.stack([gains, advantages]))[0, 1] > 0.5


@pytest.mark.parametrize("weights, low, high", [(None, 1e-3, 2e-3), ("normalize_ratio", 5e-4, 6e-4),
                                                ("weight_by_noise", 1e-3, 2e-3)])  # fmt: skip
def test_the_gradient_is_that_of_the_clipped_objective(make_trainer, weights, low, high):
    # Against an objective written in one piece, over all steps at once, for a batch of mixed sizes.
    options = dict(beta=0.3, sde_window_size=3, max_steps=1, learning_rate=1e-2)
    trainer = make_trainer(epsilon=low, epsilon_high=high, **options, **({} if weights is None else {weights: True}))
    trainer.train()
    samples = trainer._buffered_samples
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 2
    loss = trainer._accumulate_gradients(trainer.model, samples)
    gradients = [p.grad.clone() for p in parameters]

    terms, ratios = [], []
    for sample in samples:
        path, batch = sample.trajectory, trainer.policy.collate([sample.conditions])
        for k, step in enumerate(path.steps):
            x, sigmas = path.latents[k][None], path.sigmas

            def step_mean(x=x, sigmas=sigmas, step=step, batch=batch):
                v = trainer.policy.velocity(trainer.model, x, sigmas[step], batch, 4.0)
                return transition("flow_sde", x, v, sigmas[step], sigmas[step + 1], 1.0, sigmas[1])

            mean, std = step_mean()
            with torch.no_grad(), trainer.model.disable_adapter():
                reference, _ = step_mean()
            normal = torch.distributions.Normal(mean, std)
            log_ratio = normal.log_prob(path.latents[k + 1][None]).mean() - path.log_probs[k]
            weight = 1.0
            if weights == "weight_by_noise":
                noises = [
                    math.sqrt((a - b) * a / (1 - min(a, sigmas[1].item()))) for a, b in pairwise(sigmas.tolist())
                ]
                weight = noises[step] / (sum(noises[slice(*trainer.sde_window_range)]) / 3)
            if weights == "normalize_ratio":  # GRPO-Guard's equation 8, from the plain log-ratio
                drift = mean - path.means[k][None]
                log_ratio = (log_ratio + (drift**2).mean() / (2 * std**2)) * std
                weight = 1 / (sigmas[step] - sigmas[step + 1])
            ratio = log_ratio.exp()
            ratios.append(ratio.item())
            clipped = ratio.clamp(1 - low, 1 + high)
            surrogate = torch.minimum(ratio * sample.advantage, clipped * sample.advantage) * weight
            kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(reference, std)).mean()
            terms.append(-surrogate + 0.3 * kl)
    assert max(ratios) > 1 + high and min(ratios) < 1 - low  # both clips are at work
    expected = torch.stack(terms).mean() / 2
    trainer.model.zero_grad()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-7)
    for gradient, parameter in zip(gradients, parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(make_trainer, tmp_path):
    plain = make_trainer(output_dir=tmp_path / "a")
    plain.train()
    saving = make_trainer(output_dir=tmp_path / "b", gradient_checkpointing=True)
    saving.train()
    assert saving.policy.pipeline.transformer.gradient_checkpointing
    assert_equal_weights(adapter_weights(plain), adapter_weights(saving))


def test_two_runs_agree_bit_for_bit(make_trainer, tmp_path):
    first = make_trainer(output_dir=tmp_path / "a")
    first.train()
    torch.rand(17)  # the global generator plays no part
    second = make_trainer(output_dir=tmp_path / "b")
    torch.rand(17)
    second.train()
    assert_equal_weights(adapter_weights(first), adapter_weights(second))
    assert [log.get("reward") for log in first.state.log_history] == [
        log.get("reward") for log in second.state.log_history
    ]


@pytest.mark.parametrize("case", ["aligned", "inside a generation batch", "next epoch"])
def test_resume_is_exact(make_trainer, tmp_path, case):
    options = {
        "aligned": dict(max_steps=3, save_steps=2),
        "inside a generation batch": dict(max_steps=4, save_steps=3, num_iterations=2, gradient_accumulation_steps=1,
            steps_per_generation=2),
        "next epoch": dict(max_steps=5, save_steps=4),
    }[case]  # fmt: skip
    through = make_trainer(output_dir=tmp_path / "a", save_strategy="steps", **options)
    through.train()
    resumed = make_trainer(output_dir=tmp_path / "b", save_strategy="steps", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{options['max_steps'] - 1}"))
    assert_equal_weights(adapter_weights(through), adapter_weights(resumed))
    last, again = through.state.log_history[-2], resumed.state.log_history[-2]
    assert (last["step"], last["loss"], last.get("reward")) == (again["step"], again["loss"], again.get("reward"))


def test_resume_inside_a_generation_batch_needs_its_sizes(make_trainer, tmp_path):
    options = dict(save_strategy="steps", gradient_accumulation_steps=1)
    make_trainer(output_dir=tmp_path / "a", max_steps=1, save_steps=1, steps_per_generation=2, **options).train()
    other = make_trainer(output_dir=tmp_path / "b", max_steps=2, steps_per_generation=4, **options)
    with pytest.raises(ValueError, match="generation batch of 8 samples per process, but the arguments give 16"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))


@pytest.mark.parametrize("peft_config", [LORA, None], ids=["given", "default"])
def test_the_saved_lora_loads_in_plain_diffusers(make_trainer, tmp_path, peft_config, monkeypatch):
    monkeypatch.setattr(pipeline_module, "VAE_IMAGE_SIZE", 64 * 64)  # a megapixel takes its time
    base = tmp_path / "base"
    tiny_pipeline().save_pretrained(base)
    trainer = FlowGRPOEditTrainer(
        model=str(base), reward_funcs=redness, train_dataset=make_cases(), peft_config=peft_config,
        args=make_config(tmp_path / "out", save_strategy="steps", save_steps=2),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    call = dict(
        image=[photo(64, 64)], prompt="Blur it", negative_prompt=" ", height=64, width=64, num_inference_steps=2,
        output_type="np",
    )  # fmt: skip
    trained = trainer.policy.pipeline
    trained.transformer.eval()
    expected = trained(**call, generator=torch.Generator().manual_seed(0)).images
    plain = QwenImageEditPlusPipeline.from_pretrained(base)
    without = plain(**call, generator=torch.Generator().manual_seed(0)).images
    assert np.abs(without - expected).max() > 1e-4
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        plain = QwenImageEditPlusPipeline.from_pretrained(base)
        plain.load_lora_weights(str(folder))
        assert np.array_equal(plain(**call, generator=torch.Generator().manual_seed(0)).images, expected)
    config = plain.transformer.peft_config["default_0"]
    assert (config.r, config.lora_alpha) == ((4, 8) if peft_config else (32, 64))


def test_a_hub_style_folder_a_pipeline_and_defaults(tmp_path, monkeypatch):
    # The script of the README, with a local folder as the model.
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained("Qwen-Image-Edit-Tiny")
    judge = tiny_judge("judge")
    trainer = FlowGRPOEditTrainer(
        model="Qwen-Image-Edit-Tiny",
        reward_funcs=HPScorerReward(TransformersJudge(judge, "expected", min_digit_mass=0.0)),
        args=FlowGRPOEditConfig(output_dir="qwen-edit-hp", resolution=64, max_steps=1, use_cpu=True, report_to="none"),
        train_dataset=make_cases(),
        peft_config=LoraConfig(r=32, lora_alpha=64),
    )
    assert trainer.policy.pipeline.transformer.dtype == torch.bfloat16
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    log = trainer.state.log_history[0]
    assert 0 < log["rewards/HPScorerReward/mean"] < 1 and 0 < log["hp_score"] < 5 and log["hp_score_failed"] == 0
    # bfloat16 in rollout and in training alike: still the same policy.
    assert max(value for name, value in log.items() if name.startswith("logp_diff")) < 1e-4


def test_groups_shuffled_and_split_keep_case_and_advantage_together(make_trainer):
    # The reward is a number that belongs to the case, plus one that belongs to the completion.
    pictures = {}

    def planted(prompts, completions, id, image, task, **kwargs):
        rewards = [10 * int(case.split("-")[1]) + i for i, case in enumerate(id)]
        for case, prompt, source, name in zip(id, prompts, image, task, strict=True):
            number = int(case.split("-")[1])
            assert prompt.endswith(f"number {number}")
            assert name == make_cases()[number]["task"]
            assert np.array_equal(np.asarray(source), np.asarray(photo(*source.size, seed=number)))
        for case, completion in zip(id, completions, strict=True):
            pictures.setdefault(case, []).append(completion)
        return rewards

    trainer = make_trainer(planted, max_steps=1)
    trainer.train()
    groups = {}
    for sample in trainer._buffered_samples:
        groups.setdefault(sample.case_id, []).append(sample.advantage)
        wide = int(sample.case_id.split("-")[1]) % 2
        assert (sample.conditions.width, sample.conditions.height) == ((96, 48) if wide else (64, 64))
    values = torch.tensor([0.0, 1.0, 2.0, 3.0])
    expected = sorted(((values - values.mean()) / (values.std() + 1e-4)).tolist())
    assert len(groups) == 2
    for advantages in groups.values():
        assert sorted(advantages) == pytest.approx(expected, abs=1e-5)
    # Within a group, each advantage belongs to the very sample: decoded again, its latents give the picture rewarded.
    for sample in trainer._buffered_samples:
        (image,) = trainer.policy.decode(sample.trajectory.final[None], sample.conditions)
        rank = round(sample.advantage * (values.std().item() + 1e-4) + 1.5)
        difference = np.asarray(image, dtype=int) - np.asarray(pictures[sample.case_id][rank], dtype=int)
        assert np.abs(difference).max() <= 1


def test_advantages(make_trainer):
    nan = math.nan
    rewards = torch.tensor(
        [[1.0, nan], [2.0, nan], [3.0, nan], [6.0, nan], [5.0, 1.0], [5.0, 1.0], [nan, nan], [5.0, 1.0]]
    )
    for scale in ("group", "batch", "none"):
        trainer = make_trainer([redness, lambda **kwargs: None], scale_rewards=scale, reward_weights=[1.0, 2.0])
        total, advantages, flat = trainer._compute_advantages(rewards.clone())
        expected_total = [1, 2, 3, 6, 7, 7, nan, 7]
        assert total.tolist() == pytest.approx(expected_total, nan_ok=True)
        std = {"group": np.std([1, 2, 3, 6], ddof=1) + 1e-4, "none": 1.0}.get(
            scale, np.std([1, 2, 3, 6, 7, 7, 7], ddof=1) + 1e-4
        )
        assert advantages.tolist() == pytest.approx([-2 / std, -1 / std, 0, 3 / std, 0, 0, 0, 0], abs=1e-5)
        # A group without spread, and a sample without reward, teach nothing; their KL is masked as well.
        assert flat.tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("group", [6, 7, 12, 16, 21])
def test_equal_rewards_have_no_spread(make_trainer, group):
    # In floating point the standard deviation of equal numbers need not be 0.
    trainer = make_trainer()
    trainer.num_generations = group
    rewards = torch.full((2 * group, 1), 1 / (1 + math.exp(-3)))
    rewards[group:, 0] += torch.arange(group) * 0.04 / group
    _, advantages, flat = trainer._compute_advantages(rewards)
    assert flat[:group].all() and (advantages[:group] == 0).all()
    assert not flat[group:].any() and (advantages[group:] != 0).sum() >= group - 1


def test_missing_rewards_are_missing_and_not_zero(make_trainer, caplog):
    def partial(completions, **kwargs):
        return [None if i % 2 else float(i) for i in range(len(completions))]

    trainer = make_trainer([partial], max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["reward"] == pytest.approx(3.0)  # of 0, 2, 4, 6
    by_advantage = [sample for sample in trainer._buffered_samples if sample.advantage == 0]
    assert len(by_advantage) == 4 and all(sample.kl_weight == 0 for sample in by_advantage)
    (warning,) = [record.message for record in caplog.records if "No reward function" in record.message]
    assert "scored 4 of 8 edits, of the cases 'case-" in warning


def test_async_rewards_weights_and_logging_hooks(make_trainer):
    async def slow(completions, log_metric, log_extra, **kwargs):
        log_metric("slow_metric", 3.0)
        log_extra("note", ["x"] * len(completions))
        return [1.0] * len(completions)

    def constant(prompts, trainer_state, **kwargs):
        assert trainer_state.max_steps == 1
        return [0.5] * len(prompts)

    trainer = make_trainer([slow, constant], reward_weights=[2.0, 4.0], max_steps=1, beta=0.5, log_completions=True)
    before = adapter_weights(trainer)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["reward"] == 4.0 and log["frac_reward_zero_std"] == 1.0 and log["slow_metric"] == 3.0
    # Groups without spread: no advantage and no KL, so nothing moves.
    assert_equal_weights(before, adapter_weights(trainer))
    table = load_dataset("parquet", data_files=f"{trainer.args.output_dir}/completions/*.parquet", split="train")
    assert len(table) == 8 and table[0]["note"] == "x" and table[0]["completion"].size == (64, 64)
    assert os.path.exists(os.path.join(trainer.args.output_dir, "completions", table[0]["reference"]))


def test_a_reward_of_the_wrong_length(make_trainer):
    with pytest.raises(ValueError, match="'short' returned 1 rewards for 8 completions"):

        def short(**kwargs):
            return [1.0]

        make_trainer(short).train()


def test_evaluation(make_trainer):
    held_out = make_cases(5)
    trainer = make_trainer(eval_dataset=held_out, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2)
    first = trainer.evaluate()
    assert first == pytest.approx(
        {**trainer.evaluate(), **{k: v for k, v in first.items() if "per_second" in k or "runtime" in k}}
    )
    # The mean over the cases, each once, each with its own noise, however they are batched.
    cases = [trainer._read_case(trainer.eval_dataset, i) for i in range(5)]
    rewards = [redness(trainer.sample_edits([case]))[0] for case in cases]
    assert first["eval_reward"] == pytest.approx(np.mean(rewards), abs=2e-4)
    assert first["eval_reward/remove"] == pytest.approx(rewards[1], abs=1e-3)
    trainer.train()
    assert len([log for log in trainer.state.log_history if "eval_reward" in log]) >= 2


def test_evaluation_of_several_edits_of_each_case(make_trainer):
    seen = []

    def scored(completions, id, log_extra, **kwargs):
        seen.extend(id)
        log_extra("hp_score", [5.0] * len(id))
        return redness(completions)

    rows = [row | {"image": {"bytes": b"no picture", "path": None}} if row["id"] == "case-1" else row for row in
        make_cases(3).cast_column("image", Image(decode=False))]  # fmt: skip
    cases = Dataset.from_list(rows).cast_column("image", Image())
    settings = dict(per_device_eval_batch_size=2, num_generations_eval=2, on_bad_case="skip")
    trainer = make_trainer(scored, eval_dataset=cases, **settings)
    metrics = trainer.evaluate()
    assert seen == [f"case-{i}" for i in (0, 0, 2, 2)] and metrics["eval_bad_cases"] == 1
    usable = [trainer._read_case(trainer.eval_dataset, i) for i in range(2)]
    edits = trainer.sample_edits(usable, num_edits=2)
    assert metrics["eval_reward"] == pytest.approx(np.mean(redness(edits)), abs=2e-4)
    # Those of a case differ; the first is the one that there would be alone.
    assert redness(edits)[0] != redness(edits)[1]
    np.testing.assert_allclose(redness(trainer.sample_edits(usable)), redness(edits)[::2], atol=1e-3)
    with pytest.raises(ValueError, match="num_generations_eval=0 must be at least 1"):
        make_trainer(num_generations_eval=0)


def test_evaluation_of_logged_columns_knows_no_batches(make_trainer):
    def scored(completions, id, log_extra, log_metric, **kwargs):
        scores = [float(case.split("-")[1]) if case != "case-1" else None for case in id]
        log_extra("hp_score", scores)
        log_metric("hp_score", 99.0)  # per batch; what is known per case is better
        log_metric("share", len(id))
        return scores

    trainer = make_trainer(scored, eval_dataset=make_cases(5), per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    assert metrics["eval_hp_score"] == pytest.approx((0 + 2 + 3 + 4) / 4) == metrics["eval_reward"]
    assert metrics["eval_share"] == pytest.approx((4 * 4 + 1 * 1) / 5)


def test_load_best_model_at_end_and_several_eval_sets(make_trainer):
    trainer = make_trainer(
        eval_dataset={"a": make_cases(2), "b": make_cases(3)}, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_a_reward",
        greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric is not None
    assert any("eval_b_reward" in log for log in trainer.state.log_history)


def test_several_references(make_trainer):
    rows = [
        {"id": str(i), "prompt": f"Put picture {i} into picture 2", "images": [photo(64, 64, i), photo(64, 128, i)]}
        for i in range(4)
    ]
    features = Features({"id": Value("string"), "prompt": Value("string"), "images": List(Image())})

    def check(images, completions, **kwargs):
        assert [len(sources) for sources in images] == [2] * len(completions)
        return redness(completions)

    trainer = make_trainer(check, dataset=Dataset.from_list(rows, features=features))
    trainer.train()
    assert trainer._buffered_samples[0].conditions.reference_sizes == ((64, 64), (96, 48))


def test_bad_cases(make_trainer):
    rows = make_cases(4)
    broken = rows.cast_column("image", Image(decode=False)).map(
        lambda row, i: {"image": {"bytes": row["image"]["bytes"][:-40], "path": "a/cup.png"}} if i == 1 else row,
        with_indices=True,
    )
    told = "case 'case-1' cannot be decoded.*in 'a/cup.png'.*on_bad_case='skip'.*`hp-edit check-dataset`"
    with pytest.raises(ValueError, match=told):
        make_trainer(dataset=broken, max_steps=2).train()
    seen = []

    def keep(completions, **kwargs):
        seen.extend(np.asarray(image).tobytes() for image in completions)
        return redness(completions)

    trainer = make_trainer(
        keep, dataset=broken, max_steps=1, on_bad_case="skip", gradient_accumulation_steps=4, shuffle_dataset=False,
        eval_dataset=broken,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["bad_cases"] == 1
    # Its place is taken by case-2, which is in the batch already: with other noise, or half of that work were for
    # nothing.
    assert len(seen) == len(set(seen)) == 16
    # In evaluation no case stands in for another.
    metrics = trainer.evaluate()
    good = make_trainer(eval_dataset=rows.select([0, 2, 3]))
    good.model.load_state_dict(trainer.model.state_dict())
    assert metrics["eval_bad_cases"] == 1
    assert metrics["eval_reward"] == pytest.approx(good.evaluate()["eval_reward"], abs=1e-6)


def test_what_is_trained_is_saved_even_if_no_picture_can_be_made(make_trainer, tmp_path):
    broken = make_cases(2).cast_column("image", Image(decode=False))
    broken = broken.map(lambda row: {"image": {"bytes": row["image"]["bytes"][:-40], "path": None}})
    trainer = make_trainer(eval_dataset=broken, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "before_after.png" not in card and "reward_curve.png" in card


def test_a_second_run_starts_with_samples_of_its_own(make_trainer):
    trainer = make_trainer(max_steps=1, gradient_accumulation_steps=1, steps_per_generation=2)
    trainer.train()
    left_over = trainer._buffered_samples
    trainer.train()
    assert trainer._buffered_samples is not left_over and trainer._step == 1


def test_the_table_of_edits(make_trainer, capsys, tmp_path):
    turn = []

    def chatty(completions, log_extra, **kwargs):
        turn.append(1)
        if len(turn) > 1:  # not in every batch, and not of one type
            log_extra("note [/bold]", [1.5, "two", None, 4] * (len(completions) // 4))
        return redness(completions)

    cases = make_cases().map(lambda row: {"prompt": "do [/bold] [red]it[/red]"})
    trainer = make_trainer(
        chatty, dataset=cases, log_completions=True, num_completions_to_log=6, logging_steps=2,
        report_to="tensorboard", max_steps=2,
    )  # fmt: skip
    trainer.train()
    printed = capsys.readouterr().out
    assert "[red]it[/red]" in printed
    assert "update 2 of 2 | reward " in printed and "grad_norm" not in printed  # one line per log, in words
    assert "grad_norm" in trainer.state.log_history[0]
    table = load_dataset("parquet", data_files=f"{trainer.args.output_dir}/completions/*.parquet", split="train")
    assert len(table) == 6 and len(set(table["id"])) == 2  # some of each case
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    board = EventAccumulator(str(events)).Reload()
    assert {"completion/0", "reference/5"} <= set(board.Tags()["images"])
    assert "train/reward" in board.Tags()["scalars"]

    def wrong(completions, log_extra, **kwargs):
        log_extra("note", [1])
        return redness(completions)

    with pytest.raises(ValueError, match=r"log_extra\('note', ...\) got 1 values for 8 completions"):
        make_trainer(wrong).train()


def test_statistics_do_not_pile_up_where_nothing_is_logged(make_trainer):
    trainer = make_trainer(logging_strategy="no", max_steps=3)
    trainer.train()
    assert {tuple(stats.shape) for stats in trainer._sample_stats.values()} == {(4,)}


def test_offloaded_encoders_move_once_per_phase(make_trainer, monkeypatch):
    trainer = make_trainer(offload_encoders=True, max_steps=1)
    names = {module: name for name, module in trainer.policy.encoders.items()}
    moves = []
    monkeypatch.setattr(edit_policy, "on_device", lambda m, _: moves.append(names[m]) or contextlib.nullcontext())
    trainer.train()
    assert moves == ["text_encoder", "vae", "vae"]


def test_casts_of_the_lora_are_left_out_and_change_no_bit(make_trainer, monkeypatch):
    results = []
    for without in (True, False):
        trainer = make_trainer(
            pipeline=tiny_pipeline().to(torch.bfloat16), bf16=True, gradient_checkpointing=True, max_steps=2
        )
        if not without:
            monkeypatch.setattr(trainer, "_without_casts", contextlib.nullcontext)
        types = set()
        layer = next(m for name, m in trainer.model.named_modules() if name.endswith("to_q.lora_A.default"))
        layer.register_forward_pre_hook(lambda _, args, types=types: types.add(args[0].dtype))
        trainer.train()
        assert types == {torch.bfloat16 if without else torch.float32}
        results.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


def test_the_dtype_may_be_a_name(make_trainer, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    for option in ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}, {"dtype": torch.bfloat16}):
        trainer = make_trainer(pipeline=str(tmp_path / "base"), model_init_kwargs=option)
        assert trainer.policy.dtype == trainer.policy.pipeline.vae.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype='auto' is not a type of tensors"):
        make_trainer(pipeline=str(tmp_path / "base"), model_init_kwargs={"dtype": "auto"})


def test_bad_arguments(make_trainer, tmp_path):
    cases = make_cases()
    with pytest.raises(ValueError, match="no column 'prompt'"):
        make_trainer(dataset=cases.remove_columns("prompt"))
    with pytest.raises(ValueError, match="no column 'image'"):
        make_trainer(dataset=cases.remove_columns("image"))
    with pytest.raises(TypeError, match="must be a datasets.Dataset"):
        make_trainer(dataset=list(cases))
    with pytest.raises(ValueError, match="eval_dataset has no column 'prompt'"):
        make_trainer(eval_dataset=cases.remove_columns("prompt"))
    with pytest.raises(ValueError, match="has 6 usable cases, but one generation batch takes 8"):
        make_trainer(gradient_accumulation_steps=8)
    with pytest.raises(ValueError, match="reward_weights has 2 entries"):
        make_trainer(reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="lora_dropout=0.1 must be 0"):
        make_trainer(peft_config=LoraConfig(lora_dropout=0.1))
    with pytest.raises(ValueError, match="bias='lora_only' must be 'none'"):
        make_trainer(peft_config=LoraConfig(bias="lora_only"))
    with pytest.raises(ValueError, match="modules_to_save=.* must be empty"):
        make_trainer(peft_config=LoraConfig(modules_to_save=["proj_out"]))
    with pytest.raises(TypeError, match="must be a LoraConfig, but is a str"):
        make_trainer(peft_config="lora")
    with pytest.raises(TypeError, match=r"dictionary of splits \['train'\]: choose one"):
        make_trainer(dataset=DatasetDict(train=cases))
    with pytest.raises(ValueError, match="'prompt' of train_dataset must hold strings"):
        make_trainer(dataset=cases.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]}))
    with pytest.raises(ValueError, match="Case 'case-1' has no prompt"):
        make_trainer(dataset=cases.map(lambda row, i: {"prompt": None if i == 1 else "x"}, with_indices=True))
    with pytest.raises(ValueError, match="'image' of train_dataset must hold images or their paths"):
        make_trainer(dataset=cases.remove_columns("image").add_column("image", list(range(6))))
    with pytest.raises(ValueError, match="Row 3 of train_dataset has the id 'a' of row 0"):
        make_trainer(dataset=cases.remove_columns("id").add_column("id", list("abcade")))
    with pytest.raises(ValueError, match="Row 2 of train_dataset has no id"):
        make_trainer(dataset=cases.remove_columns("id").add_column("id", ["a", "b", None, "c", "d", "e"]))
    with pytest.raises(ValueError, match="not_a_module"):
        make_trainer(peft_config=LoraConfig(target_modules=["not_a_module"]))
    with pytest.raises(ValueError, match="not a diffusers pipeline"):
        make_trainer(pipeline=str(tmp_path))
    with pytest.raises(TypeError, match="plain callable"):
        make_trainer(torch.nn.Linear(1, 1))


def test_unknown_tasks_and_dead_judges_show_before_the_policy_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "diffusers.DiffusionPipeline.from_pretrained", lambda *a, **k: pytest.fail("loaded the policy")
    )
    base = tmp_path / "base"
    base.mkdir()
    write_model_index(base)
    scorer = HPScorerReward(tiny_judge(str(tmp_path / "judge")))
    wrong = make_cases().map(lambda row: {"task": "removal"})
    with pytest.raises(ValueError, match="No scorer prompt for the task 'removal'. There are prompts for: add, "):
        FlowGRPOEditTrainer(str(base), scorer, make_config(tmp_path / "out"), wrong)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "add.md").write_text("---\ntask: add\nrevision: 1\n---\n{prompt}")
    no_base = HPScorerReward(str(tmp_path / "judge"), scorer_prompts=str(tmp_path / "prompts"))
    with pytest.raises(ValueError, match="No scorer prompt for the task 'base'"):
        FlowGRPOEditTrainer(str(base), no_base, make_config(tmp_path / "out"), make_cases().remove_columns("task"))
    dead = HPScorerReward("some-model", judge_base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ConnectionError, match="'some-model' at http://127.0.0.1:9/v1 gives no judgements"):
        FlowGRPOEditTrainer(str(base), dead, make_config(tmp_path / "out"), make_cases())


def test_a_pipeline_with_a_lora_loaded(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.save_model(str(tmp_path / "lora"))
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(str(tmp_path / "lora"))
    with pytest.raises(ValueError, match="has a LoRA loaded already"):
        make_trainer(pipeline=pipeline)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    make_trainer(pipeline=pipeline, max_steps=1).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_generations=5), "must be divisible by num_generations=5.*a multiple of 5, e.g. 5, and leave"),
        (dict(num_inference_steps=1, sde_window_size=None), "num_inference_steps=1 must be at least 2"),
        (dict(sde_window_range=[3, 3], sde_window_size=None), "SDE window does not fit"),
        (dict(generation_batch_size=10), "generation_batch_size=10 must be divisible by .* = 4"),
        (dict(generation_batch_size=8, steps_per_generation=2), "cannot both be set"),
        (dict(num_generations=1), "num_generations=1 must be at least 2"),
        (dict(sde_window_range=[2, 4]), r"range must lie within \[0, 3\), because the last step is never stochastic"),
        (dict(sde_window_range=[0, 1]), "SDE window does not fit"),
        (dict(sde_window_range=[-1, 2]), "SDE window does not fit"),
        (dict(sde_window_size=4), "SDE window does not fit"),
        (dict(sde_window_range=[1]), "must be two numbers"),
        (dict(dynamics="ode"), "dynamics='ode' is not known"),
        (dict(sde_window_mode="x"), "sde_window_mode='x' is not known"),
        (dict(scale_rewards="x"), "scale_rewards='x' is not known"),
        (dict(on_bad_case="x"), "on_bad_case='x' is not known"),
        (dict(epsilon=0.0), "epsilon=0.0 must be above 0"),
        (dict(resolution=0), "resolution=0 must be at least 1"),
        (dict(eval_num_inference_steps=0), "eval_num_inference_steps=0 must be at least 1"),
        (dict(true_cfg_scale=0.5), "true_cfg_scale=0.5 must be at least 1"),
        (dict(num_completions_to_log=0), "num_completions_to_log=0 must be at least 1"),
        (dict(epsilon_high=-1.0), "epsilon_high=-1.0 must be above 0"),
        (dict(beta=-0.1), "beta=-0.1 must not be negative"),
        (
            dict(weight_by_noise=True, normalize_ratio=True),
            "weight_by_noise=True and normalize_ratio=True both weight",
        ),
        (dict(dynamics="cps", noise_level=1.5), "noise_level=1.5 must be at most 1 for dynamics='cps'"),
        (dict(auto_find_batch_size=True), "would break groups apart"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


def test_defaults_fit_together(tmp_path):
    config = FlowGRPOEditConfig(str(tmp_path), use_cpu=True)
    assert (config.learning_rate, config.num_generations, config.generation_batch_size) == (3e-4, 16, 16)
    assert config.sde_window_range == [0, 5] and config.bf16 and config.steps_per_generation == 16


def test_an_evaluation_set_that_is_not_evaluated_is_said(make_trainer, caplog):
    make_trainer(eval_dataset=make_cases(2))
    assert caplog.text.count("set eval_strategy='steps' and eval_steps=... to evaluate during training") == 1
    caplog.clear()
    make_trainer(eval_dataset=make_cases(2), eval_strategy="steps", eval_steps=1)
    make_trainer(eval_dataset=make_cases(2), eval_on_start=True)
    make_trainer()
    assert "eval_dataset" not in caplog.text


@pytest.mark.parametrize("make_pipeline", [tiny_pipeline, tiny_kontext_pipeline], ids=["qwen", "kontext"])
def test_the_code_of_the_card_runs(make_trainer, make_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_pipeline().save_pretrained("base")
    trainer = make_trainer(pipeline="base", output_dir="runs/first", eval_num_inference_steps=3)
    trainer.train()
    trainer.save_model()
    card = Path("runs/first/README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert "dtype=torch.float32" in code and "num_inference_steps=3" in code
    assert trainer.train_dataset[0]["prompt"] in code  # of the card's first picture
    assert "3 denoising steps, as in evaluation; the pipeline's own number is" in card
    assert "| Weights of the base model | torch.float32 on cpu |" in card
    photo(96, 64).save("photo.png")
    monkeypatch.setattr(pipeline_module, "VAE_IMAGE_SIZE", pipeline_module.VAE_IMAGE_SIZE)  # which the code sets
    names = {}
    exec(code, names)
    height, width = trainer.policy.target_size([photo(96, 64)], 64)
    assert PILImage.open("edited.png").size == (width, height)


def test_the_model_card_and_the_pictures(make_trainer, monkeypatch):
    trainer = make_trainer(eval_dataset=make_cases(2))
    trainer.train()
    run = SimpleNamespace(run=SimpleNamespace(url="https://wandb.ai/someone/edits/runs/1"))
    monkeypatch.setitem(sys.modules, "wandb", run)
    trainer.create_model_card()
    assert "wandb" not in (Path(trainer.args.output_dir) / "README.md").read_text()  # another's run
    trainer.args.report_to = ["wandb"]
    trainer.save_model()
    folder = trainer.args.output_dir
    from huggingface_hub import ModelCard

    card = ModelCard.load(f"{folder}/README.md")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "image-to-image"
    assert {"hp-edit-trl", "flow-grpo", "lora", "trl"} <= set(card.data.tags)
    assert card.data.widget[1]["output"]["url"] == "images/1_after.png"
    assert "| `num_generations` | 4 |" in card.text and "before_after.png" in card.text and "bibtex" in card.text
    assert "[The run in Weights & Biases](https://wandb.ai/someone/edits/runs/1)" in card.text
    for name in ("reward_curve.png", "before_after.png", "images/0_before.png", "images/1_after.png"):
        assert PILImage.open(f"{folder}/{name}").size[0] > 1
    shutil.rmtree(folder)
