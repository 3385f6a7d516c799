"""Pairs and the LoRA trained on them, to the Hub and back. The Hub is a local one; the clients are the real ones."""

from pathlib import Path

import pytest

from hp_edit_trl import miniature
from hp_edit_trl.miniature.policy import WEIGHTS
from tests.fake_hub import fake_hub
from tests.judges.test_judges import serve  # noqa: F401
from tests.processes import Script
from tests.scripts.test_scripts import any_score


SCRIPT = """
import sys
from hp_edit_trl.cli import main
main(["mine-pairs", *sys.argv[1:]])
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
def test_pairs_and_lora_go_to_the_hub_and_come_back(tmp_path, serve):  # noqa: F811
    miniature.load_dataset("train", 24).save_to_disk(tmp_path / "cases")
    options = [
        "--model_name_or_path", str(WEIGHTS), "--dataset_name", str(tmp_path / "cases"), "--dtype", "float32",
        "--judge", "m", "--judge_base_url", serve(any_score).url, "--num_generations", "3", "--min_chosen_score", "1",
        "--resolution", "32", "--num_inference_steps", "5", "--true_cfg_scale", "1.0", "--rollout_batch_size", "36",
        "--push_to_hub", "someone/pairs",
    ]  # fmt: skip
    with fake_hub() as hub:
        done = Script("-c", SCRIPT, *options, cwd=tmp_path, environment=hub.env).wait()
        assert done.returncode == 0, done.stderr[-4000:]
        files = hub.files("someone/pairs", "dataset")
        assert {Path(name).suffix for name in files if name != "README.md"} == {".parquet", ".jsonl"}
        files = hub.files("someone/edit-dpo")
        assert {"pytorch_lora_weights.safetensors", "README.md", "before_after.png", "reward_curve.png"} <= set(files)
        assert not [name for name in files if "latents" in name]  # the encoded pairs stay at home
        card = files["README.md"].decode()
        assert "someone/pairs" in card and "Diffusion-DPO" in card and "| `beta` | 2000.0 |" in card
