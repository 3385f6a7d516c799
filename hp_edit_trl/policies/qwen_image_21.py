"""Qwen-Image-2.1 (`QwenImage21Pipeline`) as a policy."""

from itertools import groupby

import torch
from diffusers import QwenImage21Pipeline
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache, QwenImage21KVLayerCache
from PIL import Image
from torch import nn

from ..flow.schedule import pipeline_sigmas
from ..utils.images import to_rgb
from ..utils.texts import without_control_tokens
from .edit_policy import EditConditions, EditPolicy, Example, fitted_size


SLOT = 2  # side of the latent tokens that share a token of the text encoder


class QwenImage21Policy(EditPolicy):
    """
    Policy of `QwenImage21Pipeline`, with up to ten reference images.

    Text and references come before the target in one sequence, do not see it, and are modulated as at noise level 0:
    they are a [`~EditPolicy.prefix`], whose keys and values are the pipeline's own cache. The pipeline fills it in its
    first step, together with the target; here it is filled before, so that all passes are the same computation.

    Its VAE has an alpha channel. References are opaque, and a transparent edit is laid on white.

    Args:
        pipeline ([`~diffusers.QwenImage21Pipeline`]):
            The loaded pipeline.
        offload_encoders (`bool`, *optional*, defaults to `False`):
            Keep the text encoder and the VAE in CPU memory and move them to the device only while they are used.
    """

    lora_target_modules = [
        "to_q", "to_k", "to_v", "to_out.0", "img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out",
    ]  # fmt: skip
    max_references = 10
    # The pipeline names no limit. The transformer has 8192 positions, of which images of 2048 pixels take 128 each.
    max_prompt_tokens = 4096
    cuts_prompts = False
    default_true_cfg_scale = 1.0
    default_negative_prompt = ""
    default_num_inference_steps = 40
    pipeline: QwenImage21Pipeline

    def __init__(self, pipeline: QwenImage21Pipeline, offload_encoders: bool = False):
        super().__init__(pipeline, offload_encoders)
        self.num_blocks = pipeline.transformer.config.num_layers
        self.has_prefix = pipeline.transformer.config.causal_condition
        self.sample_sigmas = pipeline.config.sample_sigmas
        if self.sample_sigmas is not None:
            self.default_num_inference_steps = len(self.sample_sigmas)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.pipeline.text_encoder, "vae": self.pipeline.vae}

    def example_of_size(self, resolution: int) -> Example:
        return Example(
            arguments={"output_resolution": str(resolution)},
            difference="The pipeline gives edits an alpha channel. Training laid them on white.",
        )

    def target_size(self, images: list[Image.Image], resolution: int) -> tuple[int, int]:
        # As in the pipeline the last reference gives the aspect ratio.
        return fitted_size(images[-1], resolution, SLOT * self.pipeline.vae_scale_factor)

    def prompt_tokens(self, prompts: list[str]) -> list[list[int]]:
        # Without the template
        tokenizer = self.pipeline.processor.tokenizer
        texts = [without_control_tokens(prompt, tokenizer) for prompt in prompts]
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def encode(
        self, images: list[Image.Image], prompt: str, negative_prompt: str | None, resolution: int
    ) -> EditConditions:
        pipeline = self.pipeline
        sizes = tuple(fitted_size(image, resolution, SLOT * pipeline.vae_scale_factor) for image in images)
        latents = []
        with self.loaded("vae"):
            for image, size in zip(images, sizes, strict=True):
                latents.append(self.encode_image(image, *size))
        tensors = {"image_latents": torch.cat(latents)}

        prompt = without_control_tokens(prompt, pipeline.processor.tokenizer)
        shown = [
            pipeline.image_processor.resize(image.convert("RGBA"), *size)
            for image, size in zip(images, sizes, strict=True)
        ]
        with self.loaded("text_encoder"):
            for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
                if text is None:
                    continue
                embeds, _, slots = pipeline.encode_prompt(text, shown, device=self.device)
                if slots.sum() * SLOT**2 != len(tensors["image_latents"]):
                    raise ValueError(
                        f"the text encoder's processor does not read images as they are at resolution={resolution}: "
                        "choose one between its smallest and largest size."
                    )
                tensors |= {f"{name}_embeds": embeds[0], f"{name}_slots": slots[0]}

        height, width = self.target_size(images, resolution)
        num_tokens = (height // pipeline.vae_scale_factor) * (width // pipeline.vae_scale_factor)
        # The positions of the target follow those of the text, so that texts cannot be padded.
        layout = tuple(len(tensor) for name, tensor in tensors.items() if name.endswith("_slots"))
        return EditConditions(height, width, num_tokens, latents[0].shape[-1], sizes, tensors, layout)

    @torch.no_grad()
    def encode_image(self, image: Image.Image, height: int, width: int) -> torch.Tensor:
        pipeline = self.pipeline
        pixels = pipeline.image_processor.preprocess(image.convert("RGBA"), height, width).unsqueeze(2)
        with self.loaded("vae"):
            latent = pipeline._encode_vae_image(pixels.to(self.device, pipeline.vae.dtype), generator=None)
        return pipeline._pack_latents(latent, 1, latent.shape[1], *latent.shape[3:])[0]

    def sigmas(self, num_inference_steps: int, conditions: EditConditions) -> torch.Tensor:
        sigmas = self.sample_sigmas
        if sigmas is not None and len(sigmas) != num_inference_steps:
            sigmas = None  # those of another number of steps
        return pipeline_sigmas(
            self.pipeline.scheduler, num_inference_steps, conditions.num_tokens, noise_levels=sigmas
        )

    def collate(self, conditions: list[EditConditions]) -> dict:
        self.check_bucket(conditions)
        return {
            "conditions": conditions,
            "image_latents": torch.stack([c.tensors["image_latents"] for c in conditions]),
        }

    def prefix(self, model: nn.Module, conditions: EditConditions, true_cfg_scale: float) -> list[torch.Tensor]:
        tensors = []
        # The transformer fills its cache in a pass with a target: the smallest, which nothing of the prefix sees.
        latents = conditions.tensors["image_latents"][None]
        target = latents.new_zeros(1, SLOT**2, latents.shape[2])
        for name in _names(true_cfg_scale):
            cache = QwenImage21KVCache(self.num_blocks)
            self._call(model, target, torch.zeros(()), [conditions], latents, name, (SLOT, SLOT), cache, "extract")
            for layer in cache.layer_caches:
                tensors += layer.get()
                layer.k = layer.v = None  # a checkpointed block keeps its cache, and its graph would keep itself
        return tensors

    def velocity(
        self, model: nn.Module, latents: torch.Tensor, sigma: torch.Tensor, batch: dict, true_cfg_scale: float
    ) -> torch.Tensor:
        cases = batch["conditions"]
        height, width = (side // self.pipeline.vae_scale_factor for side in (cases[0].height, cases[0].width))
        prefixes = batch.get("prefixes")
        if self.has_prefix and prefixes is None:
            own = {id(case): case for case in cases}
            computed = {key: self.prefix(model, case, true_cfg_scale) for key, case in own.items()}
            prefixes = [computed[id(case)] for case in cases]
        predictions = []
        for place, name in enumerate(_names(true_cfg_scale)):
            cache, mode = None, None
            if prefixes is not None:
                cache, mode = _SharedCache(prefixes, 2 * self.num_blocks * place), "cached"
            predictions.append(
                self._call(model, latents, sigma, cases, batch["image_latents"], name, (height, width), cache, mode)
            )
        if true_cfg_scale <= 1:
            return predictions[0]
        conditional, unconditional = predictions
        return unconditional + true_cfg_scale * (conditional - unconditional)

    def _call(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        cases: list[EditConditions],
        image_latents: torch.Tensor,
        name: str,
        size: tuple[int, int],
        cache: "QwenImage21KVCache | _SharedCache | None",
        mode: str | None,
    ) -> torch.Tensor:
        """A pass of the transformer with target latents of `size`, in latent tokens."""
        dtype, scale = self.dtype, self.pipeline.vae_scale_factor
        slots = torch.stack([case.tensors[f"{name}_slots"] for case in cases])
        shapes = [(1, height // scale, width // scale) for height, width in cases[0].reference_sizes]
        prediction = model(
            hidden_states=torch.cat([image_latents.to(dtype), latents.to(dtype)], dim=1),
            timestep=self.timestep(sigma, latents),
            encoder_hidden_states=torch.stack([case.tensors[f"{name}_embeds"] for case in cases]).to(dtype),
            img_shapes=[[*shapes, (1, *size)]] * len(cases),
            img_mask=torch.cat([slots, slots.new_ones(len(cases), latents.shape[1] // SLOT**2)], dim=1),
            kv_cache=cache,
            kv_cache_mode=mode,
            return_dict=False,
        )[0]
        return prediction[:, -latents.shape[1] :].float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, conditions: EditConditions) -> list[Image.Image]:
        pipeline, vae = self.pipeline, self.pipeline.vae
        with self.loaded("vae"):
            latents = pipeline._unpack_latents(
                latents, conditions.height, conditions.width, pipeline.vae_scale_factor
            ).to(self.device, vae.dtype)
            shape = (1, vae.config.z_dim, 1, 1, 1)
            mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
            std = torch.tensor(vae.config.latents_std).view(shape).to(latents)
            pixels = vae.decode(latents * std + mean, return_dict=False)[0][:, :, 0]
        return [to_rgb(image) for image in pipeline.image_processor.postprocess(pixels, output_type="pil")]


def _names(true_cfg_scale: float) -> list[str]:
    return ["prompt", "negative_prompt"] if true_cfg_scale > 1 else ["prompt"]


class _SharedLayer(QwenImage21KVLayerCache):
    """Keys and values of one block for all rows of a batch. They are put together only while the block needs them."""

    def __init__(self, runs: list[tuple[list[torch.Tensor], int]], place: int):
        super().__init__()
        self._runs, self._place = runs, place

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (
            [prefix[self._place + part].expand(count, -1, -1, -1) for prefix, count in self._runs] for part in (0, 1)
        )
        return (keys[0], values[0]) if len(keys) == 1 else (torch.cat(keys), torch.cat(values))


class _SharedCache:
    """The prefixes of a batch's rows, as the transformer's cache. Rows of one case share one prefix."""

    def __init__(self, prefixes: list[list[torch.Tensor]], start: int):
        rows = [list(same) for _, same in groupby(prefixes, key=id)]
        self._runs = [(same[0], len(same)) for same in rows]
        self._start = start

    def get_layer(self, layer_idx: int) -> QwenImage21KVLayerCache:
        return _SharedLayer(self._runs, self._start + 2 * layer_idx)
