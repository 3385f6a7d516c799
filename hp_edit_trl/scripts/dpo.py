"""
Post-trains an image editor with Diffusion-DPO on preference pairs, e.g. those of `hp-edit mine-pairs`.

    hp-edit dpo --config recipe.yaml --dataset_name someone/edit-preferences --num_processes 8
"""

import sys

from trl import get_peft_config

from ..trainer.dpo_edit_config import DPOEditConfig
from ..trainer.dpo_edit_trainer import DPOEditTrainer
from ..trainer.model_config import EditModelConfig
from ..utils.quantization import check_quantization
from ..utils.secrets import guard_output
from .utils import DatasetArguments, ScriptParser, load_cases, run_training


ARGUMENTS = (DatasetArguments, DPOEditConfig, EditModelConfig)


def main(script_args: DatasetArguments, training_args: DPOEditConfig, model_args: EditModelConfig) -> None:
    training_args.model_init_kwargs = model_args.init_kwargs(training_args)
    check_quantization(training_args.model_init_kwargs.get("quantization_config"), training_args.device)
    train_dataset = load_cases(script_args, script_args.dataset_train_split, script_args.image_root)
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = load_cases(script_args, script_args.dataset_test_split, script_args.image_root)
    trainer = DPOEditTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )
    run_training(trainer)


if __name__ == "__main__":
    parser = ScriptParser("dpo", ARGUMENTS)
    options = parser.parse(sys.argv[1:])[0]
    guard_output()
    main(*parser.parse_dict(options))
