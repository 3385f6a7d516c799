"""The examples of DPO as a user runs them."""

from unittest import mock

import pytest
from datasets import load_dataset
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin

from tests.examples.test_train_qwen_edit import EXAMPLES, run, run_here


@pytest.mark.slow
def test_mining(tmp_path):
    printed = run_here("--num_cases", "16", "--num_generations", "3", cwd=tmp_path, script="mine_preference_pairs.py")
    pairs = load_dataset(str(tmp_path / "outputs" / "preference-pairs" / "dataset"), split="train")
    assert f"{len(pairs)} pairs of 16 cases" in printed and {"chosen", "rejected"} <= set(pairs.column_names)
    assert all(pair["score_chosen"] >= pair["score_rejected"] + 0.5 for pair in pairs)


@pytest.mark.slow
def test_embedded_default(tmp_path):
    options = ("--num_cases", "24", "--eval_steps", "2", "--save_steps", "2")
    few = {"cwd": str(tmp_path), "script": "train_qwen_edit_dpo.py", "most": 24}
    done = run("--max_steps", "2", *options, **few)
    assert done.returncode == 0, done.stderr[-4000:]
    output = tmp_path / "outputs" / "qwen-edit-dpo-embedded"
    state = QwenImageLoraLoaderMixin.lora_state_dict(str(output))
    assert any(key.endswith("to_q.lora_B.weight") and value.abs().max() > 0 for key, value in state.items())
    assert "Diffusion-DPO" in (output / "README.md").read_text() and "| all | 24 |" in done.stdout
    assert "[400 cases of test]" in done.stdout
    # It resumes where it stopped.
    resume = ("--max_steps", "3", "--resume_from_checkpoint", str(output / "checkpoint-2"))
    with mock.patch("hp_edit_trl.miniature.evaluate_before_after") as evaluate:
        run_here(*resume, *options, **few)
    assert evaluate.call_args.args[0].state.global_step == 3


def test_short_and_documented():
    for script in ("mine_preference_pairs.py", "train_qwen_edit_dpo.py", "miniature/compare_dpo_grpo.py"):
        text = (EXAMPLES / script).read_text()
        assert len(text.splitlines()) < 100 and f"python examples/{script}" in text
