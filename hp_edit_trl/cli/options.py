"""Options that several commands share."""

import argparse
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..judges import Judge
    from ..rewards import HPScorerReward


IMAGE_ROOT = "folder, or beginning of an address, below which images may lie that are not files of the dataset itself"


def add_dataset_options(command: argparse.ArgumentParser, with_runs: bool = False) -> None:
    """Adds the options that name a dataset of edits, or runs of a benchmark."""
    edits = "folder or Hub repository of edits, with the columns id, image, edit, prompt, task, editor"
    if with_runs:
        command.add_argument("dataset", nargs="+", help=f"{edits}; or results folders of hp-edit bench")
    else:
        command.add_argument("dataset", help=edits)
    command.add_argument("--split", default="train", help="split of the dataset")
    command.add_argument("--revision", help="branch, tag or commit of the dataset's repository")
    command.add_argument("--image_root", help=IMAGE_ROOT)


def add_scorer_options(command: argparse.ArgumentParser) -> None:
    """Adds the options that name a judge and its scorer prompts."""
    command.add_argument(
        "--judge",
        default="Qwen/Qwen3-VL-32B-Instruct",
        help="Hub id or folder of the judge, or its name on the server",
    )
    command.add_argument(
        "--judge_revision",
        help="branch, tag or commit of the judge; with a server, a label that tells models of one name apart",
    )
    command.add_argument(
        "--judge_base_url",
        help="OpenAI-compatible server of the judge, e.g. http://localhost:8000/v1, or several with commas between "
        "them; by default it runs here",
    )
    command.add_argument(
        "--score_mode",
        choices=("integer", "expected"),
        default="integer",
        help="the score that the judge answers, or the expectation over the probabilities of the digits",
    )
    command.add_argument("--num_answers", type=int, help="number of answers whose scores are averaged")
    command.add_argument("--max_new_tokens", type=int, help="longest answer; raise it for judges that reason aloud")
    command.add_argument("--batch_size", type=int, default=8, help="cases judged together by a judge in this process")
    command.add_argument(
        "--max_concurrency", type=int, default=16, help="largest number of concurrent requests to all servers"
    )
    command.add_argument(
        "--timeout", type=float, default=120.0, help="seconds after which a request to a server is given up"
    )
    command.add_argument("--max_retries", type=int, default=4, help="number of further attempts with a server")
    command.add_argument(
        "--scorer_prompts", help="folder or Hub repository of scorer prompts; by default those of this package"
    )
    command.add_argument(
        "--scorer_prompts_revision", help="branch, tag or commit of the Hub repository of scorer prompts"
    )
    command.add_argument(
        "--cache",
        default="~/.cache/hp-edit-trl/judgements.sqlite",
        help="SQLite file that keeps the judge's answers; 'none' for no cache",
    )


def judge_of(args: argparse.Namespace, **options: Any) -> "Judge":
    """Builds the judge that the options name; `options` are defaults for those that are not set."""
    from ..judges import load_judge

    names = ("score_mode", "num_answers", "batch_size", "max_concurrency", "timeout", "max_retries", "max_new_tokens")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    cache = None if args.cache == "none" else args.cache
    return load_judge(args.judge, args.judge_base_url, args.judge_revision, cache=cache, **(options | given))


def scorer_of(args: argparse.Namespace, task: str | None = None) -> "HPScorerReward":
    """Builds the scorer that the options name."""
    from ..rewards import HPScorerReward

    return HPScorerReward(
        judge_of(args),
        scorer_prompts=args.scorer_prompts,
        scorer_prompts_revision=args.scorer_prompts_revision,
        task=task,
    )
