"""Whether an edit shows the text that it has to show."""

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from ..judges import Judge, JudgeTally
from ..judges.failures import check_not_refused
from ..utils.images import read_image
from .answers import final_answer
from .base import Rewards
from .prompts import load_benchmark_prompts
from .vlm import JudgedReward, fill_conversation, read_by


LONGEST_TEXT = 4_000  # characters that are searched
NO_TEXT = "(no text)"  # what the prompt asks for if there is none


def text_similarity(wanted: str, found: str) -> float:
    """
    How exactly a text occurs somewhere in another one: 1 if it does, less the number of letters that have to be
    inserted, removed or replaced, divided by its length. Case, and how spaces are written, do not matter.
    """
    wanted, found = (
        " ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in (wanted, found[:LONGEST_TEXT])
    )
    # Sellers' algorithm: the distance to the nearest part of `found` that ends at each of its letters
    distances = [0] * (len(found) + 1)
    for row, letter in enumerate(wanted, start=1):
        before, distances[0] = distances[0], row
        for column, other in enumerate(found, start=1):
            before, distances[column] = (
                distances[column],
                min(before + (letter != other), distances[column] + 1, distances[column - 1] + 1),
            )
    return max(0.0, 1 - min(distances) / len(wanted)) if wanted else 1.0


def no_score(answer: str) -> None:
    """Reads no score: the answer itself is what was asked for."""


class OCRReward(JudgedReward):
    """
    Reward of an edit for the text that it shows: a judge writes down what it reads in the edit alone, without knowing
    what it should be, and that is compared with the column `text`, see [`text_similarity`]. Where a case has no
    `text`, the reward does not apply.

    Args:
        judge (`str` or [`Judge`]):
            Model id for a [`TransformersJudge`] in this process, or for a [`ServerJudge`] if `judge_base_url` is
            given; or a judge, for settings beyond these.
        judge_base_url (`str` or `Sequence[str]`, *optional*):
            Address of an OpenAI-compatible server that serves the judge, or of several.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Longest answer. A judge that is given has its own.

    Raises:
        `ValueError`: If the judge cannot be used.
        `ImportError`: If `judge_base_url` is given and the extra `server` is not installed.
    """

    def __init__(
        self, judge: str | Judge, judge_base_url: str | Sequence[str] | None = None, max_new_tokens: int = 512
    ):
        super().__init__(read_by(no_score, judge, judge_base_url, max_new_tokens=max_new_tokens), float)
        self.scorer_prompt = load_benchmark_prompts("ocr", ["read"])["read"]

    @property
    def prompt_revisions(self) -> list[str]:
        """The revision of the prompt."""
        return [self.scorer_prompt.revision]

    def __call__(  # type: ignore[override]
        self,
        prompts: list[str],
        completions: list[Image.Image],
        text: list[str | None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> Rewards:
        """
        Rewards of edits, in TRL's convention for reward functions. `log_extra` receives what was read (`ocr_text`).

        Raises:
            [`UnreadableImageError`]: If an edit cannot be read.
            [`~hp_edit_trl.judges.JudgeRefusedError`]: If a server refuses the judge's key.
        """
        ids = columns.get("id") or range(len(completions))
        wanted = text or [None] * len(completions)
        places = [i for i, one in enumerate(wanted) if one is not None and one.strip()]
        edits = {i: read_image(completions[i], f"The edit of case {ids[i]!r}") for i in places}
        judged = self.judge([fill_conversation(self.scorer_prompt, {"edit": [edits[i]]}, "") for i in places])
        rewards: list[float | None] = [None] * len(completions)
        read: list[str | None] = [None] * len(completions)
        failed = [False] * len(completions)
        for i, one in zip(places, judged, strict=True):
            failed[i] = not one.answered
            if one.answered:
                found = final_answer(one.answer)
                read[i] = "" if found.casefold() == NO_TEXT else found
                rewards[i] = text_similarity(str(wanted[i]), read[i] or "")
        known = [reward for reward in rewards if reward is not None]
        if log_extra is not None:
            log_extra("ocr_text", read)
        if log_metric is not None and known:
            log_metric("ocr_similarity", sum(known) / len(known))
        tally = JudgeTally().add(judged, scores=False)
        self.tally.merge(tally)
        check_not_refused(judged, rewards=rewards)
        return Rewards(rewards, failed, tally)
