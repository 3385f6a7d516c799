import numpy as np
import pytest
import torch
from datasets import Dataset

from hp_edit_trl.cases import BadCaseError
from hp_edit_trl.miniature.tiny import tiny_qwen_image_21_pipeline
from hp_edit_trl.policies import Prefixes, QwenImage21Policy
from hp_edit_trl.utils.images import to_rgb
from tests.helpers import photo
from tests.policies.contract import STEPS, PolicyContract, generator


class TestQwenImage21(PolicyContract):
    several_references = True

    def make_pipeline(self):
        return tiny_qwen_image_21_pipeline()

    def call(
        self, pipeline, images, prompt, negative_prompt, cfg, height, width, steps=STEPS, output_type="pil", **kwargs
    ):
        image = pipeline(
            image=images, prompt=prompt, negative_prompt=negative_prompt, true_cfg_scale=cfg, height=height,
            width=width, num_inference_steps=steps, output_type=output_type, output_resolution=self.resolution,
            **kwargs,
        ).images[0]  # fmt: skip
        return image if isinstance(image, np.ndarray) else to_rgb(image)

    def test_more_than_ten_references(self, tmp_path):
        for count in (10, 11):
            rows = [
                {"id": f"case-{i}", "prompt": "Join them", "images": [photo(32, 32)] * number}
                for i, number in enumerate([1, count])
            ]
            dataset = Dataset.from_list(rows)
            if count == 10:
                policy = self.make_trainer(tmp_path, train_dataset=dataset).policy
                references = policy.encode(dataset[1]["images"], "Join them", None, 32).reference_sizes
                assert references == ((32, 32),) * 10
            else:
                with pytest.raises(ValueError, match="Case 'case-1' has 11 reference images.*at most 10"):
                    self.make_trainer(tmp_path, train_dataset=dataset)

    def test_a_size_that_the_text_encoder_does_not_read(self):
        pipeline = self.make_pipeline()
        pipeline.processor.image_processor.size = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}
        policy = QwenImage21Policy(pipeline)
        policy.encode_case("a", [photo(64, 64)], "Blur", None, 64)
        for resolution in (32, 256):
            with pytest.raises(BadCaseError, match=f"Case 'a' cannot be encoded.*resolution={resolution}: choose one"):
                policy.encode_case("a", [photo(64, 64)], "Blur", None, resolution)

    def test_noise_levels_of_the_models_author(self):
        pipeline = self.make_pipeline()
        pipeline.register_to_config(sample_sigmas=[1.0, 0.8, 0.3])
        policy, image = QwenImage21Policy(pipeline), photo(64, 64)
        conditions = policy.encode([image], "Blur", None, 64)
        self.call(pipeline, [image], "Blur", None, 1.0, 64, 64, steps=policy.default_num_inference_steps)
        assert torch.equal(policy.sigmas(3, conditions), pipeline.scheduler.sigmas)
        even = pipeline.register_to_config(sample_sigmas=None) or QwenImage21Policy(pipeline)
        assert torch.equal(policy.sigmas(5, conditions), even.sigmas(5, conditions))

    # The prefix

    def test_the_prefix_of_a_case_is_computed_once_for_its_whole_group(self, policy, monkeypatch):
        computed = []
        prefix = QwenImage21Policy.prefix
        monkeypatch.setattr(
            QwenImage21Policy, "prefix", lambda self, *args: computed.append(args[1]) or prefix(self, *args)
        )
        prompts = ["Blur", "Make it red", "Blut"]
        cases = [policy.encode([photo(64, 64, seed=i)], prompt, " ", 64) for i, prompt in enumerate(prompts)]
        samples = [cases[i] for i in (0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2)]  # the first and third share batches
        options = dict(dynamics="flow_sde", noise_level=0.7, steps=range(0, 2))
        generators = [generator(i) for i in range(len(samples))]
        shared = self.roll(policy, samples, generators, 3.0, batch_size=2, **options)
        assert sorted(map(id, computed)) == sorted(map(id, cases))

        # As without it, in which all passes compute it
        policy.has_prefix = False
        try:
            alone = self.roll(policy, samples, [generator(i) for i in range(len(samples))], 3.0, 2, **options)
        finally:
            policy.has_prefix = True
        assert len(computed) == len(cases)
        for one, other in zip(shared, alone, strict=True):
            torch.testing.assert_close(one.final, other.final, rtol=1e-4, atol=2e-5)

    @pytest.mark.parametrize("cfg", [1.0, 3.0])
    def test_a_shared_prefix_changes_no_bit(self, policy, cfg):
        cases = [policy.encode([photo(64, 64, seed=i)], "Blur", " ", 64) for i in range(2)]
        rows = [cases[0], cases[0], cases[1]]
        latents, sigmas = torch.randn(3, 16, 4, generator=generator(0)), torch.tensor([0.9, 0.5, 0.1])
        model, batch = policy.pipeline.transformer, policy.collate(rows)
        with torch.no_grad():
            recomputed = policy.velocity(model, latents, sigmas, batch, cfg)
            prefixes = Prefixes(policy, cfg)
            for _ in range(2):
                assert torch.equal(
                    policy.velocity(model, latents, sigmas, prefixes.added(batch, model), cfg), recomputed
                )
            for row in range(3):
                alone = policy.collate(rows[row : row + 1])
                velocity = policy.velocity(model, latents[row : row + 1], sigmas[row], alone, cfg)
                torch.testing.assert_close(velocity, recomputed[row : row + 1], rtol=1e-5, atol=1e-6)
