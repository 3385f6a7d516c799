# /// script
# dependencies = ["hp-edit-trl"]
# ///
"""
Trains the miniature of the library with Diffusion-DPO, on preference pairs that it mines first. It needs neither a GPU
nor the Hub:

    python examples/train_qwen_edit_dpo.py

Real models are trained by a command; `hp-edit mine-pairs` makes the dataset:

    hp-edit dpo --config examples/configs/qwen_image_edit_2509_dpo.yaml --dataset_name someone/edit-preferences \
        --num_processes 8
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mine_preference_pairs import mine_pairs
from peft import LoraConfig
from trl import TrlParser

from hp_edit_trl import DPOEditConfig, DPOEditTrainer, miniature


@dataclass
class MiniatureArguments:
    num_cases: int = field(default=600, metadata={"help": "Number of cases that pairs are mined from."})


def main(script_args: MiniatureArguments, training_args: DPOEditConfig):
    torch.set_num_threads(1)  # faster for a model this small
    mining_dir = Path(training_args.output_dir) / "_mining"
    pairs = mine_pairs(mining_dir, script_args.num_cases, seed=training_args.seed)
    splits = pairs.train_test_split(test_size=0.15, seed=training_args.seed)
    trainer = DPOEditTrainer(
        model=miniature.load_pipeline(),
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        peft_config=LoraConfig(r=32, lora_alpha=64),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()  # and pushes it, with --push_to_hub
    # Scores of each task on held-out scenes, before and after
    miniature.evaluate_before_after(trainer, miniature.load_dataset("test", 400))
    print(f"The LoRA, its card, the reward curve and pictures are in {training_args.output_dir}")


if __name__ == "__main__":
    if "--config" not in {argument.split("=")[0] for argument in sys.argv}:
        sys.argv[1:1] = ["--config", str(Path(__file__).parent / "configs" / "embedded_dpo.yaml")]
    main(*TrlParser((MiniatureArguments, DPOEditConfig)).parse_args_and_config())
