"""The base class of benchmarks, and what their files share. Each benchmark is one file in this folder."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from PIL import Image

from ..cases import load_split, max_references, without_decoding
from ..judges import Judge, Judgement, describe_judge
from ..judges.base import Parser, load_for
from ..rewards.prompts import ScorerPrompt
from ..utils.image_paths import check_image_paths
from ..utils.revisions import dataset_revision


@dataclass(frozen=True)
class Metric:
    """
    A metric of a benchmark. Larger values are better.

    Args:
        label (`str`):
            Its name in tables and figures, e.g. `"HP-score"`.
        maximum (`float`):
            The largest possible value. The smallest is 0.
    """

    label: str
    maximum: float


@dataclass
class CaseScore:
    """
    The scores of one edit.

    Args:
        values (`dict[str, float | None]`):
            The value of each metric, `None` where it is missing.
        judgements (`dict[str, Judgement]`, *optional*):
            The judgement of each call of the judge, e.g. `{"sc": ..., "pq": ...}`.
        reason (`str`, *optional*):
            Why a value is missing.
    """

    values: dict[str, float | None]
    judgements: dict[str, Judgement] = field(default_factory=dict)
    reason: str | None = None


class Benchmark(ABC):
    """
    Base class of benchmarks. A subclass declares everything about its benchmark, in one file: `hp-edit bench NAME`
    finds it in the module `hp_edit_trl.bench.NAME`, or anywhere else as `file.py:Class` or `package.module:Class`. The
    command builds it with a judge, followed by the keyword arguments of its `__init__` that the user sets.

    Class attributes:

    - **name** (`str`) -- Short name, e.g. `"gedit"`. The package's scorer prompts are in `prompts/<name>/`.
    - **title** (`str`) -- Name in reports, e.g. `"GEdit-Bench"`.
    - **metrics** (`dict[str, Metric]`) -- The metrics. The first is the main one.
    - **products** (`dict[str, tuple[str, str]]`) -- Those metrics that are the product of two other metrics' means.
    - **ratios** (`dict[str, tuple[str, str]]`) -- Those that are the ratio of two other metrics' means, of which a
      larger one is not better.
    - **average** (`str`) -- The main result: `"overall"`, the unweighted mean of the groups' means, or `"cases"`, the
      mean over all cases.
    - **group** (`str`) -- The column whose values are the groups, e.g. `"task"`.
    - **judge_options** (`dict[str, Any]`) -- Defaults of this benchmark for
      [`~hp_edit_trl.judges.load_judge`], e.g. `parse` and `num_answers`.
    - **scorer_prompts** (`dict[str, ScorerPrompt]`) -- The scorer prompts in use, by name.

    Args:
        judge ([`Judge`]):
            The judge.
        dataset (`str` or [`~datasets.Dataset`]):
            The cases: a folder, a Hub repository or a dataset.
        split (`str`, *optional*):
            Split of the dataset.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository. It becomes the commit when the dataset is read.
        image_root (`str`, *optional*):
            Where images may lie outside the dataset, see [`~hp_edit_trl.cases.load_split`].
    """

    name: ClassVar[str]
    title: ClassVar[str]
    metrics: dict[str, Metric]
    products: dict[str, tuple[str, str]] = {}
    ratios: dict[str, tuple[str, str]] = {}
    average: ClassVar[str] = "overall"
    group: ClassVar[str]
    judge_options: ClassVar[dict[str, Any]] = {}
    scorer_prompts: dict[str, ScorerPrompt] = {}

    def __init__(
        self,
        judge: Judge,
        dataset: str | Path | Dataset,
        split: str | None = None,
        revision: str | None = None,
        image_root: str | None = None,
    ):
        self.judge = judge
        self.source = dataset
        self.split = split
        self.revision = revision
        self.image_root = image_root

    @cached_property
    def dataset(self) -> Dataset:
        """
        The cases, with images left encoded: `id`, `image` or `images`, `prompt`, optionally `requirement`, and the
        columns of group and sections. Raises `ValueError` if the data lack a column.
        """
        raw = self.source
        if not isinstance(raw, Dataset):
            raw = load_split(str(raw), self.split or "train", self.image_root, revision=self.revision)
        self.revision = dataset_revision(raw)[1] or self.revision
        cases = self.to_cases(raw)
        if not isinstance(self.source, Dataset):  # again, because columns may have become images
            folders = [str(self.source)] if Path(self.source).is_dir() else []
            check_image_paths(cases, str(self.source), folders, self.image_root)
        return without_decoding(cases)

    def to_cases(self, raw: Dataset) -> Dataset:
        """Turns the dataset as it is published into cases. By default it already has their columns."""
        return raw

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """Parts that are summarized separately: the values that their cases have in some columns, by name."""
        return {"": {}}

    @property
    def table_columns(self) -> dict[str, tuple[str, str, str, str | None]]:
        """
        The columns of the report's table, by label: section, metric, kind and group of the row of the summary that
        each shows, see [`summarize`]. By default the report has a table for each section, with the main metric of each
        group and the means of all metrics.
        """
        return {}

    @property
    def columns(self) -> list[str]:
        """The columns of group and sections."""
        return sorted({self.group, *(column for part in self.sections.values() for column in part)})

    @property
    def settings(self) -> dict[str, Any]:
        """Everything else that decides a score: the dataset and its commit, the judge, the scorer prompts."""
        in_memory = isinstance(self.source, Dataset)
        self.dataset  # noqa: B018 - finds the commit, and for some benchmarks the prompts
        return {
            "dataset": None if in_memory else str(self.source),
            "split": None if in_memory else self.split,
            "revision": self.revision,
            "judge": describe_judge(self.judge),
            "score_mode": self.judge.identity.get("score_mode"),
            "scorer_prompts": {name: [prompt.revision, prompt.digest] for name, prompt in self.scorer_prompts.items()},
        }

    def load(self) -> None:
        """Gets ready to score. Raises an error if that is impossible. Called before the first edit is made."""
        load_for(self.judge, 1 + max_references(self.dataset))

    @abstractmethod
    def score(
        self, cases: list[dict[str, Any]], references: list[list[Image.Image]], edits: list[Image.Image]
    ) -> list[CaseScore]:
        """
        Scores edits.

        Args:
            cases (`list[dict]`):
                Rows of the dataset.
            references (`list[list[PIL.Image.Image]]`):
                The reference images of each case.
            edits (`list[PIL.Image.Image]`):
                The edit of each case, at the size of its reference.
        """


def check_has_columns(dataset: Dataset, title: str, columns: Iterable[str]) -> None:
    """Raises a `ValueError` if the dataset of a benchmark lacks a column."""
    if missing := sorted(set(columns) - set(dataset.column_names)):
        raise ValueError(
            f"{title} has no column {', '.join(map(repr, missing))}; its columns are {dataset.column_names}."
        )


def check_parser(judge: Judge, parse: Parser, min_new_tokens: int = 1) -> None:
    """
    Raises a `ValueError` if a judge reads another kind of score from its answers, or may cut them off before the
    score.

    Args:
        judge ([`Judge`]):
            The judge. Its identity names its parser, unless that is the default [`~hp_edit_trl.judges.parse_score`].
        parse (`Callable[[str], float | None]`):
            The parser that the benchmark needs.
        min_new_tokens (`int`, *optional*, defaults to `1`):
            Number of tokens that an answer needs.
    """
    parser = judge.identity.get("parse", "parse_score")
    if parser != parse.__name__:
        raise ValueError(
            f"The judge reads scores from its answers with {parser}, but this benchmark needs parse={parse.__name__}: "
            "build the judge with it, and name it in the judge's identity."
        )
    limit = judge.identity.get("max_new_tokens", min_new_tokens)
    if limit < min_new_tokens:
        raise ValueError(
            f"The judge's answers end after max_new_tokens={limit}, but this benchmark asks for reasons and scores: "
            f"allow {min_new_tokens} or more."
        )


def conversation(text: str, images: list[tuple[str, Image.Image]]) -> list[dict[str, Any]]:
    """The conversation for one call of a judge: its prompt, then copies of images, each under its label."""
    content: list[dict[str, Any]] = []
    for label, image in images:
        content += [{"type": "text", "text": f"{label}:"}, {"type": "image", "image": image.copy()}]
    system = [{"type": "text", "text": text}]
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def why_no_score(*judgements: Judgement) -> str | None:
    """Why the first judgement without a score has none, with the judge's words; `None` if all have one."""
    for judgement in judgements:
        if judgement.score is None:
            what = "no score in the answer" if judgement.answered else "the judge gave no answer"
            return f"{what}: {judgement.excerpt}"
    return None
