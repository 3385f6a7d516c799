import json

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as pipeline_module

from hp_edit_trl.editors import PolicyEditor
from hp_edit_trl.miniature import (
    RuleScorer,
    edit_dataset,
    load_dataset,
    load_pipeline,
    score_edits,
    training_args,
)
from hp_edit_trl.miniature.policy import WEIGHTS
from hp_edit_trl.policies import policy_class
from hp_edit_trl.utils.seeding import seeded_generator


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def sampler(pipeline):
    """The policy in the form that `edit_dataset` takes, without a trainer."""
    policy = policy_class(pipeline)(pipeline)
    editor = PolicyEditor(policy, "policy", 32, num_inference_steps=5, true_cfg_scale=1.0, batch_size=50)

    @torch.no_grad()
    def sample_edits(cases):
        ids = [row["id"] for row, _ in cases]
        seeds = [seeded_generator("test", case_id).initial_seed() for case_id in ids]
        return editor([images for _, images in cases], [row["prompt"] for row, _ in cases], ids, seeds)

    return sample_edits


def test_stock_classes_of_the_promised_size(pipeline):
    assert type(pipeline) is QwenImageEditPlusPipeline
    index = json.loads((WEIGHTS / "model_index.json").read_text())
    assert {value[0] for name, value in index.items() if name[0] != "_"} == {"diffusers", "transformers"}
    assert 2e6 < sum(p.numel() for p in pipeline.transformer.parameters()) < 5e6
    assert {p.dtype for p in pipeline.transformer.parameters()} == {torch.float32}
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 15e6
    assert not [path for path in WEIGHTS.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_the_policy_edits_decently_and_not_perfectly(pipeline):
    dataset = load_dataset("validation", 80)
    scores = score_edits(edit_dataset(sampler(pipeline), dataset), dataset)
    assert 3.5 < np.mean(scores) < 4.8


def test_the_plain_pipeline_edits_alike(pipeline, monkeypatch):
    # The pipeline sees references at a megapixel; at the miniature's size the two are the same computation.
    monkeypatch.setattr(pipeline_module, "VAE_IMAGE_SIZE", 32 * 32)
    (row,) = load_dataset("validation", 1)
    noise = torch.randn((1, 16, 64), generator=seeded_generator("test", row["id"]))
    (image,) = pipeline(
        row["image"], row["prompt"], true_cfg_scale=1.0, height=32, width=32, num_inference_steps=5, latents=noise
    ).images
    (ours,) = sampler(pipeline)([(row, [row["image"]])])
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(ours, dtype=int)).max() <= 1


def test_the_vae_keeps_what_the_scorer_looks_at(pipeline):
    dataset = load_dataset("validation", 40)
    images = pipeline.image_processor.preprocess([row["target"] for row in dataset], 32, 32).unsqueeze(2)
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mode()).sample[:, :, 0]
    scorer = RuleScorer()
    edits = pipeline.image_processor.postprocess(decoded)
    scores = [scorer.score(edit, row["image"], row["target"]) for edit, row in zip(edits, dataset, strict=True)]
    assert np.mean(scores) > 4.3


def test_the_card_tells_the_sides_that_training_took(pipeline):
    policy = policy_class(pipeline)(pipeline)
    assert "training took multiples of 8." in policy.example_of_size(32).difference
    assert "A square picture is edited as in training." in policy.example_of_size(32).difference
    assert "A square" not in policy.example_of_size(48).difference


def test_fewer_steps_have_a_smaller_window(tmp_path):
    for steps, window in ((2, 1), (3, 2), (4, 3), (8, 3)):
        args = training_args(str(tmp_path), num_inference_steps=steps)
        assert (args.sde_window_size, args.sde_window_range) == (window, [0, window])
    with pytest.raises(ValueError, match="The SDE window does not fit"):
        training_args(str(tmp_path), num_inference_steps=2, sde_window_size=3)


def test_half_of_the_edits_of_a_case_are_trained_on(tmp_path):
    for sampled, trained in ((2, 1), (3, None), (4, 2), (8, 4), (12, 6), (24, 12)):
        args = training_args(str(tmp_path), num_generations=sampled)
        assert args.num_trained_generations == trained
    args = training_args(str(tmp_path), num_generations=5, per_device_train_batch_size=5)
    assert (args.num_trained_generations, args.generation_batch_size) == (None, 10)
    assert training_args(str(tmp_path), num_trained_generations=12).num_trained_generations == 12
    with pytest.raises(ValueError, match="num_generations=0 must be at least 2"):
        training_args(str(tmp_path), num_generations=0)


def test_values_that_are_not_given_follow_those_that_are(tmp_path):
    assert training_args(str(tmp_path), normalize_ratio=True).weight_by_noise is False
    with pytest.raises(ValueError, match="leave out one of the two"):
        training_args(str(tmp_path), normalize_ratio=True, weight_by_noise=True)
    assert training_args(str(tmp_path), gradient_accumulation_steps=3).steps_per_generation == 3
    args = training_args(str(tmp_path), generation_batch_size=96 * 4)
    assert (args.steps_per_generation, args.generation_batch_size) == (8, 384)
