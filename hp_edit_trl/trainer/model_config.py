from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig

from ..utils.quantization import in_bits


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
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether to quantize the base model to 4 bits with bitsandbytes: the transformer and the text encoder. The
            other weights, and computations, have the type `dtype`; the LoRA is trained in float32.
        load_in_8bit (`bool`, *optional*, defaults to `False`):
            Whether to quantize it to 8 bits with torchao, weights only. The 8 bits of bitsandbytes round the inputs of
            layers, too, and are refused.
        bnb_4bit_quant_type (`str`, *optional*, defaults to `"nf4"`):
            Quantization type of `load_in_4bit` (`"nf4"` or `"fp4"`).
        use_bnb_nested_quant (`bool`, *optional*, defaults to `False`):
            Whether `load_in_4bit` quantizes its scales, too.

    Raises:
        `ValueError`: If an option of language models is set that image editors do not have, or an option of the
            quantization does not fit.
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
        for name in ("attn_implementation", "bnb_4bit_quant_storage"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported for image editors.")
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ValueError(f"bnb_4bit_quant_type={self.bnb_4bit_quant_type!r} must be 'nf4' or 'fp4'.")
        for name, is_set in (
            ("bnb_4bit_quant_type", self.bnb_4bit_quant_type != "nf4"),
            ("use_bnb_nested_quant", self.use_bnb_nested_quant),
        ):
            if is_set and not self.load_in_4bit:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect without load_in_4bit: set it, too.")
        if not self.use_peft:
            raise ValueError("use_peft=False is not supported: only LoRA training is.")

    def init_kwargs(self, args: Any) -> dict[str, Any]:
        """
        The arguments of [`~diffusers.DiffusionPipeline.from_pretrained`] that these options stand for. Whether this
        machine can quantize as they say is checked by the trainer, before it downloads anything.

        Args:
            args ([`FlowGRPOEditConfig`], [`FlowNFTEditConfig`] or [`DPOEditConfig`]):
                The trainer's configuration. Its `model_init_kwargs` take precedence.

        Raises:
            `ValueError`: If both ask for a quantization.
        """
        given: dict[str, Any] = dict(args.model_init_kwargs or {})
        quantization = in_bits(
            self.load_in_4bit, self.load_in_8bit, self.bnb_4bit_quant_type, self.use_bnb_nested_quant
        )
        if quantization and given.get("quantization_config") is not None:
            option = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
            raise ValueError(f"{option} and model_init_kwargs: quantization_config are both set: leave one out.")
        kwargs = {"revision": self.model_revision, "dtype": self.dtype}
        return kwargs | ({"quantization_config": quantization} if quantization else {}) | given
