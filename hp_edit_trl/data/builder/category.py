"""Stage `category`: finds the MS-COCO category of an image with CLIP."""

import hashlib
import json
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from datasets import Features, Value
from PIL import Image
from transformers import AutoConfig, CLIPConfig, CLIPModel, CLIPProcessor

from ...utils.config import check_positive
from ...utils.hub import check_reachable
from ...utils.images import read_image
from ...utils.revisions import model_revision
from .engine import Batch, Stage


# The 80 object categories of MS-COCO (Lin et al. 2014), in the order of its annotations
COCO_CATEGORIES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip

TEMPLATES = (
    "a photo of a {}",
    "an everyday picture with a {} in it",
    "a {} seen from close by",
    "a {} seen from far away",
    "a scene in which a {} stands out",
    "a photo taken outdoors of a {}",
    "a photo taken indoors of a {}",
)


class ClipCategories(Stage):
    """
    Finds the category of an image by CLIP zero-shot classification (Radford et al. 2021): the one whose text embedding
    has the highest cosine similarity to the image embedding. The text embedding of a category is the mean over several
    sentences.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or local folder of a CLIP model.
        revision (`str`, *optional*):
            Branch, tag or commit of its repository.
        templates (`tuple[str, ...]`, *optional*, defaults to `TEMPLATES`):
            The sentences, with `{}` in place of the category.
        categories (`tuple[str, ...]`, *optional*, defaults to `COCO_CATEGORIES`):
            The categories.
        batch_size (`int`, *optional*, defaults to `64`):
            Number of images per batch.
        min_score (`float`, *optional*):
            Images are rejected if the cosine similarity to their best category is lower. By default none are.

    Raises:
        `ValueError`: If an option is not valid. `load` also raises it if the model cannot be loaded.
    """

    name = "category"
    inputs = ("image",)
    features = Features({"category": Value("string"), "category_score": Value("float32")})

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        templates: tuple[str, ...] = TEMPLATES,
        categories: tuple[str, ...] = COCO_CATEGORIES,
        batch_size: int = 64,
        min_score: float | None = None,
    ):
        if not categories or len(set(categories)) < len(categories):
            raise ValueError(f"categories={categories!r} must be distinct, and at least one.")
        if not templates or any(template.count("{}") != 1 for template in templates):
            raise ValueError(f"templates={templates!r} must each have one {{}} in place of the category.")
        check_positive(batch_size=batch_size)
        if min_score is not None and not -1 <= min_score <= 1:
            raise ValueError(f"min_score={min_score} must be a cosine similarity, in [-1, 1].")
        self.model_name = model
        self.model_revision = revision
        self.templates = tuple(templates)
        self.categories = tuple(categories)
        self.batch_size = batch_size
        self.min_score = min_score

    @property
    def settings(self) -> dict[str, Any]:
        texts = json.dumps([self.templates, self.categories]).encode()
        return {
            "model": self.model_name,
            "revision": self.revision,
            "texts": hashlib.sha256(texts).hexdigest()[:16],
            "min_score": self.min_score,
        }

    @cached_property
    def revision(self) -> str | None:
        """Commit of the model on the Hub, or a hash of the files of a local folder."""
        return model_revision(self.model_name, self.model_revision)

    @cached_property
    def model(self) -> CLIPModel:
        check_reachable(self.model_name, revision=self.model_revision)
        try:
            config = AutoConfig.from_pretrained(self.model_name, revision=self.model_revision)
            if not isinstance(config, CLIPConfig):
                raise ValueError(f"it is a {config.model_type} model")
            # The same precision on every device, because it decides between close categories
            model = CLIPModel.from_pretrained(
                self.model_name, revision=self.model_revision, dtype=torch.float32, config=config
            )
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        return model.requires_grad_(False).eval().to(PartialState().device)

    @cached_property
    def processor(self) -> CLIPProcessor:
        try:
            return CLIPProcessor.from_pretrained(self.model_name, revision=self.model_revision)
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> ValueError:
        return ValueError(
            f"clip_model={self.model_name!r} cannot be used: {error}. It must be a local folder or a Hub repository "
            "of a CLIP model."
        )

    @cached_property
    @torch.no_grad()
    def text_embeddings(self) -> torch.Tensor:
        """Embeddings of the categories, of unit length and shape `(num_categories, projection_dim)`."""
        means = []
        for category in self.categories:
            sentences = [template.format(category) for template in self.templates]
            inputs = self.processor(text=sentences, padding=True, return_tensors="pt").to(self.model.device)
            each = torch.nn.functional.normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)
            means.append(each.mean(dim=0))
        return torch.nn.functional.normalize(torch.stack(means), dim=-1)

    def load(self) -> None:
        """Loads the model, and finds the category of a gray square."""
        self({"image": [Image.new("RGB", (64, 64), (128, 128, 128))]})

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        pictures = [read_image(value, f"Image {i} of a batch") for i, value in enumerate(batch["image"])]
        if not pictures:
            return {"category": [], "category_score": [], "reason": []}
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.model.device)
        embeddings = torch.nn.functional.normalize(self.model.get_image_features(**inputs).pooler_output, dim=-1)
        scores, best = (embeddings @ self.text_embeddings.T).max(dim=-1)
        names = [self.categories[i] for i in best.tolist()]
        reasons = [
            f"no category: {name} is the closest, with {score:.3f} of at least {self.min_score}"
            if self.min_score is not None and score < self.min_score
            else None
            for name, score in zip(names, scores.tolist(), strict=True)
        ]
        return {"category": names, "category_score": scores.tolist(), "reason": reasons}
