"""The stages that make an edit of each case and score it."""

import io
import logging
from collections.abc import Callable
from typing import Any

from datasets import Features, Value
from datasets import Image as ImageFeature

from ...editors import Editor, as_editor, edit_cases, edit_seed
from ...rewards import HPScorerReward
from ...utils.images import UnreadableImageError, read_image
from .engine import Batch


logger = logging.getLogger(__name__)


class MakeEdits:
    """
    Stage `edits`: an edit of each case.

    Args:
        editor ([`Editor`] or `Callable`):
            What edits: a [`PipelineEditor`], a [`PolicyEditor`], a [`FolderEditor`], or a function, see [`FunctionEditor`].
        batch_size (`int`, *optional*, defaults to `4`):
            Number of cases that the editor is given together.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the edits' noise, which depends on it and on the case.
    """

    name = "edits"
    inputs = ("id", "image", "prompt")
    features = Features(
        {
            "edit": ImageFeature(),
            "editor": Value("string"),
            "editor_revision": Value("string"),
            "edit_seed": Value("int64"),
        }
    )

    def __init__(self, editor: Editor | Callable[..., Any], batch_size: int = 4, seed: int = 0):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        self.editor = as_editor(editor)
        self.batch_size = batch_size
        self.seed = seed

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.editor.identity, "seed": self.seed}

    def load(self) -> None:
        self.editor.load()

    def __call__(self, batch: Batch) -> Batch:
        ids, prompts = batch["id"], batch["prompt"]
        images = [
            [read_image(value, f"The image of case {id!r}")] for id, value in zip(ids, batch["image"], strict=True)
        ]
        seeds = [edit_seed(self.seed, case_id) for case_id in ids]
        edits, reasons = edit_cases(self.editor, images, prompts, ids, seeds)
        failed = [reason for reason in reasons if reason is not None and reason.startswith("editor failed")]
        if len(ids) > 1 and len(failed) == len(ids):
            raise ValueError(
                f"The editor failed with every case of a batch, {ids[0]!r} to {ids[-1]!r}: {failed[-1].removeprefix('editor failed: ')}"
            )
        settings = self.settings
        done: Batch = {"edit": [], "edit_seed": seeds, "reason": reasons}
        done |= {"editor": [settings["editor"]] * len(ids), "editor_revision": [settings["revision"]] * len(ids)}
        for edit in edits:
            buffer = io.BytesIO()
            if edit is not None:
                edit.convert("RGB").save(buffer, "PNG")
            done["edit"].append(None if edit is None else {"bytes": buffer.getvalue(), "path": None})
        return done


class ScoreEdits:
    """
    Stage `scores`: the score of each edit by HP-Scorer. An edit without one is not rejected: its score is missing, and it keeps the
    judge's answer.

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
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        self.scorer = scorer
        self.batch_size = batch_size

    @property
    def settings(self) -> dict[str, Any]:
        prompts = {task: [prompt.revision, prompt.digest] for task, prompt in self.scorer.scorer_prompts.items()}
        return {"judge": self.scorer.judge_description, "scorer_prompts": prompts, "task": self.scorer.task}

    def load(self) -> None:
        self.scorer.load()

    def __call__(self, batch: Batch) -> Batch:
        tasks = batch["task"]
        problems: list[str | None] = [None] * len(tasks)
        edits, sources = [], []
        for i, (case_id, image, edited) in enumerate(zip(batch["id"], batch["image"], batch["edit"], strict=True)):
            try:
                pair = (
                    read_image(image, f"The image of case {case_id!r}"),
                    read_image(edited, f"The edit of {case_id!r}"),
                )
                sources.append([pair[0]])
                edits.append(pair[1])
            except UnreadableImageError as error:
                problems[i] = f"unreadable: {error}"
        readable = [i for i, problem in enumerate(problems) if problem is None]
        judged = self.scorer.judge_edits(
            [batch["prompt"][i] for i in readable],
            edits,
            sources,
            [tasks[i] for i in readable],
            [batch["requirement"][i] for i in readable],
        )
        if judged and not any(judgement.answered for judgement in judged):
            raise ConnectionError(
                f"The judge gave no answer to any of {len(judged)} edits; the last time: {judged[-1].answer} What was scored is "
                "kept: run again to go on."
            )
        by_row = dict(zip(readable, judged, strict=True))
        for i, judgement in by_row.items():
            if judgement.score is None:
                logger.warning("No score for case %s: the judge answered %r.", batch["id"][i], judgement.answer[:200])
        prompts = [self.scorer.scorer_prompt(task) for task in tasks]
        mode = self.scorer.judge.identity.get("score_mode")
        return {
            "score": [by_row[i].score if i in by_row else None for i in range(len(tasks))],
            "answer": [by_row[i].answer if i in by_row else None for i in range(len(tasks))],
            "judge": [self.scorer.judge_description] * len(tasks),
            "scorer_prompt": [prompt.revision for prompt in prompts],
            "scorer_prompt_sha": [prompt.digest for prompt in prompts],
            "score_mode": [mode] * len(tasks),
            "reason": problems,
        }
