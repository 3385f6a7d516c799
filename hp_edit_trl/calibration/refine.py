"""
Refinement of a scorer prompt against ratings: revisions are compared on held-out cases, and a model can propose
questions to add (HP-Edit, section 4.1).
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from ..cases import EditKey, case_images, check_edits, edit_keys, without_decoding
from ..judges import Judge, without_reasoning
from ..judges.failures import check_not_refused
from ..ratings import Rating
from ..rewards import HPScorerReward, ScorerPrompt, load_scorer_prompts, read_scorer_prompt
from ..utils.files import append_jsonl, file_name, read_jsonl
from ..utils.images import UnreadableImageError, read_image
from ..utils.tables import format_estimate, markdown_table
from ..utils.texts import quoted
from .acceptance import DIRECTION, one_sided_level, swap_test
from .agreement import CORRELATIONS, agreement_difference, mean_agreement


logger = logging.getLogger(__name__)

BASE = "base"  # the task of the prompt that all tasks share
MIN_CALIBRATION, MIN_HELD_OUT = 5, 8  # cases


def is_held_out(case_id: str, validation_fraction: float = 0.8, seed: int = 0) -> bool:
    """
    Returns whether a case is held out for the comparison of prompts. The other cases (calibration) may be used to
    write them.

    It depends only on the id and the seed: a case never changes sides when others are added, and all its edits are on
    the same side.

    Args:
        case_id (`str`):
            Id of the case.
        validation_fraction (`float`, *optional*, defaults to `0.8`):
            Share of the cases that are held out.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split.
    """
    digest = hashlib.sha256(repr((seed, "validation", case_id)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < validation_fraction


def scores_by_edit(ratings: Sequence[Rating]) -> dict[EditKey, list[Rating]]:
    """Groups the ratings by edit, without those that were skipped."""
    given: dict[EditKey, list[Rating]] = {}
    for rating in ratings:
        if rating.score is not None:
            given.setdefault(rating.edit, []).append(rating)
    return given


def check_refinement(
    statistic: str = "pearson",
    validation_fraction: float = 0.8,
    confidence: float = 0.95,
    rounds: int = 1,
    target: float | None = None,
) -> None:
    """Raises a `ValueError` if an option of [`PromptRefiner`] or of [`PromptRefiner.refine`] is not valid."""
    if statistic not in DIRECTION:
        raise ValueError(f"statistic={statistic!r} is unknown: use one of {', '.join(DIRECTION)}.")
    if not 0 < validation_fraction < 1 or not 0.5 < confidence < 1:
        raise ValueError(
            f"validation_fraction={validation_fraction} must be in (0, 1), and confidence={confidence} in (0.5, 1)."
        )
    if rounds < 0:
        raise ValueError(f"rounds={rounds} must not be negative.")
    low, high = (-1, 1) if statistic in CORRELATIONS else (0, 5)
    if target is not None and not low <= target <= high:
        raise ValueError(f"target={target} is no value of the statistic {statistic}: use one from {low} to {high}.")


def check_rated(
    task: str,
    ids: Sequence[str],
    human: Sequence[float],
    statistic: str = "pearson",
    validation_fraction: float = 0.8,
    seed: int = 0,
) -> None:
    """
    Checks that a task has enough ratings to refine its prompt.

    Args:
        task (`str`):
            The task.
        ids (`Sequence[str]`):
            Id of the case of each rated edit.
        human (`Sequence[float]`):
            Score of each by people.
        statistic, validation_fraction, seed:
            See [`PromptRefiner`].

    Raises:
        `ValueError`: If fewer than five rated cases are for calibration, or fewer than eight are held out, or people
            gave all edits of a side the same score.
    """
    sides = np.array([is_held_out(case_id, validation_fraction, seed) for case_id in ids], bool)
    counts = [len({case for case, side in zip(ids, sides, strict=True) if side == held_out}) for held_out in (0, 1)]
    if counts[0] < MIN_CALIBRATION or counts[1] < MIN_HELD_OUT:
        raise ValueError(
            f"The task {task!r} has {counts[0]} rated cases for calibration and {counts[1]} held out; at least "
            f"{MIN_CALIBRATION} and {MIN_HELD_OUT} are needed (the paper rates 50 to 100). Rate more cases, or change "
            "validation_fraction."
        )
    if statistic in CORRELATIONS and np.ptp(np.asarray(human)[sides]) == 0:
        raise ValueError(
            f"People gave all held-out edits of the task {task!r} the same score, so that no correlation is defined. "
            "Have better and worse edits rated, e.g. by several editors, or use the statistic mae."
        )


def read_history(folder: str | Path, task: str | None = None) -> list[dict[str, Any]]:
    """
    Reads the comparisons of a folder of prompts, oldest first. An incomplete line is left out and reported.

    Args:
        folder (`str` or `Path`):
            The folder.
        task (`str`, *optional*):
            Read only those of this task.
    """
    file = Path(folder) / "history.jsonl"
    entries = []
    for number, entry, text in read_jsonl(file) if file.exists() else ():
        if entry is None:
            logger.warning("Left out: %s, line %d: not a complete entry: %r.", file, number, text[:60])
        elif task in (entry["task"], None):
            entries.append(entry)
    return entries


def starting_prompt(task: str, scorer: HPScorerReward, folder: str | Path, from_base: bool = False) -> ScorerPrompt:
    """
    Finds the prompt from which the refinement of a task goes on. Writes nothing.

    Args:
        task (`str`):
            The task.
        scorer ([`HPScorerReward`]):
            The initial prompts.
        folder (`str` or `Path`):
            The folder of prompts, which may not exist yet.
        from_base (`bool`, *optional*, defaults to `False`):
            See [`PromptRefiner`].

    Returns:
        [`ScorerPrompt`]: the task's prompt in the folder if there is one; else the base prompt with `from_base`; else
        the scorer's prompt for the task, or the base prompt if it has none.

    Raises:
        `ValueError`: If there is neither a prompt for the task nor a base prompt, the prompt in the folder did not
            start from the base prompt although `from_base` is set, or its file has another name than its task.
    """
    folder = Path(folder)
    there = load_scorer_prompts(str(folder)) if any(folder.glob("*.md")) else {}
    base = there.get(BASE, scorer.scorer_prompts.get(BASE))
    file = folder / f"{file_name(task)}.md"
    if file.exists() and task not in there:
        raise ValueError(
            f"{file} is a prompt for the task {read_scorer_prompt(file).task!r}: name the file after its task."
        )
    if task in there:
        if not file.exists():
            raise ValueError(f"The prompt for {task!r} in {folder} must be in {file.name}: rename its file.")
        history, of_base = read_history(folder, task), read_history(folder, BASE)
        begun = history[0]["before_sha"] if history else there[task].digest
        bases = {base.digest} if base is not None else set()
        bases |= {entry[name] for entry in of_base for name in ("before_sha", "after_sha")}
        if from_base and begun not in bases:
            raise ValueError(
                f"{folder} holds a prompt for {task!r} that did not start from the base prompt: choose another "
                "output_dir, or leave out from_base to go on with that prompt."
            )
        return there[task]
    if task in scorer.scorer_prompts and not (from_base and task != BASE):
        return scorer.scorer_prompts[task]
    if base is None:
        raise ValueError(
            f"There is neither a prompt for the task {task!r} nor a base prompt, in {folder} or among the scorer's "
            "prompts: add base.md."
        )
    return replace(base, task=task)


class PromptRefiner:
    r"""
    Refines the scorer prompt of one task, in a folder of scorer prompts that [`HPScorerReward`] can use at any time:
    `<task>.md` is the best revision so far, `revisions/` holds all candidates, `history.jsonl` their results, and
    `proposals.jsonl` the questions that were proposed.

    One fifth of the cases is for calibration: whoever writes a candidate may see them. A candidate is adopted if its
    agreement with people on the other, held-out cases is better than the current revision's by more than chance
    ([`swap_test`]). Repeated comparisons eventually produce a lucky win. Therefore the k-th look at the held-out cases
    of a task has the level \\( (1 - c) / (k (k + 1)) \\) ([`one_sided_level`]). These levels add up to
    \\( 1 - c \\), which bounds the probability of adopting anything without merit in one folder. The held-out cases
    are not used for a candidate that is no better on the calibration cases.

    Args:
        task (`str`):
            The task. A task without a prompt starts from the base prompt. `"base"` is the base prompt itself, which is
            refined on the edits of all tasks together, as in a question that all share: agreement is then the mean
            over the tasks.
        scorer ([`HPScorerReward`]):
            Judge and initial prompts. Use a [`CachedJudge`], so that no edit is scored twice with the same prompt.
        dataset ([`~datasets.Dataset`]):
            The rated edits: `id`, `image` or `images`, `edit`, `prompt`, `task`, and optionally `editor` and
            `requirement`.
        ratings (`Sequence[Rating]`):
            Their ratings. The scorer should find their mean.
        output_dir (`str` or `Path`):
            The folder of prompts. Prompts of `scorer` that it lacks are written to it.
        statistic (`str`, *optional*, defaults to `"pearson"`):
            The statistic that is compared: `"pearson"`, `"spearman"`, `"kendall"` or `"mae"`.
        validation_fraction (`float`, *optional*, defaults to `0.8`):
            Share of the cases that are held out, see [`is_held_out`].
        confidence (`float`, *optional*, defaults to `0.95`):
            Confidence \\( c \\) that nothing without merit is adopted, over all looks.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split, the test and the intervals.
        from_base (`bool`, *optional*, defaults to `False`):
            Start from the base prompt, which has the criteria alone, as the paper does, and not from the task's
            finished prompt. Of the prompts of `scorer`, only the base prompt is then written to the folder.

    Raises:
        `ValueError`: If the task has too few rated cases ([`check_rated`]), an option is not valid, the prompts in the
            folder were refined with another `seed` or a smaller `validation_fraction`, or the task's prompt in the
            folder did not start from the base prompt although `from_base` is set.
    """

    def __init__(
        self,
        task: str,
        scorer: HPScorerReward,
        dataset: Dataset,
        ratings: Sequence[Rating],
        output_dir: str | Path,
        statistic: str = "pearson",
        validation_fraction: float = 0.8,
        confidence: float = 0.95,
        seed: int = 0,
        from_base: bool = False,
    ):
        check_refinement(statistic, validation_fraction, confidence)
        bad = check_edits(dataset, "dataset", on_bad_case="skip")
        self.task = task
        self.judge = scorer.judge
        self.judge_description = scorer.judge_description
        self.folder = Path(output_dir)
        self.statistic = statistic
        self.validation_fraction = validation_fraction
        self.confidence = confidence
        self.seed = seed
        self.rubrics = sorted({rating.rubric for rating in ratings})
        self._scores: dict[str, list[float | None]] = {}

        given = scores_by_edit(ratings)
        dataset = without_decoding(dataset)
        tasks = dataset["task"][:] if "task" in dataset.column_names else [task] * len(dataset)
        self.cases: list[dict[str, Any]] = []
        for i, (key, of_task) in enumerate(zip(edit_keys(dataset), tasks, strict=True)):
            if i in bad or key not in given or task not in (of_task, BASE):
                continue
            row = dataset[i]
            try:
                references = case_images(row, key[0])
                edit = read_image(row["edit"], f"The edit of case {key[0]!r}")
            except UnreadableImageError as error:
                logger.warning("Left out: %s", error)
                continue
            self.cases.append(
                {
                    "id": key[0],
                    "editor": key[1],
                    "group": of_task or BASE,
                    "prompt": row["prompt"],
                    "requirement": row.get("requirement"),
                    "references": references,
                    "edit": edit,
                    "ratings": given[key],
                    "human": sum(rating.score or 0 for rating in given[key]) / len(given[key]),
                    "held_out": is_held_out(key[0], validation_fraction, seed),
                }
            )
        ids, human = [case["id"] for case in self.cases], [case["human"] for case in self.cases]
        check_rated(task, ids, human, statistic, validation_fraction, seed)
        # Identifies the data of a comparison: the same ratings of the same edits.
        rated = sorted((case["id"], case["editor"] or "", case["human"]) for case in self.cases)
        self.data = hashlib.sha256(repr(rated).encode()).hexdigest()[:12]
        self._prepare_folder(scorer, from_base)

    def _prepare_folder(self, scorer: HPScorerReward, from_base: bool) -> None:
        """Fills the folder with the scorer's prompts, as far as they are missing."""
        for entry in read_history(self.folder):
            # A smaller fraction holds out some of the same cases.
            if entry["seed"] != self.seed or entry["validation_fraction"] < self.validation_fraction:
                raise ValueError(
                    f"The prompts in {self.folder} were refined with seed={entry['seed']} and validation_fraction="
                    f"{entry['validation_fraction']}. With seed={self.seed} and validation_fraction="
                    f"{self.validation_fraction}, cases that questions were written from would be held out: use the "
                    "same values, or choose another output_dir."
                )
        self.current = starting_prompt(self.task, scorer, self.folder, from_base)
        (self.folder / "revisions").mkdir(parents=True, exist_ok=True)
        there = load_scorer_prompts(str(self.folder)) if any(self.folder.glob("*.md")) else {}
        for prompt in scorer.scorer_prompts.values():
            if prompt.task not in there and (prompt.task == BASE or not from_base):
                prompt.save(self.folder / f"{file_name(prompt.task)}.md")
        file = self.folder / f"{file_name(self.task)}.md"
        if not file.exists():
            self.current.save(file)
        self.current = read_scorer_prompt(file)
        history = self.history
        if not history:
            self.current.save(self._revision_file(self.current.name))
        start = self._revision_file(history[0]["before"] if history else self.current.name)
        self.start = read_scorer_prompt(start) if start.exists() else self.current
        adopted = [entry for entry in history if entry["adopted"]]
        if adopted and adopted[-1]["before_sha"] == self.current.digest:  # killed in between
            self._adopt(read_scorer_prompt(self._revision_file(adopted[-1]["after"])))

    def _revision_file(self, name: str) -> Path:
        return self.folder / "revisions" / f"{file_name(f'{self.task}-{name}')}.md"

    def _adopt(self, prompt: ScorerPrompt) -> None:
        prompt.save(self.folder / f"{file_name(self.task)}.md")
        self.current = prompt

    @property
    def history(self) -> list[dict[str, Any]]:
        """The comparisons of the task in this folder, oldest first."""
        return read_history(self.folder, self.task)

    def compare(self, candidate: ScorerPrompt, questions: Sequence[str] = ()) -> dict[str, Any]:
        """
        Compares a candidate with the current revision, adds the result to the history, and adopts the candidate if it
        is better.

        Args:
            candidate ([`ScorerPrompt`]):
                The candidate.
            questions (`Sequence[str]`, *optional*):
                The questions that were added to the current revision, for the history.

        Returns:
            `dict`: the entry of the history: `calibration` and `validation` (`None` if the held-out cases were not
            used), each with the statistic `before` and `after`, their `difference`, the `gain`, the interval, `p`, and
            the numbers of edits, cases and missing scores; and `look`, `adopted` and `reason`.

        Raises:
            `ValueError`: If the candidate is for another task, or its revision is that of a prompt with another text.
            `ConnectionError`: If the judge does not answer.
        """
        if candidate.task != self.task:
            raise ValueError(
                f"The candidate is a prompt for {candidate.task!r}, not for {self.task!r}: correct its task."
            )
        history = self.history
        known = {self.current.name: self.current.digest}
        for earlier in history:
            known |= {earlier["before"]: earlier["before_sha"], earlier["after"]: earlier["after_sha"]}
        if candidate.digest == self.current.digest:
            for earlier in history:
                if earlier["adopted"] and earlier["after_sha"] == candidate.digest:
                    return earlier
            raise ValueError(f"The candidate has the text of the current revision {self.current.name!r}: change it.")
        if known.get(candidate.name, candidate.digest) != candidate.digest:
            raise ValueError(
                f"The revision {candidate.name!r} of the candidate belongs to a prompt with another text: increase it."
            )
        entry: dict[str, Any] = {
            "task": self.task,
            "before": self.current.name,
            "before_sha": self.current.digest,
            "after": candidate.name,
            "after_sha": candidate.digest,
            "statistic": self.statistic,
            "judge": self.judge_description,
            "rubrics": self.rubrics,
            "data": self.data,
            "confidence": self.confidence,
            "validation_fraction": self.validation_fraction,
            "seed": self.seed,
        }
        for earlier in history:
            if entry.items() <= earlier.items():  # the same comparison is not another look
                return earlier
        candidate.save(self._revision_file(candidate.name))
        entry |= {
            "questions": list(questions),
            "look": None,
            "calibration": self._difference(candidate, held_out=False, confidence=self.confidence),
            "validation": None,
            "adopted": False,
        }
        if entry["calibration"]["gain"] is not None and entry["calibration"]["gain"] <= 0:
            entry["reason"] = "not better on the calibration cases"
        else:
            look = 1 + sum(previous["look"] is not None for previous in history)
            level = one_sided_level(look, self.confidence)
            result = self._difference(candidate, held_out=True, confidence=1 - 2 * level)
            entry |= {"look": look, "validation": result}
            if result["gain"] is None:
                entry["reason"] = f"the agreement on the held-out cases is undefined: {result['reason']}"
            elif result["missing_after"] > result["missing_before"]:
                entry["reason"] = "more edits have no score"
            elif result["p"] > level:
                entry["reason"] = f"the gain on the held-out cases may be chance (p must be at most {level:.2g})"
            else:
                entry |= {"adopted": True, "reason": "better on the held-out cases, by more than chance"}
        entry["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        append_jsonl(self.folder / "history.jsonl", [entry])
        if entry["adopted"]:
            self._adopt(candidate)
        return entry

    def propose(self, proposer: Judge, num_examples: int = 6) -> tuple[ScorerPrompt, list[str]]:
        """
        Asks a model for questions to add to the current prompt. It sees the prompt, the calibration edits on which
        scorer and people differ most, and the questions that were rejected before. Its proposal is kept in
        `proposals.jsonl` and `revisions/`.

        Args:
            proposer ([`Judge`]):
                A vision-language model that may give long answers, e.g. `load_judge(model, url, max_new_tokens=2048)`.
            num_examples (`int`, *optional*, defaults to `6`):
                Number of edits that it sees.

        Returns:
            `tuple[ScorerPrompt, list[str]]`: the next revision, and the questions that were added.

        Raises:
            `ValueError`: If the answer contains no questions.
            `ConnectionError`: If the model gives no answer.
        """
        scores = self.scores(self.current)
        known = [
            (case, score)
            for case, score in zip(self.cases, scores, strict=True)
            if not case["held_out"] and score is not None
        ]
        known.sort(key=lambda pair: (-abs(pair[0]["human"] - pair[1]), pair[0]["id"], pair[0]["editor"] or ""))
        tried = [question for entry in self.history if not entry["adopted"] for question in entry["questions"]]
        text = (
            "A judge scores edited pictures from 0 to 5 with the prompt between the lines below, and should find the "
            "scores that people gave. You see the examples on which it errs most. Find what people looked at and the "
            "prompt does not ask, and word it as one to three questions to add to the prompt. Each must help with "
            "edits of this kind in general and not with one example, be answerable from the two pictures and the "
            "instruction, and say which answer is the good "
            'one. Answer with a JSON list of strings alone, e.g. ["Is ...?"].\n\n---\n'
            f"{self.current.text}\n---"
        )
        if tried:
            text += "\n\nThese were tried and did not help; find others:\n" + "\n".join(f"- {one}" for one in tried)
        content: list[dict[str, Any]] = []
        for number, (case, score) in enumerate(known[:num_examples], start=1):
            comments = "; ".join(quoted(rating.comment) for rating in case["ratings"] if rating.comment)
            example = (
                f"Example {number}. Instruction: {quoted(case['prompt'])}\n"
                f"People: {case['human']:.2g}. Judge: {score:.2g}."
                f"{f' People wrote: {comments}' if comments else ''}\nBefore:"
            )
            content += [
                {"type": "text", "text": example},
                *({"type": "image", "image": reference} for reference in case["references"]),
                {"type": "text", "text": "After:"},
                {"type": "image", "image": case["edit"]},
            ]
        system = {"role": "system", "content": [{"type": "text", "text": text}]}
        (reply,) = proposer([[system, {"role": "user", "content": content}]])
        if not reply.answered:
            raise ConnectionError(f"The proposer gave no answer: {reply.excerpt}")
        questions = parse_questions(reply.answer)
        used = [self.current.name, *(entry["after"] for entry in [*self.history, *self._proposals()])]
        number = max((int(name) for name in used if name.isdigit()), default=len(used)) + 1
        text = add_questions(self.current.text, questions)
        candidate = ScorerPrompt(self.task, f"{self.folder}:{self.task}:{number}", text)
        candidate.save(self._revision_file(candidate.name))
        line = {"task": self.task, "before_sha": self.current.digest, "after": candidate.name, "questions": questions}
        append_jsonl(self.folder / "proposals.jsonl", [line])
        return candidate, questions

    def _proposals(self) -> list[dict[str, Any]]:
        file = self.folder / "proposals.jsonl"
        lines = [line for _, line, _ in read_jsonl(file)] if file.exists() else []
        return [line for line in lines if line is not None and line["task"] == self.task]

    def _pending(self) -> tuple[ScorerPrompt, list[str]] | None:
        """The last proposal, if it was not compared, e.g. because the judge failed."""
        compared = {entry["after"] for entry in self.history}
        for line in self._proposals()[-1:]:
            file = self._revision_file(line["after"])
            if line["after"] not in compared and line["before_sha"] == self.current.digest and file.exists():
                return read_scorer_prompt(file), line["questions"]
        return None

    def refine(self, proposer: Judge, rounds: int = 3, target: float | None = None) -> dict[str, Any]:
        """
        Proposes and compares revisions until the agreement with people is reached, or the rounds are used up. A second
        call resumes: it counts the rounds of earlier ones, and begins with a proposal that was not compared.

        Args:
            proposer ([`Judge`]):
                See [`~PromptRefiner.propose`].
            rounds (`int`, *optional*, defaults to `3`):
                Number of proposals for the task in this folder. 0 only measures the agreement.
            target (`float`, *optional*):
                Stop when the agreement on the held-out cases is at least this; for `"mae"`, at most.

        Returns:
            `dict`: see [`~PromptRefiner.summary`].

        Raises:
            `ValueError`: If an option is not valid, or a proposal cannot be used.
            `ConnectionError`: If the judge or the proposer does not answer. Nothing that was finished is lost.
        """
        check_refinement(self.statistic, rounds=rounds, target=target)
        self.scores(self.start)
        while True:
            self.scores(self.current)
            found = self.held_out_agreement(self.current)
            proposed = sum(bool(entry["questions"]) for entry in self.history)
            if found["value"] is None:
                reason = f"the agreement is undefined: {found['reason']}"
                reason += "; use the statistic mae" if self.statistic in CORRELATIONS else ""
            elif target is not None and DIRECTION[self.statistic] * (found["value"] - target) >= 0:
                reason = "the target is reached"
            elif proposed >= rounds:
                reason = f"{proposed} of {rounds} rounds are used"
            else:
                candidate, questions = self._pending() or self.propose(proposer)
                for question in questions:
                    logger.info("%s, revision %s: %s", self.task, candidate.name, question)
                self.compare(candidate, questions)
                continue
            return self.summary(reason)

    def held_out_agreement(self, prompt: ScorerPrompt) -> dict[str, Any]:
        """
        Measures the agreement with people on the held-out cases: `value`, `low`, `high` and `reason`, see
        [`mean_agreement`].

        Args:
            prompt ([`ScorerPrompt`]):
                The prompt.
        """
        side = [i for i, case in enumerate(self.cases) if case["held_out"]]
        scores = self.scores(prompt)
        return mean_agreement(
            [self.cases[i]["human"] for i in side],
            [scores[i] for i in side],
            clusters=[self.cases[i]["id"] for i in side],
            statistic=self.statistic,
            seed=self.seed,
            groups=[self.cases[i]["group"] for i in side],
        )

    def summary(self, reason: str) -> dict[str, Any]:
        """
        Summarizes what became of the task's prompt: `task`, `start` and `current` (revisions), `proposed` and
        `accepted` (numbers of candidates), `before` and `after` (agreement on the held-out cases with the first and
        the current revision; `None` if this process has not scored with them) and `reason`.

        Args:
            reason (`str`):
                Why it ended.
        """
        history = self.history
        before, after = (
            self.held_out_agreement(prompt) if prompt.digest in self._scores else None
            for prompt in (self.start, self.current)
        )
        return {
            "task": self.task,
            "start": self.start.name,
            "current": self.current.name,
            "proposed": len(history),
            "accepted": sum(entry["adopted"] for entry in history),
            "before": before,
            "after": after,
            "reason": reason,
        }

    def scores(self, prompt: ScorerPrompt) -> list[float | None]:
        """Returns the judge's scores of the task's edits with a prompt."""
        if prompt.digest not in self._scores:
            scorer = HPScorerReward(self.judge)
            scorer.scorer_prompts = {self.task: prompt}
            found: list[float | None] = []
            with tqdm(total=len(self.cases), desc=f"Scoring with {self.task} {prompt.name}", unit="edit") as bar:
                for start in range(0, len(self.cases), 64):
                    chunk = self.cases[start : start + 64]
                    names = ("prompt", "edit", "references", "requirement")
                    prompts, edits, references, requirements = ([case[name] for case in chunk] for name in names)
                    judged = scorer.judge_edits(prompts, edits, references, [self.task] * len(chunk), requirements)
                    check_not_refused(judged)
                    for case, judgement in zip(chunk, judged, strict=True):
                        if not judgement.answered:  # it does not depend on the prompt
                            raise ConnectionError(
                                f"The judge gave no answer for case {case['id']!r}: {judgement.excerpt} Run it again; "
                                "if the judge can never judge this edit, remove its ratings."
                            )
                    found += [judgement.score for judgement in judged]
                    bar.update(len(chunk))
            self._scores[prompt.digest] = found
        return self._scores[prompt.digest]

    def _difference(self, candidate: ScorerPrompt, held_out: bool, confidence: float) -> dict[str, Any]:
        side = [i for i, case in enumerate(self.cases) if case["held_out"] == held_out]
        before, after = ([self.scores(prompt)[i] for i in side] for prompt in (self.current, candidate))
        result = agreement_difference(
            [self.cases[i]["human"] for i in side],
            before,
            after,
            clusters=[self.cases[i]["id"] for i in side],
            statistic=self.statistic,
            confidence=confidence,
            num_resamples=2000,
            seed=self.seed,
            groups=[self.cases[i]["group"] for i in side],
        )
        sign = DIRECTION[self.statistic]
        edge = result["low"] if sign > 0 else result["high"]
        p = None
        if held_out and result["difference"] is not None:
            both = [(i, a, b) for i, a, b in zip(side, before, after, strict=True) if a is not None and b is not None]
            human, old, new = np.array([(self.cases[i]["human"], a, b) for i, a, b in both], dtype=float).T
            ids, groups = ([self.cases[i][name] for i, *_ in both] for name in ("id", "group"))
            num_permutations = math.ceil(40 / (1 - confidence))
            p = swap_test(human, old, new, ids, self.statistic, num_permutations, self.seed, groups)
        return {
            "before": result["a"],
            "after": result["b"],
            "difference": result["difference"],
            "low": result["low"],
            "high": result["high"],
            "gain": None if result["difference"] is None else sign * result["difference"],
            "gain_low": None if edge is None else sign * edge,
            "confidence": confidence,
            "p": p,
            "edits": result["n"],
            "cases": len({self.cases[i]["id"] for i in side}),
            "missing_before": sum(score is None for score in before),
            "missing_after": sum(score is None for score in after),
            "reason": result["reason"],
        }

    def table(self) -> str:
        """Returns the history as a Markdown table."""
        return history_table(self.history)


def history_table(history: Sequence[dict[str, Any]]) -> str:
    """Returns comparisons as a Markdown table, see [`read_history`]."""
    rows = []
    for entry in history:
        known, unseen = entry["calibration"], entry["validation"] or {}
        ends = [unseen.get("low"), unseen.get("high")]
        if DIRECTION[entry["statistic"]] < 0:
            ends = [None if end is None else -end for end in reversed(ends)]
        gain, low, high = (_number(value, "+") for value in (unseen.get("gain"), *ends))
        p = unseen.get("p")
        rows.append(
            [
                entry["task"],
                entry["after"],
                entry["before"],
                entry["statistic"],
                f"{_number(known['before'])} → {_number(known['after'])}",
                f"{_number(unseen.get('before'))} → {_number(unseen.get('after'))}",
                f"{gain} ({low} to {high})",
                "–" if p is None else f"{p:.2g}",
                f"{'yes' if entry['adopted'] else 'no'}: {entry['reason']}",
            ]
        )
    head = ["task", "revision", "against", "statistic", "calibration", "held out", "gain, interval", "p", "adopted"]
    return markdown_table(head, rows)


def summary_table(summaries: Sequence[dict[str, Any]]) -> str:
    """Returns summaries of tasks as a Markdown table, see [`PromptRefiner.summary`]."""
    rows = []
    for one in summaries:
        before, after = ("–" if one[name] is None else format_estimate(one[name]) for name in ("before", "after"))
        end = one["current"] if one["accepted"] else "the same"
        rows.append([one["task"], one["start"], one["proposed"], one["accepted"], end, before, after, one["reason"]])
    head = ["task", "start", "proposed", "accepted", "now", "agreement before", "agreement now", "ended because"]
    return markdown_table(head, rows)


def parse_questions(answer: str) -> list[str]:
    """
    Reads the questions in a proposer's answer: a JSON list of strings, also in a code block, after any reasoning that
    ends with `</think>`.

    Raises:
        `ValueError`: If there is no such list, or it is empty.
    """
    text = without_reasoning(answer)
    questions = None
    for match in re.finditer(r"\[", text):  # the last list counts
        try:
            found = json.JSONDecoder().raw_decode(text, match.start())[0]
        except json.JSONDecodeError:
            continue
        if found and all(isinstance(one, str) and one.strip() for one in found):
            questions = found
    if not questions:
        raise ValueError(f"The proposer's answer has no JSON list of questions: {answer[:300]!r}. Run it again.")
    return [" ".join(one.replace("{", "(").replace("}", ")").split()) for one in questions]


def add_questions(text: str, questions: Sequence[str]) -> str:
    """
    Adds questions to a scorer prompt: at the end of its numbered list or, without one, as a list after the paragraph
    with `{prompt}`.

    Args:
        text (`str`):
            The prompt.
        questions (`Sequence[str]`):
            The questions.
    """
    items = list(re.finditer(r"^(\d+)\. .*(?:\n {2,}.*)*", text, re.MULTILINE))
    if items:
        # The first list: consecutive numbers
        last = items[0]
        for item in items[1:]:
            if int(item[1]) != int(last[1]) + 1:
                break
            last = item
        start, number = last.end(), int(last[1]) + 1
        lead = ""
    else:
        end = text.find("\n\n", text.index("{prompt}"))
        start, number = (len(text) if end < 0 else end), 1
        lead = "\n\nGo through these questions in your mind before you grade:"
    added = "".join(f"\n{number + i}. {question}" for i, question in enumerate(questions))
    return text[:start] + lead + added + text[start:]


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.3f}"
