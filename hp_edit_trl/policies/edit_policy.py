"""The policy interface: a diffusers edit pipeline that can be rolled out and trained."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from ..cases import BadCaseError
from ..utils.offload import on_device
from ..utils.quantization import check_offloadable, unquantized_dtype


@dataclass
class EditConditions:
    """
    Everything about one case that does not change while it is denoised. Computed once per case, shared by its whole
    group and by training.

    Args:
        height (`int`):
            Height of the target in pixels.
        width (`int`):
            Width of the target in pixels.
        num_tokens (`int`):
            Number of packed latent tokens of the target.
        num_channels (`int`):
            Number of channels of a packed latent token.
        reference_sizes (`tuple[tuple[int, int], ...]`):
            Height and width in pixels of each reference image as the policy sees it.
        tensors (`dict[str, torch.Tensor]`):
            The encodings, named and shaped as their policy needs them, without a batch dimension.
        layout (`tuple`, *optional*):
            What else cases of one batch must have in common, e.g. the length of a text that cannot be padded.
    """

    height: int
    width: int
    num_tokens: int
    num_channels: int
    reference_sizes: tuple[tuple[int, int], ...]
    tensors: dict[str, torch.Tensor]
    layout: tuple = ()

    @property
    def bucket(self) -> tuple:
        """Cases with equal buckets may share a batch: all image tokens line up."""
        return (self.height, self.width, self.reference_sizes, *self.layout)


@dataclass
class Example:
    """
    What makes a pipeline itself edit as its policy does, as code.

    Args:
        imports (`list[str]`, *optional*):
            Lines before the pipeline is loaded.
        lines (`list[str]`, *optional*):
            Lines before it is called. They read `image`, a PIL image.
        arguments (`dict[str, str]`, *optional*):
            Arguments of its call.
        difference (`str`, *optional*):
            A sentence on what still differs.
    """

    imports: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    arguments: dict[str, str] = field(default_factory=dict)
    difference: str = ""


class EditPolicy(ABC):
    """
    A diffusers edit pipeline as a policy: it encodes a case, predicts a velocity, and decodes the result.

    A subclass holds everything that is specific to a pipeline's class. Denoising with [`~EditPolicy.velocity`] along
    [`~EditPolicy.sigmas`] gives the same result as the pipeline.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The loaded pipeline. Its transformer is the module that is trained.
        offload_encoders (`bool`, *optional*, defaults to `False`):
            Keep the text encoder and the VAE in CPU memory and move them to the device only while they are used.

    Class attributes:
        lora_target_modules (`list[str]` or `str`):
            The modules that a LoRA adapts by default, as PEFT's `target_modules`.
        lora_exclude_modules (`str` or `None`):
            Regular expression of modules among them that never receive a gradient.
        lora_loader (`str`):
            What loads a saved LoRA onto the pipeline itself, as code: `{}` stands for the folder or Hub repository.
        quantized_components (`tuple[str, ...]`):
            The components that are quantized if the options ask for quantization: the transformer and the language
            model. Others are small.
        max_references (`int` or `None`):
            Largest number of reference images of a case; `None` if there is no limit.
        max_prompt_tokens (`int`):
            Largest number of tokens of a prompt, counted as [`~EditPolicy.prompt_tokens`] does.
        cuts_prompts (`bool`):
            Whether the pipeline cuts longer prompts without a word. Otherwise they are refused.
        has_true_cfg (`bool`):
            Whether the pipeline supports classifier-free guidance with an unconditional pass.
        default_true_cfg_scale (`float`):
            The pipeline's recommended guidance scale; at 1.0 there is no unconditional pass.
        default_negative_prompt (`str`):
            The prompt of the unconditional pass.
        default_num_inference_steps (`int`):
            The pipeline's recommended number of denoising steps.
        guidance_scale (`float` or `None`):
            Guidance that the transformer takes as an input; `None` if it does not take any.
        native_resolution (`int`):
            Side in pixels of the square whose area the pipeline's own edits have, unless `model_index.json` has
            another in `_native_resolution`.
        has_prefix (`bool`):
            Whether there is a part of a case's passes that depends neither on the latents nor on their noise level,
            see [`~EditPolicy.prefix`]. Where it is set to `False` on a policy that has one, each pass computes it.
    """

    lora_target_modules: list[str] | str
    lora_exclude_modules: str | None = None
    lora_loader: str = 'pipeline.load_lora_weights("{}")'
    quantized_components: tuple[str, ...] = ("transformer", "text_encoder")
    max_references: int | None = None
    max_prompt_tokens: int
    cuts_prompts: bool = True
    has_true_cfg: bool = True
    default_true_cfg_scale: float
    default_negative_prompt: str
    default_num_inference_steps: int
    guidance_scale: float | None = None
    native_resolution: int = 1024
    has_prefix: bool = False

    def __init__(self, pipeline: DiffusionPipeline, offload_encoders: bool = False):
        self.pipeline = pipeline
        self.offload_encoders = offload_encoders
        self.device = torch.device("cpu")
        self.dtype = unquantized_dtype(pipeline.transformer)
        self._loaded: set[str] = set()
        if offload_encoders:
            check_offloadable(self.encoders)
        for module in self.encoders.values():
            module.requires_grad_(False).eval()

    @property
    @abstractmethod
    def encoders(self) -> dict[str, nn.Module]:
        """The frozen modules that run before and after denoising, by name."""

    @abstractmethod
    def target_size(self, images: list[Image.Image], resolution: int) -> tuple[int, int]:
        """Height and width in pixels of the edit: the aspect ratio of the pipeline's choice, `resolution`² in area."""

    @abstractmethod
    def encode(
        self, images: list[Image.Image], prompt: str, negative_prompt: str | None, resolution: int
    ) -> EditConditions:
        """
        Encodes one case.

        Args:
            images (`list[PIL.Image.Image]`):
                The reference images, RGB, of any size.
            prompt (`str`):
                The instruction. Special tokens of the tokenizers are read as text.
            negative_prompt (`str` or `None`):
                Prompt of the unconditional pass. `None` leaves it out; the case then cannot be denoised with guidance.
            resolution (`int`):
                Side of the square whose area the target and each reference have.

        Returns:
            [`EditConditions`], on the policy's device.
        """

    @abstractmethod
    def prompt_tokens(self, prompts: list[str]) -> list[list[int]]:
        """The tokens of prompts that count towards `max_prompt_tokens`, not cut. Only tokenizers are used."""

    @classmethod
    def check_references(cls, case_id: Any, images: list[Image.Image]) -> None:
        """Raises a [`~hp_edit_trl.cases.BadCaseError`] if a case has more reference images than the pipeline takes."""
        if cls.max_references is not None and len(images) > cls.max_references:
            raise BadCaseError(
                f"Case {case_id!r} has {len(images)} reference images, but the pipeline takes at most "
                f"{cls.max_references}.",
                str(case_id),
            )

    def encode_case(
        self, case_id: Any, images: list[Image.Image], prompt: str, negative_prompt: str | None, resolution: int
    ) -> EditConditions:
        """
        Encodes one case as [`~EditPolicy.encode`] does, with an error that names it.

        Args:
            case_id (`Any`):
                The id of the case.
            images, prompt, negative_prompt, resolution:
                As in [`~EditPolicy.encode`].

        Raises:
            [`~hp_edit_trl.cases.BadCaseError`]: If the pipeline cannot encode it, or takes fewer references.
            `torch.OutOfMemoryError`: If the device runs out of memory, which is not the fault of a case.
        """
        self.check_references(case_id, images)
        try:
            return self.encode(images, prompt, negative_prompt, resolution)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a processor may raise anything about a picture or text that it cannot take
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise BadCaseError(
                f"Case {case_id!r} cannot be encoded by {type(self.pipeline).__name__} (images of {sizes} pixels, "
                f"prompt {prompt[:80]!r}): {type(error).__name__}: {error}",
                str(case_id),
            ) from error

    @abstractmethod
    def encode_image(self, image: Image.Image, height: int, width: int) -> torch.Tensor:
        """
        Encodes an image as references and targets are encoded: packed latents of shape `(num_tokens, num_channels)`,
        with the noise-free `x0` of [`~EditPolicy.velocity`] as their scale.

        Args:
            image (`PIL.Image.Image`):
                The image, RGB. It is resized if it has another size.
            height (`int`):
                Height in pixels, as [`~EditPolicy.target_size`] gives it.
            width (`int`):
                Width in pixels.
        """

    @abstractmethod
    def sigmas(self, num_inference_steps: int, conditions: EditConditions) -> torch.Tensor:
        """Noise levels of shape `(num_inference_steps + 1,)` for a case of this size, as the pipeline sets them."""

    @abstractmethod
    def collate(self, conditions: list[EditConditions]) -> dict:
        """Batches cases of one bucket into what [`~EditPolicy.velocity`] takes. Raises `ValueError` if they differ."""

    def prefix(self, model: nn.Module, conditions: EditConditions, true_cfg_scale: float) -> list[torch.Tensor]:
        """
        What all passes of a case have in common, whatever the latents and their noise level, e.g. keys and values of
        tokens that do not see the target. It depends on the weights. With `has_prefix`, callers compute it once for
        many passes, and add the prefixes of a batch's rows to what [`~EditPolicy.collate`] returned, as `"prefixes"`;
        cases of that are under `"conditions"`. A pass without them computes them itself, with the same result.

        Args:
            model (`torch.nn.Module`):
                The pipeline's transformer, or a wrapper around it.
            conditions ([`EditConditions`]):
                The case.
            true_cfg_scale (`float`):
                Guidance scale of the passes.

        Returns:
            `list[torch.Tensor]`: tensors through which gradients flow.
        """
        raise NotImplementedError(f"{type(self).__name__} has no prefix.")

    @abstractmethod
    def velocity(
        self, model: nn.Module, latents: torch.Tensor, sigma: torch.Tensor, batch: dict, true_cfg_scale: float
    ) -> torch.Tensor:
        """
        The model's prediction of `noise - x0`.

        Args:
            model (`torch.nn.Module`):
                The pipeline's transformer, or a wrapper around it (PEFT, DDP).
            latents (`torch.Tensor` of shape `(batch_size, num_tokens, num_channels)`):
                Noisy latents, float32.
            sigma (`torch.Tensor`):
                Their noise level in [0, 1]: a scalar, or one for each of the batch.
            batch (`dict`):
                What [`~EditPolicy.collate`] returned.
            true_cfg_scale (`float`):
                Guidance scale; at 1.0 and below there is no unconditional pass.

        Returns:
            `torch.Tensor`: float32, shaped as `latents`.
        """

    @abstractmethod
    def decode(self, latents: torch.Tensor, conditions: EditConditions) -> list[Image.Image]:
        """Decodes latents of shape `(batch_size, num_tokens, num_channels)` that share one bucket into images."""

    def resolve_guidance(
        self,
        true_cfg_scale: float | None = None,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
    ) -> tuple[float, str]:
        """
        Resolves the guidance to edit with: the given values, or else the pipeline's recommended ones.

        Args:
            true_cfg_scale (`float`, *optional*):
                Scale of classifier-free guidance.
            negative_prompt (`str`, *optional*):
                Prompt of the unconditional pass.
            guidance_scale (`float`, *optional*):
                Guidance that the transformer takes as an input. The policy keeps it.

        Returns:
            `tuple[float, str]`: `true_cfg_scale` and `negative_prompt`.

        Raises:
            `ValueError`: If the pipeline does not have the kind of guidance that is asked for.
        """
        name = type(self.pipeline).__name__
        if guidance_scale is not None:
            if self.guidance_scale is None:
                raise ValueError(
                    f"guidance_scale={guidance_scale}, but the transformer of this {name} takes no guidance as an "
                    "input: leave it out. The scale of classifier-free guidance is true_cfg_scale."
                )
            self.guidance_scale = guidance_scale
        if true_cfg_scale is None:
            true_cfg_scale = self.default_true_cfg_scale
        if true_cfg_scale > 1 and not self.has_true_cfg:
            raise ValueError(
                f"true_cfg_scale={true_cfg_scale}, but this {name} is guidance-distilled and has no unconditional "
                "pass: leave it out, or set it to 1.0."
            )
        return true_cfg_scale, self.default_negative_prompt if negative_prompt is None else negative_prompt

    def call_arguments(self, true_cfg_scale: float, negative_prompt: str) -> dict:
        """Arguments of the pipeline's call, besides image, prompt and steps, that make it edit as the policy does."""
        return {"negative_prompt": negative_prompt, "true_cfg_scale": true_cfg_scale} if true_cfg_scale > 1 else {}

    def example_of_size(self, resolution: int) -> Example:
        """
        What makes the pipeline itself edit at a resolution, for the model card. Its lines read `image`.

        Args:
            resolution (`int`):
                Side of the square whose area the edit has.
        """
        packed = 2 * self.pipeline.vae_scale_factor
        return Example(
            lines=[
                f"scale = {resolution} / (image.width * image.height) ** 0.5  # the area of training",
                f"width, height = (max({packed}, round(side * scale / {packed}) * {packed}) for side in image.size)",
            ],
            arguments={"height": "height", "width": "width"},
        )

    def check_bucket(self, conditions: list[EditConditions]) -> EditConditions:
        """The first of the conditions. Raises `ValueError` if another is not of its sizes."""
        first = conditions[0]
        for other in conditions[1:]:
            if other.bucket != first.bucket:
                raise ValueError(
                    f"A batch needs cases of equal sizes, but got {first.bucket} and {other.bucket} "
                    "(height, width, sizes of the references)."
                )
        return first

    def timestep(self, sigma: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """A noise level as pipelines hand it to their transformer, of shape `(batch_size,)`."""
        # Pipelines pass on their scheduler's timesteps; the detour keeps even the rounding the same.
        scale = self.pipeline.scheduler.config.num_train_timesteps
        return (sigma.to(latents.device) * scale).expand(len(latents)).to(self.dtype) / 1000

    def place(self, device: torch.device | str) -> None:
        """Chooses the device of the encodings, and moves the encoders there unless they are offloaded."""
        self.device = torch.device(device)
        for module in self.encoders.values():
            module.to("cpu" if self.offload_encoders else self.device)

    @contextmanager
    def loaded(self, *names: str) -> Iterator[None]:
        """
        Within it the named encoders are on the policy's device. If encoders are offloaded, they leave it afterwards;
        wrapped around a loop, that happens once and not in every turn.
        """
        moved = [name for name in names if self.offload_encoders and name not in self._loaded]
        self._loaded |= set(moved)
        try:
            with ExitStack() as stack:
                for name in moved:
                    stack.enter_context(on_device(self.encoders[name], self.device))
                yield
        finally:
            self._loaded -= set(moved)


def fitted_size(image: Image.Image, resolution: int, multiple: int) -> tuple[int, int]:
    """Height and width of about `resolution`² in area, multiples of `multiple`, in the image's aspect ratio."""
    ratio = image.width / image.height
    height, width = resolution / math.sqrt(ratio), resolution * math.sqrt(ratio)
    return max(multiple, round(height / multiple) * multiple), max(multiple, round(width / multiple) * multiple)


def bucketed(conditions: list[EditConditions], batch_size: int) -> list[list[int]]:
    """Indices of `conditions` in batches of at most `batch_size`, each of one bucket, in order of first appearance."""
    buckets: dict[tuple, list[int]] = {}
    for index, condition in enumerate(conditions):
        buckets.setdefault(condition.bucket, []).append(index)
    return [
        members[start : start + batch_size]
        for members in buckets.values()
        for start in range(0, len(members), batch_size)
    ]
