"""Commands for benchmarks."""

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from .options import add_scorer_options, judge_of, scorer_of


def make_benchmark(args: argparse.Namespace):
    """The benchmark that the options name."""
    from ..bench import DreamBenchPlus, GEditBench, RealPrefBench, parse_grade, parse_pair

    if args.benchmark == "realpref":
        return RealPrefBench(scorer_of(args), args.dataset, args.split or "test", args.revision)
    options: dict[str, Any] = {
        "scorer_prompts": args.scorer_prompts,
        "scorer_prompts_revision": args.scorer_prompts_revision,
    }
    options["revision"] = args.revision
    args.max_new_tokens = args.max_new_tokens or 512  # reasons come with the scores
    options |= {name: getattr(args, name) for name in ("dataset", "split") if getattr(args, name) is not None}
    if args.benchmark == "gedit":
        return GEditBench(judge_of(args, parse=parse_pair), **options)
    if args.split is not None:
        raise ValueError("--split: DreamBench++ has none.")
    named: dict[str, Any] = {
        name: None if value == "none" else value for name, value in (("clip", args.clip), ("dino", args.dino))
    }
    return DreamBenchPlus(judge_of(args, parse=parse_grade), **(options | named))


def make_editor(args: argparse.Namespace):
    """The editor that the options name."""
    from ..editors import FolderEditor, PipelineEditor, PolicyEditor, as_editor
    from ..policies import policy_class

    where, _, attribute = args.editor.rpartition(":")
    is_folder = Path(args.editor).is_dir() and not (Path(args.editor) / "model_index.json").exists()
    if is_folder or where:
        unused = [name for name in ("lora", "editor_revision", "policy", "option") if getattr(args, name)]
        if unused:
            named = ", ".join(f"--{name}" for name in unused)
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

    from ..bench import write_bench_report

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
    defaults = vars(args.parser.parse_args([]))
    beside = [name for name, value in vars(args).items() if name != "config" and value != defaults[name]]
    if beside:
        given = ", ".join(name if name == "benchmark" else f"--{name}" for name in beside)
        raise ValueError(f"{given}: with --config, options stand in the file.")
    try:
        shared = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{args.config} is no YAML: {error}") from error
    if not isinstance(shared, dict) or not isinstance(shared.get("runs"), list) or "output_dir" not in shared:
        raise ValueError(
            f"{args.config} must hold options of `hp-edit bench`, `output_dir` among them, and a list `runs`."
        )
    runs, out = shared.pop("runs"), Path(shared.pop("output_dir"))
    parsed = []
    for run in runs:
        if not isinstance(run, dict) or not isinstance(run.get("name"), str) or not run["name"]:
            raise ValueError(f"{args.config}: each of the runs needs a name, but one is {run!r}.")
        words: list[str] = []
        for name, value in {**shared, **run, "output_dir": out / run["name"].replace("/", "-")}.items():
            flag = "--" + name
            if name == "benchmark":
                words.insert(0, value)
            elif isinstance(value, dict):
                words += [f"{flag}={key}={json.dumps(one, ensure_ascii=False)}" for key, one in value.items()]
            elif value is True:
                words.append(flag)
            elif value is not None and value is not False:
                words.append(f"{flag}={value}")
        parsed.append(args.parser.parse_args(words))
    folders = [run.out for run in parsed]
    if len(set(folders)) < len(folders) or str(out / "report") in folders:
        raise ValueError(f"{args.config}: two of the runs have one name, or one is called report.")
    return parsed


def _bench(args: argparse.Namespace):
    from ..bench import run_benchmark
    from ..ratings import read_ratings
    from ..utils.distributed import in_step, patient_accelerator

    needed = ["benchmark", "editor", "output_dir", *(["dataset"] if args.benchmark == "realpref" else [])]
    lacking = [name if name == "benchmark" else f"--{name}" for name in needed if getattr(args, name) is None]
    if lacking:
        raise ValueError(
            f"A run needs {' and '.join(lacking)}, e.g. hp-edit bench gedit --editor ... --output_dir DIR."
        )
    with in_step(patient_accelerator()):
        benchmark, editor = make_benchmark(args), make_editor(args)
    run = run_benchmark(
        benchmark,
        editor,
        args.output_dir,
        name=args.name,
        batch_size=args.editor_batch_size,
        chunk_size=args.chunk_size,
        seed=args.seed,
        ratings=None if args.ratings is None else read_ratings(args.ratings)[0],
    )
    print(run.folder)
    return run


def report(args: argparse.Namespace) -> None:
    from ..bench import push_results, read_run, write_bench_report

    runs = [read_run(folder) for folder in args.runs]
    if args.push_to_hub is not None and len(runs) > 1:
        raise ValueError("--push_to_hub writes the results of one run into its model's card: name one run.")
    print(write_bench_report(runs, args.output_dir, args.log, args.baseline))
    print(args.output_dir)
    if args.push_to_hub is not None:
        print(push_results(runs[0], args.push_to_hub))


def register(commands: Any) -> None:
    """Adds the commands of this family to a parser's subcommands."""
    command = commands.add_parser(
        "bench", help="let an editor edit a benchmark's cases and score them; goes on where it was"
    )
    command.add_argument("benchmark", nargs="?", choices=("realpref", "gedit", "dreambench"))
    command.add_argument("--config", help="YAML file with options that several runs share, and a list of runs")
    command.add_argument(
        "--editor", help="pipeline (Hub id or folder), folder of edits named by id, or file.py:function"
    )
    command.add_argument("--output_dir", help="folder for the results")
    command.add_argument("--name", help="what tables call the editor")
    command.add_argument("--lora", help="on top of the pipeline: Hub id or folder")
    command.add_argument("--editor_revision", help="branch, tag or commit of the pipeline's repository")
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
    command.add_argument("--editor_batch_size", type=int, default=4, help="cases that are edited together")
    command.add_argument("--chunk_size", type=int, default=32, help="edits that are judged and written together")
    command.add_argument("--seed", type=int, default=0, help="of the edits' noise")
    command.add_argument("--dataset", help="the cases: folder or Hub repository")
    command.add_argument("--split", help="of the cases")
    command.add_argument("--revision", help="branch, tag or commit of the cases' repository")
    command.add_argument(
        "--clip", default="openai/clip-vit-base-patch32", help="of dreambench; 'none' leaves its metrics out"
    )
    command.add_argument("--dino", default="facebook/dino-vits8", help="of dreambench; 'none' leaves its metric out")
    command.add_argument("--ratings", help="people's ratings of the edits: file, or folder with ratings-*.jsonl")
    add_scorer_options(command)
    command.set_defaults(run=bench, parser=command)

    command = commands.add_parser(
        "report", help="compare runs of `hp-edit bench`: tables, figures and a page of all edits"
    )
    command.add_argument("runs", nargs="+", help="results folders")
    command.add_argument("--output_dir", required=True, help="folder for tables, figures and the page")
    command.add_argument("--log", action="append", default=[], help="output folder of a training, for its rewards")
    command.add_argument("--baseline", help="name of the run that the others are compared with; by default the first")
    command.add_argument("--push_to_hub", metavar="REPO", help="write a run's results into the card of its model")
    command.set_defaults(run=report)
