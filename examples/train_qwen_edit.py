# /// script
# dependencies = ["hp-edit-trl[server]"]
# ///
"""
Post-trains Qwen-Image-Edit with Flow-GRPO and an HP-Scorer reward.

Without arguments it trains the miniature of the library, which needs neither a GPU nor the Hub: a small pretrained
Qwen-Image-Edit pipeline, a world of small scenes, and a scorer that knows the right answers:

    python examples/train_qwen_edit.py

The paper's recipe is a config; every option of it can be overridden:

    accelerate launch examples/train_qwen_edit.py --config examples/configs/qwen_image_edit_2509.yaml --learning_rate 1e-4
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from trl import ScriptArguments, TrlParser, get_peft_config

from hp_edit_trl import (
    EditModelConfig,
    FlowGRPOEditConfig,
    FlowGRPOEditTrainer,
    HPScorerReward,
    ServerJudge,
    TransformersJudge,
    miniature,
)


@dataclass
class EditScriptArguments(ScriptArguments):
    judge: str = field(default="Qwen/Qwen3-VL-32B-Instruct", metadata={"help": "The judge's Hub id, folder or name."})
    judge_base_url: str | None = field(
        default=None, metadata={"help": "Address of the judge's server, if it has one."}
    )
    judge_timeout: float = field(default=120.0, metadata={"help": "Seconds for one request to the judge's server."})
    judge_concurrency: int = field(default=16, metadata={"help": "Requests under way at once, per process."})
    score_mode: str = field(default="integer", metadata={"help": "'integer' or 'expected'."})
    scorer_prompts: str | None = field(default=None, metadata={"help": "Folder or Hub repository of scorer prompts."})
    scorer_prompts_revision: str | None = field(default=None, metadata={"help": "Revision of that repository."})
    scorer_task: str | None = field(default=None, metadata={"help": "One prompt for all cases, e.g. 'base'."})
    reward_alpha: float = field(default=2.0, metadata={"help": "Scale of the reward's sigmoid."})
    reward_beta: float = field(default=5.0, metadata={"help": "Shift of the reward's sigmoid."})


def main(script: EditScriptArguments, args: FlowGRPOEditConfig, model_args: EditModelConfig):
    embedded = model_args.model_name_or_path is None
    if embedded and script.dataset_name is not None:
        raise SystemExit("--dataset_name without --model_name_or_path: without a model the miniature is trained.")
    if embedded:
        torch.set_num_threads(1)  # so small a model loses by more
        model, reward_funcs = miniature.load_pipeline(), miniature.RuleScorer()
        train_dataset, eval_dataset = miniature.load_dataset("train", 1000), miniature.load_dataset("validation", 96)
    else:
        model = model_args.model_name_or_path
        dtype = {} if model_args.dtype is None else {"dtype": model_args.dtype}
        args.model_init_kwargs = {"revision": model_args.model_revision, **dtype, **(args.model_init_kwargs or {})}
        if script.dataset_name is None:
            raise SystemExit("--dataset_name is needed: a Hub id or a folder with the training cases.")
        splits = load_dataset(script.dataset_name, script.dataset_config, streaming=script.dataset_streaming)
        train_dataset = splits[script.dataset_train_split]
        eval_dataset = splits[script.dataset_test_split] if args.eval_strategy != "no" else None
        if script.judge_base_url is None:
            judge = TransformersJudge(script.judge, script.score_mode)
        else:
            options = {"timeout": script.judge_timeout, "max_concurrency": script.judge_concurrency}
            judge = ServerJudge(script.judge, script.judge_base_url, script.score_mode, **options)
        reward_funcs = HPScorerReward(
            judge,
            task=script.scorer_task,
            scorer_prompts=script.scorer_prompts,
            scorer_prompts_revision=script.scorer_prompts_revision,
            alpha=script.reward_alpha,
            beta=script.reward_beta,
        )
    peft_config = get_peft_config(model_args)
    trainer = FlowGRPOEditTrainer(model, reward_funcs, args, train_dataset, eval_dataset, peft_config=peft_config)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()  # and pushes it, with --push_to_hub
    if embedded:  # scores per task on held-out scenes, before and after
        miniature.report(trainer, miniature.load_dataset("test", 400))
    print(f"The LoRA, its card, reward_curve.png and its pictures are in {args.output_dir}")


if __name__ == "__main__":
    if not {"--config", "--model_name_or_path"} & {argument.split("=")[0] for argument in sys.argv}:
        sys.argv[1:1] = ["--config", str(Path(__file__).parent / "configs" / "embedded.yaml")]
    main(*TrlParser((EditScriptArguments, FlowGRPOEditConfig, EditModelConfig)).parse_args_and_config())
