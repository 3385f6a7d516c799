"""
The example as a user runs it: once as a script in its own process, then in this one, which saves the imports. The
miniature's world has fewer cases here.
"""

import contextlib
import io
import os
import runpy
from pathlib import Path
from unittest import mock

import pytest
import train_qwen_edit_dpo
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
from PIL import Image
from trl import TrlParser

from hp_edit_trl import DPOEditConfig, EditModelConfig, FlowGRPOEditConfig, FlowNFTEditConfig, miniature
from hp_edit_trl.scripts import EditScriptArguments, dpo, grpo, nft
from tests.processes import Script


EXAMPLES = Path(__file__).parents[2] / "examples"
load_dataset = miniature.load_dataset


def run_here(*arguments, cwd, script="train_qwen_edit.py", most=10_000):
    """Runs an example in this process, with at most so many cases of each split, and returns what it prints."""

    def load_few(split, count, *seed):
        print(f"[{count} cases of {split}]")
        return load_dataset(split, min(count, most), *seed)

    with contextlib.chdir(cwd), mock.patch("sys.argv", [script, *arguments]), mock.patch.dict(os.environ):
        with (
            contextlib.redirect_stdout(io.StringIO()) as printed,
            mock.patch.object(miniature, "load_dataset", load_few),
        ):
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return printed.getvalue()


def run(*arguments, **options):
    """The same in a process of its own."""
    code = f"from tests.examples.test_train_qwen_edit import run_here; print(run_here(*{arguments!r}, **{options!r}))"
    return Script("-c", code).wait(600)


@pytest.mark.slow
def test_embedded_default(tmp_path):
    few = {"cwd": str(tmp_path), "most": 24}
    done = run("--max_steps", "3", "--eval_steps", "3", "--save_steps", "3", "--log_completions", **few)
    assert done.returncode == 0, done.stderr[-4000:]
    output = tmp_path / "outputs" / "qwen-edit-embedded"
    assert "Training: 3 updates" in done.stdout and "evaluation after 3 updates | reward " in done.stdout
    state = QwenImageLoraLoaderMixin.lora_state_dict(str(output))
    assert any(key.endswith("to_q.lora_B.weight") and value.abs().max() > 0 for key, value in state.items())
    assert "qwen-edit-embedded" in (output / "README.md").read_text()
    for name in ("reward_curve.png", "before_after.png"):
        assert min(Image.open(output / name).size) > 100
    assert {f"[{n} cases of {split}]" for n, split in ((1000, "train"), (96, "validation"), (400, "test"))} < set(
        done.stdout.splitlines()
    )
    assert "| all | 24 |" in done.stdout and (output / "scores.csv").exists() and (output / "hard_cases.png").exists()
    # It resumes where it stopped. Its scores have been seen.
    resume = ("--max_steps", "4", "--resume_from_checkpoint", str(output / "checkpoint-3"))
    with mock.patch("hp_edit_trl.miniature.evaluate_before_after") as evaluate:
        run_here(*resume, "--eval_on_start", "false", "--eval_strategy", "no", **few)
    assert evaluate.call_args.args[0].state.global_step == 4


@pytest.mark.slow
def test_the_miniature_with_nft(tmp_path):
    options = ("--max_steps", "4", "--eval_steps", "4", "--save_steps", "4", "--logging_steps", "4")
    printed = run_here(*options, cwd=tmp_path, script="train_qwen_edit_nft.py", most=24)
    lines = printed.splitlines()
    assert lines[0].startswith("Post-training") and "Training: 4 updates" in lines
    assert any(line.startswith("update 4 of 4 | reward 0.") for line in lines)
    assert any(line.startswith("evaluation after 4 updates | reward 0.") and "score" in line for line in lines)
    assert "| all | 24 |" in printed
    table = printed[printed.index("| denoising steps |") :].splitlines()
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["2", "3", "5"]
    output = tmp_path / "outputs" / "qwen-edit-nft-embedded"
    assert min(Image.open(output / "gains.png").size) > 100 and (output / "hard_cases.png").exists()
    assert "DiffusionNFT" in (output / "README.md").read_text()


@pytest.mark.parametrize("form", ["--model_name_or_path=somewhere", "--model_name_or_path somewhere"])
def test_a_model_of_ones_own_is_not_trained_with_the_embedded_config(tmp_path, form):
    with pytest.raises(SystemExit, match="--dataset_name is needed"):
        run_here(*form.split(), "--output_dir", "x", "--use_cpu", "true", "--bf16", "false", cwd=tmp_path)


def test_a_dataset_without_a_model(tmp_path):
    with pytest.raises(SystemExit, match="--dataset_name without --model_name_or_path"):
        run_here("--dataset_name", "someone/cases", cwd=tmp_path)


def test_options_of_language_models(tmp_path):
    with pytest.raises(ValueError, match="attn_implementation is not supported for image editors"):
        run_here("--attn_implementation", "eager", cwd=tmp_path)


def test_the_miniature_is_not_quantized(tmp_path):
    with pytest.raises(SystemExit, match="need --model_name_or_path: the miniature is not quantized"):
        run_here("--load_in_8bit", "true", cwd=tmp_path)


def test_short_and_documented():
    lines = (EXAMPLES / "train_qwen_edit.py").read_text().splitlines()
    assert len(lines) < 100


# The configuration of a build is tested where builds are.
CONFIGS = [path for path in sorted((EXAMPLES / "configs").glob("*.yaml")) if path.name != "build_realpref.yaml"]


OF_EXAMPLES = {
    "embedded.yaml": (EditScriptArguments, FlowGRPOEditConfig, EditModelConfig),
    "embedded_dpo.yaml": (train_qwen_edit_dpo.MiniatureArguments, DPOEditConfig),
    "embedded_kontext.yaml": (FlowGRPOEditConfig,),
    "embedded_nft.yaml": (FlowNFTEditConfig,),
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_config_parses(config):
    # All options exist and fit together; the command is in the header.
    embedded = config.name in OF_EXAMPLES
    command = next((name for name in ("dpo", "nft") if name in config.name), "grpo")
    script, config_type = {
        "grpo": (grpo, FlowGRPOEditConfig), "nft": (nft, FlowNFTEditConfig), "dpo": (dpo, DPOEditConfig)
    }[command]  # fmt: skip
    types = OF_EXAMPLES.get(config.name, script.ARGUMENTS)
    arguments = ["--config", str(config), "--use_cpu", "true", "--optim", "adamw_torch"]
    parsed = dict(zip(types, TrlParser(types).parse_args_and_config(arguments), strict=True))
    args = parsed[config_type]
    if command != "dpo":
        assert args.generation_batch_size % args.num_generations == 0
    # The weights' type follows `bf16`: in float32 the real models do not fit on the cards that the headers name.
    assert args.bf16 is not embedded
    if EditModelConfig in parsed:
        assert parsed[EditModelConfig].dtype is None
        assert (parsed[EditModelConfig].model_name_or_path is None) is embedded
    if not embedded:
        head = config.read_text().split("\n\n")[0]
        assert (
            head.startswith("#")
            and f"hp-edit {command}" in head
            and f"--config examples/configs/{config.name}" in head
        )
