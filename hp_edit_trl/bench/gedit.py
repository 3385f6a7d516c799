"""GEdit-Bench: prompts of users in English and Chinese, judged for semantic consistency and perceptual quality."""

import json
import math
import re
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

from ..judges import Judge, describe_judge, parse_score, with_parser
from ..rewards import HPScorerReward
from ..rewards.answers import final_answer, json_values
from ..rewards.prompts import load_benchmark_prompts, read_texts
from .benchmark import Benchmark, CaseScore, Metric, check_has_columns, check_parser, why_no_score


JUDGED_AREA = 512 * 512  # pixels of an image as the judge sees it
# The prompts as parts of the authors' `vie_prompts.py`, joined by line breaks
ORIGINALS = {
    "consistency": ("_context_no_delimit", "_prompts_0shot_two_image_edit_rule", "_prompts_0shot_tie_rule_SC"),
    "quality": ("_context_no_delimit", "_prompts_0shot_rule_PQ"),
}
# The scorer prompt of HP-Scorer for each task. The base prompt is for tasks that none of the paper's eight covers:
# changes of tone are also of season, weather and colors, which the prompt for relighting would take for faults.
SCORER_TASKS = {
    "background_change": "background",
    "color_alter": "color",
    "material_alter": "base",
    "motion_change": "base",
    "ps_human": "base",
    "style_change": "style",
    "subject-add": "add",
    "subject-remove": "remove",
    "subject-replace": "swap",
    "text_change": "base",
    "tone_transfer": "base",
}


def as_judged(image: Image.Image) -> Image.Image:
    """The image at the size at which GEdit-Bench's own code shows it to the judge: `JUDGED_AREA`, its aspect ratio."""
    width = math.sqrt(JUDGED_AREA * image.width / image.height)
    size = max(1, int(width)), max(1, int(width * image.height / image.width))
    return image.resize(size, Image.Resampling.BICUBIC)


def read_gedit_prompts(folder: Path) -> dict[str, str]:
    """
    Reads the scorer prompts from `vie_prompts.py` of GEdit-Bench's own code, if the folder has it. It is not executed.

    Raises:
        `ValueError`: If it cannot be parsed, or lacks a part.
    """
    file = folder / "vie_prompts.py"
    if not file.is_file():
        return {}
    parts = read_texts(file, [name for names in ORIGINALS.values() for name in names])
    return {prompt: "\n".join(parts[name] for name in names) for prompt, names in ORIGINALS.items()}


def parse_pair(answer: str) -> float | None:
    """
    Reads the smaller of the two scores, 0 to 10, in a judge's answer; `None` if the answer does not hold exactly two.

    Accepts JSON with a list `score`, such as `{"score": [7, 8], "reasoning": "..."}`, alone, in a code block or in
    other text, and a list alone, after any reasoning that is closed by `</think>`. Reasoning that was cut off holds no
    scores.
    """
    text = final_answer(answer)
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", text)
    found = json_values(text, "score")
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


class GEditBench(Benchmark):
    r"""
    GEdit-Bench: 606 images with an English and a Chinese prompt each, in eleven tasks.

    The judge sees reference and edit and gives two scores from 0 to 10, the smaller of which is SC (semantic
    consistency). It then sees the edit alone and gives two more, the smaller of which is PQ (perceptual quality). As
    in the benchmark's own code, a question is one message, the prompt before the images; these have an area of
    512 x 512 pixels, each in its own aspect ratio; and an answer is the scores and then the reasons.

    For each edit, \\( O = \sqrt{SC \cdot PQ} \\). The main result is the unweighted mean of the tasks' means for each
    language, and again for the cases that the benchmark marks as the `intersection`: those that every system in its
    authors' comparison could edit. Where a judge's answer holds no scores, they are missing; the benchmark's own code
    draws random scores.

    Paper: [Step1X-Edit](https://huggingface.co/papers/2504.17761), section 4.

    Args:
        judge ([`Judge`]):
            A judge with `parse=parse_pair` and `max_new_tokens` of 128 or more. The benchmark's own judges are GPT-4.1
            and Qwen2.5-VL-72B-Instruct.
        dataset (`str` or [`~datasets.Dataset`], *optional*, defaults to `"stepfun-ai/GEdit-Bench"`):
            The cases: a folder, a Hub repository or a dataset, with `key`, `task_type`, `instruction`,
            `instruction_language` (`"en"` or `"cn"`), `Intersection_exist`, and `input_image_raw` or `input_image`.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the dataset.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        scorer_prompts (`str`, *optional*):
            Folder or Hub repository with the scorer prompts `consistency` and `quality` (`.md` or `.txt`), e.g. the
            benchmark's original prompts, also in the authors' own file `vie_prompts.py`. By default those of this
            package, in our own words.
        scorer_prompts_revision (`str`, *optional*):
            Branch, tag or commit of that Hub repository.
        image_root (`str`, *optional*):
            Where images may lie outside the dataset, see [`~hp_edit_trl.cases.load_split`].
        language (`str`, *optional*):
            `"en"` or `"cn"`: only the cases with a prompt in this language. By default all.
        hp_scorer (`bool` or [`HPScorerReward`], *optional*, defaults to `False`):
            Whether HP-Scorer scores the edits as well, from 0 to 5 (`hp_score`), with the scorer prompts that
            `SCORER_TASKS` names. `True` asks the same judge; an [`HPScorerReward`] may have another one, or other
            scorer prompts.

    Raises:
        `ValueError`: If the judge reads other scores from its answers, the scorer prompt `consistency` has no place
            for the prompt, the dataset lacks a column or a language, or HP-Scorer has no prompt for a task.
        `TypeError`: If `hp_scorer` is neither, or the judge is of a kind that cannot be asked for other scores.
    """

    name = "gedit"
    title = "GEdit-Bench"
    metrics = {"o": Metric("O", 10.0), "sc": Metric("SC", 10.0), "pq": Metric("PQ", 10.0)}
    group = "task_type"
    judge_options = {"parse": parse_pair, "max_new_tokens": 1400}  # reasons come with the scores

    def __init__(
        self,
        judge: Judge,
        dataset: str | Path | Dataset = "stepfun-ai/GEdit-Bench",
        split: str = "train",
        revision: str | None = None,
        scorer_prompts: str | None = None,
        scorer_prompts_revision: str | None = None,
        image_root: str | None = None,
        language: str | None = None,
        hp_scorer: bool | HPScorerReward = False,
    ):
        check_parser(judge, parse_pair, min_new_tokens=128)
        if language not in (None, "en", "cn"):
            raise ValueError(f"language={language!r} must be 'en' or 'cn', or None for both.")
        if not isinstance(hp_scorer, bool | HPScorerReward):
            raise TypeError(f"hp_scorer={hp_scorer!r} must be true, false or an HPScorerReward.")
        super().__init__(judge, dataset, split, revision, image_root)
        self.scorer_prompts = load_benchmark_prompts(
            self.name,
            ("consistency", "quality"),
            scorer_prompts,
            scorer_prompts_revision,
            filled="consistency",
            read_originals=read_gedit_prompts,
        )
        self.language = language
        self.asks_same_judge = hp_scorer is True
        self.hp_scorer = hp_scorer if isinstance(hp_scorer, HPScorerReward) else None
        if self.asks_same_judge:
            self.hp_scorer = HPScorerReward(with_parser(judge, parse_score))
        if self.hp_scorer is not None:
            self.metrics = self.metrics | {"hp_score": Metric("HP-score", 5.0)}

    def to_cases(self, raw: Dataset) -> Dataset:
        image = "input_image_raw" if "input_image_raw" in raw.column_names else "input_image"
        names = {"instruction": "prompt", "instruction_language": "language", "Intersection_exist": "intersection"}
        names |= {"task_type": "task_type", "key": "id", image: "image"}
        check_has_columns(raw, self.title, names)
        if None in (languages := raw["instruction_language"][:]):
            raise ValueError(
                f"Row {languages.index(None)} of GEdit-Bench has no instruction_language: write 'en' or 'cn'."
            )
        if self.language is not None:
            rows = [row for row, language in enumerate(languages) if language == self.language]
            if not rows:
                raise ValueError(f"{self.title} has no case in the language {self.language!r}.")
            raw = raw.select(rows)
        cases = raw.select_columns(list(names)).rename_columns({old: new for old, new in names.items() if old != new})
        if self.hp_scorer is not None:
            self.scorer_prompts = self.scorer_prompts | {
                task: self.hp_scorer.scorer_prompt(task)
                for task in sorted(set(map(self._scorer_task, cases["task_type"])))
            }
        if len(set(cases["id"])) < len(cases):  # one key for both languages
            ids = [f"{key}-{language}" for key, language in zip(cases["id"], cases["language"], strict=True)]
            cases = cases.remove_columns("id").add_column("id", ids)
        return cases

    def _scorer_task(self, task_type: str) -> str:
        if task_type not in SCORER_TASKS:
            raise ValueError(
                f"HP-Scorer has no prompt for the task {task_type!r}; those of GEdit-Bench are "
                f"{', '.join(SCORER_TASKS)}."
            )
        return SCORER_TASKS[task_type]

    @property
    def settings(self) -> dict[str, Any]:
        settings = super().settings | {"language": self.language}
        if self.hp_scorer is None:
            return settings
        # Of HP-Scorer, whose scores are compared with people's
        judge = self.hp_scorer.judge
        settings |= {"hp_judge": describe_judge(judge), "score_mode": judge.identity.get("score_mode")}
        return settings | {
            "scorer_tasks": {task: SCORER_TASKS[task] for task in sorted(set(self.dataset["task_type"]))}
        }

    def load(self) -> None:
        super().load()
        if self.asks_same_judge:
            # Again, now that the weights are there: they are shared
            self.hp_scorer.judge = with_parser(self.judge, parse_score)  # type: ignore[union-attr]
        elif self.hp_scorer is not None:
            self.hp_scorer.load()

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        marks: dict[str, set[bool]] = {}
        for language, mark in zip(self.dataset["language"], self.dataset["intersection"], strict=True):
            marks.setdefault(language, set()).add(mark)
        languages = sorted(marks, reverse=True)
        return {language: {"language": language} for language in languages} | {
            f"{language}, intersection": {"language": language, "intersection": True}
            for language in languages
            if marks[language] == {True, False}  # otherwise the part is all of the language, or empty
        }

    def score(
        self, cases: list[dict[str, Any]], references: list[list[Image.Image]], edits: list[Image.Image]
    ) -> list[CaseScore]:
        conversations = []
        for case, (reference,), edit in zip(cases, references, edits, strict=True):
            text = {name: prompt.fill(case["prompt"], quote=False) for name, prompt in self.scorer_prompts.items()}
            shown = as_judged(edit)
            conversations.append(_question(text["consistency"], as_judged(reference), shown))
            conversations.append(_question(text["quality"], shown))
        judged = self.judge(conversations)
        scores = []
        for sc, pq in zip(judged[::2], judged[1::2], strict=True):
            o = None if sc.score is None or pq.score is None else math.sqrt(sc.score * pq.score)
            values = {"o": o, "sc": sc.score, "pq": pq.score}
            scores.append(CaseScore(values, {"sc": sc, "pq": pq}, why_no_score(sc, pq)))
        if self.hp_scorer is not None:
            prompts, tasks = [case["prompt"] for case in cases], [SCORER_TASKS[case["task_type"]] for case in cases]
            judged = self.hp_scorer.judge_edits(prompts, edits, references, [*tasks], [None] * len(cases))
            for score, hp in zip(scores, judged, strict=True):
                score.values["hp_score"], score.judgements["hp_score"] = hp.score, hp
                score.reason = score.reason or why_no_score(hp)
        return scores


def _question(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    """A conversation of one message, the prompt before the images."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    return [{"role": "user", "content": content + [{"type": "image", "image": image} for image in images]}]
