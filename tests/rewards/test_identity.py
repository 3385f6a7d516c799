import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from hp_edit_trl.rewards import IdentityReward
from tests.helpers import photo
from tests.rewards.helpers import call


SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module", params=["dinov2", "dino"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = {"dinov2": (Dinov2Model, Dinov2Config), "dino": (ViTModel, ViTConfig)}[request.param]
        kind[0](kind[1](**SIZE)).save_pretrained(folder)
    return str(folder)


def noisy(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def local_edit(source):
    """The source with another left quarter."""
    edit = source.copy()
    edit.paste(noisy(source.width // 4, source.height, 7), (0, 0))
    return edit


def left_mask(source, share):
    mask = Image.new("L", source.size, 0)
    mask.paste(255, (0, 0, round(source.width * share), source.height))
    return mask


def check(reward):
    source = photo(64, 64, 1)
    edits = [source, local_edit(source), noisy(64, 64, 3)]
    same, local, other = call(reward, 3, completions=edits, image=[source] * 3)[0]
    assert same == pytest.approx(1, abs=1e-5) and local > 0.99 and other < local - 0.05
    # With the mask, all patches outside count, and nothing inside
    masks = [left_mask(source, share) for share in (0.25, 0, 1)]
    outside, everywhere, nowhere = call(reward, 3, completions=[edits[1]] * 3, image=[source] * 3, mask=masks)[0]
    assert outside > 0.99 and everywhere < outside - 0.01 and nowhere is None


def test_pixels():
    check(IdentityReward(None))
    source = Image.new("RGB", (32, 32), (255, 255, 255))
    gray = Image.new("RGB", (64, 64), (204, 204, 204))  # its size does not matter
    assert call(IdentityReward(None), 1, completions=[gray], image=[source])[0] == [pytest.approx(0.8)]


def test_patches_of_a_model(model):
    reward = IdentityReward(model, batch_size=2)
    reward.load()
    source = photo(64, 64, 1)
    rewards, metrics, _ = call(reward, 2, completions=[source, noisy(64, 64, 3)], image=[source] * 2)
    assert rewards[0] == pytest.approx(1, abs=1e-5) and rewards[1] < 0.99
    assert metrics["identity"] == pytest.approx(sum(rewards) / 2)
    masked = call(reward, 1, completions=[source], image=[source], mask=[left_mask(source, 0.5)])[0]
    assert masked == [pytest.approx(1, abs=1e-5)]
    embedded = reward._embedded([source])
    assert embedded.shape == (1, 16, 32)  # patches alone
    blurred = source.filter(ImageFilter.GaussianBlur(8))
    assert call(reward, 1, completions=[blurred], image=[source])[0][0] < 1


def test_which_cases_it_applies_to():
    reward = IdentityReward(None, tasks=["remove"])
    rewards, _, _ = call(reward, 3, task=["remove", "style", None])
    assert rewards[0] is not None and rewards[1:] == [None, None] and rewards.failed == [False] * 3
    several = call(
        IdentityReward(None), 1, completions=[photo(8, 8)], image=None, images=[[photo(8, 8), photo(9, 9, 2)]]
    )
    assert several[0] == [pytest.approx(1)]  # the first reference


def test_bad_options(tmp_path):
    with pytest.raises(ValueError, match="unchanged=0 must be above 0"):
        IdentityReward(None, unchanged=0)
    with pytest.raises(ValueError, match="tasks='add' must be a list"):
        IdentityReward(None, tasks="add")
    with pytest.raises(ValueError, match="column `image` or `images`"):
        call(IdentityReward(None), 1, image=None)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no square images and patches: name a DINO model"):
        IdentityReward(str(tmp_path)).load()
