# /// script
# dependencies = ["hp-edit-trl[server]"]
# ///
"""
Post-trains Qwen-Image-Edit with Flow-GRPO and an HP-Scorer reward. Copy this script to train with a reward or dataset
of your own; `hp-edit grpo` has the same options and needs no script.

Without arguments it trains the miniature of the library, which needs neither a GPU nor the Hub: a small pretrained
Qwen-Image-Edit pipeline, a world of small scenes, and a scorer that knows the right answers:

    python examples/train_qwen_edit.py

The paper's recipe is a config. Options on the command line take precedence:

    accelerate launch --num_processes 8 examples/train_qwen_edit.py \
        --config examples/configs/qwen_image_edit_2509.yaml --dataset_name someone/RealPref-50K
"""

import sys
from pathlib import Path

import torch
from trl import TrlParser, get_peft_config

from hp_edit_trl import EditModelConfig, FlowGRPOEditConfig, FlowGRPOEditTrainer, miniature
from hp_edit_trl.scripts import EditScriptArguments, load_cases, load_scorer


def main(script_args: EditScriptArguments, training_args: FlowGRPOEditConfig, model_args: EditModelConfig):
    embedded = model_args.model_name_or_path is None
    if embedded and script_args.dataset_name is not None:
        raise SystemExit("--dataset_name without --model_name_or_path: without a model the miniature is trained.")
    if embedded and (model_args.load_in_4bit or model_args.load_in_8bit):
        raise SystemExit(
            "--load_in_4bit and --load_in_8bit need --model_name_or_path: the miniature is not quantized."
        )
    if not embedded and script_args.dataset_name is None:
        raise SystemExit("--dataset_name is needed: the Hub id or folder of a dataset.")
    if embedded:
        torch.set_num_threads(1)  # faster for a model this small
        print("Post-training a small Qwen-Image-Edit on 1,000 scenes: about 8 minutes on a core, then a test on 400.")
        print("The score says how well an edit does what its prompt asks for, from 0 to 5.", flush=True)
        model, reward_funcs = miniature.load_pipeline(), miniature.RuleScorer()
        train_dataset, eval_dataset = miniature.load_dataset("train", 1000), miniature.load_dataset("validation", 96)
    else:
        model, reward_funcs = model_args.model_name_or_path, load_scorer(script_args)
        training_args.model_init_kwargs = model_args.init_kwargs(training_args)
        train_dataset = load_cases(script_args, script_args.dataset_train_split, script_args.image_root)
        eval_dataset = None
        if training_args.eval_strategy != "no":
            eval_dataset = load_cases(script_args, script_args.dataset_test_split, script_args.image_root)
    trainer = FlowGRPOEditTrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()  # and pushes it, with --push_to_hub
    if embedded:  # scores of each task on held-out scenes, before and after
        miniature.evaluate_before_after(trainer, miniature.load_dataset("test", 400), other_steps=(2, 3))
    trainer.accelerator.print(f"The LoRA, its card, the reward curve and pictures are in {training_args.output_dir}")


if __name__ == "__main__":
    if not {"--config", "--model_name_or_path"} & {argument.split("=")[0] for argument in sys.argv}:
        sys.argv[1:1] = ["--config", str(Path(__file__).parent / "configs" / "embedded.yaml")]
    main(*TrlParser((EditScriptArguments, FlowGRPOEditConfig, EditModelConfig)).parse_args_and_config())
