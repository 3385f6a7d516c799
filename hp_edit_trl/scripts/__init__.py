"""Scripts of the commands that train: `hp-edit grpo`, `hp-edit nft`, `hp-edit dpo` and `hp-edit mine-pairs`."""

from .utils import DatasetArguments, EditScriptArguments, ScriptParser, load_cases, load_scorer, run_training


__all__ = ["DatasetArguments", "EditScriptArguments", "ScriptParser", "load_cases", "load_scorer", "run_training"]
