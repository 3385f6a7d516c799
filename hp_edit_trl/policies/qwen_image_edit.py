"""
Qwen-Image-Edit as a policy: 2509 and 2511 (`QwenImageEditPlusPipeline`), and the first (`QwenImageEditPipeline`).
"""

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE, calculate_dimensions
from PIL import Image
from torch import nn

from ..flow.schedule import pipeline_sigmas
from ..utils.texts import without_control_tokens
from .edit_policy import EditConditions, EditPolicy, Example, fitted_size


class QwenImageEditPlusPolicy(EditPolicy):
    """
    Policy of `QwenImageEditPlusPipeline`, with one or several reference images.

    It differs from calling the pipeline in one respect: references are encoded at the resolution of the target instead
    of always at about one megapixel. (With the pipeline, edits below one megapixel look zoomed.) At a
    `resolution` of 1024 the two agree, except that the pipeline rounds its sizes to multiples of 32 pixels and this
    class to the smallest multiple that the latents allow, 16, to stay closer to the aspect ratio.

    Args:
        pipeline ([`~diffusers.QwenImageEditPlusPipeline`]):
            The loaded pipeline.
        offload_encoders (`bool`, *optional*, defaults to `False`):
            Keep the text encoder and the VAE in CPU memory and move them to the device only while they are used.
    """

    lora_target_modules = [
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    ]  # fmt: skip
    default_true_cfg_scale = 4.0
    default_negative_prompt = " "
    default_num_inference_steps = 40
    # The pipelines name this limit, but read longer prompts whole, until the transformer has no positions left.
    max_prompt_tokens = 1024
    cuts_prompts = False
    shown_area = CONDITION_IMAGE_SIZE  # pixels of a reference as the text encoder sees it
    pipeline: QwenImageEditPlusPipeline | QwenImageEditPipeline

    def __init__(self, pipeline: QwenImageEditPlusPipeline | QwenImageEditPipeline, offload_encoders: bool = False):
        super().__init__(pipeline, offload_encoders)
        # The text stream is not read after the last block, so modules that only feed its output receive no gradient.
        last = pipeline.transformer.config.num_layers - 1
        self.lora_exclude_modules = rf".*transformer_blocks\.{last}\.(attn\.(add_q_proj|to_add_out)|txt_mlp\..*)"

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.pipeline.text_encoder, "vae": self.pipeline.vae}

    def call_arguments(self, true_cfg_scale: float, negative_prompt: str) -> dict:
        # The pipeline's default is guidance at 4.0, so 1.0 has to be passed explicitly.
        return super().call_arguments(true_cfg_scale, negative_prompt) or {"true_cfg_scale": 1.0}

    def example_of_size(self, resolution: int) -> Example:
        example, module = super().example_of_size(resolution), "pipeline_qwenimage_edit_plus"
        example.imports = [f"from diffusers.pipelines.qwenimage import {module}"]
        example.lines.insert(0, f"{module}.VAE_IMAGE_SIZE = {resolution} * {resolution}  # the area of references")
        example.difference = (
            "The pipeline encodes references at the area that is set above, with sides of multiples of 32 pixels, "
            f"where training took multiples of {2 * self.pipeline.vae_scale_factor}. So it squeezes references whose "
            "sides at that area are no multiples of 32."
        )
        if resolution % 32 == 0:
            example.difference += " A square picture is edited as in training."
        return example

    def target_size(self, images: list[Image.Image], resolution: int) -> tuple[int, int]:
        # As in the pipeline the last reference gives the aspect ratio.
        return fitted_size(images[-1], resolution, 2 * self.pipeline.vae_scale_factor)

    def prompt_tokens(self, prompts: list[str]) -> list[list[int]]:
        # Without the template, of which the first 64 tokens are dropped
        tokenizer = self.pipeline.tokenizer
        texts = [without_control_tokens(prompt, tokenizer) for prompt in prompts]
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def encode(
        self, images: list[Image.Image], prompt: str, negative_prompt: str | None, resolution: int
    ) -> EditConditions:
        pipeline = self.pipeline
        prompt = without_control_tokens(prompt, pipeline.tokenizer)
        tensors = {}

        # One prompt at a time: with several the pipeline mixes up the images of the prompts.
        shown = []
        for image in images:
            width, height = calculate_dimensions(self.shown_area, image.width / image.height)
            shown.append(pipeline.image_processor.resize(image, height, width))
        with self.loaded("text_encoder"):
            tensors["prompt_embeds"] = pipeline.encode_prompt(prompt, shown, device=self.device)[0][0]
            if negative_prompt is not None:
                negative = pipeline.encode_prompt(negative_prompt, shown, device=self.device)[0][0]
                tensors["negative_prompt_embeds"] = negative

        sizes = tuple(fitted_size(image, resolution, 2 * pipeline.vae_scale_factor) for image in images)
        latents = []
        with self.loaded("vae"):
            for image, size in zip(images, sizes, strict=True):
                latents.append(self.encode_image(image, *size))
        tensors["image_latents"] = torch.cat(latents)

        height, width = self.target_size(images, resolution)
        num_tokens = (height // pipeline.vae_scale_factor // 2) * (width // pipeline.vae_scale_factor // 2)
        return EditConditions(height, width, num_tokens, latents[0].shape[-1], sizes, tensors)

    @torch.no_grad()
    def encode_image(self, image: Image.Image, height: int, width: int) -> torch.Tensor:
        pipeline = self.pipeline
        pixels = pipeline.image_processor.preprocess(image, height, width).unsqueeze(2)
        with self.loaded("vae"):
            latent = pipeline._encode_vae_image(pixels.to(self.device, pipeline.vae.dtype), generator=None)
        return pipeline._pack_latents(latent, 1, *latent.shape[1:2], *latent.shape[3:])[0]

    def sigmas(self, num_inference_steps: int, conditions: EditConditions) -> torch.Tensor:
        return pipeline_sigmas(self.pipeline.scheduler, num_inference_steps, conditions.num_tokens)

    def collate(self, conditions: list[EditConditions]) -> dict:
        first = self.check_bucket(conditions)
        packed = 2 * self.pipeline.vae_scale_factor
        shapes = [(1, h // packed, w // packed) for h, w in ((first.height, first.width), *first.reference_sizes)]
        batch = {
            "image_latents": torch.stack([c.tensors["image_latents"] for c in conditions]),
            "img_shapes": [shapes] * len(conditions),
        }
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            if all(name in c.tensors for c in conditions):
                embeds = [c.tensors[name] for c in conditions]
                lengths = torch.tensor([len(e) for e in embeds])
                batch[name] = nn.utils.rnn.pad_sequence(embeds, batch_first=True)
                # No mask if nothing is padded: a mask would disable the fast attention path.
                mask = torch.arange(int(lengths.max())) < lengths[:, None]
                batch[f"{name}_mask"] = None if mask.all() else mask.to(embeds[0].device)
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
                encoder_hidden_states_mask=batch[f"{name}_mask"],
                img_shapes=batch["img_shapes"],
                return_dict=False,
            )[0]
            return prediction[:, :num_tokens].float()

        conditional = predict("prompt_embeds")
        if true_cfg_scale <= 1:
            return conditional
        unconditional = predict("negative_prompt_embeds")
        guided = unconditional + true_cfg_scale * (conditional - unconditional)
        # The guided prediction keeps the length that the conditional one has at each token.
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

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
        return pipeline.image_processor.postprocess(pixels, output_type="pil")


class QwenImageEditPolicy(QwenImageEditPlusPolicy):
    """
    Policy of the first Qwen-Image-Edit (`QwenImageEditPipeline`), with one reference image.

    It shares its transformer, VAE and text encoder with the later ones. It has a different prompt template, and its
    text encoder sees the reference at one megapixel, which gives about 1,300 text tokens.

    Args:
        pipeline ([`~diffusers.QwenImageEditPipeline`]):
            The loaded pipeline.
        offload_encoders (`bool`, *optional*, defaults to `False`):
            Keep the text encoder and the VAE in CPU memory and move them to the device only while they are used.
    """

    max_references = 1
    shown_area = 1024 * 1024

    def example_of_size(self, resolution: int) -> Example:
        # An edit of another size than the reference, which the pipeline always encodes at this area, looks zoomed.
        difference = (
            f"The pipeline edits at about one megapixel, where training was at {resolution}² pixels: edits differ."
        )
        return Example(difference="" if resolution == 1024 else difference)
