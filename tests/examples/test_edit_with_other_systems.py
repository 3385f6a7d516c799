"""Adapters of editors that diffusers does not have, on stand-ins with the signatures of their own code."""

import json
from types import SimpleNamespace

import edit_with_other_systems as other
import pytest
import torch
from PIL import Image

from hp_edit_trl.editors import FolderEditor, edit_seed
from tests.helpers import make_cases, photo


def generator(seed):
    return torch.Generator().manual_seed(seed)


def picture(size, draw: torch.Tensor) -> Image.Image:
    return Image.new("RGB", size, tuple(int(one) for one in draw % 256))


class ImageGenerator:
    """As in Step1X-Edit's `inference.py`."""

    def generate_image(self, prompt, negative_prompt, ref_images, num_steps, cfg_guidance, seed, num_samples=1,
                       init_image=None, image2image_strength=0.0, show_progress=False, size_level=512):  # fmt: skip
        assert (negative_prompt, num_samples, num_steps, cfg_guidance, size_level) == ("", 1, 28, 6.0, 1024)
        return [picture(ref_images.size, torch.randint(256, (3,), generator=generator(seed)))]


class InterleaveInferencer:
    """As in BAGEL's `inferencer.py`."""

    def __call__(self, image=None, text=None, **kargs):
        accepted = {"cfg_text_scale", "cfg_img_scale", "cfg_interval", "timestep_shift", "num_timesteps",
                    "cfg_renorm_min", "cfg_renorm_type"}  # fmt: skip
        assert isinstance(text, str) and set(kargs) == accepted
        return {"image": picture(image.size, torch.randint(256, (3,))), "text": None}


class FluxPipeline:
    """As in X2Edit's `src/pipeline_1024.py`."""

    def __call__(self, prompt=None, task_id=None, prompt_2=None, height=None, width=None, num_inference_steps=28,
                 timesteps=None, guidance_scale=3.5, num_images_per_prompt=1, generator=None,
                 max_sequence_length=512, subject_images=(), offset=128):  # fmt: skip
        assert task_id == len(prompt) and height % 8 == width % 8 == 0 and len(subject_images) == 1
        return SimpleNamespace(images=[picture((width, height), torch.randint(256, (3,), generator=generator))])


class OmniGen2Pipeline:
    def __call__(self, prompt, input_images, width, height, num_inference_steps, max_sequence_length,
                 text_guidance_scale, image_guidance_scale, cfg_range, num_images_per_prompt, generator,
                 output_type):  # fmt: skip
        assert output_type == "pil" and all(isinstance(one, Image.Image) for one in input_images)
        return SimpleNamespace(images=[picture((width, height), torch.randint(256, (3,), generator=generator))])


def run_model_and_return_samples(args, state, text, image1=None, image2=None):
    """As in UniWorld-V1's `univa/eval/imgedit/step1_gen_samples.py`."""
    assert (args, state) == ("args", "state") and (image2 is None or Image.open(image2))
    return [picture(Image.open(image1).size, torch.randint(256, (3,)))]


def set_seed(seed, rank=0, device_specific=True):
    torch.manual_seed(seed + rank)


ADAPTERS = {
    "Step1X-Edit": lambda: other.step1x_edit(ImageGenerator()),
    "BAGEL": lambda: other.bagel(InterleaveInferencer(), set_seed),
    "X2Edit": lambda: other.x2edit(FluxPipeline(), len, lambda image: image.resize((101, 52)), generator),
    "UniWorld-V1": lambda: other.uniworld_v1(run_model_and_return_samples, "args", "state", set_seed),
    "OmniGen2": lambda: other.omnigen2(OmniGen2Pipeline(), generator),
}


@pytest.mark.parametrize("system", ADAPTERS)
def test_an_edit_depends_on_its_case_and_seed_alone(system):
    edit = ADAPTERS[system]()
    size = (104, 56) if system == "X2Edit" else (96, 64)
    first, again, another = (edit([photo(96, 64)], "Blur it", seed) for seed in (5, 5, 6))
    assert first.size == size and first.tobytes() == again.tobytes() != another.tobytes()
    three = [photo(96, 64)] * 3
    if system == "OmniGen2":
        assert edit([*three, photo(4096, 1024)], "Blur it", 5).size == (2048, 512)
        return
    with pytest.raises(other.CaseError, match=f"{system} takes .*reference image.*, but the case has 3"):
        edit(three, "Blur it", 5)


def test_cases_go_out_and_edits_come_back(tmp_path, capsys):
    cases = make_cases(6)
    cases.save_to_disk(tmp_path / "bench")
    out, edits = tmp_path / "cases", tmp_path / "edits" / "Step1X-Edit"
    other.main(
        ["cases", "--dataset", f"{tmp_path}/bench", "--split", "train", "--seed", "3", "--output_dir", str(out)]
    )
    rows = json.loads((out / "cases.json").read_text())["cases"]
    assert [row["seed"] for row in rows] == [edit_seed(3, one) for one in cases["id"]]
    (tmp_path / "editor.py").write_text(
        "from PIL import Image\n"
        "def edit(images, prompt, seed):\n"
        "    if 'number 2' in prompt:\n"
        "        raise RuntimeError('no memory')\n"
        "    if 'number 3' in prompt:\n"
        "        return None\n"
        "    return Image.new('RGB', images[0].size, (seed % 256, 0, 0))\n"
    )
    words = ["edits", "--cases", str(out), "--editor", f"{tmp_path}/editor.py:edit", "--output_dir", str(edits)]
    other.main([*words, "--part", "1", "--parts", "2"])
    assert sorted(path.name for path in edits.iterdir()) == ["case-1.png", "case-5.png"]
    before = (edits / "case-1.png").stat().st_mtime_ns
    other.main(words)
    assert "2 cases have no edit" in capsys.readouterr().out and (edits / "case-1.png").stat().st_mtime_ns == before
    found = FolderEditor(edits)([[photo(8, 8)]] * 6, ["x"] * 6, cases["id"], range(6))
    assert [edit is not None for edit in found] == [True, True, False, False, True, True]
    assert found[1].getpixel((0, 0)) == (edit_seed(3, "case-1") % 256, 0, 0)


def test_bad_input(tmp_path, capsys):
    for words, message in (
        (["edits", "--cases", str(tmp_path), "--editor", "x.py:e", "--output_dir", "o"], "has no cases.json"),
        (["edits", "--cases", "c", "--editor", "x.py:e", "--output_dir", "o", "--part", "2"], "below --parts 1"),
    ):
        with pytest.raises(SystemExit):
            other.main(words)
        assert message in capsys.readouterr().err
    for path in ("x.py:edit", "module:edit", "edit"):
        with pytest.raises(ValueError, match="is not of the form file.py:name"):
            other.imported(path)
    (tmp_path / "x.py").write_text("edit = 3\n")
    with pytest.raises(ValueError, match="has no function 'edit'"):
        other.imported(f"{tmp_path}/x.py:edit")
    rows = [{"id": str(i), "prompt": "x", "seed": 0, "references": [], "edit": f"{i}.png"} for i in range(9)]
    (tmp_path / "cases.json").write_text(json.dumps({"cases": rows}))
    with pytest.raises(RuntimeError, match="The first eight cases failed"):
        other.edit_cases(tmp_path, lambda *_: 1 / 0, tmp_path / "edits")
