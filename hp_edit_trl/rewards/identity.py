"""How much of an image an edit has left alone: a test for edits that repaint what they were not asked to."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from transformers import AutoModel

from ..utils.hub import check_reachable
from ..utils.images import read_image
from .base import Reward, Rewards, read_cases
from .vlm import equal_areas


# What DINO models are trained on
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PIXEL_GRID, _PIXEL_CELL = 16, 16  # cells in a row, and pixels in a row of a cell, without a model


class IdentityReward(Reward):
    """
    Similarity of an edit to its (first) reference outside the edited region, from 0 to 1, patch by patch.

    The region is what the column `mask` shows in white. Without a mask, the `unchanged` share of the patches that are
    most alike counts: an edit that is local leaves them as they were, and one that repaints the image does not. It is
    a test for a [`Gate`] more than a reward: alone, it is highest for an edit that does nothing.

    Both images are brought to equal areas and then to the same square, so an edit with another aspect ratio than its
    reference scores low.

    Args:
        model (`str`, *optional*, defaults to `"facebook/dinov2-small"`):
            Hub id or folder of a DINO model whose patch embeddings are compared by their cosine: the same objects with
            some more light are still alike. `None` compares pixels, by one minus their mean absolute difference, and
            needs no model.
        unchanged (`float`, *optional*, defaults to `0.5`):
            Share of the patches that an edit without a mask is expected to leave alone.
        tasks (`Sequence[str]`, *optional*):
            The tasks that it applies to, e.g. `["add", "remove", "swap"]`. A change of style or light changes
            everything. By default all.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of images that the model embeds together.

    Raises:
        `ValueError`: If an option is not valid.
    """

    def __init__(
        self,
        model: str | None = "facebook/dinov2-small",
        unchanged: float = 0.5,
        tasks: Sequence[str] | None = None,
        batch_size: int = 16,
    ):
        super().__init__()
        if not 0 < unchanged <= 1 or batch_size < 1:
            raise ValueError(
                f"unchanged={unchanged} must be above 0 and at most 1, and batch_size={batch_size} at least 1."
            )
        if isinstance(tasks, str):
            raise ValueError(f"tasks={tasks!r} must be a list of tasks.")
        self.name = model
        self.unchanged = unchanged
        self.tasks = tasks
        self.batch_size = batch_size

    @property
    def description(self) -> str:
        """The model and the options in one line."""
        return f"{type(self).__name__}, model {self.name}, unchanged {self.unchanged:g}, tasks {self.tasks or 'all'}"

    @cached_property
    def _model(self) -> Any:
        check_reachable(str(self.name))  # `load` has seen to it that there is one
        return AutoModel.from_pretrained(self.name).requires_grad_(False).eval().to(PartialState().device)

    def load(self, num_images: int = 2) -> None:
        """Loads the model. Raises an error if it cannot embed patches."""
        self._similarities([Image.new("RGB", (8, 8))], [Image.new("RGB", (8, 8))])

    def __call__(  # type: ignore[override]
        self,
        prompts: list[str],
        completions: list[Image.Image],
        image: list[Image.Image] | None = None,
        images: list[list[Image.Image]] | None = None,
        task: list[str | None] | None = None,
        mask: list[Image.Image | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> Rewards:
        """
        Rewards of edits, in TRL's convention for reward functions: `None` where it does not apply, because of the task
        or because the mask leaves nothing out.

        Raises:
            `ValueError`: If a case has no reference.
            [`UnreadableImageError`]: If an image cannot be read.
        """
        ids, references, edits = read_cases(type(self).__name__, completions, image, images, columns.get("id"))
        tasks, masks = task or [None] * len(edits), mask or [None] * len(edits)
        rewards: list[float | None] = [None] * len(edits)
        places = [i for i, one in enumerate(tasks) if self.tasks is None or one in self.tasks]
        pairs = [equal_areas(edits[i], references[i][:1]) for i in places]
        alike = self._similarities([edit for edit, _ in pairs], [reference for _, (reference,) in pairs])
        for i, grid in zip(places, alike, strict=True):
            if masks[i] is None:
                kept = np.sort(grid, axis=None)[-max(1, round(self.unchanged * grid.size)) :]
                rewards[i] = _clipped(kept.mean())
                continue
            shown = read_image(masks[i], f"The mask of case {ids[i]!r}").convert("L")
            shown = shown.resize(references[i][0].size).resize(grid.shape[::-1], Image.Resampling.BOX)
            outside = 1 - np.asarray(shown, dtype=float) / 255
            if outside.sum() > 0.5:  # of a patch
                rewards[i] = _clipped((grid * outside).sum() / outside.sum())
        known = [reward for reward in rewards if reward is not None]
        if log_metric is not None and known:
            log_metric("identity", sum(known) / len(known))
        return Rewards(rewards, failed=[False] * len(rewards))

    @torch.no_grad()
    def _similarities(self, edits: list[Image.Image], references: list[Image.Image]) -> list[np.ndarray]:
        """The similarity of each patch, of shape `(rows, columns)`."""
        if self.name is None:
            return [1 - _cells(edit, reference) for edit, reference in zip(edits, references, strict=True)]
        one, other = self._embedded(edits), self._embedded(references)
        side = round(one.shape[1] ** 0.5) if len(one) else 0
        alike = torch.nn.functional.cosine_similarity(one, other, dim=-1)
        return [grid.reshape(side, side).numpy() for grid in alike]

    def _embedded(self, images: list[Image.Image]) -> torch.Tensor:
        """Embeddings of patches, of shape `(images, patches, width)`."""
        config = self._model.config.to_dict()
        size, patch = config.get("image_size"), config.get("patch_size")
        if not isinstance(size, int) or not isinstance(patch, int):
            raise ValueError(f"model={self.name!r} has no square images and patches: name a DINO model.")
        embedded = []
        for start in range(0, len(images), self.batch_size):
            batch = [
                image.resize((size, size), Image.Resampling.BICUBIC)
                for image in images[start : start + self.batch_size]
            ]
            pixels = torch.stack([torch.from_numpy(np.asarray(image, dtype=np.float32) / 255) for image in batch])
            pixels = (pixels - torch.tensor(_MEAN)) / torch.tensor(_STD)
            hidden = self._model(pixels.permute(0, 3, 1, 2).to(self._model.device)).last_hidden_state
            embedded.append(hidden[:, -((size // patch) ** 2) :].float().cpu())  # what comes before is no patch
        return torch.cat(embedded) if embedded else torch.empty(0, 0, 0)


def _clipped(value: float) -> float:
    return min(1.0, max(0.0, float(value)))


def _cells(edit: Image.Image, reference: Image.Image) -> np.ndarray:
    """The mean absolute difference of the pixels in each cell, from 0 to 1."""
    side = _PIXEL_GRID * _PIXEL_CELL
    one, other = (
        np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), dtype=float) / 255
        for image in (edit, reference)
    )
    cells = np.abs(one - other).reshape(_PIXEL_GRID, _PIXEL_CELL, _PIXEL_GRID, _PIXEL_CELL, 3)
    return cells.mean((1, 3, 4))
