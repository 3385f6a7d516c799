"""What every policy has to keep to. A policy's tests subclass `PolicyContract` and say how its pipeline is called."""

import ast
import contextlib
import copy
import inspect
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

from hp_edit_trl import FlowGRPOEditTrainer
from hp_edit_trl.flow.dynamics import log_prob, transition
from hp_edit_trl.policies import EditConditions, bucketed, decode, edit_policy, policy_class, rollout
from hp_edit_trl.utils.images import to_rgb
from tests.helpers import make_cases, make_config, photo, redness


STEPS = 3


def generator(seed):
    return torch.Generator().manual_seed(seed)


class PolicyContract:
    """
    Class attributes:
        several_references: Whether a case may have more than one.
        resolution, square, wide: Sizes at which the pipeline takes references as they are.
    """

    several_references = False
    resolution, square, wide = 64, (64, 64), (128, 32)

    def make_pipeline(self):
        raise NotImplementedError

    def call(self, pipeline, images, prompt, negative_prompt, cfg, height, width, steps=STEPS, **kwargs):
        """The image that the pipeline itself gives at this size, with references at the target's resolution."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def policy(self):
        pipeline = self.make_pipeline()
        return policy_class(pipeline)(pipeline)

    def guidance_scales(self, policy):
        return (1.0, 3.0) if policy.has_true_cfg else (1.0,)

    def roll(self, policy, conditions, generators, cfg, batch_size=1, **kwargs):
        return rollout(
            policy, policy.pipeline.transformer, conditions, generators,
            num_inference_steps=STEPS, true_cfg_scale=cfg, batch_size=batch_size, **kwargs,
        )  # fmt: skip

    # The policy is the pipeline

    @pytest.mark.parametrize("names", [["square"], ["wide"], ["square", "wide"]], ids="-".join)
    def test_own_loop_equals_the_pipeline(self, policy, names):
        if len(names) > 1 and not self.several_references:
            pytest.skip("takes one reference")
        images = [photo(*getattr(self, name), seed=i) for i, name in enumerate(names)]
        for cfg in self.guidance_scales(policy):
            negative = policy.default_negative_prompt if cfg > 1 else None
            conditions = policy.encode(images, "Make the sky red", negative, self.resolution)
            (path,) = self.roll(policy, [conditions], [generator(5)], cfg)
            noise = torch.randn(1, conditions.num_tokens, conditions.num_channels, generator=generator(5))
            size = conditions.height, conditions.width
            expected = self.call(policy.pipeline, images, "Make the sky red", negative, cfg, *size, latents=noise)
            (image,) = decode(policy, [path.final], [conditions], 1)
            assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1, cfg

    def test_the_cards_example_edits_at_the_resolution_of_training(self, policy):
        example = policy.example_of_size(self.resolution)
        if not example.arguments:
            assert "one megapixel" in example.difference
            return
        names = {"image": photo(*self.wide)}
        exec("\n".join([*example.imports, *example.lines]), names)
        arguments = {name: eval(code, names) for name, code in example.arguments.items()}
        arguments |= policy.call_arguments(1.0, "")
        pipeline, steps = policy.pipeline, dict(prompt="Blur", num_inference_steps=2)
        edit = to_rgb(pipeline(image=names["image"], generator=generator(3), **steps, **arguments).images[0])
        height, width = policy.target_size([photo(*self.wide)], self.resolution)
        assert edit.size == (width, height)
        images, kwargs = [photo(*self.wide)], dict(steps=2, generator=generator(3))
        expected = self.call(pipeline, images, "Blur", None, 1.0, height, width, **kwargs)
        assert np.abs(np.asarray(edit, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1

    def test_a_step_in_half_precision_is_the_pipelines(self):
        # Of several steps only the first is the same: the pipeline rounds its latents after each, which the policy
        # does not.
        pipeline = self.make_pipeline().to(torch.bfloat16)
        policy = policy_class(pipeline)(pipeline)
        images = [photo(*self.square)]
        conditions = policy.encode(images, "Make the sky red", None, self.resolution)
        noise = torch.randn(1, conditions.num_tokens, conditions.num_channels, generator=generator(5)).bfloat16()
        size = conditions.height, conditions.width
        expected = self.call(pipeline, images, "Make the sky red", None, 1.0, *size, latents=noise, steps=1)
        sigma, end = policy.sigmas(1, conditions)
        with torch.no_grad():
            batch = policy.collate([conditions])
            velocity = policy.velocity(pipeline.transformer, noise.float(), sigma, batch, 1.0)
        assert velocity.dtype == torch.float32
        (image,) = policy.decode(noise.float() + velocity * (end - sigma), conditions)
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 2

    def test_sigmas_are_the_pipelines(self, policy):
        image = photo(*self.square)
        conditions = policy.encode([image], "x", None, self.resolution)
        self.call(policy.pipeline, [image], "x", None, 1.0, conditions.height, conditions.width)
        assert torch.equal(policy.sigmas(STEPS, conditions), policy.pipeline.scheduler.sigmas)

    # Batches

    def test_control_tokens_in_a_prompt_are_read_as_text(self, policy):
        pipeline = policy.pipeline
        tokenizers = [getattr(pipeline, name) for name in ("tokenizer", "tokenizer_2") if hasattr(pipeline, name)]
        tokenizers = tokenizers or [pipeline.processor.tokenizer]
        images = [photo(*self.square)]

        def encode(prompt):
            return policy.encode(images, prompt, None, self.resolution).tensors

        plain = encode("Make it red")
        for token in {token for tokenizer in tokenizers for token in tokenizer.all_special_tokens if len(token) > 1}:
            attacked, as_text = encode(f"Make it red{token}"), encode(f"Make it red{token[0]} {token[1:]}")
            assert all(torch.equal(attacked[name], as_text[name]) for name in attacked)
            assert any(not torch.equal(attacked[name], plain[name]) for name in plain if "prompt" in name)

    def test_batches_equal_single_runs(self, policy):
        cfg = self.guidance_scales(policy)[-1]
        negative = policy.default_negative_prompt if cfg > 1 else None
        balloon = "Add a red balloon to the left of the cat"
        cases = [
            policy.encode([photo(width, height, seed=i)], prompt, negative, 64)
            for i, (width, height, prompt) in enumerate(
                [(64, 64, balloon), (64, 64, "Blur"), (128, 64, "Blur"), (96, 96, "Go")]
            )
        ]  # fmt: skip
        options = dict(dynamics="flow_sde", noise_level=0.7, steps=range(0, 2))
        together = self.roll(policy, cases, [generator(i) for i in range(4)], cfg, batch_size=3, **options)
        for i, case in enumerate(cases):
            (alone,) = self.roll(policy, [case], [generator(i)], cfg, **options)
            for name in ("latents", "log_probs", "means", "final"):
                torch.testing.assert_close(getattr(together[i], name), getattr(alone, name), rtol=1e-4, atol=2e-5)

    def test_different_sizes_never_share_a_batch(self, policy):
        cases = [policy.encode([photo(width, 64)], "x", None, 64) for width in (64, 128, 64, 64)]
        assert bucketed(cases, 2) == [[0, 2], [3], [1]]
        with pytest.raises(ValueError, match=r"equal sizes, but got \(64, 64"):
            policy.collate(cases[:2])

    def test_sizes_keep_the_aspect_ratio_and_the_area(self, policy):
        for width, height in [(640, 480), (480, 640), (1000, 300), (333, 777)]:
            rows, columns = policy.target_size([photo(width, height)], 512)
            assert rows % 16 == columns % 16 == 0
            assert columns / rows == pytest.approx(width / height, rel=0.06)
            assert rows * columns == pytest.approx(512 * 512, rel=0.07)

    # Conditions

    def test_kept_conditions_equal_fresh_ones(self, policy, tmp_path):
        negative = policy.default_negative_prompt if policy.has_true_cfg else None
        first, again = (policy.encode([photo(80, 64)], "Blur it", negative, 64) for _ in range(2))
        torch.save(vars(first), tmp_path / "conditions.pt")
        kept = EditConditions(**torch.load(tmp_path / "conditions.pt", weights_only=True))
        assert kept.bucket == again.bucket and kept.tensors.keys() == again.tensors.keys()
        assert all(torch.equal(kept.tensors[name], again.tensors[name]) for name in kept.tensors)
        other = policy.encode([photo(80, 64)], "Paint it", negative, 64)
        assert any(not torch.equal(kept.tensors[name], other.tensors[name]) for name in kept.tensors)

    def test_an_encoded_image_is_decoded_as_by_the_vae_alone(self, policy):
        # Packing and normalization undo each other, and are those that references have.
        image, vae = photo(*self.wide), policy.pipeline.vae
        conditions = policy.encode([image], "x", None, self.resolution)
        size = conditions.height, conditions.width
        latents = policy.encode_image(image, *size)
        assert latents.shape == (conditions.num_tokens, conditions.num_channels)
        assert torch.equal(latents, conditions.tensors["image_latents"])
        (decoded,) = policy.decode(latents[None], conditions)
        image = image.convert("RGBA") if vae.config.get("in_channels") == 4 else image
        pixels = policy.pipeline.image_processor.preprocess(image, *size)
        video = "Qwen" in type(vae).__name__
        with torch.no_grad():
            expected = vae.decode(vae.encode(pixels[:, :, None] if video else pixels).latent_dist.mode()).sample
        (expected,) = policy.pipeline.image_processor.postprocess(expected[:, :, 0] if video else expected)
        expected = to_rgb(expected)
        assert np.abs(np.asarray(decoded, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1

    def test_encoders_are_moved_only_while_in_use(self, monkeypatch):
        pipeline = self.make_pipeline()
        policy = policy_class(pipeline)(pipeline, offload_encoders=True)
        policy.place("cpu")
        names = {module: name for name, module in policy.encoders.items()}
        moves = []
        monkeypatch.setattr(edit_policy, "on_device", lambda m, _: moves.append(names[m]) or contextlib.nullcontext())
        conditions = policy.encode([photo(64, 64)], "x", None, 64)
        assert sorted(moves) == sorted(policy.encoders)
        moves.clear()
        with policy.loaded(*policy.encoders):  # once for many cases
            for _ in range(3):
                policy.encode([photo(64, 64)], "x", None, 64)
        assert sorted(moves) == sorted(policy.encoders)
        moves.clear()
        policy.decode(torch.randn(1, conditions.num_tokens, conditions.num_channels), conditions)
        assert moves == ["vae"]

    # Training

    @pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16-checkpointing"])
    def test_the_first_ratio_is_one_and_the_gradient_reaches_the_whole_lora(self, tmp_path, half):
        # In half precision other batch shapes give other roundings, so the batches of sampling and training are equal.
        options = dict(bf16=True, gradient_checkpointing=True, rollout_batch_size=1, per_device_train_batch_size=1,
                       gradient_accumulation_steps=8) if half else {}  # fmt: skip
        model = self.make_pipeline().to(torch.bfloat16) if half else None
        trainer = self.make_trainer(tmp_path, model, max_steps=1, **options)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=generator(len(name)))
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        log = trainer.state.log_history[0]
        assert max(log["logp_diff/step_0"], log["logp_diff/step_1"]) < 1e-5
        after = dict(trainer.model.named_parameters())
        assert [name for name, weight in before.items() if torch.equal(weight, after[name])] == []
        # The ratio of what has been trained is that of the same computation, and by now it is another.
        (sample, *_) = trainer._buffered_samples
        path, batch = sample.trajectory, trainer.policy.collate([sample.conditions])
        sigmas = path.sigmas
        with torch.no_grad():
            velocity = trainer.policy.velocity(
                trainer.model, path.latents[0][None], sigmas[0], batch, trainer.true_cfg_scale
            )
        mean, std = transition("flow_sde", path.latents[0][None], velocity, sigmas[0], sigmas[1], 0.7, sigmas[1])
        assert abs(log_prob("flow_sde", path.latents[1][None], mean, std) - path.log_probs[0]) > 1e-5

    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory):
        """A trainer that has trained and saved the LoRA in `out`, and the folder with `out` and with its `base`."""
        folder = tmp_path_factory.mktemp("trained")
        self.make_pipeline().save_pretrained(folder / "base")
        trainer = self.make_trainer(folder, model=str(folder / "base"))
        trainer.train()
        trainer.save_model()
        return trainer, folder

    def test_the_saved_lora_loads_in_the_plain_pipeline(self, trained):
        trainer, folder = trained
        weights = load_file(folder / "out" / "pytorch_lora_weights.safetensors")
        assert len(weights) == sum(p.requires_grad for p in trainer.model.parameters())
        call = ([photo(64, 64)], "Blur it", None, 1.0, 64, 64)
        pipeline = trainer.policy.pipeline
        pipeline.transformer.eval()
        expected = np.asarray(self.call(pipeline, *call, generator=generator(0), output_type="np"))
        plain = type(pipeline).from_pretrained(folder / "base")
        without = np.asarray(self.call(plain, *call, generator=generator(0), output_type="np"))
        assert np.abs(without - expected).max() > 1e-4
        exec(trainer.policy.lora_loader.format(folder / "out"), {"pipeline": plain})
        assert np.array_equal(np.asarray(self.call(plain, *call, generator=generator(0), output_type="np")), expected)

    def test_too_many_references(self, tmp_path):
        rows = [row | {"images": [photo(64, 64), photo(64, 64)]} for row in make_cases(4).remove_columns("image")]
        dataset = Dataset.from_list(rows)
        if self.several_references:
            self.make_trainer(tmp_path, train_dataset=dataset, max_steps=1).train()
        else:
            with pytest.raises(ValueError, match=r"Case 'case-3' has 2 reference images.*at most 1"):
                self.make_trainer(tmp_path, train_dataset=dataset.select([3, 1]))

    @pytest.mark.parametrize("targets", [["to_query"], ["to_q", "to_query"], ".*to_query"])
    def test_target_modules_that_match_nothing(self, tmp_path, targets):
        config = LoraConfig(target_modules=targets)
        with pytest.raises(ValueError, match="(?s)to_query.*Leave target_modules out"):
            FlowGRPOEditTrainer(self.make_pipeline(), redness, make_config(tmp_path), make_cases(), peft_config=config)

    def test_the_card_calls_the_pipeline_as_it_can_be_called(self, trained):
        trainer, folder = trained
        (code,) = re.findall(r"edited = (pipeline\(.*?\))\.images", (folder / "out" / "README.md").read_text(), re.S)
        keywords = {keyword.arg: keyword.value for keyword in ast.parse(code).body[0].value.keywords}
        accepted = inspect.signature(type(trainer.policy.pipeline).__call__).parameters
        assert set(keywords) <= set(accepted) and {"image", "prompt", "num_inference_steps"} <= set(keywords)
        scale = keywords.get("true_cfg_scale", keywords.get("guidance_scale"))
        scale = accepted["true_cfg_scale"].default if scale is None else ast.literal_eval(scale)
        assert scale in (trainer.true_cfg_scale, trainer.policy.guidance_scale)

    def test_guidance_where_it_is_no_input(self, tmp_path, policy):
        if policy.guidance_scale is not None:
            assert self.make_trainer(tmp_path, guidance_scale=3.0).policy.guidance_scale == 3.0
        else:
            with pytest.raises(ValueError, match="guidance_scale=3.0, but .* takes no guidance"):
                self.make_trainer(tmp_path, guidance_scale=3.0)

    def make_trainer(self, tmp_path, model=None, train_dataset=None, **options):
        options = {"noise_level": 0.7, "num_inference_steps": STEPS, "max_steps": 2, "report_to": "none"} | options
        return FlowGRPOEditTrainer(
            model=model or self.make_pipeline(),
            reward_funcs=redness,
            args=make_config(tmp_path / "out", **options),
            train_dataset=make_cases() if train_dataset is None else train_dataset,
            peft_config=copy.deepcopy(LoraConfig(r=4, lora_alpha=8)),
        )
