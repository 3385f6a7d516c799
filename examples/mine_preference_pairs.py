# /// script
# dependencies = ["hp-edit-trl[server]"]
# ///
"""
Mines preference pairs for DPO: several edits of each case are sampled and scored, and the best is paired with the worst.

Without arguments the miniature of the library edits its own small world, which needs neither a GPU nor the Hub:

    python examples/mine_preference_pairs.py

A real editor, on several GPUs, with a judge on a server (see examples/configs/qwen_image_edit_2509.yaml):

    accelerate launch examples/mine_preference_pairs.py --model_name_or_path Qwen/Qwen-Image-Edit-2509 \
        --dataset_name someone/RealPref-50K --judge_base_url http://localhost:8000/v1 --push_to someone/edit-preferences

It can be stopped at any time, and goes on where it was. `train_qwen_edit_dpo.py` trains on what it writes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import load_dataset
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from trl import ScriptArguments, TrlParser

from hp_edit_trl import HPScorerReward, miniature
from hp_edit_trl.data import mine_preference_pairs


@dataclass
class MiningArguments(ScriptArguments):
    model_name_or_path: str | None = field(default=None, metadata={"help": "The editor. By default the miniature."})
    lora: str | None = field(default=None, metadata={"help": "Hub id or folder of a LoRA to edit with."})
    output_dir: str = field(default="outputs/preference-pairs", metadata={"help": "Folder for edits and pairs."})
    push_to: str | None = field(default=None, metadata={"help": "Hub id of the dataset to push the pairs to."})
    judge: str = field(default="Qwen/Qwen3-VL-32B-Instruct", metadata={"help": "The judge's Hub id, folder or name."})
    judge_base_url: str | None = field(default=None, metadata={"help": "Address of the judge's server."})
    num_generations: int = field(default=5, metadata={"help": "Edits per case."})
    min_gap: float | None = field(default=None, metadata={"help": "Smallest difference of the scores of a pair."})
    min_chosen_score: float = field(default=3.0, metadata={"help": "Lowest score of a chosen edit."})
    resolution: int = field(default=512, metadata={"help": "Side in pixels of the square whose area an edit has."})
    num_inference_steps: int | None = field(default=None, metadata={"help": "Defaults to the pipeline's."})
    true_cfg_scale: float | None = field(default=None, metadata={"help": "Defaults to the pipeline's."})
    batch_size: int = field(default=4, metadata={"help": "Largest number of edits that are denoised together."})
    num_cases: int = field(default=600, metadata={"help": "Cases of the miniature's world."})
    seed: int = field(default=0, metadata={"help": "Seed of the edits' noise."})


def main(args: MiningArguments):
    options = {name: getattr(args, name) for name in ("num_generations", "min_chosen_score", "seed")}
    if args.model_name_or_path is None:
        torch.set_num_threads(1)  # so small a model loses by more
        pipeline, reward_func = miniature.load_pipeline(), miniature.RuleScorer()
        dataset = miniature.load_dataset("train", args.num_cases)
        options |= {"score_name": "score", "min_gap": 0.5, "resolution": 32, "num_inference_steps": 5}
        options |= {"true_cfg_scale": 1.0, "batch_size": 100, "cases_per_round": 20}
    else:
        if args.dataset_name is None:
            raise SystemExit("--dataset_name is needed: a Hub id or a folder with the cases.")
        pipeline = DiffusionPipeline.from_pretrained(args.model_name_or_path, dtype=torch.bfloat16)
        reward_func = HPScorerReward(args.judge, args.judge_base_url)
        reward_func.load()  # says at once if it cannot judge
        dataset = load_dataset(args.dataset_name, args.dataset_config, split=args.dataset_train_split)
        options |= {name: getattr(args, name) for name in ("resolution", "num_inference_steps", "true_cfg_scale")}
        options |= {"batch_size": args.batch_size, "on_bad_image": "skip"}
    if args.lora is not None:
        pipeline.load_lora_weights(args.lora)
    if args.min_gap is not None:
        options["min_gap"] = args.min_gap
    pairs = mine_preference_pairs(pipeline, reward_func, dataset, args.output_dir, **options)
    folder = Path(args.output_dir) / "dataset"
    if Accelerator().is_main_process:
        print(f"{len(pairs)} pairs of {len(dataset)} cases are in {folder}, with all edits and a card.")
        if args.push_to is not None:
            HfApi().create_repo(args.push_to, repo_type="dataset", exist_ok=True)
            old = ["pairs/*.parquet", "samples/*.parquet"]
            HfApi().upload_folder(repo_id=args.push_to, folder_path=folder, repo_type="dataset", delete_patterns=old)


if __name__ == "__main__":
    main(*TrlParser((MiningArguments,)).parse_args_and_config())
