"""
Editors: everything that makes an edit of a case. A diffusers pipeline, a policy, a function, or a folder of finished
edits.
"""

import functools
import gc
import hashlib
import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import quote

import diffusers
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from trl.trainer.utils import get_callable_name

from .lora_formats import load_lora, lora_file
from .policies import POLICIES, EditPolicy, bucketed, check_components, decode, policy_class, rollout
from .policies.edit_policy import fitted_size
from .utils.dtypes import parse_dtype
from .utils.files import file_name
from .utils.hub import check_reachable
from .utils.images import UnreadableImageError, read_image
from .utils.imports import import_object
from .utils.revisions import folder_revision, weights_digest
from .utils.secrets import redact_error, redacted
from .utils.seeding import seeded_generator
from .utils.texts import shortened, without_control_tokens


logger = logging.getLogger(__name__)

LONGEST_REASON = 1000  # characters of an error of an editor in logs and results


@runtime_checkable
class Editor(Protocol):
    """An editor: a pipeline, a policy, a folder of finished edits, or a function."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides an edit besides the case and its seed: `editor` (its name), `revision`, settings."""

    def load(self) -> None:
        """Gets ready to edit. Raises an error if that is impossible."""

    def unload(self) -> None:
        """Frees the memory of the device."""

    def __call__(
        self, references: list[list[Image.Image]], prompts: list[str], ids: Sequence[str], seeds: Sequence[int]
    ) -> Sequence[Image.Image | None]:
        """
        Edits cases.

        Args:
            references (`list[list[PIL.Image.Image]]`):
                The reference images of each case, one or several.
            prompts (`list[str]`):
                The prompt of each case.
            ids (`Sequence[str]`):
                The id of each case.
            seeds (`Sequence[int]`):
                The seed of each edit.

        Returns:
            `Sequence[PIL.Image.Image | None]`: one edit per case, `None` where there is none.
        """


class PipelineEditor:
    """
    A diffusers pipeline that is called with `image` and `prompt`, one case at a time, as its users call it. With
    `policy` it edits as the trainers have it edit, see [`PolicyEditor`].

    Args:
        model (`str`):
            Hub id or local folder, e.g. `"Qwen/Qwen-Image-Edit-2509"`.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        lora (`str`, *optional*):
            A LoRA that is loaded on top: Hub id or local folder.
        resolution (`int`, *optional*):
            Side in pixels of the square whose area an edit has, in its image's aspect ratio. Defaults to the
            pipeline's own choice.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Type of the weights.
        policy (`bool`, *optional*, defaults to `False`):
            Denoise in batches, with references encoded at `resolution`, as the trainers do.
        batch_size (`int`, *optional*, defaults to `4`):
            With `policy`, largest number of edits that are denoised together.
        **options:
            Further arguments of the pipeline's call, e.g. `num_inference_steps` and `true_cfg_scale`. With `policy`
            those of [`PolicyEditor`].

    Raises:
        `ValueError`: If `policy` lacks a `resolution`, or has an option that it does not take.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        lora: str | None = None,
        resolution: int | None = None,
        dtype: str = "bfloat16",
        policy: bool = False,
        batch_size: int = 4,
        **options: Any,
    ):
        parse_dtype(dtype)
        known = ("num_inference_steps", "true_cfg_scale", "negative_prompt", "guidance_scale")
        if policy and (resolution is None or options.keys() - set(known)):
            raise ValueError(
                f"A policy needs a resolution above 0, and takes only these editor_options: {', '.join(known)}."
            )
        self.model = model
        self.revision = revision
        self.lora = lora
        self.resolution = resolution
        self.dtype = dtype
        self.policy = policy
        self.batch_size = batch_size
        self.options = options

    def check(self) -> None:
        """
        Checks that there is such a pipeline, and that its call takes the options. Only `model_index.json` is read.

        Raises:
            `ValueError`: If not, or if a component is missing or of another class.
        """
        if self.policy:
            policy_class(self.model, revision=self.revision)
            return
        check_reachable(self.model, revision=self.revision)
        try:
            index = DiffusionPipeline.load_config(self.model, revision=self.revision)
        except (OSError, ValueError) as error:
            redact_error(error)
            raise ValueError(
                f"editor={redacted(self.model)!r} is neither a folder nor a readable diffusers pipeline on the Hub: "
                f"{error}"
            ) from error
        name = index.get("_class_name")
        if name in POLICIES:
            check_components(name, index, f"editor={redacted(self.model)!r}")
        kind = getattr(diffusers, str(name), None)
        if kind is not None:  # a pipeline of its repository's own shows only when it is loaded
            self._check_call(kind)

    def _check_call(self, kind: type) -> None:
        """Raises a `ValueError` if a pipeline of this class cannot be called as this editor does."""
        known = inspect.signature(kind.__call__).parameters  # type: ignore[attr-defined]
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            return
        if unknown := [option for option in self.options if option not in known]:
            raise ValueError(f"The call of {kind.__name__} has no {', '.join(unknown)}: correct or remove the option.")
        if missing := [name for name in ("image", "prompt") if name not in known]:
            raise ValueError(
                f"{kind.__name__} is not called with {' and '.join(missing)}: it needs a function as its editor."
            )
        if self.resolution is not None and not {"height", "width"} <= set(known):
            raise ValueError(
                f"resolution={self.resolution}, but {kind.__name__} always edits at its own size: leave it "
                "out (--resolution 0)."
            )

    @cached_property
    def folder(self) -> Path:
        """Folder of the pipeline's files, which are downloaded if necessary."""
        if os.path.isdir(self.model):
            return Path(self.model)
        check_reachable(self.model, revision=self.revision)
        try:
            return Path(DiffusionPipeline.download(self.model, revision=self.revision))
        except (OSError, ValueError) as error:
            redact_error(error)
            raise ValueError(
                f"editor={redacted(self.model)!r} is neither a folder nor a readable diffusers pipeline on the Hub: "
                f"{error}"
            ) from error

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        return self.load_pipeline().to(PartialState().device)

    @cached_property
    def policy_editor(self) -> "PolicyEditor":
        """The pipeline as a policy."""
        assert self.resolution is not None
        policy = policy_class(str(self.folder))(self.load_pipeline())
        return PolicyEditor(policy, self.model, self.resolution, batch_size=self.batch_size, **self.options)

    def load_pipeline(self) -> DiffusionPipeline:
        """The pipeline with its LoRA, on the CPU."""
        pipeline = DiffusionPipeline.from_pretrained(str(self.folder), dtype=parse_dtype(self.dtype))
        if self.lora is not None:
            try:
                load_lora(pipeline, self.lora)
            except (OSError, ValueError) as error:
                redact_error(error)
                names = f"lora={redacted(self.lora)!r} cannot be loaded onto {redacted(self.model)!r}"
                raise ValueError(f"{names}: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def identity(self) -> dict[str, Any]:
        options: dict[str, Any] = {"resolution": self.resolution, "dtype": self.dtype, **self.options}
        if self.lora is not None:
            content = hashlib.sha256(lora_file(self.lora).read_bytes()).hexdigest()
            options |= {"lora": self.lora, "lora_sha": content[:12]}
        if self.policy:
            options["policy"] = True
        return redacted({"editor": self.model, "revision": folder_revision(self.folder), **options})

    def load(self) -> None:
        if self.policy:
            self.policy_editor.load()
        else:
            self._check_call(type(self.pipeline))

    def unload(self) -> None:
        self.__dict__.pop("pipeline", None)
        self.__dict__.pop("policy_editor", None)
        empty_device_cache()

    def __call__(
        self, references: list[list[Image.Image]], prompts: list[str], ids: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image | None]:
        if self.policy:
            return list(self.policy_editor(references, prompts, ids, seeds))
        edits: list[Image.Image | None] = []
        parts = self.pipeline.components.items()
        tokenizers = [part for name, part in parts if name.startswith("tokenizer") and part is not None]
        policy_type = POLICIES.get(type(self.pipeline).__name__)
        for case_id, images, prompt, seed in zip(ids, references, prompts, seeds, strict=True):
            if policy_type is not None:
                policy_type.check_references(case_id, images)
            prompt = without_control_tokens(prompt, *tokenizers)
            size = {}
            if self.resolution is not None:
                size = dict(zip(("height", "width"), fitted_size(images[-1], self.resolution, 16), strict=True))
            generator = torch.Generator().manual_seed(seed)
            image = images[0] if len(images) == 1 else images
            edits += self.pipeline(image=image, prompt=prompt, generator=generator, **size, **self.options).images
        return edits


class PolicyEditor:
    """
    A policy as an editor: the one way to sample edits deterministically, along the ODE, for evaluation, mining and
    benchmarks. Cases of one size are denoised together.

    Args:
        policy ([`~hp_edit_trl.policies.EditPolicy`]):
            The policy.
        name (`str`):
            Name of the editor in datasets and tables.
        resolution (`int`, *optional*, defaults to `512`):
            Side in pixels of the square whose area every edit has.
        num_inference_steps (`int`, *optional*):
            Number of denoising steps. Defaults to the pipeline's recommended number.
        true_cfg_scale (`float`, *optional*):
            Scale of classifier-free guidance. Defaults to the pipeline's recommended scale.
        negative_prompt (`str`, *optional*):
            Prompt of the unconditional pass. Defaults to the pipeline's recommended one.
        guidance_scale (`float`, *optional*):
            Guidance that the transformer takes as an input, if it does.
        batch_size (`int`, *optional*, defaults to `4`):
            Largest number of edits that are denoised together.
        model (`torch.nn.Module`, *optional*):
            The transformer to sample from, possibly wrapped (PEFT, DDP). Defaults to the pipeline's.
        autocast (`Callable[[], ContextManager]`, *optional*):
            Context for denoising. By default autocast to bfloat16 if the transformer's weights are of that type.

    Raises:
        `ValueError`: If the pipeline does not have the kind of guidance that is asked for.
    """

    def __init__(
        self,
        policy: EditPolicy,
        name: str,
        resolution: int = 512,
        num_inference_steps: int | None = None,
        true_cfg_scale: float | None = None,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 4,
        model: nn.Module | None = None,
        autocast: Callable[[], AbstractContextManager] | None = None,
    ):
        self.policy = policy
        self.name = name
        self.resolution = resolution
        self.num_inference_steps = num_inference_steps or policy.default_num_inference_steps
        self.true_cfg_scale, self.negative_prompt = policy.resolve_guidance(
            true_cfg_scale, negative_prompt, guidance_scale
        )
        self.batch_size = batch_size
        self.model = policy.pipeline.transformer if model is None else model
        self.autocast = autocast

    @property
    def identity(self) -> dict[str, Any]:
        names = ("resolution", "num_inference_steps", "true_cfg_scale", "negative_prompt")
        settings = {name: getattr(self, name) for name in names} | {"guidance_scale": self.policy.guidance_scale}
        return {"editor": self.name, "revision": weights_digest(self.policy.pipeline.transformer), **settings}

    def load(self) -> None:
        device = PartialState().device
        self.policy.place(device)
        self.policy.pipeline.transformer.requires_grad_(False).eval().to(device)

    def unload(self) -> None:
        self.policy.pipeline.to("cpu")
        empty_device_cache()

    def __call__(
        self, references: list[list[Image.Image]], prompts: list[str], ids: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image]:
        edits: dict[int, Image.Image] = {}
        for members, images in self.batches(references, prompts, ids, seeds):
            edits.update(zip(members, images, strict=True))
        return [edits[i] for i in range(len(references))]

    def batches(
        self, references: list[list[Image.Image]], prompts: list[str], ids: Sequence[str], seeds: Sequence[int]
    ) -> Iterator[tuple[list[int], list[Image.Image]]]:
        """
        Yields edits batch by batch, so that each can be saved before the next one begins: the numbers of the cases,
        and their edits. Arguments are those of the call; a case that occurs several times is encoded once.
        """
        policy = self.policy
        negative_prompt = self.negative_prompt if self.true_cfg_scale > 1 else None
        with policy.loaded(*policy.encoders):
            encoded = {
                case_id: policy.encode_case(case_id, references[i], prompts[i], negative_prompt, self.resolution)
                for case_id, i in {case_id: i for i, case_id in enumerate(ids)}.items()
            }
        conditions = [encoded[case_id] for case_id in ids]
        autocast = self.autocast or functools.partial(
            torch.autocast, policy.device.type, policy.dtype, enabled=policy.dtype == torch.bfloat16
        )
        for members in bucketed(conditions, self.batch_size):
            batch = [conditions[i] for i in members]
            with autocast():
                trajectories = rollout(
                    policy,
                    self.model,
                    batch,
                    [torch.Generator().manual_seed(seeds[i]) for i in members],
                    num_inference_steps=self.num_inference_steps,
                    true_cfg_scale=self.true_cfg_scale,
                    batch_size=self.batch_size,
                )
            yield members, decode(policy, [path.final for path in trajectories], batch, self.batch_size)


class FolderEditor:
    """
    A folder of finished edits: files named by the id of their case, e.g. `0f3a….png`. Characters that file names do
    not allow are percent-encoded as in URLs, e.g. `a%2Fb.png` for `a/b`; the names of
    [`~hp_edit_trl.utils.files.file_name`] are found as well. Files may be links to others.

    Args:
        folder (`str` or `Path`):
            The folder.
        name (`str`, *optional*):
            Name of the editor. Defaults to the folder's name.

    Raises:
        `FileNotFoundError`: If there is no such folder, or it has no images.
    """

    SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

    def __init__(self, folder: str | Path, name: str | None = None):
        self.folder = Path(folder)
        self.name = name or self.folder.name
        if not self.folder.is_dir() or not any(file.suffix in self.SUFFIXES for file in self.folder.iterdir()):
            raise FileNotFoundError(
                f"{folder} is not a folder of edits ({', '.join(self.SUFFIXES)}) named by their case's id."
            )

    @property
    def identity(self) -> dict[str, Any]:
        return {"editor": self.name, "revision": folder_revision(self.folder)}

    def load(self) -> None:
        """Does nothing."""

    def unload(self) -> None:
        """Does nothing."""

    def __call__(
        self, references: list[list[Image.Image]], prompts: list[str], ids: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image | None]:
        edits: list[Image.Image | None] = []
        names = set(os.listdir(self.folder))  # some file systems would find "A.png" under the name "a.png"
        for case_id in ids:
            # An id may be the name itself, unless that would be the path of a file elsewhere, or the name of another.
            is_name = case_id == os.path.basename(case_id) and not re.search("%|=[0-9a-f]{16}$", case_id)
            stems = [case_id] * is_name + [file_name(case_id), quote(case_id, safe="", errors="surrogatepass")]
            found = [name for stem in stems for suffix in self.SUFFIXES if (name := f"{stem}{suffix}") in names]
            files = [self.folder / name for name in found if (self.folder / name).is_file()]
            if not files:
                edits.append(None)
                continue
            edits.append(read_image(str(files[0]), f"The edit of case {case_id!r}"))
        return edits


class FunctionEditor:
    """
    A Python function as an editor.

    Args:
        function (`Callable`):
            Takes a list of images and a list of prompts, and returns a list of edits as PIL images, `None` where there
            is none. It may change the images that it is given. A case with several reference images has a list of them
            in place of its image. If the function has parameters `ids` and `seeds`, it is given the cases' ids and
            seeds too; without `seeds` it must be deterministic.
        name (`str`, *optional*):
            Name of the editor. Defaults to the function's name.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None):
        self.function = function
        self.name = name or get_callable_name(function)

    @property
    def identity(self) -> dict[str, Any]:
        try:
            source = inspect.getsource(self.function)
            return {"editor": self.name, "revision": f"source {hashlib.sha256(source.encode()).hexdigest()[:12]}"}
        except (OSError, TypeError):  # defined in an interpreter, or not a plain function
            return {"editor": self.name, "revision": None}

    def load(self) -> None:
        """Does nothing."""

    def unload(self) -> None:
        """Does nothing."""

    def __call__(
        self, references: list[list[Image.Image]], prompts: list[str], ids: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image | None]:
        asked = inspect.signature(self.function).parameters
        given = {name: values for name, values in (("ids", ids), ("seeds", seeds)) if name in asked}
        images = [case[0] if len(case) == 1 else case for case in references]
        return self.function(images, prompts, **given)


def as_editor(editor: Editor | Callable[..., Any]) -> Editor:
    """Returns the editor itself, or wraps a function in a [`FunctionEditor`]."""
    return editor if isinstance(editor, Editor) else FunctionEditor(editor)


def load_editor(
    editor: str,
    revision: str | None = None,
    lora: str | None = None,
    resolution: int | None = None,
    dtype: str = "bfloat16",
    policy: bool = False,
    batch_size: int = 4,
    **options: Any,
) -> Editor:
    """
    Builds the editor that a name stands for: a function, a folder of finished edits, or a pipeline.

    Args:
        editor (`str`):
            `file.py:function` or `package.module:function`, see [`FunctionEditor`]; a folder of edits without
            `model_index.json`, see [`FolderEditor`]; otherwise a pipeline, see [`PipelineEditor`].
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository. This and the further arguments are for pipelines only.
        lora (`str`, *optional*):
            A LoRA that is loaded on top.
        resolution (`int`, *optional*):
            Side in pixels of the square whose area an edit has. Ignored for functions and folders.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Type of the weights. Ignored for functions and folders.
        policy (`bool`, *optional*, defaults to `False`):
            Edit as the trainers do.
        batch_size (`int`, *optional*, defaults to `4`):
            Largest number of edits that a policy denoises together.
        **options:
            Further arguments of the pipeline's call.

    Raises:
        `ValueError`: If a function or a folder is given options of pipelines, or a function cannot be imported.
        `FileNotFoundError`: If there is no image in the folder.
    """
    is_folder = Path(editor).is_dir() and not (Path(editor) / "model_index.json").exists()
    if not is_folder and (":" not in editor or Path(editor).is_dir()):
        return PipelineEditor(editor, revision, lora, resolution, dtype, policy, batch_size, **options)
    pipelines_only = {"revision": revision, "lora": lora, "policy": policy or None, **options}
    given = [name for name, value in pipelines_only.items() if value is not None]
    if given:
        kind = "folder" if is_folder else "function"
        raise ValueError(f"{', '.join(given)}: for pipelines only, but editor={editor!r} is a {kind}.")
    return FolderEditor(editor) if is_folder else as_editor(import_object(editor, "editor"))


def edit_seed(seed: int, case_id: str) -> int:
    """The seed of a case's edit. It is the same in every run and does not depend on other cases."""
    return seeded_generator(seed, "edit", case_id).initial_seed() % 2**31


def edit_cases(
    editor: Editor, references: list[list[Image.Image]], prompts: list[str], ids: Sequence[str], seeds: Sequence[int]
) -> tuple[list[Image.Image | None], list[str | None]]:
    """
    Edits cases together, and one by one if that fails, so that one failing case does not affect the others. The editor
    is given copies of the references, and its edits are read by [`~hp_edit_trl.utils.images.read_image`].

    Args:
        editor ([`Editor`]):
            The editor.
        references (`list[list[PIL.Image.Image]]`):
            The reference images of each case.
        prompts (`list[str]`):
            The prompts.
        ids (`Sequence[str]`):
            The cases' ids.
        seeds (`Sequence[int]`):
            The seed of each edit.

    Returns:
        `tuple[list[PIL.Image.Image | None], list[str | None]]`: the edits, and for each that is missing why, e.g.
        `"editor failed: ..."` or `"no edit: ..."`. Edits are in 8-bit sRGB.

    Raises:
        `torch.OutOfMemoryError`: If the device runs out of memory, which is not the fault of a case.
    """
    try:
        copies = [[image.copy() for image in images] for images in references]
        edits = list(editor(copies, prompts, ids, seeds))
        if len(edits) != len(references):
            raise ValueError(f"The editor returned {len(edits)} edits of {len(references)} cases.")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an editor of the user's own may raise anything
        redact_error(error)  # an API's address or answer may hold a key
        if len(references) == 1:
            reason = shortened(f"{type(error).__name__}: {error}", LONGEST_REASON)
            logger.warning("No edit of case %s: %s", ids[0], reason)
            return [None], [f"editor failed: {reason}"]
        cases = zip(references, prompts, ids, seeds, strict=True)
        alone = [edit_cases(editor, [images], [prompt], [case_id], [seed]) for images, prompt, case_id, seed in cases]
        return [edits[0] for edits, _ in alone], [reasons[0] for _, reasons in alone]
    reasons: list[str | None] = [None] * len(edits)
    for i, edit in enumerate(edits):
        try:
            if isinstance(edit, Image.Image):
                edits[i] = read_image(edit, "the image that the editor returned")
                continue
            what = f"no edit: the editor returned a {type(edit).__name__}, but must return PIL images"
            reasons[i] = "no edit" if edit is None else what
        except UnreadableImageError as error:
            reasons[i] = f"no edit: {error}"
        edits[i] = None
    return edits, reasons


def empty_device_cache() -> None:
    """Frees cached memory of the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
