"""Post-train image-editing models with human preferences, with TRL's API."""

from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__ as __version__


# Public names and the modules that define them. They are imported when first asked for: torch takes its time.
_MODULES = {
    "DPOEditConfig": "trainer.dpo_edit_config",
    "DPOEditTrainer": "trainer.dpo_edit_trainer",
    "EditModelConfig": "trainer.model_config",
    "FlowGRPOEditConfig": "trainer.flow_grpo_edit_config",
    "FlowGRPOEditTrainer": "trainer.flow_grpo_edit_trainer",
    "FlowNFTEditConfig": "trainer.flow_nft_edit_config",
    "FlowNFTEditTrainer": "trainer.flow_nft_edit_trainer",
    "HPScorerReward": "rewards",
    "ServerJudge": "judges",
    "TransformersJudge": "judges",
    "load_judge": "judges",
    "load_realpref": "data",
    "load_scorer_prompts": "rewards",
    "mine_preference_pairs": "data",
    "run_benchmark": "bench",
}

__all__ = [
    "DPOEditConfig",
    "DPOEditTrainer",
    "EditModelConfig",
    "FlowGRPOEditConfig",
    "FlowGRPOEditTrainer",
    "FlowNFTEditConfig",
    "FlowNFTEditTrainer",
    "HPScorerReward",
    "ServerJudge",
    "TransformersJudge",
    "load_judge",
    "load_realpref",
    "load_scorer_prompts",
    "mine_preference_pairs",
    "run_benchmark",
]

if TYPE_CHECKING:
    from .bench import run_benchmark
    from .data import load_realpref, mine_preference_pairs
    from .judges import ServerJudge, TransformersJudge, load_judge
    from .rewards import HPScorerReward, load_scorer_prompts
    from .trainer.dpo_edit_config import DPOEditConfig
    from .trainer.dpo_edit_trainer import DPOEditTrainer
    from .trainer.flow_grpo_edit_config import FlowGRPOEditConfig
    from .trainer.flow_grpo_edit_trainer import FlowGRPOEditTrainer
    from .trainer.flow_nft_edit_config import FlowNFTEditConfig
    from .trainer.flow_nft_edit_trainer import FlowNFTEditTrainer
    from .trainer.model_config import EditModelConfig


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
