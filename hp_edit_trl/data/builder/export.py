"""Stage `export`: writes the finished dataset in the form of a Hub repository: Parquet files, card, figures."""

import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...utils.files import read_json, write_atomically, write_json, write_text
from ...utils.fonts import readable_text
from ...utils.hub import CITATION, create_repository
from ...version import __version__
from ..schema import (
    CASE_FEATURES,
    EDIT_FEATURES,
    GUIDE_FEATURES,
    SCHEMA_VERSION,
    SCORE_FEATURES,
    check_row,
    content_description,
    with_presence,
)
from .engine import Batch, WorkFolder
from .rounds import over_count
from .verified import BenchmarkChoice


logger = logging.getLogger(__name__)

FILE_BYTES = 500_000_000  # approximate size of a Parquet file
GROUP_BYTES = 50_000_000  # of a row group: the Hub's viewer reads whole groups, and shows none above 100 MB
GROUP_ROWS = 100

# Licenses that the Hub knows. A card names another license in its table only.
LICENSES = {
    "apache-2.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "mit",
    "odbl", "odc-by", "openrail", "pddl", "unlicense",
}  # fmt: skip

MAKERS = {
    "writer": "prompts by",
    "writer_prompt": "instruction template",
    "editor": "edits by",
    "editor_revision": "revision of the editor",
    "judge": "scores by",
    "scorer_prompt": "scorer prompt",
    "scorer_prompt_sha": "hash of the scorer prompt",
    "score_mode": "mode of the score",
}


# The columns of each case of a finished build
EXPORTED = {**CASE_FEATURES, **EDIT_FEATURES, **SCORE_FEATURES}


class Contents:
    """Statistics of a dataset, collected batch by batch while it is written."""

    def __init__(self) -> None:
        self.cases: Counter[tuple[str, str]] = Counter()  # by split and task
        self.categories: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.licenses: Counter[tuple[str | None, str | None]] = Counter()
        self.makers: Counter[tuple[str, str]] = Counter()
        self.scores: dict[tuple[str, str], list[float | None]] = {}  # by split and task
        self.num_bytes: Counter[str] = Counter()

    def add(self, split: str, batch: Batch, num_bytes: int) -> None:
        self.cases.update((split, task) for task in batch["task"])
        self.categories.update(category or "unknown" for category in batch["category"])
        self.languages.update(language for language in batch["language"] if language)
        self.licenses.update(zip(batch["source"], batch["license"], strict=True))
        for name in MAKERS:
            self.makers.update((name, str(value)) for value in batch.get(name, []) if value is not None)
        for task, score in zip(batch["task"], batch.get("score", []), strict=False):
            self.scores.setdefault((split, task), []).append(score)
        self.num_bytes[split] += num_bytes

    @property
    def splits(self) -> dict[str, int]:
        """Number of rows of each split."""
        return {
            name: sum(count for (split, _), count in self.cases.items() if split == name) for name in self.num_bytes
        }

    @property
    def tasks(self) -> list[str]:
        return sorted({task for _, task in self.cases})


def export_candidates(build: WorkFolder, folder: Path) -> None:
    """
    Exports the candidates of the benchmark for `hp-edit annotate --verify`, unless they are there already.

    Args:
        build ([`WorkFolder`]):
            The work folder, of which `split` is the latest finished stage.
        folder (`Path`):
            Folder for the dataset, with the splits `test` and `reserve`.
    """
    marker = {"made_from": build.key}
    splits = build.read(build.live, ["split"])["split"]
    if "test" not in splits or read_json(folder / "candidates.json") == marker:
        return
    parts = {name: _batches(build, build.live[[one == name for one in splits]], CASE_FEATURES) for name in splits}
    kept = {name: parts[name] for name in ("test", "reserve") if name in parts}
    export_dataset(kept, folder, name="Candidates of a benchmark, to be verified by people")
    write_json(folder / "candidates.json", marker)


def export_build(
    rounds: Sequence[WorkFolder], folder: Path, benchmark: BenchmarkChoice, counts: Mapping[str, int]
) -> None:
    """
    Exports a build whose stages are finished: the dataset, and `rejected.parquet` beside it.

    Args:
        rounds (`Sequence[WorkFolder]`):
            The work folders of its rounds.
        folder (`Path`):
            Folder for the dataset.
        benchmark ([`BenchmarkChoice`]):
            Chooses the cases of the split `test`, among those of the first round.
        counts (`Mapping[str, int]`):
            Number of cases per task for the split `train`. Those beyond it are left out.

    Raises:
        `ValueError`: If no case is left for training, or people have yet to verify cases of the benchmark.
        `OSError`: If the disk is full.
    """
    chosen, left_out = benchmark.choose()
    splits: list[list[str | None]] = []  # of the rows of each round
    rejected = []
    trained: Counter[str] = Counter()
    for number, (build, over) in enumerate(zip(rounds, over_count(rounds, counts), strict=True)):
        tasks, found = build.read(build.live, ["task", "split"]).values()
        of_benchmark = chosen if number == 0 else {}
        rows = build.live.tolist()
        splits.append([])
        for row, task, split in zip(rows, tasks, found, strict=True):
            if split in ("test", "reserve"):
                split = "test" if row in of_benchmark else None
            splits[-1].append(None if row in over else split)
            trained[task] += splits[-1][-1] == "train"
        reasons = {row: f"over the count: {tasks[i]} has its cases" for i, row in enumerate(rows) if row in over}
        rejected += [*build.rejected(), *_left_out(build, reasons | (left_out if number == 0 else {}))]
    columns = {name: pa.string() for name in ("stage", "row", "reason", "source", "file")} | {"row": pa.int64()}
    table = pa.Table.from_pylist(rejected, schema=pa.schema(list(columns.items())))
    write_atomically(rounds[0].path / "rejected.parquet", lambda part: pq.write_table(table, part))
    stages: dict[str, Counter] = {}
    for one in rejected:
        stages.setdefault(one["stage"], Counter())[one["reason"].partition(":")[0]] += 1

    known = {split for of_round in splits for split in of_round}
    if "train" not in known:
        total = Counter(split for of_round in splits for split in of_round)
        raise ValueError(f"No case is left for training ({dict(total)}): raise filter_threshold, or add images.")
    if short := [f"{task} {trained[task]:,} of {count:,}" for task, count in counts.items() if trained[task] < count]:
        logger.warning(
            "The dataset has fewer cases for training than task_counts asks for: %s. If the images of these tasks are "
            "used up, add some (for a build in another output_dir), or raise tasks_per_image.",
            ", ".join(short),
        )  # fmt: skip
    guides = {name: feature for name, feature in GUIDE_FEATURES.items() if rounds[0].has_column(name)}

    def batches(split: str) -> Iterator[Batch]:
        made = [*EDIT_FEATURES, *SCORE_FEATURES, "id", "prompt", "requirement"]
        for build, of_round in zip(rounds, splits, strict=True):
            rows = build.live[[name == split for name in of_round]]
            for batch, part in zip(_batches(build, rows, {**EXPORTED, **guides}), _parts(rows), strict=True):
                again = {i: place for i, row in enumerate(part.tolist()) if (place := chosen.get(row)) is not None}
                if split == "test" and again:
                    assert benchmark.corrected is not None
                    corrected = benchmark.corrected.read(np.array(list(again.values())), made)
                    for number, i in enumerate(again):
                        for name in made:
                            batch[name][i] = corrected[name][number]
                        batch["writer"][i] = f"{batch['writer'][i]}, corrected by people"
                yield batch

    export_dataset(
        {name: batches(name) for name in ("train", "test", "filtered") if name in known},
        folder,
        rejected={stage: dict(sorted(reasons.items())) for stage, reasons in stages.items() if reasons},
        verified=benchmark.summary(chosen),
        wanted=counts,
    )


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + 16] for start in range(0, len(rows), 16)]


def _batches(
    build: WorkFolder,
    rows: np.ndarray,
    features: Mapping[str, Any],
) -> Iterator[Batch]:
    """Rows of a build in batches that can be exported."""
    names = [name for name in features if name != "schema_version"]
    for part in _parts(rows):
        batch = build.read(part, names)
        yield {"schema_version": [SCHEMA_VERSION] * len(part), **batch}


def _left_out(build: WorkFolder, reasons: Mapping[int, str]) -> Iterator[dict[str, Any]]:
    """The candidates of the benchmark that it does not have, like the rejected rows of a stage."""
    origin = build.read(np.array(list(reasons), dtype=int), ["source", "file"])
    for i, (row, reason) in enumerate(reasons.items()):
        yield {"stage": "export", "row": row, "reason": reason, **{name: values[i] for name, values in origin.items()}}


def export_dataset(
    splits: Mapping[str, Iterable[Batch]],
    folder: str | Path,
    *,
    name: str = "Hard cases for image editing",
    rejected: Mapping[str, Mapping[str, int]] | None = None,
    verified: Mapping[str, Any] | None = None,
    wanted: Mapping[str, int] | None = None,
) -> Contents:
    """
    Writes a dataset in the form of a Hub repository: `data/*.parquet` with the images inside, in row groups that the
    Hub's viewer can show; `README.md`, the card; `figures/*.png`. The same rows give the same bytes. An earlier
    content of the folder is replaced once everything is written.

    Args:
        splits (`Mapping[str, Iterable[dict[str, list]]]`):
            The rows of each split in batches of columns, images encoded as `{"bytes": ..., "path": None}`. Only one
            row group is held in memory.
        folder (`str` or `Path`):
            The folder.
        name (`str`, *optional*, defaults to `"Hard cases for image editing"`):
            Title of the card.
        rejected (`Mapping[str, Mapping[str, int]]`, *optional*):
            For the card: the number of rejected rows by stage and reason.
        verified (`Mapping[str, Any]`, *optional*):
            For the card: how people verified the split `test`, see [`BenchmarkChoice.summary`].
        wanted (`Mapping[str, int]`, *optional*):
            For the card: number of cases per task that the split `train` should have.

    Returns:
        [`Contents`]: statistics of what was written.

    Raises:
        `ValueError`: If there are no rows, their columns differ, or a row does not fit the schema.
        `OSError`: If the disk is full. The earlier content is kept.
    """
    folder = Path(folder)
    part, old = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.old")
    if old.exists() and not folder.exists():  # killed between the two renamings below
        old.rename(folder)
    shutil.rmtree(part, ignore_errors=True)
    (part / "data").mkdir(parents=True)
    (part / "figures").mkdir()
    contents = Contents()
    features: Features | None = None
    try:
        for split, batches in splits.items():
            features = _write_split(_checked(batches, split, features), part / "data", split, contents) or features
        if features is None:
            raise ValueError(f"There are no rows to export in the splits {list(splits)}.")
        with readable_text(*map(str, contents.categories)):
            draw_tasks_and_categories(contents, part / "figures" / "tasks_and_categories.png")
        if any(score is not None for scores in contents.scores.values() for score in scores):
            draw_scores(contents, part / "figures" / "scores.png")
        _write_card(part, name, contents, features, rejected or {}, verified, wanted)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{folder} cannot be written ({error}). Free space, and run again") from error
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return contents


def _checked(batches: Iterable[Batch], split: str, features: Features | None) -> Iterator[Batch]:
    """Passes batches on. Raises `ValueError` if their columns differ, also from `features`, or a row does not fit."""
    columns = None if features is None else set(features)
    known = {*EXPORTED, *GUIDE_FEATURES}
    seen: dict[tuple, int] = {}
    for batch in batches:
        if missing := CASE_FEATURES.keys() - batch.keys():
            raise ValueError(
                f"The split {split!r} has no columns {sorted(missing)}: rows must have all columns of a case."
            )
        if unknown := batch.keys() - known:
            raise ValueError(
                f"The split {split!r} has columns that are not in the schema: {sorted(unknown)}. Leave them out."
            )
        if columns is not None and batch.keys() != columns:
            raise ValueError(
                f"The split {split!r} has other columns than the rows before it. Only one of them has "
                f"{sorted(batch.keys() ^ columns)}."
            )
        columns = set(batch)
        for i in range(len(batch["id"])):
            row = {column: values[i] for column, values in batch.items()}
            check_row(with_presence(row), len(seen), f"the split {split!r}", seen)
        yield batch


def _write_split(batches: Iterable[Batch], folder: Path, split: str, contents: Contents) -> Features | None:
    """Writes one split. Files get their names at the end, because these include the number of files."""
    features: Features | None = None
    writer: pq.ParquetWriter | None = None
    files: list[Path] = []
    written = 0
    for group, size in _groups(batches):
        if features is None:
            known = {**EXPORTED, **GUIDE_FEATURES}
            features = Features({column: known[column] for column in group})
        if writer is None or written >= FILE_BYTES:
            if writer is not None:
                writer.close()
            files.append(folder / f"{split}-{len(files):05d}.part")
            # The metadata tells `datasets` and the Hub which columns are images.
            writer = pq.ParquetWriter(
                files[-1], features.arrow_schema, compression="zstd", write_page_index=True, write_page_checksum=True
            )
            written = 0
        schema = features.arrow_schema
        arrays = [pa.array(group[column], schema.field(column).type) for column in schema.names]
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=GROUP_ROWS)
        written += size
        contents.add(split, group, size)
    if writer is not None:
        writer.close()
    for number, file in enumerate(files):
        file.rename(folder / f"{split}-{number:05d}-of-{len(files):05d}.parquet")
    return features


def _groups(batches: Iterable[Batch]) -> Iterator[tuple[Batch, int]]:
    """Groups of at most `GROUP_ROWS` rows and `GROUP_BYTES`, unless a single row is larger."""
    group: Batch = {}
    size = 0
    for batch in batches:
        for i in range(len(batch["id"])):
            row = {column: values[i] for column, values in batch.items()}
            row_size = sum(_size(value) for value in row.values())
            if group and (len(group["id"]) == GROUP_ROWS or size + row_size > GROUP_BYTES):
                yield group, size
                group, size = {}, 0
            for column, value in row.items():
                group.setdefault(column, []).append(value)
            size += row_size
    if group:
        yield group, size


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return len(value["bytes"] or b"")
    return len(value.encode()) if isinstance(value, str) else 8


def _write_card(
    folder: Path,
    name: str,
    contents: Contents,
    features: Features,
    rejected: Mapping[str, Mapping[str, int]],
    verified: Mapping[str, Any] | None,
    wanted: Mapping[str, int] | None,
) -> None:
    splits = contents.splits
    licenses, known = contents.licenses.items(), {license for _, license in contents.licenses}
    total = sum(splits.values())
    data = DatasetCardData(
        license=known.pop() if len(known) == 1 and known <= LICENSES else "other",
        language=sorted(contents.languages) or None,
        task_categories=["image-to-image"],
        tags=["hp-edit-trl", "image-editing", "preference"],
        size_categories=[_size_category(total)],
        configs=[
            {
                "config_name": "default",
                "description": content_description(folder / "data"),
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits],
            }
        ],
        dataset_info={
            "features": features._to_yaml_list(),
            "splits": [
                {"name": split, "num_bytes": contents.num_bytes[split], "num_examples": count}
                for split, count in splits.items()
            ],
            "download_size": sum(file.stat().st_size for file in (folder / "data").iterdir()),
            "dataset_size": sum(contents.num_bytes.values()),
        },
    )
    makers = [(MAKERS[what], _cell(which), count) for (what, which), count in contents.makers.items()]
    card = DatasetCard.from_template(
        data,
        template_path=str(Path(__file__).parent / "dataset_card.md"),
        name=name,
        rows=total,
        splits=splits,
        tasks=contents.tasks,
        cases={split: {task: contents.cases[split, task] for task in contents.tasks} for split in splits},
        has_edits="edit" in features,
        has_scores=bool(contents.scores) and (folder / "figures" / "scores.png").exists(),
        rejected={
            stage: {_cell(reason): count for reason, count in reasons.items()} for stage, reasons in rejected.items()
        },
        licenses=[
            ((_cell(source), _cell(license)), count)
            for (source, license), count in sorted(licenses, key=lambda item: (-item[1], str(item[0])))
        ],
        verified=verified,
        citation=CITATION,
        wanted=wanted,
        got={task: contents.cases["train", task] for task in wanted or {}},
        makers=sorted(makers, key=lambda row: (list(MAKERS.values()).index(row[0]), row[1])),
        version=__version__,
    )
    # Conditions in the template leave empty lines.
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"\|\n+(?=\|)", "|\n", str(card)))
    write_text(folder / "README.md", text)


def _cell(value: str | None) -> str | None:
    """The text for a cell of a Markdown table."""
    return None if value is None else " ".join(value.replace("|", "\\|").split())


def _size_category(count: int) -> str:
    for limit, category in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")):
        if count < limit:
            return category
    return "1M<n<10M"


def _plain(text: str) -> str:
    """The text without the characters that matplotlib reads as a formula."""
    return text.replace("$", r"\$")


def draw_tasks_and_categories(contents: Contents, path: Path) -> None:
    """Draws the number of cases of each task and category, over all splits."""
    tasks = Counter[str]()
    for (_, task), count in contents.cases.items():
        tasks[task] += count
    total = sum(tasks.values())
    categories = contents.categories.most_common()
    figure = Figure(figsize=(12, 4.6 if len(categories) <= 40 else 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.6))
    names = [task for task, _ in tasks.most_common()][::-1]
    bars = left.barh([_plain(task) for task in names], [tasks[task] for task in names], color="#4477aa")
    left.bar_label(bars, [f"{tasks[task]:,} ({tasks[task] / total:.1%})" for task in names], padding=3, fontsize=8)
    left.margins(x=0.35)
    left.set_title(f"{total:,} cases of {len(tasks)} tasks")
    right.bar(range(len(categories)), [count for _, count in categories], color="#66aa88")
    size = 9 if len(categories) <= 20 else 7
    labels = [_plain(category) for category, _ in categories]
    right.set_xticks(range(len(categories)), labels, rotation=90 if len(categories) > 8 else 0, fontsize=size)
    right.set_xlim(-0.7, max(len(categories), 4) - 0.3)
    right.set_title(f"{len(categories)} categories")
    for axes, counts in ((left, left.xaxis), (right, right.yaxis)):
        axes.spines[["top", "right"]].set_visible(False)
        counts.set_major_locator(MaxNLocator(5, integer=True))
    right.set_ylabel("cases")
    figure.savefig(path, dpi=130, metadata={"Software": None})


def draw_scores(contents: Contents, path: Path) -> None:
    """Draws histograms of the scores of each task: before the filter (`train`, `filtered`) and after it (`train`)."""
    tasks = [task for task in contents.tasks if any(key[1] == task and key[0] != "test" for key in contents.scores)]
    tasks = tasks or contents.tasks
    columns = min(3, len(tasks) + 1)
    rows = -(-(len(tasks) + 1) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.2 * rows + 0.5), layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    edges = np.arange(-0.25, 5.5, 0.5)
    for axes, task in zip(grid, ["all tasks", *tasks], strict=False):
        chosen = [task] if task != "all tasks" else tasks
        after = [s for name in chosen for s in contents.scores.get(("train", name), []) if s is not None]
        easy = [s for name in chosen for s in contents.scores.get(("filtered", name), []) if s is not None]
        before = after + easy
        axes.hist(before, edges, color="#bbbbbb", label="before the filter")
        axes.hist(after, edges, color="#cc6677", rwidth=0.7, label="after: trained on")
        if before:
            top = float(np.mean([score >= 4.75 for score in before]))
            mean = f"mean {np.mean(before):.2f}" + (f" → {np.mean(after):.2f}" if after else "")
            axes.set_title(f"{_plain(task)}: {mean}, {top:.0%} at 5", fontsize=8)
        axes.set_xticks(range(6))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(tasks) + 1 :]:
        axes.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def push_dataset(folder: str | Path, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """
    Pushes a dataset that [`export_dataset`] wrote to the Hub.

    Args:
        folder (`str` or `Path`):
            The folder.
        repo_id (`str`):
            The repository, e.g. `"me/my-realpref"`. It is created if it does not exist.
        private (`bool`, *optional*, defaults to `True`):
            Whether to create it as a private repository.
        token (`str`, *optional*):
            Token with write permission. Defaults to the token of the logged-in user.

    Returns:
        `str`: the URL of the commit; its last part can be passed as `revision` to [`load_realpref`].

    Raises:
        `FileNotFoundError`: If the folder does not hold a dataset.
        `ValueError`: If `private` is set, but the repository exists and is public.
    """
    folder = Path(folder)
    if not any((folder / "data").glob("*.parquet")) or not (folder / "README.md").exists():
        raise FileNotFoundError(f"{folder} holds no dataset: a README.md and data/*.parquet. Build it first.")
    api = HfApi(token=token)
    repo_id = create_repository(repo_id, private=private, token=token)
    # The same commit deletes files of an earlier version that no longer exist.
    commit = api.upload_folder(
        folder_path=folder,
        repo_id=repo_id,
        repo_type="dataset",
        commit_message="Dataset",
        allow_patterns=["README.md", "data/*.parquet", "figures/*.png"],
        delete_patterns=["data/*", "figures/*"],
    )
    return str(commit.commit_url)
