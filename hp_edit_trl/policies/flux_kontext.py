"""FLUX.1-Kontext (`FluxKontextPipeline`) as a policy."""

import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from torch import nn

from ..flow.schedule import pipeline_sigmas
from ..utils.texts import without_control_tokens
from .edit_policy import EditConditions, EditPolicy, Example, fitted_size


class FluxKontextPolicy(EditPolicy):
    """
    Policy of `FluxKontextPipeline`, with one reference image.

    Guidance is an input of this distilled model and costs no second pass; `true_cfg_scale` above 1 adds one, as in the
    pipeline. The reference keeps its aspect ratio at the resolution of the target, where the pipeline would take the
    nearest of a list of one-megapixel sizes.

    Args:
        pipeline ([`~diffusers.FluxKontextPipeline`]):
            The loaded pipeline.
        offload_encoders (`bool`, *optional*, defaults to `False`):
            Keep the text encoders and the VAE in CPU memory and move them to the device only while they are used.
    """

    lora_target_modules = [
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
    ]  # fmt: skip
    lora_exclude_modules = None  # the text stream of the double blocks is read by the single ones
    quantized_components = ("transformer", "text_encoder_2")  # T5; CLIP is small
    max_references = 1
    default_true_cfg_scale = 1.0
    default_negative_prompt = ""
    default_num_inference_steps = 28
    # T5's 512 without the one that ends a text. CLIP, which gives one vector for the whole prompt, cuts at 77.
    max_prompt_tokens = 511
    pipeline: FluxKontextPipeline

    def __init__(self, pipeline: FluxKontextPipeline, offload_encoders: bool = False):
        super().__init__(pipeline, offload_encoders)
        if pipeline.transformer.config.guidance_embeds:
            self.guidance_scale = 2.5

    @property
    def encoders(self) -> dict[str, nn.Module]:
        pipeline = self.pipeline
        return {"text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2, "vae": pipeline.vae}

    def call_arguments(self, true_cfg_scale: float, negative_prompt: str) -> dict:
        guidance = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return guidance | super().call_arguments(true_cfg_scale, negative_prompt)

    def example_of_size(self, resolution: int) -> Example:
        example = super().example_of_size(resolution)
        example.lines.append("image = image.resize((width, height), Image.Resampling.LANCZOS)")
        example.imports = ["from PIL import Image"]
        # Otherwise the pipeline takes the nearest of its sizes of one megapixel.
        example.arguments |= {"max_area": "height * width", "_auto_resize": "False"}
        return example

    def target_size(self, images: list[Image.Image], resolution: int) -> tuple[int, int]:
        return fitted_size(images[0], resolution, 2 * self.pipeline.vae_scale_factor)

    def prompt_tokens(self, prompts: list[str]) -> list[list[int]]:
        pipeline = self.pipeline
        texts = [without_control_tokens(prompt, pipeline.tokenizer, pipeline.tokenizer_2) for prompt in prompts]
        return pipeline.tokenizer_2(texts, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def encode(
        self, images: list[Image.Image], prompt: str, negative_prompt: str | None, resolution: int
    ) -> EditConditions:
        pipeline, (height, width) = self.pipeline, self.target_size(images, resolution)
        prompt = without_control_tokens(prompt, pipeline.tokenizer, pipeline.tokenizer_2)
        tensors: dict[str, torch.Tensor] = {}
        with self.loaded("text_encoder", "text_encoder_2"):
            for name, text in (("", prompt), ("negative_", negative_prompt)):
                if text is not None:
                    embeds, pooled, _ = pipeline.encode_prompt(text, device=self.device)
                    tensors |= {f"{name}prompt_embeds": embeds[0], f"{name}pooled_prompt_embeds": pooled[0]}
        tensors["image_latents"] = self.encode_image(images[0], height, width)
        num_tokens, num_channels = tensors["image_latents"].shape
        return EditConditions(height, width, num_tokens, num_channels, ((height, width),), tensors)

    @torch.no_grad()
    def encode_image(self, image: Image.Image, height: int, width: int) -> torch.Tensor:
        pipeline = self.pipeline
        pixels = pipeline.image_processor.preprocess(image, height, width)
        with self.loaded("vae"):
            latent = pipeline._encode_vae_image(pixels.to(self.device, pipeline.vae.dtype), generator=None)
        return pipeline._pack_latents(latent, *latent.shape)[0]

    def sigmas(self, num_inference_steps: int, conditions: EditConditions) -> torch.Tensor:
        return pipeline_sigmas(self.pipeline.scheduler, num_inference_steps, conditions.num_tokens)

    def collate(self, conditions: list[EditConditions]) -> dict:
        first = self.check_bucket(conditions)
        batch = {name: torch.stack([c.tensors[name] for c in conditions]) for name in first.tensors}
        packed = 2 * self.pipeline.vae_scale_factor
        rows, columns = first.height // packed, first.width // packed
        ids = self.pipeline._prepare_latent_image_ids(1, rows, columns, self.device, self.dtype)
        reference_ids = ids.clone()
        reference_ids[:, 0] = 1
        batch["img_ids"] = torch.cat([ids, reference_ids])
        batch["txt_ids"] = torch.zeros(batch["prompt_embeds"].shape[1], 3, device=self.device, dtype=self.dtype)
        return batch

    def velocity(
        self, model: nn.Module, latents: torch.Tensor, sigma: torch.Tensor, batch: dict, true_cfg_scale: float
    ) -> torch.Tensor:
        dtype, num_tokens = self.dtype, latents.shape[1]
        hidden_states = torch.cat([latents.to(dtype), batch["image_latents"].to(dtype)], dim=1)
        guidance = None
        if self.guidance_scale is not None:
            guidance = torch.full((len(latents),), self.guidance_scale, device=latents.device)

        def predict(name: str) -> torch.Tensor:
            prediction = model(
                hidden_states=hidden_states,
                timestep=self.timestep(sigma, latents),
                guidance=guidance,
                pooled_projections=batch[f"{name}pooled_prompt_embeds"].to(dtype),
                encoder_hidden_states=batch[f"{name}prompt_embeds"].to(dtype),
                txt_ids=batch["txt_ids"],
                img_ids=batch["img_ids"],
                return_dict=False,
            )[0]
            return prediction[:, :num_tokens].float()

        conditional = predict("")
        if true_cfg_scale <= 1:
            return conditional
        unconditional = predict("negative_")
        return unconditional + true_cfg_scale * (conditional - unconditional)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, conditions: EditConditions) -> list[Image.Image]:
        pipeline, vae = self.pipeline, self.pipeline.vae
        with self.loaded("vae"):
            latents = pipeline._unpack_latents(
                latents, conditions.height, conditions.width, pipeline.vae_scale_factor
            ).to(self.device, vae.dtype)
            pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        return pipeline.image_processor.postprocess(pixels, output_type="pil")
