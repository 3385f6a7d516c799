"""DreamBench++: a subject in new scenes, graded for concept preservation and prompt following."""

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
from transformers import AutoModel, CLIPModel, CLIPProcessor

from ..judges import Judge, without_reasoning
from ..rewards.aesthetic import load_clip
from ..rewards.prompts import load_benchmark_prompts
from ..utils.hub import check_reachable
from ..utils.revisions import model_revision
from ..utils.texts import without_control_tokens
from .benchmark import Benchmark, CaseScore, Metric, check_parser, why_no_score


logger = logging.getLogger(__name__)

# Of the nine descriptions, in their order
KINDS = ("photorealistic",) * 4 + ("style transfer",) * 3 + ("imaginative",) * 2
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
JUDGED_SIZE = (512, 512)  # of every image as the judge sees it
# The scorer prompts, each of which comes with the judge's reply to it, and what the authors' files call them
ORIGINALS = {"concept_preservation": "subject", "style_preservation": "style", "prompt_following": "text"}


def read_dreambench_prompts(folder: Path) -> dict[str, str]:
    """Reads the scorer prompts, and the judge's replies to them, from files of DreamBench++'s own code in a folder."""
    files = {name: folder / f"user_prompt_{theirs}_full.txt" for name, theirs in ORIGINALS.items()}
    files |= {f"{name}_reply": folder / f"gpt_prompt_{theirs}_full.txt" for name, theirs in ORIGINALS.items()}
    return {name: file.read_text(encoding="utf-8").strip() for name, file in files.items() if file.is_file()}


def parse_grade(answer: str) -> float | None:
    """
    Reads the grade, 0 to 4, in a judge's answer; `None` if the answer does not hold exactly one.

    Accepts a digit from 0 to 4, alone or as in `"Score: 3"`, `"3/4"`, `"3.0"`, `"**3**"` or `"Good (3)"`, also as the
    only sentence `Score: 3` at the end of a line, after any reasoning that is closed by `</think>`. A grade on another
    scale, such as `"4/5"`, does not count, and reasoning that was cut off holds no grade.
    """
    text = re.sub(r"[*_`#]+", " ", without_reasoning(answer))
    if "<think>" in text:
        return None
    name, word = r"(?:final |overall )?(?:score|grade|rating|answer)", r"(?:very poor|poor|fair|good|excellent)"
    grade = rf"(?:{word}\s*)?[\[(]?([0-4])[\])]?(?:\.0)?(?:\s*/\s*4)?(?:\s*\({word}\))?\.?"
    whole = re.fullmatch(rf"\s*(?:{name}\s*(?:is|:|=)?\s*)?{grade}\s*", text, re.IGNORECASE)
    if whole:
        return float(whole[1])
    lines = re.findall(rf"(?:^[ \t>-]*|[.!?;][ \t]+){name}\s*[:=]\s*(.*?)\s*$", text, re.IGNORECASE | re.MULTILINE)
    # A line without a grade counts too: a grade in another line is then not the only one.
    grades = {match and match[1] for match in (re.fullmatch(grade, line, re.IGNORECASE) for line in lines)}
    only = grades.pop() if len(grades) == 1 else None
    return None if only is None else float(only)


class DreamBenchPlus(Benchmark):
    r"""
    DreamBench++: 150 images of a subject with nine descriptions each: four photorealistic, three in another style, two
    imaginative.

    The judge grades from 0 to 4 how well the subject is preserved (concept preservation, CP; it sees reference and
    edit) and how well the description is followed (prompt following, PF; it sees the edit alone), each several times
    (`num_answers` of the judge, three in the benchmark). CP and PF are the mean grades divided by 4; CP·PF and CP/PF
    are product and ratio of their means. In addition, there are cosine similarities of embeddings: CLIP-I and DINO-I
    of reference and edit, CLIP-T of description and edit. The main result is the mean over all cases. An answer
    without a grade is missing.

    As in the benchmark's own code, the judge is first given its task, has already replied to it, and is then shown the
    images, squeezed to 512 x 512 pixels, and the description. It answers with an analysis and a grade about the
    description, and with a grade alone about the subject.

    Images for DINO are scaled to 256 pixels on the shorter side and cropped to 224, as in the benchmark's own code.

    Paper: [DreamBench++](https://huggingface.co/papers/2406.16855).

    Args:
        judge ([`Judge`]):
            A judge with `parse=parse_grade` and `num_answers=3`. The benchmark's own judge is GPT-4o.
        dataset (`str`, *optional*, defaults to `"yuangpeng/dreambench_plus"`):
            A folder, or a Hub repository that holds it as a ZIP file, with `images/<category>/**/<n>.jpg` and
            `captions/<category>/**/<n>.txt`: the subject in the first line, then nine descriptions.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        scorer_prompts (`str`, *optional*):
            Folder or Hub repository with the scorer prompts `concept_preservation`, `style_preservation` (for subjects
            of the category `style`) and `prompt_following`, and the judge's reply to each, e.g.
            `prompt_following_reply` (`.md` or `.txt`). The folder `prompts` of the benchmark's own code does as it is
            (`user_prompt_*_full.txt`, `gpt_prompt_*_full.txt`). By default the prompts of this package, in our own
            words.
        scorer_prompts_revision (`str`, *optional*):
            Branch, tag or commit of that Hub repository.
        clip (`str`, *optional*, defaults to `"openai/clip-vit-base-patch32"`):
            CLIP model for CLIP-I and CLIP-T; `None` leaves them out.
        dino (`str`, *optional*, defaults to `"facebook/dino-vits8"`):
            DINO model for DINO-I, or e.g. `"facebook/dinov2-small"`; `None` leaves it out.

    Raises:
        `FileNotFoundError`: If there are no cases at `dataset`.
        `ValueError`: If the judge reads other scores from its answers, an image does not have nine descriptions, or
            `clip` is not a CLIP model.
    """

    name = "dreambench"
    title = "DreamBench++"
    products = {"cp_pf": ("cp", "pf")}
    ratios = {"cp_over_pf": ("cp", "pf")}
    average = "cases"
    group = "kind"
    judge_options = {"parse": parse_grade, "max_new_tokens": 512, "num_answers": 3}  # reasons come with the grades

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
        if (num_answers := judge.identity.get("num_answers", 3)) < 3:
            logger.warning(
                "The judge gives num_answers=%d grades for each edit. DreamBench++ takes the mean of three.",
                num_answers,
            )
        super().__init__(judge, str(dataset), revision=revision)
        names = [name for one in ORIGINALS for name in (one, f"{one}_reply")]
        self.scorer_prompts = load_benchmark_prompts(
            self.name, names, scorer_prompts, scorer_prompts_revision, read_originals=read_dreambench_prompts
        )
        self.clip = clip
        self.dino = dino
        labels = {"cp_pf": "CP·PF", "cp_over_pf": "CP/PF", "cp": "CP", "pf": "PF"}
        self.metrics = {name: Metric(label, 1.0) for name, label in labels.items()}
        if dino is not None:
            self.metrics |= {"dino_i": Metric("DINO-I", 1.0)}
        if clip is not None:
            self.metrics |= {"clip_i": Metric("CLIP-I", 1.0), "clip_t": Metric("CLIP-T", 1.0)}

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        return {"": {}} | {category: {"category": category} for category in sorted(set(self.dataset["category"]))}

    @property
    def table_columns(self) -> dict[str, tuple[str, str, str, str | None]]:
        columns: dict[str, tuple[str, str, str, str | None]]
        columns = {f"CP, {name}": (name, "cp", "cases", None) for name in self.sections if name}
        columns |= {"CP": ("", "cp", "cases", None)}
        columns |= {f"PF, {kind}": ("", "pf", "group", kind) for kind in dict.fromkeys(KINDS)}
        rest = ["pf", *(name for name in self.metrics if name not in ("cp", "pf"))]
        return columns | {self.metrics[name].label: ("", name, "cases", None) for name in rest}

    def _find_folder(self) -> Path:
        """The folder with the images and captions; it is downloaded first if necessary."""
        if Path(self.source).is_dir():
            return Path(self.source)
        check_reachable(str(self.source), "dataset", revision=self.revision)
        try:
            snapshot = Path(snapshot_download(self.source, repo_type="dataset", revision=self.revision))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{self.source} is neither a folder nor a readable dataset on the Hub: {error}"
            ) from error
        self.revision = snapshot.name
        archives = sorted(snapshot.glob("*.zip"))
        return Path(DownloadManager().extract(str(archives[0]))) if archives else snapshot

    @cached_property
    def dataset(self) -> Dataset:
        rows = []
        for file in sorted(self._find_folder().glob("**/captions/**/[!.]*.txt")):  # macOS archives hold hidden files
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
                f"{self.source} has no folder captions/ with text files: name DreamBench++'s data."
            )
        return Dataset.from_list(rows).cast_column("image", ImageFeature(decode=False))

    @property
    def settings(self) -> dict[str, Any]:
        models = {"clip": self.clip, "dino": self.dino}
        return super().settings | {
            name: None if model is None else [model, model_revision(model)] for name, model in models.items()
        }

    def load(self) -> None:
        super().load()
        for model in [*([self._dino] if self.dino else []), *([self._clip] if self.clip else [])]:
            model.to(PartialState().device)

    @cached_property
    def _clip(self) -> CLIPModel:
        return load_clip(self.clip, "clip")

    @cached_property
    def _clip_processor(self) -> CLIPProcessor:
        return CLIPProcessor.from_pretrained(self.clip)

    @cached_property
    def _dino(self) -> torch.nn.Module:
        assert self.dino is not None
        check_reachable(self.dino)
        return AutoModel.from_pretrained(self.dino).requires_grad_(False).eval()

    def score(
        self, cases: list[dict[str, Any]], references: list[list[Image.Image]], edits: list[Image.Image]
    ) -> list[CaseScore]:
        conversations = []
        for case, (reference,), edit in zip(cases, references, edits, strict=True):
            text = {name: prompt.fill(case["prompt"], quote=False) for name, prompt in self.scorer_prompts.items()}
            preserved = "style_preservation" if case["category"] == "style" else "concept_preservation"
            shown = _squeezed(edit)
            conversations.append(_question(text, preserved, [_squeezed(reference), shown]))
            description = {"type": "text", "text": case["prompt"]}
            conversations.append(_question(text, "prompt_following", [description, shown]))
        judged = self.judge(conversations)
        subjects = [images[0] for images in references]
        cosines: dict[str, list[float]] = {}
        if self.dino is not None:
            cosines["dino_i"] = _cosines(self._dino_embeddings(subjects), self._dino_embeddings(edits))
        if self.clip is not None:
            embedded = self._clip_embeddings(edits)
            cosines["clip_i"] = _cosines(self._clip_embeddings(subjects), embedded)
            cosines["clip_t"] = _cosines(self._text_embeddings([case["prompt"] for case in cases]), embedded)
        scores = []
        for i, (cp, pf) in enumerate(zip(judged[::2], judged[1::2], strict=True)):
            grades = {name: None if one.score is None else one.score / 4 for name, one in (("cp", cp), ("pf", pf))}
            values = grades | {name: similarities[i] for name, similarities in cosines.items()}
            scores.append(CaseScore(values, {"cp": cp, "pf": pf}, why_no_score(cp, pf)))
        return scores

    def _dino_embeddings(self, images: list[Image.Image]) -> torch.Tensor:
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

    def _clip_embeddings(self, images: list[Image.Image]) -> torch.Tensor:
        inputs = self._clip_processor(images=images, return_tensors="pt").to(PartialState().device)
        return self._clip.get_image_features(**inputs).pooler_output

    def _text_embeddings(self, texts: list[str]) -> torch.Tensor:
        texts = [without_control_tokens(text, self._clip_processor.tokenizer) for text in texts]
        inputs = self._clip_processor(text=texts, padding=True, truncation=True, return_tensors="pt")
        return self._clip.get_text_features(**inputs.to(PartialState().device)).pooler_output


def _squeezed(image: Image.Image) -> dict[str, Any]:
    return {"type": "image", "image": image.resize(JUDGED_SIZE, Image.Resampling.BICUBIC)}


def _question(text: dict[str, str], name: str, shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation of three messages: the prompt of this name, the judge's reply to it, and what it is about."""
    before = [("user", text[name]), ("assistant", text[f"{name}_reply"])]
    messages = [{"role": role, "content": [{"type": "text", "text": words}]} for role, words in before]
    return [*messages, {"role": "user", "content": shown}]


def _cosines(one: torch.Tensor, other: torch.Tensor) -> list[float]:
    return torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1).tolist()
