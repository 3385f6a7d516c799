import json
import subprocess
import sys

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

from hp_edit_trl.miniature import pretrain
from hp_edit_trl.miniature.world import SIZE, draw_case, to_image
from hp_edit_trl.policies.qwen_image_edit import QwenImageEditPlusPolicy


def test_one_frame_is_convolved_as_the_vae_does():
    torch.manual_seed(0)
    convolution, pictures = QwenImageCausalConv3d(3, 5, 3, padding=1), torch.randn(2, 3, 1, 8, 8)
    with pretrain.fast_convolutions():
        fast = convolution(pictures)
    torch.testing.assert_close(fast, convolution(pictures), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_all_stages_stop_and_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "EVALUATION_CASES", 8)
    monkeypatch.setattr(pretrain, "VAE_CASES", 8)
    for steps in (1, 2):
        pretrain.train_vae(tmp_path, steps, compiled=False)
    pretrain.train_decoder(tmp_path, 1, compiled=False)
    for steps in (1, 2):
        pretrain.train_transformer(tmp_path, steps, 16, compiled=False, processes=1)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in log] == [
        ("vae", 1), ("vae", 2), ("decoder", 1), ("transformer", 1), ("transformer", 2),
    ]  # fmt: skip
    assert all("score" in row and "remove" in row for row in log)
    pretrain.export(tmp_path)
    loaded = QwenImageEditPlusPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.float32)
    case = draw_case("add", "test", 0, 0)
    latents = QwenImageEditPlusPolicy(loaded).encode([to_image(case.source)], case.prompt, None, SIZE)
    # The statistics that it was saved with make the latents that it sees near unit variance.
    assert latents.tensors["image_latents"].shape == (16, 64)
    assert 0.2 < latents.tensors["image_latents"].std() < 3


def test_the_command_says_what_it_can_do():
    command = [sys.executable, "-m", "hp_edit_trl.miniature.pretrain", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--transformer_steps" in done.stdout
