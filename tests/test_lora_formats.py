import json
import re
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline
from safetensors.torch import load_file, save_file

from hp_edit_trl.cli import main
from hp_edit_trl.lora_formats import (
    FORMATS,
    Lora,
    base_transformer,
    describe_lora,
    merge_lora,
    misfits,
    read_lora,
    write_lora,
)
from hp_edit_trl.miniature.tiny import tiny_klein_pipeline, tiny_kontext_pipeline, tiny_pipeline
from hp_edit_trl.policies import policy_class
from hp_edit_trl.trainer.lora import prepare_lora, save_lora
from tests.helpers import photo
from tests.processes import Script


MAKERS = {"qwen": tiny_pipeline, "kontext": tiny_kontext_pipeline, "klein": tiny_klein_pipeline}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """For each family the folder of a base pipeline, and of a LoRA as the trainers save it."""
    folders = {}
    for name, make in MAKERS.items():
        folder = tmp_path_factory.mktemp(name)
        make().save_pretrained(folder / "base")
        pipeline = make()
        policy = policy_class(pipeline)(pipeline)
        model = prepare_lora(policy, None, str(folder / "base"), seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.05, generator=generator)
        model.save_pretrained(folder / "lora")
        save_lora(policy, model, str(folder / "lora"))
        folders[name] = folder
    return folders


def assert_equal(first: Lora, second: Lora):
    assert first.names == second.names and first.alpha == second.alpha
    for name in first.names:
        assert torch.equal(first.down[name], second.down[name]) and torch.equal(first.up[name], second.up[name]), name


def edit(pipeline, size=64):
    """What a pipeline makes of a photo."""
    if isinstance(pipeline, FluxKontextPipeline):
        more = {"max_area": size * size, "_auto_resize": False, "guidance_scale": 2.5}
    else:
        more = {}
    return pipeline(
        image=photo(size, size), prompt="Blur it", height=size, width=size, num_inference_steps=2, output_type="np",
        generator=torch.Generator().manual_seed(0), **more,
    ).images  # fmt: skip


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("file_format", FORMATS)
def test_round_trips_are_exact(saved, tmp_path, family, file_format):
    original = read_lora(saved[family] / "lora")
    assert original.file_format == "diffusers" and set(original.alpha.values()) == {64}
    written = write_lora(original, tmp_path / "out", file_format)
    again = read_lora(written if file_format != "peft" else tmp_path / "out")
    assert again.file_format == file_format
    assert_equal(original, again)
    assert_equal(original, read_lora(write_lora(again, tmp_path / "back.safetensors", "diffusers")))
    assert misfits(again, base_transformer(str(saved[family] / "base"))) == []


def test_both_files_of_a_trainer_are_the_same_lora(saved):
    folder = saved["qwen"] / "lora"
    peft = read_lora(folder / "adapter_model.safetensors")
    assert peft.file_format == "peft" and peft.base_model.endswith("base")
    assert_equal(read_lora(folder), peft)


# diffusers reads the formats of other tools with its own code. It multiplies weights by alpha / rank, here 2.
@pytest.mark.parametrize(
    ("family", "file_format"),
    [
        ("qwen", "kohya"), ("qwen", "comfyui"), ("klein", "kohya"), ("qwen", "diffusers"), ("kontext", "diffusers"),
        ("klein", "diffusers"),
    ],
)  # fmt: skip
def test_diffusers_reads_what_is_written(saved, tmp_path, family, file_format):
    lora = read_lora(saved[family] / "lora")
    file = write_lora(lora, tmp_path / "x.safetensors", file_format)
    expected = DiffusionPipeline.from_pretrained(saved[family] / "base")
    without = None if family == "qwen" else edit(expected, 96)
    expected.load_lora_weights(str(saved[family] / "lora"))
    plain = DiffusionPipeline.from_pretrained(saved[family] / "base")
    plain.load_lora_weights(str(file.parent), weight_name=file.name)
    weights = [
        {name: p for name, p in pipeline.transformer.named_parameters() if "lora_" in name}
        for pipeline in (expected, plain)
    ]
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) == 2 * len(lora.names)
    if family != "qwen":  # Qwen's pipeline always sees its references at a megapixel, which takes its time
        images = edit(expected, 96), edit(plain, 96)
        assert np.abs(images[0] - without).max() > 1e-3
        assert np.abs(images[0] - images[1]).max() < 1e-6
    scale = 1 if file_format == "diffusers" else 2
    for name, weight in weights[0].items():
        factor = scale if "lora_A" in name else 1
        assert torch.equal(weight * factor, weights[1][name]), name


def test_kohya_of_kontext_as_diffusers_reads_it():
    # Its reader knows the widths of the real model only: one block of each kind.
    generator = torch.Generator().manual_seed(0)
    widths = {
        "transformer_blocks.0.attn.to_q": (3072, 3072), "transformer_blocks.0.attn.to_k": (3072, 3072),
        "transformer_blocks.0.attn.to_v": (3072, 3072), "transformer_blocks.0.ff.net.2": (3072, 12288),
        "single_transformer_blocks.0.attn.to_q": (3072, 3072), "single_transformer_blocks.0.attn.to_k": (3072, 3072),
        "single_transformer_blocks.0.attn.to_v": (3072, 3072), "single_transformer_blocks.0.proj_mlp": (12288, 3072),
    }  # fmt: skip
    lora = Lora(
        {name: torch.randn(2, inputs, generator=generator) for name, (_, inputs) in widths.items()},
        {name: torch.randn(outputs, 2, generator=generator) for name, (outputs, _) in widths.items()},
        dict.fromkeys(widths, 4.0),
        "diffusers",
    )
    from hp_edit_trl.lora_formats import _to_kohya

    state = _to_kohya(lora)
    assert state["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (21504, 8)
    assert state["lora_unet_single_blocks_0_linear1.alpha"] == 16
    read = FluxKontextPipeline.lora_state_dict(state)
    assert len(read) == 2 * len(widths)
    for name in widths:
        assert torch.equal(read[f"transformer.{name}.lora_A.weight"], 2 * lora.down[name])
        assert torch.equal(read[f"transformer.{name}.lora_B.weight"], lora.up[name])


def test_names_and_alphas_of_other_tools(saved, tmp_path):
    lora = read_lora(saved["qwen"] / "lora")
    comfyui = load_file(write_lora(lora, tmp_path / "comfyui.safetensors", "comfyui"))
    assert comfyui["diffusion_model.transformer_blocks.0.attn.to_q.alpha"] == 64.0
    kohya = load_file(write_lora(lora, tmp_path / "kohya.safetensors", "kohya"))
    assert kohya["lora_unet_transformer_blocks_0_attn_to_out_0.alpha"] == 64.0
    assert kohya["lora_unet_transformer_blocks_1_img_mlp_net_0_proj.lora_down.weight"].shape == (32, 48)
    flux = load_file(write_lora(read_lora(saved["kontext"] / "lora"), tmp_path / "flux.safetensors", "kohya"))
    assert flux["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].shape == (96, 96)
    assert flux["lora_unet_double_blocks_0_img_attn_qkv.alpha"] == 3 * 64


def test_a_dense_kohya_lora_of_stacked_modules(tmp_path):
    # Trained by sd-scripts over queries, keys and values together: each takes the whole down weight.
    state = {
        "lora_unet_double_blocks_3_img_attn_qkv.lora_down.weight": torch.randn(3, 8),
        "lora_unet_double_blocks_3_img_attn_qkv.lora_up.weight": torch.randn(24, 3),
        "lora_unet_double_blocks_3_img_attn_qkv.alpha": torch.tensor(1.5),
    }
    save_file(state, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors")
    whole = (
        0.5
        * state["lora_unet_double_blocks_3_img_attn_qkv.lora_up.weight"]
        @ (state["lora_unet_double_blocks_3_img_attn_qkv.lora_down.weight"])
    )
    for i, name in enumerate("qkv"):
        module = f"transformer_blocks.3.attn.to_{name}"
        change = lora.scale(module) * lora.up[module] @ lora.down[module]
        torch.testing.assert_close(change, whole[8 * i : 8 * i + 8])


@pytest.mark.parametrize("family", MAKERS)
def test_merging(saved, tmp_path, family):
    lora = read_lora(saved[family] / "lora")
    merge_lora(str(saved[family] / "base"), lora, tmp_path, torch.float32)
    before, after = (
        DiffusionPipeline.from_pretrained(folder).transformer.state_dict()
        for folder in (saved[family] / "base", tmp_path)
    )
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        expected = weight.double()
        if name.endswith(".weight") and module in lora.down:
            expected = expected + 2 * lora.up[module].double() @ lora.down[module].double()
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_flux_in_its_original_layout(saved, tmp_path):
    # As ai-toolkit writes it: sd-scripts' modules, with dots.
    lora = read_lora(saved["kontext"] / "lora")
    kohya = load_file(write_lora(lora, tmp_path / "kohya.safetensors", "kohya"))
    original = {}
    for name, weight in kohya.items():
        target, _, part = name.removeprefix("lora_unet_").partition(".")
        kind, number, suffix = target.split("_blocks_")[0] + "_blocks", *target.split("_blocks_")[1].split("_", 1)
        suffix = suffix.replace("attn_", "attn.").replace("mlp_", "mlp.")
        part = part.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        original[f"diffusion_model.{kind}.{number}.{suffix}.{part}"] = weight
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight" in original
    save_file(original, tmp_path / "original.safetensors")
    assert_equal(lora, read_lora(tmp_path / "original.safetensors"))


def test_qwen_image_21_has_no_names_in_sd_scripts(tmp_path):
    for module, base in (("img_mlp.proj", None), ("attn.to_q", "Qwen/Qwen-Image-2.1")):
        name = f"transformer_blocks.0.{module}"
        lora = Lora({name: torch.ones(2, 4)}, {name: torch.ones(4, 2)}, {name: 2.0}, "diffusers", base)
        with pytest.raises(ValueError, match="Qwen-Image-2.1's modules in sd-scripts are not known"):
            write_lora(lora, tmp_path / "kohya.safetensors", "kohya")


@pytest.mark.parametrize("family", ["qwen", "klein"])
def test_attention_alone_is_told_apart_by_the_base_model(saved, tmp_path, family):
    lora = read_lora(saved[family] / "lora")
    names = [name for name in lora.names if re.match(r"transformer_blocks\.\d+\.attn\.to_[qkv]$", name)]
    parts = [{name: values[name] for name in names} for values in (lora.down, lora.up, lora.alpha)]
    known = Lora(*parts, "diffusers", lora.base_model)
    again = read_lora(write_lora(known, tmp_path / "diffusers", "diffusers"))
    assert again.base_model == lora.base_model
    first = sorted(load_file(write_lora(again, tmp_path / "kohya", "kohya")))[0]
    assert first.startswith(
        "lora_unet_" + ("transformer_blocks_0" if family == "qwen" else "double_blocks_0_img_attn_qkv")
    )
    assert_equal(known, read_lora(tmp_path / "kohya"))
    unknown = Lora(*parts, "diffusers", None)
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        write_lora(unknown, tmp_path, "kohya")
    assert all(name.startswith("transformer.") for name in load_file(write_lora(unknown, tmp_path / "c", "comfyui")))


def test_ranks_and_alphas_may_differ(tmp_path, monkeypatch):
    # The name of the base model says enough where its configuration cannot be read.
    monkeypatch.setattr(DiffusionPipeline, "load_config", Mock(side_effect=OSError))
    names = [f"transformer_blocks.{i}.attn.to_q" for i in range(3)]
    lora = Lora(
        {name: torch.randn(2 + i, 8) for i, name in enumerate(names)},
        {name: torch.randn(8, 2 + i) for i, name in enumerate(names)},
        {names[0]: 4, names[1]: 4, names[2]: 2.5},
        "diffusers",
        "Qwen/Qwen-Image-Edit-2509",
    )
    for file_format in FORMATS:
        assert_equal(lora, read_lora(write_lora(lora, tmp_path / file_format, file_format)))


def test_what_a_lora_touches(saved, capsys):
    main(["check-lora", str(saved["qwen"] / "lora"), "--base", str(saved["qwen"] / "base")])
    told = capsys.readouterr().out
    assert "rank        32" in told and "alpha       64" in told and "float32" in told
    assert "     2  transformer_blocks.*.attn.to_q" in told and "     1  transformer_blocks.*.txt_mlp.net.2" in told
    assert "fits" in told and "untrained" not in told
    lora = read_lora(saved["qwen"] / "lora")
    lora.up[lora.names[0]] = torch.zeros_like(lora.up[lora.names[0]])
    assert f"untrained   1 modules, e.g. {lora.names[0]}" in describe_lora(lora)


def test_a_lora_for_another_model(saved, tmp_path, capsys, caplog):
    base, lora = str(saved["qwen"] / "base"), str(saved["kontext"] / "lora")
    for command in (
        ["check-lora", lora, "--base", base],
        ["merge-lora", base, lora, "--output_dir", str(tmp_path / "x")],
    ):
        with pytest.raises(SystemExit, match="was not trained on .*the model has no such linear layer.*and .* more"):
            main(command)
    assert not (tmp_path / "x").exists()
    # Of the same shapes, and trained on another
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    main(["check-lora", str(saved["qwen"] / "lora"), "--base", str(tmp_path / "other")])
    assert "fits" in capsys.readouterr().out and "says that it was trained on" in caplog.text
    with pytest.raises(SystemExit, match="is the folder of the base model itself"):
        other = str(tmp_path / "other")
        main(["merge-lora", other, str(saved["qwen"] / "lora"), "--output_dir", other])
    lora = read_lora(saved["qwen"] / "lora")
    lora.down[lora.names[0]] = torch.zeros(32, 7)
    assert misfits(lora, base_transformer(str(saved["qwen"] / "base"))) == [
        f"{lora.names[0]}: 48 x 7 in the LoRA, 48 x 48 in the model"
    ]
    with pytest.raises(SystemExit, match="is not a diffusers pipeline"):
        main(["check-lora", str(saved["qwen"] / "lora"), "--base", str(tmp_path)])
    (tmp_path / "other" / "transformer" / "config.json").unlink()
    with pytest.raises(SystemExit, match="is not a diffusers pipeline"):
        main(["check-lora", str(saved["qwen"] / "lora"), "--base", str(tmp_path / "other")])


def test_files_that_are_no_lora(tmp_path, saved):
    def told(content, name="x.safetensors", **files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        if isinstance(content, dict):
            save_file({key: weight.clone() for key, weight in content.items()}, folder / name)
        elif content is not None:
            (folder / name).write_bytes(content)
        for other, text in files.items():
            (folder / other.replace("__", ".")).write_text(text)
        with pytest.raises(ValueError) as error:
            read_lora(folder)
        return str(error.value)

    weight = torch.zeros(2, 4)
    assert "has no safetensors file" in told(None)
    assert "cannot be read as safetensors" in told(b"not a safetensors file at all")
    assert "is not a LoRA of a transformer in a known format" in told(
        {"unet.down_blocks.0.to_q.lora_A.weight": weight}
    )
    assert "has weights such as 'blocks.0.weight'" in told({"blocks.0.weight": weight})
    assert "has only one of its two weights" in told({"transformer.proj_out.lora_A.weight": weight})
    assert "'a.lora_A.weight' is not a module" in told({"transformer.a.lora_A.weight": weight})
    assert "has no weights of a LoRA" in told({"transformer.proj_out.alpha": weight})
    qkv = "lora_unet_double_blocks_0_img_attn_qkv"
    assert "has no lora_down" in told({f"{qkv}.lora_up.weight": weight})
    assert "has no lora_up" in told({f"{qkv}.lora_down.weight": weight})
    assert "has 4 outputs, which 3 modules cannot share" in told(
        {f"{qkv}.lora_down.weight": weight, f"{qkv}.lora_up.weight": torch.zeros(4, 2)}
    )
    assert "do not fit together" in told(
        {"transformer.proj_out.lora_A.weight": weight, "transformer.proj_out.lora_B.weight": weight}
    )
    assert "is a DoRA" in told(
        {
            f"transformer.proj_out.{part}": weight
            for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        }
    )
    for text, wrong in (
        ("[1]", "is no JSON object, but '[1]'"),
        ("{", "is not JSON"),
        ('{"r": "two"}', "r='two' in the configuration of the LoRA is not valid"),
        ('{"rank_pattern": [1]}', "rank_pattern=[1] in the configuration"),
        ('{"alpha_pattern": {"a": null}}', "alpha_pattern={'a': None} in the configuration"),
    ):
        peft = {"base_model.model.proj_out.lora_A.weight": weight}
        assert wrong in told(peft, "adapter_model.safetensors", adapter_config__json=text)
    assert "without adapter_config.json" in told(
        {"base_model.model.a.lora_A.weight": weight}, "adapter_model.safetensors"
    )
    assert "not a module of Qwen-Image" in told(
        {
            "lora_unet_transformer_blocks_0_foo.lora_down.weight": weight,
            "lora_unet_transformer_blocks_0_foo.lora_up.weight": weight,
        }
    )
    assert "not a module of a supported transformer" in told(
        {
            "lora_unet_down_blocks_0_to_q.lora_down.weight": weight,
            "lora_unet_down_blocks_0_to_q.lora_up.weight": weight,
        }
    )
    with pytest.raises(ValueError, match="PEFT's format is a folder"):
        write_lora(read_lora(saved["qwen"] / "lora"), tmp_path / "x.safetensors", "peft")
    with pytest.raises(ValueError, match="format='onnx' is not known"):
        write_lora(read_lora(saved["qwen"] / "lora"), tmp_path, "onnx")
    partly = read_lora(saved["kontext"] / "lora")
    for weights in (partly.down, partly.up, partly.alpha):
        weights.pop("transformer_blocks.0.attn.to_k")
    with pytest.raises(ValueError, match="does not adapt 'transformer_blocks.0.attn.to_k'"):
        write_lora(Lora(partly.down, partly.up, partly.alpha, "diffusers"), tmp_path, "kohya")
    (tmp_path / "model_index.json").write_text('{"_class_name": "LongCatImageEditPipeline"}')
    with pytest.raises(ValueError, match="LongCat's modules in sd-scripts are unknown"):  # Kontext's modules
        write_lora(Lora(partly.down, partly.up, partly.alpha, "diffusers", str(tmp_path)), tmp_path, "kohya")


def test_the_commands(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora = str(saved["qwen"] / "lora")
    main(["export-lora", lora, "--output_dir", "out", "--format", "peft"])
    assert capsys.readouterr().out == "out/adapter_model.safetensors\n"
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 64
    main(["export-lora", lora, "--output_dir", "some.safetensors", "--format", "comfyui"])
    assert capsys.readouterr().out == "some.safetensors\n" and (tmp_path / "some.safetensors").is_file()
    main(["merge-lora", str(saved["qwen"] / "base"), lora, "--output_dir", "merged"])
    weights = load_file(tmp_path / "merged" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    command = ["-m", "hp_edit_trl.cli", "export-lora", "x.safetensors", "--output_dir=o", "--format=kohya"]
    done = Script(*command, cwd=tmp_path).wait()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith(
        "hp-edit: The model 'x.safetensors' is neither a local file or folder nor in the cache"
    )
