"""What a LoRA changes is the same in memory, in plain diffusers, in PEFT, and in every format."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from hp_edit_trl.lora_formats import FORMATS, merge_lora, read_lora, write_lora
from hp_edit_trl.miniature.tiny import tiny_klein_pipeline, tiny_kontext_pipeline, tiny_pipeline
from hp_edit_trl.policies import policy_class
from hp_edit_trl.trainer.lora import check_peft_config, check_same_lora, lora_layers, prepare_lora, save_lora


MAKERS = {"qwen": tiny_pipeline, "kontext": tiny_kontext_pipeline, "klein": tiny_klein_pipeline}
BASES = {"qwen": "someone/qwen-image-edit", "kontext": "someone/flux-kontext", "klein": "someone/flux2-klein"}
# Other formats that diffusers reads with the pipelines' own code. It knows the widths of the real FLUX models only.
DIFFUSERS_READS = {"qwen": ("comfyui", "kohya"), "kontext": ("comfyui",), "klein": ()}
# Keys that match several modules, which the first of them decides for; as one set, in any order
KEYS = [
    "to_q", "attn.to_q", "to_[qkv]", ".*", r"transformer_blocks\.0\..*", "transformer_blocks.1.attn.to_k", "to_out.0",
    "to_out", "proj_out", "linear_out", "net.2", "attn.*", r".*0\.attn\.to_v", "add_[qkv]_proj",
]  # fmt: skip


@pytest.fixture(scope="module")
def pipelines():
    return {name: make() for name, make in MAKERS.items()}


def trained(pipelines, family, config):
    """A policy whose LoRA has been trained, on a copy of the family's transformer, and its model."""
    pipeline = copy.copy(pipelines[family])
    pipeline.transformer = copy.deepcopy(pipelines[family].transformer)
    policy = policy_class(pipeline)(pipeline)
    check_peft_config(config)
    model = prepare_lora(policy, config, BASES[family], seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=generator)
    return policy, model


def changes(layers):
    """The whole change of each module's weight, by PEFT's own computation."""
    return {name: layer.get_delta_weight(next(iter(layer.scaling))).detach() for name, layer in layers.items()}


def changes_of(transformer):
    return changes({name: layer for name, layer in transformer.named_modules() if isinstance(layer, LoraLayer)})


def changes_of_file(lora):
    return {name: lora.scale(name) * lora.up[name] @ lora.down[name] for name in lora.names}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        torch.testing.assert_close(found[name], change, rtol=1e-5, atol=1e-7, msg=name)


def plain_diffusers(pipelines, family, file):
    """The changes that diffusers itself makes of a file."""
    pipeline = copy.copy(pipelines[family])
    pipeline.transformer = copy.deepcopy(pipelines[family].transformer)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return changes_of(pipeline.transformer)


def drawn_config(rng):
    targets = [
        None,
        None,
        r"(single_)?transformer_blocks\.\d+\..*(to_q|to_k|to_v|to_out\.0)",
        ["to_q", "to_k", "to_v"],
    ]

    def patterns(values):
        return {key: rng.choice(values) for key in rng.sample(KEYS, rng.randrange(6))}

    return LoraConfig(
        r=rng.choice([1, 2, 4]),
        lora_alpha=rng.choice([1, 4, 7]),
        rank_pattern=patterns([1, 3, 8]),
        alpha_pattern=patterns([0.5, 2, 5, 64]),
        use_rslora=rng.random() < 0.3,
        target_modules=rng.choice(targets),
        exclude_modules=rng.choice([None, None, r".*\.1\..*"]),
    )


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")  # PEFT's, of drawn keys
@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("seed", range(4))
def test_any_patterns_change_the_model_as_trained_in_every_format(pipelines, tmp_path, family, seed):
    rng = random.Random(f"{family} {seed}")
    config = drawn_config(rng)
    policy, model = trained(pipelines, family, config)
    # PEFT's own reading of the user's configuration
    alone = PeftModel(copy.deepcopy(pipelines[family].transformer), copy.deepcopy(model.peft_config["default"]))
    layers = lora_layers(model)
    assert {name: layer.scaling for name, layer in layers.items()} == {
        name: layer.scaling for name, layer in lora_layers(alone).items()
    }
    wanted = changes(layers)
    model.save_pretrained(tmp_path / "lora")
    save_lora(policy, model, str(tmp_path / "lora"))
    lora = read_lora(tmp_path / "lora")
    assert_same(changes_of_file(lora), wanted)
    assert_same(changes_of_file(read_lora(tmp_path / "lora" / "adapter_model.safetensors")), wanted)
    saved = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    assert_same(plain_diffusers(pipelines, family, saved), wanted)
    assert_same(
        changes_of(PeftModel.from_pretrained(copy.deepcopy(pipelines[family].transformer), tmp_path / "lora")), {
            f"base_model.model.{name}": change for name, change in wanted.items()
        }
    )  # fmt: skip
    for file_format in FORMATS:
        try:
            file = write_lora(lora, tmp_path / file_format, file_format)
        except ValueError as error:  # FLUX's stacked modules have one alpha and one rank there
            assert file_format == "kohya", error
            continue
        again = read_lora(file)
        assert_same(changes_of_file(again), wanted)
        if file_format in DIFFUSERS_READS[family]:
            assert_same(plain_diffusers(pipelines, family, file), wanted)
        if file_format == "peft":
            model = PeftModel.from_pretrained(copy.deepcopy(pipelines[family].transformer), tmp_path / "peft")
            assert_same({k.removeprefix("base_model.model."): v for k, v in changes_of(model).items()}, wanted)


def metadata(file):
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["lora_adapter_metadata"])


def test_a_saved_file_has_one_exact_entry_per_module(pipelines, tmp_path):
    # In the order of the alphabet, in which files are written, "attn.to_q" would come first.
    config = LoraConfig(
        r=2, lora_alpha=2, rank_pattern={"to_q": 4, "attn.to_q": 8}, alpha_pattern={"to_q": 64, ".*": 1}
    )
    policy, model = trained(pipelines, "qwen", config)
    save_lora(policy, model, str(tmp_path))
    entries = metadata(tmp_path / "pytorch_lora_weights.safetensors")
    assert set(entries["transformer.rank_pattern"]) == {
        rf"^transformer_blocks\.{i}\.attn\.to_q" for i in range(2)
    } and set(entries["transformer.rank_pattern"].values()) == {4}
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["rank_pattern"] == entries["transformer.rank_pattern"]
    ranks = {name: layer.r["default"] for name, layer in lora_layers(model).items()}
    assert len(stored["alpha_pattern"]) == len(ranks) and all(key.startswith("^") for key in stored["alpha_pattern"])
    assert config.rank_pattern == {"to_q": 4, "attn.to_q": 8}  # the user's own is not modified


def test_names_that_end_alike_are_told_apart(pipelines, tmp_path):
    # The last layer and one in each single block
    names = ["proj_out", "single_transformer_blocks.0.proj_out"]
    for adapted in (names, names[:1]):
        pattern = {"^proj_out": 64} if adapted == names else {}
        config = LoraConfig(r=2, lora_alpha=2, target_modules="|".join(adapted), alpha_pattern=pattern)
        policy, model = trained(pipelines, "kontext", config)
        layers = lora_layers(model)
        assert sorted(layers) == adapted
        save_lora(policy, model, str(tmp_path))
        wanted = changes(layers)
        assert_same(plain_diffusers(pipelines, "kontext", tmp_path / "pytorch_lora_weights.safetensors"), wanted)
        write_lora(read_lora(tmp_path), tmp_path / "peft", "peft")
        model = PeftModel.from_pretrained(copy.deepcopy(pipelines["kontext"].transformer), tmp_path / "peft")
        assert_same({k.removeprefix("base_model.model."): v for k, v in changes_of(model).items()}, wanted)


def test_a_file_that_changes_the_model_otherwise_is_refused(pipelines, tmp_path, monkeypatch):
    policy, model = trained(pipelines, "qwen", LoraConfig(r=2, lora_alpha=4))
    name, layer = next(iter(lora_layers(model).items()))
    layer.set_scale("default", 3.0)
    with pytest.raises(ValueError, match=f"change 1 modules otherwise than the trained LoRA, e.g. {name}"):
        save_lora(policy, model, str(tmp_path))
    assert not list(tmp_path.iterdir())
    layer.set_scale("default", 1.0)
    save_lora(policy, model, str(tmp_path))
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="change 1 modules otherwise"):
        save_lora(policy, model, str(tmp_path))


def test_readers_take_the_first_match_and_refuse_contradictions(pipelines, tmp_path):
    policy, model = trained(pipelines, "qwen", LoraConfig(r=2, lora_alpha=4))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"alpha_pattern": {"to_q": 64, "attn.to_q": 1, ".*": 2}}))
    lora = read_lora(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(pipelines["qwen"].transformer), tmp_path)
    assert set(lora.alpha.values()) == {64, 2}
    assert {name: layer.scaling["default"] for name, layer in lora_layers(loaded).items()} == {
        name: lora.scale(name) for name in lora.names
    }
    # What is not stated has PEFT's default.
    file.write_text(json.dumps({name: value for name, value in config.items() if name != "lora_alpha"}))
    loaded = PeftModel.from_pretrained(copy.deepcopy(pipelines["qwen"].transformer), tmp_path)
    assert next(iter(lora_layers(loaded).values())).scaling["default"] == read_lora(tmp_path).scale(lora.names[0]) == 4
    file.write_text(json.dumps(config | {"rank_pattern": {"to_q": 8}}))
    with pytest.raises(ValueError, match="to_q' has the rank 2, but 8 in the configuration.*Correct r"):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True must be False: other tools"),
        ({"lora_bias": True}, "lora_bias=True must be False: other tools"),
        ({"target_parameters": ["to_q.weight"]}, "target_parameters=.* must be None"),
        ({"layer_replication": [[0, 1]]}, "layer_replication=.* must be None"),
        ({"rank_pattern": {"to_(q": 4}}, r"rank_pattern: 'to_\(q' is not a regular expression"),
        ({"alpha_pattern": {"*": 4}}, r"alpha_pattern: '\*' is not a regular expression"),
        ({"alpha_pattern": {"(?i)TO_Q": 4}}, r"alpha_pattern: '.*TO_Q' is not a regular expression"),  # in PEFT's own
        ({"target_modules": "*to_q"}, r"target_modules: '\*to_q' is not a regular expression"),
        ({"exclude_modules": "(to_q"}, r"exclude_modules: '\(to_q' is not a regular expression"),
        ({"rank_pattern": [("to_q", 4)]}, "rank_pattern and alpha_pattern must be dictionaries"),
        ({"rank_pattern": {"to_q": 2.0}}, r"rank_pattern\['to_q'\]=2.0 must be a whole number of at least 1"),
        ({"r": True}, "r=True must be a whole number of at least 1"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be a number above 0"),
        ({"lora_alpha": math.nan}, "lora_alpha=nan must be a number above 0"),
        ({"lora_alpha": np.float32(4)}, "lora_alpha=.* must be a number above 0"),  # no JSON file takes it
        ({"alpha_pattern": {"to_q": -1}}, r"alpha_pattern\['to_q'\]=-1 must be a number above 0"),
        ({"inference_mode": True}, "inference_mode=True must be False"),
        ({"init_lora_weights": 1}, "init_lora_weights=1 may change"),
    ],
)
def test_kinds_of_lora_that_other_tools_do_not_load_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_peft_config(LoraConfig(**options))


def test_a_run_resumes_its_own_lora_only(pipelines, tmp_path):
    _, model = trained(pipelines, "klein", LoraConfig(r=2, lora_alpha=4, alpha_pattern={"to_q": 1}))
    model.save_pretrained(tmp_path)
    check_same_lora(model, tmp_path)
    for options in (
        {"r": 4}, {"lora_alpha": 8}, {"lora_alpha": 0.5}, {"use_rslora": True}, {"alpha_pattern": {}},
        {"rank_pattern": {"to_k": 1}}, {"target_modules": ["to_q"]},
    ):  # fmt: skip
        options = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"to_q": 1}, **options}
        with pytest.raises(ValueError, match="holds another LoRA than the peft_config of this run gives: '.*to_"):
            check_same_lora(trained(pipelines, "klein", LoraConfig(**options))[1], tmp_path)
    for text in ("[]", "{", '{"lora_alpha": "x"}'):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match="The LoRA of .* cannot be read"):
            check_same_lora(model, tmp_path)
    with pytest.raises(ValueError, match="layers_to_transform needs target_modules as a list"):
        trained(pipelines, "klein", LoraConfig(layers_to_transform=[0]))


def test_a_merge_adds_what_was_trained(pipelines, tmp_path):
    pipelines["qwen"].save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=1, alpha_pattern={"to_q": 64, ".*": 5}, use_rslora=True)
    policy, model = trained(pipelines, "qwen", config)
    save_lora(policy, model, str(tmp_path / "lora"))
    merge_lora(str(tmp_path / "base"), read_lora(tmp_path / "lora"), tmp_path / "merged", torch.float32)
    before, after = (DiffusionPipeline.from_pretrained(tmp_path / name).transformer for name in ("base", "merged"))
    for name, change in changes(lora_layers(model)).items():
        difference = after.get_submodule(name).weight - before.get_submodule(name).weight
        torch.testing.assert_close(difference.detach(), change, rtol=1e-4, atol=1e-5)
