import contextlib
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from bitsandbytes.nn import Params4bit
from datasets import Dataset
from diffusers import PipelineQuantizationConfig
from peft import LoraConfig
from PIL import Image
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import TrainerCallback

from hp_edit_trl import FlowGRPOEditConfig, FlowGRPOEditTrainer, FlowNFTEditConfig, FlowNFTEditTrainer
from hp_edit_trl.miniature.tiny import tiny_kontext_pipeline, tiny_pipeline, tiny_qwen_image_21_pipeline
from hp_edit_trl.policies import FluxKontextPolicy, QwenImageEditPlusPolicy
from hp_edit_trl.trainer.plan import CARDS, TrainingPlan, advice, advice_text, judged, parse_card, plan_training
from hp_edit_trl.trainer.rehearsal import QuantizedLinear, Rehearsal, _prompt, alone
from hp_edit_trl.utils.dry_run import Meter
from hp_edit_trl.utils.quantization import in_bits


OPTIONS = {
    "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "resolution": 64, "max_steps": 2,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "rollout_batch_size": 4,
    "optim": "adamw_torch_fused", "num_sample_edits": 2, "disable_tqdm": True, "logging_steps": 100,
}  # fmt: skip
LAYERS = ["to_q", "to_v", "to_out.0"]  # fewer than by default: dry runs take as long as they have operations
GRPO = {"num_generations": 4, "num_inference_steps": 4, "sde_window_size": 2, "sde_window_range": [0, 2]}


def grpo_config(folder, **options) -> FlowGRPOEditConfig:
    return FlowGRPOEditConfig(str(folder), **{**OPTIONS, **GRPO, **options})


class OptimizerSteps(TrainerCallback):
    """Measures the optimizer's steps of a real run."""

    def __init__(self, meter: Meter):
        self.meter, self.stack = meter, contextlib.ExitStack()

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.meter.hold("gradients", [p.grad for p in model.parameters() if p.grad is not None])
        self.stack.enter_context(self.meter.measured("optimizer"))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.stack.close()


def held_state(trainer: FlowGRPOEditTrainer) -> list:
    """What a plan must leave as it is."""
    return [
        dict(PartialState._shared_state), dict(AcceleratorState._shared_state), trainer.accelerator.device,
        torch.get_rng_state().tolist(), id(trainer._buffered_samples), trainer.state.global_step,
        [id(module) for module in trainer.model.modules()],
        [(id(value), value.sum().item()) for value in trainer.model.parameters()],
    ]  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Meter, TrainingPlan, dict, dict]:
    """A real run that was measured; its plan; and what a run of all its blocks takes, extrapolated and not."""
    pipeline = tiny_pipeline(num_layers=4)
    args = grpo_config(tmp_path_factory.mktemp("run"), beta=0.1)
    prompt = _prompt(QwenImageEditPlusPolicy(pipeline), 30)
    cases = Dataset.from_list([{"prompt": prompt, "image": Image.new("RGB", (64, 64))}] * 2)
    trainer = FlowGRPOEditTrainer(
        pipeline,
        lambda completions, **_: [float(i**2) for i in range(len(completions))],
        args,
        cases,
        eval_dataset=cases,
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules=LAYERS),
    )
    meter = Meter()
    names = {"encode": "encoding", "decode": "decoding", "train": "training"}
    trainer._timed = lambda phase: meter.measured(names.get(phase, phase))
    trainer.add_callback(OptimizerSteps(meter))
    with meter:
        modules = [trainer.model, *trainer.policy.encoders.values()]
        meter.hold("weights", [[*module.parameters(), *module.buffers()] for module in modules])
        meter.hold("tables", [list(vars(module).values()) for module in trainer.model.modules()])
        trainer.train()
        with meter.measured("evaluation"):
            trainer.sample_edits([trainer._read_case(cases, 0), trainer._read_case(cases, 1)])
    figures, measure = [], Rehearsal.measure

    def with_few_blocks_and_with_all(rehearsal, args):
        figures.extend([measure(rehearsal, args), measure(rehearsal, args, few=4)])
        return figures[0]

    before = held_state(trainer)
    with mock.patch.object(Rehearsal, "measure", with_few_blocks_and_with_all):
        plan = trainer.plan(gpu="h100", prompt_tokens=30)
    assert held_state(trainer) == before
    return meter, plan, *figures


@pytest.mark.parametrize("phase", ["encoding", "rollout", "decoding", "training", "optimizer", "evaluation"])
def test_memory_is_within_five_percent_of_a_real_run(measured, phase):
    meter, plan, _, _ = measured
    assert plan.phases[phase]["peak"] == pytest.approx(meter.phases[phase].peak, rel=0.05)


def test_operations_are_those_of_a_real_run(measured):
    meter, plan, _, _ = measured
    counts = {name: sum(phase.counts.values()) for name, phase in meter.phases.items()}
    for phase in ("encoding", "rollout", "decoding", "training"):
        assert 2 * plan.update["flops"][phase] == counts[phase]  # two updates
    assert plan.update["rollout_passes"] == 4 * 4 * 2  # samples, steps, guidance
    assert plan.update["trained_passes"] == 4 * 2 * (2 + 2)  # and the reference
    assert plan.update["judge_calls"] == 4
    assert plan.run["updates"] == 2 and plan.run["judge_calls"] == 8


def test_passes_that_are_left_out(tmp_path):
    """By hand, for each of two processes with two groups of 4 edits, of which 2 are trained, in microbatches of 1."""
    fewer = {"same_latent": True, "num_finish_steps": 1, "num_trained_generations": 2}
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "rollout_batch_size": 4}
    window = {"num_inference_steps": 6, "sde_window_size": 2, "sde_window_range": [0, 4], "true_cfg_scale": 1.0}
    with alone(2):
        args = grpo_config(tmp_path, **fewer, **sizes, **window, gradient_checkpointing=False, num_sample_edits=0)
    plan = plan_training(
        FlowGRPOEditTrainer, tiny_pipeline(), args, {}, LoraConfig(target_modules=["to_q"]), num_processes=2
    )
    shared = (1 + 2 + 3) / 3  # the window begins at step 0, 1 or 2
    assert plan.update["rollout_passes"] == 2 * 2 * (shared + 4 * (1 + 1))  # its second step, and the finish
    assert plan.update["trained_passes"] == 2 * 2 * (1 + 2)  # one of the first step, and each edit's second one
    assert plan.update["judge_calls"] == 16


def assert_same(first, second) -> None:
    """Equal numbers. Sizes may differ by a few blocks of the allocator, whose rounding is not linear."""
    if isinstance(first, dict):
        for key in {**first, **second}:
            assert_same(first.get(key, 0), second.get(key, 0))
    else:
        assert abs(first - second) <= 4 * 512


def test_nft(tmp_path):
    options = dict(num_generations=2, num_inference_steps=3, num_train_sigmas=2, ema_decay=0.9, num_sample_edits=0)
    args = FlowNFTEditConfig(str(tmp_path), **{**OPTIONS, **options, "gradient_checkpointing": False})
    lora = LoraConfig(target_modules=["to_q"])
    plan = plan_training(FlowNFTEditTrainer, tiny_pipeline(), args, {}, lora, num_processes=1)
    # An update samples 4 edits in 3 steps, and trains them at 2 levels: the policy, the old one and the reference.
    assert plan.update["rollout_passes"] == 4 * 3 and plan.update["trained_passes"] == 4 * 2 * 3
    assert plan.phases["training"]["parts"]["adapter copies"] == 2 * plan.weights["adapter"]
    assert plan.checkpoint["adapter copies"] == 2 * plan.weights["adapter"]
    assert plan.settings["num_train_sigmas"] == 2 and "sde_window_size" not in plan.settings


def test_a_prefix_is_counted_once_for_each_case_and_update(tmp_path):
    pipeline = tiny_qwen_image_21_pipeline()
    options = {"gradient_checkpointing": True, "gradient_accumulation_steps": 4, "max_steps": 1}
    with alone(1):
        args = grpo_config(tmp_path, **options)
        lora = LoraConfig(r=4, target_modules=LAYERS)
        rehearsal = Rehearsal(FlowGRPOEditTrainer, pipeline, {}, lora, prompt_tokens=30)
        figures = rehearsal._run(args, dict(rehearsal.blocks), light=False)
    cases = Dataset.from_list([{"prompt": rehearsal.prompt, "image": Image.new("RGB", (64, 64))}] * 2)
    trainer = FlowGRPOEditTrainer(
        pipeline, lambda completions, **_: [float(i**2) for i in range(len(completions))],
        grpo_config(tmp_path, **options), cases, peft_config=lora,
    )  # fmt: skip
    meter = Meter()
    trainer._timed = lambda phase: meter.measured({"train": "training"}.get(phase, phase))
    with meter:
        trainer.train()
    for phase, times in (("rollout", 1), ("training", 4 * 2)):  # microbatches, steps
        counts = figures["phases"][phase]["counts"]
        assert counts.pop("prefixes") * times == 2  # cases
        assert counts.pop("passes") * times == (2 * 4 * 4 if phase == "rollout" else 8 * 2)
        assert {kind: round(number * times) for kind, number in counts.items()} == meter.phases[phase].counts


def test_runs_with_few_blocks_tell_what_many_take(measured):
    _, _, few, all_blocks = measured
    assert_same(few, all_blocks)


def test_blocks_of_two_kinds(tmp_path):
    pipeline = tiny_kontext_pipeline()
    config = {**pipeline.transformer.config, "num_layers": 3, "num_single_layers": 4}
    pipeline.transformer = type(pipeline.transformer).from_config(config)
    with alone(2):
        args = grpo_config(tmp_path, bf16=True, gradient_checkpointing=False, num_sample_edits=0)
        rehearsal = Rehearsal(FlowGRPOEditTrainer, pipeline, {}, LoraConfig(target_modules=LAYERS))
        assert_same(rehearsal.measure(args, light=True), rehearsal.measure(args, light=True, few=4))


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "int8"])
def test_quantized_layers_take_what_real_ones_take(kind):
    layer = nn.Linear(512, 384, dtype=torch.bfloat16)
    four = kind.startswith("nf4")
    stand_in = QuantizedLinear(layer, in_bits(four, not four, nested=kind.endswith("nested")))
    if four:
        weight = Params4bit(layer.weight.data.clone(), quant_type="nf4", compress_statistics=kind.endswith("nested"))
        real = weight.to("cpu")
        state = real.quant_state
        scales = [state.absmax, *([state.state2.absmax] if state.nested else [])]
        taken = real.nbytes + sum(tensor.nbytes for tensor in scales)
    else:
        quantize_(layer, Int8WeightOnlyConfig())
        parts = [getattr(layer.weight, name) for name in layer.weight.__tensor_flatten__()[0]]
        taken = sum(tensor.nbytes for tensor in parts)
    assert stand_in.weight.nbytes + stand_in.scales.nbytes == pytest.approx(taken, rel=0.01)
    # A pass keeps no dequantized weight, and reaches the inputs
    inputs = torch.randn(2, 512, requires_grad=True)
    outputs = stand_in(inputs)
    outputs.sum().backward()
    assert outputs.shape == (2, 384) and outputs.dtype == torch.float32 and inputs.grad.shape == (2, 512)


def test_a_configuration_object_of_a_quantization_cannot_be_planned(tmp_path):
    tiny_kontext_pipeline().save_pretrained(tmp_path / "model")
    options = {"dtype": torch.float32}
    for config, message in (
        (PipelineQuantizationConfig("bitsandbytes_4bit", {"load_in_4bit": True}), "as a mapping, or load_in_4bit"),
        ({"quant_backend": "bitsandbytes_8bit"}, "LLM.int8"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_training(
                FlowGRPOEditTrainer, str(tmp_path / "model"), grpo_config(tmp_path),
                options | {"quantization_config": config},
            )  # fmt: skip


class Stub:
    """A rehearsal that needs as much as its function says."""

    judge, is_sharded = None, False

    def __init__(self):
        self.quantization, self.tried = {}, []

    def quantize(self, config):
        assert config["quant_backend"] == "bitsandbytes_4bit"
        self.quantization = {"transformer": config}

    def measure(self, args, light=False):
        assert light
        self.tried.append(args)
        needed = needed_gib(args, self.is_sharded, bool(self.quantization))
        return {"phases": {name: {"peak": int(gib * 2**30), "parts": {}} for name, gib in needed.items()}}


def needed_gib(args, is_sharded, is_quantized) -> dict[str, float]:
    assert is_sharded + is_quantized + args.offload_transformer < 2
    weights = 20 if args.offload_encoders else 40
    weights -= 12 if args.offload_transformer else 10 if is_sharded else 9 if is_quantized else 0
    activations = 1 if args.gradient_checkpointing else 30
    activations += 10 if args.num_checkpointed_blocks else 0
    return {
        "placing": weights,
        "rollout": weights + args.rollout_batch_size,
        "training": weights + 2 + activations * args.per_device_train_batch_size,
    }


ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize(
    ("memory", "options", "changes", "fits"),
    [  # memory with 5 % and a GiB added
        (60, {"gradient_checkpointing": False}, {"gradient_checkpointing": True}, True),
        (47.5, {"per_device_train_batch_size": 4, "rollout_batch_size": 1},
         {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, True),
        (47, {**ONE, "rollout_batch_size": 8}, {"rollout_batch_size": 2}, True),
        (30, {**ONE, "rollout_batch_size": 2}, {"offload_encoders": True}, True),
        (20, {**ONE, "rollout_batch_size": 1}, {"offload_encoders": True, "offload_transformer": True}, True),
        (8, {**ONE, "rollout_batch_size": 1}, {"offload_encoders": True, "offload_transformer": True}, False),
        (47.5, {**ONE, "rollout_batch_size": 1, "num_checkpointed_blocks": 3},
         {"num_checkpointed_blocks": None}, True),
        (20, {**ONE, "rollout_batch_size": 1, "world_size": 4}, {"offload_encoders": True, "fsdp2": True}, True),
    ],
)  # fmt: skip
def test_advice_is_the_smallest_change_that_fits(tmp_path, memory, options, changes, fits):
    options = dict(options)
    with alone(options.pop("world_size", 1)):
        args = grpo_config(tmp_path, **options)
        check_advice(args, memory, changes, fits)


def check_advice(args, memory, changes, fits):
    card, rehearsal = parse_card("h100", memory), Stub()
    before = args.to_dict()
    advised = advice(rehearsal, args, card, judged(rehearsal.measure(args, True)["phases"], card))
    assert args.to_dict() == before
    assert advised["fits"] == fits and advised["options"] == changes
    last = rehearsal.tried[-1]
    assert last.per_device_train_batch_size * last.steps_per_generation == (
        args.per_device_train_batch_size * args.steps_per_generation
    )
    if not fits:
        assert "rtx4090" in advised["gpus"] and advised["needed"] > 8 * 2**30
    if {"fsdp2", "offload_transformer"} & changes.keys():
        assert advised["needed_in_4_bits"] == pytest.approx((14 * 1.05 + 1) * 2**30, rel=1e-6)
        text = advice_text(advised)
        assert "With load_in_4bit: true in place of" in text and "fsdp2:" not in text
        assert ("FSDP2 (examples/accelerate/fsdp2.yaml)" in text) == ("fsdp2" in changes)
    else:
        assert advised["needed_in_4_bits"] is None and "4bit" not in advice_text(advised)


@pytest.mark.parametrize("name", ["H100", "a100-40", "RTX 4090", "rtx_4090"])
def test_cards_are_found_in_any_spelling(name):
    assert parse_card(name) in CARDS.values()
    assert parse_card(name, 20).memory == 20


@pytest.mark.parametrize(("name", "memory"), [("h1000", None), ("", None), ("h100", 0), ("h100", float("nan"))])
def test_cards_that_do_not_exist(name, memory):
    with pytest.raises(ValueError, match="gpu"):
        parse_card(name, memory)


@pytest.mark.parametrize(
    "options", [{"utilization": 0}, {"utilization": 40}, {"price_per_gpu_hour": -1}, {"prompt_tokens": 0}]
)
def test_options_are_checked_before_anything_is_run(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        plan_training(FlowGRPOEditTrainer, tiny_kontext_pipeline(), grpo_config(tmp_path), {}, **options)


def test_too_many_references(tmp_path):
    with pytest.raises(ValueError, match="num_references=2, but FluxKontextPipeline takes .* at most 1"):
        plan_training(FlowGRPOEditTrainer, tiny_kontext_pipeline(), grpo_config(tmp_path), {}, num_references=2)


def test_a_model_on_the_wrong_device_fails(tmp_path, monkeypatch):
    collate = FluxKontextPolicy.collate

    def on_the_host(self, conditions):
        return {name: value.cpu() if name == "img_ids" else value for name, value in collate(self, conditions).items()}

    monkeypatch.setattr(FluxKontextPolicy, "collate", on_the_host)
    with pytest.raises(RuntimeError, match="device"):
        plan_training(FlowGRPOEditTrainer, tiny_kontext_pipeline(), grpo_config(tmp_path), {})


def test_a_sharded_transformer(tmp_path):
    pipeline = tiny_pipeline(num_layers=6)
    block = sum(p.nbytes for p in pipeline.transformer.transformer_blocks[0].parameters())
    with alone(4):
        args = grpo_config(tmp_path, gradient_checkpointing=True)
    lora = LoraConfig(r=2, target_modules=LAYERS)
    plans = [
        plan_training(FlowGRPOEditTrainer, pipeline, args, {}, lora, num_processes=4, is_sharded=sharded)
        for sharded in (False, True)
    ]
    plain, sharded = (plan.phases["placing"]["parts"]["transformer"] for plan in plans)
    # A share, the two blocks that are used, and a buffer for one; small weights take a block of the allocator each
    assert plain - sharded == pytest.approx(6 * block * 3 / 4 - 3 * block, rel=0.06)
    assert plain > 6 * block and plans[1].weights == plans[0].weights
    assert plans[1].update == plans[0].update and plans[1].settings["fsdp2"] and not plans[0].settings["fsdp2"]
    for options, processes in (({"gradient_checkpointing": True}, 1), ({"gradient_checkpointing": False}, 4)):
        with pytest.raises(
            ValueError, match="FSDP can be planned with several processes, with gradient_checkpointing"
        ):
            plan_training(
                FlowGRPOEditTrainer, pipeline, grpo_config(tmp_path, **options), {}, lora,
                num_processes=processes, is_sharded=True,
            )  # fmt: skip
