"""What passes of a case share is computed once in an update, and has the gradient of all of them."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hp_edit_trl import FlowGRPOEditConfig, FlowGRPOEditTrainer, FlowNFTEditConfig, FlowNFTEditTrainer
from hp_edit_trl.miniature.tiny import tiny_qwen_image_21_pipeline
from hp_edit_trl.policies import Prefixes, QwenImage21Policy
from hp_edit_trl.trainer.prefixes import TrainedPrefixes
from tests.helpers import make_cases, make_config, photo, redness


@pytest.fixture
def computed(monkeypatch):
    """The cases whose prefixes were computed, with whether that was for gradients."""
    calls, prefix = [], QwenImage21Policy.prefix

    def counted(self, model, conditions, cfg):
        calls.append((id(conditions), torch.is_grad_enabled()))
        return prefix(self, model, conditions, cfg)

    monkeypatch.setattr(QwenImage21Policy, "prefix", counted)
    return calls


@pytest.mark.parametrize(("checkpointing", "cfg"), [(True, 1.0), (False, 3.0)])
def test_gradients_are_those_of_a_recomputed_prefix(checkpointing, cfg, monkeypatch, computed):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # what is float32 everywhere is float64 here
    pipeline = tiny_qwen_image_21_pipeline()
    policy = QwenImage21Policy(pipeline)
    cases = [policy.encode([photo(64, 64, seed=i)], "Blur it", " ", 64) for i in range(3)]
    policy.dtype = torch.float64
    for block in pipeline.transformer.transformer_blocks:  # diffusers' norms round gradients to float32
        block.attn.norm_q, block.attn.norm_k = torch.nn.RMSNorm(16), torch.nn.RMSNorm(16)
    generator = torch.Generator().manual_seed(0)
    # Without a LoRA of `to_k` the first keys have no gradient.
    targets = policy.lora_target_modules if checkpointing else ["to_q", "to_v"]
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(pipeline.transformer, lora).double().train()
    if checkpointing:
        pipeline.transformer.enable_gradient_checkpointing(
            lambda *args: torch.utils.checkpoint.checkpoint(*args, use_reentrant=False)
        )
    # Batches of an update; the last one has a case that others had, and one of its own
    batches = [[cases[0]] * 2, [cases[0], cases[1]], [cases[1]] * 2, [cases[1], cases[2]]]
    data = [torch.randn(2, 16, 4, generator=generator) for _ in batches]
    weights = [p for p in model.parameters() if p.requires_grad]

    def gradients(prefixes):
        computed.clear()
        model.zero_grad()
        for number, (conditions, latents) in enumerate(zip(batches, data, strict=True)):
            batch = policy.collate(conditions)
            for step, sigma in enumerate((0.9, 0.4)):
                is_last = number == len(batches) - 1 and step == 1
                if prefixes is not None:
                    batch = prefixes.added(batch, model, is_last)
                velocity = policy.velocity(model, latents, torch.tensor(sigma), batch, cfg)
                (1000 * velocity.square().sum()).backward()  # as with a scale of the loss
            if prefixes is not None:
                prefixes.keep([case for later in batches[number + 1 :] for case in later])
        assert prefixes is None or not prefixes._kept
        return [weight.grad.clone() for weight in weights]

    expected = gradients(None)
    assert len(computed) == 2 * (1 + 2 + 1 + 2)
    shared = gradients(TrainedPrefixes(policy, cfg, lambda model: nullcontext()))
    assert [case for case, _ in computed] == list(map(id, cases))
    policy.has_prefix = False
    whole = gradients(None)
    assert not computed
    for one, other, third in zip(shared, expected, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10 * other.abs().max())
        torch.testing.assert_close(third, other, rtol=1e-9, atol=1e-10 * other.abs().max())


# The rollout's, then those of an update: trained ones, and those of the old policy or the model without its adapter
@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("grpo", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8,
                  "rollout_batch_size": 1}, (2, 2, 0)),
        ("grpo", {"beta": 0.1, "rollout_batch_size": 3, "gradient_checkpointing": True}, (2, 2, 2)),
        ("grpo", {"same_latent": True, "sde_window_size": 1, "num_trained_generations": 2,
                  "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, (2, 2, 0)),
        ("nft", {"beta": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, (2, 2, 4)),
    ],
)  # fmt: skip
def test_once_for_each_case_and_update(kind, options, expected, tmp_path, monkeypatch, computed):
    trainer_type, config = {
        "grpo": (FlowGRPOEditTrainer, FlowGRPOEditConfig), "nft": (FlowNFTEditTrainer, FlowNFTEditConfig),
    }[kind]  # fmt: skip
    if kind == "grpo":
        options = {"noise_level": 0.7, **options}
    args = make_config(tmp_path, config, max_steps=1, num_inference_steps=3, **options)
    # One size and length, so that shuffled microbatches may mix the cases
    cases = make_cases(2, sizes=((64, 64),)).remove_columns("prompt").add_column("prompt", ["Make it red"] * 2)

    def update():
        trainer = trainer_type(
            tiny_qwen_image_21_pipeline(), redness, args, cases, peft_config=LoraConfig(r=4, lora_alpha=8)
        )
        with torch.no_grad():
            for name, weight in trainer.model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        score, drop, sampled, gradients = trainer._generate_and_score, trainer._drop_bad_update, [], {}

        def scored(*arguments):
            samples = score(*arguments)
            sampled.append(len(computed))
            computed.clear()
            return samples

        def dropped(*arguments):
            gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
            drop(*arguments)

        trainer._generate_and_score, trainer._drop_bad_update = scored, dropped
        trainer.train()
        assert not trainer._prefixes._kept and not any(p._kept for p in trainer._other_prefixes.values())
        with_gradients = sum(grad for _, grad in computed)
        return gradients, (*sampled, with_gradients, len(computed) - with_gradients), trainer.state.log_history[0]

    gradients, counts, log = update()
    assert counts == expected
    if kind == "grpo" and args.per_device_train_batch_size == args.rollout_batch_size:
        assert log["logp_diff/step_0"] == log["logp_diff/step_1"] == 0

    for stored in (TrainedPrefixes, Prefixes):
        monkeypatch.setattr(stored, "added", lambda self, batch, *_: batch)
    computed.clear()
    recomputed, counts, _ = update()
    assert sum(counts) > sum(expected)
    assert gradients.keys() == recomputed.keys()
    for name, gradient in recomputed.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max(), msg=name)
