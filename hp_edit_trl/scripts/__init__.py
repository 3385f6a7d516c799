"""Scripts of the commands that train: `hp-edit grpo`, `hp-edit dpo` and `hp-edit mine-pairs`."""

from .utils import EditScriptArguments, ScriptParser, load_cases, load_scorer, run_training


__all__ = ["EditScriptArguments", "ScriptParser", "load_cases", "load_scorer", "run_training"]
