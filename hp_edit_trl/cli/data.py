"""Commands of stage 2: datasets."""

import argparse
import logging
from typing import Any


def build(args: argparse.Namespace) -> None:
    from ..data.builder import BuildConfig, build_dataset

    logging.getLogger("hp_edit_trl").setLevel(logging.INFO)
    stages = None if args.stages is None else args.stages.split(",")
    config = BuildConfig.from_yaml(args.config)
    print(
        build_dataset(
            config,
            stages=stages,
            engine=args.engine,
            num_workers=args.num_workers,
            gpus_per_worker=args.gpus_per_worker,
        )
    )


def check_dataset(args: argparse.Namespace) -> None:
    from ..data import load_realpref

    dataset = load_realpref(args.dataset, args.split, args.revision)
    print(f"{args.dataset}, split {args.split}: {len(dataset)} rows in order")


def register(commands: Any) -> None:
    """Adds the commands of this family to a parser's subcommands."""
    command = commands.add_parser("build-dataset", help="build a RealPref-style dataset; goes on where it was")
    command.add_argument("--config", required=True, help="YAML file with the options of BuildConfig")
    command.add_argument("--stages", help="run these only, e.g. edits,scores; all before them must be finished")
    command.add_argument("--engine", choices=("local", "ray"), default="local")
    command.add_argument("--num_workers", type=int, default=1, help="of each stage, with Ray")
    command.add_argument("--gpus_per_worker", type=float, default=0, help="with Ray")
    command.set_defaults(run=build)

    command = commands.add_parser("check-dataset", help="check a dataset against the schema, row by row")
    command.add_argument("dataset", help="folder or Hub repository")
    command.add_argument("--split", default="train")
    command.add_argument("--revision", help="branch, tag or commit of the dataset's repository")
    command.set_defaults(run=check_dataset)
