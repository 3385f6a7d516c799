"""Tiny, randomly initialised models of the real classes: for tests, benchmarks and a demo without downloads."""

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)


SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip

# Content is either a string or a list of text and image parts; that is all that a judge sends.
CHAT_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def tiny_tokenizer(texts: list[str] | None = None) -> Qwen2TokenizerFast:
    """
    A byte-level tokenizer with Qwen's special tokens, trained so that the pipeline's template has its 64 tokens.

    Args:
        texts (`list[str]`, *optional*):
            Texts whose words become tokens too.
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
    A random Qwen2.5-VL.

    Args:
        tokenizer (`Qwen2TokenizerFast`):
            What [`tiny_tokenizer`] returned.
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
    A pipeline of the given models.

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
            Number of pixels of an image as the text encoder sees it. Few, so that it is a handful of tokens and not two
            hundred: each 28 x 28 pixels are one.
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
    A random `QwenImageEditPlusPipeline` of 2 MB. Its VAE divides each side by 8, as the real one.

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
            Modulate references as at sigma 0, as Qwen-Image-Edit-2511 does.
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
        # A random VAE decodes to near grey; with more contrast there is more to see.
        vae.decoder.conv_out.weight.mul_(4)
    return assemble(transformer, vae, text_encoder, tokenizer)


def tiny_judge(folder: str, seed: int = 0) -> str:
    """
    Saves a random Qwen3-VL of 1 MB that loads with `AutoModelForImageTextToText` and `AutoProcessor`.

    Args:
        folder (`str`):
            Where to save it.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.

    Returns:
        `str`: `folder`.
    """
    tokenizer = tiny_tokenizer()
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
        model = Qwen3VLForConditionalGeneration(config)
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16, merge_size=2, min_pixels=64 * 64, max_pixels=64 * 64),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
