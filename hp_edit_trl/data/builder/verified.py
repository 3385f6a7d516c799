"""The benchmark of a build: its candidates for people to verify, and which of them it takes once they did."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Features, Value
from datasets import Image as ImageFeature

from ...reviews import Review, Verification, verify
from .engine import Batch, Stage, WorkFolder
from .instructions import case_id


logger = logging.getLogger(__name__)

CASE = ("id", "image", "prompt", "task", "requirement")


class Corrected:
    """
    Cases of a build with the texts that people gave them, as the rows of a build of their own.

    Args:
        build ([`WorkFolder`]):
            The build.
        corrections (`Mapping[int, Verification]`):
            What people made of its rows.
    """

    def __init__(self, build: WorkFolder, corrections: Mapping[int, Verification]):
        self.build = build
        self.corrections = dict(sorted(corrections.items()))
        ids = build.read(np.array(list(self.corrections), dtype=int), ["id"])["id"]
        texts = ((one.prompt, one.requirement) for one in self.corrections.values())
        self.settings = {"corrected": [list(one) for one in zip(ids, *zip(*texts, strict=True), strict=True)]}

    @property
    def digest(self) -> str:
        """Names the folder of the build."""
        return hashlib.sha256(repr(self.settings).encode()).hexdigest()[:12]

    def __len__(self) -> int:
        return len(self.corrections)

    def read(self, start: int, stop: int) -> Batch:
        rows = list(self.corrections)[start:stop]
        batch = self.build.read(np.array(rows, dtype=int), [*CASE, "image_id"])
        for place, one in enumerate(self.corrections[row] for row in rows):
            assert one.prompt is not None
            batch["prompt"][place] = one.prompt
            batch["id"][place] = case_id(batch["image_id"][place], batch["task"][place], one.prompt)
            batch["requirement"][place] = one.requirement or None
        return {name: batch[name] for name in CASE}


class TakeOver(Stage):
    """Takes the cases of [`Corrected`] into their build."""

    name = "cases"
    inputs = CASE
    features = Features(dict.fromkeys(CASE, Value("string")) | {"image": ImageFeature()})
    batch_size = 16

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def __call__(self, batch: Batch) -> Batch:
        return {**batch, "reason": [None] * len(batch["id"])}


class BenchmarkChoice:
    """
    Chooses the cases of the split `test` among the candidates of a build: those of each task in the order in which
    they were drawn, until it has its count. With reviews, only cases that people accepted, or whose correction they
    gave and an editor carried out, see [`edit_corrected`].

    Args:
        build ([`WorkFolder`]):
            The build, with all stages before `export` finished.
        counts (`Mapping[str, int]`):
            Number of cases per task.
        reviews (`Sequence[Review]`, *optional*):
            People's reviews of the candidates. By default, the cases were not verified.
        verified (`str`, *optional*):
            Where the reviews are, for messages.
    """

    def __init__(
        self,
        build: WorkFolder,
        counts: Mapping[str, int],
        reviews: Sequence[Review] | None = None,
        verified: str | None = None,
    ):
        self.build = build
        self.counts = counts
        self.is_verified = reviews is not None
        self.verified = verified
        columns = build.read(build.live, ["id", "task", "prompt", "place"])
        rows = zip(build.live.tolist(), *columns.values(), strict=True)
        drawn = sorted(
            (task, place, row, name, prompt) for row, name, task, prompt, place in rows if place is not None
        )
        self.candidates: dict[int, tuple[str, str]] = {row: (task, name) for task, _, row, name, _ in drawn}
        self.verifications: dict[int, Verification] = {}
        self.corrected: WorkFolder | None = None  # the edits of corrected cases
        if reviews is None:
            return
        prompts = {name: prompt for *_, name, prompt in drawn}
        current = [review for review in reviews if prompts.get(review.id) == review.prompt]
        if len(current) < len(reviews):
            logger.warning(
                "%d of %d reviews at %s are of no candidate of this benchmark, or of another instruction.",
                len(reviews) - len(current), len(reviews), verified,
            )  # fmt: skip
        self.people = len({review.annotator for review in current if review.verdict is not None})
        by_id = verify(current)
        self.verifications = {row: by_id[name] for row, (_, name) in self.candidates.items() if name in by_id}

    def edit_corrected(self, make: Mapping[str, Callable[[], Stage]], run: Callable[[WorkFolder, Stage], Any]) -> None:
        """
        Makes and scores the edits of corrected cases again, in a build of their own below the folder of the build.

        Args:
            make (`Mapping[str, Callable]`):
                What makes the stages `edits` and `scores`.
            run (`Callable`):
                Runs a stage of a work folder, as [`run_stage`] does.
        """
        corrections = {row: one for row, one in self.verifications.items() if one.status == "corrected"}
        if not corrections:
            return
        cases = Corrected(self.build, corrections)
        self.corrected = WorkFolder(self.build.path / "corrected" / cases.digest, cases)
        for make_stage in (TakeOver, make["edits"], make["scores"]):
            run(self.corrected, make_stage())

    def choose(self) -> tuple[dict[int, int | None], dict[int, str]]:
        """
        Chooses the cases.

        Returns:
            `tuple[dict[int, int | None], dict[int, str]]`: the rows of the build, each with its row in `corrected` if
            it was corrected; and why each other candidate is left out.

        Raises:
            `ValueError`: If a task has too few cases, and candidates that are still to be verified.
        """
        place = {}
        if self.corrected is not None:
            assert isinstance(self.corrected.sources, Corrected)
            place = {row: i for i, row in enumerate(self.corrected.sources.corrections)}
        edited = set() if self.corrected is None else set(self.corrected.live.tolist())
        chosen: dict[int, int | None] = {}
        left_out: dict[int, str] = {}
        taken: Counter[str] = Counter()
        pending: dict[str, list[str]] = {}
        for row, (task, name) in self.candidates.items():
            one = self.verifications.get(row)
            if self.is_verified and one is None:
                left_out[row] = "not verified"
            elif one is not None and one.status == "disputed":
                left_out[row] = "disputed: people corrected it differently"
            elif one is not None and one.status == "rejected":
                left_out[row] = f"rejected by people: {', '.join(sorted(set(one.reasons)))}"
            elif one is not None and one.status == "corrected" and place[row] not in edited:
                left_out[row] = "no edit of the corrected case"
            elif taken[task] == self.counts[task]:
                left_out[row] = "not needed: reserve of the benchmark"
            else:
                chosen[row] = place.get(row)
                taken[task] += 1
            if left_out.get(row, "").startswith(("not verified", "disputed")):
                pending.setdefault(task, []).append(name)
        short = {task: count - taken[task] for task, count in self.counts.items() if taken[task] < count}
        if to_do := {task: pending[task] for task in short if task in pending}:
            details = "; ".join(
                f"{task} lacks {short[task]} cases, and {len(names)} candidates are not verified or disputed, "
                f"e.g. {names[0]}"
                for task, names in to_do.items()
            )
            raise ValueError(
                f"The benchmark is not verified yet: {details}. Go on with `hp-edit annotate "
                f"{self.build.path / 'candidates'} --verify --output_dir {self.verified}`, --split test, then --split "
                "reserve."
            )
        for task in short:
            logger.warning(
                "The benchmark has %d of %d cases of the task %r, because its reserve is exhausted. A larger "
                "benchmark_reserve helps.",
                taken[task], self.counts[task], task,
            )  # fmt: skip
        return chosen, left_out

    def summary(self, chosen: Mapping[int, Any]) -> dict[str, Any] | None:
        """What the card says about the verification; `None` if there was none."""
        if not self.is_verified:
            return None
        status = Counter(one.status for one in self.verifications.values())
        reasons = Counter(reason for one in self.verifications.values() for reason in set(one.reasons))
        reviewers = [self.verifications[row].reviewers for row in chosen]
        return {
            "cases": len(chosen),
            "people": self.people,
            "fewest": min(reviewers, default=0),
            "most": max(reviewers, default=0),
            "reviewed": sum(status.values()),
            **{name: status[name] for name in ("accepted", "corrected", "rejected", "disputed")},
            "reasons": dict(reasons.most_common()),
        }
