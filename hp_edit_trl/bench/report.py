"""The report on several runs of a benchmark: tables, bars, reward curves, a gallery, and results in a model card."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import RemoteEntryNotFoundError

from ..utils.files import write_text
from ..utils.fonts import readable_text
from ..utils.tables import format_estimate, markdown_table
from .gallery import write_gallery
from .results import Run, compare


SIGNS = {
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "·": r"$\cdot$", "–": "--",
}  # fmt: skip


def write_bench_report(
    runs: Sequence[Run],
    output_dir: str | Path,
    logs: Sequence[str | Path] = (),
    baseline: str | None = None,
    gallery: bool = True,
) -> str:
    """
    Writes the report on runs of one benchmark: `table.md`, `table.csv`, `table.tex`, `bars.png`, with training logs
    `curves.png` and `curves.csv`, and `gallery.html` with `images/`. It replaces the files of an earlier report.

    Args:
        runs (`Sequence[Run]`):
            Runs of one benchmark on the same cases with the same judge.
        output_dir (`str` or `Path`):
            Folder to write to. It is created if necessary.
        logs (`Sequence[str or Path]`, *optional*):
            Output folders of [`FlowGRPOEditTrainer`], or their `trainer_state.json`, whose rewards are drawn as in the
            paper's figure 5.
        baseline (`str`, *optional*):
            Name of the run that the others are compared with. By default the first.
        gallery (`bool`, *optional*, defaults to `True`):
            Whether to write the page with all edits.

    Returns:
        `str`: the tables in Markdown.

    Raises:
        `ValueError`: If runs cannot be compared, two have one name, there is no run `baseline`, or a log holds no
            rewards.
    """
    output_dir = Path(output_dir)
    if not runs:
        raise ValueError("There are no runs to report on.")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        folders = ", ".join(str(run.folder) for run in runs if run.name == twice)
        raise ValueError(f"Several runs have the name {twice!r} ({folders}): give them different ones with --name.")
    if baseline not in (None, *names):
        raise ValueError(f"No run has the name {baseline!r}; the names are {', '.join(names)}.")
    first = runs[0] if baseline is None else runs[names.index(baseline)]
    # Before anything is written: this refuses runs that cannot be compared
    differences = {run.name: compare(first, run) for run in runs if run is not first}
    curves = dict(map(read_rewards, logs))
    if len(curves) < len(logs):
        raise ValueError(f"Two of the logs are in folders of one name: {', '.join(str(log) for log in logs)}.")
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in ("curves.png", "curves.csv", "gallery.html"):  # these are not always written
        (output_dir / name).unlink(missing_ok=True)
    tables = _tables(runs)
    parts = [_markdown(*table) for table in tables]
    if differences:
        parts.append(_difference_table(first, differences))
        parts += [note + "\n" for name, rows in differences.items() for note in _no_interval(first, name, rows)]
    parts.append("\n".join(f"- {note}" for note in _notes(runs)) + "\n")
    text = "\n".join(parts)
    figures = "![Scores with intervals](bars.png)\n" + ("\n![Rewards in training](curves.png)\n" if curves else "")
    write_text(output_dir / "table.md", f"# {runs[0].benchmark['title']}\n\n{text}\n{figures}")
    write_text(output_dir / "table.tex", "\n".join(_latex(*table) for table in tables))
    _write_csv(runs, differences, output_dir / "table.csv")
    groups = {str(row[runs[0].benchmark["group"]]) for row in runs[0].cases}
    with readable_text(*groups, *(run.name for run in runs)):
        draw_bars(runs, output_dir / "bars.png")
    if curves:
        with readable_text(*curves):
            draw_curves(curves, output_dir / "curves.png")
        with (output_dir / "curves.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["log", "step", "reward"])
            writer.writerows((name, step, reward) for name, points in curves.items() for step, reward in points)
    if gallery:
        write_gallery(runs, output_dir)
    return text


def describe_run(run: Run) -> str:
    """The scores of one run and what is missing, in Markdown."""
    tables = [_markdown(*table) for table in _tables([run])]
    counts = run.results["counts"]
    complete = f"{run.name}: all of the {counts['cases']} cases have an edit and a score."
    no_interval = _no_interval(run, run.name, run.results["summary"])
    return "\n".join([*tables, *(_missing(run) or [complete]), *no_interval, ""])


def read_rewards(path: str | Path) -> tuple[str, list[tuple[int, float]]]:
    """
    Reads the rewards of a training run from its log.

    Args:
        path (`str` or `Path`):
            The trainer's output folder, one of its checkpoints, or a `trainer_state.json`.

    Returns:
        `tuple[str, list[tuple[int, float]]]`: the folder's name, and steps with their rewards.

    Raises:
        `ValueError`: If there is no log, or it holds no rewards.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    files = (
        [path]
        if path.is_file()
        else [path / "trainer_state.json", *sorted(path.glob("checkpoint-*/trainer_state.json"))]
    )
    best: list[tuple[int, float]] = []
    for file in files:
        try:
            history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
            points = [(int(log["step"]), float(log["reward"])) for log in history if log.get("reward") is not None]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a log of a trainer: {type(error).__name__}: {error}") from error
        best = max(best, points, key=len)  # the last checkpoint holds all steps before it
    if not best:
        raise ValueError(
            f"{path} has no trainer_state.json with rewards: name the output folder of FlowGRPOEditTrainer, which "
            "writes one with every checkpoint."
        )
    folder = folder.resolve()
    return (folder.parent if folder.name.startswith("checkpoint-") else folder).name, best


def push_results(run: Run, repo_id: str, token: str | None = None) -> str:
    """
    Writes a run's main results into the metadata of a model card on the Hub, where the model's page shows them.

    Args:
        run ([`Run`]):
            The run.
        repo_id (`str`):
            The model's repository, e.g. of the LoRA. Its card is kept, except for results of the same benchmark and
            judge.
        token (`str`, *optional*):
            Token with write access. By default that of `hf auth login`.

    Returns:
        `str`: URL of the commit.

    Raises:
        `ValueError`: If the cases are not from the Hub, so that the card could not say what was measured.
    """
    benchmark, labels = run.benchmark, run.labels
    dataset = benchmark["dataset"]
    if dataset is None or Path(dataset).exists() or dataset.count("/") != 1:
        raise ValueError(
            f"The cases of {run.folder} are from {dataset!r}, which is not a dataset on the Hub: a model card can "
            "name only such a dataset."
        )
    results = [
        EvalResult(
            task_type="image-to-image",
            dataset_type=dataset,
            dataset_name=", ".join(filter(None, (benchmark["title"], row["section"]))),
            dataset_config=row["section"] or None,
            dataset_split=benchmark["split"],
            dataset_revision=benchmark["revision"],
            metric_type=row["metric"],
            metric_name=f"{labels[row['metric']]} ({benchmark['judge']})",
            metric_value=round(row["value"], 4),
        )
        for row in run.results["summary"]
        if row["kind"] == benchmark["average"] and row["value"] is not None
    ]
    try:
        card = ModelCard.load(repo_id, token=token)
    except RemoteEntryNotFoundError:  # a repository without a card; a card that cannot be read is not overwritten
        card = ModelCard("---\n---\n")
    data = card.data.to_dict()
    name = data.get("model_name") or repo_id.partition("/")[2]
    mine = {(one.dataset_type, one.dataset_config, one.metric_name) for one in results}
    kept = [
        one
        for one in card.data.eval_results or []
        if (one.dataset_type, one.dataset_config, one.metric_name) not in mine
    ]
    data = {key: value for key, value in data.items() if key not in ("model-index", "model_name")}
    card.data = ModelCardData(**data, model_name=name, eval_results=[*kept, *results])
    return str(card.push_to_hub(repo_id, token=token, commit_message=f"Results on {benchmark['title']}"))


def _summary_by_key(run: Run, section: str) -> dict[tuple[str, str, str | None], dict[str, Any]]:
    rows = [row for row in run.results["summary"] if row["section"] == section]
    return {(row["metric"], row["kind"], row["group"]): row for row in rows}


Table = tuple[str, list[str], list[list[tuple[str, bool]]]]
Column = tuple[str, str, str, str | None]  # section, metric, kind and group of a row of the summary


def _tables(runs: Sequence[Run]) -> list[Table]:
    """The tables of a report: the benchmark's own one, or one for each section."""
    benchmark, labels = runs[0].benchmark, runs[0].labels
    if not benchmark["table_columns"]:
        return [_table(runs, section, _section_columns(runs, section)) for section in benchmark["sections"]]
    columns: dict[str, Column] = {label: tuple(key) for label, key in benchmark["table_columns"].items()}
    section, people = next(iter(benchmark["sections"])), ("human", benchmark["average"], None)
    if any(people in _summary_by_key(run, section) for run in runs):
        columns[labels["human"]] = section, *people
    return [_table(runs, section, columns)]


def _section_columns(runs: Sequence[Run], section: str) -> dict[str, Column]:
    """The columns of a section's table, by label: the main metric of each group, and the means of all metrics."""
    benchmark, labels, main = runs[0].benchmark, runs[0].labels, runs[0].main_metric
    summaries = [_summary_by_key(run, section) for run in runs]
    groups = dict.fromkeys(name for rows in summaries for metric, kind, name in rows if kind == "group")
    columns: dict[str, Column] = {str(name): (section, main, "group", name) for name in groups}
    columns[f"{labels[main]}, overall"] = section, main, "overall", None
    columns[f"{labels[main]}, all cases"] = section, main, "cases", None
    return columns | {
        label: (section, name, benchmark["average"], None)
        for name, label in labels.items()
        if name != main and any((name, benchmark["average"], None) in rows for rows in summaries)
    }


def _table(runs: Sequence[Run], title: str, columns: dict[str, Column]) -> Table:
    """Title, head and cells of a table; a cell is its text and whether it is the best of its column."""
    benchmark = runs[0].benchmark
    summaries = {section: [_summary_by_key(run, section) for run in runs] for section in benchmark["sections"]}
    cells: list[list[tuple[str, bool]]] = [[(run.name, False)] for run in runs]
    for section, metric, kind, group in columns.values():
        estimates = [rows.get((metric, kind, group)) or {"value": None} for rows in summaries[section]]
        known = [round(one["value"], 3) for one in estimates if one["value"] is not None]
        may_be_best = len(runs) > 1 and metric not in benchmark["ratios"]
        for row, one in zip(cells, estimates, strict=True):
            if one["value"] is None:
                row.append(("–", False))
                continue
            with_interval = (section, kind) == (title, benchmark["average"])
            text = format_estimate(one, digits=_digits(benchmark, metric)) if with_interval else f"{one['value']:.3f}"
            row.append((text, may_be_best and round(one["value"], 3) == max(known)))
    return title, ["editor", *columns], cells


def _digits(benchmark: dict[str, Any], metric: str) -> int:
    """Decimal places of a value with its interval."""
    return 3 if metric in benchmark["metrics"] and benchmark["metrics"][metric]["maximum"] <= 1 else 2


def _markdown(title: str, head: list[str], rows: list[list[tuple[str, bool]]]) -> str:
    body = [[f"**{text}**" if best else text for text, best in row] for row in rows]
    return (f"## {title}\n\n" if title else "") + markdown_table(head, body)


def _latex(title: str, head: list[str], rows: list[list[tuple[str, bool]]]) -> str:
    def escaped(text: str) -> str:
        return "".join(SIGNS.get(sign, sign) for sign in text)

    lines = [
        " & ".join(rf"\textbf{{{escaped(text)}}}" if best else escaped(text) for text, best in row) + r" \\"
        for row in [[(name, False) for name in head], *rows]
    ]
    begin = [rf"% {title}"] if title else []
    begin += [rf"\begin{{tabular}}{{l{'c' * (len(head) - 1)}}}", r"\toprule"]
    return "\n".join([*begin, lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", ""])


def _difference_table(first: Run, differences: dict[str, list[dict[str, Any]]]) -> str:
    benchmark, main = first.benchmark, first.main_metric
    several = len(benchmark["sections"]) > 1
    rows = [
        [
            name,
            *([row["section"]] if several else []),
            format_estimate(row, signed=True, digits=_digits(benchmark, main)),
            row["n"],
        ]
        for name, compared in differences.items()
        for row in compared
        if (row["metric"], row["kind"]) == (main, benchmark["average"])
    ]
    head = ["editor", *(["section"] if several else []), first.labels[main], "cases of both"]
    return f"Difference from {first.name}, on the cases that both have a score for:\n\n" + markdown_table(head, rows)


def _notes(runs: Sequence[Run]) -> list[str]:
    benchmark, results = runs[0].benchmark, runs[0].results
    where = " ".join(str(benchmark[name]) for name in ("dataset", "split") if benchmark[name] is not None)
    prompts = ", ".join(sorted({revision for revision, _ in benchmark["scorer_prompts"].values()}))
    notes = [
        f"{benchmark['cases']} cases of {where or 'a dataset in memory'}, revision "
        f"{benchmark['revision'] or 'unknown'}, content {benchmark['cases_sha']}.",
        f"Judge: {benchmark['judge']}; prompts {prompts}.",
        f"In brackets: {results['confidence']:.0%} bootstrap intervals from {results['num_resamples']} resamples of "
        f"cases within their groups, seed {results['bootstrap_seed']}. Bold: the best of a column.",
    ]
    for run in runs:
        editor = [
            f"{name} {value}" for name, value in run.settings["editor"].items() if name != "name" and value is not None
        ]
        notes += [f"{run.name}: {', '.join(editor)}; seed {run.settings['seed']}.", *_missing(run)]
        notes += _no_interval(run, run.name, run.results["summary"])
    return notes


def _no_interval(run: Run, name: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence about the main results of a run that have no interval, with reasons; none if all have one."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["kind"] == run.benchmark["average"] and row["value"] is not None and row["low"] is None:
            place = ", ".join(filter(None, (run.labels[row["metric"]], row["section"])))
            reasons.setdefault(row["reason"], []).append(place)
    return [f"{name}: {'; '.join(where)}: {reason}." for reason, where in reasons.items()]


def _missing(run: Run) -> list[str]:
    """A sentence about what a run lacks, with reasons; none if nothing is missing."""
    counts = run.results["counts"]
    missing = [
        f"{counts[name]} {what}"
        for name, what in (
            ("no_edit", "cases without an edit"),
            ("no_score", "edits without a score"),
            ("unanswered", "questions that the judge did not answer"),
            ("reshaped", "edits whose aspect ratio differs from the reference's"),
        )
        if counts[name]
    ]
    if counts["judgements"] and counts["parse_failures"]:
        share = counts["parse_failures"] / counts["judgements"]
        missing.append(f"{counts['parse_failures']} of {counts['judgements']} answers without a score ({share:.1%})")
    if counts["unparsed_samples"]:
        missing.append(f"{counts['unparsed_samples']} answers without a score among those that were averaged")
    if not missing:
        return []
    reasons = ", ".join(f"{reason} {count}" for reason, count in run.results["reasons"].items())
    return [f"{run.name} lacks: {'; '.join(missing)}" + (f" (reasons: {reasons})." if reasons else ".")]


def _write_csv(runs: Sequence[Run], differences: dict[str, list[dict[str, Any]]], path: Path) -> None:
    columns = ["editor", "of", "section", "kind", "group", "metric", "value", "low", "high", "n", "missing", "reason"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for run in runs:
            writer.writerows({"editor": run.name, "of": "score", **row} for row in run.results["summary"])
        for name, rows in differences.items():
            writer.writerows({"editor": name, "of": "difference", **row} for row in rows)


def _plain_text(text: str) -> str:
    """The text with dollar signs escaped, which would enclose a formula for Matplotlib."""
    return text.replace("$", r"\$")


def draw_bars(runs: Sequence[Run], path: str | Path) -> None:
    """
    Draws the main metric of each run, for each group and overall, with intervals; one plot per section.

    Args:
        runs (`Sequence[Run]`):
            The runs.
        path (`str` or `Path`):
            PNG file to write.
    """
    from matplotlib.figure import Figure

    benchmark, main = runs[0].benchmark, runs[0].main_metric
    sections = list(benchmark["sections"])
    summaries = {section: [_summary_by_key(run, section) for run in runs] for section in sections}
    places = {
        section: [
            *dict.fromkeys(
                (kind, name) for rows in summaries[section] for metric, kind, name in rows if kind == "group"
            ),
            (benchmark["average"], None),
        ]
        for section in sections
    }
    widest = max(len(names) for names in places.values())
    size = (max(6.0, 1.2 + widest * (0.35 + 0.13 * len(runs))), 3.2 * len(sections) + 0.4 + 0.22 * -(-len(runs) // 4))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    for axes, section in zip(figure.subplots(len(sections), squeeze=False)[:, 0], sections, strict=True):
        for number, (run, rows) in enumerate(zip(runs, summaries[section], strict=True)):
            offset = (number - (len(runs) - 1) / 2) * 0.8 / len(runs)
            for place, (kind, name) in enumerate(places[section]):
                one = rows.get((main, kind, name))
                if one is None or one["value"] is None:
                    continue
                axes.bar(
                    place + offset,
                    one["value"],
                    0.76 / len(runs),
                    color=f"C{number % 10}",
                    label=_plain_text(run.name),
                )
                if one["low"] is not None:
                    sides = [[max(0.0, one["value"] - one["low"])], [max(0.0, one["high"] - one["value"])]]
                    axes.errorbar(place + offset, one["value"], sides, color="black", capsize=2, linewidth=0.8)
        labels = [
            _plain_text(str(name)) if kind == "group" else {"overall": "overall", "cases": "all cases"}[kind]
            for kind, name in places[section]
        ]
        axes.set_xticks(range(len(labels)), labels, rotation=0 if max(map(len, labels)) < 11 else 20, fontsize=8)
        axes.axvline(len(labels) - 1.5, color="grey", linewidth=0.6)
        limits = (0, benchmark["metrics"][main]["maximum"] * 1.02)
        axes.set(ylabel=runs[0].labels[main], ylim=limits, title=_plain_text(section) or None)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    shown: dict[str, Any] = {}
    for axes in figure.axes:
        shown |= {
            label: handle
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
            if label not in shown
        }
    if len(runs) > 1 and shown:
        named = [name for name in (_plain_text(run.name) for run in runs) if name in shown]
        figure.legend(
            [shown[name] for name in named],
            named,
            loc="outside upper center",
            ncols=min(4, len(named)),
            fontsize="small",
        )
    figure.savefig(path)


def draw_curves(curves: dict[str, list[tuple[int, float]]], path: str | Path) -> None:
    """
    Draws the rewards of training runs over their updates, as in the paper's figure 5: as they were logged, faintly,
    and smoothed by an exponential mean over a twentieth of the run.

    Args:
        curves (`dict[str, list[tuple[int, float]]]`):
            Steps and rewards by name, see [`read_rewards`].
        path (`str` or `Path`):
            PNG file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="update", ylabel="mean reward")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for number, (name, points) in enumerate(curves.items()):
        steps, rewards = (np.array(column, float) for column in zip(*points, strict=True))
        weight = 1 / max(1.0, len(points) / 20)
        smooth, total, sum_of_weights = [], 0.0, 0.0
        for reward in rewards:  # the weights add up to 1 from the first point on
            total = (1 - weight) * total + weight * reward
            sum_of_weights = (1 - weight) * sum_of_weights + weight
            smooth.append(total / sum_of_weights)
        axes.plot(steps, rewards, color=f"C{number % 10}", alpha=0.2, linewidth=0.8)
        axes.plot(steps, smooth, color=f"C{number % 10}", label=_plain_text(name))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)
