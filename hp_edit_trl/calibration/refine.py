"""
Refining a scorer prompt against the ratings of people: two revisions are compared on held-out cases, and a model may be asked
for questions to add (HP-Edit, section 4.1).
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

from ..cases import case_images, check_edits, edit_keys, without_decoding
from ..judges import Judge
from ..judges.base import without_reasoning
from ..ratings import Rating
from ..rewards import HPScorerReward, ScorerPrompt, load_scorer_prompts, read_scorer_prompt
from ..utils.files import append_jsonl, read_jsonl
from ..utils.images import UnreadableImageError, read_image
from ..utils.seeding import seeded_generator
from .agreement import agreement_difference


logger = logging.getLogger(__name__)

# Statistics of agreement, and whether more of it is better
DIRECTION = {"pearson": 1, "spearman": 1, "kendall": 1, "mae": -1}


def is_held_out(case_id: str, validation_fraction: float = 0.5, seed: int = 0) -> bool:
    """
    Whether a case belongs to the held-out half on which prompts are compared, and not to the one that they are tuned on.

    It depends on the id and the seed alone: a case never changes sides when others are added, and all edits of it are on the
    same side.

    Args:
        case_id (`str`):
            Id of the case.
        validation_fraction (`float`, *optional*, defaults to `0.5`):
            Share of the cases that is held out.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split.
    """
    digest = hashlib.sha256(repr((seed, "validation", case_id)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < validation_fraction


class PromptRefiner:
    r"""
    The refinement of one task's scorer prompt. It works in a folder of scorer prompts that [`HPScorerReward`] can use at any
    time: `<task>.md` is the best revision so far, `revisions/` has all that were tried, `history.jsonl` what came of each.

    A candidate is adopted if its agreement with people on the held-out cases is better than that of the current revision by more
    than the interval of the paired difference, and a permutation test says so too, see [`swap_test`]. Whoever looks often finds
    something by luck: the k-th look of a task at the held-out cases is made with a confidence of
    \\( c_k = 1 - 2 (1 - c) / (k (k + 1)) \\), and the one-sided p has to be at most \\( (1 - c_k) / 2 \\), which add up to
    \\( 1 - c \\): so much is the chance, in one folder, of adopting anything without merit. A candidate that is no better on the
    calibration cases is not looked at.

    Args:
        task (`str`):
            The task. One that has no prompt yet begins with the base prompt, as in the paper.
        scorer ([`HPScorerReward`]):
            Judge and prompts to begin with. Give it a [`CachedJudge`], so that no case is scored twice with the same prompt.
        dataset ([`~datasets.Dataset`]):
            The rated edits: `id`, `image` or `images`, `edit`, `prompt`, `task`, and optionally `editor` and `requirement`.
        ratings (`Sequence[Rating]`):
            What people said of them. Their mean is what a scorer should find.
        folder (`str` or `Path`):
            The folder of prompts. If it has none, those of `scorer` are written to it.
        statistic (`str`, *optional*, defaults to `"pearson"`):
            What is compared: `"pearson"`, `"spearman"`, `"kendall"` or `"mae"`.
        validation_fraction (`float`, *optional*, defaults to `0.5`):
            Share of the cases that is held out, see [`is_held_out`].
        confidence (`float`, *optional*, defaults to `0.95`):
            Confidence \\( c \\) of the first look at the held-out cases.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split and of the intervals.

    Raises:
        `ValueError`: If there are fewer than eight rated cases of the task on one side of the split, or an option is not valid.
    """

    def __init__(
        self,
        task: str,
        scorer: HPScorerReward,
        dataset: Dataset,
        ratings: Sequence[Rating],
        folder: str | Path,
        statistic: str = "pearson",
        validation_fraction: float = 0.5,
        confidence: float = 0.95,
        seed: int = 0,
    ):
        if statistic not in DIRECTION:
            raise ValueError(f"statistic={statistic!r} is not known: use {', '.join(DIRECTION)}.")
        if not 0 < validation_fraction < 1 or not 0.5 < confidence < 1:
            raise ValueError(
                f"validation_fraction={validation_fraction} must be in (0, 1), and confidence={confidence} in (0.5, 1)."
            )
        check_edits(dataset, "dataset")
        self.task = task
        self.judge = scorer.judge
        self.judge_description = scorer.judge_description
        self.folder = Path(folder)
        self.statistic = statistic
        self.validation_fraction = validation_fraction
        self.confidence = confidence
        self.seed = seed
        self.rubrics = sorted({rating.rubric for rating in ratings})
        self._scores: dict[str, list[float | None]] = {}

        given: dict[tuple[str, str | None], list[Rating]] = {}
        for rating in ratings:
            if rating.score is not None:
                given.setdefault((rating.id, rating.editor), []).append(rating)
        dataset = without_decoding(dataset)
        tasks = dataset["task"][:] if "task" in dataset.column_names else [task] * len(dataset)
        self.cases: list[dict[str, Any]] = []
        for i, (key, of_task) in enumerate(zip(edit_keys(dataset), tasks, strict=True)):
            if of_task != task or key not in given:
                continue
            row = dataset[i]
            try:
                sources = case_images(row, key[0])
                edit = read_image(row["edit"], f"The edit of case {key[0]!r}")
            except UnreadableImageError as error:
                logger.warning("Left out: %s", error)
                continue
            self.cases.append(
                {
                    "id": key[0],
                    "editor": key[1],
                    "prompt": row["prompt"],
                    "requirement": row.get("requirement"),
                    "sources": sources,
                    "edit": edit,
                    "ratings": given[key],
                    "human": sum(rating.score or 0 for rating in given[key]) / len(given[key]),
                    "held_out": is_held_out(key[0], validation_fraction, seed),
                }
            )
        sides = [len({case["id"] for case in self.cases if case["held_out"] == side}) for side in (False, True)]
        if min(sides) < 8:
            raise ValueError(
                f"The task {task!r} has {sides[0]} rated cases for calibration and {sides[1]} held out; eight on each side are "
                "the least that says anything (the paper rates 50 to 100). Rate more, or change validation_fraction."
            )
        # Two runs compare the same if they have the same ratings of the same edits.
        rated = sorted((case["id"], case["editor"] or "", case["human"]) for case in self.cases)
        self.data = hashlib.sha256(repr(rated).encode()).hexdigest()[:12]
        self._prepare_folder(scorer)

    def _prepare_folder(self, scorer: HPScorerReward) -> None:
        """The folder of prompts, begun with those of the scorer."""
        (self.folder / "revisions").mkdir(parents=True, exist_ok=True)
        there = load_scorer_prompts(str(self.folder)) if any(self.folder.glob("*.md")) else {}
        for prompt in scorer.scorer_prompts.values():
            if prompt.task not in there:
                prompt.save(self.folder / f"{prompt.task}.md")
        file = self.folder / f"{self.task}.md"
        if self.task not in there and self.task not in scorer.scorer_prompts:
            base = self.folder / "base.md"
            if not base.exists():
                raise ValueError(f"There is neither a prompt for {self.task!r} nor a base prompt in {self.folder}.")
            replace(read_scorer_prompt(base), task=self.task).save(file)
        if not file.exists():
            raise ValueError(f"The prompt for {self.task!r} in {self.folder} is not in {file.name}: rename its file.")
        self.current = read_scorer_prompt(file)
        if self.current.task != self.task:
            raise ValueError(f"{file} is a prompt for {self.current.task!r}: a file is named after its task here.")
        adopted = [entry for entry in self.history if entry["adopted"]]
        if adopted and adopted[-1]["before_sha"] == self.current.digest:  # killed between the history and the file
            self._adopt(read_scorer_prompt(self._revision_file(adopted[-1]["after"])))

    def _revision_file(self, name: str) -> Path:
        return self.folder / "revisions" / f"{self.task}-{name}.md"

    def _adopt(self, prompt: ScorerPrompt) -> None:
        prompt.save(self.folder / f"{self.task}.md")
        self.current = prompt

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was tried in this folder for the task, oldest first."""
        file = self.folder / "history.jsonl"
        entries = []
        for number, entry, text in read_jsonl(file) if file.exists() else ():
            if entry is None:
                logger.warning("Left out: %s, line %d: not a whole entry: %r.", file, number, text[:60])
            elif entry["task"] == self.task:
                entries.append(entry)
        return entries

    def compare(self, candidate: ScorerPrompt, questions: Sequence[str] = ()) -> dict[str, Any]:
        """
        Compares a revision with the current one, writes the result to the history, and adopts the revision if it is better.

        Args:
            candidate ([`ScorerPrompt`]):
                The revision.
            questions (`Sequence[str]`, *optional*):
                What was added to the current one, for the history.

        Returns:
            `dict`: the entry of the history: `calibration` and `validation` (`None` if it was not looked at), each with the
            statistic `before` and `after`, their `difference` with `low` and `high`, `n` and the edits without a score (`missing`);
            `look`, `adopted` and `reason`.

        Raises:
            `ValueError`: If the candidate is for another task, or has the revision of a prompt with another text.
            `ConnectionError`: If the judge does not answer.
        """
        if candidate.task != self.task:
            raise ValueError(f"The candidate is a prompt for {candidate.task!r}, not for {self.task!r}.")
        history = self.history
        known = {self.current.name: self.current.digest}
        for earlier in history:
            known |= {earlier["before"]: earlier["before_sha"], earlier["after"]: earlier["after_sha"]}
        if candidate.digest == self.current.digest:
            for earlier in history:
                if earlier["adopted"] and earlier["after_sha"] == candidate.digest:
                    return earlier
            raise ValueError(f"The candidate has the text of the current revision {self.current.name!r}.")
        if known.get(candidate.name, candidate.digest) != candidate.digest:
            raise ValueError(
                f"The candidate has the revision {candidate.name!r}, and so has a prompt with another text: give it a new one."
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
            if entry.items() <= earlier.items():  # no second look at the same
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
            entry["reason"] = "no better on the calibration cases"
        else:
            look = 1 + sum(previous["look"] is not None for previous in history)
            confidence = 1 - 2 * (1 - self.confidence) / (look * (look + 1))
            result = self._difference(candidate, held_out=True, confidence=confidence)
            entry |= {"look": look, "validation": result}
            if result["gain"] is None:
                entry["reason"] = f"the agreement on the held-out cases is not defined: {result['reason']}"
            elif result["missing_after"] > result["missing_before"]:
                entry["reason"] = "more edits stay without a score"
            elif result["gain_low"] <= 0:
                entry["reason"] = "the gain on the held-out cases is within its interval"
            elif result["p"] > (1 - confidence) / 2:
                entry["reason"] = "the gain on the held-out cases may be chance"
            else:
                entry |= {"adopted": True, "reason": "better on the held-out cases, beyond the interval"}
        entry["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        append_jsonl(self.folder / "history.jsonl", [entry])
        if entry["adopted"]:
            self._adopt(candidate)
        return entry

    def propose(self, proposer: Judge, num_examples: int = 6) -> tuple[ScorerPrompt, list[str]]:
        """
        Asks a model for questions to add to the current prompt. It is shown the prompt, the calibration cases on which scorer and
        people differ most, and what was tried before in vain.

        Args:
            proposer ([`Judge`]):
                A vision-language model that may answer at length, e.g. `ServerJudge(model, url, max_new_tokens=1024)`.
            num_examples (`int`, *optional*, defaults to `6`):
                Number of cases that it is shown.

        Returns:
            `tuple[ScorerPrompt, list[str]]`: the next revision, and the questions that were added.

        Raises:
            `ValueError`: If the answer holds no questions.
            `ConnectionError`: If there is no answer.
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
            "A judge scores edited pictures from 0 to 5 with the prompt between the lines below, and should find the scores that "
            "people gave. You see the examples on which it errs most. Find what people looked at and the prompt does not ask, "
            "and word it as one to three questions to add to the prompt. Each must help with edits of this kind in general and "
            "not with one example, be answerable from the two pictures and the instruction, and say which answer is the good "
            'one. Answer with a JSON list of strings alone, e.g. ["Is ...?"].\n\n---\n'
            f"{self.current.text}\n---"
        )
        if tried:
            text += "\n\nThese were tried and did not help; find others:\n" + "\n".join(f"- {one}" for one in tried)
        content: list[dict[str, Any]] = []
        for number, (case, score) in enumerate(known[:num_examples], start=1):
            comments = "; ".join(rating.comment for rating in case["ratings"] if rating.comment)
            content += [
                {"type": "text", "text": f"Example {number}. Instruction: {case['prompt']}\nPeople: {case['human']:.2g}. "
                 f"Judge: {score:.2g}.{f' People wrote: {comments}' if comments else ''}\nBefore:"},
                *({"type": "image", "image": source} for source in case["sources"]),
                {"type": "text", "text": "After:"},
                {"type": "image", "image": case["edit"]},
            ]  # fmt: skip
        system = {"role": "system", "content": [{"type": "text", "text": text}]}
        (reply,) = proposer([[system, {"role": "user", "content": content}]])
        if not reply.answered:
            raise ConnectionError(f"The proposer gave no answer: {reply.answer}")
        questions = parse_questions(reply.answer)
        used = [self.current.name, *(entry["after"] for entry in self.history)]
        number = max((int(name) for name in used if name.isdigit()), default=len(used)) + 1
        text = add_questions(self.current.text, questions)
        return ScorerPrompt(self.task, f"{self.folder}:{self.task}:{number}", text), questions

    def scores(self, prompt: ScorerPrompt) -> list[float | None]:
        """The judge's scores of the task's cases with a prompt."""
        key = prompt.digest
        if key not in self._scores:
            scorer = HPScorerReward(self.judge)
            scorer.scorer_prompts = {self.task: prompt}
            found: list[float | None] = []
            bar = tqdm(total=len(self.cases), desc=f"Scoring with {self.task} {prompt.name}", unit="edit")
            with bar:
                for start in range(0, len(self.cases), 64):
                    chunk = self.cases[start : start + 64]
                    judged = scorer.judge(
                        [
                            scorer.conversation(
                                case["prompt"], case["edit"], case["sources"], self.task, case["requirement"]
                            )
                            for case in chunk
                        ]
                    )
                    for case, judgement in zip(chunk, judged, strict=True):
                        if not judgement.answered:  # it says nothing of the prompt
                            raise ConnectionError(
                                f"The judge gave no answer for case {case['id']!r}: {judgement.answer} Run it again; if it "
                                "cannot judge this edit at all, take its ratings out."
                            )
                    found += [judgement.score for judgement in judged]
                    bar.update(len(chunk))
            self._scores[key] = found
        return self._scores[key]

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
        )
        sign = DIRECTION[self.statistic]
        edge = result["low"] if sign > 0 else result["high"]
        p = None
        if held_out and result["difference"] is not None:
            both = [(i, a, b) for i, a, b in zip(side, before, after, strict=True) if a is not None and b is not None]
            human, old, new = np.array([(self.cases[i]["human"], a, b) for i, a, b in both], dtype=float).T
            ids = [self.cases[i]["id"] for i, *_ in both]
            p = swap_test(human, old, new, ids, self.statistic, math.ceil(40 / (1 - confidence)), self.seed)
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
        """The history as a Markdown table."""
        rows = [
            "| revision | against | agreement | calibration | held out | gain, interval | p | adopted |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for entry in self.history:
            known, unseen = entry["calibration"], entry["validation"] or {}
            ends = [unseen.get("low"), unseen.get("high")]
            if DIRECTION[entry["statistic"]] < 0:
                ends = [None if end is None else -end for end in reversed(ends)]
            p = unseen.get("p")
            rows.append(
                f"| {entry['after']} | {entry['before']} | {entry['statistic']} "
                f"| {_number(known['before'])} → {_number(known['after'])} "
                f"| {_number(unseen.get('before'))} → {_number(unseen.get('after'))} "
                f"| {_number(unseen.get('gain'), '+')} ({_number(ends[0], '+')} to {_number(ends[1], '+')}) "
                f"| {'–' if p is None else f'{p:.2g}'} | {'yes' if entry['adopted'] else 'no'}: {entry['reason']} |"
            )
        return "\n".join(rows)


def swap_test(
    human: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    clusters: Sequence[str],
    statistic: str,
    num_permutations: int,
    seed: int = 0,
) -> float:
    """
    One-sided p-value of a paired permutation test: how often the scores of `after` agree with people better than those of `before`
    by as much as they do, if the two are swapped case by case at random. If neither has merit over the other, p is below any level
    with at most that probability, however few the cases.

    Args:
        human (`np.ndarray`):
            What people gave each edit, of shape `(edits,)`.
        before (`np.ndarray`):
            The scores with the one prompt, of the same shape.
        after (`np.ndarray`):
            The scores with the other.
        clusters (`Sequence[str]`):
            The case of each edit; the edits of a case are swapped together.
        statistic (`str`):
            `"pearson"`, `"spearman"`, `"kendall"` or `"mae"`.
        num_permutations (`int`):
            How many.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the permutations.
    """

    def coded(values: np.ndarray) -> np.ndarray:
        # Spearman's correlation is Pearson's of ranks, and Kendall's tau-b that of the signs of all differences.
        if statistic == "pearson":
            return values
        signs = np.sign(values[..., :, None] - values[..., None, :])
        return signs.sum(-1) if statistic == "spearman" else signs.reshape(*values.shape[:-1], -1)

    def agreement(rows: np.ndarray) -> np.ndarray:
        if statistic == "mae":
            return -np.abs(rows - human).mean(-1)
        x, y = (values - values.mean(-1, keepdims=True) for values in (coded(human), coded(rows)))
        with np.errstate(invalid="ignore", divide="ignore"):
            return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))

    rng = np.random.default_rng(seeded_generator(seed, "swap test").initial_seed())
    _, case_of = np.unique(clusters, return_inverse=True)
    gain = float(agreement(after) - agreement(before))
    as_good = 0
    for start in range(0, num_permutations, 200):
        drawn = rng.integers(2, size=(min(200, num_permutations - start), case_of.max() + 1))
        swapped = drawn.astype(bool)[:, case_of]
        gains = agreement(np.where(swapped, before, after)) - agreement(np.where(swapped, after, before))
        as_good += int((~(gains < gain - 1e-12)).sum())  # what is not defined counts against the candidate
    return (1 + as_good) / (1 + num_permutations)


def parse_questions(answer: str) -> list[str]:
    """
    The questions in a proposer's answer: a JSON list of strings, alone or in a code block, after any reasoning that is closed by
    `</think>`.

    Raises:
        `ValueError`: If there is no such list, or it is empty.
    """
    text = without_reasoning(answer)
    questions = None
    for match in re.finditer(r"\[", text):  # the last list in it counts
        try:
            found = json.JSONDecoder().raw_decode(text, match.start())[0]
        except json.JSONDecodeError:
            continue
        if found and all(isinstance(one, str) and one.strip() for one in found):
            questions = found
    if not questions:
        raise ValueError(f"The proposer answered no JSON list of questions: {answer[:300]!r}")
    return [" ".join(one.replace("{", "(").replace("}", ")").split()) for one in questions]


def add_questions(text: str, questions: Sequence[str]) -> str:
    """
    A scorer prompt with further questions: at the end of its numbered list, or, if it has none, as a list after the paragraph that
    holds the instruction.

    Args:
        text (`str`):
            The prompt.
        questions (`Sequence[str]`):
            The questions.
    """
    items = list(re.finditer(r"^(\d+)\. .*(?:\n {2,}.*)*", text, re.MULTILINE))
    if items:
        # The first list: its numbers go up by one
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
