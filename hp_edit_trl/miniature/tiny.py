"""Tiny, randomly initialized models of the real classes, for tests, benchmarks and examples without downloads."""

import string

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    LongCatImageEditPipeline,
    LongCatImageTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip

# Content is either a string or a list of text and image parts; judges send nothing else.
CHAT_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def tiny_tokenizer(texts: list[str] | None = None) -> Qwen2TokenizerFast:
    """
    Makes a byte-level tokenizer with Qwen's special tokens. It is trained on the pipeline's template, so that the
    template has 64 tokens as with the real tokenizer.

    Args:
        texts (`list[str]`, *optional*):
            Further texts to train on.
    """
    template = QwenImageEditPlusPipeline(*[None] * 6).prompt_template_encode
    lines = [template.replace("<|im_start|>", "").replace("<|im_end|>", ""), "Picture 1: Picture 2:", *(texts or [])]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2TokenizerFast().backend_tokenizer.pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(lines * 2, trainer)
    tokenizer = Qwen2TokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIAL_TOKENS})
    return tokenizer


def tiny_text_encoder(tokenizer: Qwen2TokenizerFast, hidden_size: int = 16) -> Qwen2_5_VLForConditionalGeneration:
    """
    Makes a random Qwen2.5-VL.

    Args:
        tokenizer (`Qwen2TokenizerFast`):
            A tokenizer of [`tiny_tokenizer`].
        hidden_size (`int`, *optional*, defaults to `16`):
            Size of the embeddings, a multiple of 16.
    """
    special = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    unit = hidden_size // 16
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "hidden_size": hidden_size,
                "intermediate_size": 2 * hidden_size,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": len(tokenizer),
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [unit, unit, 2 * unit],
                },
                "bos_token_id": special["<|endoftext|>"],
                "eos_token_id": special["<|im_end|>"],
                "pad_token_id": special["<|endoftext|>"],
            },
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": hidden_size,
                "fullatt_block_indexes": [1],
                "window_size": 112,
            },
            image_token_id=special["<|image_pad|>"],
            video_token_id=special["<|video_pad|>"],
            vision_start_token_id=special["<|vision_start|>"],
            vision_end_token_id=special["<|vision_end|>"],
        )
    )


def assemble(
    transformer: QwenImageTransformer2DModel,
    vae: AutoencoderKLQwenImage,
    text_encoder: Qwen2_5_VLForConditionalGeneration,
    tokenizer: Qwen2TokenizerFast,
    pixels: int = 56 * 56,
) -> QwenImageEditPlusPipeline:
    """
    Makes a pipeline from the given models.

    Args:
        transformer (`QwenImageTransformer2DModel`):
            The transformer.
        vae (`AutoencoderKLQwenImage`):
            The VAE.
        text_encoder (`Qwen2_5_VLForConditionalGeneration`):
            The text encoder.
        tokenizer (`Qwen2TokenizerFast`):
            Its tokenizer.
        pixels (`int`, *optional*, defaults to `3136`):
            Number of pixels of an image as the text encoder sees it. Each 28 x 28 pixels are one token; the real
            processor makes about two hundred.
    """
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=pixels, max_pixels=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
        shift_terminal=0.02, time_shift_type="exponential",
    )  # fmt: skip
    pipeline = QwenImageEditPlusPipeline(
        scheduler=scheduler,
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        processor=processor,
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(_native_resolution=64)
    return pipeline


def tiny_pipeline(
    num_layers: int = 2,
    num_attention_heads: int = 3,
    attention_head_dim: int = 16,
    vae_base_dim: int = 8,
    zero_cond_t: bool = False,
    seed: int = 0,
) -> QwenImageEditPlusPipeline:
    """
    Makes a random `QwenImageEditPlusPipeline` of 2 MB. Its VAE divides each side by 8, like the real one.

    Args:
        num_layers (`int`, *optional*, defaults to `2`):
            Number of transformer blocks.
        num_attention_heads (`int`, *optional*, defaults to `3`):
            Number of attention heads of the transformer.
        attention_head_dim (`int`, *optional*, defaults to `16`):
            Size of each head, a multiple of 16.
        vae_base_dim (`int`, *optional*, defaults to `8`):
            Base width of the VAE.
        zero_cond_t (`bool`, *optional*, defaults to `False`):
            Whether to modulate references as at sigma 0, as Qwen-Image-Edit-2511 does.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=16,
            axes_dims_rope=tuple(attention_head_dim * part // 16 for part in (8, 4, 4)),
            zero_cond_t=zero_cond_t,
        )
        vae = AutoencoderKLQwenImage(
            base_dim=vae_base_dim,
            z_dim=4,
            dim_mult=[1, 2, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.0, 0.3],
            latents_std=[1.1, 0.9, 1.0, 1.2],
        )
        text_encoder = tiny_text_encoder(tokenizer)
    with torch.no_grad():
        # A random VAE decodes everything to almost the same grey: more contrast makes differences visible.
        vae.decoder.conv_out.weight.mul_(4)
    return assemble(transformer, vae, text_encoder, tokenizer)


def tiny_qwen_image_edit_pipeline(seed: int = 0) -> QwenImageEditPipeline:
    """Makes a random `QwenImageEditPipeline` from the components of [`tiny_pipeline`]."""
    pipeline = QwenImageEditPipeline(**tiny_pipeline(seed=seed).components)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(_native_resolution=64)
    return pipeline


def _character_tokenizer() -> CLIPTokenizer:
    """Makes a CLIP tokenizer whose tokens are single characters."""
    characters = sorted(set(string.printable) - set(string.whitespace))
    words = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77)


def _tiny_vae(latent_channels: int = 4) -> AutoencoderKL:
    """Makes a random VAE of FLUX.1's kind. It divides each side by 8, like the real one."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        latent_channels=latent_channels,
        norm_num_groups=4,
        shift_factor=0.1,
        scaling_factor=0.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tiny_kontext_pipeline(guidance_embeds: bool = True, seed: int = 0) -> FluxKontextPipeline:
    """
    Makes a random `FluxKontextPipeline` of 1 MB. Its VAE divides each side by 8, like the real one.

    Args:
        guidance_embeds (`bool`, *optional*, defaults to `True`):
            Whether the transformer takes guidance as an input, as FLUX.1-Kontext-dev does.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.
    """
    clip_tokenizer = _character_tokenizer()
    characters = sorted(set(string.printable) - set(string.whitespace))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in characters)]
    t5_tokenizer = T5TokenizerFast(pieces, extra_ids=0, additional_special_tokens=[])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )
        vae = _tiny_vae()
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip_tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                projection_dim=16,
                bos_token_id=clip_tokenizer.bos_token_id,
                eos_token_id=clip_tokenizer.eos_token_id,
            )  # fmt: skip
        )
        text_encoder_2 = T5EncoderModel(
            T5Config(vocab_size=len(pieces), d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        )
    pipeline = FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
        ),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=clip_tokenizer,
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=t5_tokenizer,
        transformer=transformer.eval(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(_native_resolution=64)
    return pipeline


def tiny_klein_pipeline(is_distilled: bool = False, seed: int = 0) -> Flux2KleinPipeline:
    """
    Makes a random `Flux2KleinPipeline` of 2 MB. Its VAE divides each side by 8, like the real one.

    Args:
        is_distilled (`bool`, *optional*, defaults to `False`):
            Whether it is step-distilled (four steps) and has no unconditional pass.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 8,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        vae = AutoencoderKLFlux2(block_out_channels=(8, 8, 16, 16), latent_channels=4, norm_num_groups=4)
        # Latents are normalized with the statistics of the batch norm: make them those of a trained model.
        vae.bn.running_mean.normal_(0, 0.2)
        vae.bn.running_var.uniform_(0.5, 1.5)
        text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=28,
                num_attention_heads=1,
                num_key_value_heads=1,
                head_dim=8,
            )  # fmt: skip
        )
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
        ),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        is_distilled=is_distilled,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(_native_resolution=64)
    return pipeline


def tiny_longcat_pipeline(seed: int = 0) -> LongCatImageEditPipeline:
    """
    Makes a random `LongCatImageEditPipeline` of 2 MB. Its VAE divides each side by 8, like the real one.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 6, 6),
        )
        vae = _tiny_vae(latent_channels=16)  # the pipeline's call names this number
        text_encoder = tiny_text_encoder(tokenizer)
    pipeline = LongCatImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
        ),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_processor=Qwen2VLProcessor(
            image_processor=Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=56 * 56),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(),
            chat_template=CHAT_TEMPLATE,
        ),
        transformer=transformer.eval(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(_native_resolution=64)
    return pipeline


def _tiny_qwen3_vl(tokenizer: Qwen2TokenizerFast, seed: int) -> Qwen3VLForConditionalGeneration:
    """Makes a random Qwen3-VL."""
    special = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]},
            "bos_token_id": special["<|endoftext|>"],
            "eos_token_id": special["<|im_end|>"],
            "pad_token_id": special["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3VLForConditionalGeneration(config)


def qwen3_vl_processor(tokenizer: Qwen2TokenizerFast, min_pixels: int, max_pixels: int) -> Qwen3VLProcessor:
    """
    Makes a processor that gives 32 x 32 pixels a token, as the real one does.

    Args:
        tokenizer (`Qwen2TokenizerFast`):
            A tokenizer of [`tiny_tokenizer`].
        min_pixels (`int`):
            Number of pixels that smaller images are enlarged to.
        max_pixels (`int`):
            Number of pixels that larger images are reduced to.
    """
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=16, merge_size=2, min_pixels=min_pixels, max_pixels=max_pixels
        ),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_qwen_image_21_pipeline(num_layers: int = 2, seed: int = 0) -> QwenImage21Pipeline:
    """
    Makes a random `QwenImage21Pipeline` of 2 MB. Its VAE divides each side by 16, like the real one.

    Args:
        num_layers (`int`, *optional*, defaults to `2`):
            Number of transformer blocks.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=num_layers,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=32,
            axes_dims_rope=(4, 6, 6),
        )
        vae = AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 2, 2, 2],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.0, 0.3],
            latents_std=[1.1, 0.9, 1.0, 1.2],
        )
    pipeline = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
        ),
        vae=vae.eval(),
        text_encoder=_tiny_qwen3_vl(tokenizer, seed).eval(),
        processor=qwen3_vl_processor(tokenizer, 32 * 32, 4096 * 4096),
        transformer=transformer.eval(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(_native_resolution=64)
    return pipeline


def tiny_judge(folder: str, seed: int = 0) -> str:
    """
    Saves a random Qwen3-VL of 1 MB that loads with `AutoModelForImageTextToText` and `AutoProcessor`.

    Args:
        folder (`str`):
            Folder to save it in.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.

    Returns:
        `str`: `folder`.
    """
    tokenizer = tiny_tokenizer()
    _tiny_qwen3_vl(tokenizer, seed).save_pretrained(folder)
    qwen3_vl_processor(tokenizer, 64 * 64, 64 * 64).save_pretrained(folder)
    return folder


def tiny_clip(folder: str, seed: int = 0) -> str:
    """
    Saves a random CLIP of 0.2 MB that loads with `CLIPModel` and `CLIPProcessor`. It sees images of 32 x 32 pixels.

    Args:
        folder (`str`):
            Folder to save it in.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.

    Returns:
        `str`: `folder`.
    """
    tokenizer = _character_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **size,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
