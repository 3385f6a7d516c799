import numpy as np

from hp_edit_trl.miniature.tiny import tiny_qwen_image_21_pipeline
from hp_edit_trl.utils.images import to_rgb
from tests.policies.contract import STEPS, PolicyContract


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
