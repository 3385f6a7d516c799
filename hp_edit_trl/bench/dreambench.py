"""DreamBench++: a subject in other circumstances, graded for whether it is still the same and whether the description was followed."""

import logging
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, DownloadManager
from datasets import Image as ImageFeature
from huggingface_hub import snapshot_download
from PIL import Image
from torchvision import transforms
from transformers import AutoConfig, AutoModel, CLIPModel, CLIPProcessor

from ..judges import Judge, Judgement, describe_judge, without_reasoning
from ..rewards.prompts import load_benchmark_prompts
from .results import CaseScore, check_parser, conversation, why_no_score


logger = logging.getLogger(__name__)

KINDS = ("photorealistic",) * 4 + ("style",) * 3 + ("imaginative",) * 2  # of the nine descriptions, in their order
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def parse_grade(answer: str) -> float | None:
    """
    The grade, 0 to 4, in a judge's answer, or `None` if it does not hold exactly one.

    Accepts a digit from 0 to 4, alone or as in `"Score: 3"`, `"3/4"`, `"3.0"` or `"**3**"`, also as the only sentence `Score: 3` at the
    end of a line, after any reasoning that is closed by `</think>`. A grade on another scale, such as `"4/5"`, is none, and reasoning that
    was cut off holds none.
    """
    text = re.sub(r"[*_`#]+", " ", without_reasoning(answer))
    if "<think>" in text:
        return None
    name, grade = r"(?:final |overall )?(?:score|grade|rating|answer)", r"\[?([0-4])\]?(?:\.0)?(?:\s*/\s*4)?\.?"
    whole = re.fullmatch(rf"\s*(?:{name}\s*(?:is|:|=)?\s*)?{grade}\s*", text, re.IGNORECASE)
    if whole:
        return float(whole[1])
    lines = re.findall(rf"(?:^[ \t>-]*|[.!?;][ \t]+){name}\s*[:=]\s*(.*?)\s*$", text, re.IGNORECASE | re.MULTILINE)
    # A line without a grade counts too: what stands beside it is then not the only one.
    grades = {match and match[1] for match in (re.fullmatch(grade, line) for line in lines)}
    only = grades.pop() if len(grades) == 1 else None
    return None if only is None else float(only)


class DreamBenchPlus:
    r"""
    DreamBench++: 150 images of a subject with nine descriptions each, four photorealistic, three in another style, two imaginative.

    The judge grades from 0 to 4 how well the subject was kept (concept preservation, CP; it sees source and edit) and how well the
    description was followed (prompt following, PF; it sees the edit alone), each several times (`num_answers` of the judge, three in the
    benchmark); CP and PF are the mean grades divided by 4, and CP·PF is the product of their means. Beside them stand the cosines of
    embeddings: CLIP-I and DINO-I of source and edit, CLIP-T of description and edit. The main result is the mean over all cases. An
    answer without a grade is missing.

    Images for DINO are scaled to 256 pixels on the shorter side and cropped to 224, as the benchmark does it.

    Paper: [DreamBench++](https://huggingface.co/papers/2406.16855).

    Args:
        judge ([`Judge`]):
            A judge with `parse=parse_grade` and `num_answers=3`. The benchmark's own is GPT-4o.
        dataset (`str`, *optional*, defaults to `"yuangpeng/dreambench_plus"`):
            A folder, or a Hub repository that holds it as a ZIP file, with `images/<category>/**/<n>.jpg` and
            `captions/<category>/**/<n>.txt`: the subject in the first line, then nine descriptions.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        scorer_prompts (`str`, *optional*):
            Folder or Hub repository with the judge's prompts `concept_preservation`, `style_preservation` (for subjects of the category
            `style`) and `prompt_following` (`.md` or `.txt`), for those who have the benchmark's own. By default this package's, in
            other words.
        scorer_prompts_revision (`str`, *optional*):
            Branch, tag or commit of that Hub repository.
        clip (`str`, *optional*, defaults to `"openai/clip-vit-base-patch32"`):
            CLIP model for CLIP-I and CLIP-T; `None` leaves them out.
        dino (`str`, *optional*, defaults to `"facebook/dino-vits8"`):
            DINO model for DINO-I, e.g. also `"facebook/dinov2-small"`; `None` leaves it out.

    Raises:
        `FileNotFoundError`: If there are no cases at `dataset`.
        `ValueError`: If the judge takes other answers, the prompt `prompt_following` has no place for the description, an image has
            not nine descriptions, or `clip` is no CLIP model.
    """

    name = "dreambench"
    average = "cases"
    group = "kind"

    def __init__(
        self,
        judge: Judge,
        dataset: str | Path = "yuangpeng/dreambench_plus",
        revision: str | None = None,
        scorer_prompts: str | None = None,
        scorer_prompts_revision: str | None = None,
        clip: str | None = "openai/clip-vit-base-patch32",
        dino: str | None = "facebook/dino-vits8",
    ):
        check_parser(judge, parse_grade)
        samples = getattr(getattr(judge, "judge", judge), "num_answers", 3)
        if samples < 3:
            logger.warning(
                "The judge gives num_answers=%d grades for each edit. DreamBench++ takes the mean of three.", samples
            )
        self.judge = judge
        self.source = str(dataset)
        self.revision = revision
        names = ("concept_preservation", "style_preservation", "prompt_following")
        self.scorer_prompts = load_benchmark_prompts("dreambench", names, scorer_prompts, scorer_prompts_revision)
        if "{prompt}" not in self.scorer_prompts["prompt_following"].text:
            raise ValueError(
                f"The prompt prompt_following in {scorer_prompts} has no {{instruction}}, so the judge would not see the description: write it "
                "where the description belongs. The benchmark's own file has none, because its code sends the description apart."
            )
        self.clip = clip
        self.dino = dino

    @property
    def metrics(self) -> dict[str, float]:
        of_dino = {} if self.dino is None else {"dino_i": 1.0}
        of_clip = {} if self.clip is None else {"clip_i": 1.0, "clip_t": 1.0}
        return {"cp_pf": 1.0, "cp": 1.0, "pf": 1.0, **of_dino, **of_clip}

    @property
    def products(self) -> dict[str, tuple[str, str]]:
        return {"cp_pf": ("cp", "pf")}

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        return {"": {}} | {category: {"category": category} for category in sorted(set(self.dataset["category"]))}

    @cached_property
    def _folder(self) -> tuple[Path, str | None]:
        """The folder with the images, and its commit if it came from the Hub."""
        if Path(self.source).is_dir():
            return Path(self.source), None
        try:
            snapshot = Path(snapshot_download(self.source, repo_type="dataset", revision=self.revision))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{self.source} is neither a folder nor a dataset on the Hub that can be read: {error}"
            ) from error
        archives = sorted(snapshot.glob("*.zip"))
        return Path(DownloadManager().extract(str(archives[0]))) if archives else snapshot, snapshot.name

    @cached_property
    def dataset(self) -> Dataset:
        rows = []
        # Without what a Mac hides beside the files of an archive
        captions = sorted(self._folder[0].glob("**/captions/**/[!.]*.txt"))
        for file in captions:
            parts = list(file.parts)
            parts[len(parts) - 1 - parts[::-1].index("captions")] = "images"
            stem = Path(*parts).with_suffix("")
            images = [image for suffix in SUFFIXES if (image := stem.with_suffix(suffix)).is_file()]
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            if not images or len(lines) != 1 + len(KINDS):
                raise ValueError(
                    f"{file} must hold a subject and {len(KINDS)} descriptions, and have an image {stem}.jpg: it has "
                    f"{len(lines)} lines and {'an' if images else 'no'} image."
                )
            category, number = file.parent.name, file.stem
            for place, (kind, prompt) in enumerate(zip(KINDS, lines[1:], strict=True)):
                case = {"id": f"{category}-{number}-{place}", "image": str(images[0]), "prompt": prompt, "kind": kind}
                rows.append(case | {"category": category, "subject": lines[0]})
        if not rows:
            raise FileNotFoundError(
                f"{self.source} has no folder captions/ with text files, so no cases of DreamBench++."
            )
        return Dataset.from_list(rows).cast_column("image", ImageFeature(decode=False))

    @property
    def settings(self) -> dict[str, Any]:
        models = {"clip": self.clip, "dino": self.dino}
        return {
            "dataset": self.source,
            "revision": self._folder[1],
            "judge": describe_judge(self.judge),
            "scorer_prompts": {name: [prompt.revision, prompt.digest] for name, prompt in self.scorer_prompts.items()},
            **{name: None if model is None else [model, _commit(model)] for name, model in models.items()},
        }

    def load(self) -> None:
        self.judge.load()
        for model in [*([self._dino] if self.dino else []), *([self._clip] if self.clip else [])]:
            model.to(PartialState().device)

    @cached_property
    def _clip(self) -> CLIPModel:
        kind = AutoConfig.from_pretrained(self.clip).model_type
        if kind != "clip":  # it would be loaded all the same, with random weights
            raise ValueError(
                f"clip={self.clip!r} is a model of type {kind}: name a CLIP model, or None to leave it out."
            )
        return CLIPModel.from_pretrained(self.clip).requires_grad_(False).eval()

    @cached_property
    def _clip_processor(self) -> CLIPProcessor:
        return CLIPProcessor.from_pretrained(self.clip)

    @cached_property
    def _dino(self) -> torch.nn.Module:
        return AutoModel.from_pretrained(self.dino).requires_grad_(False).eval()

    def score(
        self, cases: list[dict[str, Any]], sources: list[Image.Image], edits: list[Image.Image]
    ) -> list[CaseScore]:
        conversations = []
        for case, source, edit in zip(cases, sources, edits, strict=True):
            text = {name: prompt.fill(case["prompt"]) for name, prompt in self.scorer_prompts.items()}
            kept = "style_preservation" if case["category"] == "style" else "concept_preservation"
            conversations.append(conversation(text[kept], [("Image A", source), ("Image B", edit)]))
            conversations.append(conversation(text["prompt_following"], [("The image", edit)]))
        judged = self.judge(conversations)
        cosines: dict[str, list[float]] = {}
        if self.dino is not None:
            cosines["dino_i"] = _cosines(self._seen_by_dino(sources), self._seen_by_dino(edits))
        if self.clip is not None:
            seen = self._seen_by_clip(edits)
            cosines["clip_i"] = _cosines(self._seen_by_clip(sources), seen)
            cosines["clip_t"] = _cosines(self._read_by_clip([case["prompt"] for case in cases]), seen)
        return [
            _case_score(judged[2 * i], judged[2 * i + 1], {name: values[i] for name, values in cosines.items()})
            for i in range(len(cases))
        ]

    def _seen_by_dino(self, images: list[Image.Image]) -> torch.Tensor:
        """Embeddings of shape `(images, width)`: the class token after the last layer."""
        prepare = transforms.Compose(
            [
                transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        pixels = torch.stack([prepare(image) for image in images]).to(PartialState().device)
        return self._dino(pixels).last_hidden_state[:, 0]

    def _seen_by_clip(self, images: list[Image.Image]) -> torch.Tensor:
        inputs = self._clip_processor(images=images, return_tensors="pt").to(PartialState().device)
        return self._clip.get_image_features(**inputs).pooler_output

    def _read_by_clip(self, texts: list[str]) -> torch.Tensor:
        inputs = self._clip_processor(text=texts, padding=True, truncation=True, return_tensors="pt")
        return self._clip.get_text_features(**inputs.to(PartialState().device)).pooler_output


def _cosines(one: torch.Tensor, other: torch.Tensor) -> list[float]:
    return torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1).tolist()


def _commit(model: str) -> str | None:
    """The commit of a model on the Hub, `None` for a folder."""
    return getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)


def _case_score(cp: Judgement, pf: Judgement, cosines: dict[str, float]) -> CaseScore:
    reasons = [why_no_score(one) for one in (cp, pf) if one.score is None]
    grades = {name: None if one.score is None else one.score / 4 for name, one in (("cp", cp), ("pf", pf))}
    return CaseScore({**grades, **cosines}, {"cp": cp, "pf": pf}, reasons[0] if reasons else None)
