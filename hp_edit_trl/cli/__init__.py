"""
The command `hp-edit`. Each family of commands has its own file, and a command imports what it needs when it runs: help
and errors about options need neither torch nor the models.
"""

import argparse
import logging
import sys
from typing import Any, NoReturn

from ..utils.secrets import guard_output, redacted
from ..version import __version__
from . import bench, calibration, data, env, lora, plan, train


FAMILIES = {
    "Train": train,
    "Plan a training": plan,
    "Calibrate a judge": calibration,
    "Build datasets": data,
    "Run benchmarks": bench,
    "Convert LoRAs": lora,
    "Environment": env,
}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {redacted(message)}. See {self.prog} --help.\n")


class Commands:
    """The subcommands of a parser; `help` lists them by family, which argparse itself cannot."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parsers = parser.add_subparsers(
            prog=parser.prog, required=True, metavar="command", help=argparse.SUPPRESS
        )
        self.help = ""

    def add_parser(self, name: str, help: str, **options: Any) -> argparse.ArgumentParser:
        self.help += f"  {name:<20} {help}\n"
        return self.parsers.add_parser(name, description=f"{help[0].upper()}{help[1:]}.", **options)


def main(argv: list[str] | None = None) -> None:
    """
    Entry point of `hp-edit`.

    Args:
        argv (`list[str]`, *optional*):
            The arguments. Defaults to those of the process. Options may be written with dashes or underscores.
    """
    parser = OneLineParser(
        "hp-edit",
        usage="hp-edit [-h] [--version] COMMAND ...",
        description="Post-train image-editing models with human preferences.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hp-edit-trl {__version__}")
    commands = Commands(parser)
    for title, family in FAMILIES.items():
        commands.help += f"\n{title}:\n"
        family.register(commands)
    parser.epilog = f"{commands.help}\nhp-edit COMMAND --help lists the options of a command."
    args, words = parser.parse_known_args(map(_with_underscores, sys.argv[1:] if argv is None else argv))
    if "words" in args:
        args.words = words  # for a parser of the command's own
    elif words:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    guard_output(argv or [])
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError) as error:  # users can fix these: one line, without a stack trace
        sys.exit(f"hp-edit: {redacted(str(error))}")
    except RuntimeError as error:
        if not str(error).startswith("Failed to import"):  # so transformers says that packages do not fit each other
            raise
        reason = redacted(str(error)).splitlines()[-1]
        sys.exit(f"hp-edit: a package cannot be imported ({reason}). `hp-edit env` says what does not fit.")
    except KeyboardInterrupt:
        sys.exit("hp-edit: stopped. Run the same command again to resume.")


def _with_underscores(word: str) -> str:
    """Replaces the dashes in an option's name by underscores. Its value stays as it is."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word
