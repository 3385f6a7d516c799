"""RISEBench: edits that take reasoning about time, causes, space or logic."""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from ..judges import Judge, Judgement
from ..rewards.answers import final_answer
from ..rewards.prompts import load_benchmark_prompts, read_texts
from ..utils.image_paths import check_image_paths
from ..utils.images import read_image
from .benchmark import Benchmark, CaseScore, Metric, check_parser, why_no_score


LARGEST_SIDE = 768  # of an image as the judge sees it; smaller ones are not enlarged
# The scorer prompts, and where they are in the authors' `utils.py`
ORIGINALS = {
    "consistency": "prompt_consist",
    "consistency_spatial": "prompt_spatial_cons",
    "consistency_logical_text": "prompt_logical_cons_ans",
    "consistency_logical_image": "prompt_logical_cons",
    "reasoning": "prompt_reasoning",
    "reasoning_with_input": "prompt_reasoning_w_input",
    "reasoning_spatial": "prompt_spatial_ref",
    "reasoning_spatial_with_input": "prompt_spatial_ref_w_input",
    "reasoning_spatial_image": "prompt_spatial_ref_img",
    "reasoning_logical_text": "prompt_logical_txt",
    "reasoning_logical_image": "prompt_logical_img",
    "reasoning_logical_image_alone": "prompt_logical_img_wo_q",
    "plausibility": "prompt_generation",
    "plausibility_spatial": "prompt_spatial_qual",
}
CATEGORIES = ("temporal_reasoning", "causal_reasoning", "spatial_reasoning", "logical_reasoning")
FILES = ("datav2_total_w_subtask.json", "data_total.json")  # all 360 cases, and the first 64
NO_JSON = (json.JSONDecodeError, UnicodeDecodeError)
EMPTY = (None, "")
FEATURES = Features(
    {name: Value("string") for name in ("id", "prompt", "category", "subtask", "answer", "consistency", "reasoning")}
    | {"image": ImageFeature(decode=False), "answer_image": ImageFeature(decode=False), "shows_input": Value("bool")}
)


def read_rise_prompts(folder: Path) -> dict[str, str]:
    """
    Reads the scorer prompts from `utils.py` of RISEBench's own code, if the folder has it. It is not executed.

    Raises:
        `ValueError`: If it cannot be parsed, or lacks a prompt.
    """
    file = folder / "utils.py"
    if not file.is_file():
        return {}
    texts = read_texts(file, list(ORIGINALS.values()))
    ours = {"{instruct}": "{prompt}", "{reference}": "{requirement}"}
    return {
        name: re.sub(r"\{(?:instruct|reference)\}", lambda match: ours[match[0]], texts[original])
        for name, original in ORIGINALS.items()
    }


def parse_final_score(answer: str) -> float | None:
    """
    Reads the whole number from 0 to 5 after "Final Score" in a judge's answer; `None` if there is none, or there are
    different ones.
    """
    text = re.sub(r"[*_`#<>]+", "", final_answer(answer))
    found = set(re.findall(r"final scores?\s*:?\s*(\d+)(?!\s*[,.]?\d)", text, re.IGNORECASE))
    only = int(found.pop()) if len(found) == 1 else None
    return float(only) if only is not None and only <= 5 else None


def rise_score(
    is_logical: bool, reasoning: float, consistency: float | None, plausibility: float | None
) -> tuple[float, bool]:
    """
    The score of an edit from 1 to 5, and whether it is right: all that was judged has full marks.

    Args:
        is_logical (`bool`):
            Whether the case is of logical reasoning, whose looks are not judged.
        reasoning, consistency, plausibility (`float`):
            The scores, from 1 to 5. The last two are `None` where they are not judged.
    """
    of_consistency = 0.0 if consistency is None else 0.3
    of_looks = 0.0 if is_logical else 0.2
    marks = ((1 - of_consistency - of_looks, reasoning), (of_consistency, consistency), (of_looks, plausibility))
    score = sum(weight * mark for weight, mark in marks if mark is not None)
    is_right = all(mark in (5, None) for _, mark in marks)
    return max(1.0, score / 2) if reasoning == 1 else score, is_right


class RISEBench(Benchmark):
    """
    RISEBench: 360 cases of temporal, causal, spatial and logical reasoning.

    The judge is asked up to three questions, each in one message: what is not spoken of must be as it was
    (consistency), the edit must show the answer that the benchmark knows, as text or as image (reasoning), and it must
    look real (plausibility). Scores are from 1 to 5; those of logical cases are 0 or 1, which stand for 1 and 5, and
    their looks are not judged. The weights are 0.3, 0.5 and 0.2, or 0.3 and 0.7 for logical cases, or 0.8 for
    reasoning where consistency is not judged; with a reasoning of 1 the score is halved. An edit is right if all that
    was judged has full marks. The main result is the share of right edits, over all cases, in percent.

    Paper: [RISEBench](https://huggingface.co/papers/2504.02826).

    Args:
        judge ([`Judge`]):
            A judge with `parse=parse_final_score` and `max_new_tokens` of 256 or more. The benchmark's own is
            `gpt-4.1-2025-04-14`.
        dataset (`str` or `Path`):
            Folder with the authors' `datav2_total_w_subtask.json` (360 cases) or `data_total.json` (64), and the
            images of their `data.zip` beside it or in `data/`.
        scorer_prompts (`str`, *optional*):
            A checkout of the authors' code, whose `utils.py` has the prompts, or a folder with a file for each of
            `ORIGINALS`. By default those of this package, in our own words.
        scorer_prompts_revision (`str`, *optional*):
            Branch, tag or commit of a Hub repository of prompts.
        image_root (`str`, *optional*):
            Where images may lie outside the dataset, see [`~hp_edit_trl.cases.load_split`].

    Raises:
        `FileNotFoundError`: If a file is missing.
        `ValueError`: If the judge reads other scores from its answers, or a case is not valid.
    """

    name = "rise"
    title = "RISEBench"
    metrics = {name: Metric(name.capitalize(), 100.0) for name in ("accuracy", "score", "reasoning")}
    average = "cases"
    group = "category"
    judge_options = {"parse": parse_final_score, "max_new_tokens": 2048}  # reasons come before the score

    def __init__(
        self,
        judge: Judge,
        dataset: str | Path,
        scorer_prompts: str | None = None,
        scorer_prompts_revision: str | None = None,
        image_root: str | None = None,
    ):
        check_parser(judge, parse_final_score, min_new_tokens=256)
        super().__init__(judge, str(dataset), image_root=image_root)
        self.scorer_prompts = load_benchmark_prompts(
            self.name,
            list(ORIGINALS),
            scorer_prompts,
            scorer_prompts_revision,
            filled="consistency",
            read_originals=read_rise_prompts,
        )

    @cached_property
    def dataset(self) -> Dataset:
        folder = Path(self.source)
        file = next((folder / name for name in FILES if (folder / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"{self.source} has no {' or '.join(FILES)}: name a folder with RISEBench's data and its images."
            )
        try:
            given = json.loads(file.read_text(encoding="utf-8"))
            rows = [{name: value for name, value in row.items() if value not in EMPTY} for row in given]
            # As in the benchmark's own code, one such case decides for all.
            asks_alone = any("reasoning_wo_ins" in row for row in given)
            cases = [self._case(row, asks_alone) for row in rows]
        except (KeyError, TypeError, AttributeError, RecursionError, *NO_JSON) as error:
            raise ValueError(f"{file} is not RISEBench's: {type(error).__name__}: {error}") from error
        if not cases:
            raise ValueError(f"{file} has no cases.")
        root = next((one for one in (folder, folder / "data") if (one / cases[0]["image"]).is_file()), None)
        if root is None:
            raise FileNotFoundError(
                f"{self.source} lacks the images: unpack data.zip, so that it has data/{cases[0]['image']}."
            )
        for case in cases:
            for name in ("image", "answer_image"):
                if case[name] is not None:
                    case[name] = str(root / case[name])
        return check_image_paths(
            Dataset.from_list(cases, features=FEATURES), str(self.source), [str(self.source)], self.image_root
        )

    @staticmethod
    def _case(row: dict[str, Any], asks_alone: bool) -> dict[str, Any]:
        """A case, with the names of its prompts and what they are shown, as the benchmark's own code chooses them."""
        names = ("index", "instruction", "image", "category", "reference", "reference_txt", "reference_img", "subtask")
        if wrong := [name for name in names if not isinstance(row.get(name, ""), str)]:
            raise TypeError(f"{wrong[0]} of the case {row['index']!r} is no text")
        category = row["category"]
        if category not in CATEGORIES:
            raise ValueError(f"RISEBench: the case {row['index']!r} has the category {category!r}, not {CATEGORIES}.")
        image, answer = None, row.get("reference")
        if category == "logical_reasoning":
            answer = row.get("reference_txt")
            image = None if answer is not None else row.get("reference_img")
            consistency, reasoning = "consistency_logical_text", "reasoning_logical_text"
            if image is not None:
                reasoning = "reasoning_logical_image_alone" if asks_alone else "reasoning_logical_image"
                consistency = "consistency_logical_image"
        elif category == "spatial_reasoning":
            image = row.get("reference_img")
            end = "_image" if image is not None else "_with_input" if "reasoning_img" in row else ""
            consistency, reasoning = "consistency_spatial", f"reasoning_spatial{end}"
        else:
            consistency = "consistency"
            reasoning = "reasoning_with_input" if "reasoning_img" in row else "reasoning"
        if image is None and answer is None:
            raise ValueError(f"RISEBench: the case {row['index']!r} has no answer, neither as text nor as an image.")
        return {
            "id": row["index"],
            "prompt": row["instruction"],
            "category": category,
            "subtask": row.get("subtask"),
            "image": row["image"],
            "answer": answer,
            "answer_image": image,
            "consistency": None if "consistency_free" in row else consistency,
            "reasoning": reasoning,
            "shows_input": image is not None or reasoning.endswith("_with_input"),
        }

    def score(
        self, cases: list[dict[str, Any]], references: list[list[Image.Image]], edits: list[Image.Image]
    ) -> list[CaseScore]:
        questions: list[tuple[int, str]] = []  # the case and the dimension of each
        conversations = []
        for i, (case, (reference,), edit) in enumerate(zip(cases, references, edits, strict=True)):
            # With the right result as an image, that takes the place of the reference everywhere.
            first = reference
            if case["answer_image"] is not None:
                first = read_image(case["answer_image"], f"The answer of case {case['id']!r}")
            asked = {"reasoning": (case["reasoning"], [first, edit] if case["shows_input"] else [edit])}
            if case["consistency"] is not None:
                asked["consistency"] = (case["consistency"], [first, edit])
            if case["category"] != "logical_reasoning":
                looks = "plausibility_spatial" if case["category"] == "spatial_reasoning" else "plausibility"
                asked["plausibility"] = (looks, [edit])
            for dimension, (name, images) in asked.items():
                text = self.scorer_prompts[name].fill(case["prompt"], case["answer"], quote=False)
                shown = [{"type": "image", "image": _as_judged(image)} for image in images]
                conversations.append([{"role": "user", "content": [{"type": "text", "text": text}, *shown]}])
                questions.append((i, dimension))
        judged: list[dict[str, Judgement]] = [{} for _ in cases]
        for (i, dimension), judgement in zip(questions, self.judge(conversations), strict=True):
            judged[i][dimension] = judgement
        return [_case_score(case, one) for case, one in zip(cases, judged, strict=True)]


def _as_judged(image: Image.Image) -> Image.Image:
    shown = image.copy()
    shown.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return shown


def _case_score(case: dict[str, Any], judged: dict[str, Judgement]) -> CaseScore:
    is_logical = case["category"] == "logical_reasoning"
    marks: dict[str, float] = {}
    reason = why_no_score(*judged.values())
    for dimension, judgement in judged.items():
        mark = judgement.score
        if mark is not None and not (mark <= 1 if is_logical else mark >= 1):
            reason = reason or f"no score in the answer: {dimension} is {mark:g}, outside its scale"
        elif mark is not None:
            marks[dimension] = 1 + 4 * mark if is_logical else mark
    if reason is not None:
        return CaseScore(dict.fromkeys(RISEBench.metrics), judged, reason)
    reasoning = marks["reasoning"]
    score, is_right = rise_score(is_logical, reasoning, marks.get("consistency"), marks.get("plausibility"))
    values: dict[str, float | None] = {"accuracy": 100.0 * is_right}
    values |= {"score": 25 * (score - 1), "reasoning": 25 * (reasoning - 1)}
    return CaseScore(values, judged)
