"""Commands for benchmarks."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.secrets import redacted, remember_secrets
from .options import add_scorer_options, judge_of


if TYPE_CHECKING:
    from ..bench import Benchmark, Run


def _find_benchmark(name: str) -> "type[Benchmark]":
    """The class of a benchmark: in a module of `hp_edit_trl.bench`, or `file.py:Class` or `package.module:Class`."""
    import pkgutil
    from importlib import import_module

    from .. import bench
    from ..utils.imports import import_object

    if ":" in name:
        found = import_object(name, "benchmark")
        if not (isinstance(found, type) and issubclass(found, bench.Benchmark)):
            raise ValueError(f"benchmark={name!r} is not a subclass of hp_edit_trl.bench.Benchmark.")
        return found
    for module in pkgutil.iter_modules(bench.__path__, f"{bench.__name__}."):
        import_module(module.name)
    homes = {found.__module__: found for found in bench.Benchmark.__subclasses__()}
    known = {home.rpartition(".")[2]: found for home, found in homes.items() if home.startswith(f"{bench.__name__}.")}
    if name not in known:
        raise ValueError(
            f"There is no benchmark {name!r}: use {', '.join(sorted(known))}, file.py:Class or package.module:Class."
        )
    return known[name]


def _make_benchmark(args: argparse.Namespace) -> "Benchmark":
    """The benchmark that the options name."""
    import inspect

    found: Any = _find_benchmark(args.benchmark)
    names = ("dataset", "split", "revision", "scorer_prompts", "scorer_prompts_revision")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given |= dict(args.benchmark_options)
    _, *parameters = inspect.signature(found).parameters.values()  # the first is the judge
    known = [parameter.name for parameter in parameters]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(
            f"{', '.join(unknown)}: {found.title} has no such option; its options are {', '.join(known)}."
        )
    missing = [one.name for one in parameters if one.default is one.empty and one.name not in given]
    if missing:
        raise ValueError(f"{found.title} needs {' and '.join(f'--{name}' for name in missing)}.")
    return found(judge_of(args, **found.judge_options), **given)


def _bench(args: argparse.Namespace) -> None:
    from accelerate import PartialState

    from ..bench import describe_run, write_bench_report

    runs = [args] if args.config is None else _configured_runs(args)
    finished, failed = [], []
    for run in runs:
        try:
            finished.append(_run(run))
        except (ValueError, OSError, ImportError) as error:
            if len(runs) == 1:
                raise
            print(f"hp-edit: {run.name}: {redacted(str(error))}", file=sys.stderr)
            failed.append(run.name)
            continue
        if PartialState().is_main_process:
            print(f"{describe_run(finished[-1])}\n{finished[-1].folder}\n")
            if run.ratings is not None:
                _write_agreement(finished[-1], run.ratings)
    if args.config is not None and finished and PartialState().is_main_process:
        output_dir = finished[0].folder.parent / "report"
        print(f"{write_bench_report(finished, output_dir)}\n{output_dir}")
    PartialState().destroy_process_group()  # otherwise NCCL warns at exit
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(runs)} runs did not finish: {', '.join(failed)}. Run the same command again to "
            "resume."
        )


def _write_agreement(run: "Run", path: str) -> None:
    """Compares the HP-scores of a run with people's ratings of its edits, if it has any, and writes `agreement/`."""
    from dataclasses import replace

    from ..calibration import agreement_tables, compare_with_people, write_agreement
    from ..ratings import read_ratings

    if not run.hp_scores:
        return
    known = {line["id"] for line in run.hp_scores}
    ratings = [
        replace(rating, editor=run.name)
        for rating in read_ratings(path)[0]
        if rating.editor in (run.name, None) and rating.id in known
    ]
    try:
        result = compare_with_people(ratings, run.hp_scores)
    except ValueError as error:  # the run is finished nevertheless
        print(f"hp-edit: {run.name}: no agreement with people: {error}", file=sys.stderr)
        return
    write_agreement(result, run.folder / "agreement")
    print(f"{agreement_tables(result)}\n{run.folder / 'agreement'}\n")


def _configured_runs(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The runs of a YAML file, which holds options that all runs share, and a list `runs` with those of each."""
    import yaml

    defaults = {action.dest: action.default for action in args.options.values()}
    given = [name for name, value in defaults.items() if name != "config" and getattr(args, name) != value]
    if given:
        named = ", ".join(name if name == "benchmark" else f"--{name}" for name in given)
        raise ValueError(f"{named}: with --config, all options belong in the file.")
    try:
        shared = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{args.config} is not valid YAML: {error}") from error
    if not isinstance(shared, dict) or not isinstance(shared.get("runs"), list) or "output_dir" not in shared:
        raise ValueError(
            f"{args.config} must hold options of `hp-edit bench`, `output_dir` among them, and a list `runs`."
        )
    runs = shared.pop("runs")
    configured = []
    for run in runs:
        if not isinstance(run, dict) or not isinstance(run.get("name"), str) or not run["name"]:
            raise ValueError(f"{args.config}: each of the runs needs a name, but one is {redacted(run)!r}.")
        values = {name: value for name, value in (shared | run).items() if value is not None}
        remember_secrets(values)
        for name, value in values.items():
            _check_option(args.config, name, value, args.options)
        folder = run["name"].replace("/", "-")
        if folder.startswith("."):
            raise ValueError(f"{args.config}: the run {run['name']!r} must not begin with a dot: it names a folder.")
        values["output_dir"] = str(Path(shared["output_dir"]) / folder)
        if "ratings" in values and not _are_rated(values["ratings"], run["name"]):
            print(
                f"hp-edit: {run['name']}: no ratings in {values['ratings']} yet. Rate the edits of all runs with "
                f"`hp-edit annotate {shared['output_dir']}/* --output_dir {values['ratings']}`, then run this again.",
                file=sys.stderr,
            )
            del values["ratings"]
        configured.append(argparse.Namespace(**defaults | values))
    folders = [run.output_dir for run in configured]
    if len(set(folders)) < len(folders) or str(Path(shared["output_dir"]) / "report") in folders:
        raise ValueError(f"{args.config}: two of the runs have one name, or one is called report.")
    return configured


def _are_rated(path: str, name: str) -> bool:
    """Whether people have rated edits of a run. A configuration names the ratings before there are any."""
    from ..ratings import read_ratings

    if not Path(path).is_file() and not any(Path(path).glob("ratings-*.jsonl")):
        return False
    return any(rating.editor in (name, None) and rating.score is not None for rating in read_ratings(path)[0])


def _check_option(file: str, name: str, value: Any, options: dict[str, argparse.Action]) -> None:
    """Raises a `ValueError` if a YAML file holds an unknown option, or one with a value of the wrong type."""
    if name not in options or name == "config":
        raise ValueError(f"{file} has the unknown option {name!r}; known are {', '.join(sorted(options))}.")
    option = options[name]
    kinds: dict[Any, tuple[Any, str]] = {
        None: (str, "a text (in quotes if it looks like a number or a date)"),
        int: (int, "a whole number"),
        float: (int | float, "a number"),
        _pair: (dict, "a mapping of names to values"),
    }
    if name == "judge_base_url" and isinstance(value, list):  # servers: the judge checks them
        return
    kind, wanted = (bool, "true or false") if option.nargs == 0 else kinds[option.type]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{file}: {name} must be {wanted}, but is {redacted({name: value})[name]!r}.")
    if option.choices is not None and value not in option.choices:
        raise ValueError(f"{file}: {name} must be one of {', '.join(option.choices)}, but is {value!r}.")


def _run(args: argparse.Namespace) -> "Run":
    from ..bench import run_benchmark
    from ..editors import load_editor
    from ..ratings import read_ratings
    from ..utils.distributed import in_step, patient_accelerator

    missing = [name for name in ("benchmark", "editor", "output_dir") if getattr(args, name) is None]
    if missing:
        named = " and ".join(name if name == "benchmark" else f"--{name}" for name in missing)
        raise ValueError(f"A run needs {named}, e.g. hp-edit bench gedit --editor ... --output_dir DIR.")
    with in_step(patient_accelerator()):
        benchmark = _make_benchmark(args)
        editor = load_editor(
            args.editor,
            args.editor_revision,
            args.lora,
            args.resolution or None,
            args.dtype,
            args.policy,
            args.editor_batch_size,
            **dict(args.editor_options),
        )
    return run_benchmark(
        benchmark,
        editor,
        args.output_dir,
        name=args.name,
        batch_size=args.editor_batch_size,
        chunk_size=args.chunk_size,
        seed=args.seed,
        ratings=None if args.ratings is None else read_ratings(args.ratings)[0],
    )


def _report(args: argparse.Namespace) -> None:
    from ..bench import push_results, read_run, write_bench_report

    runs = [read_run(folder) for folder in args.runs]
    if args.push_to_hub is not None and len(runs) > 1:
        raise ValueError("--push_to_hub writes the results of one run into the card of its model: name one run.")
    print(write_bench_report(runs, args.output_dir, args.log, args.baseline))
    print(args.output_dir)
    if args.push_to_hub is not None:
        print(push_results(runs[0], args.push_to_hub))


def _pair(text: str) -> tuple[str, Any]:
    """A name and its value, which is JSON or else a text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE, e.g. num_inference_steps=40")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def register(commands: Any) -> None:
    """Adds the commands of this family to a parser's subcommands."""
    command = commands.add_parser(
        "bench", help="edit the cases of a benchmark and score them; resumes where it stopped"
    )
    pairs: dict[str, Any] = dict(type=_pair, nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    command.add_argument(
        "benchmark", nargs="?", help="a module of hp_edit_trl.bench, e.g. gedit, or file.py:Class of a benchmark"
    )
    command.add_argument("--config", help="YAML file with options that several runs share, and a list of runs")
    command.add_argument(
        "--editor", help="pipeline (Hub id or folder), folder of edits named by id, or file.py:function"
    )
    command.add_argument("--output_dir", help="folder for the results")
    command.add_argument("--name", help="name of the editor in tables")
    command.add_argument("--lora", help="LoRA on top of the pipeline: Hub id or folder")
    command.add_argument("--editor_revision", help="branch, tag or commit of the pipeline's repository")
    command.add_argument(
        "--resolution",
        type=int,
        default=1024,
        help="side of the square of an edit's area; 0: the pipeline's own choice",
    )
    command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    command.add_argument(
        "--editor_options", **pairs, help="arguments of the pipeline's call, e.g. num_inference_steps=40"
    )
    command.add_argument("--policy", action="store_true", help="denoise in batches, as the trainers do")
    command.add_argument("--editor_batch_size", type=int, default=4, help="number of cases edited together")
    command.add_argument("--chunk_size", type=int, default=32, help="number of edits scored and written together")
    command.add_argument("--seed", type=int, default=0, help="seed of the edits' noise")
    command.add_argument("--dataset", help="the cases: folder or Hub repository")
    command.add_argument("--split", help="split of the cases")
    command.add_argument("--revision", help="branch, tag or commit of the cases' repository")
    command.add_argument("--benchmark_options", **pairs, help="options of the benchmark itself, e.g. clip=null")
    command.add_argument("--ratings", help="people's ratings of the edits: file, or folder with ratings-*.jsonl")
    add_scorer_options(command)
    options = {action.dest: action for action in command._actions if action.dest != "help"}
    command.set_defaults(run=_bench, options=options)

    command = commands.add_parser("report", help="compare runs of `hp-edit bench`: tables, figures and a gallery")
    command.add_argument("runs", nargs="+", help="results folders")
    command.add_argument("--output_dir", required=True, help="folder for tables, figures and the gallery")
    command.add_argument("--log", action="append", default=[], help="output folder of a training run, for its rewards")
    command.add_argument("--baseline", help="name of the run that the others are compared with; by default the first")
    command.add_argument("--push_to_hub", metavar="REPO", help="write a run's results into the card of its model")
    command.set_defaults(run=_report)
