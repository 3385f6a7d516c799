"""GEdit-Bench: instructions of users, English and Chinese, judged for what was done and for how the picture looks."""

import json
import math
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

from ..cases import load_split, without_decoding
from ..judges import Judge, Judgement, describe_judge, without_reasoning
from ..rewards.prompts import load_benchmark_prompts
from ..utils.revisions import dataset_revision
from .results import CaseScore, check_parser, conversation, why_no_score


def parse_pair(answer: str) -> float | None:
    """
    The smaller one of the two scores, 0 to 10, in a judge's answer, or `None` if it does not hold exactly two.

    Accepts JSON with a list `score`, such as `{"score": [7, 8], "reasoning": "..."}`, alone or in a fence or between other words, and a
    list alone, after any reasoning that is closed by `</think>`. Reasoning that was cut off holds no scores.
    """
    text = without_reasoning(answer).strip()
    if "<think>" in text:
        return None
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", text)
    found: list[Any] = []
    decoder = json.JSONDecoder()
    for start in (match.start() for match in re.finditer(r"\{", text)):
        try:
            value, _ = decoder.raw_decode(text, start)
        except RecursionError:  # a judge that repeats one bracket until its answer ends
            return None
        except ValueError:
            continue
        if isinstance(value, dict) and "score" in value:
            found.append(value["score"])
    if not found:
        try:
            found.append(json.loads(text))
        except (ValueError, RecursionError):
            return None
    scores = found[0]
    if len(found) > 1 or not isinstance(scores, list) or len(scores) != 2:
        return None
    if any(isinstance(score, bool) or not isinstance(score, int | float) for score in scores):
        return None
    return float(min(scores)) if all(0 <= score <= 10 for score in scores) else None


class GEditBench:
    r"""
    GEdit-Bench: 606 images with an English and a Chinese instruction each, in eleven tasks.

    The judge sees source and edit and gives two scores from 0 to 10, of which the smaller one is SC (semantic consistency); it sees the
    edit alone and gives two more, of which the smaller one is PQ (perceptual quality). \\( O = \sqrt{SC \cdot PQ} \\) for each
    edit. The main result is the unweighted mean of the tasks' means, for each language, and once more for the cases that
    the benchmark marks as those that every system of its authors' comparison could edit (`intersection`). An answer without scores is
    missing here; the benchmark's own code draws a random score for it.

    Paper: [Step1X-Edit](https://huggingface.co/papers/2504.17761), section 4.

    Args:
        judge ([`Judge`]):
            A judge with `parse=parse_pair` and `max_new_tokens` of 128 or more. The benchmark's own are GPT-4.1 and
            Qwen2.5-VL-72B-Instruct.
        dataset (`str` or [`~datasets.Dataset`], *optional*, defaults to `"stepfun-ai/GEdit-Bench"`):
            The cases: a folder, a Hub repository or a dataset, with `key`, `task_type`, `instruction`, `instruction_language` (`"en"` or
            `"cn"`), `Intersection_exist`, and `input_image_raw` or `input_image`.
        split (`str`, *optional*, defaults to `"train"`):
            Which split of it.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        scorer_prompts (`str`, *optional*):
            Folder or Hub repository with the judge's prompts `consistency` and `quality` (`.md` or `.txt`), for those who have the
            benchmark's own. By default this package's, in other words.
        scorer_prompts_revision (`str`, *optional*):
            Branch, tag or commit of that Hub repository.

    Raises:
        `ValueError`: If the judge takes other answers, the prompt `consistency` has no place for the instruction, or the data lack a
            column or a language.
    """

    name = "gedit"
    metrics = {"o": 10.0, "sc": 10.0, "pq": 10.0}
    products: dict[str, tuple[str, str]] = {}
    average = "overall"
    group = "task_type"

    def __init__(
        self,
        judge: Judge,
        dataset: str | Path | Dataset = "stepfun-ai/GEdit-Bench",
        split: str = "train",
        revision: str | None = None,
        scorer_prompts: str | None = None,
        scorer_prompts_revision: str | None = None,
    ):
        check_parser(judge, parse_pair, min_new_tokens=128)
        self.judge = judge
        self.source = dataset
        self.split = split
        self.revision = revision
        self.scorer_prompts = load_benchmark_prompts(
            "gedit", ("consistency", "quality"), scorer_prompts, scorer_prompts_revision
        )
        if "{prompt}" not in self.scorer_prompts["consistency"].text:
            raise ValueError(
                f"The prompt consistency in {scorer_prompts} has no {{instruction}}, so the judge would not see the instruction: write it "
                "where the instruction belongs."
            )

    @cached_property
    def _loaded(self) -> tuple[Dataset, str | None]:
        """The cases in the form of all benchmarks, and the commit that they come from."""
        raw = self.source
        if not isinstance(raw, Dataset):
            raw = load_split(str(raw), self.split, revision=self.revision)
        image = "input_image_raw" if "input_image_raw" in raw.column_names else "input_image"
        names = {"instruction": "prompt", "instruction_language": "language", "Intersection_exist": "intersection"}
        names |= {"task_type": "task_type", "key": "id", image: "image"}
        lacking = sorted(set(names) - set(raw.column_names))
        if lacking:
            raise ValueError(
                f"GEdit-Bench has no column {', '.join(map(repr, lacking))}; its columns are {raw.column_names}."
            )
        if None in (languages := raw["instruction_language"][:]):
            raise ValueError(
                f"Row {languages.index(None)} of GEdit-Bench has no instruction_language: write 'en' or 'cn'."
            )
        commit = dataset_revision(raw)[1] or self.revision
        cases = raw.select_columns(list(names)).rename_columns({old: new for old, new in names.items() if old != new})
        if len(set(cases["id"])) < len(cases):  # one key for both languages
            ids = [f"{key}-{language}" for key, language in zip(cases["id"], cases["language"], strict=True)]
            cases = cases.remove_columns("id").add_column("id", ids)
        return without_decoding(cases), commit

    @property
    def dataset(self) -> Dataset:
        return self._loaded[0]

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        languages, marks = self.dataset["language"], self.dataset["intersection"]
        there = sorted(set(languages), reverse=True)
        whole = {language: {"language": language} for language in there}
        marked = {
            language: {mark for one, mark in zip(languages, marks, strict=True) if one == language}
            for language in there
        }
        parts = {
            f"{language}, intersection": {"language": language, "intersection": True}
            for language in there
            if marked[language] == {True, False}  # else it is all of them, or none
        }
        return whole | parts

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "dataset": None if isinstance(self.source, Dataset) else str(self.source),
            "split": None if isinstance(self.source, Dataset) else self.split,
            "revision": self._loaded[1],
            "judge": describe_judge(self.judge),
            "scorer_prompts": {name: [prompt.revision, prompt.digest] for name, prompt in self.scorer_prompts.items()},
        }

    def load(self) -> None:
        self.judge.load()

    def score(
        self, cases: list[dict[str, Any]], sources: list[Image.Image], edits: list[Image.Image]
    ) -> list[CaseScore]:
        conversations = []
        for case, source, edit in zip(cases, sources, edits, strict=True):
            text = {name: prompt.fill(case["prompt"]) for name, prompt in self.scorer_prompts.items()}
            conversations.append(conversation(text["consistency"], [("Image A", source), ("Image B", edit)]))
            conversations.append(conversation(text["quality"], [("The image", edit)]))
        judged = self.judge(conversations)
        return [_case_score(*judged[i : i + 2]) for i in range(0, len(judged), 2)]


def _case_score(sc: Judgement, pq: Judgement) -> CaseScore:
    reasons = [why_no_score(one) for one in (sc, pq) if one.score is None]
    o = None if sc.score is None or pq.score is None else math.sqrt(sc.score * pq.score)
    values = {"o": o, "sc": sc.score, "pq": pq.score}
    return CaseScore(values, {"sc": sc, "pq": pq}, reasons[0] if reasons else None)
