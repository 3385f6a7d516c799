"""
The queue of each annotator: which edits or cases, in which order, and which of them are answered. Independent of the
web page.
"""

import hashlib
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic

import torch
from datasets import Dataset

from ..cases import EditKey, edit_keys, prompt_problem
from ..ratings import SCORES, OneAnswer, Rating, append_answer, read_ratings
from ..reviews import VERDICTS, Review, read_reviews
from ..utils.seeding import seeded_generator


LONGEST_COMMENT = 10_000  # characters


class StaleError(ValueError):
    """The edit or case has already been answered."""


def annotator_name(name: str) -> str:
    """
    Normalizes a name: composed Unicode characters, single spaces.

    Raises:
        `ValueError`: If it is empty, longer than 100 characters, or has characters that are not printable.
    """
    name = " ".join(unicodedata.normalize("NFC", name).split())
    if not name:
        raise ValueError("Please enter your name.")
    if len(name) > 100 or not name.isprintable():
        raise ValueError("A name must have at most 100 characters, all of them printable.")
    return name


def assign_cases(
    keys: Iterable[EditKey], annotators: Iterable[str], overlap: int, seed: int = 0
) -> dict[str, list[EditKey]]:
    """
    Assigns each case, with all its edits, to some of the annotators, so that all get about the same number of edits.

    Args:
        keys (`Iterable[tuple[str, str | None]]`):
            The edits, each as id of its case and editor.
        annotators (`Iterable[str]`):
            Names of the annotators.
        overlap (`int`):
            Number of annotators who rate each case.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the assignment, which does not depend on the order of names and edits.

    Returns:
        `dict[str, list[tuple[str, str | None]]]`: the edits of each annotator.

    Raises:
        `ValueError`: If `overlap` is not between 1 and the number of annotators.
    """
    annotators = sorted(annotators)
    if not 1 <= overlap <= len(annotators):
        raise ValueError(
            f"overlap={overlap} with {len(annotators)} annotators ({', '.join(annotators)}): it must be between 1 and "
            "their number."
        )
    cases: dict[str, list[EditKey]] = {}
    for key in keys:
        cases.setdefault(key[0], []).append(key)
    given: dict[str, list[EditKey]] = {annotator: [] for annotator in annotators}
    for case_id in sorted(cases, key=lambda case_id: (_draw(seed, "annotation case", case_id), case_id)):
        # Those with the fewest edits so far; ties are broken at random, so that every pair of annotators shares cases.
        ranked = sorted(annotators, key=lambda name: (len(given[name]), _draw(seed, "overlap", case_id, name)))
        for annotator in ranked[:overlap]:
            given[annotator] += cases[case_id]
    return given


def sample_cases(dataset: Dataset, num_cases: int, seed: int = 0) -> Dataset:
    """
    Draws cases, with all their edits, evenly over the tasks, among those that all editors have an edit of. A larger
    draw with the same seed holds a smaller one.

    Args:
        dataset ([`~datasets.Dataset`]):
            Edits or cases.
        num_cases (`int`):
            Number of cases.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.

    Raises:
        `ValueError`: If there are fewer such cases.
    """
    keys = edit_keys(dataset)
    tasks = dataset["task"][:] if "task" in dataset.column_names else [None] * len(keys)
    rows: dict[str, list[int]] = {}
    for row, (case, _) in enumerate(keys):
        rows.setdefault(case, []).append(row)
    num_editors = len({editor for _, editor in keys})
    whole = sorted(
        (case for case, of_case in rows.items() if len(of_case) == num_editors),
        key=lambda case: (_draw(seed, "study", case), case),
    )
    if not 1 <= num_cases <= len(whole):
        raise ValueError(
            f"num_cases={num_cases}: there are {len(whole)} cases with an edit by each of {num_editors} editors."
        )
    by_task: Counter = Counter()
    places = {}
    for case in whole:
        task = str(tasks[rows[case][0]])
        places[case] = by_task[task], task
        by_task[task] += 1
    chosen = sorted(whole, key=places.__getitem__)[:num_cases]
    return dataset.select(sorted(row for case in chosen for row in rows[case]))


def _draw(*key: int | str) -> int:
    return int(torch.randint(2**62, (), generator=seeded_generator(*key)))


class Session(Generic[OneAnswer]):
    """
    The queue of one annotator. Its state is in the file of answers: a new session resumes where the last one stopped.

    An answer names its edit by a token, which changes as soon as the edit is answered. A second click, or a click on
    an outdated page, therefore never answers for an edit that was not seen. [`RatingSession`] has ratings of edits,
    [`ReviewSession`] has reviews of cases, which are edits without an editor here.

    Args:
        annotator (`str`):
            Name of the annotator.
        keys (`Iterable[tuple[str, str | None]]`):
            The edits, each as id of its case and editor.
        file (`str` or `Path`):
            File of the annotator's answers.
        rubric (`str`):
            Revision of the rubric.
        seed (`int`):
            Seed of the order, together with the name. Adding or removing edits does not change the order of the
            others.
        answers (`Iterable`):
            The answers in the file.
    """

    def __init__(
        self,
        annotator: str,
        keys: Iterable[EditKey],
        file: str | Path,
        rubric: str,
        seed: int,
        answers: Iterable[OneAnswer],
    ):
        self.annotator = annotator
        self.file = Path(file)
        self.rubric = rubric
        self.seed = seed
        keys = list(keys)
        places = {key: (_draw(seed, "annotation order", annotator, key[0], key[1] or ""), key[0]) for key in keys}
        self.queue = sorted(keys, key=places.__getitem__)
        self.places = {key: place for place, key in enumerate(self.queue)}
        mine = (answer for answer in answers if answer.annotator == annotator)
        self.answers: dict[EditKey, OneAnswer] = {one.edit: one for one in mine if one.edit in self.places}
        self.drafts: dict[EditKey, str] = {}  # comments on edits without an answer
        self.lock = threading.RLock()
        self.tokens = {self.token(key): key for key in self.queue}

    def token(self, key: EditKey) -> str:
        """Returns the token of an edit in its present state. It reveals neither case nor editor."""
        state = repr((self.seed, self.annotator, key, self.answers.get(key)))
        return hashlib.sha256(state.encode()).hexdigest()[:24]

    def comment(self, key: EditKey) -> str:
        """Returns the annotator's comment on an edit."""
        return self.drafts.get(key, self.answers[key].comment if key in self.answers else "")

    def next(self) -> EditKey | None:
        """Returns the first edit without an answer; `None` if all are answered."""
        return next((key for key in self.queue if key not in self.answers), None)

    def next_skipped(self, after: EditKey | None = None) -> EditKey | None:
        """Returns the first skipped edit (after another one, if given); `None` if there is none."""
        start = 0 if after is None else self.places[after] + 1
        return next((key for key in self.queue[start:] if self._skipped(key)), None)

    def back(self, token: str | None, comment: str | None = None) -> EditKey | None:
        """Returns the edit before the shown one, or the last edit if `token` is `None`. Keeps the comment."""
        with self.lock:
            if token is None:
                return self.queue[-1] if self.queue else None
            key = self._find(token)
            self._keep(key, comment)
            return self.queue[max(0, self.places[key] - 1)]

    def forward(self, token: str, comment: str | None = None) -> EditKey | None:
        """Returns the edit after the shown one, which must have an answer to be left. Keeps the comment."""
        with self.lock:
            key = self._find(token)
            self._keep(key, comment)
            if key not in self.answers:
                return key
            place = self.places[key] + 1
            return self.queue[place] if place < len(self.queue) else self.next()

    def drop(self, key: EditKey) -> None:
        """Removes an edit that cannot be shown from the queue."""
        with self.lock:
            if key in self.places:
                self.queue.remove(key)
                self.places = {key: place for place, key in enumerate(self.queue)}
                self.tokens.pop(self.token(key))
                self.answers.pop(key, None)

    def counts(self) -> Counter:
        """Counts the edits that were `"answered"` and `"skipped"`, and those with each score or verdict."""
        values = [answer.value for answer in self.answers.values()]
        return Counter(values) + Counter({"answered": len(values) - values.count(None), "skipped": values.count(None)})

    def _skipped(self, key: EditKey) -> bool:
        return key in self.answers and self.answers[key].value is None

    def _find(self, token: str) -> EditKey:
        if token not in self.tokens:
            raise StaleError("This was already answered, just now or in another tab. This answer was not saved.")
        return self.tokens[token]

    def _answer(self, token: str, comment: str, make: Callable[[EditKey, str], OneAnswer]) -> EditKey | None:
        """Writes the answer that `make` makes of an edit and the time. Returns the edit to show next."""
        _check_comment(comment)
        with self.lock:
            key = self._find(token)
            was_skipped = self._skipped(key)
            self._write(key, make(key, _now()))
            following = self.next()
            return self.next_skipped(after=key) if following is None and was_skipped else following

    def _write(self, key: EditKey, answer: OneAnswer) -> None:
        append_answer(self.file, answer)
        self.tokens.pop(self.token(key))
        self.answers[key] = answer
        self.drafts.pop(key, None)
        self.tokens[self.token(key)] = key

    def _keep(self, key: EditKey, comment: str | None) -> None:
        """Keeps the comment on an edit that is left: with its answer, or as a draft until it has one."""
        if comment is None:
            return
        _check_comment(comment)
        if comment.strip() == self.comment(key).strip():
            return
        if key in self.answers:
            answer: Any = self.answers[key]
            self._write(key, replace(answer, comment=comment.strip(), time=_now()))
        else:
            self.drafts[key] = comment


class RatingSession(Session[Rating]):
    """
    The queue of one annotator who rates edits.

    Args:
        annotator (`str`):
            Name of the annotator.
        keys (`Iterable[tuple[str, str | None]]`):
            The edits to rate, each as id of its case and editor.
        file (`str` or `Path`):
            File of the annotator's ratings. Existing ratings count.
        rubric (`str`):
            Revision of the rubric.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order, together with the name. Adding or removing edits does not change the order of the
            others.
        aspects (`Iterable[str]`, *optional*):
            Aspects that are scored beside the edit as a whole.

    Raises:
        `ValueError`: If the file holds ratings made with another revision of the rubric.
    """

    def __init__(
        self,
        annotator: str,
        keys: Iterable[EditKey],
        file: str | Path,
        rubric: str,
        seed: int = 0,
        aspects: Iterable[str] = (),
    ):
        self.aspects = tuple(aspects)
        answers = check_rubric(Path(file), rubric) if Path(file).exists() else []
        super().__init__(annotator, keys, file, rubric, seed, answers)

    def rate(
        self, token: str, score: int | None, comment: str = "", aspects: Mapping[str, int] | None = None
    ) -> EditKey | None:
        """
        Writes a rating to the file.

        Args:
            token (`str`):
                Token of the edit, see [`token`].
            score (`int` or `None`):
                0 to 5; `None` skips the edit.
            comment (`str`, *optional*, defaults to `""`):
                Comment of the annotator.
            aspects (`Mapping[str, int]`, *optional*):
                0 to 5 for each of the session's aspects. A skip has none.

        Returns:
            `tuple[str, str | None]` or `None`: the edit to show next; `None` if all are answered.

        Raises:
            [`StaleError`]: If the edit has been answered since the token was issued. Then nothing is written.
            `ValueError`: If the score is not valid, or the comment is no text or too long.
            `OSError`: If the file cannot be written.
        """
        if score is not None and (type(score) is not int or score not in SCORES):
            raise ValueError(f"The score {score!r} is not an integer from 0 to 5.")
        given = {} if score is None else {name: (aspects or {}).get(name) for name in self.aspects}
        if missing := [name for name, value in given.items() if type(value) is not int or value not in SCORES]:
            raise ValueError(f"Please score {' and '.join(missing)} first, from 0 to 5.")
        rated: dict[str, Any] = dict(given)
        return self._answer(
            token,
            comment,
            lambda key, time: Rating(self.annotator, *key, score, self.rubric, time, comment.strip(), rated),
        )


class ReviewSession(Session[Review]):
    """
    The queue of one annotator who reviews cases.

    Args:
        annotator (`str`):
            Name of the annotator.
        texts (`Mapping[str, tuple[str, str | None]]`):
            Instruction and requirement of each case, by its id.
        file (`str` or `Path`):
            File of the annotator's reviews. Existing reviews of the same instruction count.
        rubric (`str`):
            Revision of the guidelines.
        reasons (`Iterable[str]`):
            The reasons for which a case can be rejected, besides `"other"`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order, together with the name.

    Raises:
        `ValueError`: If the file holds reviews made with another revision of the guidelines.
    """

    def __init__(
        self,
        annotator: str,
        texts: Mapping[str, tuple[str, str | None]],
        file: str | Path,
        rubric: str,
        reasons: Iterable[str],
        seed: int = 0,
    ):
        self.case_texts = dict(texts)
        self.reasons = (*reasons, "other")
        self.corrections: dict[EditKey, tuple[str, str]] = {}  # that are not saved yet
        answers = check_guidelines(Path(file), rubric) if Path(file).exists() else []
        same = [one for one in answers if one.id in texts and one.prompt == texts[one.id][0]]
        super().__init__(annotator, [(case_id, None) for case_id in texts], file, rubric, seed, same)

    def texts(self, key: EditKey) -> tuple[str, str]:
        """Returns instruction and requirement of a case as the annotator left them."""
        if key in self.corrections:
            return self.corrections[key]
        prompt, requirement = self.case_texts[key[0]]
        answer = self.answers.get(key)
        if answer is not None and answer.corrected_prompt is not None:
            prompt, requirement = answer.corrected_prompt, answer.corrected_requirement
        return prompt, requirement or ""

    def keep_texts(self, token: str, prompt: str, requirement: str) -> None:
        """Keeps instruction and requirement of a case that is left, until a correction is saved."""
        with self.lock:
            key = self._find(token)
            _check_comment(prompt)
            _check_comment(requirement)
            if (prompt, requirement) != self.texts(key):
                self.corrections[key] = prompt, requirement

    def review(
        self,
        token: str,
        verdict: str | None,
        comment: str = "",
        reason: str = "",
        prompt: str | None = None,
        requirement: str | None = None,
    ) -> EditKey | None:
        """
        Writes a review to the file.

        Args:
            token (`str`):
                Token of the case, see [`token`].
            verdict (`str` or `None`):
                `"accept"`, `"correct"` or `"reject"`; `None` skips the case.
            comment (`str`, *optional*, defaults to `""`):
                Comment of the annotator.
            reason (`str`, *optional*, defaults to `""`):
                Why the case is rejected. `"other"` needs a comment.
            prompt (`str`, *optional*):
                The instruction in the field. If it differs from the case's, only `"correct"` and `"reject"` can be
                meant.
            requirement (`str`, *optional*):
                The requirement in the field.

        Returns:
            `tuple[str, None]` or `None`: the case to show next; `None` if all are answered.

        Raises:
            [`StaleError`]: If the case has been answered since the token was issued. Then nothing is written.
            `ValueError`: If the review is not valid: a rejection without a reason, a correction that changes nothing
                or leaves no instruction, a change that would be lost.
            `OSError`: If the file cannot be written.
        """
        if verdict not in (*VERDICTS, None):
            raise ValueError(f"The verdict {verdict!r} is not one of {', '.join(VERDICTS)}.")
        _check_comment(comment)
        with self.lock:
            key = self._find(token)
            shown, required = self.case_texts[key[0]]
            texts = [
                shown if prompt is None else prompt.strip(),
                (required if requirement is None else requirement) or "",
            ]
            texts[1] = texts[1].strip()
            is_changed = texts != [shown.strip(), (required or "").strip()]
            if verdict == "reject" and reason not in self.reasons:
                raise ValueError(f"A case is rejected for one of the reasons {', '.join(self.reasons)}.")
            if reason == "other" and not comment.strip():
                raise ValueError("Please write the reason into the comment, then reject.")
            if verdict == "accept" and is_changed:
                raise ValueError("The text was changed: save the correction, or restore the text, then accept.")
            if verdict == "correct" and not is_changed:
                raise ValueError("The text is as it was: change it, or accept the case.")
            if verdict == "correct" and (wrong := prompt_problem(texts[0])):
                raise ValueError(f"This case {wrong}")
            values: dict[str, Any] = {"reason": reason if verdict == "reject" else ""}
            if verdict == "correct":
                values["corrected_prompt"] = texts[0]
                values["corrected_requirement"] = texts[1] if texts[1] or required is not None else None
            following = self._answer(
                token,
                comment,
                lambda key, time: Review(
                    self.annotator, key[0], shown, verdict, self.rubric, time, comment=comment.strip(), **values
                ),
            )
            self.corrections.pop(key, None)
            return following


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _check_comment(comment: str) -> None:
    if not isinstance(comment, str) or len(comment) > LONGEST_COMMENT:
        raise ValueError(f"A comment must be a text of at most {LONGEST_COMMENT} characters. Nothing was saved.")


def check_guidelines(file: Path, rubric: str) -> list[Review]:
    """
    Reads the reviews in a file, see [`~hp_edit_trl.reviews.read_reviews`].

    Raises:
        `ValueError`: If they were made with another revision of the guidelines.
    """
    try:
        reviews, _ = read_reviews(file)
        found = ", ".join(sorted({review.rubric for review in reviews} - {rubric}))
    except ValueError:
        found = "several revisions"
    if found:
        raise ValueError(
            f"The reviews in {file.name} were made with the guidelines {found}, but these are {rubric}. Use those "
            "guidelines (--rubric), or another folder for the new reviews (--output_dir)."
        )
    return reviews


def check_rubric(file: Path, rubric: str, dataset: Dataset | None = None) -> list[Rating]:
    """
    Reads the ratings in a file, see [`~hp_edit_trl.ratings.read_ratings`].

    Raises:
        `ValueError`: If they were made with another revision of the rubric.
    """
    try:
        ratings, _ = read_ratings(file, dataset)
        found = ", ".join(sorted({rating.rubric for rating in ratings} - {rubric}))
    except ValueError:
        found = "several revisions"
    if found:
        raise ValueError(
            f"The ratings in {file.name} were made with the rubric {found}, but this is {rubric}: a score may mean "
            "something else. Use that rubric (--rubric), or another folder for the new ratings (--output_dir)."
        )
    return ratings
