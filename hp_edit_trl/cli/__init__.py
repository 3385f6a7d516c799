"""
The command `hp-edit`. Each family of commands is a file; what a command needs is imported when it runs, so that help and errors
come at once.
"""

import argparse
import logging
import sys

from ..version import __version__
from . import bench, calibration, data, lora


def main(argv: list[str] | None = None) -> None:
    """
    Entry point of `hp-edit`.

    Args:
        argv (`list[str]`, *optional*):
            The arguments. Defaults to those of the process. Options may be written with dashes or underscores.
    """
    parser = argparse.ArgumentParser("hp-edit", description="Post-train image-editing models with human preferences.")
    parser.add_argument("--version", action="version", version=f"hp-edit-trl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for family in (calibration, data, bench, lora):
        family.register(commands)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args([_with_underscores(word) for word in argv])
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError) as error:  # what users can mend is said in a line, without a stack trace
        sys.exit(f"hp-edit: {error}")
    except KeyboardInterrupt:
        sys.exit("hp-edit: stopped. Run the same command again to resume.")


def _with_underscores(word: str) -> str:
    """An option with underscores in place of dashes; its value stays as it is."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word
