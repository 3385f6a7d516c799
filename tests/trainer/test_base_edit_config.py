import pytest

from hp_edit_trl import DPOEditConfig, FlowGRPOEditConfig


@pytest.mark.parametrize("config", [FlowGRPOEditConfig, DPOEditConfig])
def test_sharded_launches_are_refused(config, tmp_path, monkeypatch):
    options = dict(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    for name, option in (("FSDP", {"fsdp": "full_shard"}), ("DeepSpeed", {"deepspeed": {"zero_optimization": {}}})):
        with pytest.raises(ValueError, match=f"{name} is not supported.*Launch with DDP"):
            config(**options, **option)
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"{name} is not supported"):
            patch.setenv(variable, "true")
            config(**options)
    assert config(**options).ddp_timeout == 14400
