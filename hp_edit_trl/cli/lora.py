"""Commands for LoRA files."""

import argparse
from typing import Any


LORA = "safetensors file, folder or Hub repository"


def _export_lora(args: argparse.Namespace) -> None:
    from ..lora_formats import read_lora, write_lora

    print(write_lora(read_lora(args.lora), args.output_dir, args.format))


def _check_lora(args: argparse.Namespace) -> None:
    from ..lora_formats import base_transformer, check_fit, describe_lora, read_lora

    lora = read_lora(args.lora)
    print(describe_lora(lora))
    if args.base is not None:
        check_fit(lora, base_transformer(args.base), args.base)
        print(f"fits        {args.base}, by the shapes of its modules")


def _merge_lora(args: argparse.Namespace) -> None:
    from ..lora_formats import merge_lora, read_lora
    from ..utils.dtypes import parse_dtype

    merge_lora(args.base, read_lora(args.lora), args.output_dir, parse_dtype(args.dtype))
    print(args.output_dir)


def register(commands: Any) -> None:
    """Adds the commands of this family to a parser's subcommands."""
    command = commands.add_parser("export-lora", help="write a LoRA in the format of another tool")
    command.add_argument("lora", help=LORA)
    command.add_argument(
        "--output_dir",
        required=True,
        help="folder for the LoRA; unless the format is peft, also the name of a file that ends in .safetensors",
    )
    command.add_argument("--format", required=True, help="diffusers, peft, comfyui or kohya")
    command.set_defaults(run=_export_lora)

    command = commands.add_parser("check-lora", help="print what a LoRA adapts, and whether it fits a model")
    command.add_argument("lora", help=LORA)
    command.add_argument("--base", help="Hub id or folder of the pipeline; only its configuration is read")
    command.set_defaults(run=_check_lora)

    command = commands.add_parser("merge-lora", help="add a LoRA to the weights of a pipeline and save the pipeline")
    command.add_argument("base", help="Hub id or folder of the pipeline")
    command.add_argument("lora", help=LORA)
    command.add_argument("--output_dir", required=True, help="folder for the merged pipeline")
    command.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="type of the merged weights",
    )
    command.set_defaults(run=_merge_lora)
