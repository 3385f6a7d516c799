from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import TrainingArguments

from hp_edit_trl import DPOEditConfig, DPOEditTrainer, FlowGRPOEditConfig, FlowGRPOEditTrainer, FlowNFTEditConfig
from hp_edit_trl.miniature import training_args
from hp_edit_trl.miniature.policy import WEIGHTS
from hp_edit_trl.policies import QwenImageEditPlusPolicy
from hp_edit_trl.trainer import base_edit_config
from hp_edit_trl.trainer.base_edit_trainer import warn_of_resolution
from hp_edit_trl.trainer.sharding import check_fsdp


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"


@pytest.mark.parametrize("config", [FlowGRPOEditConfig, DPOEditConfig])
def test_launches_that_do_not_work_are_refused_with_a_remedy(config, tmp_path, monkeypatch):
    options = dict(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="fsdp is not an option.*fsdp_version: 2"):
        config(**options, fsdp="full_shard")
    with pytest.raises(ValueError, match="DeepSpeed is not supported.*fsdp2.yaml"):
        config(**options, deepspeed={"zero_optimization": {}})
    with pytest.raises(ValueError, match="ddp_broadcast_buffers=True is not supported.*different numbers of passes"):
        config(**options, ddp_broadcast_buffers=True)
    assert config(**options).ddp_broadcast_buffers is False  # a pass more on one process would wait for the others
    for variables, message in (
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 1, but only version 2.*accelerate to-fsdp2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 1, but only version 2"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "True"}, "Set fsdp_cpu_ram_efficient_loading: false"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "Set fsdp_offload_params: false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "gradient_checkpointing=True in the trainer's config"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
            for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **variables}.items():
                if name in variables or "DEEPSPEED" not in str(variables):
                    patch.setenv(name, value)
            if variables == {"ACCELERATE_USE_FSDP": "true"}:
                patch.delenv("FSDP_VERSION")
            config(**options)
    monkeypatch.setenv("FSDP_VERSION", "1")  # without FSDP its options are not read
    assert config(**options).ddp_timeout == 14400
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    config(**options)


@pytest.mark.parametrize("config", [FlowGRPOEditConfig, FlowNFTEditConfig, DPOEditConfig])
def test_the_default_type_is_one_that_the_device_has(config, tmp_path, monkeypatch, caplog, recwarn):
    assert config(str(tmp_path), use_cpu=True).bf16 is True and "float32" not in caplog.text
    monkeypatch.setattr(base_edit_config, "is_torch_bf16_gpu_available", lambda: False)
    args = config(str(tmp_path))
    assert args.dataloader_pin_memory is False  # or torch warns at each run
    assert args.bf16 is False and caplog.text.count("training in float32 on 'cpu'") == 1
    assert config(str(tmp_path), bf16=False).bf16 is False and caplog.text.count("float32") == 1
    with pytest.raises(ValueError, match="doesn't support bf16/gpu"):
        config(str(tmp_path), bf16=True)
    assert not [one for one in recwarn if "gradient_checkpointing" in str(one.message)]


def test_a_config_of_another_trainer_is_refused(tmp_path):
    others = [TrainingArguments(str(tmp_path), use_cpu=True), {"output_dir": "x"}, DPOEditConfig]
    for args in [*others, DPOEditConfig(str(tmp_path), use_cpu=True), FlowNFTEditConfig(str(tmp_path), use_cpu=True)]:
        with pytest.raises(TypeError, match=r"needs a FlowGRPOEditConfig: write .*FlowGRPOEditConfig\(output_dir="):
            FlowGRPOEditTrainer("none", print, args)
    with pytest.raises(TypeError, match="args is a TrainingArguments, but this trainer needs a DPOEditConfig"):
        DPOEditTrainer("none", others[0])


@pytest.mark.parametrize(
    ("options", "size", "window"),
    [
        ({}, 4, [0, 5]),
        ({"num_inference_steps": 4}, 3, [0, 3]),
        ({"num_inference_steps": 2}, 1, [0, 1]),
        ({"num_inference_steps": 20}, 4, [0, 10]),
        ({"sde_window_range": [2, 4]}, 2, [2, 4]),
        ({"num_inference_steps": 4, "sde_window_size": 2}, 2, [0, 2]),
    ],
)
def test_the_default_window_fits_the_steps(tmp_path, options, size, window):
    args = FlowGRPOEditConfig(str(tmp_path), use_cpu=True, **options)
    assert (args.sde_window_size, args.sde_window_range) == (size, window)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_accelerate_configs_can_be_launched(file, monkeypatch):
    processes, machines, kind = {
        "one_gpu_24gb": (1, 1, "NO"),
        "one_gpu_80gb": (1, 1, "NO"),
        "eight_gpus_80gb": (8, 1, "MULTI_GPU"),
        "fsdp2": (8, 1, "FSDP"),
        "two_nodes": (16, 2, "MULTI_GPU"),
    }[file.stem]
    config = load_config_from_file(str(file))
    assert (config.num_processes, config.num_machines, config.distributed_type.value) == (processes, machines, kind)
    assert config.mixed_precision == "bf16"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    args = launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    args, defaults, _ = _validate_launch_command(args)
    assert isinstance(args, Namespace) and args.num_processes == processes
    if kind == "NO":
        return
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    assert check_fsdp() == (kind == "FSDP")


@pytest.mark.parametrize(("resolution", "warned"), [(32, False), (8, True), (512, True), (100, False)])
def test_a_resolution_far_from_the_pipelines_own_is_told(resolution, warned, caplog):
    args = SimpleNamespace(model_init_kwargs=None, resolution=resolution)
    for model in (SimpleNamespace(config={"_native_resolution": 32}), str(WEIGHTS)):
        caplog.clear()
        warn_of_resolution(QwenImageEditPlusPolicy, model, args)
        assert ("Set resolution=32" in caplog.text) is warned
        assert ("slow" in caplog.text) is (resolution == 512)
    warn_of_resolution(QwenImageEditPlusPolicy, SimpleNamespace(config={}), args)
    assert ("Set resolution=1024" in caplog.text) is (resolution < 512)


def test_the_miniature_has_options_of_its_own(tmp_path):
    args = training_args(str(tmp_path), max_steps=5)
    assert isinstance(args, FlowGRPOEditConfig) and args.max_steps == 5
    recipe = yaml.safe_load((CONFIGS.parent / "configs" / "embedded.yaml").read_text())
    for name in ("resolution", "num_inference_steps", "true_cfg_scale", "sde_window_size", "sde_window_range",
                 "num_generations", "per_device_train_batch_size", "steps_per_generation", "rollout_batch_size",
                 "num_trained_generations", "same_latent", "weight_by_noise", "learning_rate", "epsilon",
                 "noise_level", "gradient_accumulation_steps"):  # fmt: skip
        assert getattr(args, name) == recipe[name], name
