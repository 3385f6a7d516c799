"""The stages that find the category of an image, and choose images evenly over the categories."""

import hashlib
import json
from bisect import bisect_right
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from datasets import Features, Value
from PIL import Image
from transformers import AutoConfig, CLIPConfig, CLIPModel, CLIPProcessor

from ...utils.images import read_image
from ...utils.revisions import model_revision
from ...utils.seeding import seeded_generator
from .engine import Batch


# The 80 categories of objects in MS-COCO (Lin et al. 2014), in the order of its annotations
COCO_CATEGORIES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat",
    "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl",
    "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave",
    "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
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


class ClipCategories:
    """
    Stage `category`: the category whose description is closest to an image, by the cosine of CLIP's embeddings (Radford et al. 2021,
    zero-shot classification). The description of a category is the mean of several sentences' embeddings.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or local folder of a CLIP model.
        revision (`str`, *optional*):
            Branch, tag or commit of its repository.
        templates (`tuple[str, ...]`, *optional*, defaults to `TEMPLATES`):
            The sentences, with `{}` where the category goes.
        categories (`tuple[str, ...]`, *optional*, defaults to `COCO_CATEGORIES`):
            The categories.
        batch_size (`int`, *optional*, defaults to `64`):
            Number of images at once.
        min_score (`float`, *optional*):
            Images whose best category has a lower cosine are rejected. By default none is.

    Raises:
        `ValueError`: If an option is not usable; from `load` also if the model cannot be loaded.
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
            raise ValueError(f"categories={categories!r} must be different, and at least one.")
        if not templates or any(template.count("{}") != 1 for template in templates):
            raise ValueError(f"templates={templates!r} must each have one {{}}, where the category goes.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        if min_score is not None and not -1 <= min_score <= 1:
            raise ValueError(f"min_score={min_score} must be a cosine, in [-1, 1].")
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
        """Commit of the model on the Hub, or what tells the files of a local folder from others."""
        return model_revision(self.model_name, self.model_revision)

    @cached_property
    def model(self) -> CLIPModel:
        try:
            config = AutoConfig.from_pretrained(self.model_name, revision=self.model_revision)
            if not isinstance(config, CLIPConfig):
                raise ValueError(f"it is a {config.model_type} model")
            # In the same precision everywhere: the order of two close categories must not depend on the machine.
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
            f"clip_model={self.model_name!r} cannot be used: {error}. It must be a local folder or a Hub repository of a CLIP model."
        )

    @cached_property
    @torch.no_grad()
    def text_embeddings(self) -> torch.Tensor:
        """One embedding of length 1 for each category, of shape `(categories, projection_dim)`."""
        means = []
        for category in self.categories:
            sentences = [template.format(category) for template in self.templates]
            inputs = self.processor(text=sentences, padding=True, return_tensors="pt").to(self.model.device)
            each = torch.nn.functional.normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)
            means.append(each.mean(dim=0))
        return torch.nn.functional.normalize(torch.stack(means), dim=-1)

    def load(self) -> None:
        """Loads the model, and finds the category of a grey square."""
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
            f"no category: {name} is the closest, with {score:.3f}, at least {self.min_score}"
            if self.min_score is not None and score < self.min_score
            else None
            for name, score in zip(names, scores.tolist(), strict=True)
        ]
        return {"category": names, "category_score": scores.tolist(), "reason": reasons}


class Balance:
    """
    Stage `balance`: chooses images so that the categories are as evenly filled as they can be. Rare ones are kept whole; of the others
    the images with the highest `category_score` are kept. It does not matter in which order the images come.

    Args:
        total (`int`, *optional*):
            Number of images to choose. By default all, up to `quota`.
        quota (`int`, *optional*):
            Largest number of images of a category. By default there is none.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw of those categories that get one image more, where `total` does not divide evenly.

    Raises:
        `ValueError`: If `total` or `quota` is below 1.
    """

    name = "balance"
    inputs = ("image_id", "category", "category_score")
    features = Features({})
    batch_size = None

    def __init__(self, total: int | None = None, quota: int | None = None, seed: int = 0):
        for option, value in (("total", total), ("quota", quota)):
            if value is not None and value < 1:
                raise ValueError(f"{option}={value} must be at least 1.")
        self.total = total
        self.quota = quota
        self.seed = seed

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("total", "quota", "seed")}

    def load(self) -> None:
        """There is nothing to get ready."""

    def __call__(self, batch: Batch) -> Batch:
        by_category: dict[str, list[int]] = {}
        for row, category in enumerate(batch["category"]):
            by_category.setdefault(category, []).append(row)
        room = self._room({category: len(rows) for category, rows in by_category.items()})
        reasons: list[str | None] = [None] * len(batch["category"])
        for category, rows in by_category.items():
            rows.sort(key=lambda row: (-batch["category_score"][row], batch["image_id"][row]))
            for place, row in enumerate(rows[room[category] :], start=room[category] + 1):
                reasons[row] = f"over quota: number {place} of {len(rows)} of {category}, {room[category]} are kept"
        return {"reason": reasons}

    def _room(self, counts: dict[str, int]) -> dict[str, int]:
        """How many images of each category are kept."""
        available = {name: min(count, self.quota or count) for name, count in counts.items()}
        total = min(self.total or sum(available.values()), sum(available.values()))

        def filled(cap: int) -> int:
            return sum(min(count, cap) for count in available.values())

        # The largest cap for all categories alike that stays within the total
        cap = bisect_right(range(max(available.values(), default=0) + 1), total, key=filled) - 1
        larger = [name for name, count in available.items() if count > cap]
        larger.sort(key=lambda name: seeded_generator(self.seed, "balance", name).initial_seed())
        one_more = larger[: total - filled(cap)]
        return {name: min(count, cap + (name in one_more)) for name, count in available.items()}
