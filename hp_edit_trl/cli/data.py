"""Commands of stage 2: building and checking datasets."""

import argparse
import logging
from typing import Any

from .options import IMAGE_ROOT


def _build(args: argparse.Namespace) -> None:
    from ..data.builder import BuildConfig, build_dataset
    from ..utils.config import read_config

    logging.getLogger("hp_edit_trl").setLevel(logging.INFO)
    config = read_config(BuildConfig, args.config)
    config.verified = args.verified or config.verified
    folder = build_dataset(
        config,
        stages=None if args.stages is None else args.stages.split(","),
        engine=args.engine,
        num_workers=args.num_workers,
        gpus_per_worker=args.gpus_per_worker,
    )
    print(folder)


def _check(args: argparse.Namespace) -> None:
    from ..cases import check_dataset
    from ..scripts import DatasetArguments, load_cases
    from ..tasks import TASKS
    from ..utils.image_folders import unlisted_images

    options = DatasetArguments(dataset_name=args.dataset)
    dataset = load_cases(options, args.split, args.image_root, args.revision)
    kind = check_dataset(dataset, args.dataset)
    print(f"{args.dataset}, split {args.split}: {len(dataset)} rows in order, for {kind}")
    named = set(dataset["task"]) - {None} if "task" in dataset.column_names else set()
    if unknown := sorted(map(str, named - set(TASKS))):
        print(
            f"HP-Scorer has no prompt for the tasks {', '.join(unknown)}: use scorer_task='base', prompts or a reward "
            f"of your own, or one of {', '.join(TASKS)}."
        )
    if left_out := unlisted_images(args.dataset):
        print(
            f"{len(left_out)} images of the folder are in no metadata.jsonl and are left out, e.g. "
            f"{left_out[0].relative_to(args.dataset)}."
        )


def register(commands: Any) -> None:
    """Adds the commands of this family to a parser's subcommands."""
    command = commands.add_parser("build-dataset", help="build a dataset of hard cases; run it again to resume")
    command.add_argument("--config", required=True, help="YAML file with the options of BuildConfig")
    command.add_argument("--stages", help="run only these, e.g. edits,scores; earlier ones must be finished")
    command.add_argument(
        "--verified", metavar="FILE", help="people's reviews of the benchmark's candidates: file, or folder"
    )
    command.add_argument("--engine", choices=("local", "ray"), default="local", help="what runs the stages")
    command.add_argument("--num_workers", type=int, default=1, help="with Ray: workers per stage")
    command.add_argument("--gpus_per_worker", type=float, default=0, help="with Ray")
    command.set_defaults(run=_build)

    command = commands.add_parser("check-dataset", help="check a dataset as the trainers do, and decode its images")
    command.add_argument("dataset", help="folder or Hub repository")
    command.add_argument("--split", default="train")
    command.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    command.add_argument("--image_root", help=IMAGE_ROOT)
    command.set_defaults(run=_check)
