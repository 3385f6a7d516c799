"""The command `hp-edit`."""

import argparse
import sys

import torch

from .lora import FORMATS, base_transformer, check_fit, describe_lora, merge_lora, read_lora, write_lora


def export_lora(args: argparse.Namespace) -> None:
    print(write_lora(read_lora(args.lora), args.out, args.format))


def check_lora(args: argparse.Namespace) -> None:
    lora = read_lora(args.lora)
    print(describe_lora(lora))
    if args.base is not None:
        check_fit(lora, base_transformer(args.base), args.base)
        print(f"fits        {args.base}, by the shapes of its modules")


def merge(args: argparse.Namespace) -> None:
    merge_lora(args.base, read_lora(args.lora), args.out, getattr(torch, args.dtype))
    print(args.out)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `hp-edit`."""
    parser = argparse.ArgumentParser("hp-edit", description="Tools around hp-edit-trl.")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("export-lora", help="write a LoRA in another tool's format")
    command.add_argument("lora", help="safetensors file, folder or Hub repository")
    command.add_argument("out", help="file or folder")
    command.add_argument("--format", choices=FORMATS, required=True)
    command.set_defaults(run=export_lora)

    command = commands.add_parser("check-lora", help="say what a LoRA touches, and whether it fits a model")
    command.add_argument("lora", help="safetensors file, folder or Hub repository")
    command.add_argument("--base", help="Hub id or folder of the pipeline; only its configuration is read")
    command.set_defaults(run=check_lora)

    command = commands.add_parser("merge-lora", help="add a LoRA to the weights of a pipeline")
    command.add_argument("base", help="Hub id or folder of the pipeline")
    command.add_argument("lora", help="safetensors file, folder or Hub repository")
    command.add_argument("out", help="folder for the merged pipeline")
    command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    command.set_defaults(run=merge)

    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:  # what users can mend is said in a line, without a stack trace
        sys.exit(f"hp-edit: {error}")


if __name__ == "__main__":
    main()
