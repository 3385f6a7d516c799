# /// script
# dependencies = ["hp-edit-trl[server]"]
# ///
"""
Post-trains Qwen-Image-Edit with Diffusion-DPO on pairs of a better and a worse edit.

Without arguments it trains the miniature of the library, which needs neither a GPU nor the Hub, on pairs that it mines itself:

    python examples/train_qwen_edit_dpo.py

The real model has a config, every option of which can be overridden; `mine_preference_pairs.py` makes the dataset:

    accelerate launch examples/train_qwen_edit_dpo.py --config examples/configs/qwen_image_edit_2509_dpo.yaml \
        --dataset_name someone/edit-preferences
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from trl import ScriptArguments, TrlParser, get_peft_config

from hp_edit_trl import DPOEditConfig, DPOEditTrainer, EditModelConfig, miniature
from hp_edit_trl.data import mine_preference_pairs


@dataclass
class DPOScriptArguments(ScriptArguments):
    num_cases: int = field(default=600, metadata={"help": "Cases of the miniature's world to mine pairs from."})


def main(script: DPOScriptArguments, args: DPOEditConfig, model_args: EditModelConfig):
    embedded = model_args.model_name_or_path is None
    if embedded and script.dataset_name is not None:
        raise SystemExit("--dataset_name without --model_name_or_path: without a model the miniature is trained.")
    if embedded:
        torch.set_num_threads(1)  # so small a model loses by more
        model = miniature.load_pipeline()
        pairs = mine_preference_pairs(
            model, miniature.RuleScorer(), miniature.load_dataset("train", script.num_cases),
            Path(args.output_dir) / "_mining", score_name="score", min_gap=0.5, resolution=32, num_inference_steps=5, true_cfg_scale=1.0, batch_size=100,
            cases_per_round=20, seed=args.seed,
        )  # fmt: skip
        splits = pairs.train_test_split(test_size=0.15, seed=args.seed)
        train_dataset, eval_dataset = splits["train"], splits["test"]
    else:
        model = model_args.model_name_or_path
        dtype = {} if model_args.dtype is None else {"dtype": model_args.dtype}
        args.model_init_kwargs = {"revision": model_args.model_revision, **dtype, **(args.model_init_kwargs or {})}
        if script.dataset_name is None:
            raise SystemExit("--dataset_name is needed: a Hub id or a folder with the pairs.")
        splits = load_dataset(script.dataset_name, script.dataset_config, streaming=script.dataset_streaming)
        if args.eval_strategy != "no" and script.dataset_test_split not in splits:
            raise SystemExit(
                f"--eval_strategy {args.eval_strategy}: the dataset has no {script.dataset_test_split!r} split."
            )
        train_dataset = splits[script.dataset_train_split]
        eval_dataset = splits[script.dataset_test_split] if args.eval_strategy != "no" else None
    trainer = DPOEditTrainer(model, args, train_dataset, eval_dataset, peft_config=get_peft_config(model_args))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()  # and pushes it, with --push_to_hub
    if embedded:  # scores per task on held-out scenes, before and after
        miniature.report(trainer, miniature.load_dataset("test", 400))
    print(f"The LoRA, its card, reward_curve.png and its pictures are in {args.output_dir}")


if __name__ == "__main__":
    if not {"--config", "--model_name_or_path"} & {argument.split("=")[0] for argument in sys.argv}:
        sys.argv[1:1] = ["--config", str(Path(__file__).parent / "configs" / "embedded_dpo.yaml")]
    main(*TrlParser((DPOScriptArguments, DPOEditConfig, EditModelConfig)).parse_args_and_config())
