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
from scipy.stats import permutation_test
from tqdm.auto import tqdm

from ..cases import EditKey, case_images, check_edits, edit_keys, without_decoding
from ..judges import Judge, without_reasoning
from ..judges.failures import check_not_refused
from ..ratings import Rating
from ..rewards import HPScorerReward, ScorerPrompt, load_scorer_prompts, read_scorer_prompt
from ..utils.files import append_jsonl, file_name, read_jsonl
from ..utils.images import UnreadableImageError, read_image
from ..utils.seeding import seeded_generator
from ..utils.tables import markdown_table
from ..utils.texts import quoted
from .agreement import agreement_difference, statistic_of


logger = logging.getLogger(__name__)

# Statistics of agreement: 1 if larger is better, -1 if smaller is better
DIRECTION = {"pearson": 1, "spearman": 1, "kendall": 1, "mae": -1}


def is_held_out(case_id: str, validation_fraction: float = 0.5, seed: int = 0) -> bool:
    """
    Returns whether a case is held out for the comparison of prompts. The other cases (calibration) may be used to
    write them.

    It depends only on the id and the seed: a case never changes sides when others are added, and all its edits are on
    the same side.

    Args:
        case_id (`str`):
            Id of the case.
        validation_fraction (`float`, *optional*, defaults to `0.5`):
            Share of the cases that are held out.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split.
    """
    digest = hashlib.sha256(repr((seed, "validation", case_id)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < validation_fraction


class PromptRefiner:
    r"""
    Refines the scorer prompt of one task, in a folder of scorer prompts that [`HPScorerReward`] can use at any time:
    `<task>.md` is the best revision so far, `revisions/` holds all candidates, and `history.jsonl` their results.

    A candidate is adopted if its agreement with people on the held-out cases is better than the current revision's
    beyond the interval of the paired difference, and a permutation test confirms it ([`swap_test`]). Repeated
    comparisons eventually produce a lucky win. Therefore the k-th look at the held-out cases of a task has the
    confidence \\( c_k = 1 - 2 (1 - c) / (k (k + 1)) \\), and the one-sided p must be at most \\( (1 - c_k) / 2 \\).
    These levels add up to \\( 1 - c \\), which bounds the probability of adopting anything without merit in one
    folder. The held-out cases are not used for a candidate that is no better on the calibration cases.

    Args:
        task (`str`):
            The task. A task without a prompt starts from the base prompt, as in the paper.
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
        validation_fraction (`float`, *optional*, defaults to `0.5`):
            Share of the cases that are held out, see [`is_held_out`].
        confidence (`float`, *optional*, defaults to `0.95`):
            Confidence \\( c \\) of the first look at the held-out cases.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split and of the intervals.

    Raises:
        `ValueError`: If a side of the split has fewer than eight rated cases of the task, or an option is not valid.
    """

    def __init__(
        self,
        task: str,
        scorer: HPScorerReward,
        dataset: Dataset,
        ratings: Sequence[Rating],
        output_dir: str | Path,
        statistic: str = "pearson",
        validation_fraction: float = 0.5,
        confidence: float = 0.95,
        seed: int = 0,
    ):
        if statistic not in DIRECTION:
            raise ValueError(f"statistic={statistic!r} is unknown: use one of {', '.join(DIRECTION)}.")
        if not 0 < validation_fraction < 1 or not 0.5 < confidence < 1:
            raise ValueError(
                f"validation_fraction={validation_fraction} must be in (0, 1), and confidence={confidence} in (0.5, "
                "1)."
            )
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

        given: dict[EditKey, list[Rating]] = {}
        for rating in ratings:
            if rating.score is not None:
                given.setdefault(rating.edit, []).append(rating)
        dataset = without_decoding(dataset)
        tasks = dataset["task"][:] if "task" in dataset.column_names else [task] * len(dataset)
        self.cases: list[dict[str, Any]] = []
        for i, (key, of_task) in enumerate(zip(edit_keys(dataset), tasks, strict=True)):
            if i in bad or of_task != task or key not in given:
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
                    "prompt": row["prompt"],
                    "requirement": row.get("requirement"),
                    "references": references,
                    "edit": edit,
                    "ratings": given[key],
                    "human": sum(rating.score or 0 for rating in given[key]) / len(given[key]),
                    "held_out": is_held_out(key[0], validation_fraction, seed),
                }
            )
        sides = [len({case["id"] for case in self.cases if case["held_out"] == side}) for side in (False, True)]
        if min(sides) < 8:
            raise ValueError(
                f"The task {task!r} has {sides[0]} rated cases for calibration and {sides[1]} held out; at least "
                "eight are needed on each side (the paper rates 50 to 100). Rate more cases, or change "
                "validation_fraction."
            )
        # Identifies the data of a comparison: the same ratings of the same edits.
        rated = sorted((case["id"], case["editor"] or "", case["human"]) for case in self.cases)
        self.data = hashlib.sha256(repr(rated).encode()).hexdigest()[:12]
        self._prepare_folder(scorer)

    def _prepare_folder(self, scorer: HPScorerReward) -> None:
        """Fills the folder with the scorer's prompts, as far as they are missing."""
        (self.folder / "revisions").mkdir(parents=True, exist_ok=True)
        there = load_scorer_prompts(str(self.folder)) if any(self.folder.glob("*.md")) else {}
        for prompt in scorer.scorer_prompts.values():
            if prompt.task not in there:
                prompt.save(self.folder / f"{file_name(prompt.task)}.md")
        file = self.folder / f"{file_name(self.task)}.md"
        if self.task not in there and self.task not in scorer.scorer_prompts:
            base = self.folder / "base.md"
            if not base.exists():
                raise ValueError(
                    f"{self.folder} has neither a prompt for the task {self.task!r} nor a base prompt: add one of "
                    "them."
                )
            replace(read_scorer_prompt(base), task=self.task).save(file)
        if not file.exists():
            raise ValueError(f"The prompt for {self.task!r} in {self.folder} must be in {file.name}: rename its file.")
        self.current = read_scorer_prompt(file)
        if self.current.task != self.task:
            raise ValueError(f"{file} is a prompt for the task {self.current.task!r}: name the file after its task.")
        adopted = [entry for entry in self.history if entry["adopted"]]
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
        file = self.folder / "history.jsonl"
        entries = []
        for number, entry, text in read_jsonl(file) if file.exists() else ():
            if entry is None:
                logger.warning("Left out: %s, line %d: not a complete entry: %r.", file, number, text[:60])
            elif entry["task"] == self.task:
                entries.append(entry)
        return entries

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
            confidence = 1 - 2 * (1 - self.confidence) / (look * (look + 1))
            result = self._difference(candidate, held_out=True, confidence=confidence)
            entry |= {"look": look, "validation": result}
            if result["gain"] is None:
                entry["reason"] = f"the agreement on the held-out cases is undefined: {result['reason']}"
            elif result["missing_after"] > result["missing_before"]:
                entry["reason"] = "more edits have no score"
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
        Asks a model for questions to add to the current prompt. It sees the prompt, the calibration edits on which
        scorer and people differ most, and the questions that were rejected before.

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
        used = [self.current.name, *(entry["after"] for entry in self.history)]
        number = max((int(name) for name in used if name.isdigit()), default=len(used)) + 1
        text = add_questions(self.current.text, questions)
        return ScorerPrompt(self.task, f"{self.folder}:{self.task}:{number}", text), questions

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
        """Returns the history as a Markdown table."""
        rows = []
        for entry in self.history:
            known, unseen = entry["calibration"], entry["validation"] or {}
            ends = [unseen.get("low"), unseen.get("high")]
            if DIRECTION[entry["statistic"]] < 0:
                ends = [None if end is None else -end for end in reversed(ends)]
            gain, low, high = (_number(value, "+") for value in (unseen.get("gain"), *ends))
            p = unseen.get("p")
            rows.append(
                [
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
        head = ["revision", "against", "statistic", "calibration", "held out", "gain, interval", "p", "adopted"]
        return markdown_table(head, rows)


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
    Paired permutation test of the gain in agreement with people, one-sided, with [`~scipy.stats.permutation_test`].

    The scores `before` and `after` are swapped case by case at random. The p-value is the share of permutations with
    at least the observed gain. If neither has merit over the other, p is at most any level with at most that
    probability, with any number of cases.

    Args:
        human (`np.ndarray`):
            Score of each edit by people, of shape `(edits,)`.
        before (`np.ndarray`):
            The scores with the current prompt, of the same shape.
        after (`np.ndarray`):
            The scores with the candidate.
        clusters (`Sequence[str]`):
            Case of each edit. The edits of a case are swapped together.
        statistic (`str`):
            `"pearson"`, `"spearman"`, `"kendall"` or `"mae"`.
        num_permutations (`int`):
            Number of random permutations. With few cases, all permutations are used instead.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the permutations.

    Returns:
        `float`: the p-value.
    """
    _, case_of = np.unique(clusters, return_inverse=True)

    def gain(first: np.ndarray, second: np.ndarray) -> float:
        # Per case, `first` is 0 if its scores keep their places, and 1 if they are swapped; `second` is the other
        # value.
        swapped = first[case_of] == 1
        old, new = np.where(swapped, after, before), np.where(swapped, before, after)
        difference = statistic_of(statistic, human, new) - statistic_of(statistic, human, old)
        # Undefined gains count against the candidate. Equal gains stay equal, in whatever order their terms are added.
        return math.inf if math.isnan(difference) else round(DIRECTION[statistic] * difference, 12)

    places = np.zeros(case_of.max() + 1), np.ones(case_of.max() + 1)
    rng = np.random.default_rng(seeded_generator(seed, "swap test").initial_seed())
    result = permutation_test(
        places, gain, permutation_type="samples", alternative="greater", n_resamples=num_permutations, rng=rng
    )
    return float(result.pvalue)


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
