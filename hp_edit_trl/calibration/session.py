"""Who rates what, in which order, and where everyone is. Nothing here knows of a web page."""

import hashlib
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import torch
from datasets import Dataset

from ..ratings import SCORES, Rating, append_rating, read_ratings
from ..utils.seeding import seeded_generator


EditKey = tuple[str, str | None]  # id of the case, editor


class StaleError(ValueError):
    """An answer to an edit that has been answered in the meantime."""


def annotator_name(name: str) -> str:
    """
    The name in one spelling: composed characters, no spaces around it, single ones inside.

    Raises:
        `ValueError`: If it is empty, longer than 100 characters, or has characters that cannot be shown.
    """
    name = " ".join(unicodedata.normalize("NFC", name).split())
    if not name:
        raise ValueError("Please enter your name.")
    if len(name) > 100 or not name.isprintable():
        raise ValueError("A name has at most 100 characters, all of which can be shown.")
    return name


def ratings_file(ratings_dir: str | Path, annotator: str) -> Path:
    """The file of an annotator. Two names never have the same one, also where case does not matter."""
    part = annotator
    if not re.fullmatch(r"[a-z0-9_-]{1,60}", annotator):
        readable = re.sub(r"[^a-z0-9_-]+", "-", annotator.lower())[:40].strip("-")
        part = f"{readable}.{hashlib.sha256(annotator.encode()).hexdigest()[:12]}"
    return Path(ratings_dir) / f"ratings-{part}.jsonl"


def assign_cases(
    keys: Iterable[EditKey], annotators: Iterable[str], overlap: int, seed: int = 0
) -> dict[str, list[EditKey]]:
    """
    Gives each case, with all its edits, to some of the annotators, so that everyone gets about as many edits.

    Args:
        keys (`Iterable[tuple[str, str | None]]`):
            The edits, each by the id of its case and its editor.
        annotators (`Iterable[str]`):
            The names.
        overlap (`int`):
            How many of them rate each case.
        seed (`int`, *optional*, defaults to `0`):
            Decides who gets which case. The order of names and of edits does not matter.

    Returns:
        `dict[str, list[tuple[str, str | None]]]`: the edits of each annotator.

    Raises:
        `ValueError`: If there are not as many annotators.
    """
    annotators = sorted(annotators)
    if not 1 <= overlap <= len(annotators):
        raise ValueError(
            f"overlap={overlap} with {len(annotators)} annotators ({', '.join(annotators)}): it must lie between 1 and their number."
        )
    cases: dict[str, list[EditKey]] = {}
    for key in keys:
        cases.setdefault(key[0], []).append(key)
    given: dict[str, list[EditKey]] = {annotator: [] for annotator in annotators}
    for case_id in sorted(cases, key=lambda case_id: (_draw(seed, "annotation case", case_id), case_id)):
        # Those with the fewest edits so far; among equals chance decides, so that every pair of people meets.
        ranked = sorted(annotators, key=lambda name: (len(given[name]), _draw(seed, "overlap", case_id, name)))
        for annotator in ranked[:overlap]:
            given[annotator] += cases[case_id]
    return given


def _draw(*key: int | str) -> int:
    return int(torch.randint(2**62, (), generator=seeded_generator(*key)))


class RatingSession:
    """
    One annotator's way through the edits. The file is the state: a session that is made anew goes on where the last one was.

    Every answer names what it answers by a token, which changes as soon as the edit is answered. So a click that comes twice, or
    from a page that is out of date, never rates another edit than the one that was seen.

    Args:
        annotator (`str`):
            The name.
        keys (`Iterable[tuple[str, str | None]]`):
            The edits to rate, each by the id of its case and its editor.
        file (`str` or `Path`):
            Where the ratings go. Those in it count.
        rubric (`str`):
            Revision of the rubric.
        seed (`int`, *optional*, defaults to `0`):
            Decides the order, together with the name. Edits that come or go do not change the order of the others.

    Raises:
        `ValueError`: If the file has ratings made with another revision of the rubric.
    """

    def __init__(self, annotator: str, keys: Iterable[EditKey], file: str | Path, rubric: str, seed: int = 0):
        self.annotator = annotator
        self.file = Path(file)
        self.rubric = rubric
        self.seed = seed
        keys = list(keys)
        places = {key: (_draw(seed, "annotation order", annotator, key[0], key[1] or ""), key[0]) for key in keys}
        self.queue = sorted(keys, key=places.__getitem__)
        self.places = {key: place for place, key in enumerate(self.queue)}
        self.answers: dict[EditKey, Rating] = {}
        self.drafts: dict[EditKey, str] = {}  # comments on edits that were left without an answer
        self.lock = threading.RLock()
        if self.file.exists():
            for rating in check_rubric(self.file, rubric):
                if rating.annotator == annotator and (rating.id, rating.editor) in self.places:
                    self.answers[rating.id, rating.editor] = rating
        self.tokens = {self.token(key): key for key in self.queue}

    def token(self, key: EditKey) -> str:
        """Names an edit as it is answered now. It tells neither case nor editor."""
        state = repr((self.seed, self.annotator, key, self.answers.get(key)))
        return hashlib.sha256(state.encode()).hexdigest()[:24]

    def comment(self, key: EditKey) -> str:
        """What the annotator wrote to an edit."""
        return self.drafts.get(key, self.answers[key].comment if key in self.answers else "")

    def next(self) -> EditKey | None:
        """The first edit without an answer; `None` when all are answered."""
        return next((key for key in self.queue if key not in self.answers), None)

    def next_skipped(self, after: EditKey | None = None) -> EditKey | None:
        """The first edit that was skipped, or the first after another one."""
        start = 0 if after is None else self.places[after] + 1
        return next(
            (key for key in self.queue[start:] if key in self.answers and self.answers[key].score is None), None
        )

    def rate(self, token: str, score: int | None, comment: str = "") -> EditKey | None:
        """
        Writes an answer to the file.

        Args:
            token (`str`):
                What is answered, see [`token`].
            score (`int` or `None`):
                0 to 5; `None` skips the edit.
            comment (`str`, *optional*, defaults to `""`):
                What else there is to say.

        Returns:
            `tuple[str, str | None]` or `None`: the edit to show next; `None` when all are answered.

        Raises:
            [`StaleError`]: If the edit has been answered since the token was given. Nothing is written then.
            `ValueError`: If the score is none.
            `OSError`: If the file cannot be written.
        """
        if score is not None and (type(score) is not int or score not in SCORES):
            raise ValueError(f"The score {score!r} is no whole number from 0 to 5.")
        with self.lock:
            key = self._find(token)
            was_skipped = key in self.answers and self.answers[key].score is None
            self._write(key, score, comment)
            following = self.next()
            return self.next_skipped(after=key) if following is None and was_skipped else following

    def back(self, token: str | None, comment: str | None = None) -> EditKey | None:
        """The edit before the one that is shown, or the last one if `token` is `None`. A comment is kept."""
        with self.lock:
            if token is None:
                return self.queue[-1] if self.queue else None
            key = self._find(token)
            self._keep(key, comment)
            return self.queue[max(0, self.places[key] - 1)]

    def forward(self, token: str, comment: str | None = None) -> EditKey | None:
        """The edit after the one that is shown, if that has an answer. A comment is kept."""
        with self.lock:
            key = self._find(token)
            self._keep(key, comment)
            if key not in self.answers:
                return key
            place = self.places[key] + 1
            return self.queue[place] if place < len(self.queue) else self.next()

    def drop(self, key: EditKey) -> None:
        """Takes an edit that cannot be shown out of the queue."""
        with self.lock:
            if key in self.places:
                self.queue.remove(key)
                self.places = {key: place for place, key in enumerate(self.queue)}
                self.tokens.pop(self.token(key))
                self.answers.pop(key, None)

    def counts(self) -> Counter:
        """How many edits were `"rated"` and `"skipped"`, and how many have each score."""
        scores = [answer.score for answer in self.answers.values()]
        return Counter(scores) + Counter({"rated": len(scores) - scores.count(None), "skipped": scores.count(None)})

    def _find(self, token: str) -> EditKey:
        if token not in self.tokens:
            raise StaleError(
                "This edit was already answered, a moment ago or in another tab. This answer was not taken."
            )
        return self.tokens[token]

    def _write(self, key: EditKey, score: int | None, comment: str) -> None:
        time = datetime.now(UTC).isoformat()
        answer = Rating(self.annotator, key[0], key[1], score, self.rubric, time, comment.strip())
        append_rating(self.file, answer)
        self.tokens.pop(self.token(key))
        self.answers[key] = answer
        self.drafts.pop(key, None)
        self.tokens[self.token(key)] = key

    def _keep(self, key: EditKey, comment: str | None) -> None:
        """Keeps a comment when its edit is left: beside the answer, or until there is one."""
        if comment is None or comment.strip() == self.comment(key).strip():
            return
        if key in self.answers:
            self._write(key, self.answers[key].score, comment)
        else:
            self.drafts[key] = comment


def check_rubric(file: Path, rubric: str, dataset: Dataset | None = None) -> list[Rating]:
    """
    The ratings in a file. Lines that cannot be used are reported, see [`read_ratings`].

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
            f"The ratings in {file.name} were made with the rubric {found}, but this is {rubric}: what a score means is not the "
            "same. Use that rubric (--rubric), or another folder for these ratings (--ratings)."
        )
    return ratings
