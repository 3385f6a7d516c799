"""How good an edit looks, whatever was asked for."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from transformers import AutoConfig, CLIPModel, CLIPProcessor

from ..utils.hub import check_reachable
from ..utils.images import read_image
from .base import Reward, Rewards


PROMPTS = ("Good photo.", "Bad photo.")


def load_clip(model: str | None, option: str) -> Any:
    """
    Loads a CLIP model.

    Args:
        model (`str`):
            Hub id or folder.
        option (`str`):
            Name of the option that names it, for errors.

    Raises:
        `ValueError`: If it is a model of another kind.
    """
    assert model is not None
    check_reachable(model)
    kind = AutoConfig.from_pretrained(model).model_type
    if kind != "clip":  # it would load, with random weights
        raise ValueError(f"{option}={model!r} is a model of type {kind}: name a CLIP model.")
    return CLIPModel.from_pretrained(model).requires_grad_(False).eval()


class AestheticReward(Reward):
    """
    How much nearer an edit is to "Good photo." than to "Bad photo." in the space of CLIP, as a probability. It knows
    neither the reference nor the prompt: give it a small weight beside a reward that does.

    Paper: [CLIP-IQA](https://huggingface.co/papers/2207.12396), whose pair of prompts this is.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-base-patch32"`):
            Hub id or folder of a CLIP model.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of images that it embeds together.

    Raises:
        `ValueError`: If an option is not valid.
    """

    def __init__(self, model: str = "openai/clip-vit-base-patch32", batch_size: int = 16):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        self.name = model
        self.batch_size = batch_size

    @property
    def description(self) -> str:
        """The model in one line."""
        return f"{type(self).__name__}, model {self.name}"

    @cached_property
    def _model(self) -> Any:
        return load_clip(self.name, "model").to(PartialState().device)

    @cached_property
    def _processor(self) -> CLIPProcessor:
        check_reachable(self.name)
        return CLIPProcessor.from_pretrained(self.name)

    def load(self, num_images: int = 2) -> None:
        """Loads the model. Raises `ValueError` if it is not a CLIP model."""
        self([""], [Image.new("RGB", (8, 8))])

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompts: list[str],
        completions: list[Image.Image],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> Rewards:
        """
        Rewards of edits, in TRL's convention for reward functions.

        Raises:
            [`UnreadableImageError`]: If an edit cannot be read.
        """
        ids = columns.get("id") or range(len(completions))
        edits = [read_image(edit, f"The edit of case {case!r}") for case, edit in zip(ids, completions, strict=True)]
        rewards: list[float | None] = []
        for start in range(0, len(edits), self.batch_size):
            batch = edits[start : start + self.batch_size]
            inputs = self._processor(text=list(PROMPTS), images=batch, padding=True, return_tensors="pt")
            logits = self._model(**inputs.to(self._model.device)).logits_per_image
            rewards += logits.float().softmax(-1)[:, 0].tolist()
        if log_metric is not None and rewards:
            log_metric("aesthetic", sum(rewards) / len(rewards))  # type: ignore[arg-type]
        return Rewards(rewards)
