"""The command `plan`."""

import argparse
import sys
from typing import Any


def _plan(args: argparse.Namespace) -> None:
    from ..scripts.plan import plan

    if not plan(args.words):
        sys.exit(1)


def register(commands: Any) -> None:
    """Adds the command of this family to a parser's subcommands."""
    # Its options are those of the training command, and a few more: a parser of its own reads them.
    command = commands.add_parser(
        "plan", help="plan a training run: memory, time and cost on a GPU, without a GPU", add_help=False
    )
    command.set_defaults(run=_plan, words=[])
