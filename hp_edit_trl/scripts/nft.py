"""
Post-trains an image editor with DiffusionNFT and an HP-Scorer reward.

    hp-edit nft --config recipe.yaml --dataset_name someone/RealPref-50K --num_processes 8
"""

import sys

from trl import get_peft_config

from ..trainer.flow_nft_edit_config import FlowNFTEditConfig
from ..trainer.flow_nft_edit_trainer import FlowNFTEditTrainer
from ..trainer.model_config import EditModelConfig
from ..utils.quantization import check_quantization
from ..utils.secrets import guard_output
from .utils import EditScriptArguments, ScriptParser, load_cases, load_scorer, run_training


ARGUMENTS = (EditScriptArguments, FlowNFTEditConfig, EditModelConfig)


def main(script_args: EditScriptArguments, training_args: FlowNFTEditConfig, model_args: EditModelConfig) -> None:
    training_args.model_init_kwargs = model_args.init_kwargs(training_args)
    check_quantization(training_args.model_init_kwargs.get("quantization_config"), training_args.device)
    train_dataset = load_cases(script_args, script_args.dataset_train_split, script_args.image_root)
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = load_cases(script_args, script_args.dataset_test_split, script_args.image_root)
    trainer = FlowNFTEditTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=load_scorer(script_args),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )
    run_training(trainer)


if __name__ == "__main__":
    parser = ScriptParser("nft", ARGUMENTS)
    options = parser.parse(sys.argv[1:])[0]
    guard_output()
    main(*parser.parse_dict(options))
