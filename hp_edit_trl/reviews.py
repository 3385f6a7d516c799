"""
Reviews of cases by people, who see the source and the instruction, but no edit: a JSON Lines file per annotator with a
line per review, appended when it is given; and what the reviews of a case come to.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .cases import EditKey, prompt_problem
from .ratings import read_answers


VERDICTS = ("accept", "correct", "reject")


@dataclass(frozen=True)
class Review:
    """
    The review of one case by one person.

    Args:
        annotator (`str`):
            Name of the person.
        id (`str`):
            Id of the case.
        prompt (`str`):
            The instruction that was shown.
        verdict (`str` or `None`):
            `"accept"`, `"correct"` or `"reject"`; `None` if the case was skipped.
        rubric (`str`):
            Revision of the guidelines that were shown.
        time (`str`):
            Time of the review, in ISO 8601.
        reason (`str`, *optional*, defaults to `""`):
            Why the case is rejected: one of the guidelines' reasons, or `"other"`, which the comment explains.
        corrected_prompt (`str`, *optional*):
            The instruction as it should be.
        corrected_requirement (`str`, *optional*):
            The requirement as it should be; `""` for none.
        comment (`str`, *optional*, defaults to `""`):
            Comment of the annotator.
    """

    annotator: str
    id: str
    prompt: str
    verdict: str | None
    rubric: str
    time: str
    reason: str = ""
    corrected_prompt: str | None = None
    corrected_requirement: str | None = None
    comment: str = ""

    @property
    def value(self) -> str | None:
        """The verdict."""
        return self.verdict

    @property
    def edit(self) -> EditKey:
        """What identifies the case."""
        return self.id, None


@dataclass(frozen=True)
class Verification:
    """
    What the reviews of a case come to.

    Args:
        status (`str`):
            `"accepted"`, `"corrected"`, `"rejected"` or `"disputed"` (people corrected it differently).
        reviewers (`int`):
            Number of people who reviewed it.
        reasons (`tuple[str, ...]`, *optional*):
            Why it was rejected.
        prompt (`str`, *optional*):
            The corrected instruction.
        requirement (`str`, *optional*):
            The corrected requirement; `""` for none.
    """

    status: str
    reviewers: int
    reasons: tuple[str, ...] = ()
    prompt: str | None = None
    requirement: str | None = None


def read_reviews(path: str | Path) -> tuple[list[Review], list[str]]:
    """
    Reads reviews. If an annotator reviewed a case several times, the last line counts. Invalid lines are left out and
    reported; the files are not changed.

    Args:
        path (`str` or `Path`):
            A file, or a folder with files `reviews-*.jsonl`.

    Returns:
        `tuple[list[Review], list[str]]`: the reviews in the order of their cases' first lines, including skipped
        cases; and a list of what was left out, each with file, line and reason.

    Raises:
        `FileNotFoundError`: If there are no files.
        `ValueError`: If the reviews were made with several revisions of the guidelines.
    """
    names = {field.name for field in fields(Review)}
    may_miss = {"verdict", "corrected_prompt", "corrected_requirement"}

    def make(values: dict[str, Any]) -> Review:
        review = Review(**{name: values[name] for name in names & values.keys()})
        for name in names:
            value = getattr(review, name)
            if not isinstance(value, str) and not (value is None and name in may_miss):
                raise TypeError
        return review

    def problem(review: Review) -> str | None:
        if review.verdict not in (*VERDICTS, None):
            return f"the verdict {review.verdict!r} is not one of {', '.join(VERDICTS)}"
        if review.verdict == "correct" and (wrong := prompt_problem(review.corrected_prompt)):
            return f"as corrected, case {review.id!r} {wrong}"
        return None

    reviews, problems = read_answers(path, "reviews", make, problem)
    if len(found := sorted({review.rubric for review in reviews})) > 1:
        raise ValueError(
            f"The reviews at {path} were made with {len(found)} revisions of the guidelines, {', '.join(found)}: keep "
            "those of each in a folder of their own."
        )
    return reviews, problems


def verify(reviews: Iterable[Review]) -> dict[str, Verification]:
    """
    Combines the reviews of each case. A case that anyone rejected is rejected. Otherwise a correction counts, also if
    others accepted the case as it was; two different corrections make it disputed. Skips do not count.

    Args:
        reviews (`Iterable[Review]`):
            The reviews, at most one by each person and case.

    Returns:
        `dict[str, Verification]`: by the id of the case. Cases that everyone skipped are left out.
    """
    by_case: dict[str, list[Review]] = {}
    for review in reviews:
        if review.verdict is not None:
            by_case.setdefault(review.id, []).append(review)
    result = {}
    for case_id, given in by_case.items():
        reasons = tuple(review.reason for review in given if review.verdict == "reject")
        corrections = {
            (review.corrected_prompt, review.corrected_requirement) for review in given if review.verdict == "correct"
        }
        status = "accepted"
        texts: tuple[str | None, str | None] = (None, None)
        if reasons:
            status = "rejected"
        elif len(corrections) > 1:
            status = "disputed"
        elif corrections:
            status, texts = "corrected", corrections.pop()
        result[case_id] = Verification(status, len(given), reasons, *texts)
    return result
