"""Commands that train."""

import argparse
import importlib
from typing import Any


def _train(args: argparse.Namespace) -> None:
    from accelerate.commands.launch import launch_command

    from ..scripts import ScriptParser

    script = importlib.import_module(f"hp_edit_trl.scripts.{args.script.replace('-', '_')}")
    parser = ScriptParser(args.script, script.ARGUMENTS)
    options, launch = parser.parse(args.words)
    if launch is None:
        script.main(*parser.parse_dict(options))
    else:
        launch_command(launch)


def register(commands: Any) -> None:
    """Adds the commands of this family to a parser's subcommands."""
    for name, what in (
        ("grpo", "train an editor with Flow-GRPO and an HP-Scorer or other rewards, also your own"),
        ("nft", "train an editor with DiffusionNFT and an HP-Scorer or other rewards, also your own"),
        ("dpo", "train an editor with Diffusion-DPO on preference pairs"),
        ("mine-pairs", "mine preference pairs for DPO: sample edits, score them, pair the best with the worst"),
    ):
        # Their options are those of dataclasses, which take torch to import: `ScriptParser` parses them.
        commands.add_parser(name, help=what, add_help=False).set_defaults(run=_train, script=name, words=[])
