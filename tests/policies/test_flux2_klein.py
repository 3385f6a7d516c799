import pytest

from hp_edit_trl.miniature.tiny import tiny_klein_pipeline
from tests.policies.contract import STEPS, PolicyContract


class KleinContract(PolicyContract):
    several_references = True
    resolution, square, wide = 96, (96, 96), (128, 64)  # the pipeline takes none smaller

    def call(
        self,
        pipeline,
        images,
        prompt,
        negative_prompt,
        cfg,
        height,
        width,
        steps=STEPS,
        output_type="pil",
        latents=None,
        **kwargs,
    ):
        if latents is not None:  # this pipeline takes them unpacked
            rows = height // 16
            latents = latents.transpose(1, 2).unflatten(2, (rows, -1))
        return pipeline(
            image=images, prompt=prompt, guidance_scale=cfg, height=height, width=width,
            num_inference_steps=steps, output_type=output_type, latents=latents, **kwargs,
        ).images[0]  # fmt: skip


class TestBase(KleinContract):
    def make_pipeline(self):
        return tiny_klein_pipeline()


class TestDistilled(KleinContract):
    def make_pipeline(self):
        return tiny_klein_pipeline(is_distilled=True)

    def test_there_is_no_second_pass(self, tmp_path):
        with pytest.raises(ValueError, match="true_cfg_scale=4.0, but this Flux2KleinPipeline is guidance-distilled"):
            self.make_trainer(tmp_path, true_cfg_scale=4.0)
        assert self.make_trainer(tmp_path).true_cfg_scale == 1.0
