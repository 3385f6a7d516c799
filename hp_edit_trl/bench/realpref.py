"""RealPref-Bench: edits of real photographs in eight tasks, scored by HP-Scorer."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

from ..judges import Judge
from ..rewards import HPScorerReward
from .benchmark import Benchmark, CaseScore, Metric, check_has_columns, why_no_score


class RealPrefBench(Benchmark):
    """
    RealPref-Bench, or any other cases that HP-Scorer can score.

    The main result is the unweighted mean of the tasks' mean scores, "overall" in table 1 of the paper.

    Paper: HP-Edit, section 4.

    Args:
        judge ([`Judge`]):
            The judge of HP-Scorer.
        dataset (`str` or [`~datasets.Dataset`]):
            The cases: a folder, a Hub repository or a dataset, with `id`, `image` or `images`, `prompt`, `task` and
            optionally `requirement`.
        split (`str`, *optional*, defaults to `"test"`):
            Split of the dataset.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        scorer_prompts (`str`, *optional*):
            Folder or Hub repository of scorer prompts. By default those of this package.
        scorer_prompts_revision (`str`, *optional*):
            Branch, tag or commit of that Hub repository.
        image_root (`str`, *optional*):
            Where images may lie outside the dataset, see [`~hp_edit_trl.cases.load_split`].

    Raises:
        `ValueError`: If a column is missing, or a task has no scorer prompt.
    """

    name = "realpref"
    title = "RealPref-Bench"
    metrics = {"hp_score": Metric("HP-score", 5.0)}
    group = "task"

    def __init__(
        self,
        judge: Judge,
        dataset: str | Path | Dataset,
        split: str = "test",
        revision: str | None = None,
        scorer_prompts: str | None = None,
        scorer_prompts_revision: str | None = None,
        image_root: str | None = None,
    ):
        super().__init__(judge, dataset, split, revision, image_root)
        self.scorer = HPScorerReward(
            judge, scorer_prompts=scorer_prompts, scorer_prompts_revision=scorer_prompts_revision
        )

    def to_cases(self, raw: Dataset) -> Dataset:
        check_has_columns(raw, self.title, ("id", "prompt", "task"))
        tasks = raw["task"]
        self.scorer.check_tasks(tasks)
        self.scorer_prompts = {task: self.scorer.scorer_prompt(task) for task in sorted(set(tasks))}
        return raw

    def score(
        self, cases: list[dict[str, Any]], references: list[list[Image.Image]], edits: list[Image.Image]
    ) -> list[CaseScore]:
        judgements = self.scorer.judge_edits(
            [case["prompt"] for case in cases],
            edits,
            references,
            [case["task"] for case in cases],
            [case.get("requirement") for case in cases],
        )
        return [CaseScore({"hp_score": one.score}, {"hp_score": one}, why_no_score(one)) for one in judgements]
