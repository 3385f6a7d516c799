from dataclasses import dataclass, field

from trl import ModelConfig


@dataclass
class EditModelConfig(ModelConfig):
    """
    [`~trl.ModelConfig`] with defaults for image editors. With it `get_peft_config(model_args)` returns the LoRA of the
    paper; the policy chooses its modules.

    Parameters:
        dtype (`str`, *optional*):
            Type in which the weights are loaded: `"bfloat16"`, `"float16"` or `"float32"`. Defaults to `"bfloat16"` if
            the trainer's `bf16` is set, and to `"float32"` otherwise. In float32, the default of [`~trl.ModelConfig`],
            the transformer of Qwen-Image-Edit alone takes 82 GB.
        use_peft (`bool`, *optional*, defaults to `True`):
            Must be `True`: only LoRA training is supported.
        lora_r (`int`, *optional*, defaults to `32`):
            LoRA rank. The default is the paper's.
        lora_alpha (`int`, *optional*, defaults to `64`):
            LoRA alpha.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            LoRA dropout, which must be 0.
        lora_task_type (`str`, *optional*):
            PEFT's task type, which image editors do not have.

    Raises:
        `ValueError`: If an option of language models is set that image editors do not have.
    """

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type in which the weights are loaded. Defaults to bfloat16 if `bf16` is set, else to float32.",
            "choices": ["bfloat16", "float16", "float32"],
        },
    )
    use_peft: bool = field(default=True, metadata={"help": "Must be true: only LoRA training is supported."})
    lora_r: int = field(default=32, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=64, metadata={"help": "LoRA alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout, which must be 0."})
    lora_task_type: str | None = field(
        default=None, metadata={"help": "PEFT's task type, which image editors do not have."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("load_in_8bit", "load_in_4bit", "attn_implementation"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported for image editors.")
        if not self.use_peft:
            raise ValueError("use_peft=False is not supported: only LoRA training is.")
