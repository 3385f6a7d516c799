import diffusers.pipelines.longcat_image.pipeline_longcat_image_edit as module
import pytest

from hp_edit_trl.miniature.tiny import tiny_longcat_pipeline
from tests.policies.contract import STEPS, PolicyContract


class TestLongCatImageEdit(PolicyContract):
    @pytest.fixture(autouse=True)
    def edits_at_the_targets_resolution(self, monkeypatch):
        # The pipeline always edits at one megapixel.
        stock = module.calculate_dimensions
        small = {1024**2: self.resolution**2}
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: stock(small.get(area, area), ratio))

    def make_pipeline(self):
        return tiny_longcat_pipeline()

    def call(
        self, pipeline, images, prompt, negative_prompt, cfg, height, width, steps=STEPS, output_type="pil", **kwargs
    ):
        return pipeline(
            image=images[0], prompt=prompt, negative_prompt=negative_prompt, guidance_scale=cfg,
            num_inference_steps=steps, output_type=output_type, **kwargs,
        ).images[0]  # fmt: skip

    def test_quoted_text_is_counted_letter_by_letter(self, policy):
        plain, quoted = policy.prompt_tokens(["Write Picture", "Write 'Picture'"])
        assert len(quoted) == len(policy.prompt_tokens(["Write "])[0]) + len("'Picture'") > len(plain)

    def test_a_prompt_of_as_many_tokens_as_are_read(self, policy):
        # With one more the pipeline itself fails.
        longest = "'" + "x" * 510 + "'"
        assert [len(tokens) for tokens in policy.prompt_tokens([longest, ""])] == [policy.max_prompt_tokens, 0]
        policy.pipeline._encode_prompt([longest], module.PIL.Image.new("RGB", (64, 64)))
        with pytest.raises(TypeError):
            policy.pipeline._encode_prompt([longest + "x"], module.PIL.Image.new("RGB", (64, 64)))
