from dataclasses import dataclass, field

from trl import ModelConfig


@dataclass
class EditModelConfig(ModelConfig):
    """
    [`~trl.ModelConfig`] with the defaults of image editors, for scripts: `get_peft_config(model_args)` then gives the
    LoRA of the paper, with the modules left to the policy.

    Parameters:
        use_peft (`bool`, *optional*, defaults to `True`):
            Whether to take the LoRA from these arguments. Nothing else than a LoRA can be trained.
        lora_r (`int`, *optional*, defaults to `32`):
            LoRA rank (the paper's).
        lora_alpha (`int`, *optional*, defaults to `64`):
            LoRA alpha.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            LoRA dropout; the trainers take no other.
        lora_task_type (`str`, *optional*):
            PEFT's task type. Image editors have none.

    Raises:
        `ValueError`: If an option of language models is set that image editors do not have.
    """

    use_peft: bool = field(default=True, metadata={"help": "Whether to take the LoRA from these arguments."})
    lora_r: int = field(default=32, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=64, metadata={"help": "LoRA alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout; the trainers take no other than 0."})
    lora_task_type: str | None = field(default=None, metadata={"help": "PEFT's task type. Image editors have none."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("load_in_8bit", "load_in_4bit", "attn_implementation"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported for image editors.")
        if not self.use_peft:
            raise ValueError("use_peft=False is not supported: the trainers train a LoRA.")
