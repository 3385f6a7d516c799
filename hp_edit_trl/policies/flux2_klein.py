"""FLUX.2-klein (`Flux2KleinPipeline`) as a policy."""

import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from torch import nn

from ..flow.schedule import pipeline_sigmas
from ..utils.texts import without_control_tokens
from .edit_policy import EditConditions, EditPolicy, Example, fitted_size


class Flux2KleinPolicy(EditPolicy):
    """
    Policy of `Flux2KleinPipeline`, with one or several reference images.

    `true_cfg_scale` is what the pipeline calls `guidance_scale`. The models that are distilled to four steps have no
    second pass; the base models do. References are fitted to the resolution of the target, where the pipeline takes
    them as large as they are, up to one megapixel.

    Args:
        pipeline ([`~diffusers.Flux2KleinPipeline`]):
            The loaded pipeline.
        offload_encoders (`bool`, *optional*, defaults to `False`):
            Keep the text encoder and the VAE in CPU memory and move them to the device only while they are used.
    """

    # By a regular expression, because `to_out` is a linear layer in one kind of block and a list of layers in the
    # other.
    lora_target_modules = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )
    default_negative_prompt = ""
    max_prompt_tokens = 512  # its chat template included
    pipeline: Flux2KleinPipeline

    def __init__(self, pipeline: Flux2KleinPipeline, offload_encoders: bool = False):
        super().__init__(pipeline, offload_encoders)
        self.has_true_cfg = not pipeline.config.is_distilled
        self.default_true_cfg_scale = 4.0 if self.has_true_cfg else 1.0
        self.default_num_inference_steps = 50 if self.has_true_cfg else 4

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.pipeline.text_encoder, "vae": self.pipeline.vae}

    def call_arguments(self, true_cfg_scale: float, negative_prompt: str) -> dict:
        return {"guidance_scale": true_cfg_scale}  # its negative prompt is always empty

    def example_of_size(self, resolution: int) -> Example:
        example = super().example_of_size(resolution)
        # The pipeline encodes a reference as large as it is, up to one megapixel.
        example.lines.append("image = image.resize((width, height), Image.Resampling.LANCZOS)")
        example.imports = ["from PIL import Image"]
        if resolution > 1024:
            example.difference = "The pipeline encodes the reference at one megapixel at most."
        return example

    def target_size(self, images: list[Image.Image], resolution: int) -> tuple[int, int]:
        # As in the pipeline the first reference gives the aspect ratio.
        return fitted_size(images[0], resolution, 2 * self.pipeline.vae_scale_factor)

    def prompt_tokens(self, prompts: list[str]) -> list[list[int]]:
        tokenizer = self.pipeline.tokenizer
        shown = [without_control_tokens(prompt, tokenizer) for prompt in prompts]
        chats = [[{"role": "user", "content": prompt}] for prompt in shown]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return tokenizer(texts)["input_ids"]

    @torch.no_grad()
    def encode(
        self, images: list[Image.Image], prompt: str, negative_prompt: str | None, resolution: int
    ) -> EditConditions:
        pipeline = self.pipeline
        prompt = without_control_tokens(prompt, pipeline.tokenizer)
        tensors = {}
        with self.loaded("text_encoder"):
            for name, text in (("prompt_embeds", prompt), ("negative_prompt_embeds", negative_prompt)):
                if text is not None:
                    tensors[name] = pipeline.encode_prompt(text, device=self.device)[0][0]
        sizes = tuple(fitted_size(image, resolution, 2 * pipeline.vae_scale_factor) for image in images)
        latents = []
        with self.loaded("vae"):
            for image, size in zip(images, sizes, strict=True):
                latents.append(self.encode_image(image, *size))
        tensors["image_latents"] = torch.cat(latents)
        num_tokens, num_channels = latents[0].shape
        return EditConditions(*sizes[0], num_tokens, num_channels, sizes, tensors)

    @torch.no_grad()
    def encode_image(self, image: Image.Image, height: int, width: int) -> torch.Tensor:
        pipeline = self.pipeline
        pixels = pipeline.image_processor.preprocess(image, height, width, resize_mode="crop")
        with self.loaded("vae"):
            latent = pipeline._encode_vae_image(pixels.to(self.device, pipeline.vae.dtype), generator=None)
        return pipeline._pack_latents(latent)[0]

    def sigmas(self, num_inference_steps: int, conditions: EditConditions) -> torch.Tensor:
        mu = compute_empirical_mu(conditions.num_tokens, num_inference_steps)
        return pipeline_sigmas(self.pipeline.scheduler, num_inference_steps, conditions.num_tokens, mu)

    def collate(self, conditions: list[EditConditions]) -> dict:
        first, pipeline = self.check_bucket(conditions), self.pipeline
        batch = {name: torch.stack([c.tensors[name] for c in conditions]) for name in first.tensors}
        packed = 2 * pipeline.vae_scale_factor
        target, *references = (
            torch.empty(1, 1, height // packed, width // packed)
            for height, width in ((first.height, first.width), *first.reference_sizes)
        )
        ids = torch.cat([pipeline._prepare_latent_ids(target), pipeline._prepare_image_ids(references)], dim=1)
        batch["img_ids"] = ids.expand(len(conditions), -1, -1).to(self.device)
        batch["txt_ids"] = pipeline._prepare_text_ids(batch["prompt_embeds"]).to(self.device)
        return batch

    def velocity(
        self, model: nn.Module, latents: torch.Tensor, sigma: torch.Tensor, batch: dict, true_cfg_scale: float
    ) -> torch.Tensor:
        dtype, num_tokens = self.dtype, latents.shape[1]
        hidden_states = torch.cat([latents.to(dtype), batch["image_latents"].to(dtype)], dim=1)

        def predict(name: str) -> torch.Tensor:
            prediction = model(
                hidden_states=hidden_states,
                timestep=self.timestep(sigma, latents),
                guidance=None,
                encoder_hidden_states=batch[name].to(dtype),
                txt_ids=batch["txt_ids"],
                img_ids=batch["img_ids"],
                return_dict=False,
            )[0]
            return prediction[:, :num_tokens].float()

        conditional = predict("prompt_embeds")
        if true_cfg_scale <= 1:
            return conditional
        unconditional = predict("negative_prompt_embeds")
        return unconditional + true_cfg_scale * (conditional - unconditional)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, conditions: EditConditions) -> list[Image.Image]:
        pipeline, vae = self.pipeline, self.pipeline.vae
        packed = 2 * pipeline.vae_scale_factor
        rows, columns = conditions.height // packed, conditions.width // packed
        with self.loaded("vae"):
            latents = latents.transpose(1, 2).unflatten(2, (rows, columns)).to(self.device, vae.dtype)
            mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents)
            std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(latents)
            pixels = vae.decode(pipeline._unpatchify_latents(latents * std + mean), return_dict=False)[0]
        return pipeline.image_processor.postprocess(pixels, output_type="pil")
