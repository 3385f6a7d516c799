"""
A run of a benchmark: an edit of each case by one editor, scores by one judge, in one results folder.

What is done is written case by case, so that a run can be stopped at any time and goes on where it was. Nothing that went wrong
becomes a score: a case without an edit or without a score is missing, with its reason, and is tried again by the next run.
"""

import hashlib
import io
import json
import logging
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from ..editors import Editor, as_editor, edit_cases, edit_seed
from ..ratings import Rating
from ..utils.distributed import in_step, patient_accelerator
from ..utils.files import append_jsonl, read_json, read_jsonl, write_atomically, write_json
from ..utils.images import UnreadableImageError, read_image
from ..version import __version__
from .results import FORMAT, WHERE_FROM, CaseScore, Run, check_format, read_run, summarize


logger = logging.getLogger(__name__)

THUMBNAIL = 768  # longest side of a source in a results folder
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "datasets", "pillow")
LONGEST_ID = 240  # of the 255 letters of a file's name
IN_A_ROW = 8  # failures after which it is not the cases' fault


class Benchmark(Protocol):
    """
    What [`run_benchmark`] needs of a benchmark.

    Attributes:
        name (`str`):
            E.g. `"realpref"`.
        metrics (`dict[str, float]`):
            The metrics and their largest values. All are better when larger; the first is the main one.
        products (`dict[str, tuple[str, str]]`):
            Those of them that are products of two others' means.
        average (`str`):
            The main result: `"overall"`, the unweighted mean of the groups' means, or `"cases"`, the mean over all cases.
        group (`str`):
            The column whose values are the groups, e.g. `"task"`.
        sections (`dict[str, dict]`):
            Parts that are summed up by themselves, each with the values that its cases have in some columns.
        dataset ([`~datasets.Dataset`]):
            The cases: `id`, `image` (left encoded), `prompt`, `requirement` where there is one, and the columns of group and
            sections. Raises a `ValueError` if the data lack a column.
        settings (`dict`):
            Whatever else decides a score: the data's name and revision, judge, prompts.
    """

    @property
    def name(self) -> str: ...
    @property
    def metrics(self) -> dict[str, float]: ...
    @property
    def products(self) -> dict[str, tuple[str, str]]: ...
    @property
    def average(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def sections(self) -> dict[str, dict[str, Any]]: ...
    @property
    def dataset(self) -> Dataset: ...
    @property
    def settings(self) -> dict[str, Any]: ...

    def load(self) -> None:
        """Gets ready to score. Raises if that is impossible."""

    def score(
        self, cases: list[dict[str, Any]], sources: list[Image.Image], edits: list[Image.Image]
    ) -> list[CaseScore]:
        """Scores edits, which have their sources' sizes."""


def run_benchmark(
    benchmark: Benchmark,
    editor: Editor | Callable[..., Any],
    folder: str | Path,
    name: str | None = None,
    batch_size: int = 4,
    chunk_size: int = 32,
    seed: int = 0,
    ratings: Sequence[Rating] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
) -> Run:
    """
    Lets an editor edit each case of a benchmark, has the edits scored, and writes a results folder. Stop it at any time and call
    it again: it goes on with the cases that have no edit or no score yet. Launched by `accelerate launch`, its processes share
    the cases.

    Every editor gets the same cases with the same seeds, and every edit is judged at the size of its source, whatever size it
    came in.

    Args:
        benchmark ([`Benchmark`]):
            E.g. a [`RealPrefBench`].
        editor ([`Editor`] or `Callable`):
            What edits: a [`PipelineEditor`], a [`PolicyEditor`], a [`FolderEditor`], or a function, see [`FunctionEditor`].
        folder (`str` or `Path`):
            The results folder: `run.json` (all that is needed to repeat the run), `edits/`, `sources/` (small), `cases.parquet`
            (one row for each case) and `results.json` (what they come to).
        name (`str`, *optional*):
            What tables call the editor. By default the editor's own name, with its LoRA.
        batch_size (`int`, *optional*, defaults to `4`):
            Number of cases that the editor is given together.
        chunk_size (`int`, *optional*, defaults to `32`):
            Number of edits that the judge is given, and that are written, together.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the edits' noise, which depends on it and on the case.
        ratings (`Sequence[Rating]`, *optional*):
            What people gave the edits, see [`read_ratings`]: those by editor `name`, or by no editor in particular.
        confidence (`float`, *optional*, defaults to `0.95`):
            Probability that the intervals are made for.
        num_resamples (`int`, *optional*, defaults to `1000`):
            How many bootstrap resamples.

    Returns:
        [`Run`]: as [`read_run`] reads it.

    Raises:
        `ValueError`: If the benchmark's data lack a column, the folder holds another run, the ratings are of other edits, or the
            editor failed with its first eight cases. What fails in one process fails in all of a launch.
        `ConnectionError`: If the judge gave no answer eight times in a row. What was done before is kept.
    """
    for option, value in (("batch_size", batch_size), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"{option}={value} must be at least 1.")
    accelerator = patient_accelerator()
    folder, editor = Path(folder), as_editor(editor)
    with in_step(accelerator):
        cases = benchmark.dataset
        check_cases(cases, benchmark)
        identity = editor.identity
        name = name or " + ".join(str(identity[part]) for part in ("editor", "lora") if identity.get(part))
        human = _human(ratings, name, cases["id"][:])
        settings = _plain(
            {
                "format": FORMAT,
                "benchmark": {
                    "name": benchmark.name,
                    **{
                        part: getattr(benchmark, part)
                        for part in ("metrics", "products", "average", "group", "sections")
                    },
                    **benchmark.settings,
                    "cases": len(cases),
                    "cases_sha": _cases_sha(cases, benchmark),
                },
                "editor": {"name": name, **identity},
                "seed": seed,
            }
        )
        _check_same_run(folder, settings)
    with in_step(accelerator):  # everyone has looked before the folder is written to
        if accelerator.is_main_process and not (folder / "run.json").exists():
            for part in ("edits", "sources"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            versions = {"hp-edit-trl": __version__, "python": platform.python_version()}
            versions |= {library: version(library) for library in LIBRARIES}
            write_json(folder / "run.json", {**settings, "versions": versions, "command": sys.argv})

    with in_step(accelerator):
        edits = _read_edits(folder)
        missing = [row for row, case_id in enumerate(cases["id"]) if not _is_whole(folder, edits.get(case_id))]
    with in_step(accelerator):
        _make_edits(folder, cases, missing, edits, editor, batch_size, seed, accelerator)

    with in_step(accelerator):
        edits = {case_id: line for case_id, line in _read_edits(folder).items() if _is_whole(folder, line)}
        scores = _read_scores(folder, edits)
        unscored = [
            row
            for row, case_id in enumerate(cases["id"])
            if case_id in edits and (case_id not in scores or None in scores[case_id]["values"].values())
        ]
    with in_step(accelerator):
        _score(folder, cases, unscored, edits, scores, benchmark, chunk_size, accelerator)
    with in_step(accelerator):
        if accelerator.is_main_process:
            _finish(folder, cases, benchmark, human, confidence, num_resamples)
    return read_run(folder)


def check_cases(cases: Dataset, benchmark: Benchmark) -> None:
    """Raises a `ValueError` if the cases of a benchmark lack a column, or two of them have one id."""
    needed = {
        "id",
        "image",
        "prompt",
        benchmark.group,
        *(name for part in benchmark.sections.values() for name in part),
    }
    lacking = sorted(needed - set(cases.column_names))
    if lacking:
        raise ValueError(
            f"The cases of {benchmark.name} have no column {', '.join(map(repr, lacking))}; their columns are "
            f"{cases.column_names}."
        )
    if len(cases) == 0:
        raise ValueError(f"There are no cases in {benchmark.name}.")
    for column in ("id", "prompt", benchmark.group):
        for row, value in enumerate(cases[column]):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{column} of row {row} of {benchmark.name} is {value!r}, but must be a text.")
    for row, case_id in enumerate(cases["id"]):
        if len(quote(case_id, safe="")) > LONGEST_ID:
            raise ValueError(
                f"The id of row {row} of {benchmark.name} is too long to name a file: {case_id[:40]!r}... Give its cases ids of "
                f"up to {LONGEST_ID} letters; a letter beyond ASCII counts as 6 or more."
            )
    twice = [case_id for case_id, count in Counter(cases["id"]).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} ids occur more than once in {benchmark.name}, the first being {twice[0]!r}.")


def _cases_sha(cases: Dataset, benchmark: Benchmark) -> str:
    """A hash of what the cases are: all texts that matter, and the images as they are stored."""
    columns = {benchmark.group, *(name for part in benchmark.sections.values() for name in part)}
    digest = hashlib.sha256()
    for case in cases:
        image = case["image"] if isinstance(case["image"], dict) else {"bytes": None, "path": case["image"]}
        content = image["bytes"]
        if content is None and image["path"] is not None and os.path.isfile(image["path"]):
            content = Path(image["path"]).read_bytes()
        digest.update(hashlib.sha256(content or repr(image["path"]).encode()).digest())
        texts = [case["id"], case["prompt"], case.get("requirement"), *(case[name] for name in sorted(columns))]
        digest.update(repr(texts).encode())
    return digest.hexdigest()[:16]


def _human(ratings: Sequence[Rating] | None, name: str, ids: list[str]) -> dict[str, float] | None:
    """The mean of people's ratings of each case."""
    if ratings is None:
        return None
    given: dict[str, list[int]] = {}
    known = set(ids)
    for rating in ratings:
        if rating.score is not None and rating.editor in (name, None) and rating.id in known:
            given.setdefault(rating.id, []).append(rating.score)
    if not given:
        editors = sorted({str(rating.editor) for rating in ratings})
        raise ValueError(
            f"None of the {len(ratings)} ratings is of an edit by {name!r} of one of these cases; they are of edits by "
            f"{', '.join(editors)}. Name the editor as the ratings do, with name=."
        )
    return {case_id: float(np.mean(scores)) for case_id, scores in given.items()}


def _check_same_run(folder: Path, settings: dict[str, Any]) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder for the results.")
    if not (folder / "run.json").exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no results: name another folder.")
        return
    before = read_json(folder / "run.json")
    if before is None:
        raise ValueError(f"{folder / 'run.json'} cannot be read: name another folder, or remove it.")
    check_format(folder, before)
    for part in ("benchmark", "editor"):
        held = before.get(part) or {}
        for key in sorted({*held, *settings[part]} - WHERE_FROM):
            if held.get(key) != settings[part].get(key):
                raise ValueError(
                    f"{folder} holds another run: {key} of its {part} is {held.get(key)!r}, now it is "
                    f"{settings[part].get(key)!r}. Name another folder, or go on with the same settings."
                )
    if before.get("seed") != settings["seed"]:
        raise ValueError(
            f"{folder} holds a run with seed {before.get('seed')}, not {settings['seed']}: name another folder."
        )


def _make_edits(
    folder: Path,
    cases: Dataset,
    rows: list[int],
    before: dict[str, dict[str, Any]],
    editor: Editor,
    batch_size: int,
    seed: int,
    accelerator: Any,
) -> None:
    """Edits the cases of this process and writes each edit, with a line about it."""
    if not rows:
        return
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = rows[rank::world]
    editor.load()
    file = folder / f"edits-{rank}.jsonl"
    failed, some_made = 0, any("sha" in line for line in before.values())
    progress = tqdm(total=len(mine), desc="Editing", unit="case", disable=not accelerator.is_local_main_process)
    with progress:
        for start in range(0, len(mine), batch_size):
            batch = [cases[row] for row in mine[start : start + batch_size]]
            images: dict[str, Image.Image] = {}
            reasons: dict[str, str | None] = {}
            for case in batch:
                try:
                    images[case["id"]] = read_image(case["image"], f"The image of case {case['id']!r}")
                except UnreadableImageError as error:
                    logger.warning("%s", error)
                    reasons[case["id"]] = f"unreadable: {error}"
            began = perf_counter()
            made: dict[str, Image.Image | None] = {}
            if images:
                prompts = [case["prompt"] for case in batch if case["id"] in images]
                seeds = [edit_seed(seed, case_id) for case_id in images]
                done, why = edit_cases(editor, [[image] for image in images.values()], prompts, list(images), seeds)
                made = dict(zip(images, done, strict=True))
                reasons |= dict(zip(images, why, strict=True))
            seconds = (perf_counter() - began) / max(len(images), 1)
            lines = []
            for case in batch:
                case_id, edit = case["id"], made.get(case["id"])
                if case_id in images:
                    _write_source(folder, case_id, images[case_id])
                line = {
                    "id": case_id,
                    "seed": edit_seed(seed, case_id),
                    "reason": reasons[case_id],
                    "seconds": seconds,
                }
                if edit is not None:
                    line |= {"sha": _write_edit(folder, case_id, edit), "width": edit.width, "height": edit.height}
                    line["source"] = list(images[case_id].size)
                lines.append(line)
                some_made = some_made or edit is not None
                failed += case_id not in before and str(reasons[case_id]).startswith("editor failed")
            append_jsonl(file, lines)
            progress.update(len(batch))
            if failed >= IN_A_ROW and not some_made:
                raise ValueError(
                    f"The editor failed with all of the first {failed} cases that it was given; the last time: "
                    f"{lines[-1]['reason']}. Repair it and run again."
                )
    editor.unload()


def _score(
    folder: Path,
    cases: Dataset,
    rows: list[int],
    edits: dict[str, dict[str, Any]],
    before: dict[str, dict[str, Any]],
    benchmark: Benchmark,
    chunk_size: int,
    accelerator: Any,
) -> None:
    """Scores the edits of this process and writes a line about each."""
    if not rows:
        return
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = rows[rank::world]
    benchmark.load()
    file = folder / f"scores-{rank}.jsonl"
    unanswered = 0
    progress = tqdm(total=len(mine), desc="Scoring", unit="case", disable=not accelerator.is_local_main_process)
    with progress:
        for start in range(0, len(mine), chunk_size):
            batch = [cases[row] for row in mine[start : start + chunk_size]]
            sources = [read_image(case["image"], f"The image of case {case['id']!r}") for case in batch]
            shown = []
            for case, source in zip(batch, sources, strict=True):
                edit = read_image(str(_edit_file(folder, case["id"])), f"The edit of case {case['id']!r}")
                shown.append(edit if edit.size == source.size else edit.resize(source.size, Image.Resampling.LANCZOS))
            scores = benchmark.score(batch, sources, shown)
            for case, score in zip(batch, scores, strict=True):
                if score.reason is not None:
                    logger.warning("Case %s: %s", case["id"], score.reason)
            append_jsonl(
                file,
                [
                    {
                        "id": case["id"],
                        "sha": edits[case["id"]]["sha"],
                        "values": score.values,
                        "reason": score.reason,
                        "judgements": {
                            name: {key: getattr(one, key) for key in ("score", "answer", "answered", "unparsed")}
                            for name, one in score.judgements.items()
                        },
                    }
                    for case, score in zip(batch, scores, strict=True)
                ],
            )
            progress.update(len(batch))
            # Cases that got no answer in an earlier run may be of a kind that never gets one.
            untried = [score for case, score in zip(batch, scores, strict=True) if case["id"] not in before]
            for judgement in (one for score in untried for one in score.judgements.values()):
                unanswered = 0 if judgement.answered else unanswered + 1
                if unanswered >= IN_A_ROW:
                    raise ConnectionError(
                        f"The judge gave no answer {unanswered} times in a row; the last time: {judgement.answer} What was scored "
                        f"is kept in {folder}: run it again to go on."
                    )


def _finish(
    folder: Path,
    cases: Dataset,
    benchmark: Benchmark,
    human: dict[str, float] | None,
    confidence: float,
    num_resamples: int,
) -> None:
    """Writes the row of each case, and what they come to."""
    everything = _read_edits(folder)
    edits = {case_id: line for case_id, line in everything.items() if _is_whole(folder, line)}
    scores = _read_scores(folder, edits)
    direct = [name for name in benchmark.metrics if name not in benchmark.products]
    columns = {name for part in benchmark.sections.values() for name in part} | {benchmark.group}
    kept = [name for name in cases.column_names if name in columns or name in ("id", "prompt", "requirement")]
    rows = []
    counts = Counter(
        dict.fromkeys(
            (
                "no_edit",
                "resized",
                "reshaped",
                "no_score",
                "judgements",
                "parse_failures",
                "unparsed_samples",
                "unanswered",
            ),
            0,
        )
    )
    reasons: Counter = Counter()
    for case in cases.select_columns(kept):
        case_id = case["id"]
        line, score = everything.get(case_id, {}), scores.get(case_id)
        source, edit = _source_file(folder, case_id), _edit_file(folder, case_id)
        row = case | {"requirement": case.get("requirement"), "edit": None, "width": None, "height": None}
        row |= {"resized": False, "reshaped": False, "reason": line.get("reason"), "answers": None}
        row["source"] = str(source.relative_to(folder)) if source.exists() else None
        row |= {name: score["values"][name] if score else None for name in direct}
        row["human"] = None if human is None else human.get(case_id)
        if case_id in edits:
            width, height = line["source"]
            row |= {"edit": str(edit.relative_to(folder)), "width": line["width"], "height": line["height"]}
            row["resized"] = (line["width"], line["height"]) != (width, height)
            row["reshaped"] = not 0.95 < line["width"] * height / (line["height"] * width) < 1 / 0.95
        if score:
            row["reason"] = score["reason"]
            row["answers"] = json.dumps(
                {name: one["answer"] for name, one in score["judgements"].items()}, ensure_ascii=False
            )
            for one in score["judgements"].values():
                counts["judgements"] += 1
                counts["parse_failures"] += one["answered"] and one["score"] is None
                counts["unparsed_samples"] += one["unparsed"]
                counts["unanswered"] += not one["answered"]
        counts["no_edit"] += row["edit"] is None
        counts["no_score"] += row["edit"] is not None and any(row[name] is None for name in direct)
        counts["resized"] += row["resized"]
        counts["reshaped"] += row["reshaped"]
        if row["reason"] is not None:
            reasons[row["reason"].partition(":")[0]] += 1
        rows.append(row)
    if counts["reshaped"]:
        logger.warning(
            "%d edits have another shape than their sources, by more than 5 %%, and were judged stretched to it.",
            counts["reshaped"],
        )
    schema = {name: pa.string() for name in ("requirement", "edit", "source", "reason", "answers")}
    schema |= {"width": pa.int64(), "height": pa.int64(), "human": pa.float64(), **dict.fromkeys(direct, pa.float64())}
    table = pa.Table.from_pylist(rows)
    for column, kind in schema.items():
        place = table.column_names.index(column)
        table = table.set_column(place, column, table.column(column).cast(kind))
    (folder / "results.json").unlink(missing_ok=True)  # it would not be that of the new rows
    write_atomically(folder / "cases.parquet", lambda part: pq.write_table(table, part))
    asked = [*direct, *(["human"] if human is not None else [])]
    summary = summarize(
        rows, asked, benchmark.group, benchmark.sections, benchmark.products, confidence, num_resamples
    )
    write_json(
        folder / "results.json",
        {
            "format": FORMAT,
            "summary": summary,
            "counts": {"cases": len(rows), "edits": len(rows) - counts["no_edit"], **counts},
            "reasons": dict(reasons.most_common()),
            "confidence": confidence,
            "num_resamples": num_resamples,
            "bootstrap_seed": 0,
        },
    )


def _read_edits(folder: Path) -> dict[str, dict[str, Any]]:
    """The line about each case's edit: the one that tells of the file that is there, else the last."""
    lines: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("edits-*.jsonl")):
        for number, line, text in read_jsonl(file):
            if line is None or not isinstance(line.get("id"), str):
                logger.warning("Left out: %s, line %d: not a whole line: %r.", file, number, text[:60])
            elif not _is_whole(folder, lines.get(line["id"])):
                lines[line["id"]] = line
    return lines


def _is_whole(folder: Path, line: dict[str, Any] | None) -> bool:
    """Whether the edit that a line speaks of is there, as it was written."""
    if line is None or "sha" not in line:
        return False
    file = _edit_file(folder, line["id"])
    return file.is_file() and _digest(file.read_bytes()) == line["sha"]


def _read_scores(folder: Path, edits: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last line with a score of each edit that is there; if none has one, the last of those without."""
    lines: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("scores-*.jsonl")):
        for number, line, text in read_jsonl(file):
            if line is None or not isinstance(line.get("id"), str) or "values" not in line:
                logger.warning("Left out: %s, line %d: not a whole line: %r.", file, number, text[:60])
                continue
            case_id = line["id"]
            if line.get("sha") == edits.get(case_id, {}).get("sha") and (
                case_id not in lines or None in lines[case_id]["values"].values()
            ):
                lines[case_id] = line
    return lines


def _edit_file(folder: Path, case_id: str) -> Path:
    return folder / "edits" / f"{quote(case_id, safe='')}.png"


def _source_file(folder: Path, case_id: str) -> Path:
    return folder / "sources" / f"{quote(case_id, safe='')}.jpg"


def _write_edit(folder: Path, case_id: str, edit: Image.Image) -> str:
    buffer = io.BytesIO()
    edit.convert("RGB").save(buffer, "PNG")
    write_atomically(_edit_file(folder, case_id), lambda part: part.write_bytes(buffer.getvalue()))
    return _digest(buffer.getvalue())


def _write_source(folder: Path, case_id: str, image: Image.Image) -> None:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    write_atomically(_source_file(folder, case_id), lambda part: small.save(part, "JPEG", quality=92))


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As it is read back from JSON."""
    return json.loads(json.dumps(value, default=str))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
