"""The command `hp-edit`."""

import argparse
import importlib
import importlib.util
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from .cases import load_edits
from .lora_formats import FORMATS, base_transformer, check_fit, describe_lora, merge_lora, read_lora, write_lora


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


def add_dataset(command: argparse.ArgumentParser) -> None:
    """The options that name a dataset of edits."""
    command.add_argument("dataset", help="edits: folder or Hub repository with id, image, edit, prompt, task, editor")
    command.add_argument("--split", default="train")
    command.add_argument("--revision", help="branch, tag or commit of the dataset's repository")


def add_scorer(command: argparse.ArgumentParser) -> None:
    """The options that name a judge and its prompts."""
    command.add_argument("--judge", default="Qwen/Qwen3-VL-32B-Instruct", help="Hub id, folder, or a server's model")
    command.add_argument(
        "--judge-revision", help="of its repository; with a server, whatever tells models of one name apart"
    )
    command.add_argument(
        "--judge_base_url", help="OpenAI-compatible server, e.g. http://localhost:8000/v1; else in this process"
    )
    command.add_argument("--score-mode", choices=("integer", "expected"), default="integer")
    command.add_argument("--num_answers", type=int, default=1, help="answers whose scores are averaged")
    command.add_argument("--max-new-tokens", type=int, help="of an answer; raise it for judges that reason aloud")
    command.add_argument("--batch-size", type=int, default=8, help="of a judge in this process")
    command.add_argument("--max-concurrency", type=int, default=16, help="requests at once to a server")
    command.add_argument("--timeout", type=float, default=120.0, help="seconds for one request to a server")
    command.add_argument("--max-retries", type=int, default=4, help="further attempts with a server")
    command.add_argument(
        "--scorer_prompts", help="folder or Hub repository of scorer prompts; by default this package's"
    )
    command.add_argument("--scorer_prompts_revision")
    command.add_argument("--cache", default="~/.cache/hp-edit-trl/judgements.sqlite", help="'none' keeps none")


def make_judge(args: argparse.Namespace, **kwargs: Any):
    """The judge that the options name."""
    from .judges import CachedJudge, ServerJudge, TransformersJudge

    shared = {name: getattr(args, name) for name in ("score_mode", "num_answers", "max_new_tokens")}
    shared = {name: value for name, value in shared.items() if value is not None} | kwargs
    judge: ServerJudge | TransformersJudge
    if args.judge_base_url is not None:
        of_server = {name: getattr(args, name) for name in ("max_concurrency", "timeout", "max_retries")}
        judge = ServerJudge(args.judge, args.judge_base_url, revision=args.judge_revision, **shared, **of_server)
    else:
        options = {} if args.judge_revision is None else {"revision": args.judge_revision}
        judge = TransformersJudge(args.judge, batch_size=args.batch_size, model_init_kwargs=options, **shared)
    return judge if args.cache == "none" else CachedJudge(judge, args.cache)


def make_scorer(args: argparse.Namespace, task: str | None = None):
    """The scorer that the options name."""
    from .rewards import HPScorerReward

    return HPScorerReward(
        make_judge(args),
        scorer_prompts=args.scorer_prompts,
        scorer_prompts_revision=args.scorer_prompts_revision,
        task=task,
    )


def make_benchmark(args: argparse.Namespace):
    """The benchmark that the options name."""
    from .bench import DreamBenchPlus, GEditBench, RealPrefBench, parse_grade, parse_pair

    if args.benchmark == "realpref":
        return RealPrefBench(make_scorer(args), args.dataset, args.split or "test", args.revision)
    options: dict[str, Any] = {
        "scorer_prompts": args.scorer_prompts,
        "scorer_prompts_revision": args.scorer_prompts_revision,
    }
    options["revision"] = args.revision
    args.max_new_tokens = args.max_new_tokens or 512  # reasons come with the scores
    options |= {name: getattr(args, name) for name in ("dataset", "split") if getattr(args, name) is not None}
    if args.benchmark == "gedit":
        return GEditBench(make_judge(args, parse=parse_pair), **options)
    if args.split is not None:
        raise ValueError("--split: DreamBench++ has none.")
    named: dict[str, Any] = {
        name: None if value == "none" else value for name, value in (("clip", args.clip), ("dino", args.dino))
    }
    return DreamBenchPlus(make_judge(args, parse=parse_grade), **(options | named))


def make_editor(args: argparse.Namespace):
    """The editor that the options name."""
    from .editors import FolderEditor, PipelineEditor, PolicyEditor, as_editor
    from .policies import policy_class

    where, _, attribute = args.editor.rpartition(":")
    is_folder = Path(args.editor).is_dir() and not (Path(args.editor) / "model_index.json").exists()
    if is_folder or where:
        unused = [name for name in ("lora", "editor_revision", "policy", "option") if getattr(args, name)]
        if unused:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise ValueError(
                f"{named}: for pipelines only, and {args.editor} is a {'folder' if is_folder else 'function'}."
            )
        return FolderEditor(args.editor, args.name) if is_folder else as_editor(_imported(where, attribute))
    options: dict[str, Any] = {}
    for option in args.option:
        name, _, value = option.partition("=")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    size = None if args.resolution == 0 else args.resolution
    editor = PipelineEditor(args.editor, args.editor_revision, args.lora, size, args.dtype, **options)
    if not args.policy:
        return editor
    known = {"num_inference_steps", "true_cfg_scale"}
    if size is None or options.keys() - known:
        raise ValueError(
            f"A policy needs a --resolution above 0, and takes no --option beside {', '.join(sorted(known))}."
        )
    policy = policy_class(args.editor)(editor.load_pipeline())
    name = " + ".join(filter(None, (args.editor, args.lora)))
    return PolicyEditor(policy, name, size, batch_size=args.editor_batch_size, **options)


def _imported(where: str, attribute: str):
    """What a Python file or module calls `attribute`."""
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        else:
            module = importlib.import_module(where)
        return getattr(module, attribute)
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(
            f"--editor {where}:{attribute} names no function that can be imported ({error}): use file.py:function or "
            "package.module:function."
        ) from error


def bench(args: argparse.Namespace) -> None:
    from accelerate import PartialState

    from .bench import write_bench_report

    runs = [args] if args.config is None else _configured_runs(args)
    finished, failed = [], []
    for run in runs:
        try:
            finished.append(_bench(run))
        except (ValueError, OSError, ImportError) as error:
            if len(runs) == 1:
                raise
            print(f"hp-edit: {run.name}: {error}", file=sys.stderr)
            failed.append(run.name)
    if args.config is not None and finished and PartialState().is_main_process:
        report = finished[0].folder.parent / "report"
        print(write_bench_report(finished, report))
        print(report)
    PartialState().destroy_process_group()  # NCCL warns of a process that ends without
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(runs)} runs did not finish: {', '.join(failed)}. Run it again to go on."
        )


def _configured_runs(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The runs that a YAML file names: options of the command that all share, and a list `runs` with those of each."""
    defaults = vars(args.parser.parse_args(["bench"]))
    beside = [name for name, value in vars(args).items() if name != "config" and value != defaults[name]]
    if beside:
        given = ", ".join(name if name == "benchmark" else f"--{name.replace('_', '-')}" for name in beside)
        raise ValueError(f"{given}: with --config, options stand in the file.")
    try:
        shared = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{args.config} is no YAML: {error}") from error
    if not isinstance(shared, dict) or not isinstance(shared.get("runs"), list) or "out" not in shared:
        raise ValueError(f"{args.config} must hold options of `hp-edit bench`, `out` among them, and a list `runs`.")
    runs, out = shared.pop("runs"), Path(shared.pop("out"))
    parsed = []
    for run in runs:
        if not isinstance(run, dict) or not isinstance(run.get("name"), str) or not run["name"]:
            raise ValueError(f"{args.config}: each of the runs needs a name, but one is {run!r}.")
        words: list[str] = []
        for name, value in {**shared, **run, "out": out / run["name"].replace("/", "-")}.items():
            flag = "--" + name.replace("_", "-")
            if name == "benchmark":
                words.insert(0, value)
            elif isinstance(value, dict):
                words += [f"{flag}={key}={json.dumps(one, ensure_ascii=False)}" for key, one in value.items()]
            elif value is True:
                words.append(flag)
            elif value is not None and value is not False:
                words.append(f"{flag}={value}")
        parsed.append(args.parser.parse_args(["bench", *words]))
    folders = [run.out for run in parsed]
    if len(set(folders)) < len(folders) or str(out / "report") in folders:
        raise ValueError(f"{args.config}: two of the runs have one name, or one is called report.")
    return parsed


def _bench(args: argparse.Namespace):
    from .bench import run_benchmark
    from .ratings import read_ratings
    from .utils.distributed import in_step, patient_accelerator

    needed = ["benchmark", "editor", "out", *(["dataset"] if args.benchmark == "realpref" else [])]
    lacking = [name if name == "benchmark" else f"--{name}" for name in needed if getattr(args, name) is None]
    if lacking:
        raise ValueError(f"A run needs {' and '.join(lacking)}, e.g. hp-edit bench gedit --editor ... --out DIR.")
    with in_step(patient_accelerator()):
        benchmark, editor = make_benchmark(args), make_editor(args)
    run = run_benchmark(
        benchmark,
        editor,
        args.out,
        name=args.name,
        batch_size=args.editor_batch_size,
        chunk_size=args.chunk_size,
        seed=args.seed,
        ratings=None if args.ratings is None else read_ratings(args.ratings)[0],
    )
    print(run.folder)
    return run


def report(args: argparse.Namespace) -> None:
    from .bench import push_results, read_run, write_bench_report

    runs = [read_run(folder) for folder in args.runs]
    if args.push_to_hub is not None and len(runs) > 1:
        raise ValueError("--push-to-hub writes the results of one run into its model's card: name one run.")
    print(write_bench_report(runs, args.out, args.log, args.baseline))
    print(args.out)
    if args.push_to_hub is not None:
        print(push_results(runs[0], args.push_to_hub))


def score(args: argparse.Namespace) -> None:
    from .calibration import score_dataset

    dataset = load_edits(args.dataset, args.split, args.revision)
    report = score_dataset(make_scorer(args, args.task), dataset, args.out, args.chunk_size)
    print(report.table(args.input_price, args.output_price))


def probe(args: argparse.Namespace) -> None:
    from .calibration import probe_judge

    dataset = load_edits(args.dataset, args.split, args.revision)
    table = probe_judge(make_scorer(args), dataset, args.num_cases, args.seed)
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
    from .calibration import PromptRefiner
    from .judges import ServerJudge, TransformersJudge
    from .ratings import read_ratings
    from .rewards import read_scorer_prompt

    dataset = load_edits(args.dataset, args.split, args.revision)
    ratings, _ = read_ratings(args.ratings, dataset, args.rubric)
    scorer = make_scorer(args)
    refiner = PromptRefiner(
        args.task,
        scorer,
        dataset,
        ratings,
        args.out,
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
    from .calibration import compare_with_people, read_scores, report_text, write_report
    from .ratings import read_ratings

    dataset = None if args.dataset is None else load_edits(args.dataset, args.split, args.revision)
    ratings, _ = read_ratings(args.ratings, rubric=args.rubric)
    result = compare_with_people(
        ratings, read_scores(args.scores), dataset, confidence=args.confidence, seed=args.seed
    )
    write_report(result, args.out, dataset, args.worst)
    print(report_text(result))
    print(args.out)


def annotate(args: argparse.Namespace) -> None:
    from .calibration import annotate as serve
    from .calibration import load_rubric

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


def build(args: argparse.Namespace) -> None:
    from .data.builder import BuildConfig, build_dataset

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
    from .data import load_realpref

    dataset = load_realpref(args.dataset, args.split, args.revision)
    print(f"{args.dataset}, split {args.split}: {len(dataset)} rows in order")


def export_ratings(args: argparse.Namespace) -> None:
    from .calibration import label_studio_config, load_rubric, ratings_dataset, to_label_studio
    from .ratings import read_ratings

    out, to_studio = Path(args.out), args.format == "label-studio"
    if out.exists():
        raise ValueError(f"{out} exists already: name another folder, or remove it.")
    if (args.image_url is not None or args.rubric_file is not None) and not to_studio:
        raise ValueError("--image-url and --rubric-file are for --format label-studio.")
    if args.private and args.push_to_hub is None or args.push_to_hub is not None and to_studio:
        raise ValueError("--push-to-hub is for --format dataset, and --private for --push-to-hub.")
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
    from .calibration import add_ratings, from_label_studio

    dataset = load_edits(args.dataset, args.split, args.revision)
    ratings, problems = from_label_studio(args.file, dataset, args.rubric)
    added = add_ratings(ratings, args.out)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    print(f"{args.out}: {added} ratings added, {len(ratings) - added} there already, {len(problems)} left out")


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

    command = commands.add_parser("score", help="score a dataset of edits with HP-Scorer; goes on where it stopped")
    add_dataset(command)
    command.add_argument("--out", default="scores.jsonl", help="file that the scores are appended to")
    command.add_argument("--task", help="prompt for all edits, whatever their task; 'base' is the paper's base scorer")
    command.add_argument("--chunk-size", type=int, default=64, help="edits that are judged and written together")
    command.add_argument("--input-price", type=float, help="of a million tokens that the judge reads")
    command.add_argument("--output-price", type=float, help="of a million tokens that it writes")
    add_scorer(command)
    command.set_defaults(run=score)

    command = commands.add_parser("probe-judge", help="show a judge edits whose scores should be known")
    add_dataset(command)
    command.add_argument("--num-cases", type=int, default=50)
    command.add_argument("--seed", type=int, default=0)
    add_scorer(command)
    command.set_defaults(run=probe)

    command = commands.add_parser(
        "refine-prompt", help="compare revisions of a task's prompt by the ratings of people"
    )
    command.add_argument("task")
    add_dataset(command)
    command.add_argument("--ratings", required=True, help="file, or folder with ratings-*.jsonl")
    command.add_argument("--rubric", help="take only ratings made with this revision of the rubric")
    command.add_argument("--out", required=True, help="folder of prompts, with its history; HPScorerReward can use it")
    what = command.add_mutually_exclusive_group()
    what.add_argument("--candidate", help="a revision to compare with the current one: a Markdown file")
    what.add_argument("--propose", action="store_true", help="let a model propose questions to add")
    command.add_argument("--proposer", help="model that proposes, by default the judge's")
    command.add_argument("--proposer-url", help="its server")
    command.add_argument("--rounds", type=int, default=3, help="of proposals")
    command.add_argument("--statistic", choices=("pearson", "spearman", "kendall", "mae"), default="pearson")
    command.add_argument("--validation-fraction", type=float, default=0.5)
    command.add_argument("--confidence", type=float, default=0.95)
    command.add_argument("--seed", type=int, default=0)
    add_scorer(command)
    command.set_defaults(run=refine)

    command = commands.add_parser("agreement", help="compare scores with people's ratings")
    command.add_argument("ratings", help="file of ratings, or folder with files ratings-*.jsonl")
    command.add_argument("scores", help="file that `hp-edit score` wrote")
    command.add_argument("--dataset", help="folder or Hub repository of the edits, for tasks and images")
    command.add_argument("--split", default="train")
    command.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    command.add_argument("--out", required=True, help="folder for tables, figures and the worst disagreements")
    command.add_argument("--rubric", help="take only ratings made with this revision of the rubric")
    command.add_argument("--worst", type=int, default=30, help="how many of the worst disagreements to show")
    command.add_argument("--confidence", type=float, default=0.95, help="of the intervals")
    command.add_argument("--seed", type=int, default=0, help="of the intervals' resamples")
    command.set_defaults(run=agreement)

    command = commands.add_parser(
        "bench", help="let an editor edit a benchmark's cases and score them; goes on where it was"
    )
    command.add_argument("benchmark", nargs="?", choices=("realpref", "gedit", "dreambench"))
    command.add_argument("--config", help="YAML file with options that several runs share, and a list of runs")
    command.add_argument(
        "--editor", help="pipeline (Hub id or folder), folder of edits named by id, or file.py:function"
    )
    command.add_argument("--out", help="folder for the results")
    command.add_argument("--name", help="what tables call the editor")
    command.add_argument("--lora", help="on top of the pipeline: Hub id or folder")
    command.add_argument("--editor-revision", help="branch, tag or commit of the pipeline's repository")
    command.add_argument(
        "--resolution", type=int, default=1024, help="side of the square of an edit's area; 0: as it likes"
    )
    command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    command.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the pipeline's call, e.g. num_inference_steps=40",
    )
    command.add_argument("--policy", action="store_true", help="denoise in batches, as the trainers do")
    command.add_argument("--editor-batch-size", type=int, default=4, help="cases that are edited together")
    command.add_argument("--chunk-size", type=int, default=32, help="edits that are judged and written together")
    command.add_argument("--seed", type=int, default=0, help="of the edits' noise")
    command.add_argument("--dataset", help="the cases: folder or Hub repository")
    command.add_argument("--split", help="of the cases")
    command.add_argument("--revision", help="branch, tag or commit of the cases' repository")
    command.add_argument(
        "--clip", default="openai/clip-vit-base-patch32", help="of dreambench; 'none' leaves its metrics out"
    )
    command.add_argument("--dino", default="facebook/dino-vits8", help="of dreambench; 'none' leaves its metric out")
    command.add_argument("--ratings", help="people's ratings of the edits: file, or folder with ratings-*.jsonl")
    add_scorer(command)
    command.set_defaults(run=bench, parser=parser)

    command = commands.add_parser(
        "report", help="compare runs of `hp-edit bench`: tables, figures and a page of all edits"
    )
    command.add_argument("runs", nargs="+", help="results folders")
    command.add_argument("--out", required=True, help="folder for tables, figures and the page")
    command.add_argument("--log", action="append", default=[], help="output folder of a training, for its rewards")
    command.add_argument("--baseline", help="name of the run that the others are compared with; by default the first")
    command.add_argument("--push-to-hub", metavar="REPO", help="write a run's results into the card of its model")
    command.set_defaults(run=report)

    command = commands.add_parser("annotate", help="start the page on which people rate edits from 0 to 5")
    add_dataset(command)
    command.add_argument("--ratings", default="ratings", help="folder for the ratings, a file for each annotator")
    command.add_argument("--rubric", help="Markdown file with a header that names its revision; by default ours")
    command.add_argument("--annotators", help="who may rate, separated by commas; by default everyone")
    command.add_argument("--overlap", type=int, help="how many of the annotators rate each case; by default all")
    command.add_argument("--seed", type=int, default=0, help="decides who rates what, and in which order")
    command.add_argument("--host", default="127.0.0.1", help="address to listen at; any but this needs a password")
    command.add_argument("--port", type=int, default=7860)
    command.add_argument("--password", help="or in the environment as HP_EDIT_PASSWORD, where fewer can read it")
    command.set_defaults(run=annotate)

    command = commands.add_parser("build-dataset", help="build a RealPref-style dataset; goes on where it was")
    command.add_argument("--config", required=True, help="YAML file with the options of BuildConfig")
    command.add_argument("--stages", help="run these only, e.g. edits,scores; all before them must be finished")
    command.add_argument("--engine", choices=("local", "ray"), default="local")
    command.add_argument("--num-workers", type=int, default=1, help="of each stage, with Ray")
    command.add_argument("--gpus-per-worker", type=float, default=0, help="with Ray")
    command.set_defaults(run=build)

    command = commands.add_parser("check-dataset", help="check a dataset against the schema, row by row")
    command.add_argument("dataset", help="folder or Hub repository")
    command.add_argument("--split", default="train")
    command.add_argument("--revision", help="branch, tag or commit of the dataset's repository")
    command.set_defaults(run=check_dataset)

    command = commands.add_parser("export-ratings", help="ratings as a dataset, or as tasks for Label Studio")
    command.add_argument("ratings", help="file, or folder with ratings-*.jsonl")
    add_dataset(command)
    command.add_argument("out", help="folder to write")
    command.add_argument("--format", choices=("dataset", "label-studio"), default="dataset")
    command.add_argument("--rubric", help="take only ratings made with this revision of the rubric")
    command.add_argument("--rubric-file", help="rubric that Label Studio shows: a Markdown file; by default ours")
    command.add_argument("--image-url", help="where Label Studio finds OUT/images; by default images are in the tasks")
    command.add_argument("--push-to-hub", metavar="REPO", help="also push the dataset")
    command.add_argument("--private", action="store_true", help="to a private repository")
    command.set_defaults(run=export_ratings)

    command = commands.add_parser("import-ratings", help="take over ratings from Label Studio's export in JSON")
    command.add_argument("file")
    add_dataset(command)
    command.add_argument("out", help="folder for the ratings; what is there already is not doubled")
    command.add_argument("--rubric", help="revision of the rubric, where the tasks do not tell it")
    command.set_defaults(run=import_ratings)

    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError) as error:  # what users can mend is said in a line, without a stack trace
        sys.exit(f"hp-edit: {error}")
    except KeyboardInterrupt:
        sys.exit("hp-edit: stopped; what is long goes on from here when it is run again.")


if __name__ == "__main__":
    main()
