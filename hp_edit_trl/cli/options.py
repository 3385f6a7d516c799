"""Options that several commands share."""

import argparse
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..judges import Judge
    from ..rewards import HPScorerReward


def add_dataset_options(command: argparse.ArgumentParser) -> None:
    """The options that name a dataset of edits."""
    command.add_argument("dataset", help="edits: folder or Hub repository with id, image, edit, prompt, task, editor")
    command.add_argument("--split", default="train")
    command.add_argument("--revision", help="branch, tag or commit of the dataset's repository")


def add_scorer_options(command: argparse.ArgumentParser) -> None:
    """The options that name a judge and its prompts."""
    command.add_argument("--judge", default="Qwen/Qwen3-VL-32B-Instruct", help="Hub id, folder, or a server's model")
    command.add_argument(
        "--judge_revision", help="of its repository; with a server, whatever tells models of one name apart"
    )
    command.add_argument(
        "--judge_base_url", help="OpenAI-compatible server, e.g. http://localhost:8000/v1; else in this process"
    )
    command.add_argument("--score_mode", choices=("integer", "expected"), default="integer")
    command.add_argument("--num_answers", type=int, help="answers whose scores are averaged")
    command.add_argument("--max_new_tokens", type=int, help="of an answer; raise it for judges that reason aloud")
    command.add_argument("--batch_size", type=int, default=8, help="of a judge in this process")
    command.add_argument("--max_concurrency", type=int, default=16, help="requests at once to a server")
    command.add_argument("--timeout", type=float, default=120.0, help="seconds for one request to a server")
    command.add_argument("--max_retries", type=int, default=4, help="further attempts with a server")
    command.add_argument(
        "--scorer_prompts", help="folder or Hub repository of scorer prompts; by default this package's"
    )
    command.add_argument("--scorer_prompts_revision")
    command.add_argument("--cache", default="~/.cache/hp-edit-trl/judgements.sqlite", help="'none' keeps none")


def judge_of(args: argparse.Namespace, **options: Any) -> "Judge":
    """The judge that the options name; `options` are defaults for those that are not set."""
    from ..judges import load_judge

    names = ("score_mode", "num_answers", "batch_size", "max_concurrency", "timeout", "max_retries", "max_new_tokens")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    cache = None if args.cache == "none" else args.cache
    return load_judge(args.judge, args.judge_base_url, args.judge_revision, cache=cache, **(options | given))


def scorer_of(args: argparse.Namespace, task: str | None = None) -> "HPScorerReward":
    """The scorer that the options name."""
    from ..rewards import HPScorerReward

    return HPScorerReward(
        judge_of(args),
        scorer_prompts=args.scorer_prompts,
        scorer_prompts_revision=args.scorer_prompts_revision,
        task=task,
    )
