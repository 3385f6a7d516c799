"""Scores of whole datasets of edits: resumable, with a summary of what they cost."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from ..cases import EditKey, case_images, check_edits, edit_keys, max_references, without_decoding
from ..judges import FailureLimit, Judgement, JudgeTally
from ..rewards import HPScorerReward
from ..utils.files import append_jsonl, check_unchanged, read_jsonl
from ..utils.images import UnreadableImageError, image_digest, read_image
from ..utils.tables import markdown_table


logger = logging.getLogger(__name__)

FILE = "scores.jsonl"


@dataclass
class ScoringSummary:
    """
    Counts and costs of a run of [`score_dataset`].

    Args:
        judgements (`list[Judgement]`):
            The judgements of this run.
        kept (`int`, *optional*, defaults to `0`):
            Number of scores that were in the file before.
        unreadable (`list[str]`):
            The reason for each edit that cannot be judged, e.g. because of an image that cannot be decoded.
        seconds (`float`, *optional*, defaults to `0.0`):
            Duration of the run.
    """

    judgements: list[Judgement] = field(default_factory=list)
    kept: int = 0
    unreadable: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def table(self, input_price: float | None = None, output_price: float | None = None) -> str:
        """
        Returns the summary as a Markdown table.

        Args:
            input_price (`float`, *optional*):
                Price of a million input tokens of the judge.
            output_price (`float`, *optional*):
                Price of a million output tokens.
        """
        asked = [one for one in self.judgements if not one.cached]
        tally = JudgeTally().add(self.judgements)
        read = sum(one.input_tokens for one in asked)
        written = sum(one.output_tokens for one in asked)
        rows: list[list[Any]] = [
            ["scores kept from before", self.kept],
            ["new scores", sum(one.score is not None for one in self.judgements)],
            ["judgements from the cache", len(self.judgements) - len(asked)],
            ["answers without a score", sum(one.score is None and one.answered for one in self.judgements)],
            ["no answer", sum(not one.answered for one in self.judgements)],
            ["failures by kind", tally.by_kind() or "none"],
            ["bad cases", len(self.unreadable)],
            ["time", f"{self.seconds:.1f} s"],
        ]
        if tally.requests:
            lost = f"{tally.retries}, {tally.seconds_lost:.1f} s"
            rows += [["requests", tally.requests], ["retries, time lost by failures", lost]]
            rows += [[f"requests to {server}", count] for server, count in tally.by_server.items()]
        if asked:
            latency = np.quantile([one.seconds for one in asked], [0.5, 0.95])
            rows += [
                ["judgements per second", f"{len(asked) / max(self.seconds, 1e-9):.2f}"],
                ["time per judgement, median and 95 %", f"{latency[0]:.3g} s, {latency[1]:.3g} s"],
                ["tokens, input and output", f"{read}, {written}" if read else "not reported by the judge"],
            ]
            if input_price is not None and output_price is not None and read:
                cost = (read * input_price + written * output_price) / 1e6
                rows.append(["cost, total and per 1,000", f"{cost:.4g}, {1000 * cost / len(asked):.4g}"])
        return markdown_table(["what", "value"], rows)


def score_dataset(
    scorer: HPScorerReward, dataset: Dataset, output_dir: str | Path, chunk_size: int = 64
) -> ScoringSummary:
    """
    Scores all edits of a dataset and appends the scores to `scores.jsonl` in a folder, one line per edit. A run that
    was stopped resumes with the edits that have no score, and repeats at most `chunk_size` judgements.

    A line holds `id`, `editor`, `task`, `score` (`null` if it is missing), `answer`, `judge`, `scorer_prompt` (its
    revision), `scorer_prompt_sha`, `case_sha` (hash of prompt and images), `score_mode` and `time`. Read the file with
    [`read_scores`]. An edit is scored again if its prompt or an image has changed.

    Args:
        scorer ([`HPScorerReward`]):
            The scorer.
        dataset ([`~datasets.Dataset`]):
            The edits: `id`, `image` or `images`, `edit`, `prompt`, and optionally `editor`, `task` and `requirement`.
        output_dir (`str` or `Path`):
            Folder of the scores.
        chunk_size (`int`, *optional*, defaults to `64`):
            Number of edits that are judged and written together.

    Returns:
        [`ScoringSummary`]: counts and costs of the run.

    Raises:
        `ValueError`: If the dataset is not a dataset of edits, a task has no scorer prompt, or the folder holds scores
            of another judge or other scorer prompts.
        `ConnectionError`: If the judge is gone: a server refuses its key, or there was no answer to eight edits in a
            row, or to more than half of 64. Earlier scores are kept.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1.")
    start = perf_counter()
    bad = check_edits(dataset, "dataset", on_bad_case="skip")
    dataset = without_decoding(dataset)
    tasks = dataset["task"][:] if "task" in dataset.column_names else [None] * len(dataset)
    scorer.check_tasks([scorer.task or task for task in tasks])
    file = Path(output_dir) / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    before = read_scores(file) if file.exists() else []
    scorer.load(1 + max_references(dataset))
    _check_same_scorer(scorer, tasks, before, file)
    keys = edit_keys(dataset)
    shas = {key: _case_sha(row) for key, row in zip(keys, dataset, strict=True)}
    sha_of_score = {(line["id"], line["editor"]): line.get("case_sha") for line in before if line["score"] is not None}
    scored = {key for key in keys if sha_of_score.get(key) == shas[key]}
    if changed := len((sha_of_score.keys() & shas.keys()) - scored):
        logger.warning("%d edits have changed since they were scored, and are scored again.", changed)

    summary = ScoringSummary(kept=len(scored))
    # The edits of a case follow each other, so that a judge in this process reads their reference images once.
    first = {case_id: number for number, (case_id, _) in reversed(list(enumerate(keys)))}
    rows = sorted((i for i, key in enumerate(keys) if key not in scored), key=lambda i: first[keys[i][0]])
    # An edit without an answer in an earlier run may be of a kind that never gets one.
    tried = {(line["id"], line["editor"]) for line in before if line.get("case_sha") in shas.values()}
    limit = FailureLimit()
    with tqdm(total=len(keys), initial=summary.kept, desc="Scoring", unit="edit") as progress:
        for position in range(0, len(rows), chunk_size):
            chunk = rows[position : position + chunk_size]
            conversations, readable, unreadable = [], [], {}
            for i in chunk:
                row, (case_id, editor) = dataset[i], keys[i]
                by = "" if editor is None else f" by {editor!r}"
                try:
                    if i in bad:
                        raise UnreadableImageError(bad[i])
                    if row["edit"] is None:
                        raise UnreadableImageError(f"Case {case_id!r} has no edit{by}.")
                    edit = read_image(row["edit"], f"The edit of case {case_id!r}{by}")
                    references = case_images(row, case_id)
                except UnreadableImageError as error:
                    logger.warning("%s", error)
                    summary.unreadable.append(str(error))
                    unreadable[i] = Judgement(None, str(error), answered=False)
                    continue
                requirement = row.get("requirement")
                conversations.append(scorer.conversation(row["prompt"], edit, references, tasks[i], requirement))
                readable.append(i)
            judged = dict(zip(readable, scorer.judge(conversations), strict=True)) if readable else {}
            summary.judgements += judged.values()
            for i, judgement in judged.items():
                if judgement.score is None:
                    logger.warning("No score for case %s: the judge answered %r.", keys[i], judgement.excerpt)
            made = unreadable | judged
            append_jsonl(file, [_line(scorer, keys[i], tasks[i], shas[keys[i]], made[i]) for i in chunk])
            progress.update(len(chunk))
            untried = [judgement for i, judgement in judged.items() if keys[i] not in tried]
            again = [judgement for i, judgement in judged.items() if keys[i] in tried]
            limit.check(untried, "edits", f"Earlier scores are kept in {file}: run it again to resume.", again)
    summary.seconds = perf_counter() - start
    return summary


def read_scores(path: str | Path) -> list[dict[str, Any]]:
    """
    Reads the scores written by [`score_dataset`].

    Args:
        path (`str` or `Path`):
            The folder, or the file in it.

    Returns:
        `list[dict]`: one line per edit, the last one with a score if there is one. An incomplete line, e.g. after a
        crash, is left out and reported.

    Raises:
        `FileNotFoundError`: If there is no file.
        `ValueError`: If a score is not in [0, 5].
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    lines: dict[EditKey, dict[str, Any]] = {}
    for number, line, text in read_jsonl(file):
        if (
            line is None
            or not isinstance(line.get("id"), str)
            or not isinstance(line.get("editor"), str | None)
            or "score" not in line
        ):
            logger.warning("Left out: %s, line %d: not a complete score: %r.", file, number, text[:60])
            continue
        key, score = (line["id"], line.get("editor")), line["score"]
        number_given = isinstance(score, int | float) and not isinstance(score, bool)
        if score is not None and not (number_given and 0 <= score <= 5):
            raise ValueError(f"{file}, line {number}: the score {score!r} of case {key[0]!r} is not between 0 and 5.")
        previous = lines.get(key)
        # A later failure does not replace a score of the same images.
        same_images = previous is not None and previous.get("case_sha") == line.get("case_sha")
        if score is not None or previous is None or previous["score"] is None or not same_images:
            lines[key] = {"editor": None, **line}
    return list(lines.values())


def _made_with(scorer: HPScorerReward, task: str | None) -> dict[str, str]:
    prompt = scorer.scorer_prompt(task)
    return {"judge": scorer.judge_description, "scorer_prompt": prompt.revision, "scorer_prompt_sha": prompt.digest}


def _check_same_scorer(
    scorer: HPScorerReward, tasks: Sequence[str | None], lines: list[dict[str, Any]], file: Path
) -> None:
    now = {task: _made_with(scorer, task) for task in set(tasks)}
    for line in lines:
        task = line.get("task")
        if line["score"] is not None and task in now:
            before = {name: line.get(name) for name in now[task]}
            remedy = "choose another output_dir, because scores of different scorers must not be mixed"
            check_unchanged(f"{file} holds scores for the task {task!r}", before, now[task], remedy)


def _case_sha(row: dict[str, Any]) -> str:
    """Hashes what is judged: prompt, requirement, task, and the images as they are stored."""
    digest = hashlib.sha256(repr([row.get(name) for name in ("prompt", "requirement", "task")]).encode())
    for value in [row.get("image"), *(row.get("images") or []), row["edit"]]:
        digest.update(image_digest(value))
    return digest.hexdigest()[:16]


def _line(
    scorer: HPScorerReward, key: EditKey, task: str | None, case_sha: str, judgement: Judgement
) -> dict[str, Any]:
    return {
        "id": key[0],
        "editor": key[1],
        "task": task,
        "score": judgement.score,
        "answer": judgement.answer,
        **_made_with(scorer, task),
        "case_sha": case_sha,
        "score_mode": scorer.judge.identity.get("score_mode"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
