import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as pipeline_module
import numpy as np
import pytest
import torch
from PIL import Image

from hp_edit_trl.flow.dynamics import log_prob, transition
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.policies import QwenImageEditPolicy, bucketed, decode, policy_class, rollout


def photo(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=[False, True], ids=["2509", "2511"])
def policy(request):
    return QwenImageEditPolicy(tiny_pipeline(zero_cond_t=request.param))


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("sizes", [[(64, 64)], [(128, 32)], [(64, 64), (128, 32)]], ids=["square", "wide", "two"])
def test_own_loop_equals_the_pipeline(policy, monkeypatch, sizes, cfg):
    # The pipeline encodes references at about one megapixel whatever is asked for; here that number is made 64².
    monkeypatch.setattr(pipeline_module, "VAE_IMAGE_SIZE", 64 * 64)
    images = [photo(*size, seed=i) for i, size in enumerate(sizes)]
    negative = " " if cfg > 1 else None
    conditions = policy.encode(images, "Make the sky red", negative, 64)
    noise = torch.randn(1, conditions.num_tokens, conditions.num_channels, generator=generator(5))
    expected = policy.pipeline(
        image=images, prompt="Make the sky red", negative_prompt=negative, true_cfg_scale=cfg, latents=noise,
        height=conditions.height, width=conditions.width, num_inference_steps=3, output_type="pt",
    ).images  # fmt: skip
    latent = policy.pipeline(
        image=images, prompt="Make the sky red", negative_prompt=negative, true_cfg_scale=cfg, latents=noise,
        height=conditions.height, width=conditions.width, num_inference_steps=3, output_type="latent",
    ).images  # fmt: skip
    with torch.no_grad():
        (trajectory,) = rollout(
            policy, policy.pipeline.transformer, [conditions], [generator(5)],
            num_inference_steps=3, true_cfg_scale=cfg, batch_size=1,
        )  # fmt: skip
    torch.testing.assert_close(trajectory.final[None], latent, rtol=1e-5, atol=1e-6)
    (image,) = decode(policy, [trajectory.final], [conditions], 1)
    difference = np.abs(np.asarray(image, dtype=int) - (expected[0].permute(1, 2, 0).numpy() * 255).round())
    assert difference.max() <= 1


def test_sigmas_are_the_pipelines(policy):
    conditions = policy.encode([photo(64, 64)], "x", None, 64)
    policy.pipeline(image=[photo(64, 64)], prompt="x", true_cfg_scale=1, height=64, width=64, num_inference_steps=5)
    assert torch.equal(policy.sigmas(5, conditions), policy.pipeline.scheduler.sigmas)


def test_batches_equal_single_runs(policy):
    # Prompts of different lengths share a batch by padding and a mask; sizes never share one.
    cases = [
        policy.encode([photo(64, 64, 1)], "Add a red balloon to the left of the cat", " ", 64),
        policy.encode([photo(64, 64, 2)], "Blur", " ", 64),
        policy.encode([photo(128, 64, 3)], "Blur", " ", 64),
        policy.encode([photo(96, 96, 4)], "Remove the cup", " ", 64),
    ]
    arguments = dict(
        num_inference_steps=3, true_cfg_scale=4.0, dynamics="flow_sde", noise_level=0.7, steps=range(0, 2)
    )
    model = policy.pipeline.transformer
    together = rollout(policy, model, cases, [generator(i) for i in range(4)], batch_size=3, **arguments)
    for i, case in enumerate(cases):
        (alone,) = rollout(policy, model, [case], [generator(i)], batch_size=1, **arguments)
        torch.testing.assert_close(together[i].latents, alone.latents, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[i].log_probs, alone.log_probs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together[i].final, alone.final, rtol=1e-4, atol=1e-5)


def test_trajectory_holds_what_training_needs(policy):
    conditions = policy.encode([photo(64, 64)], "Blur", " ", 64)
    model = policy.pipeline.transformer
    (path,) = rollout(
        policy, model, [conditions], [generator(0)], batch_size=1, num_inference_steps=4, true_cfg_scale=4.0,
        dynamics="cps", noise_level=0.7, steps=range(1, 3),
    )  # fmt: skip
    assert path.latents.shape == (3, 16, 16) and path.latents.dtype == torch.float32
    assert path.log_probs.shape == (2,) and path.sigmas.shape == (5,)
    batch = policy.collate([conditions])
    for k, step in enumerate(path.steps):
        with torch.no_grad():
            velocity = policy.velocity(model, path.latents[k][None], path.sigmas[step], batch, 4.0)
        mean, std = transition(
            "cps", path.latents[k][None], velocity, path.sigmas[step], path.sigmas[step + 1], 0.7, path.sigmas[1]
        )
        assert log_prob("cps", path.latents[k + 1][None], mean, std).item() == path.log_probs[k].item()


def test_sizes_keep_the_aspect_ratio_and_the_area(policy):
    for width, height in [(640, 480), (480, 640), (1000, 300), (333, 777)]:
        rows, columns = policy.target_size([photo(width, height)], 512)
        assert rows % 16 == columns % 16 == 0
        assert columns / rows == pytest.approx(width / height, rel=0.06)
        assert rows * columns == pytest.approx(512 * 512, rel=0.06)


def test_different_sizes_never_share_a_batch(policy):
    cases = [policy.encode([photo(w, 64)], "x", None, 64) for w in (64, 128, 64, 64)]
    assert bucketed(cases, 2) == [[0, 2], [3], [1]]
    with pytest.raises(ValueError, match=r"equal sizes, but got \(64, 64"):
        policy.collate(cases[:2])


def test_encoders_are_moved_only_while_in_use():
    policy = QwenImageEditPolicy(tiny_pipeline(), offload_encoders=True)
    policy.place("cpu")
    moves = []
    policy.pipeline.vae.to = lambda device: moves.append(str(device))
    policy.encode([photo(64, 64)], "x", None, 64)
    assert moves == ["cpu", "cpu"]


def test_models_that_are_no_edit_pipeline(tmp_path):
    with pytest.raises(ValueError, match="not a diffusers pipeline"):
        policy_class(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="is a StableDiffusionPipeline.*Known are: QwenImageEditPlusPipeline"):
        policy_class(str(tmp_path))
