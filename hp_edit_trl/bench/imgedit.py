"""ImgEdit-Bench, the basic suite: edits of nine types, each with a prompt of its own and three scores."""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from ..judges import Judge
from ..rewards.answers import final_answer
from ..rewards.prompts import load_benchmark_prompts
from ..utils.image_paths import check_image_paths
from .benchmark import Benchmark, CaseScore, Metric, check_parser, why_no_score


TYPES = ("action", "add", "alter", "background", "compose", "extract", "remove", "replace", "style")
# Where the originals lie beside `basic_edit.json`: as its readme says, and as the archive of the Hub has them
IMAGES = ("original_images", "singleturn", "Benchmark/singleturn", ".")


def read_imgedit_prompts(folder: Path) -> dict[str, str]:
    """
    Reads the scorer prompts from `prompts.json` of ImgEdit's own code, if the folder has it.

    Raises:
        `ValueError`: If it is no JSON object of texts.
    """
    file = folder / "prompts.json"
    if not file.is_file():
        return {}
    try:
        prompts = json.loads(file.read_text(encoding="utf-8"))
        texts = {name: re.sub("<edit_prompt>", "{prompt}", text) for name, text in prompts.items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON object of prompts by type: {error}") from error
    # The readme, and other versions of the file, call one type differently.
    return texts if "alter" in texts or "adjust" not in texts else texts | {"alter": texts["adjust"]}


def parse_three(answer: str) -> float | None:
    """
    Reads the mean of the three scores from 1 to 5 in a judge's answer, each at the end of a line of its own, as in
    `"Prompt Compliance: 4"`; `None` if there are not exactly three.
    """
    lines = (re.sub(r"[*_`#]+", "", line).strip() for line in final_answer(answer).splitlines())
    found = [match[1] for line in lines if (match := re.fullmatch(r"[^:]+:\s*(\d+)(?:\s*/\s*5)?\.?", line))]
    scores = [int(one) for one in found]
    return sum(scores) / 3 if len(scores) == 3 and all(1 <= score <= 5 for score in scores) else None


class ImgEditBench(Benchmark):
    """
    ImgEdit-Bench, the basic suite: 737 cases of nine types.

    The judge sees the prompt of the case's type, the reference and the edit, in one message, and gives three scores
    from 1 to 5; their mean is the score of the edit. The main result is the unweighted mean of the types' means. What
    the prompts say of the scores, e.g. that none may exceed the first, is up to the judge, as in the benchmark's own
    code. That code takes the mean of as many scores as it finds; here an answer with another number has none.

    Paper: [ImgEdit](https://huggingface.co/papers/2505.20275).

    Args:
        judge ([`Judge`]):
            A judge with `parse=parse_three` and `max_new_tokens` of 128 or more. The benchmark's own is GPT-4o.
        dataset (`str` or `Path`):
            Folder with the authors' `basic_edit.json` (`Benchmark/Basic` in their repository) and the originals, in
            `original_images/` or `singleturn/`.
        scorer_prompts (`str`, *optional*):
            Folder with the authors' `prompts.json` (`Benchmark/Basic` as well), or with a file `<type>.md` or
            `<type>.txt` for each type. By default the folder of the dataset.
        image_root (`str`, *optional*):
            Where images may lie outside the dataset, see [`~hp_edit_trl.cases.load_split`].

    Raises:
        `FileNotFoundError`: If a file is missing.
        `ValueError`: If the judge reads other scores from its answers, a prompt has no place for the instruction, or
            the dataset is not valid.
    """

    name = "imgedit"
    title = "ImgEdit-Bench"
    metrics = {"score": Metric("Score", 5.0)}
    group = "edit_type"
    judge_options = {"parse": parse_three, "max_new_tokens": 512}  # a reason comes with the scores

    def __init__(
        self, judge: Judge, dataset: str | Path, scorer_prompts: str | None = None, image_root: str | None = None
    ):
        check_parser(judge, parse_three, min_new_tokens=128)
        super().__init__(judge, str(dataset), image_root=image_root)
        self.scorer_prompts = load_benchmark_prompts(
            self.name, TYPES, scorer_prompts or str(dataset), read_originals=read_imgedit_prompts
        )
        for name, prompt in self.scorer_prompts.items():
            if "{prompt}" not in prompt.text:
                raise ValueError(
                    f"The prompt {name} has no <edit_prompt>, so the judge would not see the instruction."
                )

    @cached_property
    def dataset(self) -> Dataset:
        file = Path(self.source) / "basic_edit.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{self.source} has no basic_edit.json: name a folder with that file of ImgEdit's repository."
            )
        try:
            given = json.loads(file.read_text(encoding="utf-8"))
            rows = [{"id": key} | {name: row[name] for name in ("prompt", "edit_type")} for key, row in given.items()]
            names = [str(row["id"]) for row in given.values()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} is not ImgEdit's: {type(error).__name__}: {error}") from error
        if unknown := sorted({str(row["edit_type"]) for row in rows} - set(TYPES)):
            raise ValueError(f"{file} has the types {', '.join(unknown)}, for which there is no prompt.")
        folders = [file.parent / name for name in IMAGES if names and (file.parent / name / names[0]).is_file()]
        if not folders:
            raise FileNotFoundError(
                f"{self.source} lacks the originals: unpack them into original_images/, so that it has "
                f"original_images/{names[0] if names else '...'}."
            )
        rows = [row | {"image": str(folders[0] / name)} for row, name in zip(rows, names, strict=True)]
        dataset = Dataset.from_list(rows).cast_column("image", ImageFeature(decode=False))
        return check_image_paths(dataset, str(self.source), [str(self.source)], self.image_root)

    def score(
        self, cases: list[dict[str, Any]], references: list[list[Image.Image]], edits: list[Image.Image]
    ) -> list[CaseScore]:
        conversations = []
        for case, (reference,), edit in zip(cases, references, edits, strict=True):
            text = self.scorer_prompts[case["edit_type"]].fill(case["prompt"], quote=False)
            content = [{"type": "text", "text": text}, *({"type": "image", "image": one} for one in (reference, edit))]
            conversations.append([{"role": "user", "content": content}])
        return [
            CaseScore({"score": one.score}, {"score": one}, why_no_score(one)) for one in self.judge(conversations)
        ]
