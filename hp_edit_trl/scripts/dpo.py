"""
Post-trains an image editor with Diffusion-DPO on preference pairs, e.g. those of `hp-edit mine-pairs`.

    hp-edit dpo --config recipe.yaml --dataset_name someone/edit-preferences --num_processes 8
"""

import sys

from ..trainer.dpo_edit_config import DPOEditConfig
from ..trainer.dpo_edit_trainer import DPOEditTrainer
from ..trainer.model_config import EditModelConfig
from ..utils.secrets import guard_output
from .utils import DatasetArguments, ScriptParser, run_training, trainer_options


ARGUMENTS = (DatasetArguments, DPOEditConfig, EditModelConfig)


def main(script_args: DatasetArguments, training_args: DPOEditConfig, model_args: EditModelConfig) -> None:
    options = trainer_options(script_args, training_args, model_args)
    run_training(DPOEditTrainer(**options))


if __name__ == "__main__":
    parser = ScriptParser("dpo", ARGUMENTS)
    options = parser.parse(sys.argv[1:])[0]
    guard_output()
    main(*parser.parse_dict(options))
