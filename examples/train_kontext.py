# /// script
# dependencies = ["hp-edit-trl", "scikit-image"]
# ///
"""
Trains a FLUX.1-Kontext pipeline with Flow-GRPO and a reward function of your own. It needs neither a GPU nor the Hub:
the pipeline is tiny and random, the pictures are real photographs, and the reward is for warm colors, which even a
random editor can learn:

    python examples/train_kontext.py

The real model is trained by a command:

    hp-edit grpo --config examples/configs/flux_kontext.yaml --dataset_name someone/RealPref-50K --num_processes 8
"""

import sys
from pathlib import Path

import numpy as np
from peft import LoraConfig
from trl import TrlParser

from hp_edit_trl import FlowGRPOEditConfig, FlowGRPOEditTrainer
from hp_edit_trl.miniature.photographs import load_photographs
from hp_edit_trl.miniature.tiny import tiny_kontext_pipeline


def warmth(completions, **columns):
    """How much red outweighs blue, from -1 to 1."""
    pixels = [np.asarray(image, dtype=float) / 255 for image in completions]
    return [float(image[..., 0].mean() - image[..., 2].mean()) for image in pixels]


def main(training_args: FlowGRPOEditConfig):
    trainer = FlowGRPOEditTrainer(
        model=tiny_kontext_pipeline(),
        reward_funcs=warmth,
        args=training_args,
        train_dataset=load_photographs(),
        peft_config=LoraConfig(r=32, lora_alpha=64),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    if "--config" not in {argument.split("=")[0] for argument in sys.argv}:
        sys.argv[1:1] = ["--config", str(Path(__file__).parent / "configs" / "embedded_kontext.yaml")]
    main(*TrlParser((FlowGRPOEditConfig,)).parse_args_and_config())
