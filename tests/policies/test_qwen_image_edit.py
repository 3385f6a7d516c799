import json

import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as first_module
import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as plus_module
import pytest

from hp_edit_trl.miniature.tiny import tiny_pipeline, tiny_qwen_image_edit_pipeline
from hp_edit_trl.policies import QwenImageEditPlusPolicy, policy_class
from tests.policies.contract import STEPS, PolicyContract


class QwenContract(PolicyContract):
    def call(
        self, pipeline, images, prompt, negative_prompt, cfg, height, width, steps=STEPS, output_type="pil", **kwargs
    ):
        return pipeline(
            image=images, prompt=prompt, negative_prompt=negative_prompt, true_cfg_scale=cfg, height=height,
                width=width,
            num_inference_steps=steps, output_type=output_type, **kwargs,
        ).images[0]  # fmt: skip


class Test2509(QwenContract):
    several_references = True

    @pytest.fixture(autouse=True)
    def references_at_the_targets_resolution(self, monkeypatch):
        # The pipeline encodes references at about one megapixel whatever is asked for.
        monkeypatch.setattr(plus_module, "VAE_IMAGE_SIZE", 64 * 64)

    def make_pipeline(self):
        return tiny_pipeline()


class Test2511(Test2509):
    def make_pipeline(self):
        return tiny_pipeline(zero_cond_t=True)


class TestFirst(QwenContract):
    @pytest.fixture(autouse=True)
    def references_at_the_targets_resolution(self, monkeypatch):
        # This pipeline shows its text encoder what it encodes with the VAE: both at about one megapixel.
        stock = first_module.calculate_dimensions
        monkeypatch.setattr(first_module, "calculate_dimensions", lambda area, ratio: stock(64 * 64, ratio))

    def make_pipeline(self):
        return tiny_qwen_image_edit_pipeline()


def test_firered_image_edit_is_this_pipeline(tmp_path):
    # The class and components that its model_index.json names are those of Qwen-Image-Edit-2509.
    tiny_pipeline().save_config(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.items() >= {"_class_name": "QwenImageEditPlusPipeline"}.items()
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_diffusers_version": "0.36.0.dev0"}))
    assert policy_class(str(tmp_path)) is QwenImageEditPlusPolicy


def test_models_that_are_no_edit_pipeline(tmp_path):
    with pytest.raises(ValueError, match="not a diffusers pipeline"):
        policy_class(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(
        ValueError, match="is a StableDiffusionPipeline.*Known are: QwenImageEditPlusPipeline.*adding_a"
    ):
        policy_class(str(tmp_path))
