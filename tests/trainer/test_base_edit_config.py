from argparse import Namespace
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from hp_edit_trl import DPOEditConfig, FlowGRPOEditConfig
from hp_edit_trl.trainer.sharding import check_fsdp


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"


@pytest.mark.parametrize("config", [FlowGRPOEditConfig, DPOEditConfig])
def test_launches_that_do_not_work_are_refused_with_a_remedy(config, tmp_path, monkeypatch):
    options = dict(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="fsdp is not an option.*fsdp_version: 2"):
        config(**options, fsdp="full_shard")
    with pytest.raises(ValueError, match="DeepSpeed is not supported.*fsdp2.yaml"):
        config(**options, deepspeed={"zero_optimization": {}})
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
