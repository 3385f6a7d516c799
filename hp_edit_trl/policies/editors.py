"""
Editors: whatever makes an edit of an image and an instruction. A diffusers pipeline, a policy, or a folder of edits that are there
already; a plain function of images and prompts will do as well, where an editor is asked for.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image

from ..lora import lora_file
from .edit_policy import EditPolicy, bucketed, fitted_size
from .rollout import decode, rollout


class Editor(Protocol):
    """What edits. Plain functions `(images, prompts) -> images` have no identity, and draw their own random numbers."""

    @property
    def identity(self) -> dict[str, Any]:
        """Whatever decides an edit, beside the case and its seed: model, revision, settings."""

    def load(self) -> None:
        """Gets ready to edit. Raises if that is impossible."""

    def __call__(
        self, images: list[Image.Image], prompts: list[str], ids: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image | None]:
        """One edit of each image, `None` where there is none."""


class PipelineEditor:
    """
    Any diffusers pipeline that is called with `image` and `prompt`, one case at a time, as its own users call it.

    Args:
        model (`str`):
            Hub id or local folder, e.g. `"Qwen/Qwen-Image-Edit-2509"`.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        lora (`str`, *optional*):
            A LoRA that is loaded on top: Hub id or local folder.
        resolution (`int`, *optional*):
            Side in pixels of the square whose area an edit has, in its image's aspect ratio. By default the pipeline's own choice.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Type of the weights.
        **options:
            Further arguments of the pipeline's call, e.g. `num_inference_steps` and `true_cfg_scale`.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        lora: str | None = None,
        resolution: int | None = None,
        dtype: str = "bfloat16",
        **options: Any,
    ):
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype={dtype!r} is no type of tensors: use e.g. 'bfloat16' or 'float32'.")
        self.model = model
        self.revision = revision
        self.lora = lora
        self.resolution = resolution
        self.dtype = dtype
        self.options = options

    @cached_property
    def folder(self) -> Path:
        """Where the pipeline's files lie; they are downloaded first, if need be."""
        if os.path.isdir(self.model):
            return Path(self.model)
        try:
            return Path(DiffusionPipeline.download(self.model, revision=self.revision))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"editor={self.model!r} is neither a folder nor a diffusers pipeline on the Hub that can be read: {error}"
            ) from error

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        pipeline = DiffusionPipeline.from_pretrained(str(self.folder), dtype=getattr(torch, self.dtype))
        if self.lora is not None:
            try:
                file = lora_file(self.lora)
                pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
            except (OSError, ValueError, AttributeError) as error:  # the last where a pipeline takes no LoRA
                raise ValueError(f"lora={self.lora!r} cannot be loaded onto {self.model!r}: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(PartialState().device)

    @property
    def identity(self) -> dict[str, Any]:
        options: dict[str, Any] = {"resolution": self.resolution, "dtype": self.dtype, **self.options}
        if self.lora is not None:
            content = hashlib.sha256(lora_file(self.lora).read_bytes()).hexdigest()
            options |= {"lora": self.lora, "lora_sha": content[:12]}
        return {"editor": self.model, "revision": _revision(self.folder), **options}

    def load(self) -> None:
        self.pipeline  # noqa: B018

    def __call__(
        self, images: list[Image.Image], prompts: list[str], ids: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image | None]:
        edits: list[Image.Image | None] = []
        for image, prompt, seed in zip(images, prompts, seeds, strict=True):
            size = {}
            if self.resolution is not None:
                size = dict(zip(("height", "width"), fitted_size(image, self.resolution, 16), strict=True))
            generator = torch.Generator().manual_seed(seed)
            edits += self.pipeline(image=image, prompt=prompt, generator=generator, **size, **self.options).images
        return edits


class PolicyEditor:
    """
    A policy as an editor: cases of one size are edited together.

    Args:
        policy ([`EditPolicy`]):
            The policy.
        name (`str`):
            What it is called in a dataset.
        resolution (`int`, *optional*, defaults to `512`):
            Side in pixels of the square whose area every edit has.
        num_inference_steps (`int`, *optional*):
            Number of denoising steps. By default what the pipeline is meant to be used with.
        true_cfg_scale (`float`, *optional*):
            Scale of classifier-free guidance. By default what the pipeline is meant to be used with.
        batch_size (`int`, *optional*, defaults to `4`):
            Largest number of edits that are denoised together.
    """

    def __init__(
        self,
        policy: EditPolicy,
        name: str,
        resolution: int = 512,
        num_inference_steps: int | None = None,
        true_cfg_scale: float | None = None,
        batch_size: int = 4,
    ):
        self.policy = policy
        self.name = name
        self.resolution = resolution
        self.num_inference_steps = num_inference_steps or policy.default_num_inference_steps
        self.true_cfg_scale = policy.default_true_cfg_scale if true_cfg_scale is None else true_cfg_scale
        self.batch_size = batch_size

    @property
    def identity(self) -> dict[str, Any]:
        names = ("resolution", "num_inference_steps", "true_cfg_scale")
        settings = {name: getattr(self, name) for name in names}
        return {"editor": self.name, "revision": weights_digest(self.policy.pipeline.transformer), **settings}

    def load(self) -> None:
        device = PartialState().device
        self.policy.place(device)
        self.policy.pipeline.transformer.requires_grad_(False).eval().to(device)

    def __call__(
        self, images: list[Image.Image], prompts: list[str], ids: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image | None]:
        policy = self.policy
        negative_prompt = policy.default_negative_prompt if self.true_cfg_scale > 1 else None
        with policy.loaded(*policy.encoders), torch.no_grad():
            conditions = [
                policy.encode([image], prompt, negative_prompt, self.resolution)
                for image, prompt in zip(images, prompts, strict=True)
            ]
        autocast = torch.autocast(policy.device.type, policy.dtype, enabled=policy.dtype == torch.bfloat16)
        edits: dict[int, Image.Image] = {}
        for members in bucketed(conditions, self.batch_size):
            chosen = [conditions[i] for i in members]
            with autocast:
                paths = rollout(
                    policy,
                    policy.pipeline.transformer,
                    chosen,
                    [torch.Generator().manual_seed(seeds[i]) for i in members],
                    num_inference_steps=self.num_inference_steps,
                    true_cfg_scale=self.true_cfg_scale,
                    batch_size=self.batch_size,
                )
            decoded = decode(policy, [path.final for path in paths], chosen, self.batch_size)
            edits.update(zip(members, decoded, strict=True))
        return [edits[i] for i in range(len(images))]


class FolderEditor:
    """
    Edits that are there already: files named by the id of their case, e.g. `0f3a….png`.

    Args:
        folder (`str` or `Path`):
            The folder.
        name (`str`, *optional*):
            What made the edits. By default the folder's name.

    Raises:
        `FileNotFoundError`: If there is no such folder, or no picture in it.
    """

    SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

    def __init__(self, folder: str | Path, name: str | None = None):
        self.folder = Path(folder)
        self.name = name or self.folder.name
        if not self.folder.is_dir() or not any(file.suffix in self.SUFFIXES for file in self.folder.iterdir()):
            raise FileNotFoundError(
                f"{folder} is no folder of edits ({', '.join(self.SUFFIXES)}), named by their case's id."
            )

    @property
    def identity(self) -> dict[str, Any]:
        return {"editor": self.name, "revision": _revision(self.folder)}

    def load(self) -> None:
        """There is nothing to get ready."""

    def __call__(
        self, images: list[Image.Image], prompts: list[str], ids: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image | None]:
        edits: list[Image.Image | None] = []
        for case_id in ids:
            files = [file for suffix in self.SUFFIXES if (file := self.folder / f"{case_id}{suffix}").is_file()]
            if not files:
                edits.append(None)
                continue
            with Image.open(files[0]) as image:
                edits.append(image.convert("RGB"))
        return edits


def _revision(folder: Path) -> str:
    """The commit of a downloaded repository, or what tells the files of another folder from others."""
    if folder.parent.name == "snapshots":
        return folder.name
    files = sorted(
        (str(file.relative_to(folder)), file.stat().st_size) for file in folder.rglob("*") if file.is_file()
    )
    return f"files {hashlib.sha256(repr(files).encode()).hexdigest()[:12]}"


def weights_digest(model: torch.nn.Module) -> str:
    """A hash that tells one set of weights from another, a LoRA's included: names, shapes, first values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        first = tensor.flatten()[:64].to("cpu", torch.float32).numpy().tobytes()
        digest.update(repr((name, tuple(tensor.shape))).encode() + first)
    return digest.hexdigest()[:16]
