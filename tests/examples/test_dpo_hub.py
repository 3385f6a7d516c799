"""Pairs and the LoRA trained on them, to the Hub and back. The Hub is a local one; the clients are the real ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.test_train_qwen_edit import EXAMPLES
from tests.fake_hub import fake_hub


CHECK = """
from datasets import load_dataset
pairs, samples = (load_dataset("someone/pairs", name, split="train") for name in ("pairs", "samples"))
assert len(samples) == 24 * 3 and {"prompt", "image", "chosen", "rejected", "score_chosen"} <= set(pairs.column_names)
assert all(pair[name].size == (32, 32) for pair in pairs for name in ("image", "chosen", "rejected"))
from peft import LoraConfig
from hp_edit_trl import DPOEditConfig, DPOEditTrainer, miniature
args = DPOEditConfig("out/run", bf16=False, use_cpu=True, resolution=32, num_inference_steps=2, max_steps=1,
    gradient_checkpointing=False, gradient_accumulation_steps=1, true_cfg_scale=1.0, push_to_hub=True,
    hub_model_id="someone/edit-dpo", report_to="none")
trainer = DPOEditTrainer(miniature.load_pipeline(), args, pairs, peft_config=LoraConfig(r=2, lora_alpha=4))
trainer.train()
trainer.push_to_hub(dataset_name="someone/pairs")
pipeline = miniature.load_pipeline()
pipeline.load_lora_weights("someone/edit-dpo")
assert pipeline.transformer.peft_config
"""


@pytest.mark.slow
def test_pairs_and_lora_go_to_the_hub_and_come_back(tmp_path):
    with fake_hub() as hub:
        outside = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        options = {
            "cwd": tmp_path,
            "env": {**outside, **hub.env, "OMP_NUM_THREADS": "2"},
            "capture_output": True,
            "text": True,
        }
        script = [
            sys.executable,
            str(EXAMPLES / "mine_preference_pairs.py"),
            "--num_cases",
            "24",
            "--num_generations",
            "3",
        ]
        done = subprocess.run([*script, "--push_to", "someone/pairs"], **options)
        assert done.returncode == 0, done.stderr[-4000:]
        files = hub.files("someone/pairs", "dataset")
        assert {Path(name).suffix for name in files if name != "README.md"} == {".parquet", ".jsonl"}
        done = subprocess.run([sys.executable, "-c", CHECK], **options)
        assert done.returncode == 0, done.stderr[-4000:]
        files = hub.files("someone/edit-dpo")
        assert {"pytorch_lora_weights.safetensors", "README.md", "before_after.png", "reward_curve.png"} <= set(files)
        assert not [name for name in files if "latents" in name]  # the encoded pairs stay at home
        card = files["README.md"].decode()
        assert "someone/pairs" in card and "Diffusion-DPO" in card and "| `beta` | 2000.0 |" in card
