"""
Post-trains an image editor with Flow-GRPO, by default with an HP-Scorer reward.

    hp-edit grpo --config recipe.yaml --dataset_name someone/RealPref-50K --num_processes 8
"""

import sys

from ..trainer.flow_grpo_edit_config import FlowGRPOEditConfig
from ..trainer.flow_grpo_edit_trainer import FlowGRPOEditTrainer
from ..trainer.model_config import EditModelConfig
from ..utils.secrets import guard_output
from .rewards import OnlineScriptArguments, load_rewards
from .utils import ScriptParser, run_training, trainer_options


ARGUMENTS = (OnlineScriptArguments, FlowGRPOEditConfig, EditModelConfig)


def main(script_args: OnlineScriptArguments, training_args: FlowGRPOEditConfig, model_args: EditModelConfig) -> None:
    options = trainer_options(script_args, training_args, model_args)
    run_training(FlowGRPOEditTrainer(**options, reward_funcs=load_rewards(script_args)))


if __name__ == "__main__":
    parser = ScriptParser("grpo", ARGUMENTS)
    options = parser.parse(sys.argv[1:])[0]
    guard_output()
    main(*parser.parse_dict(options))
