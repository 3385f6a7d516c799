# /// script
# dependencies = ["hp-edit-trl[server]", "scikit-image"]
# ///
"""
Post-trains FLUX.1-Kontext-dev with Flow-GRPO.

Without arguments it is a small run that needs neither a GPU nor the Hub: a tiny *random* Kontext pipeline, real photographs,
and a reward for warm colors, which is something that even a random editor can learn:

    python examples/train_kontext.py

The real model has a config, every option of which can be overridden:

    accelerate launch examples/train_kontext.py --config examples/configs/flux_kontext.yaml --dataset_name someone/RealPref-50K
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import load_dataset
from trl import ScriptArguments, TrlParser, get_peft_config

from hp_edit_trl import EditModelConfig, FlowGRPOEditConfig, FlowGRPOEditTrainer, HPScorerReward


@dataclass
class KontextScriptArguments(ScriptArguments):
    judge: str = field(default="Qwen/Qwen3-VL-32B-Instruct", metadata={"help": "The judge's Hub id, folder or name."})
    judge_base_url: str | None = field(default=None, metadata={"help": "Address of the judge's server."})


def warmth(completions, **columns):
    """How much red outweighs blue, from -1 to 1."""
    pixels = [np.asarray(image, dtype=float) / 255 for image in completions]
    return [float(image[..., 0].mean() - image[..., 2].mean()) for image in pixels]


def main(script: KontextScriptArguments, args: FlowGRPOEditConfig, model_args: EditModelConfig):
    if model_args.model_name_or_path is None:
        from hp_edit_trl.miniature.photographs import load_photographs
        from hp_edit_trl.miniature.tiny import tiny_kontext_pipeline

        model, reward, dataset = tiny_kontext_pipeline(), warmth, load_photographs()
    else:
        model, reward = model_args.model_name_or_path, HPScorerReward(script.judge, script.judge_base_url)
        dataset = load_dataset(script.dataset_name, script.dataset_config, split=script.dataset_train_split)
    trainer = FlowGRPOEditTrainer(model, reward, args, dataset, peft_config=get_peft_config(model_args))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()  # and pushes it, with --push_to_hub


if __name__ == "__main__":
    if not {"--config", "--model_name_or_path"} & {argument.split("=")[0] for argument in sys.argv}:
        sys.argv[1:1] = ["--config", str(Path(__file__).parent / "configs" / "embedded_kontext.yaml")]
    main(*TrlParser((KontextScriptArguments, FlowGRPOEditConfig, EditModelConfig)).parse_args_and_config())
