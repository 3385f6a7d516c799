# /// script
# dependencies = ["hp-edit-trl"]
# ///
"""
Trains the miniature of the library with DiffusionNFT, as `train_qwen_edit.py` does with Flow-GRPO: a small pretrained
Qwen-Image-Edit pipeline, a world of small scenes, and a scorer that knows the right answers. It needs no GPU:

    python examples/train_qwen_edit_nft.py

Real models are trained by a command:

    hp-edit nft --config examples/configs/qwen_image_edit_2509_nft.yaml --dataset_name someone/RealPref-50K \
        --num_processes 8
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig
from trl import TrlParser

from hp_edit_trl import FlowNFTEditConfig, FlowNFTEditTrainer, miniature


def main(training_args: FlowNFTEditConfig):
    torch.set_num_threads(1)  # faster for a model this small
    print("Post-training a small Qwen-Image-Edit on 1,000 scenes: about 8 minutes on a core, then a test on 400 more.")
    print("The score says how well an edit does what its prompt asks for, from 0 to 5.", flush=True)
    trainer = FlowNFTEditTrainer(
        model=miniature.load_pipeline(),
        reward_funcs=miniature.RuleScorer(alpha=0.5, beta=2.0),  # almost linear in the score
        args=training_args,
        train_dataset=miniature.load_dataset("train", 1000),
        eval_dataset=miniature.load_dataset("validation", 96),
        peft_config=LoraConfig(r=32, lora_alpha=64),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()  # and pushes it, with --push_to_hub
    # Scores of each task on scenes that were not trained on, before and after, and those of other numbers of steps
    miniature.evaluate_before_after(trainer, miniature.load_dataset("test", 400), other_steps=[2, 5])
    print(f"The LoRA, its card, the reward curve and pictures are in {training_args.output_dir}")


if __name__ == "__main__":
    if "--config" not in {argument.split("=")[0] for argument in sys.argv}:
        sys.argv[1:1] = ["--config", str(Path(__file__).parent / "configs" / "embedded_nft.yaml")]
    main(*TrlParser((FlowNFTEditConfig,)).parse_args_and_config())
