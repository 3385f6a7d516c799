"""Commands of stage 1: scores, ratings, agreement, refinement."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from .options import add_dataset_options, add_scorer_options, scorer_of


def score(args: argparse.Namespace) -> None:
    from ..calibration import score_dataset
    from ..cases import load_edits

    dataset = load_edits(args.dataset, args.split, args.revision)
    report = score_dataset(scorer_of(args, args.task), dataset, args.output_dir, args.chunk_size)
    print(report.table(args.input_price, args.output_price))


def probe(args: argparse.Namespace) -> None:
    from ..calibration import probe_judge
    from ..cases import load_edits

    dataset = load_edits(args.dataset, args.split, args.revision)
    table = probe_judge(scorer_of(args), dataset, args.num_cases, args.seed)
    print(
        "| probe | what is shown | scores | failed | mean | at most 1 | shift | change |\n|---|---|---|---|---|---|---|---|"
    )
    for row in table:
        print(
            "| "
            + " | ".join(f"{x:.2f}" if isinstance(x, float) else "–" if x is None else str(x) for x in row.values())
            + " |"
        )


def refine(args: argparse.Namespace) -> None:
    from ..calibration import PromptRefiner
    from ..cases import load_edits
    from ..judges import ServerJudge, TransformersJudge
    from ..ratings import read_ratings
    from ..rewards import read_scorer_prompt

    dataset = load_edits(args.dataset, args.split, args.revision)
    ratings, _ = read_ratings(args.ratings, dataset, args.rubric)
    scorer = scorer_of(args)
    refiner = PromptRefiner(
        args.task,
        scorer,
        dataset,
        ratings,
        args.output_dir,
        statistic=args.statistic,
        validation_fraction=args.validation_fraction,
        confidence=args.confidence,
        seed=args.seed,
    )
    if args.candidate is not None or args.propose:
        scorer.load()
    if args.candidate is not None:
        refiner.compare(read_scorer_prompt(args.candidate))
    elif args.propose:
        name, url = args.proposer or args.judge, args.proposer_url or args.judge_base_url
        proposer = (
            ServerJudge(name, url, max_new_tokens=2048, timeout=600)
            if url is not None
            else TransformersJudge(name, max_new_tokens=2048)
        )
        try:
            for _ in range(args.rounds):
                candidate, questions = refiner.propose(proposer)
                for question in questions:
                    print(f"Proposed for revision {candidate.name}: {question}", file=sys.stderr)
                refiner.compare(candidate, questions)
        except (ValueError, ConnectionError):
            print(refiner.table())  # of the rounds before
            raise
    print(refiner.table())


def agreement(args: argparse.Namespace) -> None:
    from ..calibration import compare_with_people, read_scores, report_text, write_report
    from ..cases import load_edits
    from ..ratings import read_ratings

    dataset = None if args.dataset is None else load_edits(args.dataset, args.split, args.revision)
    ratings, _ = read_ratings(args.ratings, rubric=args.rubric)
    result = compare_with_people(
        ratings, read_scores(args.scores), dataset, confidence=args.confidence, seed=args.seed
    )
    write_report(result, args.output_dir, dataset, args.worst)
    print(report_text(result))
    print(args.output_dir)


def annotate(args: argparse.Namespace) -> None:
    from ..calibration import annotate as serve
    from ..calibration import load_rubric
    from ..cases import load_edits

    serve(
        load_edits(args.dataset, args.split, args.revision),
        args.ratings,
        rubric=load_rubric(args.rubric),
        annotators=None if args.annotators is None else args.annotators.split(","),
        overlap=args.overlap,
        seed=args.seed,
        host=args.host,
        port=args.port,
        password=args.password or os.environ.get("HP_EDIT_PASSWORD"),
    )


def export_ratings(args: argparse.Namespace) -> None:
    from ..calibration import label_studio_config, load_rubric, ratings_dataset, to_label_studio
    from ..cases import load_edits
    from ..ratings import read_ratings

    out, to_studio = Path(args.output_dir), args.format == "label-studio"
    if out.exists():
        raise ValueError(f"{out} exists already: name another folder, or remove it.")
    if (args.image_url is not None or args.rubric_file is not None) and not to_studio:
        raise ValueError("--image_url and --rubric_file are for --format label-studio.")
    if args.private and args.push_to_hub is None or args.push_to_hub is not None and to_studio:
        raise ValueError("--push_to_hub is for --format dataset, and --private for --push_to_hub.")
    dataset = load_edits(args.dataset, args.split, args.revision)
    if to_studio:
        rubric = load_rubric(args.rubric_file)
        started = not Path(args.ratings).is_dir() or any(Path(args.ratings).glob("ratings-*.jsonl"))
        ratings = read_ratings(args.ratings, dataset, args.rubric)[0] if started else []
        images = None if args.image_url is None else out / "images"
        tasks = to_label_studio(
            dataset, ratings, rubric=rubric.revision, image_folder=images, image_url=args.image_url
        )
        out.mkdir(parents=True, exist_ok=True)
        (out / "tasks.json").write_text(json.dumps(tasks, ensure_ascii=False), encoding="utf-8")
        (out / "config.xml").write_text(label_studio_config(dataset, rubric), encoding="utf-8")
    else:
        ratings, _ = read_ratings(args.ratings, dataset, args.rubric)
        rated = ratings_dataset(ratings, dataset)
        rated.save_to_disk(out)
        if args.push_to_hub is not None:
            rated.push_to_hub(args.push_to_hub, private=args.private or None)
    print(f"{out}: {len(ratings)} ratings of {len({(rating.id, rating.editor) for rating in ratings})} edits")


def import_ratings(args: argparse.Namespace) -> None:
    from ..calibration import add_ratings, from_label_studio
    from ..cases import load_edits

    dataset = load_edits(args.dataset, args.split, args.revision)
    ratings, problems = from_label_studio(args.file, dataset, args.rubric)
    added = add_ratings(ratings, args.output_dir)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    print(f"{args.output_dir}: {added} ratings added, {len(ratings) - added} there already, {len(problems)} left out")


def register(commands: Any) -> None:
    """Adds the commands of this family to a parser's subcommands."""
    command = commands.add_parser("score", help="score a dataset of edits with HP-Scorer; goes on where it stopped")
    add_dataset_options(command)
    command.add_argument("--output_dir", default="scores.jsonl", help="file that the scores are appended to")
    command.add_argument("--task", help="prompt for all edits, whatever their task; 'base' is the paper's base scorer")
    command.add_argument("--chunk_size", type=int, default=64, help="edits that are judged and written together")
    command.add_argument("--input_price", type=float, help="of a million tokens that the judge reads")
    command.add_argument("--output_price", type=float, help="of a million tokens that it writes")
    add_scorer_options(command)
    command.set_defaults(run=score)

    command = commands.add_parser("probe-judge", help="show a judge edits whose scores should be known")
    add_dataset_options(command)
    command.add_argument("--num_cases", type=int, default=50)
    command.add_argument("--seed", type=int, default=0)
    add_scorer_options(command)
    command.set_defaults(run=probe)

    command = commands.add_parser(
        "refine-prompt", help="compare revisions of a task's prompt by the ratings of people"
    )
    command.add_argument("task")
    add_dataset_options(command)
    command.add_argument("--ratings", required=True, help="file, or folder with ratings-*.jsonl")
    command.add_argument("--rubric", help="take only ratings made with this revision of the rubric")
    command.add_argument(
        "--output_dir", required=True, help="folder of prompts, with its history; HPScorerReward can use it"
    )
    what = command.add_mutually_exclusive_group()
    what.add_argument("--candidate", help="a revision to compare with the current one: a Markdown file")
    what.add_argument("--propose", action="store_true", help="let a model propose questions to add")
    command.add_argument("--proposer", help="model that proposes, by default the judge's")
    command.add_argument("--proposer_url", help="its server")
    command.add_argument("--rounds", type=int, default=3, help="of proposals")
    command.add_argument("--statistic", choices=("pearson", "spearman", "kendall", "mae"), default="pearson")
    command.add_argument("--validation_fraction", type=float, default=0.5)
    command.add_argument("--confidence", type=float, default=0.95)
    command.add_argument("--seed", type=int, default=0)
    add_scorer_options(command)
    command.set_defaults(run=refine)

    command = commands.add_parser("agreement", help="compare scores with people's ratings")
    command.add_argument("ratings", help="file of ratings, or folder with files ratings-*.jsonl")
    command.add_argument("scores", help="file that `hp-edit score` wrote")
    command.add_argument("--dataset", help="folder or Hub repository of the edits, for tasks and images")
    command.add_argument("--split", default="train")
    command.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    command.add_argument("--output_dir", required=True, help="folder for tables, figures and the worst disagreements")
    command.add_argument("--rubric", help="take only ratings made with this revision of the rubric")
    command.add_argument("--worst", type=int, default=30, help="how many of the worst disagreements to show")
    command.add_argument("--confidence", type=float, default=0.95, help="of the intervals")
    command.add_argument("--seed", type=int, default=0, help="of the intervals' resamples")
    command.set_defaults(run=agreement)

    command = commands.add_parser("annotate", help="start the page on which people rate edits from 0 to 5")
    add_dataset_options(command)
    command.add_argument("--ratings", default="ratings", help="folder for the ratings, a file for each annotator")
    command.add_argument("--rubric", help="Markdown file with a header that names its revision; by default ours")
    command.add_argument("--annotators", help="who may rate, separated by commas; by default everyone")
    command.add_argument("--overlap", type=int, help="how many of the annotators rate each case; by default all")
    command.add_argument("--seed", type=int, default=0, help="decides who rates what, and in which order")
    command.add_argument("--host", default="127.0.0.1", help="address to listen at; any but this needs a password")
    command.add_argument("--port", type=int, default=7860)
    command.add_argument("--password", help="or in the environment as HP_EDIT_PASSWORD, where fewer can read it")
    command.set_defaults(run=annotate)

    command = commands.add_parser("export-ratings", help="ratings as a dataset, or as tasks for Label Studio")
    command.add_argument("ratings", help="file, or folder with ratings-*.jsonl")
    add_dataset_options(command)
    command.add_argument("--output_dir", required=True, help="folder to write")
    command.add_argument("--format", choices=("dataset", "label-studio"), default="dataset")
    command.add_argument("--rubric", help="take only ratings made with this revision of the rubric")
    command.add_argument("--rubric_file", help="rubric that Label Studio shows: a Markdown file; by default ours")
    command.add_argument("--image_url", help="where Label Studio finds OUT/images; by default images are in the tasks")
    command.add_argument("--push_to_hub", metavar="REPO", help="also push the dataset")
    command.add_argument("--private", action="store_true", help="to a private repository")
    command.set_defaults(run=export_ratings)

    command = commands.add_parser("import-ratings", help="take over ratings from Label Studio's export in JSON")
    command.add_argument("file")
    add_dataset_options(command)
    command.add_argument(
        "--output_dir", required=True, help="folder for the ratings; what is there already is not doubled"
    )
    command.add_argument("--rubric", help="revision of the rubric, where the tasks do not tell it")
    command.set_defaults(run=import_ratings)
