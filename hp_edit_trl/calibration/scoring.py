"""Scores for whole datasets of edits: resumable, with a report of what they cost; and probes of a judge's biases."""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from ..cases import case_images, check_edits, edit_keys, without_decoding
from ..judges.base import Judgement
from ..rewards.hp_scorer import HPScorerReward
from ..utils.files import append_jsonl, read_jsonl
from ..utils.images import UnreadableImageError, read_image
from ..utils.seeding import seeded_generator


logger = logging.getLogger(__name__)


@dataclass
class JudgingReport:
    """
    What a run of [`score_dataset`] did and what it cost.

    Args:
        judgements (`list[Judgement]`):
            Those of this run.
        kept (`int`, *optional*, defaults to `0`):
            Number of scores that were in the file before.
        unreadable (`list[str]`):
            For each edit with an image that cannot be decoded, why.
        seconds (`float`, *optional*, defaults to `0.0`):
            How long the run took.
    """

    judgements: list[Judgement] = field(default_factory=list)
    kept: int = 0
    unreadable: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def table(self, input_price: float | None = None, output_price: float | None = None) -> str:
        """
        The report as a Markdown table.

        Args:
            input_price (`float`, *optional*):
                Price of a million tokens that the judge reads.
            output_price (`float`, *optional*):
                Price of a million tokens that it writes.
        """
        asked = [one for one in self.judgements if not one.cached]
        read = sum(one.input_tokens for one in asked)
        written = sum(one.output_tokens for one in asked)
        rows: list[tuple[str, Any]] = [
            ("scores kept from before", self.kept),
            ("scores given", sum(one.score is not None for one in self.judgements)),
            ("of these from the cache", len(self.judgements) - len(asked)),
            ("answers without a score", sum(one.score is None and one.answered for one in self.judgements)),
            ("no answer", sum(not one.answered for one in self.judgements)),
            ("images that cannot be decoded", len(self.unreadable)),
            ("time", f"{self.seconds:.1f} s"),
        ]
        if asked:
            latency = np.quantile([one.seconds for one in asked], [0.5, 0.95])
            rows += [
                ("judgements per second", f"{len(asked) / max(self.seconds, 1e-9):.2f}"),
                ("time of a judgement, median and 95 %", f"{latency[0]:.3g} s, {latency[1]:.3g} s"),
                ("tokens read, written", f"{read}, {written}" if read else "not told by the judge"),
            ]
            if input_price is not None and output_price is not None and read:
                cost = (read * input_price + written * output_price) / 1e6
                rows.append(("cost, in all and per 1,000", f"{cost:.4g}, {1000 * cost / len(asked):.4g}"))
        return "\n".join(["| what | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def score_dataset(scorer: HPScorerReward, dataset: Dataset, file: str | Path, chunk_size: int = 64) -> JudgingReport:
    """
    Scores all edits of a dataset and appends the scores to a file, one JSON line each. Stop it at any time and run it again: it
    goes on with the edits that have no score yet, and redoes at most `chunk_size`.

    A line holds `id`, `editor`, `task`, `score` (`null` if there is none), `answer`, `judge`, `scorer_prompt` (revision), `scorer_prompt_sha`,
    `case_sha` (a hash of prompt and images), `score_mode` and `time`. Read it with [`read_scores`]. An edit whose instruction or
    images are others than when it was scored is scored again.

    Args:
        scorer ([`HPScorerReward`]):
            The scorer.
        dataset ([`~datasets.Dataset`]):
            The edits: `id`, `image` or `images`, `edit`, `prompt`, and optionally `editor`, `task` and `requirement`.
        file (`str` or `Path`):
            The file of scores.
        chunk_size (`int`, *optional*, defaults to `64`):
            Number of edits that are handed to the judge, and written, together.

    Returns:
        [`JudgingReport`]: what was done.

    Raises:
        `ValueError`: If the dataset is not one of edits, a task has no prompt, or the file holds scores of another judge or of
            other prompts.
        `ConnectionError`: If the judge gave no answer to eight edits in a row. What was scored before is kept.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1.")
    start = perf_counter()
    check_edits(dataset, "dataset")
    dataset = without_decoding(dataset)
    tasks = dataset["task"][:] if "task" in dataset.column_names else [None] * len(dataset)
    scorer.check_tasks([scorer.task or task for task in tasks])
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    before = read_scores(file) if file.exists() else []
    scorer.load()
    _check_same_scorer(scorer, tasks, before, file)
    keys = edit_keys(dataset)
    shas = {key: _case_sha(row) for key, row in zip(keys, dataset, strict=True)}
    scored = {(line["id"], line["editor"]) for line in before if line["score"] is not None}
    changed = {
        key
        for line in before
        if (key := (line["id"], line["editor"])) in scored and line.get("case_sha") != shas.get(key)
    }
    if changed & shas.keys():
        logger.warning(
            "%d edits were changed since they were scored, and are scored again.", len(changed & shas.keys())
        )
    scored -= changed

    report = JudgingReport(kept=sum(key in scored for key in keys))
    # The edits of a case follow each other, so that a judge in the process reads their source once.
    first = {case_id: number for number, (case_id, _) in reversed(list(enumerate(keys)))}
    rows = sorted((i for i, key in enumerate(keys) if key not in scored), key=lambda i: first[keys[i][0]])
    unanswered = 0
    progress = tqdm(total=len(keys), initial=report.kept, desc="Scoring", unit="edit")
    with progress:
        for position in range(0, len(rows), chunk_size):
            chunk = rows[position : position + chunk_size]
            conversations, readable, lines = [], [], {}
            for i in chunk:
                row, (case_id, editor) = dataset[i], keys[i]
                by = "" if editor is None else f" by {editor!r}"
                try:
                    if row["edit"] is None:
                        raise UnreadableImageError(f"Case {case_id!r} has no edit{by}.")
                    edit = read_image(row["edit"], f"The edit of case {case_id!r}{by}")
                    sources = case_images(row, case_id)
                except UnreadableImageError as error:
                    logger.warning("%s", error)
                    report.unreadable.append(str(error))
                    lines[i] = Judgement(None, str(error), answered=False)
                    continue
                conversations.append(
                    scorer.conversation(row["prompt"], edit, sources, tasks[i], row.get("requirement"))
                )
                readable.append(i)
            judged = dict(zip(readable, scorer.judge(conversations), strict=True)) if readable else {}
            report.judgements += judged.values()
            for i, judgement in judged.items():
                if judgement.score is None:
                    logger.warning("No score for case %s: the judge answered %r.", keys[i], judgement.answer[:200])
            _append(file, scorer, [(keys[i], shas[keys[i]], tasks[i], (lines | judged)[i]) for i in chunk])
            progress.update(len(chunk))
            for judgement in judged.values():
                unanswered = 0 if judgement.answered else unanswered + 1
            if unanswered >= 8:
                raise ConnectionError(
                    f"The judge gave no answer to {unanswered} edits in a row; the last time: "
                    f"{judged[readable[-1]].answer} What was scored is kept in {file}: run it again to go on."
                )
    report.seconds = perf_counter() - start
    return report


def read_scores(path: str | Path) -> list[dict[str, Any]]:
    """
    Reads a file of scores that [`score_dataset`] wrote.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `list[dict]`: one for each edit, the last line with a score, or the last of those without; a line that a kill cut off
        is left out and reported.

    Raises:
        `FileNotFoundError`: If there is no file.
        `ValueError`: If a score is not in [0, 5].
    """
    lines: dict[tuple[str, str | None], dict[str, Any]] = {}
    for number, line, text in read_jsonl(path):
        if (
            line is None
            or not isinstance(line.get("id"), str)
            or not isinstance(line.get("editor"), str | None)
            or "score" not in line
        ):
            logger.warning("Left out: %s, line %d: not a whole score: %r.", path, number, text[:60])
            continue
        key, score = (line["id"], line.get("editor")), line["score"]
        if score is not None and (
            isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 5
        ):
            raise ValueError(f"{path}, line {number}: the score {score!r} of case {key[0]!r} is not between 0 and 5.")
        previous = lines.get(key)
        # A failure does not take back a score of the same images.
        if (
            score is not None
            or previous is None
            or previous["score"] is None
            or previous.get("case_sha") != line.get("case_sha")
        ):
            lines[key] = {"editor": None, **line}
    return list(lines.values())


def _scorer_of(scorer: HPScorerReward, task: str | None) -> dict[str, str]:
    prompt = scorer.scorer_prompt(task)
    return {"judge": scorer.judge_description, "scorer_prompt": prompt.revision, "scorer_prompt_sha": prompt.digest}


def _check_same_scorer(
    scorer: HPScorerReward, tasks: Sequence[str | None], lines: list[dict[str, Any]], file: Path
) -> None:
    now = {task: _scorer_of(scorer, task) for task in set(tasks)}
    for line in lines:
        for name, value in now.get(line.get("task"), {}).items():
            if line["score"] is not None and line.get(name) != value:
                raise ValueError(
                    f"{file} holds scores of another scorer: for the task {line.get('task')!r} its {name} is {line.get(name)!r}, "
                    f"now it is {value!r}. Scores of two scorers do not mix: name another file."
                )


def _case_sha(row: dict[str, Any]) -> str:
    """A hash of what is judged: instruction, requirement, task, and the images as they are stored."""
    digest = hashlib.sha256(repr([row.get(name) for name in ("prompt", "requirement", "task")]).encode())
    for value in [row.get("image"), *(row.get("images") or []), row["edit"]]:
        content = value.get("bytes") if isinstance(value, dict) else None
        path = value.get("path") if isinstance(value, dict) else value
        if content is None and isinstance(path, str) and os.path.isfile(path):
            content = Path(path).read_bytes()
        digest.update(hashlib.sha256(content if content is not None else repr(path).encode()).digest())
    return digest.hexdigest()[:16]


def _append(
    file: Path, scorer: HPScorerReward, judged: list[tuple[tuple[str, str | None], str, str | None, Judgement]]
) -> None:
    mode = scorer.judge.identity.get("score_mode")
    append_jsonl(
        file,
        [
            {
                "id": case_id,
                "editor": editor,
                "task": task,
                "score": judgement.score,
                "answer": judgement.answer,
                **_scorer_of(scorer, task),
                "case_sha": sha,
                "score_mode": mode,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            for (case_id, editor), sha, task, judgement in judged
        ],
    )


PROBES = {
    "as given": "the edit, as it is",
    "edit first": "the same, but the edit is shown before the source",
    "roles swapped": "the edit is called the source, and the source the edit",
    "unchanged": "the source itself is called the edit",
    "unrelated": "the edit of another case",
}


def probe_judge(scorer: HPScorerReward, dataset: Dataset, num_cases: int = 50, seed: int = 0) -> list[dict[str, Any]]:
    """
    Probes a judge for biases, with edits whose scores should be known.

    The order in which the images are shown should not matter. A source that was not edited and the edit of another case should
    score 0 or 1. A source and an edit with their roles swapped should score low too, unless the instruction means the same both
    ways.

    Args:
        scorer ([`HPScorerReward`]):
            The scorer.
        dataset ([`~datasets.Dataset`]):
            Edits, as in [`score_dataset`].
        num_cases (`int`, *optional*, defaults to `50`):
            Largest number of cases, drawn at random, one edit of each.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.

    Returns:
        `list[dict]`: for each probe its name, what it shows (`shown`), the number of scores, of cases without one (`failed`),
        the mean score, the share of scores of at most 1 (`low`), and the mean difference (`shift`) and mean absolute difference
        (`change`) from the same case as given. What is not known is `None`.

    Raises:
        `ValueError`: If there are not two cases with readable images, or the dataset is not one of edits.
    """
    if num_cases < 2:
        raise ValueError(f"num_cases={num_cases}: a judge is probed with two or more cases.")
    check_edits(dataset, "dataset")
    dataset = without_decoding(dataset)
    keys = edit_keys(dataset)
    rows = list({case_id: i for i, (case_id, _) in reversed(list(enumerate(keys)))}.values())
    rows.sort(key=lambda i: seeded_generator(seed, "probe", keys[i][0]).initial_seed())
    cases: list[tuple[dict[str, Any], list[Image.Image], Image.Image]] = []
    for i in rows:
        row, (case_id, _) = dataset[i], keys[i]
        try:
            cases.append((row, case_images(row, case_id), read_image(row["edit"], f"The edit of case {case_id!r}")))
        except UnreadableImageError as error:
            logger.warning("Left out: %s", error)
        if len(cases) == num_cases:
            break
    if len(cases) < 2:
        raise ValueError(f"A judge is probed with two or more cases, but there are {len(cases)} with readable images.")
    scorer.check_tasks([scorer.task or row.get("task") for row, *_ in cases])
    scorer.load()

    scores: dict[str, list[float | None]] = {}
    for name in PROBES:
        conversations = []
        for number, (row, sources, edit) in enumerate(cases):
            # An edit of another size would give itself away.
            other = cases[(number + 1) % len(cases)][2].resize(edit.size)
            swapped = [*sources[:-1], edit.resize(sources[-1].size)]
            shown = {
                "as given": (edit, sources),
                "edit first": (edit, sources),
                "roles swapped": (sources[-1].resize(edit.size), swapped),
                "unchanged": (sources[-1].resize(edit.size), sources),
                "unrelated": (other, sources),
            }[name]
            conversation = scorer.conversation(row["prompt"], *shown, row.get("task"), row.get("requirement"))
            if name == "edit first":
                content = conversation[1]["content"]
                conversation[1]["content"] = content[-2:] + content[:-2]
            conversations.append(conversation)
        scores[name] = [judgement.score for judgement in scorer.judge(conversations)]

    table = []
    for name, values in scores.items():
        known = [value for value in values if value is not None]
        shifts = [b - a for a, b in zip(scores["as given"], values, strict=True) if a is not None and b is not None]
        table.append(
            {
                "probe": name,
                "shown": PROBES[name],
                "scores": len(known),
                "failed": len(values) - len(known),
                "mean": float(np.mean(known)) if known else None,
                "low": float(np.mean([value <= 1 for value in known])) if known else None,
                "shift": float(np.mean(shifts)) if shifts else None,
                "change": float(np.mean(np.abs(shifts))) if shifts else None,
            }
        )
    return table
