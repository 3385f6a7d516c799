from dataclasses import dataclass, field

from trl import ModelConfig


@dataclass
class EditModelConfig(ModelConfig):
    """
    [`~trl.ModelConfig`] with the defaults of image editors, for scripts: `get_peft_config(model_args)` then gives the
    LoRA of the paper, with the modules left to the policy.

    Parameters:
        dtype (`str`, *optional*):
            Type in which the pipeline's weights are loaded: `"bfloat16"`, `"float16"` or `"float32"`. Defaults to
            `"bfloat16"` if the trainer's `bf16` is set, and to `"float32"` otherwise. [`~trl.ModelConfig`] always
            loads float32, which takes 82 GB for the transformer of Qwen-Image-Edit alone.
        use_peft (`bool`, *optional*, defaults to `True`):
            Whether to take the LoRA from these arguments. Only LoRA training is supported.
        lora_r (`int`, *optional*, defaults to `32`):
            LoRA rank (the paper's).
        lora_alpha (`int`, *optional*, defaults to `64`):
            LoRA alpha.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            LoRA dropout. The trainers support only 0.
        lora_task_type (`str`, *optional*):
            PEFT's task type. Image editors do not have one.

    Raises:
        `ValueError`: If an option of language models is set that image editors do not have.
    """

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type in which the weights are loaded. Defaults to bfloat16 if `bf16` is set, else float32.",
            "choices": ["bfloat16", "float16", "float32"],
        },
    )
    use_peft: bool = field(default=True, metadata={"help": "Whether to take the LoRA from these arguments."})
    lora_r: int = field(default=32, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=64, metadata={"help": "LoRA alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout. The trainers support only 0."})
    lora_task_type: str | None = field(
        default=None, metadata={"help": "PEFT's task type. Image editors do not have one."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("load_in_8bit", "load_in_4bit", "attn_implementation"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported for image editors.")
        if not self.use_peft:
            raise ValueError("use_peft=False is not supported: the trainers train a LoRA.")
