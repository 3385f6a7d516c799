"""Stage `scores`: scores each edit with HP-Scorer."""

import logging
from typing import Any

from datasets import Features, Value

from ...cases import case_images
from ...judges import FailureLimit, Judgement, JudgeTally
from ...judges.failures import is_judge_failure
from ...rewards import HPScorerReward
from ...utils.config import check_positive
from ...utils.images import UnreadableImageError, read_image
from .engine import Batch, Stage


logger = logging.getLogger(__name__)


class ScoreEdits(Stage):
    """
    Scores each edit with HP-Scorer. An edit without a score is not rejected: its score stays missing, and it keeps the
    answer of the judge. If the judge gave no answer, it is asked again by the next run.

    Args:
        scorer ([`HPScorerReward`]):
            The scorer.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of edits that the judge is given together.
    """

    name = "scores"
    inputs = ("id", "image", "edit", "prompt", "task", "requirement")
    features = Features(
        {
            "score": Value("float32"),
            "answer": Value("string"),
            "judge": Value("string"),
            "scorer_prompt": Value("string"),
            "scorer_prompt_sha": Value("string"),
            "score_mode": Value("string"),
        }
    )

    def __init__(self, scorer: HPScorerReward, batch_size: int = 32):
        check_positive(batch_size=batch_size)
        self.scorer = scorer
        self.batch_size = batch_size
        self.limit = FailureLimit()
        self.judged: list[Judgement] = []  # of the last batch

    @property
    def tally(self) -> JudgeTally:
        return self.scorer.tally

    @property
    def settings(self) -> dict[str, Any]:
        prompts = {task: [prompt.revision, prompt.digest] for task, prompt in self.scorer.scorer_prompts.items()}
        return {"judge": self.scorer.judge_description, "scorer_prompts": prompts, "task": self.scorer.task}

    def load(self) -> None:
        self.scorer.load()

    def __call__(self, batch: Batch) -> Batch:
        ids, tasks = batch["id"], batch["task"]
        reasons: list[str | None] = [None] * len(ids)
        readable, references, edits = [], [], []
        for i, (case_id, image, edit) in enumerate(zip(ids, batch["image"], batch["edit"], strict=True)):
            try:
                images = case_images({"image": image}, case_id)
                edits.append(read_image(edit, f"The edit of case {case_id!r}"))
            except UnreadableImageError as error:
                reasons[i] = f"unreadable: {error}"
                continue
            readable.append(i)
            references.append(images)
        prompts, known_tasks, requirements = (
            [batch[name][i] for i in readable] for name in ("prompt", "task", "requirement")
        )
        judged = self.scorer.judge_edits(prompts, edits, references, known_tasks, requirements)
        self.judged = judged
        unanswered = [False] * len(ids)
        scores: list[float | None] = [None] * len(ids)
        answers: list[str | None] = [None] * len(ids)
        for i, judgement in zip(readable, judged, strict=True):
            scores[i], answers[i], unanswered[i] = judgement.score, judgement.answer, is_judge_failure(judgement)
            if judgement.score is None:
                logger.warning("No score for case %s: the judge answered %r.", ids[i], judgement.excerpt)
        scorer_prompts = [self.scorer.scorer_prompt(task) for task in tasks]
        return {
            "score": scores,
            "answer": answers,
            "judge": [self.scorer.judge_description] * len(ids),
            "scorer_prompt": [prompt.revision for prompt in scorer_prompts],
            "scorer_prompt_sha": [prompt.digest for prompt in scorer_prompts],
            "score_mode": [self.scorer.judge.identity.get("score_mode")] * len(ids),
            "reason": reasons,
            "unanswered": unanswered,
        }

    def check(self, again: bool) -> None:
        new, tried = ([], self.judged) if again else (self.judged, [])
        self.limit.check(new, "edits", "Finished rows are kept: run again to resume.", tried)
