from pathlib import Path

import pytest

from hp_edit_trl.cli import main
from hp_edit_trl.miniature.tiny import tiny_kontext_pipeline
from hp_edit_trl.scripts.plan import choose_trainer, parse


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A model without weights."""
    path = tmp_path_factory.mktemp("kontext")
    tiny_kontext_pipeline().save_pretrained(path)
    for file in path.rglob("*.safetensors"):
        file.unlink()
    return str(path)


def config(tmp_path, text: str) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return str(file)


def test_a_card_that_is_too_small(folder, tmp_path, capsys):
    output = tmp_path / "plan.json"
    options = """\
resolution: 32
num_generations: 2
num_inference_steps: 3
sde_window_size: 1
gradient_accumulation_steps: 2
rollout_batch_size: 1
offload_encoders: true
num_sample_edits: 0
lora_target_modules: [to_q, to_v]
judge_base_url: http://localhost:1/v1
max_steps: 10
"""
    words = ["plan", "--config", config(tmp_path, options), "--model_name_or_path", folder, "--output", str(output)]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--gpu", "rtx4090", "--gpu_memory", "0.9", "--price-per-gpu-hour", "1"])
    assert stopped.value.code == 1
    printed = " ".join(capsys.readouterr().out.split())
    advice = "Even with offload_transformer: true it takes 1.0 GiB, which these have: h100"
    assert f"It does not fit the card. {advice}" in printed
    assert "10 updates" in printed and "20 calls of the judge" in printed
    assert '"fits": false' in output.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h1000"], "gpu='h1000' is not known: use one of h100"),
        (["--gpu_memory", "-1"], "gpu_memory=-1.0 must be a number of GB above 0"),
        (["--utilization", "2"], "utilization=2.0"),
        (["--num_references", "5"], "takes at least one reference, and at most 1"),
    ],
)
def test_wrong_values(folder, words, message):
    with pytest.raises(SystemExit, match=message):
        main(["plan", "--model_name_or_path", folder, "--judge_base_url", "http://localhost:1/v1", *words])


@pytest.mark.parametrize("content", ["gpus: 3\n", "resolution 512", "learning_rat: 1"])
def test_wrong_configs(folder, tmp_path, content, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--model_name_or_path", folder, "--config", config(tmp_path, content)])
    assert stopped.value.code == 2
    assert "--config" in capsys.readouterr().err


def test_a_folder_without_a_configuration(folder, tmp_path):
    (tmp_path / "model_index.json").write_text(Path(folder, "model_index.json").read_text())
    with pytest.raises(SystemExit, match="cannot be planned: its model_index.json and each component's configuration"):
        main(["plan", "--model_name_or_path", str(tmp_path), "--judge_base_url", "http://localhost:1/v1"])


def test_a_model_of_the_hub_without_a_network():
    with pytest.raises(SystemExit, match="The model 'no/model' is neither a local file or folder nor in the cache"):
        main(["plan", "--model_name_or_path", "no/model", "--judge_base_url", "http://localhost:1/v1"])


def test_the_trainer_follows_from_the_options(tmp_path):
    assert choose_trainer(["--resolution", "512"])[0] == "grpo"
    assert choose_trainer(["--safeguard", "true"])[0] == "dpo"
    assert choose_trainer([f"--config={config(tmp_path, 'sigma_sampling: uniform')}"])[0] == "dpo"
    assert choose_trainer(["--num_train_sigmas", "1"])[0] == "nft"
    assert choose_trainer(["dpo", "--resolution", "512"]) == ("dpo", ["--resolution", "512"])


def test_types_are_those_of_training(folder):
    def dtype(*words: str) -> str:
        return str(parse(["--model_name_or_path", folder, *words])[0]["options"]["dtype"])

    assert dtype() == dtype("--bf16", "true") == "torch.bfloat16"
    assert dtype("--bf16", "false") == dtype("--fp16", "true") == "torch.float32"
    assert dtype("--dtype", "float16") == "torch.float16"
    assert parse(["--model_name_or_path", folder, "--num_processes", "8"])[0]["num_processes"] == 8


def test_a_launch_with_fsdp(folder, tmp_path):
    file = Path(__file__).parents[2] / "examples" / "accelerate" / "fsdp2.yaml"
    arguments, _ = parse(["--model_name_or_path", folder, "--config_file", str(file)])
    assert (arguments["num_processes"], arguments["is_sharded"]) == (8, True)
    first = tmp_path / "fsdp1.yaml"
    first.write_text(file.read_text().replace("fsdp_version: 2", "fsdp_version: 1"))
    with pytest.raises(ValueError, match="fsdp_version: 1, but only version 2"):
        parse(["--model_name_or_path", folder, "--config_file", str(first)])
    arguments, _ = parse(["--model_name_or_path", folder, "--num_processes", "2"])
    assert (arguments["num_processes"], arguments["is_sharded"]) == (2, False)
