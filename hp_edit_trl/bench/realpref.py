"""RealPref-Bench: edits of real photographs in eight tasks, scored by HP-Scorer."""

from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

from ..cases import check_columns, load_split, without_decoding
from ..rewards import HPScorerReward
from ..utils.revisions import dataset_revision
from .results import CaseScore, why_no_score


class RealPrefBench:
    """
    RealPref-Bench, or any other cases that HP-Scorer can score.

    The main result is the unweighted mean of the tasks' mean scores, the "overall" of the paper's table 1.

    Paper: HP-Edit, section 4.

    Args:
        scorer ([`HPScorerReward`]):
            The scorer.
        dataset (`str` or [`~datasets.Dataset`]):
            The cases: a folder, a Hub repository or a dataset, with `id`, `image`, `prompt`, `task` and optionally `requirement`.
        split (`str`, *optional*, defaults to `"test"`):
            Which split of it.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.

    Raises:
        `ValueError`: If a column is missing, or a task has no prompt.
    """

    name = "realpref"
    metrics = {"hp_score": 5.0}
    products: dict[str, tuple[str, str]] = {}
    average = "overall"
    group = "task"
    sections: dict[str, dict[str, Any]] = {"": {}}

    def __init__(
        self, scorer: HPScorerReward, dataset: str | Path | Dataset, split: str = "test", revision: str | None = None
    ):
        self.scorer = scorer
        self.source = dataset
        self.split = split
        self.revision = revision

    @cached_property
    def dataset(self) -> Dataset:
        if isinstance(self.source, Dataset):
            dataset = self.source
        else:
            dataset = load_split(str(self.source), self.split, revision=self.revision)
        check_columns(dataset, "RealPref-Bench")
        lacking = [name for name in ("id", "image", "task") if name not in dataset.column_names]
        if lacking:
            raise ValueError(
                f"RealPref-Bench has no column {', '.join(map(repr, lacking))}; its columns are {dataset.column_names}."
            )
        self.scorer.check_tasks(dataset["task"])
        return without_decoding(dataset)

    @property
    def settings(self) -> dict[str, Any]:
        prompts = {
            task: [prompt.revision, prompt.digest]
            for task in sorted(set(self.dataset["task"]))
            for prompt in [self.scorer.scorer_prompt(task)]
        }
        return {
            "dataset": None if isinstance(self.source, Dataset) else str(self.source),
            "split": None if isinstance(self.source, Dataset) else self.split,
            "revision": dataset_revision(self.dataset)[1] or self.revision,
            "judge": self.scorer.judge_description,
            "scorer_prompts": prompts,
        }

    def load(self) -> None:
        self.scorer.load()

    def score(
        self, cases: list[dict[str, Any]], sources: list[Image.Image], edits: list[Image.Image]
    ) -> list[CaseScore]:
        judgements = self.scorer.judge_edits(
            [case["prompt"] for case in cases],
            edits,
            [[source] for source in sources],
            [case["task"] for case in cases],
            [case.get("requirement") for case in cases],
        )
        return [
            CaseScore({"hp_score": one.score}, {"hp_score": one}, None if one.score is not None else why_no_score(one))
            for one in judgements
        ]
