# /// script
# dependencies = ["hp-edit-trl"]
# ///
"""
Mines preference pairs for DPO: samples several edits of each case, scores them, and pairs the best with the worst.
Here the miniature of the library edits its own small world, which needs neither a GPU nor the Hub:

    python examples/mine_preference_pairs.py

A real editor on several GPUs, with a judge on a server, is a command:

    hp-edit mine-pairs --model_name_or_path Qwen/Qwen-Image-Edit-2509 --dataset_name someone/RealPref-50K \
        --judge_base_url http://localhost:8000/v1 --num_processes 8 --push_to_hub someone/edit-preferences

It can be stopped at any time, and resumes where it stopped. `train_qwen_edit_dpo.py` trains on pairs.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset

from hp_edit_trl import miniature
from hp_edit_trl.data import mine_preference_pairs


def mine_pairs(output_dir: Path, num_cases: int, num_generations: int = 5, seed: int = 0) -> Dataset:
    return mine_preference_pairs(
        miniature.load_pipeline(),
        miniature.RuleScorer(),
        miniature.load_dataset("train", num_cases),
        output_dir,
        num_generations=num_generations,
        score_name="score",
        min_gap=0.5,
        resolution=32,
        num_inference_steps=5,
        true_cfg_scale=1.0,
        batch_size=100,
        cases_per_round=20,
        seed=seed,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/preference-pairs"))
    parser.add_argument("--num_cases", type=int, default=600, help="number of cases of the miniature's world")
    parser.add_argument("--num_generations", type=int, default=5, help="number of edits per case")
    args = parser.parse_args()
    torch.set_num_threads(1)  # faster for a model this small
    pairs = mine_pairs(args.output_dir, args.num_cases, args.num_generations)
    folder = args.output_dir / "dataset"
    print(f"{len(pairs)} pairs of {args.num_cases} cases are in {folder}, with all edits and a card.")
