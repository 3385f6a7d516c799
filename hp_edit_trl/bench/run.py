"""
A run of a benchmark: one editor edits each case, one judge scores the edits, and one results folder holds them.

Finished work is written case by case, so that a run can be stopped at any time and resumes where it stopped. A failure
never becomes a score: a case without an edit or without a score is missing, with its reason, and the next run tries it
again.
"""

import hashlib
import json
import logging
import platform
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from ..cases import BadCaseError, case_images, check_cases, decoded, max_references
from ..editors import Editor, as_editor, edit_cases, edit_seed
from ..judges import FailureLimit, Judgement, JudgeTally, load_early
from ..ratings import Rating
from ..utils.distributed import in_step, patient_accelerator
from ..utils.files import (
    append_jsonl,
    check_unchanged,
    file_name,
    read_json,
    read_jsonl,
    write_atomically,
    write_json,
)
from ..utils.images import UnreadableImageError, image_digest, png_bytes, read_image
from ..utils.secrets import redacted
from ..version import __version__
from .benchmark import Benchmark, check_has_columns
from .results import FORMAT, WHERE_FROM, Run, check_format, read_run, summarize


logger = logging.getLogger(__name__)

THUMBNAIL = 1600  # longest side of a reference image in a results folder: as large as people are shown it
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "datasets", "pillow")
ROW_COLUMNS = {
    "id", "prompt", "requirement", "references", "edit", "width", "height", "resized", "reshaped", "reason", "answers",
    "human",
}  # fmt: skip
IN_A_ROW = 8  # failures of an editor after which the cases are not to blame


def run_benchmark(
    benchmark: Benchmark,
    editor: Editor | Callable[..., Any],
    output_dir: str | Path,
    name: str | None = None,
    batch_size: int = 4,
    chunk_size: int = 32,
    seed: int = 0,
    ratings: Sequence[Rating] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
) -> Run:
    """
    Edits each case of a benchmark, has the edits scored, and writes a results folder. Stop it at any time and call it
    again: it resumes with the cases that have no edit or no score yet. With `accelerate launch`, the processes share
    the cases.

    Every editor gets the same cases with the same seeds. Edits are judged as their editor made them; what is scaled
    for the judge is up to the benchmark.

    Args:
        benchmark ([`Benchmark`]):
            The benchmark, e.g. a [`RealPrefBench`].
        editor ([`Editor`] or `Callable`):
            The editor: a [`PipelineEditor`], a [`PolicyEditor`], a [`FolderEditor`], or a function, see
            [`FunctionEditor`].
        output_dir (`str` or `Path`):
            The results folder: `run.json` (everything that is needed to repeat the run), `edits/`, `references/`
            (small), `cases.parquet` (one row per case) and `results.json` (the summary).
        name (`str`, *optional*):
            Name of the editor in tables. By default the editor's own name, with its LoRA.
        batch_size (`int`, *optional*, defaults to `4`):
            Number of cases that are edited together.
        chunk_size (`int`, *optional*, defaults to `32`):
            Number of edits that are scored, and written, together.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the edits' noise, which depends on it and on the case.
        ratings (`Sequence[Rating]`, *optional*):
            People's ratings of the edits, see [`read_ratings`]: those whose editor is `name`, or without an editor.
        confidence (`float`, *optional*, defaults to `0.95`):
            Coverage of the intervals.
        num_resamples (`int`, *optional*, defaults to `1000`):
            Number of bootstrap resamples.

    Returns:
        [`Run`]: the run, as [`read_run`] reads it.

    Raises:
        `ValueError`: If the benchmark's data lack a column, the folder holds another run, the ratings are of other
            edits, or the editor failed with its first eight cases. A failure in one process of a launch fails all of
            them.
        `ConnectionError`: If the judge is gone: it does not answer a trial before the first edit, a server refuses its
            key, or there was no answer eight times in a row, or to more than half of 64 questions. Everything finished
            before is kept.
    """
    for option, value in (("batch_size", batch_size), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"{option}={value} must be at least 1.")
    accelerator = patient_accelerator()
    folder, editor = Path(output_dir), as_editor(editor)
    with in_step(accelerator):
        cases = benchmark.dataset
        bad = _check_cases(cases, benchmark)
        identity = editor.identity
        name = name or " + ".join(str(identity[part]) for part in ("editor", "lora") if identity.get(part))
        human = None if ratings is None else _human_scores(ratings, name, cases["id"][:])
        layout = ("name", "title", "products", "ratios", "average", "group", "sections", "table_columns")
        described = {part: getattr(benchmark, part) for part in layout}
        described["metrics"] = {metric: asdict(value) for metric, value in benchmark.metrics.items()}
        described |= {**benchmark.settings, "cases": len(cases), "cases_sha": _cases_digest(cases, benchmark)}
        settings = {"format": FORMAT, "benchmark": described, "editor": {"name": name, **identity}, "seed": seed}
        settings = redacted(json.loads(json.dumps(settings, default=str)))  # as they are read back
        _check_same_run(folder, settings)
    with in_step(accelerator):  # all processes have checked the folder before one writes to it
        if accelerator.is_main_process and not (folder / "run.json").exists():
            for part in ("edits", "references"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            versions = {"hp-edit-trl": __version__, "python": platform.python_version()}
            versions |= {library: version(library) for library in LIBRARIES}
            write_json(folder / "run.json", {**settings, "versions": versions, "command": redacted(sys.argv)})

    with in_step(accelerator):
        tried = _read_edit_lines(folder)
        rows = [row for row, case_id in enumerate(cases["id"]) if not _is_intact(folder, tried.get(case_id))]
    with in_step(accelerator):
        if rows:
            load_early(benchmark.judge, 1 + max_references(cases))
            _make_edits(folder, cases, rows, tried, bad, editor, batch_size, seed, accelerator)

    with in_step(accelerator):
        edits = {case_id: line for case_id, line in _read_edit_lines(folder).items() if _is_intact(folder, line)}
        scores = _read_score_lines(folder, edits)
        rows = [
            row
            for row, case_id in enumerate(cases["id"])
            if case_id in edits and (case_id not in scores or None in scores[case_id]["values"].values())
        ]
    with in_step(accelerator):
        if rows:
            _score_edits(folder, cases, rows, edits, scores, benchmark, chunk_size, accelerator)
    with in_step(accelerator):
        if accelerator.is_main_process:
            _write_results(folder, cases, benchmark, human, confidence, num_resamples)
    return read_run(folder)


def _check_cases(cases: Dataset, benchmark: Benchmark) -> dict[str, str]:
    """
    What is wrong with each bad case, by its id. Raises a `ValueError` if the cases of a benchmark lack a column or a
    value, or two of them have one id.
    """
    bad = check_cases(cases, benchmark.title, on_bad_case="skip")
    check_has_columns(cases, benchmark.title, ["id", *benchmark.columns])
    if taken := (ROW_COLUMNS | set(benchmark.columns)) & benchmark.metrics.keys():
        raise ValueError(
            f"{benchmark.title} has metrics with names of other columns: rename {', '.join(sorted(taken))}."
        )
    for column in ("id", "prompt", benchmark.group):
        for row, value in enumerate(cases[column]):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{column} of row {row} of {benchmark.title} is {value!r}, but must be a text.")
    return {cases[row]["id"]: problem for row, problem in bad.items()}


def _cases_digest(cases: Dataset, benchmark: Benchmark) -> str:
    """A hash of the cases: all texts that matter, and the images as they are stored."""
    columns = benchmark.columns
    digest = hashlib.sha256()
    for case in cases:
        for image in (case.get("image"), *(case.get("images") or [])):
            if image is not None:
                digest.update(image_digest(image))
        texts = [case["id"], case["prompt"], case.get("requirement"), *(case[column] for column in columns)]
        digest.update(repr(texts).encode())
    return digest.hexdigest()[:16]


def _human_scores(ratings: Sequence[Rating], name: str, ids: list[str]) -> dict[str, float]:
    """The mean of people's ratings of each case."""
    given: dict[str, list[int]] = {}
    known = set(ids)
    for rating in ratings:
        if rating.score is not None and rating.editor in (name, None) and rating.id in known:
            given.setdefault(rating.id, []).append(rating.score)
    if not given:
        editors = sorted({str(rating.editor) for rating in ratings})
        raise ValueError(
            f"None of the {len(ratings)} ratings is of an edit by {name!r} of one of these cases; they are of edits "
            f"by {', '.join(editors)}. Use the name of the editor in the ratings, with name=."
        )
    return {case_id: float(np.mean(scores)) for case_id, scores in given.items()}


def _check_same_run(folder: Path, settings: dict[str, Any]) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a folder for the results.")
    if not (folder / "run.json").exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no results: choose another output_dir.")
        return
    before = read_json(folder / "run.json")
    if before is None:
        raise ValueError(f"{folder / 'run.json'} cannot be read: choose another output_dir, or remove the file.")
    check_format(folder, before)

    def compared(run: dict[str, Any]) -> dict[str, Any]:
        parts = [(part, key) for part in ("benchmark", "editor") for key in sorted(run[part].keys() - WHERE_FROM)]
        return {f"{part} {key}": run[part][key] for part, key in parts} | {"seed": run["seed"]}

    remedy = "choose another output_dir, or resume with the settings in its run.json"
    check_unchanged(f"{folder} holds a run that was", compared(before), compared(settings), remedy)


def _make_edits(
    folder: Path,
    cases: Dataset,
    rows: list[int],
    before: dict[str, dict[str, Any]],
    bad: dict[str, str],
    editor: Editor,
    batch_size: int,
    seed: int,
    accelerator: Accelerator,
) -> None:
    """Edits the cases of this process, and writes each edit and a line about it."""
    rank = accelerator.process_index
    rows = rows[rank :: accelerator.num_processes]
    editor.load()
    failed, some_made = 0, any("sha" in line for line in before.values())
    with tqdm(total=len(rows), desc="Editing", unit="case", disable=not accelerator.is_local_main_process) as progress:
        for start in range(0, len(rows), batch_size):
            batch = [cases[row] for row in rows[start : start + batch_size]]
            references: dict[str, list[Image.Image]] = {}
            reasons: dict[str, str | None] = {}
            for case in batch:
                if case["id"] in bad:
                    reasons[case["id"]] = f"bad case: {bad[case['id']]}"
                    continue
                try:
                    decoded(case, cases.features, case["id"])  # which scoring will need
                    references[case["id"]] = case_images(case, case["id"])
                except (UnreadableImageError, BadCaseError) as error:
                    logger.warning("%s", error)
                    reasons[case["id"]] = f"unreadable: {error}"
            began = perf_counter()
            edits: dict[str, Image.Image | None] = {}
            if references:
                prompts = [case["prompt"] for case in batch if case["id"] in references]
                seeds = [edit_seed(seed, case_id) for case_id in references]
                made, why = edit_cases(editor, list(references.values()), prompts, list(references), seeds)
                edits = dict(zip(references, made, strict=True))
                reasons |= dict(zip(references, why, strict=True))
            seconds = (perf_counter() - began) / max(len(references), 1)
            lines = []
            for case_id in (case["id"] for case in batch):
                images, edit, reason = references.get(case_id, []), edits.get(case_id), reasons[case_id]
                line = {"id": case_id, "seed": edit_seed(seed, case_id), "reason": reason, "seconds": seconds}
                line["references"] = [_write_reference(folder, case_id, *item) for item in enumerate(images)]
                if edit is not None:
                    line |= {"sha": _write_edit(folder, case_id, edit), "width": edit.width, "height": edit.height}
                    line["reference_size"] = list(_reference_size(edit, images))
                lines.append(line)
                some_made = some_made or edit is not None
                failed += case_id not in before and str(reason).startswith("editor failed")
            append_jsonl(folder / f"edits-{rank}.jsonl", lines)
            progress.update(len(batch))
            if failed >= IN_A_ROW and not some_made:
                raise ValueError(
                    f"The editor failed with all of the first {failed} cases; the last time: {lines[-1]['reason']}. "
                    "Repair it and run again."
                )
    editor.unload()


def _score_edits(
    folder: Path,
    cases: Dataset,
    rows: list[int],
    edits: dict[str, dict[str, Any]],
    before: dict[str, dict[str, Any]],
    benchmark: Benchmark,
    chunk_size: int,
    accelerator: Accelerator,
) -> None:
    """Scores the edits of this process and writes a line about each."""
    rank = accelerator.process_index
    rows = rows[rank :: accelerator.num_processes]
    benchmark.load()
    limit, tally = FailureLimit(), JudgeTally()
    with tqdm(total=len(rows), desc="Scoring", unit="case", disable=not accelerator.is_local_main_process) as progress:
        for start in range(0, len(rows), chunk_size):
            batch = [cases[row] for row in rows[start : start + chunk_size]]
            references = [case_images(case, case["id"]) for case in batch]
            batch = [decoded(case, cases.features, case["id"]) for case in batch]
            shown = [
                read_image(str(_edit_file(folder, case["id"])), f"The edit of case {case['id']!r}") for case in batch
            ]
            lines: list[dict[str, Any]] = []
            untried: list[Judgement] = []
            again: list[Judgement] = []
            for case, score in zip(batch, benchmark.score(batch, references, shown), strict=True):
                if score.reason is not None:
                    logger.warning("Case %s: %s", case["id"], score.reason)
                judgements = {
                    name: {
                        "score": one.score,
                        "answer": one.answer,
                        "answered": one.answered,
                        "unparsed": one.unparsed,
                    }
                    for name, one in score.judgements.items()
                }
                line = {"id": case["id"], "sha": edits[case["id"]]["sha"], "values": score.values}
                lines.append(line | {"reason": score.reason, "judgements": judgements})
                tally.add(score.judgements.values())
                # A case without an answer in an earlier run may be of a kind that never gets one.
                (again if case["id"] in before else untried).extend(score.judgements.values())
            append_jsonl(folder / f"scores-{rank}.jsonl", lines)
            progress.update(len(batch))
            remedy = f"Finished scores are kept in {folder}: run it again to resume."
            limit.check(untried, "questions", remedy, again)
    logger.log(logging.WARNING if tally.retries or tally.failures else logging.INFO, "The judge: %s.", tally)


def _write_results(
    folder: Path,
    cases: Dataset,
    benchmark: Benchmark,
    human: dict[str, float] | None,
    confidence: float,
    num_resamples: int,
) -> None:
    """Writes the row of each case, and the summary."""
    tried = _read_edit_lines(folder)
    edits = {case_id: line for case_id, line in tried.items() if _is_intact(folder, line)}
    scores = _read_score_lines(folder, edits)
    direct = [name for name in benchmark.metrics if name not in benchmark.products | benchmark.ratios]
    kept = [name for name in cases.column_names if name in {"id", "prompt", "requirement", *benchmark.columns}]
    names = "edits no_edit resized reshaped no_score judgements parse_failures unparsed_samples unanswered"
    counts = {"cases": len(cases)} | dict.fromkeys(names.split(), 0)
    reasons: Counter = Counter()
    rows = []
    for case in cases.select_columns(kept):
        case_id = case["id"]
        line, score = tried.get(case_id, {}), scores.get(case_id)
        row = case | {"requirement": case.get("requirement"), "edit": None, "width": None, "height": None}
        row |= {"resized": False, "reshaped": False, "reason": line.get("reason"), "answers": None}
        row |= {"references": line.get("references", [])}
        row |= {name: score["values"][name] if score else None for name in direct}
        row["human"] = None if human is None else human.get(case_id)
        if case_id in edits:
            width, height = line["reference_size"]
            row["edit"] = str(_edit_file(folder, case_id).relative_to(folder))
            row |= {"width": line["width"], "height": line["height"]}
            row["resized"] = (line["width"], line["height"]) != (width, height)
            row["reshaped"] = not 0.95 < line["width"] * height / (line["height"] * width) < 1 / 0.95
        if score:
            row["reason"] = score["reason"]
            answers = {name: one["answer"] for name, one in score["judgements"].items()}
            row["answers"] = json.dumps(answers, ensure_ascii=False)
            for one in score["judgements"].values():
                counts["judgements"] += 1
                counts["parse_failures"] += one["answered"] and one["score"] is None
                counts["unparsed_samples"] += one["unparsed"]
                counts["unanswered"] += not one["answered"]
        counts["edits" if row["edit"] is not None else "no_edit"] += 1
        counts["no_score"] += row["edit"] is not None and any(row[name] is None for name in direct)
        counts["resized"] += row["resized"]
        counts["reshaped"] += row["reshaped"]
        if row["reason"] is not None:
            reasons[row["reason"].partition(":")[0]] += 1
        rows.append(row)
    if counts["reshaped"]:
        logger.warning(
            "%d edits differ from their reference images in aspect ratio by more than 5 %%.", counts["reshaped"]
        )
    schema = dict.fromkeys(("requirement", "edit", "reason", "answers"), pa.string())
    schema |= {"references": pa.list_(pa.string()), "width": pa.int64(), "height": pa.int64()}
    schema |= dict.fromkeys(("human", *direct), pa.float64())
    table = pa.Table.from_pylist(rows)
    for column, kind in schema.items():
        place = table.column_names.index(column)
        table = table.set_column(place, column, table.column(column).cast(kind))
    (folder / "results.json").unlink(missing_ok=True)  # it would not belong to the new rows
    write_atomically(folder / "cases.parquet", lambda part: pq.write_table(table, part))
    asked = [*direct, *(["human"] if human is not None else [])]
    summary = summarize(
        rows,
        asked,
        benchmark.group,
        benchmark.sections,
        benchmark.products,
        confidence,
        num_resamples,
        ratios=benchmark.ratios,
    )
    results = {"format": FORMAT, "summary": summary, "counts": counts, "reasons": dict(reasons.most_common())}
    results |= {"confidence": confidence, "num_resamples": num_resamples, "bootstrap_seed": 0}
    write_json(folder / "results.json", results)


def _read_edit_lines(folder: Path) -> dict[str, dict[str, Any]]:
    """The line about each case's edit: the one about the file that exists, otherwise the last."""
    lines: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("edits-*.jsonl")):
        for number, line, text in read_jsonl(file):
            if line is None or not isinstance(line.get("id"), str):
                logger.warning("Skipped: %s, line %d is incomplete: %r.", file, number, text[:60])
            elif not _is_intact(folder, lines.get(line["id"])):
                lines[line["id"]] = line
    return lines


def _read_score_lines(folder: Path, edits: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last complete line about the scores of each existing edit, or the last one if none is complete."""
    lines: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("scores-*.jsonl")):
        for number, line, text in read_jsonl(file):
            if line is None or not isinstance(line.get("id"), str) or "values" not in line:
                logger.warning("Skipped: %s, line %d is incomplete: %r.", file, number, text[:60])
                continue
            case_id = line["id"]
            if line.get("sha") == edits.get(case_id, {}).get("sha") and (
                case_id not in lines or None in lines[case_id]["values"].values()
            ):
                lines[case_id] = line
    return lines


def _is_intact(folder: Path, line: dict[str, Any] | None) -> bool:
    """Whether the edit that a line is about exists as it was written."""
    if line is None or "sha" not in line:
        return False
    file = _edit_file(folder, line["id"])
    return file.is_file() and _digest(file.read_bytes()) == line["sha"]


def _edit_file(folder: Path, case_id: str) -> Path:
    return folder / "edits" / f"{file_name(case_id)}.png"


def _write_edit(folder: Path, case_id: str, edit: Image.Image) -> str:
    """Writes an edit. Returns the digest of its file."""
    content = png_bytes(edit)
    write_atomically(_edit_file(folder, case_id), lambda part: part.write_bytes(content))
    return _digest(content)


def _write_reference(folder: Path, case_id: str, number: int, image: Image.Image) -> str:
    """Writes a small copy of a reference image. Returns its path in the folder."""
    # A quoted id holds no "+", so the files of two cases never collide.
    path = f"references/{file_name(case_id)}{f'+{number}' if number else ''}.jpg"
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    write_atomically(folder / path, lambda part: small.save(part, "JPEG", quality=92))
    return path


def _reference_size(edit: Image.Image, references: list[Image.Image]) -> tuple[int, int]:
    """The size of the reference image whose aspect ratio is nearest to the edit's."""
    ratio = edit.width / edit.height
    return min((image.size for image in references), key=lambda size: abs(np.log(size[0] / size[1] / ratio)))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
