"""Commands of stage 1: scores, ratings, agreement, refinement of scorer prompts."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import IMAGE_ROOT, add_dataset_options, add_scorer_options, scorer_of


if TYPE_CHECKING:
    from datasets import Dataset

    from ..bench import Run


def _load_edits(args: argparse.Namespace) -> "Dataset":
    """Loads the dataset of edits that the options name."""
    from ..cases import load_edits

    return load_edits(args.dataset, args.split, args.revision, args.image_root)


def _runs(paths: list[str]) -> "list[Run]":
    """The runs of a benchmark among folders, e.g. all that `runs/*` names; none if there are none."""
    from ..bench import read_run

    runs = [path for path in paths if (Path(path) / "run.json").exists()]
    for path in paths if runs else []:
        if path not in runs:
            print(f"hp-edit: left out: {path} is not a results folder of hp-edit bench", file=sys.stderr)
    return [read_run(path) for path in runs]


def _only(paths: list[str], what: str) -> str:
    """The one path that is meant if there are no runs."""
    if len(paths) > 1:
        raise ValueError(f"{', '.join(paths)} are no results folders of hp-edit bench: name those, or one {what}.")
    return paths[0]


def _score(args: argparse.Namespace) -> None:
    from ..calibration import score_dataset

    dataset = _load_edits(args)
    summary = score_dataset(scorer_of(args, args.task), dataset, args.output_dir, args.chunk_size)
    print(summary.table(args.input_price, args.output_price))


def _probe_judge(args: argparse.Namespace) -> None:
    from ..calibration import probe_judge
    from ..utils.tables import markdown_table

    dataset = _load_edits(args)
    head = ["probe", "what is shown", "scores", "failed", "mean", "at most 1", "shift", "change"]
    rows = [
        [f"{value:.2f}" if isinstance(value, float) else "–" if value is None else value for value in row.values()]
        for row in probe_judge(scorer_of(args), dataset, args.num_cases, args.seed)
    ]
    print(markdown_table(head, rows))


def _refine_prompt(args: argparse.Namespace) -> None:
    from ..bench import edits_of_runs, scores_of_runs
    from ..calibration import (
        PromptRefiner,
        history_table,
        plan_refinement,
        plan_table,
        rated_tasks,
        read_history,
        refine_tasks,
        summary_table,
    )
    from ..calibration.refine import check_refinement
    from ..cases import max_references
    from ..judges import load_judge
    from ..ratings import read_ratings
    from ..rewards import read_scorer_prompt

    candidate = None if args.candidate is None else read_scorer_prompt(args.candidate)
    tasks = None if args.tasks is None else [name.strip() for name in args.tasks.split(",") if name.strip()]
    if candidate is not None and args.from_base:
        raise ValueError(
            "--candidate is compared with the current prompt, but --from_base says where to start: begin the folder "
            "with --from_base --rounds 0, which measures the base prompt, then compare the candidate without "
            "--from_base."
        )
    if candidate is not None and tasks not in (None, [candidate.task]):
        raise ValueError(
            f"{args.candidate} is a prompt for the task {candidate.task!r}, but --tasks names {args.tasks}: leave out "
            "--tasks."
        )
    if candidate is not None:
        names = ("target", "proposer", "proposer_base_url")
        if unused := [f"--{name}" for name in names if getattr(args, name) is not None]:
            raise ValueError(
                f"Nothing is proposed with --candidate, so {', '.join(unused)} has no effect: leave it out."
            )
    check_refinement(args.statistic, args.validation_fraction, args.confidence, args.rounds, args.target)
    runs = _runs(args.dataset)
    if runs:
        dataset = edits_of_runs(runs)
    else:
        args.dataset = _only(args.dataset, "dataset")
        dataset = _load_edits(args)
    ratings, left_out = read_ratings(args.ratings, dataset, args.rubric)
    if not ratings:
        raise ValueError(
            f"None of the {len(left_out)} ratings at {args.ratings} is of these edits, which are named by id and "
            "editor: name the dataset or the runs that were rated."
        )
    split: dict[str, Any] = {"validation_fraction": args.validation_fraction, "seed": args.seed}
    named = tasks if candidate is None else [candidate.task]
    rated, missing = rated_tasks(dataset, ratings, named, args.statistic, **split)
    for reason in missing.values():
        print(f"hp-edit: left out: {reason}", file=sys.stderr)
    scorer = scorer_of(args)
    options: dict[str, Any] = {"statistic": args.statistic, "confidence": args.confidence, **split}
    options["from_base"] = args.from_base
    scores = scores_of_runs(runs) if runs and all(run.hp_scores for run in runs) else []
    rounds = args.rounds if candidate is None else 1
    print(plan_table(plan_refinement(rated, scorer, args.output_dir, scores, **options), rounds), flush=True)
    history = [entry for one in rated for entry in read_history(args.output_dir, one.task)]
    if args.plan:
        if history:
            print(history_table(history))
        return
    scorer.load(1 + max_references(dataset))
    if candidate is not None:
        refiner = PromptRefiner(candidate.task, scorer, dataset, ratings, args.output_dir, **options)
        refiner.compare(candidate)
        print(refiner.table())
        return
    revision = args.judge_revision if args.proposer is None else None
    base_url = args.proposer_base_url or args.judge_base_url
    proposer = load_judge(args.proposer or args.judge, base_url, revision, max_new_tokens=2048, timeout=600)
    summaries: list[dict[str, Any]] = []
    try:
        for summary in refine_tasks(
            rated, scorer, dataset, ratings, args.output_dir, proposer, args.rounds, args.target, **options
        ):
            print(f"hp-edit: {summary['task']}: {summary['reason']}", file=sys.stderr)
            summaries.append(summary)
    finally:  # also what was done before a judge failed
        history = [entry for one in rated for entry in read_history(args.output_dir, one.task)]
        print(f"{history_table(history)}\n{summary_table(summaries)}")
    if failed := [summary["task"] for summary in summaries if summary["failed"]]:
        raise ValueError(f"{', '.join(failed)} did not finish. Run the same command again to resume.")
    print(args.output_dir)


def _measure_agreement(args: argparse.Namespace) -> None:
    from ..bench import edits_of_runs, scores_of_runs
    from ..calibration import agreement_tables, compare_with_people, read_scores, write_agreement
    from ..ratings import read_ratings

    runs = _runs(args.scores)
    if runs and args.dataset is not None:
        raise ValueError("--dataset is for folders of scores: the runs of a benchmark have their edits.")
    dataset = edits_of_runs(runs) if runs else None if args.dataset is None else _load_edits(args)
    ratings, _ = read_ratings(args.ratings, rubric=args.rubric)
    scores = scores_of_runs(runs) if runs else read_scores(_only(args.scores, "folder of scores"))
    result = compare_with_people(ratings, scores, dataset, confidence=args.confidence, seed=args.seed)
    write_agreement(result, args.output_dir, dataset, args.worst)
    print(agreement_tables(result))
    print(args.output_dir)


def _measure_preferences(args: argparse.Namespace) -> None:
    from ..calibration import load_preferences, measure_preferences, preferences_table
    from ..utils.imports import import_object

    dataset = load_preferences(args.dataset, args.split, args.revision, args.image_root)
    reward = scorer_of(args, args.task or "base") if args.reward is None else import_object(args.reward, "reward")
    rows = measure_preferences(reward, dataset, args.chunk_size, args.confidence, seed=args.seed)
    print(preferences_table(rows))


def _annotate(args: argparse.Namespace) -> None:
    from ..bench import edits_of_runs
    from ..calibration import annotate, load_guidelines, load_rubric, sample_cases
    from ..cases import load_split

    runs = [] if args.verify else _runs(args.dataset)
    if runs:
        dataset = edits_of_runs(runs)
    else:
        args.dataset = _only(args.dataset, "dataset")
        if args.verify:
            dataset = load_split(args.dataset, args.split, args.image_root, revision=args.revision)
        else:
            dataset = _load_edits(args)
    if args.num_cases is not None:
        dataset = sample_cases(dataset, args.num_cases, args.seed)
    annotate(
        dataset,
        args.output_dir,
        verify=args.verify,
        rubric=load_guidelines(args.rubric) if args.verify else load_rubric(args.rubric),
        annotators=None if args.annotators is None else args.annotators.split(","),
        overlap=args.overlap,
        seed=args.seed,
        aspects=() if args.aspects is None else [name.strip() for name in args.aspects.split(",")],
        host=args.host,
        port=args.port,
        password=args.password or os.environ.get("HP_EDIT_PASSWORD"),
    )


def _export_ratings(args: argparse.Namespace) -> None:
    from ..calibration import label_studio_config, load_rubric, to_label_studio
    from ..ratings import ratings_dataset, read_ratings
    from ..utils.files import write_json, write_text
    from ..utils.hub import create_repository

    out, to_studio = Path(args.output_dir), args.format == "label-studio"
    if out.exists():
        raise ValueError(f"{out} already exists: choose another --output_dir, or remove it.")
    if (args.image_url is not None or args.rubric_file is not None) and not to_studio:
        raise ValueError("--image_url and --rubric_file are for --format label-studio.")
    if not args.private and args.push_to_hub is None or args.push_to_hub is not None and to_studio:
        raise ValueError("--push_to_hub is for --format dataset, and --no_private for --push_to_hub.")
    dataset = _load_edits(args)
    if to_studio:
        rubric = load_rubric(args.rubric_file)
        started = not Path(args.ratings).is_dir() or any(Path(args.ratings).glob("ratings-*.jsonl"))
        ratings = read_ratings(args.ratings, dataset, args.rubric)[0] if started else []
        folder = None if args.image_url is None else out / "images"
        tasks = to_label_studio(
            dataset, ratings, rubric=rubric.revision, image_folder=folder, image_url=args.image_url
        )
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "tasks.json", tasks)
        write_text(out / "config.xml", label_studio_config(dataset, rubric))
    else:
        ratings, _ = read_ratings(args.ratings, dataset, args.rubric)
        rated = ratings_dataset(ratings, dataset)
        if args.push_to_hub is not None:
            repo_id = create_repository(args.push_to_hub, private=args.private)
        rated.save_to_disk(out)
        if args.push_to_hub is not None:
            rated.push_to_hub(repo_id)
    print(f"{out}: {len(ratings)} ratings of {len({rating.edit for rating in ratings})} edits")


def _import_ratings(args: argparse.Namespace) -> None:
    from ..calibration import from_label_studio
    from ..ratings import add_ratings

    ratings, problems = from_label_studio(args.file, _load_edits(args), args.rubric)
    added = add_ratings(ratings, args.output_dir)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    print(f"{args.output_dir}: {added} ratings added, {len(ratings) - added} already there, {len(problems)} left out")


def register(commands: Any) -> None:
    """Adds the commands of this family to a parser's subcommands."""
    command = commands.add_parser("score", help="score a dataset of edits with HP-Scorer, or resume")
    add_dataset_options(command)
    command.add_argument("--output_dir", default="scores", help="folder of scores.jsonl, to which scores are appended")
    command.add_argument("--task", help="use this task's prompt for all edits; 'base' is the paper's base scorer")
    command.add_argument("--chunk_size", type=int, default=64, help="edits that are judged and written together")
    command.add_argument("--input_price", type=float, help="of a million input tokens of the judge")
    command.add_argument("--output_price", type=float, help="of a million output tokens")
    add_scorer_options(command)
    command.set_defaults(run=_score)

    command = commands.add_parser("probe-judge", help="probe a judge for biases with edits of known scores")
    add_dataset_options(command)
    command.add_argument("--num_cases", type=int, default=50)
    command.add_argument("--seed", type=int, default=0)
    add_scorer_options(command)
    command.set_defaults(run=_probe_judge)

    command = commands.add_parser("refine-prompt", help="refine scorer prompts against ratings, or resume")
    add_dataset_options(command, with_runs=True)
    command.add_argument("--ratings", required=True, help="folder of ratings, or a file")
    command.add_argument("--rubric", help="use only ratings made with this revision of the rubric")
    command.add_argument("--output_dir", required=True, help="folder of the scorer prompts and their history")
    command.add_argument(
        "--tasks",
        help="tasks, separated by commas; by default all that have ratings. 'base' is the base prompt, refined on the "
        "edits of all tasks",
    )
    command.add_argument(
        "--from_base",
        action="store_true",
        help="start from the base prompt, which has the criteria alone, and not from finished prompts",
    )
    what = command.add_mutually_exclusive_group()
    what.add_argument("--candidate", help="Markdown file of a revision to compare with the current one")
    what.add_argument("--plan", action="store_true", help="only show what can be detected, and what was done so far")
    command.add_argument("--target", type=float, help="stop when the agreement on the held-out cases is reached")
    command.add_argument("--rounds", type=int, default=3, help="of proposals for each task, earlier ones included")
    command.add_argument("--proposer", help="model that proposes questions; by default the judge's")
    command.add_argument(
        "--proposer_base_url", help="its OpenAI-compatible server, or several; by default the judge's"
    )
    command.add_argument("--statistic", choices=("pearson", "spearman", "kendall", "mae"), default="pearson")
    command.add_argument("--validation_fraction", type=float, default=0.8, help="share of held-out cases")
    command.add_argument("--confidence", type=float, default=0.95, help="that nothing without merit is adopted")
    command.add_argument("--seed", type=int, default=0)
    add_scorer_options(command)
    command.set_defaults(run=_refine_prompt)

    command = commands.add_parser("measure-agreement", help="measure the agreement between scores and ratings")
    command.add_argument("ratings", help="folder of ratings, or a file")
    command.add_argument("scores", nargs="+", help="folder of scores, or a file; or results folders of hp-edit bench")
    command.add_argument("--dataset", help="folder or Hub repository of the edits, for tasks and images")
    command.add_argument("--split", default="train")
    command.add_argument("--revision", help="branch, tag or commit of the dataset's repository")
    command.add_argument("--image_root", help=IMAGE_ROOT)
    command.add_argument("--output_dir", required=True, help="folder of the tables, figures and worst disagreements")
    command.add_argument("--rubric", help="use only ratings made with this revision of the rubric")
    command.add_argument("--worst", type=int, default=30, help="number of worst disagreements to show")
    command.add_argument("--confidence", type=float, default=0.95, help="of the intervals")
    command.add_argument("--seed", type=int, default=0, help="of the bootstrap resamples")
    command.set_defaults(run=_measure_agreement)

    command = commands.add_parser(
        "measure-preferences", help="measure how often a reward prefers the edits that people preferred"
    )
    command.add_argument(
        "dataset", help="EditScore/EditReward-Bench, TIGER-Lab/EditReward-Bench, or a folder with such columns"
    )
    command.add_argument("--split", default="train")
    command.add_argument("--revision", help="branch, tag or commit of the dataset's repository")
    command.add_argument("--image_root", help=IMAGE_ROOT)
    command.add_argument(
        "--reward", help="a reward function as file.py:name; by default HP-Scorer, as the options say"
    )
    command.add_argument("--task", help="HP-Scorer's prompt for all pairs; by default the base prompt")
    command.add_argument("--chunk_size", type=int, default=16, help="pairs that are judged together")
    command.add_argument("--confidence", type=float, default=0.95, help="of the intervals")
    command.add_argument("--seed", type=int, default=0, help="of the bootstrap resamples")
    add_scorer_options(command)
    command.set_defaults(run=_measure_preferences)

    command = commands.add_parser("annotate", help="serve the page on which people rate edits, or verify cases")
    add_dataset_options(command, with_runs=True)
    command.add_argument(
        "--verify", action="store_true", help="show cases without an edit, to be accepted, corrected or rejected"
    )
    command.add_argument(
        "--output_dir", help="folder of the answers, one file per annotator; by default ratings, with --verify reviews"
    )
    command.add_argument("--rubric", help="Markdown file with a rubric or guidelines; by default this package's")
    command.add_argument("--annotators", help="names of the annotators, separated by commas; by default anyone")
    command.add_argument("--overlap", type=int, help="number of annotators who rate each case; by default all")
    command.add_argument("--num_cases", type=int, help="draw this many cases, evenly over the tasks; by default all")
    command.add_argument(
        "--aspects", help='aspects to score beside the edit, by commas, e.g. "instruction adherence,image quality"'
    )
    command.add_argument("--seed", type=int, default=0, help="of the draw, the assignment and the order of edits")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; any other needs a password")
    command.add_argument("--port", type=int, default=7860)
    command.add_argument("--password", help="better set in the environment as HP_EDIT_PASSWORD")
    command.set_defaults(run=_annotate)

    command = commands.add_parser("export-ratings", help="export ratings as a dataset, or as Label Studio tasks")
    command.add_argument("ratings", help="folder of ratings, or a file")
    add_dataset_options(command)
    command.add_argument("--output_dir", required=True, help="new folder of the export")
    command.add_argument("--format", choices=("dataset", "label-studio"), default="dataset")
    command.add_argument("--rubric", help="use only ratings made with this revision of the rubric")
    command.add_argument(
        "--rubric_file", help="Markdown file with the rubric for Label Studio; by default this package's"
    )
    command.add_argument(
        "--image_url", help="where Label Studio finds OUTPUT_DIR/images; by default images are embedded"
    )
    command.add_argument("--push_to_hub", metavar="REPO", help="also push the dataset")
    command.add_argument(
        "--no_private",
        dest="private",
        action="store_false",
        help="allow a public repository; by default it must be private, because the dataset holds the images",
    )
    command.set_defaults(run=_export_ratings)

    command = commands.add_parser("import-ratings", help="import ratings from Label Studio's export in JSON")
    command.add_argument("file")
    add_dataset_options(command)
    command.add_argument(
        "--output_dir", required=True, help="folder of the ratings; existing ratings are not repeated"
    )
    command.add_argument("--rubric", help="revision of the rubric, for tasks that do not name it")
    command.set_defaults(run=_import_ratings)
