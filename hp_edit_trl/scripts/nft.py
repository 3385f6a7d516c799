"""
Post-trains an image editor with DiffusionNFT, by default with an HP-Scorer reward.

    hp-edit nft --config recipe.yaml --dataset_name someone/RealPref-50K --num_processes 8
"""

import sys

from ..trainer.flow_nft_edit_config import FlowNFTEditConfig
from ..trainer.flow_nft_edit_trainer import FlowNFTEditTrainer
from ..trainer.model_config import EditModelConfig
from ..utils.secrets import guard_output
from .rewards import OnlineScriptArguments, load_rewards
from .utils import ScriptParser, run_training, trainer_options


ARGUMENTS = (OnlineScriptArguments, FlowNFTEditConfig, EditModelConfig)


def main(script_args: OnlineScriptArguments, training_args: FlowNFTEditConfig, model_args: EditModelConfig) -> None:
    options = trainer_options(script_args, training_args, model_args)
    run_training(FlowNFTEditTrainer(**options, reward_funcs=load_rewards(script_args)))


if __name__ == "__main__":
    parser = ScriptParser("nft", ARGUMENTS)
    options = parser.parse(sys.argv[1:])[0]
    guard_output()
    main(*parser.parse_dict(options))
