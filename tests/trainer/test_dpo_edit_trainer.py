import copy
import math
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value, load_dataset
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from PIL import Image as PILImage

from hp_edit_trl import DPOEditConfig, DPOEditTrainer
from hp_edit_trl.miniature.tiny import (
    tiny_klein_pipeline,
    tiny_kontext_pipeline,
    tiny_pipeline,
    tiny_qwen_image_edit_pipeline,
)
from hp_edit_trl.policies import QwenImageEditPlusPolicy, policy_class
from tests.helpers import make_cases, photo


LORA = LoraConfig(r=4, lora_alpha=8)
RUN_KEYS = re.compile(".*(runtime|per_second|total_flos)$")


def plain(image, color):
    return PILImage.new("RGB", image.size, color)


def edit_pipeline(seed: int = 0):
    """The tiny pipeline, with latents that are normalized as trained ones are: without, all images look much alike."""
    pipeline = tiny_pipeline(seed=seed)
    pipeline.vae.register_to_config(
        latents_mean=[0.105, 0.262, 0.044, -0.297], latents_std=[0.055, 0.061, 0.032, 0.050]
    )
    return pipeline


def pair_row(row: dict, number: int) -> dict:
    width, height = row["image"].size
    return {
        **row,
        "chosen": photo(width, height, seed=100 + number),
        "rejected": photo(width, height, seed=200 + number),
        "score_chosen": 4.5,
        "score_rejected": 1.0,
    }


def make_pairs(count: int = 6, sizes=((64, 64), (128, 64))) -> Dataset:
    return Dataset.from_list([pair_row(row, i) for i, row in enumerate(make_cases(count, sizes))])


def make_config(output_dir, **kwargs) -> DPOEditConfig:
    defaults = dict(
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        resolution=64,
        num_inference_steps=4,
        max_steps=2,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        num_sample_edits=2,
        disable_tqdm=True,
    )
    return DPOEditConfig(output_dir=str(output_dir), **{**defaults, **kwargs})


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> str:
    """One folder of encoded pairs for the tests that are not about it."""
    return str(tmp_path_factory.mktemp("latents"))


@pytest.fixture
def make_trainer(tmp_path, latents):
    def make(dataset=None, pipeline=None, peft_config=LORA, eval_dataset=None, callbacks=None, **kwargs):
        return DPOEditTrainer(
            model=pipeline or edit_pipeline(),
            args=make_config(kwargs.pop("output_dir", tmp_path / "out"), **{"latents_cache_dir": latents, **kwargs}),
            train_dataset=make_pairs() if dataset is None else dataset,
            eval_dataset=eval_dataset,
            peft_config=copy.deepcopy(peft_config),
            callbacks=callbacks,
        )

    return make


def adapter_weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def history(trainer):
    return [{k: v for k, v in log.items() if not RUN_KEYS.match(k)} for log in trainer.state.log_history]


def results(metrics):
    return {k: v for k, v in metrics.items() if not RUN_KEYS.match(k)}


def warm(trainer, std=0.5):
    """An adapter that changes something; the one that training starts with changes nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def record_velocities(trainer):
    """
    What goes through the transformer from here on: (noisy latents, noise levels, whether it can be learned from).
    """
    calls, velocity = [], trainer.policy.velocity

    def recorded(model, latents, sigma, batch, true_cfg_scale):
        calls.append((latents.clone(), sigma.clone(), torch.is_grad_enabled()))
        return velocity(model, latents, sigma, batch, true_cfg_scale)

    trainer.policy.velocity = recorded
    return calls


def record_pairs(trainer):
    """The pairs that losses were computed of, one list for each call."""
    calls, losses = [], trainer._losses

    def recorded(model, pairs, generators):
        calls.append(pairs)
        return losses(model, pairs, generators)

    trainer._losses = recorded
    return calls


def count_encodings(monkeypatch, policy_type=QwenImageEditPlusPolicy):
    """Numbers of encoded cases and of encoded images."""
    counts = {"encode": 0, "encode_image": 0}
    for name in counts:
        original = getattr(policy_type, name)

        def counted(self, *args, name=name, original=original, **kwargs):
            counts[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(policy_type, name, counted)
    return counts


def encoded_by_hand(rows, pipeline=None, resolution=64):
    """Conditions, chosen and rejected latents of each row, from a pipeline of its own."""
    policy = QwenImageEditPlusPolicy(pipeline or edit_pipeline())
    encoded = []
    for row in rows:
        conditions = policy.encode([row["image"]], row["prompt"], None, resolution)
        size = conditions.height, conditions.width
        encoded.append((conditions, *(policy.encode_image(row[name], *size) for name in ("chosen", "rejected"))))
    return encoded


def stretch_rejected(files):
    """
    The rejected latents become the chosen ones and more of them: a step away leads away from the chosen ones as well,
    which images that a random VAE encodes hardly ever do.
    """
    for file in files:
        state = torch.load(file, weights_only=True)
        torch.save({**state, "rejected": 2 * state["chosen"]}, file)


class Float64Reference:
    """
    The loss and its gradient, written again: one pair at a time, in float64, the LoRA multiplied into the weights.
    """

    def __init__(self, trainer, rows):
        self.encoded = encoded_by_hand(rows)
        self.base, self.trained = (QwenImageEditPlusPolicy(edit_pipeline()) for _ in range(2))
        self.lora = {}
        weights = {name: p.detach().double() for name, p in trainer.model.named_parameters() if p.requires_grad}
        for policy in (self.base, self.trained):
            policy.pipeline.transformer.double().requires_grad_(False)
            policy.dtype = torch.float64
        for name, a in weights.items():
            if "lora_A" in name:
                b = weights[name.replace("lora_A", "lora_B")]
                module = self.trained.pipeline.transformer.get_submodule(
                    name.removeprefix("base_model.model.").partition(".lora_A")[0]
                )
                module.weight += 8 / 4 * b @ a
                module.weight.requires_grad_()
                self.lora[name] = (a, b, module)

    def errors(self, i, noisy, sigma):
        """Errors of chosen and rejected, of the policy and of the reference; and the policy's residuals."""
        conditions, *clean = self.encoded[i]
        noises, errors, references, residuals = [], [], [], []
        for x, x0 in zip(noisy.double(), clean, strict=True):
            noise = (x - (1 - sigma.double()) * x0.double()) / sigma.double()
            target = noise - x0.double()
            batch = self.base.collate([conditions])
            v = self.trained.velocity(self.trained.pipeline.transformer, x[None], sigma, batch, 1.0)[0].double()
            with torch.no_grad():
                v_ref = self.base.velocity(self.base.pipeline.transformer, x[None], sigma, batch, 1.0)[0].double()
            noises.append(noise)
            errors.append(((v - target) ** 2).mean())
            references.append(((v_ref - target) ** 2).mean().item())
            residuals.append((v - target).detach().numpy().ravel())
        # One noise for both: it comes out the same from either edit.
        torch.testing.assert_close(noises[0], noises[1], rtol=0, atol=2e-5)
        assert noises[0].mean().abs() < 0.5 and 0.7 < noises[0].std() < 1.3
        return errors, references, residuals

    def gradients(self):
        """Of the adapters, from those of the weights that they were multiplied into."""
        result = {}
        for name, (a, b, module) in self.lora.items():
            gradient = 8 / 4 * module.weight.grad
            result[name] = b.T @ gradient
            result[name.replace("lora_A", "lora_B")] = gradient @ a.T
        return result


LOSSES = {
    "sigmoid": (lambda m, e: np.log(1 + np.exp(-m)), lambda m: (-1 / (1 + np.exp(m)), 0.0)),
    "ipo": (lambda m, e: (m - 1 / 2) ** 2, lambda m: (2 * m - 1, 0.0)),
    "hinge": (lambda m, e: max(0.0, 1 - m), lambda m: (-1.0 if m < 1 else 0.0, 0.0)),
    "sft": (lambda m, e: e, lambda m: (0.0, 1.0)),
}  # value, and derivatives with respect to margin and chosen error


@pytest.mark.parametrize(
    ("loss_type", "loss_weights", "safeguard"),
    [
        ("sigmoid", None, False),
        (["ipo"], None, False),
        (["hinge"], [2.0], False),
        ("sft", None, False),
        (["sigmoid", "sft", "ipo", "hinge"], [0.5, 3.0, 0.2, 2.0], False),
        (["sigmoid", "sft"], [1.0, 0.3], True),
    ],
)
def test_loss_and_gradient_against_float64(make_trainer, tmp_path, loss_type, loss_weights, safeguard):
    rows, beta = make_pairs(4), 25.0
    trainer = make_trainer(
        rows, latents_cache_dir=str(tmp_path / "latents"), loss_type=loss_type, loss_weights=loss_weights,
        safeguard=safeguard, beta=beta, shuffle_dataset=False,
        per_device_train_batch_size=4,
    )  # fmt: skip
    warm(trainer)
    reference, calls = Float64Reference(trainer, rows), record_velocities(trainer)
    (files,) = trainer.get_train_dataloader()
    if safeguard:
        stretch_rejected(files)
        reference.encoded = [(conditions, chosen, 2 * chosen) for conditions, chosen, _ in reference.encoded]
    loss = trainer.compute_loss(trainer.model, files)
    loss.backward()
    # One pass of chosen and rejected together for each size, and one of the reference.
    assert [(len(x), grad) for x, _, grad in calls] == [(4, True), (4, False)] * 2
    for k in (0, 2):
        assert torch.equal(calls[k][0], calls[k + 1][0]) and torch.equal(calls[k][1], calls[k + 1][1])

    names = [loss_type] if isinstance(loss_type, str) else loss_type
    weights = loss_weights or [1.0] * len(names)
    expected, margins, scales, seen = 0.0, [], [], {}
    for (noisy, sigmas, _), members in ((calls[0], (0, 2)), (calls[2], (1, 3))):
        for j, i in enumerate(members):
            assert sigmas[j] == sigmas[j + 2] and 0.05 < sigmas[j] < 1
            (e_w, e_l), (ref_w, ref_l), residuals = reference.errors(i, noisy[[j, j + 2]], sigmas[j])
            r_w, r_l = (-beta / 2 * (e.item() - ref) for e, ref in ((e_w, ref_w), (e_l, ref_l)))
            margin, scale = r_w - r_l, 1.0
            if safeguard and (alignment := residuals[0] @ residuals[1]) > 0:
                scale = min(1.0, residuals[0] @ residuals[0] / alignment)
            terms = [LOSSES[name][0](margin, e_w.item()) for name in names]
            expected += sum(w * term for w, term in zip(weights, terms, strict=True)) / 4
            by_margin, by_error = (
                sum(w * LOSSES[name][1](margin)[k] for w, name in zip(weights, names, strict=True)) for k in (0, 1)
            )
            to_chosen, to_rejected = by_error - beta / 2 * by_margin, scale * beta / 2 * by_margin
            ((to_chosen * e_w + to_rejected * e_l) / 4).backward()
            margins.append(margin)
            scales.append(scale)
            for name, value in {
                "rewards/chosen": r_w, "rewards/rejected": r_l, "rewards/margins": margin,
                "rewards/accuracies": float(margin > 0), "flow_loss/chosen": e_w.item(),
                "flow_loss/rejected": e_l.item(),
                "flow_loss/reference_chosen": ref_w, "flow_loss/reference_rejected": ref_l,
            }.items():  # fmt: skip
                seen.setdefault(name, []).append(value)
    if safeguard:
        assert max(scales) < 0.95
    else:
        assert min(margins) < -0.05 and max(margins) > 0.05  # margins of both signs, far from rounding
    assert loss.item() == pytest.approx(expected, rel=2e-4, abs=2e-5)
    logs = {"loss": 0.0}
    trainer.log(logs)
    for name, values in seen.items():
        assert logs[name] == pytest.approx(np.mean(values), rel=1e-3, abs=2e-4), name
    parameters, gradients = dict(trainer.model.named_parameters()), reference.gradients()
    assert {name for name, p in parameters.items() if p.requires_grad} == gradients.keys()
    for name, gradient in gradients.items():
        largest = gradient.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(parameters[name].grad.double(), gradient, rtol=2e-3, atol=2e-3 * largest, msg=name)


def losses_of(trainer, files):
    """Loss and gradient of a microbatch."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, files)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_the_safeguard_changes_the_gradient_and_not_the_loss(make_trainer, tmp_path):
    found = {}
    for safeguard in (False, True):
        folder = str(tmp_path / f"latents-{safeguard}")
        trainer = make_trainer(safeguard=safeguard, per_device_train_batch_size=6, beta=20.0, latents_cache_dir=folder)
        warm(trainer)
        (files,) = trainer.get_train_dataloader()
        stretch_rejected(files)
        found[safeguard] = losses_of(trainer, files)
        logs = {"loss": 0.0}
        trainer.log(logs)
        assert ("safeguard_scale" in logs) == safeguard
    assert 0.1 < logs["safeguard_scale"] < 0.95
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)
    differences = [(found[True][1][name] - g).norm() / g.norm() for name, g in found[False][1].items()]
    assert min(differences) > 0.02


@pytest.mark.parametrize(
    ("loss_type", "warmed"), [("sigmoid", False), ("sigmoid", True), ("ipo", True), ("hinge", True)]
)
def test_identical_edits_teach_nothing(make_trainer, loss_type, warmed):
    pairs = make_pairs(4)
    same = Dataset.from_list([{**row, "rejected": row["chosen"]} for row in pairs])
    found = {}
    for name, dataset in (("same", same), ("different", pairs)):
        trainer = make_trainer(dataset, per_device_train_batch_size=4, loss_type=loss_type)
        if warmed:
            warm(trainer)
        (files,) = trainer.get_train_dataloader()
        found[name] = losses_of(trainer, files)
    exact = {"sigmoid": torch.tensor(2.0).log().item(), "ipo": 0.25, "hinge": 1.0}[loss_type]
    assert found["same"][0] == exact
    if loss_type == "sigmoid":
        assert exact == pytest.approx(math.log(2))
    largest = max(g.abs().max().item() for g in found["different"][1].values())
    # What is left, if anything, is the rounding of two gradients that cancel out.
    assert largest > 1
    assert max(g.abs().max().item() for g in found["same"][1].values()) < 1e-5 * largest


def test_the_first_loss_is_that_of_no_margin(make_trainer):
    # The policy is the reference still, to the last bit, whatever the noise.
    trainer = make_trainer(max_steps=1, beta=1e6)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert (log["rewards/chosen"], log["rewards/rejected"], log["rewards/margins"]) == (0, 0, 0)
    assert log["flow_loss/chosen"] == log["flow_loss/reference_chosen"] > 0
    assert log["rewards/accuracies"] == 0  # no preference is not the right one


def test_training_prefers_the_chosen_edit(make_trainer):
    # Red rather than blue: one direction for all pairs, or little could be learned of so few.
    pairs = Dataset.from_list(
        [
            {**row, "chosen": plain(row["image"], (255, 40, 40)), "rejected": plain(row["image"], (20, 160, 255))}
            for row in make_pairs(4)
        ]
    )
    trainer = make_trainer(
        pairs, eval_dataset=pairs, max_steps=30, gradient_accumulation_steps=1, per_device_train_batch_size=4,
        learning_rate=1e-3, beta=100.0,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_flow_loss/chosen"] < before["eval_flow_loss/chosen"] - 0.01
    assert after["eval_flow_loss/rejected"] > before["eval_flow_loss/rejected"] + 0.01
    assert after["eval_loss"] < 0.6 < before["eval_loss"]
    assert after["eval_rewards/chosen"] > 0 > after["eval_rewards/rejected"]
    assert after["eval_rewards/accuracies"] == 1
    for name in ("eval_flow_loss/reference_chosen", "eval_flow_loss/reference_rejected"):
        assert after[name] == before[name]  # the reference stays what it was


def test_sft_learns_the_chosen_edit(make_trainer):
    pairs = make_pairs(2)
    trainer = make_trainer(
        pairs, eval_dataset=pairs, max_steps=20, gradient_accumulation_steps=1, loss_type="sft", learning_rate=3e-3
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(before["eval_flow_loss/chosen"])
    assert after["eval_flow_loss/chosen"] < before["eval_flow_loss/chosen"] - 0.01


def test_metrics_and_parameters(make_trainer):
    trainer = make_trainer(max_steps=3, loss_type=["sigmoid", "sft"])
    before = adapter_weights(trainer)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert [name for name, weight in adapter_weights(trainer).items() if torch.equal(weight, before[name])] == []
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(weight, now[name]) for name, weight in frozen.items())
    for log in trainer.state.log_history[:3]:
        for name in [
            "loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
            "flow_loss/chosen", "flow_loss/rejected", "flow_loss/reference_chosen", "flow_loss/reference_rejected",
        ]:  # fmt: skip
            assert isinstance(log[name], float) and math.isfinite(log[name]), name
        assert log["rewards/margins"] == pytest.approx(log["rewards/chosen"] - log["rewards/rejected"], abs=1e-3)
        assert log["loss"] == pytest.approx(log["loss/sigmoid"] + log["loss/sft"], rel=1e-5)


def test_metrics_are_means_over_pairs(make_trainer):
    # Microbatches of 2, 2, 2 and 1 pairs in one log: each pair counts once.
    trainer = make_trainer(make_pairs(7), max_steps=1, gradient_accumulation_steps=4, shuffle_dataset=False)
    rows = []
    losses = trainer._losses

    def recorded(model, pairs, generators):
        result = losses(model, pairs, generators)
        rows.extend(result[1]["flow_loss/rejected"].tolist())
        return result

    trainer._losses = recorded
    trainer.train()
    assert len(rows) == 7
    assert trainer.state.log_history[0]["flow_loss/rejected"] == pytest.approx(np.mean(rows), rel=1e-6)


def assert_own_latents(seen, rows, tolerance=1e-5):
    by_id = dict(zip(rows["id"], encoded_by_hand(rows), strict=True))
    for pair in seen:
        conditions, chosen, rejected = by_id[pair.id]
        torch.testing.assert_close(pair.chosen, chosen, rtol=0, atol=tolerance)
        torch.testing.assert_close(pair.rejected, rejected, rtol=0, atol=tolerance)
        assert pair.conditions.tensors.keys() == conditions.tensors.keys()
        for name, tensor in conditions.tensors.items():
            torch.testing.assert_close(pair.conditions.tensors[name], tensor, rtol=0, atol=tolerance)
    # No two are alike: swapped ones would be seen.
    latents = [tensor for pair in by_id.values() for tensor in pair[1:]]
    assert all((x - y).abs().max() > 1e3 * tolerance for x, y in combinations(latents, 2) if x.shape == y.shape)


def test_shuffling_and_bucketing_keep_pairs_together(make_trainer):
    rows = make_pairs(7, sizes=((64, 64), (128, 64), (64, 128)))
    trainer = make_trainer(
        rows, num_train_epochs=3, max_steps=-1, per_device_train_batch_size=3, gradient_accumulation_steps=1
    )
    calls = record_pairs(trainer)
    trainer.train()
    assert [len(pairs) for pairs in calls] == [3, 3, 1] * 3
    seen = [pair for pairs in calls for pair in pairs]
    orders = [[pair.id for pair in seen[start : start + 7]] for start in (0, 7, 14)]
    assert all(sorted(order) == sorted(rows["id"]) for order in orders)
    assert len(set(map(tuple, [*orders, rows["id"]]))) == 4  # another order in each epoch, none of them the dataset's
    assert_own_latents(seen, rows)


def test_without_shuffling_the_order_is_the_datasets(make_trainer):
    trainer = make_trainer(num_train_epochs=2, max_steps=-1, shuffle_dataset=False)
    calls = record_pairs(trainer)
    trainer.train()
    assert [pair.id for pairs in calls for pair in pairs] == 2 * make_pairs()["id"][:]


def test_each_loss_is_at_its_pairs_place(make_trainer):
    # Sizes whose buckets are no mere swap of places: a permutation taken for its inverse would be seen.
    sizes = [(64, 64), (128, 64), (64, 64), (64, 128), (128, 64), (64, 64)]
    trainer = make_trainer(make_pairs(6, sizes), per_device_train_batch_size=6, beta=20.0, safeguard=True)
    warm(trainer)
    (files,) = trainer.get_train_dataloader()
    pairs = [trainer._load_pair(file) for file in files]

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(6)]

    with torch.no_grad():
        losses, metrics = trainer._losses(trainer.model, pairs, generators())
        alone = [trainer._losses(trainer.model, [pair], [g]) for pair, g in zip(pairs, generators(), strict=True)]
    torch.testing.assert_close(losses, torch.cat([loss for loss, _ in alone]), rtol=1e-3, atol=1e-4)
    assert losses.sort().values.diff().min() > 1e-3
    for name, values in metrics.items():
        expected = torch.cat([m[name] for _, m in alone])
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-4, msg=name)


def test_noise_is_new_in_every_epoch_and_the_pairs_own(make_trainer):
    def noise_of(**options):
        trainer = make_trainer(num_train_epochs=2, max_steps=-1, gradient_accumulation_steps=1, **options)
        pairs, calls = record_pairs(trainer), record_velocities(trainer)
        trainer.train()
        found, calls = {}, iter(calls)
        for microbatch in pairs:
            left = dict(enumerate(microbatch))
            while left:
                noisy, sigmas, _ = next(calls)
                next(calls)  # the reference's
                count = len(noisy) // 2
                shape = next(iter(left.values())).conditions.bucket
                members = [i for i, pair in left.items() if pair.conditions.bucket == shape]
                assert len(members) == count
                for j, i in enumerate(members):
                    pair, s = left.pop(i), sigmas[j]
                    found.setdefault(pair.id, []).append((s.item(), ((noisy[j] - (1 - s) * pair.chosen) / s)))
        return found

    shuffled, alone = noise_of(), noise_of(per_device_train_batch_size=1, shuffle_dataset=False)
    firsts = []
    for case, draws in shuffled.items():
        (first, noise), (second, other) = draws
        assert first != second and abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.5
        firsts.append(first)
        # Neither the order nor the batch changes it.
        assert [s for s, _ in alone[case]] == [first, second]
        torch.testing.assert_close(alone[case][0][1], noise, rtol=0, atol=1e-4)
    assert len(set(firsts)) == 6
    other_seed = noise_of(seed=1)
    assert all(other_seed[case][0][0] != draws[0][0] for case, draws in shuffled.items())


@pytest.mark.parametrize("sampling", ["logit_normal", "uniform"])
def test_noise_levels_are_shifted_for_each_size(make_trainer, sampling):
    def sigmas_of(**options):
        trainer = make_trainer(sigma_sampling=sampling, per_device_train_batch_size=2, **options)
        calls = record_velocities(trainer)
        for files in trainer.get_train_dataloader():
            trainer.compute_loss(trainer.model, files)
        return {
            num_tokens: [s.item() for x, sigmas, _ in calls for s in sigmas if x.shape[1] == num_tokens]
            for num_tokens in (16, 18)
        }

    if sampling == "uniform":
        found = sigmas_of(logit_mean=50.0)
        assert found == sigmas_of() and len(set(found[16] + found[18])) == 6  # for the other kind of drawing
        return
    for num_tokens, sigmas in sigmas_of(logit_std=1e-6).items():
        mu = 0.5 + 0.4 * (num_tokens - 256) / (8192 - 256)  # Qwen-Image's
        half, last = (np.exp(mu) / (np.exp(mu) + 1 / t - 1) for t in (1 / 2, 1 / 4))
        assert len(sigmas) == 12
        assert sigmas == pytest.approx([1 - (1 - half) * 0.98 / (1 - last)] * 12, abs=4e-6)
    assert min(sum(sigmas_of(logit_mean=8.0).values(), [])) > 0.95
    assert max(sum(sigmas_of(logit_mean=-8.0).values(), [])) < 0.05


def test_evaluation_has_fixed_noise(make_trainer):
    pairs = make_pairs(5)
    trainer = make_trainer(make_pairs(4), eval_dataset=pairs, eval_strategy="steps", eval_steps=1)
    calls, seen = record_velocities(trainer), record_pairs(trainer)
    first = trainer.evaluate()
    assert [pair.id for part in seen for pair in part] == pairs["id"][:]
    noisy = list(calls)
    calls.clear()
    torch.rand(3)
    again = trainer.evaluate()
    assert results(again) == results(first)  # to the last bit
    trainer.train()
    calls.clear()
    trained = trainer.evaluate()
    assert len(calls) == len(noisy) > 0
    for (x, sigma, _), (x_before, sigma_before, _) in zip(calls, noisy, strict=True):
        assert torch.equal(x, x_before) and torch.equal(sigma, sigma_before)
    assert len({s.item() for _, sigmas, _ in calls for s in sigmas}) == 5
    assert trained["eval_flow_loss/reference_chosen"] == first["eval_flow_loss/reference_chosen"]
    assert trained["eval_loss"] != first["eval_loss"]
    # What was measured on the way is what is measured now; a checkpoint's weights are all that counts.
    (last,) = [log for log in trainer.state.log_history if log.get("step") == 2 and "eval_loss" in log][:1]
    assert last["eval_loss"] == trained["eval_loss"]
    other = make_trainer(make_pairs(2), eval_dataset=pairs, per_device_eval_batch_size=5)
    other.model.load_state_dict(trainer.model.state_dict())
    batched = other.evaluate()
    for name, value in results(trained).items():
        if name != "epoch":
            assert batched[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name


def test_evaluation_is_the_mean_over_the_pairs(make_trainer):
    # 5 pairs in batches of 2: the last one counts as much as the others.
    trainer = make_trainer(make_pairs(2), eval_dataset=make_pairs(5), beta=20.0)
    warm(trainer)
    metrics = trainer.evaluate()
    single = [trainer.evaluate(make_pairs(5).select([i])) for i in range(5)]
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_flow_loss/rejected"):
        assert metrics[name] == pytest.approx(np.mean([m[name] for m in single]), rel=1e-4, abs=1e-5), name
    assert len({m["eval_loss"] for m in single}) == 5


def test_evaluation_leaves_training_alone(make_trainer, tmp_path):
    plain = make_trainer(output_dir=tmp_path / "a")
    plain.train()
    watched = make_trainer(
        output_dir=tmp_path / "b", eval_dataset=make_pairs(3), eval_strategy="steps", eval_steps=1, eval_on_start=True
    )
    watched.train()
    assert_equal_weights(adapter_weights(plain), adapter_weights(watched))
    assert history(plain)[:2] == [log for log in history(watched) if "loss" in log]


def test_evaluation_before_and_after_the_first_step_is_the_same(make_trainer):
    # In mixed precision as well, where preparing the model for training changes how it computes.
    trainer = make_trainer(
        eval_dataset=make_pairs(3), bf16=True, max_steps=1, learning_rate=0.0, gradient_accumulation_steps=1
    )
    warm(trainer)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("eval_loss", "eval_flow_loss/chosen", "eval_flow_loss/reference_rejected"):
        assert after[name] == before[name], name


def test_several_evaluation_sets_and_the_best_model(make_trainer):
    trainer = make_trainer(
        eval_dataset={"a": make_pairs(2), "b": make_pairs(3)}, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_a_loss",
    )  # fmt: skip
    trainer.train()
    logs = [log["eval_a_loss"] for log in trainer.state.log_history if "eval_a_loss" in log]
    assert trainer.state.best_metric == min(logs)
    assert any("eval_b_rewards/margins" in log for log in trainer.state.log_history)


def test_pairs_are_encoded_once(make_trainer, tmp_path, monkeypatch):
    counts = count_encodings(monkeypatch)
    options = dict(latents_cache_dir=str(tmp_path / "latents"), num_train_epochs=3, max_steps=-1)
    held_out = make_pairs(8).select([6, 7])
    trainer = make_trainer(eval_dataset=held_out, eval_strategy="epoch", **options)
    trainer.train()
    trainer.evaluate()
    assert counts == {"encode": 8, "encode_image": 3 * 8}  # source, chosen and rejected
    again = make_trainer(output_dir=tmp_path / "b", eval_dataset=held_out, eval_strategy="epoch", **options)
    again.train()
    assert counts == {"encode": 8, "encode_image": 3 * 8}
    assert_equal_weights(adapter_weights(trainer), adapter_weights(again))
    # A selection of known pairs is known as well, whatever else is in the table.
    some = make_trainer(make_pairs().select([4, 1, 2]).add_column("note", ["x"] * 3), **options)
    some.train()
    assert counts["encode"] == 8


def other_weights(name):
    pipeline = edit_pipeline()
    module = {"vae": pipeline.vae.encoder, "text_encoder": pipeline.text_encoder}[name]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.01)
    return pipeline


def one_other_filter():
    """Most of the VAE is as it was; a filter in the middle of one layer is not."""
    pipeline = edit_pipeline()
    with torch.no_grad():
        pipeline.vae.encoder.conv_out.weight[-1].neg_()
    return pipeline


def other_scale():
    pipeline = edit_pipeline()
    pipeline.vae.register_to_config(latents_std=[2.0, 2.0, 2.0, 2.0])
    return pipeline


@pytest.mark.parametrize(
    ("change", "encoded"),
    [
        (dict(resolution=96), 4),
        (dict(pipeline=lambda: edit_pipeline(seed=1)), 4),
        (dict(pipeline=lambda: other_weights("vae")), 4),
        (dict(pipeline=lambda: other_weights("text_encoder")), 4),
        (dict(pipeline=one_other_filter), 4),
        (dict(pipeline=other_scale), 4),
        (dict(row=lambda row: {"prompt": row["prompt"] + "!"}), 1),
        (dict(row=lambda row: {"image": photo(64, 64, seed=50)}), 1),
        (dict(row=lambda row: {"chosen": photo(64, 64, seed=51)}), 1),
        (dict(row=lambda row: {"rejected": photo(64, 64, seed=52)}), 1),
        (dict(row=lambda row: {"chosen": row["rejected"], "rejected": row["chosen"]}), 1),
        (dict(row=lambda row: {"task": "another", "score_chosen": 0.0}), 0),
        (dict(beta=1.0, seed=3, learning_rate=1.0), 0),
    ],
    ids=["resolution", "seed", "vae", "text_encoder", "one_filter", "vae_scale", "prompt", "image", "chosen",
        "rejected", "swapped", "task", "options"],
)  # fmt: skip
def test_what_changed_is_encoded_again(make_trainer, monkeypatch, tmp_path, change, encoded):
    change, folder = dict(change), str(tmp_path / "latents")
    rows, counts = make_pairs(4, sizes=((64, 64),)), count_encodings(monkeypatch)
    make_trainer(rows, latents_cache_dir=folder).get_train_dataloader()
    assert counts["encode"] == 4
    rows, edit = list(rows), change.pop("row", lambda row: {})
    rows[2] |= edit(rows[2])
    pipeline = change.pop("pipeline", edit_pipeline)()
    trainer = make_trainer(Dataset.from_list(rows), pipeline, latents_cache_dir=folder, **change)
    files = trainer.get_train_dataloader().dataset
    assert counts["encode"] == 4 + encoded
    if "resolution" not in change:
        seen = [trainer._load_pair(file) for file in files]
        for pair, row in zip(seen, rows, strict=True):
            assert pair.id == row["id"]
        by_hand = encoded_by_hand(rows, pipeline)
        for pair, (conditions, chosen, rejected) in zip(seen, by_hand, strict=True):
            torch.testing.assert_close(pair.chosen, chosen, rtol=0, atol=1e-5)
            torch.testing.assert_close(pair.rejected, rejected, rtol=0, atol=1e-5)
            for name, tensor in conditions.tensors.items():
                torch.testing.assert_close(pair.conditions.tensors[name], tensor, rtol=0, atol=1e-5)


def test_another_pipeline_with_the_same_cache(make_trainer, monkeypatch, tmp_path):
    # The two Qwen pipelines share text encoder and VAE, but not how they show the image to the text encoder.
    folder = str(tmp_path / "latents")
    make_trainer(make_pairs(2), latents_cache_dir=folder).get_train_dataloader()
    counts = count_encodings(monkeypatch)
    trainer = make_trainer(make_pairs(2), tiny_qwen_image_edit_pipeline(), latents_cache_dir=folder)
    trainer.get_train_dataloader()
    assert counts["encode"] == 2


def test_latents_are_in_the_output_folder_by_default_and_are_not_uploaded(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(latents_cache_dir=None, max_steps=1)
    trainer.train()
    trainer.save_model()
    out = Path(trainer.args.output_dir)
    assert len([file for file in out.rglob("*.pt") if "rng_state" not in file.name]) == 6
    uploaded = []

    def upload_folder(self, folder_path, allow_patterns=None, **kwargs):
        names = [str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()]
        uploaded.extend(filter_repo_objects(names, allow_patterns=allow_patterns))

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(trainer, "init_hf_repo", lambda *args, **kwargs: None)
    trainer.hub_model_id = "someone/tiny"
    trainer.push_to_hub()
    assert {"pytorch_lora_weights.safetensors", "README.md"} <= set(uploaded)
    # No latents, which take gigabytes and are the images of a dataset that may be private, and nothing pickled
    assert {Path(name).suffix for name in uploaded} == {".safetensors", ".json", ".md", ".png", ".txt"}


def test_images_as_paths_and_lists(make_trainer, tmp_path):
    rows = make_pairs(4)
    make_trainer(rows)
    paths = []
    for i, row in enumerate(rows):
        names = {name: str(tmp_path / f"{i}_{name}.png") for name in ("image", "chosen", "rejected")}
        for name, path in names.items():
            row[name].save(path)
        paths.append({"id": row["id"], "prompt": row["prompt"], **names})
    text = Dataset.from_list(paths)
    as_list = Dataset.from_list(
        [{**{k: v for k, v in row.items() if k != "image"}, "images": [row["image"]]} for row in rows],
        features=Features({
            **{k: v for k, v in rows.features.items() if k != "image"}, "images": List(Image()),
        }),
    )  # fmt: skip
    expected = make_trainer(rows, output_dir=tmp_path / "a")
    expected.train()
    for i, dataset in enumerate([text, as_list]):
        trainer = make_trainer(dataset, output_dir=tmp_path / f"b{i}")
        trainer.train()
        assert_equal_weights(adapter_weights(expected), adapter_weights(trainer))


def test_paths_of_either_text_type(make_trainer, tmp_path):
    # Tables from polars have large strings.
    photo(64, 64).save(tmp_path / "x.png")
    path = str(tmp_path / "x.png")
    dataset = Dataset.from_list([{"prompt": "x", "image": path, "chosen": path, "rejected": path}])
    large = Features({name: Value("large_string") for name in dataset.features})
    assert make_trainer(dataset.cast(large)).get_train_dataloader() is not None


def test_several_references(make_trainer):
    rows = [
        {"prompt": "Put it there", "images": [photo(64, 64, i), photo(64, 128, i)], "chosen": photo(64, 128, 10 + i),
         "rejected": photo(64, 128, 20 + i)} for i in range(4)
    ]  # fmt: skip
    images = {"chosen": Image(), "rejected": Image()}
    features = Features({"prompt": Value("string"), "images": List(Image()), **images})
    trainer = make_trainer(Dataset.from_list(rows, features=features))
    calls = record_pairs(trainer)
    trainer.train()
    assert {pair.id for pairs in calls for pair in pairs} == {"0", "1", "2", "3"}  # without ids, their rows
    assert calls[0][0].conditions.reference_sizes == ((64, 64), (96, 48))
    with pytest.raises(ValueError, match="2 reference images, but the pipeline takes at most 1"):
        make_trainer(Dataset.from_list(rows, features=features), tiny_kontext_pipeline())


def planted(column, value, row=1, count=4) -> Dataset:
    """Pairs of which one has something else in a column. Images are left encoded."""
    pairs = make_pairs(count)
    for name in ("image", "chosen", "rejected"):
        pairs = pairs.cast_column(name, Image(decode=False))
    return pairs.map(lambda r, i: {column: value} if i == row else {}, with_indices=True)


def png(width, height) -> dict:
    row = Dataset.from_list([{"image": photo(width, height)}]).cast_column("image", Image(decode=False))[0]
    return row["image"]


BROKEN = {"bytes": b"no image", "path": None}
MISSING = {"bytes": None, "path": "/nowhere/x.png"}


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("image", BROKEN, "'case-1' has an image that cannot be decoded"),
        ("chosen", BROKEN, "'case-1' has a chosen image that cannot be decoded"),
        ("rejected", BROKEN, "'case-1' has a rejected image that cannot be decoded"),
        ("rejected", MISSING, "'case-1' has a rejected image that does not exist.*nowhere"),
        ("image", None, "'case-1' has no image"),
        ("chosen", None, "'case-1' has no chosen image"),
        ("rejected", None, "'case-1' has no rejected image"),
        ("rejected", png(64, 64), "'case-1' has a chosen image of 128 x 64 pixels and a rejected one of 64 x 64"),
        ("image", png(64, 64), "'case-1' have 128 x 64 pixels.*64 x 64 at resolution=64.*Crop"),
    ],
)
def test_pairs_that_cannot_be_used(make_trainer, caplog, column, value, message):
    dataset = planted(column, value)
    with pytest.raises(ValueError, match=f"{message}.*on_bad_case='skip'"):
        make_trainer(dataset).train()
    with pytest.raises(ValueError, match=message):
        make_trainer(eval_dataset=dataset).evaluate()
    trainer = make_trainer(
        dataset, eval_dataset=dataset, on_bad_case="skip", num_train_epochs=1, max_steps=-1,
        gradient_accumulation_steps=1, learning_rate=0.0,
    )  # fmt: skip
    calls = record_pairs(trainer)
    trainer.train()
    assert re.search(message, caplog.text)
    ids = [pair.id for pairs in calls for pair in pairs]
    assert sorted(ids) == ["case-0", "case-2", "case-3"]
    calls.clear()
    metrics = trainer.evaluate()
    assert [pair.id for pairs in calls for pair in pairs] == ["case-0", "case-2", "case-3"]
    assert trainer.state.log_history[0]["bad_cases"] == metrics.pop("eval_bad_cases") == 1
    good = trainer.evaluate(make_pairs(4).select([0, 2, 3]))
    assert results(metrics) == results(good)


def test_not_one_usable_pair(make_trainer):
    dataset = planted("chosen", BROKEN, row=0, count=1)
    with pytest.raises(ValueError, match="No case of train_dataset can be used"):
        make_trainer(dataset, on_bad_case="skip").train()


def test_edits_of_their_sources_shape_are_always_taken(make_trainer):
    # Few latents make coarse sizes: at 64 pixels a 4:3 source becomes 80 x 48. Its edits do so with it.
    rows = [{"prompt": "x", "image": photo(400, 300), "chosen": photo(400, 300, 1), "rejected": photo(400, 300, 2)}]
    trainer = make_trainer(Dataset.from_list(rows))
    assert len(trainer.get_train_dataloader().dataset) == 1


def test_edits_as_the_model_makes_them_are_taken(make_trainer):
    rows = [{"prompt": "x", "image": photo(400, 300), "chosen": photo(80, 48, 1), "rejected": photo(80, 48, 2)}]
    trainer = make_trainer(Dataset.from_list(rows))
    assert len(trainer.get_train_dataloader().dataset) == 1


def test_bad_datasets(make_trainer):
    pairs = make_pairs()
    for column in ("chosen", "rejected", "prompt"):
        with pytest.raises(ValueError, match=f"train_dataset has no column '{column}'.*columns are"):
            make_trainer(pairs.remove_columns(column))
        with pytest.raises(ValueError, match=f"eval_dataset has no column '{column}'"):
            make_trainer(eval_dataset=pairs.remove_columns(column))
    with pytest.raises(ValueError, match="no column 'image' .* or 'images'"):
        make_trainer(pairs.remove_columns("image"))
    with pytest.raises(ValueError, match=r"eval_dataset\['b'\] has no column 'rejected'"):
        make_trainer(eval_dataset={"a": pairs, "b": pairs.remove_columns("rejected")})
    with pytest.raises(ValueError, match="has no column 'chosen'"):
        make_trainer().evaluate(pairs.remove_columns("chosen"))
    with pytest.raises(ValueError, match="'chosen' of train_dataset must hold images or their paths"):
        make_trainer(pairs.remove_columns("chosen").add_column("chosen", list(range(6))))
    with pytest.raises(ValueError, match="Row 3 of train_dataset has the id 'a' of row 0.*unique"):
        make_trainer(pairs.remove_columns("id").add_column("id", list("abcade")))
    with pytest.raises(ValueError, match="Row 3 of eval_dataset has the id 'a' of row 0"):
        make_trainer(eval_dataset=pairs.remove_columns("id").add_column("id", list("abcade")))
    with pytest.raises(ValueError, match="train_dataset is empty"):
        make_trainer(pairs.select([]))
    with pytest.raises(TypeError, match="must be a datasets.Dataset"):
        make_trainer(pairs.to_iterable_dataset())
    with pytest.raises(ValueError, match="train_dataset.* is required"):
        DPOEditTrainer(edit_pipeline(), make_config("unused"))
    with pytest.raises(ValueError, match="eval_dataset"):
        make_trainer().evaluate()


def test_bad_datasets_show_before_the_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="no column 'rejected'"):
        DPOEditTrainer("not/there", make_config(tmp_path), make_pairs().remove_columns("rejected"))


def test_bad_models(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="not a diffusers pipeline"):
        make_trainer(pipeline=str(tmp_path))
    with pytest.raises(ValueError, match="takes no guidance"):
        make_trainer(guidance_scale=3.0)
    with pytest.raises(ValueError, match="lora_dropout=0.1 must be 0"):
        make_trainer(peft_config=LoraConfig(lora_dropout=0.1))
    with pytest.raises(ValueError, match="not_a_module"):
        make_trainer(peft_config=LoraConfig(target_modules=["not_a_module"]))
    with pytest.raises(TypeError, match="must be a LoraConfig, but is a str"):
        make_trainer(peft_config="lora")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(loss_type="dpo"), "loss_type=.*'dpo'.* must be one or several of .*sigmoid.*ipo.*hinge.*sft"),
        (dict(loss_type=["sigmoid", "nce"]), "loss_type=.*'nce'.* must be"),
        (dict(loss_type=[]), "loss_type=.* must be"),
        (dict(loss_weights=[1.0, 2.0]), "loss_weights has 2 entries, but loss_type has 1"),
        (dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0]), "loss_weights has 1 entries, but loss_type has 2"),
        (dict(beta=0.0), "beta=0.0 must be above 0"),
        (dict(beta=-1.0), "beta=-1.0 must be above 0"),
        (dict(beta=math.nan), "beta=nan must be"),
        (dict(logit_std=0.0), "logit_std=0.0 must be above 0"),
        (dict(sigma_sampling="normal"), "sigma_sampling='normal' is not known: use one of .*logit_normal.*uniform"),
        (dict(on_bad_case="ignore"), "on_bad_case='ignore' is not known: use one of .*error.*skip"),
        (dict(resolution=0), "resolution=0 must be at least 1"),
        (dict(num_inference_steps=0), "num_inference_steps=0 must be at least 1"),
        (dict(rollout_batch_size=0), "rollout_batch_size=0 must be at least 1"),
        (dict(true_cfg_scale=0.5), "true_cfg_scale=0.5 must be at least 1"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


def test_defaults(tmp_path):
    config = DPOEditConfig(str(tmp_path), use_cpu=True)
    assert (config.loss_type, config.loss_weights, config.safeguard) == (["sigmoid"], None, False)
    assert config.bf16 and config.gradient_checkpointing and config.sigma_sampling == "logit_normal"
    assert DPOEditConfig(str(tmp_path), use_cpu=True, loss_type="ipo").loss_type == ["ipo"]


@pytest.mark.parametrize(
    "options",
    [
        # 7 pairs: 4 microbatches and 2 updates an epoch
        dict(save_steps=3, per_device_train_batch_size=2),
        # The last update of an epoch has fewer microbatches; the checkpoint lies in the middle of it
        dict(save_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=3),
        # Between two epochs
        dict(save_steps=2, per_device_train_batch_size=2, warmup_steps=2, lr_scheduler_type="linear"),
    ],
    ids=["in the second epoch", "uneven", "between epochs"],
)
def test_resume_is_exact(make_trainer, tmp_path, options):
    options = dict(
        dataset=make_pairs(7), eval_dataset=make_pairs(9).select([7, 8]), num_train_epochs=3, max_steps=-1,
        save_strategy="steps", eval_strategy="steps", eval_steps=2, **options,
    )  # fmt: skip
    through = make_trainer(output_dir=tmp_path / "a", **options)
    through.train()
    resumed = make_trainer(output_dir=tmp_path / "b", **options)
    torch.rand(5)
    checkpoint = f"checkpoint-{options['save_steps']}"
    assert through.state.global_step > options["save_steps"] + 1
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / checkpoint))
    assert_equal_weights(adapter_weights(through), adapter_weights(resumed))
    # Trainer's mean loss of a whole run counts only what this process did.
    first, second = ([log for log in history(t) if "train_loss" not in log] for t in (through, resumed))
    assert first == second and len(first) > options["save_steps"] + 2


def test_two_runs_agree_bit_for_bit(make_trainer, tmp_path):
    first = make_trainer(output_dir=tmp_path / "a", max_steps=3)
    first.train()
    torch.rand(17)  # the global generator plays no part
    # Nor does it matter whether the latents were there already.
    second = make_trainer(output_dir=tmp_path / "b", max_steps=3, latents_cache_dir=str(tmp_path / "new"))
    torch.rand(17)
    second.train()
    assert_equal_weights(adapter_weights(first), adapter_weights(second))
    assert history(first) == history(second)
    other = make_trainer(output_dir=tmp_path / "c", max_steps=3, seed=1)
    other.train()
    assert history(first)[0] != history(other)[0]


def test_a_second_call_of_train_is_the_first_one_again(make_trainer):
    trainer = make_trainer(num_train_epochs=2, max_steps=-1, learning_rate=0.0)
    calls = record_pairs(trainer)
    trainer.train()
    first = [pair.id for pairs in calls for pair in pairs]
    logs = history(trainer)[:-1]
    calls.clear()
    trainer.train()
    assert [pair.id for pairs in calls for pair in pairs] == first
    assert history(trainer)[:-1] == logs


def test_dataloader_workers_change_nothing(make_trainer, tmp_path):
    # Workers and prefetching read ahead, at times before the epoch that they read for has begun.
    options = dict(num_train_epochs=2, max_steps=-1)
    plain = make_trainer(output_dir=tmp_path / "a", **options)
    plain.train()
    ahead = make_trainer(
        output_dir=tmp_path / "b", dataloader_num_workers=1, dataloader_persistent_workers=True, **options
    )
    ahead.train()
    assert_equal_weights(adapter_weights(plain), adapter_weights(ahead))


def test_gradient_checkpointing_changes_nothing(make_trainer, tmp_path):
    plain = make_trainer(output_dir=tmp_path / "a")
    plain.train()
    saving = make_trainer(output_dir=tmp_path / "b", gradient_checkpointing=True)
    saving.train()
    assert saving.policy.pipeline.transformer.gradient_checkpointing
    assert_equal_weights(adapter_weights(plain), adapter_weights(saving))


@pytest.mark.parametrize("loaded", [False, True])
def test_bfloat16(make_trainer, tmp_path, loaded):
    pipeline = edit_pipeline()
    if not loaded:
        pipeline.save_pretrained(tmp_path / "base")
        pipeline = str(tmp_path / "base")
    trainer = make_trainer(
        pipeline=pipeline, bf16=True, gradient_checkpointing=True, eval_dataset=make_pairs(3), beta=2000.0
    )
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert trainer.policy.pipeline.transformer.dtype == (torch.float32 if loaded else torch.bfloat16)
    before = adapter_weights(trainer)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    # Policy and reference round alike: beta would make a lot of the least difference.
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6) and first["rewards/chosen"] == 0
    assert second["rewards/chosen"] != 0 and math.isfinite(second["loss"])
    assert not any(torch.equal(weight, before[name]) for name, weight in adapter_weights(trainer).items())
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def prediction(policy, model, row):
    conditions = policy.encode([row["image"]], row["prompt"], None, 64)
    noise = torch.randn(1, conditions.num_tokens, conditions.num_channels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.velocity(model, noise, torch.tensor(0.6), policy.collate([conditions]), 1.0)


@pytest.mark.parametrize(
    "make_pipeline",
    [edit_pipeline, tiny_qwen_image_edit_pipeline, tiny_kontext_pipeline, tiny_klein_pipeline],
    ids=lambda make: make.__name__,
)
def test_every_policy_trains_and_its_lora_loads_in_plain_diffusers(make_trainer, tmp_path, make_pipeline):
    rows = make_pairs(4)
    trainer = make_trainer(rows, make_pipeline(), eval_dataset=rows, save_strategy="steps", save_steps=2)
    before = adapter_weights(trainer)
    trainer.train()
    assert [name for name, weight in adapter_weights(trainer).items() if torch.equal(weight, before[name])] == []
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    trainer.save_model(str(tmp_path / "lora"))
    trainer.model.eval()
    expected = prediction(trainer.policy, trainer.model, rows[1])
    for folder in (tmp_path / "lora", tmp_path / "out" / "checkpoint-2"):
        plain = make_pipeline()
        policy = policy_class(plain)(plain)
        without = prediction(policy, plain.transformer, rows[1])
        assert (without - expected).abs().max() > 1e-3
        plain.load_lora_weights(str(folder))
        torch.testing.assert_close(prediction(policy, plain.transformer, rows[1]), expected, rtol=0, atol=1e-6)


def test_the_model_card(make_trainer):
    pairs = make_pairs(4)
    trainer = make_trainer(pairs, eval_dataset=make_pairs(2), eval_strategy="steps", eval_steps=1, safeguard=True)
    trainer.train()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    card = (folder / "README.md").read_text()
    assert "Diffusion-DPO" in card and "2311.12908" in card and "wallace2024diffusiondpo" in card
    assert "Flow-GRPO" not in card and "flow-grpo" not in card
    assert re.search(r"!\[.*\]\(reward_curve\.png\)", card)
    for line in ("| `beta` | 2000.0 |", "| `safeguard` | True |", "| Steps trained | 2 |"):
        assert line in card
    for name in ("reward_curve.png", "before_after.png", "images/0_before.png", "images/1_after.png"):
        assert PILImage.open(folder / name).size[0] > 1
    drawn = PILImage.open(folder / "reward_curve.png").convert("RGB").getcolors(1_000_000)
    assert sum(max(color) - min(color) > 80 for _, color in drawn) > 10  # colored lines, not just axes


def test_a_dataset_from_disk(make_trainer, tmp_path):
    # As it comes from the Hub: parquet with images in it.
    make_pairs(4).to_parquet(tmp_path / "pairs.parquet")
    rows = load_dataset("parquet", data_files=str(tmp_path / "pairs.parquet"), split="train", cache_dir=str(tmp_path))
    trainer, expected = make_trainer(rows), make_trainer(make_pairs(4), output_dir=tmp_path / "b")
    trainer.train()
    expected.train()
    assert_equal_weights(adapter_weights(expected), adapter_weights(trainer))


def test_encoders_are_moved_once_for_all_pairs(make_trainer, tmp_path):
    trainer = make_trainer(latents_cache_dir=str(tmp_path / "fresh"))
    moves = []
    for name, module in trainer.policy.encoders.items():
        module.to = lambda device, name=name: moves.append(name)
    trainer.get_train_dataloader()
    assert sorted(moves) == ["text_encoder", "text_encoder", "vae", "vae"]
    trainer._encoded.clear()
    trainer.get_train_dataloader()  # all pairs are known: nothing is moved
    assert len(moves) == 4
