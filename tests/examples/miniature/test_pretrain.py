import dataclasses
import itertools
import json
import runpy
from concurrent.futures import ThreadPoolExecutor

import pretrain
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

from hp_edit_trl.miniature.world import SIZE, draw_case, stream, to_image
from hp_edit_trl.policies.qwen_image_edit import QwenImageEditPlusPolicy
from hp_edit_trl.utils.seeding import seeded_generator


def test_one_frame_is_convolved_as_the_vae_does():
    torch.manual_seed(0)
    convolution, pictures = QwenImageCausalConv3d(3, 5, 3, padding=1), torch.randn(2, 3, 1, 8, 8)
    with pretrain.fast_convolutions():
        fast = convolution(pictures)
    torch.testing.assert_close(fast, convolution(pictures), rtol=1e-5, atol=1e-6)


def test_a_stopped_training_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)

    def train(folder, stop_at=None, steps=6):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)

        def loss_of_step(step):
            if step == stop_at:
                raise KeyboardInterrupt
            batch = torch.randn(8, 4, generator=seeded_generator("test", step))
            return (model(batch) - 2 * batch).square().mean()

        optimizers = [pretrain.muon([model.weight], 0.1), pretrain.adamw([model.bias], 0.1)]
        pretrain.fit("linear", loss_of_step, optimizers, steps, folder, {"linear": model}, lambda: {"score": 1}, 4)
        return model

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", stop_at=5)
    parts = train(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    log = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row.get("score")) for row in log] == [(2, None), (4, 1), (6, 1)]
    with pytest.raises(ValueError, match="belongs to a training of 6 steps, but 9 were requested"):
        train(tmp_path / "parts", steps=9)


@pytest.mark.slow
def test_all_stages(tmp_path, monkeypatch):
    for name, few in {"EVALUATION_CASES": 8, "VAE_CASES": 8, "VAE_BATCH": 4, "TRANSFORMER_BATCH": 4}.items():
        monkeypatch.setattr(pretrain, name, few)
    pretrain.train_vae(tmp_path, 2, compiled=False)
    pretrain.train_decoder(tmp_path, 1, compiled=False)
    with pytest.raises(ValueError, match="1500 cases are not a multiple of 1000"):
        pretrain.train_transformer(tmp_path, "transformer", 1, 1500, compiled=False, processes=1)
    prompts = [case.prompt for case in itertools.islice(stream("train", seed=9), 100)]
    with monkeypatch.context() as here:  # in this process, where the tokenizer is made of few prompts
        monkeypatch.setattr(pretrain, "tokenizer_prompts", lambda: prompts)
        here.setattr(pretrain, "ProcessPoolExecutor", ThreadPoolExecutor)
        pretrain.train_transformer(tmp_path, "transformer", 2, 16, compiled=False, processes=1)
    for before, course in itertools.pairwise(pretrain.COURSES):
        slow = dataclasses.replace(pretrain.COURSES[course], learning_rate=1e-9)  # it shows where it began
        monkeypatch.setitem(pretrain.COURSES, course, slow)
        pretrain.train_transformer(tmp_path, course, 1, 16, compiled=False, processes=1)
        began, ended = torch.load(tmp_path / f"{before}.pt")["average"], torch.load(tmp_path / f"{course}.pt")
        for name, weight in began.items():
            torch.testing.assert_close(ended["transformer"][name], weight, rtol=0, atol=1e-6)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in log] == [
        ("vae", 2),
        ("decoder", 1),
        ("transformer", 2),
        ("polish", 1),
        ("refine", 1),
        ("careless", 1),
    ]
    assert all("score" in row and "remove" in row for row in log)
    pretrain.export(tmp_path)
    loaded = QwenImageEditPlusPipeline.from_pretrained(str(tmp_path / "pipeline"), dtype=torch.float32)
    case = draw_case("add", "test", 0, 0)
    latents = QwenImageEditPlusPolicy(loaded).encode([to_image(case.reference)], case.prompt, None, SIZE)
    # The statistics that it was saved with make the latents that it sees near unit variance.
    assert latents.tensors["image_latents"].shape == (16, 64)
    assert 0.2 < latents.tensors["image_latents"].std() < 3
    scores = json.loads((tmp_path / "pipeline" / "scores.json").read_text())
    assert 0 <= scores["policy"]["score"] <= 5 and 0 <= scores["vae"]["share_of_5"] <= 1
    state = torch.load(tmp_path / "decoder.pt")
    torch.save(state | {"step": 0}, tmp_path / "decoder.pt")
    with pytest.raises(ValueError, match="The stage 'decoder' is at step 0 of 1"):
        pretrain.export(tmp_path)


def test_help_shows_the_options(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(pretrain.__file__, run_name="__main__")
    assert end.value.code == 0 and "--transformer_steps" in capsys.readouterr().out
