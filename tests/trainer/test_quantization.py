"""Training on quantized base models. bitsandbytes computes on the CPU here, see `allow_bitsandbytes_on_cpu`."""

import importlib.metadata
import json
import logging
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from datasets import Dataset
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from trl import TrlParser

from hp_edit_trl import DPOEditConfig, DPOEditTrainer, EditModelConfig, FlowGRPOEditConfig, FlowGRPOEditTrainer
from hp_edit_trl.lora_formats import describe_lora, merge_lora, read_lora, write_lora
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.policies import QwenImageEditPlusPolicy
from hp_edit_trl.scripts import EditScriptArguments, mine_pairs
from hp_edit_trl.scripts.grpo import ARGUMENTS
from hp_edit_trl.scripts.utils import ScriptParser
from hp_edit_trl.trainer.base_edit_trainer import find_policy, load_policy
from hp_edit_trl.trainer.lora import lora_layers, prepare_lora
from hp_edit_trl.utils.offload import on_device
from hp_edit_trl.utils.quantization import check_quantization
from hp_edit_trl.utils.revisions import weights_digest
from tests.helpers import allow_bitsandbytes_on_cpu, make_cases, make_config, photo, redness
from tests.processes import Script


NF4 = {"quant_backend": "bitsandbytes_4bit"}
FP8 = {"quant_backend": "torchao", "quant_kwargs": {"quant_type": "Float8WeightOnlyConfig"}}
CPU = ["--use_cpu", "true", "--bf16", "false"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a pipeline that is not quantized."""
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline(num_attention_heads=4).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def bitsandbytes_on_cpu():
    with pytest.MonkeyPatch.context() as monkeypatch:
        allow_bitsandbytes_on_cpu(monkeypatch)
        yield


def loaded(base, config, dtype="float32"):
    kwargs = {"quantization_config": config, "dtype": dtype}
    args = SimpleNamespace(model_init_kwargs=kwargs, bf16=False, offload_encoders=True, resolution=64)
    return load_policy(QwenImageEditPlusPolicy, base, args)[0]


@pytest.fixture(scope="module")
def nf4(base):
    return loaded(base, NF4 | {"quant_kwargs": {"bnb_4bit_use_double_quant": True}})


def weight_types(module):
    return {type(part.weight).__name__ for part in module.modules() if isinstance(part, nn.Linear)}


@pytest.mark.parametrize(
    ("options", "kind", "weights"),
    [
        (
            {"load_in_4bit": True, "use_bnb_nested_quant": True},
            "bitsandbytes NF4 with nested quantization",
            "Params4bit",
        ),
        ({"load_in_8bit": True}, "torchao Int8WeightOnlyConfig", "Int8Tensor"),
    ],
    ids=["nf4", "int8"],
)  # fmt: skip
def test_train_and_save(base, tmp_path, caplog, options, kind, weights):
    args = make_config(
        tmp_path / "out", rollout_batch_size=3, num_generations=4, gradient_accumulation_steps=1, num_sample_edits=0,
        offload_encoders=True, logging_steps=1, num_inference_steps=3,
    )  # fmt: skip
    model_args = EditModelConfig(model_name_or_path=base, **options)
    args.model_init_kwargs = model_args.init_kwargs(args) | {"revision": None}
    trainer = FlowGRPOEditTrainer(
        model=base,
        reward_funcs=redness,
        args=args,
        train_dataset=make_cases(1),
        peft_config=LoraConfig(r=4, lora_alpha=8),
    )
    pipeline = trainer.policy.pipeline
    assert weight_types(pipeline.transformer) - {"Parameter"} == weight_types(pipeline.text_encoder) - {"Parameter"}
    assert weight_types(pipeline.transformer) - {"Parameter"} == {weights} and trainer.policy.dtype == torch.float32
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    # Sampled in batches of 3 and 1, trained in one of 4
    logs = trainer.state.log_history[0]
    assert max(value for name, value in logs.items() if name.startswith("logp_diff")) < 1e-6
    assert logs["grad_norm"] > 0
    json.loads(trainer.model.config.to_json_string())  # as trackers do

    trainer.save_model()
    on_what = f"transformer: {kind}, text_encoder: {kind}"
    assert f"The base model was quantized during training ({on_what})." in (tmp_path / "out/README.md").read_text()
    lora = read_lora(tmp_path / "out")
    assert lora.base_quantization == on_what and f"quantized   {on_what}" in describe_lora(lora)
    for file_format in ("comfyui", "kohya", "peft"):
        again = read_lora(write_lora(lora, tmp_path / file_format, file_format))
        assert again.base_quantization == on_what
    # It changes the weights in full precision as it does the quantized ones.
    plain = DiffusionPipeline.from_pretrained(base)
    plain.load_lora_weights(str(tmp_path / "out"))
    layers = lora_layers(trainer.model)
    found = {name: part for name, part in plain.transformer.named_modules() if isinstance(part, LoraLayer)}
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        torch.testing.assert_close(found[name].get_delta_weight("default_0"), change, rtol=1e-5, atol=1e-7)
    with caplog.at_level(logging.WARNING, "hp_edit_trl"):
        merge_lora(base, lora, tmp_path / "merged", torch.float32)
    assert f"was trained on quantized weights ({on_what})" in caplog.text


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from hp_edit_trl import EditModelConfig, FlowGRPOEditTrainer
from tests.helpers import make_cases, make_config, redness

args = make_config(sys.argv[2], num_inference_steps=3, gradient_accumulation_steps=1, per_device_train_batch_size=2,
                   max_steps=1, logging_steps=1)
args.model_init_kwargs = EditModelConfig(load_in_8bit=True).init_kwargs(args) | {"revision": None}
trainer = FlowGRPOEditTrainer(model=sys.argv[1], reward_funcs=redness, args=args, train_dataset=make_cases(1))
trainer.train()
logs = trainer.state.log_history[0]
assert trainer.accelerator.num_processes == 2 and logs["grad_norm"] > 0 and logs["logp_diff/step_1"] < 1e-6, logs
"""


@pytest.mark.slow
def test_two_processes(base, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = Script(tmp_path / "script.py", base, tmp_path / "out", processes=2).wait()
    assert done.returncode == 0, done.stderr[-4000:]


def test_gradients_point_the_same_way(base):
    gradients = {}
    for name, config in (("full", None), ("nf4", NF4), ("int8", {"quant_backend": "torchao"}), ("fp8", FP8)):
        policy = loaded(base, config)
        model = prepare_lora(policy, LoraConfig(r=4), base, seed=0)
        generator = torch.Generator().manual_seed(1)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        if not gradients:  # the same for all
            conditions = policy.encode([photo(64, 64)], "make it red", None, 64)
        latents = torch.randn(1, conditions.num_tokens, conditions.num_channels, generator=generator)
        direction = torch.randn(latents.shape, generator=generator)
        velocity = policy.velocity(model, latents, torch.tensor(0.5), policy.collate([conditions]), 1.0)
        (velocity * direction).sum().backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
    for name, least in (("nf4", 0.9), ("int8", 0.999), ("fp8", 0.99)):
        assert torch.cosine_similarity(gradients[name], gradients["full"], dim=0) > least, name


def test_dpo(base, tmp_path):
    rows = [{**case, "chosen": photo(64, 64, 7), "rejected": photo(64, 64, 8)} for case in make_cases(2, [(64, 64)])]
    args = DPOEditConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, resolution=64, max_steps=1,
        per_device_train_batch_size=2, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    args.model_init_kwargs = EditModelConfig(load_in_8bit=True).init_kwargs(args) | {"revision": None}
    trainer = DPOEditTrainer(model=base, args=args, train_dataset=Dataset.from_list(rows))
    assert weight_types(trainer.policy.pipeline.transformer) - {"Parameter"} == {"Int8Tensor"}
    assert trainer.train().training_loss == pytest.approx(0.6931, abs=1e-4)  # the reference has the same weights


def test_the_type_is_that_of_the_other_weights(base):
    for config, dtype in (
        (NF4 | {"quant_kwargs": {"bnb_4bit_quant_storage": "float16"}}, torch.bfloat16),
        ({"quant_backend": "torchao"}, torch.bfloat16),
        (NF4, torch.float32),
    ):
        policy = loaded(base, config, str(dtype).removeprefix("torch."))
        assert policy.dtype == dtype
        if config["quant_backend"] != "torchao":
            layer = policy.pipeline.transformer.transformer_blocks[0].attn.to_q
            assert layer.compute_dtype == dtype and layer.weight.quant_state.quant_type == "nf4"


def test_only_the_named_components(base):
    policy = loaded(base, NF4 | {"components_to_quantize": "transformer"})
    assert weight_types(policy.pipeline.text_encoder) == {"Parameter"}
    with pytest.raises(ValueError, match=r"\['vae', 7\] cannot be quantized. Of this pipeline can be: transformer, "):
        loaded(base, NF4 | {"components_to_quantize": ["transformer", "vae", 7]})


def states(module):
    weights = [part.weight for part in module.modules() if hasattr(getattr(part, "weight", None), "quant_state")]
    return [(w.quant_state, w.quant_state.absmax, w.quant_state.state2.absmax, w.quant_state.offset) for w in weights]


def test_a_quantized_encoder_is_offloaded_with_its_scales(nf4):
    encoder = nf4.pipeline.text_encoder
    before, weights = states(encoder), dict(encoder.named_parameters())
    assert len(before) > 10
    with on_device(encoder, torch.device("meta")):
        assert all(parameter.is_meta for parameter in encoder.parameters())
        assert all(tensor.is_meta for _, *tensors in states(encoder) for tensor in tensors)
    assert all(parameter is weights[name] for name, parameter in encoder.named_parameters())
    for state, again in zip(before, states(encoder), strict=True):
        assert all(one is other for one, other in zip(state, again, strict=True))
    # So is one of torchao.
    images = [photo(64, 64)]
    for policy in (nf4, loaded(nf4.pipeline.config._name_or_path, {"quant_backend": "torchao"})):
        with policy.loaded("text_encoder"):
            once = policy.encode(images, "red", None, 64).tensors["prompt_embeds"]
        assert once.equal(policy.encode(images, "red", None, 64).tensors["prompt_embeds"])


def test_a_pipeline_that_is_stored_quantized(base, nf4, tmp_path):
    nf4.pipeline.save_pretrained(tmp_path / "nf4")
    again = loaded(str(tmp_path / "nf4"), None)
    assert weight_types(again.pipeline.transformer) == {"Params4bit"}
    layer = prepare_lora(again, LoraConfig(r=1), base, 0).get_base_model().transformer_blocks[0].attn.to_q
    assert isinstance(layer, LoraLayer)
    plain = QwenImageEditPlusPolicy(DiffusionPipeline.from_pretrained(base))
    model = prepare_lora(plain, LoraConfig(r=1), base, 0)
    lora = read_lora_of(model, tmp_path)
    with pytest.raises(ValueError, match="is stored quantized, and rounding would lose most of what the LoRA changes"):
        merge_lora(str(tmp_path / "nf4"), lora, tmp_path / "merged")


def read_lora_of(model, folder):
    model.save_pretrained(folder / "lora")
    return read_lora(folder / "lora")


def test_8_bits_of_bitsandbytes_are_refused(base):
    in_8_bits = dict(quant_backend="bitsandbytes_8bit", quant_kwargs={"load_in_8bit": True})
    of_both = {
        "transformer": diffusers.BitsAndBytesConfig(load_in_8bit=True),
        "text_encoder": transformers.BitsAndBytesConfig(load_in_8bit=True),
    }
    for config in (
        in_8_bits,
        PipelineQuantizationConfig(**in_8_bits),
        PipelineQuantizationConfig(**in_8_bits, components_to_quantize=["transformer"]),
        PipelineQuantizationConfig(quant_mapping=of_both),
    ):
        with pytest.raises(ValueError, match="LLM.int8.* rounds the inputs"):
            check_quantization(config, "cpu")
    pipeline = DiffusionPipeline.from_pretrained(base, quantization_config=config)
    with pytest.raises(ValueError, match="LLM.int8.* rounds the inputs"):
        prepare_lora(QwenImageEditPlusPolicy(pipeline), None, base, 0)
    with pytest.raises(ValueError, match="offload_encoders: text_encoder is quantized to 8 bits by bitsandbytes"):
        QwenImageEditPlusPolicy(pipeline, offload_encoders=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("nf4", "must be a mapping with `quant_backend`"),
        ({}, "quant_backend=None must be one of bitsandbytes_4bit, torchao"),
        ({"quant_backend": ["torchao"]}, r"quant_backend=\['torchao'\] must be one of"),
        ({"quant_backend": "gguf"}, "quant_backend='gguf' must be one of"),
        (NF4 | {"quant_kwarg": {}}, "has no option quant_kwarg. It has: quant_backend"),
        (NF4 | {"quant_kwargs": "nf4"}, "quant_kwargs='nf4' must be a mapping"),
        (NF4 | {"components_to_quantize": []}, r"components_to_quantize=\[\] must be a list of names"),
        (NF4 | {"components_to_quantize": 3}, "components_to_quantize=3 must be a list of names"),
        (NF4 | {"quant_kwargs": {"quant_type": "nf4"}}, "of bitsandbytes_4bit has no quant_type. It has: load_in"),
        (NF4 | {"quant_kwargs": {"bnb_4bit_quant_type": "nf5"}}, "bnb_4bit_quant_type='nf5' must be 'nf4' or 'fp4'"),
        (NF4 | {"quant_kwargs": {"bnb_4bit_compute_dtype": "bf16"}}, "'bf16' is not a type of tensors"),
        (NF4 | {"quant_kwargs": {"load_in_4bit": False}}, "contradict quant_backend='bitsandbytes_4bit'"),
        (NF4 | {"quant_kwargs": {"load_in_8bit": True}}, "contradict quant_backend='bitsandbytes_4bit'"),
        ({"quant_backend": "torchao", "quant_kwargs": {"quant_type": "int8wo"}}, "'int8wo' must be one of Int8Weight"),
        ({"quant_backend": "torchao", "quant_kwargs": {"quant_type": ["x"]}}, r"quant_type=\['x'\] must be one of"),
    ],
)  # fmt: skip
def test_bad_options(config, message):
    with pytest.raises(ValueError, match=message):
        check_quantization(config, "cpu")


def test_bad_arguments_of_the_backend(base):
    with pytest.raises(ValueError, match="quant_kwargs={'bnb_4bit_use_double_quant': 'yes'} is wrong: .* must be a b"):
        loaded(base, NF4 | {"quant_kwargs": {"bnb_4bit_use_double_quant": "yes"}})


def test_what_the_machine_lacks(monkeypatch, tmp_path):
    args = make_config(tmp_path)
    version = importlib.metadata.version
    for package, installed in (("bitsandbytes", None), ("bitsandbytes", "0.40.0"), ("torchao", None)):

        def found(name, package=package, installed=installed):
            if name != package:
                return version(name)
            if installed is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return installed

        with monkeypatch.context() as context:
            context.setattr(importlib.metadata, "version", found)
            model_args = EditModelConfig(load_in_4bit=package != "torchao", load_in_8bit=package == "torchao")
            message = rf'needs {package}>=0\..*: pip install "hp-edit-trl\[quantization\]"'
            args.model_init_kwargs = model_args.init_kwargs(make_config(tmp_path))
            with pytest.raises(ImportError, match=message):
                find_policy("someone/editor", args)
            # Before anything is downloaded: there is no Hub here
            config = {"quant_backend": "torchao" if package == "torchao" else "bitsandbytes_4bit"}
            with pytest.raises(ImportError, match=message):
                FlowGRPOEditTrainer(
                    model="someone/editor",
                    reward_funcs=redness,
                    args=make_config(tmp_path, model_init_kwargs={"quantization_config": config}),
                    train_dataset=make_cases(2),
                )
    monkeypatch.undo()
    monkeypatch.setattr("hp_edit_trl.utils.quantization.BITSANDBYTES_DEVICES", ("cuda", "xpu", "mps"))
    with pytest.raises(ValueError, match=r"\(load_in_4bit\) needs a GPU .* on 'cpu'.*use 8 bits \(load_in_8bit\)"):
        args.model_init_kwargs = EditModelConfig(load_in_4bit=True).init_kwargs(make_config(tmp_path))
        find_policy("someone/editor", args)


def test_options_that_do_not_fit(tmp_path):
    for options, message in (
        ({"load_in_4bit": True, "load_in_8bit": True}, "8 bit and 4 bit precision at the same time"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4' has no effect without load_in_4bit"),
        ({"use_bnb_nested_quant": True, "load_in_8bit": True}, "use_bnb_nested_quant=True has no effect without"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, "bnb_4bit_quant_type='nf3' must be 'nf4' or 'fp4'"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "uint8"}, "bnb_4bit_quant_storage is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            EditModelConfig(**options)
    args = make_config(tmp_path, model_init_kwargs={"quantization_config": FP8})
    with pytest.raises(ValueError, match="load_in_8bit and model_init_kwargs: quantization_config are both set"):
        EditModelConfig(load_in_8bit=True).init_kwargs(args)


@pytest.mark.parametrize("where", ["command", "script"])
@pytest.mark.parametrize("source", ["file", "words"])
def test_from_yaml_and_command_line(tmp_path, where, source):
    def parsed(yaml, *words):
        (tmp_path / "recipe.yaml").write_text(yaml)
        words = ["--config", str(tmp_path / "recipe.yaml"), *CPU, "--output_dir", str(tmp_path), *words]
        words += ["--model_name_or_path", "a/b", "--dataset_name", "c/d"]
        if where == "command":
            parser = ScriptParser("grpo", ARGUMENTS)
            _, training_args, model_args = parser.parse_dict(parser.parse(words)[0])
        else:
            parser = TrlParser((EditScriptArguments, FlowGRPOEditConfig, EditModelConfig))
            _, training_args, model_args = parser.parse_args_and_config(words)
        return model_args.init_kwargs(training_args)["quantization_config"]

    if source == "file":
        found = parsed("load_in_4bit: true\nuse_bnb_nested_quant: true\nbnb_4bit_quant_type: fp4")
    else:
        words = ["--load_in_4bit", "true", "--use_bnb_nested_quant", "true", "--bnb_4bit_quant_type", "fp4"]
        found = parsed("seed: 1", *words)
    options = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}
    assert found == {"quant_backend": "bitsandbytes_4bit", "quant_kwargs": options}

    wanted = FP8 | {"components_to_quantize": ["transformer"]}
    if source == "file":
        found = parsed(json.dumps({"model_init_kwargs": {"quantization_config": wanted}}))
    else:
        found = parsed("seed: 1", "--model_init_kwargs", json.dumps({"quantization_config": wanted}))
    assert found == wanted


def test_mining_with_a_quantized_editor(base, tmp_path, monkeypatch):
    make_cases(2).save_to_disk(tmp_path / "cases")
    options = dict(dataset_name=str(tmp_path / "cases"), model_name_or_path=base, model_revision=None, dtype="float32")
    pipelines = []
    monkeypatch.setattr(mine_pairs, "load_scorer", lambda args: SimpleNamespace(load=lambda: None))
    monkeypatch.setattr(
        mine_pairs, "mine_preference_pairs", lambda pipeline, *args, **kwargs: pipelines.append(pipeline) or []
    )
    for bits in ("load_in_4bit", "load_in_8bit"):
        mine_pairs.main(mine_pairs.MiningArguments(**options, **{bits: True}))
    assert [weight_types(pipeline.transformer) for pipeline in pipelines] == [{"Params4bit"}, {"Int8Tensor"}]
    assert len({weights_digest(pipeline.transformer) for pipeline in pipelines}) == 2
    with pytest.raises(ValueError, match="load_in_4bit and load_in_8bit are both set"):
        mine_pairs.main(mine_pairs.MiningArguments(**options, load_in_4bit=True, load_in_8bit=True))
    monkeypatch.setattr("hp_edit_trl.utils.quantization.BITSANDBYTES_DEVICES", ("cuda", "xpu", "mps"))
    with pytest.raises(ValueError, match=r"\(load_in_4bit\) needs a GPU"):
        mine_pairs.main(mine_pairs.MiningArguments(dataset_name="nowhere", load_in_4bit=True))
