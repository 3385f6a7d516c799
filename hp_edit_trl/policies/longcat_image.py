"""LongCat-Image-Edit (`LongCatImageEditPipeline`) as a policy."""

import torch
from diffusers import LongCatImageEditPipeline
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as pipeline_module
from PIL import Image
from torch import nn

from ..flow.schedule import pipeline_sigmas
from ..utils.texts import without_control_tokens
from .edit_policy import EditConditions, EditPolicy, Example


class LongCatImageEditPolicy(EditPolicy):
    """
    Policy of `LongCatImageEditPipeline`, with one reference image.

    `true_cfg_scale` is what the pipeline calls `guidance_scale`. The pipeline always edits at one megapixel and shows
    the reference at half of its sides to the text encoder; the policy does the same at the resolution of the target.
    Every prompt is padded to 512 tokens, and the transformer attends to all of them. Quoted text is read letter by
    letter.

    Args:
        pipeline ([`~diffusers.LongCatImageEditPipeline`]):
            The loaded pipeline.
        offload_encoders (`bool`, *optional*, defaults to `False`):
            Keep the text encoder and the VAE in CPU memory and move them to the device only while they are used.
    """

    lora_target_modules = [
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
    ]  # fmt: skip
    lora_exclude_modules = None  # the text stream of the double blocks is read by the single ones
    # The pipeline itself has no method for LoRAs.
    lora_loader = 'pipeline.transformer.load_lora_adapter("{}", weight_name="pytorch_lora_weights.safetensors")'
    max_references = 1
    default_true_cfg_scale = 4.5
    default_negative_prompt = ""
    default_num_inference_steps = 50
    max_prompt_tokens = 512
    cuts_prompts = False  # the pipeline fails where it would cut
    pipeline: LongCatImageEditPipeline

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.pipeline.text_encoder, "vae": self.pipeline.vae}

    def call_arguments(self, true_cfg_scale: float, negative_prompt: str) -> dict:
        guidance = {"guidance_scale": true_cfg_scale}
        return guidance | ({"negative_prompt": negative_prompt} if true_cfg_scale > 1 else {})

    def example_of_size(self, resolution: int) -> Example:
        difference = (
            f"The pipeline edits at about one megapixel, where training was at {resolution}² pixels: edits differ."
        )
        return Example(difference="" if resolution == 1024 else difference)

    def target_size(self, images: list[Image.Image], resolution: int) -> tuple[int, int]:
        # The module's function at the time of the call, so that both use one
        width, height = pipeline_module.calculate_dimensions(resolution**2, images[0].width / images[0].height)
        return height, width

    def prompt_tokens(self, prompts: list[str]) -> list[list[int]]:
        tokenizer = self.pipeline.tokenizer
        counted = []
        for prompt in prompts:
            parts = pipeline_module.split_quotation(without_control_tokens(prompt, tokenizer))
            pieces = [piece for text, quoted in parts for piece in (text if quoted else [text])]
            tokens = tokenizer(pieces, add_special_tokens=False)["input_ids"] if pieces else []
            counted.append([token for piece in tokens for token in piece])
        return counted

    @torch.no_grad()
    def encode(
        self, images: list[Image.Image], prompt: str, negative_prompt: str | None, resolution: int
    ) -> EditConditions:
        pipeline, (height, width) = self.pipeline, self.target_size(images, resolution)
        prompt = without_control_tokens(prompt, pipeline.tokenizer)
        image = pipeline.image_processor.resize(images[0], height, width)
        shown = pipeline.image_processor.resize(image, height // 2, width // 2)
        tensors: dict[str, torch.Tensor] = {}
        with self.loaded("text_encoder"):
            for name, text in (("prompt_embeds", prompt), ("negative_prompt_embeds", negative_prompt)):
                if text is not None:
                    tensors[name] = pipeline.encode_prompt([text], shown)[0][0]
        tensors["image_latents"] = self.encode_image(images[0], height, width)
        num_tokens, num_channels = tensors["image_latents"].shape
        return EditConditions(height, width, num_tokens, num_channels, ((height, width),), tensors)

    @torch.no_grad()
    def encode_image(self, image: Image.Image, height: int, width: int) -> torch.Tensor:
        pipeline = self.pipeline
        # In two steps as in the pipeline: resized, and then made a tensor
        pixels = pipeline.image_processor.preprocess(pipeline.image_processor.resize(image, height, width))
        with self.loaded("vae"):
            latent = pipeline._encode_vae_image(pixels.to(self.device, pipeline.vae.dtype), generator=None)
        return pipeline._pack_latents(latent, *latent.shape)[0]

    def sigmas(self, num_inference_steps: int, conditions: EditConditions) -> torch.Tensor:
        config = self.pipeline.scheduler.config
        mu = pipeline_module.calculate_shift(
            conditions.num_tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        return pipeline_sigmas(self.pipeline.scheduler, num_inference_steps, conditions.num_tokens, mu)

    def collate(self, conditions: list[EditConditions]) -> dict:
        first = self.check_bucket(conditions)
        batch: dict = {name: torch.stack([c.tensors[name] for c in conditions]) for name in first.tensors}
        packed = 2 * self.pipeline.vae_scale_factor
        length = batch["prompt_embeds"].shape[1]
        place = {"type": "image", "start": (length, length)}
        size = {"height": first.height // packed, "width": first.width // packed}
        ids = [pipeline_module.prepare_pos_ids(modality_id=number, **place, **size) for number in (1, 2)]
        batch["img_ids"] = torch.cat(ids).to(self.device)
        batch["txt_ids"] = pipeline_module.prepare_pos_ids(type="text", num_token=length).to(self.device)
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
        with self.loaded("vae"):
            latents = pipeline._unpack_latents(
                latents, conditions.height, conditions.width, pipeline.vae_scale_factor
            ).to(self.device, vae.dtype)
            pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        return pipeline.image_processor.postprocess(pixels, output_type="pil")
