# /// script
# dependencies = ["hp-edit-trl[server,demo]"]
# ///
"""
Post-trains Qwen-Image-Edit with Flow-GRPO and an HP-Scorer reward.

Without arguments it is a small run that needs neither a GPU nor the Hub: a tiny random Qwen-Image-Edit pipeline, real
photographs, a tiny random judge, and a reward for warm colours, so that there is something to learn:

    python examples/train_qwen_edit.py

The paper's recipe is a config; every option of it can be overridden:

    accelerate launch examples/train_qwen_edit.py --config examples/configs/qwen_image_edit_2509.yaml --learning_rate 1e-4
"""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import load_dataset
from trl import ScriptArguments, TrlParser, get_peft_config

from hp_edit_trl import EditModelConfig, FlowGRPOEditConfig, FlowGRPOEditTrainer, HPScorerReward


@dataclass
class EditScriptArguments(ScriptArguments):
    judge: str | None = field(default=None, metadata={"help": "Hub id or folder of the judge, or its server's name."})
    judge_base_url: str | None = field(
        default=None, metadata={"help": "Address of the judge's server, if it has one."}
    )
    score_mode: str = field(default="integer", metadata={"help": "'integer' or 'expected'."})
    scorer_prompts: str | None = field(default=None, metadata={"help": "Folder or Hub repository of scorer prompts."})
    scorer_task: str | None = field(default=None, metadata={"help": "One prompt for all cases, e.g. 'base'."})


def warmth(completions, **kwargs):
    """How much red outweighs blue, from -1 to 1."""
    pixels = [np.asarray(image, dtype=float) / 255 for image in completions]
    return [float(image[..., 0].mean() - image[..., 2].mean()) for image in pixels]


def main(script_args: EditScriptArguments, args: FlowGRPOEditConfig, model_args: EditModelConfig):
    model, judge = model_args.model_name_or_path, script_args.judge
    reward_funcs = []
    if model is None:
        from hp_edit_trl.miniature.photographs import load_photographs
        from hp_edit_trl.miniature.tiny import tiny_judge, tiny_pipeline

        model, train_dataset, eval_dataset = tiny_pipeline(), load_photographs(), load_photographs()
        judge = judge or tiny_judge(tempfile.mkdtemp())
        reward_funcs.append(warmth)
    else:
        args.model_init_kwargs = {"revision": model_args.model_revision, **(args.model_init_kwargs or {})}
        splits = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
        train_dataset = splits[script_args.dataset_train_split]
        eval_dataset = splits.get(script_args.dataset_test_split) if args.eval_strategy != "no" else None
    scorer = HPScorerReward(
        judge or "Qwen/Qwen3-VL-32B-Instruct",
        base_url=script_args.judge_base_url,
        prompts=script_args.scorer_prompts,
        task=script_args.scorer_task,
        score_mode=script_args.score_mode,
    )

    trainer = FlowGRPOEditTrainer(
        model=model,
        reward_funcs=[scorer, *reward_funcs],
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    print(f"The LoRA, its card, reward_curve.png and before_after.png are in {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    if not {"--config", "--model_name_or_path"} & set(sys.argv):
        sys.argv[1:1] = ["--config", str(Path(__file__).parent / "configs" / "embedded.yaml")]
    parser = TrlParser((EditScriptArguments, FlowGRPOEditConfig, EditModelConfig))
    main(*parser.parse_args_and_config())
