"""The example as a user runs it: as a script in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
from PIL import Image


EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*arguments, cwd, script="train_qwen_edit.py"):
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_embedded_default(tmp_path):
    done = run("--max_steps", "3", "--eval_steps", "3", "--save_steps", "3", "--log_completions", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    output = tmp_path / "outputs" / "qwen-edit-embedded"
    assert "3/3" in done.stderr  # the progress bar
    state = QwenImageLoraLoaderMixin.lora_state_dict(str(output))
    assert any(key.endswith("to_q.lora_B.weight") and value.abs().max() > 0 for key, value in state.items())
    assert "qwen-edit-embedded" in (output / "README.md").read_text()
    for name in ("reward_curve.png", "before_after.png"):
        assert min(Image.open(output / name).size) > 100
    assert "| all | 400 |" in done.stdout and (output / "scores.csv").exists() and (output / "hard_cases.png").exists()
    # It goes on where it was.
    again = run("--max_steps", "4", "--resume_from_checkpoint", str(output / "checkpoint-3"), cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-4000:]


@pytest.mark.parametrize("form", ["--model_name_or_path=somewhere", "--model_name_or_path somewhere"])
def test_a_model_of_ones_own_is_not_trained_with_the_embedded_config(tmp_path, form):
    done = run(*form.split(), "--output_dir", "x", "--use_cpu", "true", cwd=tmp_path)
    assert done.returncode == 1 and "--dataset_name is needed" in done.stderr


def test_a_dataset_without_a_model(tmp_path):
    done = run("--dataset_name", "someone/cases", cwd=tmp_path)
    assert done.returncode == 1 and "--dataset_name without --model_name_or_path" in done.stderr


def test_options_of_language_models(tmp_path):
    done = run("--load_in_4bit", "true", cwd=tmp_path)
    assert "load_in_4bit is not supported for image editors" in done.stderr


def test_short_and_documented():
    lines = (EXAMPLES / "train_qwen_edit.py").read_text().splitlines()
    assert len(lines) < 100


# The configuration of a build is tested where builds are.
CONFIGS = [path for path in sorted((EXAMPLES / "configs").glob("*.yaml")) if path.name != "build_realpref.yaml"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_config_parses(config, monkeypatch):
    # All options exist and fit together; the launch line is in the header.
    sys.path.insert(0, str(EXAMPLES))
    try:
        from train_kontext import KontextScriptArguments
        from train_qwen_edit import EditModelConfig, EditScriptArguments, FlowGRPOEditConfig, TrlParser
        from train_qwen_edit_dpo import DPOEditConfig, DPOScriptArguments
    finally:
        sys.path.pop(0)
    script = KontextScriptArguments if "kontext" in config.name else EditScriptArguments
    types = (DPOScriptArguments, DPOEditConfig) if "dpo" in config.name else (script, FlowGRPOEditConfig)
    parser = TrlParser((*types, EditModelConfig))
    arguments = ["--config", str(config), "--use_cpu", "true", "--optim", "adamw_torch"]
    script_args, args, model_args = parser.parse_args_and_config(arguments)
    if "dpo" not in config.name:
        assert args.generation_batch_size % args.num_generations == 0
    # The weights' type follows `bf16`: in float32 the real models do not fit on the cards that the headers name.
    assert model_args.dtype is None and args.bf16 == (model_args.model_name_or_path is not None)
    if model_args.model_name_or_path:
        assert config.read_text().startswith("#") and "accelerate launch" in config.read_text().split("\n\n")[0]
