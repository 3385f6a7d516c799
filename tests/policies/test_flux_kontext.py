import pytest
import torch

from hp_edit_trl.miniature.tiny import tiny_kontext_pipeline
from hp_edit_trl.policies import FluxKontextPolicy
from tests.helpers import photo
from tests.policies.contract import STEPS, PolicyContract


class TestFluxKontext(PolicyContract):
    def make_pipeline(self):
        return tiny_kontext_pipeline()

    def call(
        self, pipeline, images, prompt, negative_prompt, cfg, height, width, steps=STEPS, output_type="pil", **kwargs
    ):
        # The pipeline would take the nearest of its one-megapixel sizes for the reference; at these sizes it is kept.
        image = pipeline.image_processor.resize(images[0], height, width)
        return pipeline(
            image=image, prompt=prompt, negative_prompt=negative_prompt, true_cfg_scale=cfg, guidance_scale=2.5,
            height=height, width=width, num_inference_steps=steps, max_area=height * width, _auto_resize=False,
            output_type=output_type, **kwargs,
        ).images[0]  # fmt: skip


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_guidance_is_an_input_where_the_transformer_takes_it(guidance_embeds):
    pipeline = tiny_kontext_pipeline(guidance_embeds)
    velocities = []
    for scale in (2.5, 3.5):
        policy = FluxKontextPolicy(pipeline)
        assert policy.guidance_scale == (2.5 if guidance_embeds else None)
        if guidance_embeds:
            policy.guidance_scale = scale
        conditions = policy.encode([photo(64, 64)], "Blur", None, 64)
        noise = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            batch = policy.collate([conditions])
            velocities.append(policy.velocity(pipeline.transformer, noise, torch.tensor(0.5), batch, 1.0))
    assert torch.equal(*velocities) is not guidance_embeds
