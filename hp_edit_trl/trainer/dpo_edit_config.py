from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .base_edit_config import BaseEditConfig
from .hub import check_hub_options


LOSS_TYPES = ["sigmoid", "ipo", "hinge", "sft"]


@dataclass(repr=False)
class DPOEditConfig(BaseEditConfig):
    r"""
    Configuration class for the [`DPOEditTrainer`].

    This class includes only the parameters that are specific to Diffusion-DPO training of image editors. For the other
    training arguments, see [`~transformers.TrainingArguments`]; the note at the end lists those with different
    defaults.

    The HP-Edit paper compares with DPO but gives no setting of it. The defaults are what public Diffusion-DPO trainers
    use for flow-matching models with a LoRA, and are marked *field*.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`str`, `dict[str, Any]`, *optional*):
            Keyword arguments for [`~diffusers.DiffusionPipeline.from_pretrained`], used when the `model` argument of
            the trainer is a string, e.g. `{"revision": "..."}`. Weights are loaded in bfloat16 if `bf16` is set,
            unless `dtype` is given here. `quantization_config` may be a mapping, see docs/quantization.md.
        offload_encoders (`bool`, *optional*, defaults to `True`):
            Keep the text encoder and the VAE in CPU memory while they are not used: here that is all the time after
            the pairs were encoded. Saves about 17 GB with Qwen-Image-Edit.
        offload_transformer (`bool`, *optional*, defaults to `False`):
            Keep the transformer's blocks in CPU memory, and copy each to the device while the one before it is
            computed, see docs/memory.md. Needs `gradient_checkpointing`.
        num_checkpointed_blocks (`int`, *optional*):
            Number of the transformer's blocks that `gradient_checkpointing` computes again in the backward pass.
            Defaults to all. Fewer take more memory and less time.

        > Parameters that control the data

        resolution (`int`, *optional*, defaults to `512`):
            Side in pixels of the square whose area every edit and every reference has; aspect ratios are kept. The
            edits of a pair are resized to it.
        shuffle_dataset (`bool`, *optional*, defaults to `True`):
            Whether to shuffle the training dataset, differently in each epoch.
        on_bad_case (`str`, *optional*, defaults to `"error"`):
            What to do with a pair that cannot be used, see [`~hp_edit_trl.cases.check_pairs`], cannot be encoded, or
            whose edits differ in size or shape. `"error"` stops, before the model is loaded where it can be known
            then; `"skip"` leaves the pairs out with a warning and counts them in the metric `bad_cases`.
        latents_cache_dir (`str`, *optional*):
            Folder for the encoded pairs. Every pair is encoded once and found again by its content, also by other
            runs. Defaults to `output_dir/_latents`, which is not pushed to the Hub. Takes about 3 MB per pair with
            Qwen-Image-Edit at 512 pixels.

        > Parameters that control the training

        beta (`float`, *optional*, defaults to `2000.0`):
            Scale \\( \beta \\) of the implicit rewards; the higher, the closer the policy stays to the reference.
            Errors are means over latent dimensions, hence so large (*field*).
        loss_type (`list[str]`, *optional*, defaults to `["sigmoid"]`):
            One or several of `"sigmoid"` ([Diffusion-DPO](https://huggingface.co/papers/2311.12908)), `"ipo"`
            ([IPO](https://huggingface.co/papers/2310.12036), times \\( \beta^2 \\) so that its scale is that of the
            others), `"hinge"` ([SLiC](https://huggingface.co/papers/2305.10425)) and `"sft"` (the flow-matching loss
            of the chosen edit). Several are added with `loss_weights`.
        loss_weights (`list[float]`, *optional*):
            Weight of each loss. Defaults to 1.0 for each.
        safeguard (`bool`, *optional*, defaults to `False`):
            Scale down the rejected edit's gradient where it would raise the chosen edit's error, as
            [Diffusion-SDPO](https://huggingface.co/papers/2511.03317) does.
        sigma_sampling (`str`, *optional*, defaults to `"logit_normal"`):
            How noise levels are drawn, before they are shifted as the policy's schedule is: `"logit_normal"` or
            `"uniform"` (*field*).
        logit_mean (`float`, *optional*, defaults to `0.0`):
            Mean of the logit-normal distribution.
        logit_std (`float`, *optional*, defaults to `1.0`):
            Standard deviation of the logit-normal distribution.

        ema_decay (`float`, *optional*):
            Decay of an exponential moving average of the LoRA's weights, e.g. 0.99. The average takes the place of the
            trained weights in evaluation, in everything that is saved or pushed, and in the card's sample edits. It
            follows faster at first: with a decay of at most (1 + n) / (10 + n) after n updates.
        max_skipped_updates (`int`, *optional*, defaults to `3`):
            Number of updates in a row that may be skipped because a loss or a gradient is not finite. One more stops
            the run. Skipped updates leave weights and optimizer as they are and are counted in `skipped_updates`.
        on_save_error (`str`, *optional*, defaults to `"error"`):
            What to do if a checkpoint cannot be saved, e.g. because the disk is full: `"error"` stops, `"continue"`
            goes on with a warning. Earlier checkpoints are kept.

        > Parameters that control the sample edits of the model card

        num_sample_edits (`int`, *optional*, defaults to `4`):
            Number of cases whose edits before and after training the model card shows, beside the reference image,
            scaled down. 0 leaves images and prompts of the cases out of the card.
        num_inference_steps (`int`, *optional*):
            Number of denoising steps; also of the schedule that noise levels are shifted by. Defaults to the
            pipeline's recommended number: 40 for Qwen-Image-Edit.
        rollout_batch_size (`int`, *optional*, defaults to `4`):
            Largest number of edits that are denoised or decoded together.
        true_cfg_scale (`float`, *optional*):
            Scale of classifier-free guidance in sampling. Defaults to the pipeline's recommended value. Training has
            no unconditional pass.
        negative_prompt (`str`, *optional*):
            Prompt of the unconditional pass. Defaults to the pipeline's recommended one.
        guidance_scale (`float`, *optional*):
            Guidance that the transformer takes as an input, in training as well, which only FLUX.1-Kontext does.
            Defaults to 2.5 there (*field*).

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: Defaults to `1e-5` instead of `5e-5`.
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`.
    > - `per_device_train_batch_size`: Defaults to `1` instead of `8`.
    > - `gradient_accumulation_steps`: Defaults to `16` instead of `1`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set and there is a GPU for it or `use_cpu`, instead of `False`.
    > - `logging_steps`: Defaults to `1` instead of `500`.
    > - `save_steps`: Defaults to `20` instead of `500`, because an update takes minutes.
    > - `save_total_limit`: Defaults to `3` instead of `None`.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`.
    > - `ddp_find_unused_parameters`: Defaults to `False` instead of `None`.
    > - `ddp_timeout`: Defaults to `14400` instead of `1800`, because a process may wait for another one's judge.
    > - `logging_nan_inf_filter`: Defaults to `False` instead of `True`.
    > - `hub_private_repo`: Defaults to `True` instead of `None`, because the model card shows images of the cases.
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs"]

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning rate schedule."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Pairs per device and microbatch."})
    gradient_accumulation_steps: int = field(
        default=16, metadata={"help": "Number of microbatches to accumulate gradients over before each update."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every X update steps."})
    save_steps: float = field(default=20, metadata={"help": "Save a checkpoint every X update steps."})
    save_total_limit: int | None = field(
        default=3, metadata={"help": "Number of checkpoints that are kept: the newest, and the best one."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Not used: the trainer only reads the columns that it needs."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Passed to DistributedDataParallel. All trained parameters are used here."}
    )

    ddp_timeout: int = field(
        default=14400, metadata={"help": "Seconds that processes wait for each other, e.g. for one's judge."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace losses that are not finite in the log. They should be seen."}
    )
    hub_private_repo: bool | None = field(
        default=True, metadata={"help": "Whether Hub repositories are private. The card shows images of the cases."}
    )

    # Parameters that control the model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for DiffusionPipeline.from_pretrained, if `model` is a string."},
    )
    offload_encoders: bool = field(
        default=True, metadata={"help": "Keep the text encoder and the VAE in CPU memory while they are not used."}
    )
    offload_transformer: bool = field(
        default=False, metadata={"help": "Keep the transformer's blocks in CPU memory while they are not computed."}
    )
    num_checkpointed_blocks: int | None = field(
        default=None, metadata={"help": "Number of blocks that gradient checkpointing computes again. Default: all."}
    )

    # Parameters that control the data
    resolution: int = field(
        default=512,
        metadata={"help": "Side in pixels of the square whose area every edit has; aspect ratios are kept."},
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Whether to shuffle the training dataset."})
    on_bad_case: str = field(
        default="error",
        metadata={
            "help": "What to do with a pair that cannot be used: stop, or leave it out.",
            "choices": ["error", "skip"],
        },
    )
    latents_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for the encoded pairs. Defaults to `output_dir/_latents`."}
    )

    # Parameters that control the training
    beta: float = field(default=2000.0, metadata={"help": "Scale of the implicit rewards."})
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "One or several of 'sigmoid', 'ipo', 'hinge' and 'sft'."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each loss. Defaults to 1.0 for each."}
    )
    safeguard: bool = field(
        default=False,
        metadata={"help": "Scale down the rejected edit's gradient where it would raise the chosen edit's error."},
    )
    sigma_sampling: str = field(
        default="logit_normal",
        metadata={"help": "How noise levels are drawn.", "choices": ["logit_normal", "uniform"]},
    )
    logit_mean: float = field(default=0.0, metadata={"help": "Mean of the logit-normal distribution."})
    logit_std: float = field(default=1.0, metadata={"help": "Standard deviation of the logit-normal distribution."})

    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of a moving average of the LoRA, which is evaluated, saved and pushed."}
    )
    max_skipped_updates: int = field(
        default=3,
        metadata={"help": "Number of updates in a row that may be skipped because they are not finite."},
    )
    on_save_error: str = field(
        default="error",
        metadata={"help": "What to do if a checkpoint cannot be saved.", "choices": ["error", "continue"]},
    )

    # Parameters that control the sample edits of the model card
    num_sample_edits: int = field(
        default=4, metadata={"help": "Number of cases whose edits the model card shows. 0 leaves images out of it."}
    )
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "Number of denoising steps. Defaults to the policy's."}
    )
    rollout_batch_size: int = field(
        default=4, metadata={"help": "Largest number of edits denoised or decoded together on a device."}
    )
    true_cfg_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale in sampling. Defaults to the policy's."}
    )
    negative_prompt: str | None = field(
        default=None, metadata={"help": "Prompt of the unconditional pass. Defaults to the policy's."}
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance that the transformer takes as an input, if it does."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_hub_options(self)

        self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        unknown = sorted(set(self.loss_type) - set(LOSS_TYPES))
        if unknown or not self.loss_type:
            raise ValueError(f"loss_type={self.loss_type} must be one or several of {LOSS_TYPES}.")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} entries, but loss_type has {len(self.loss_type)}: "
                f"{self.loss_type}."
            )
        if len(set(self.loss_type)) < len(self.loss_type):
            raise ValueError(f"loss_type={self.loss_type} names a loss twice: use loss_weights instead.")
        if self.loss_weights is not None and not all(weight >= 0 for weight in self.loss_weights):
            raise ValueError(f"loss_weights={self.loss_weights} must not be negative.")
        for name, choices in (
            ("sigma_sampling", ["logit_normal", "uniform"]),
            ("on_bad_case", ["error", "skip"]),
            ("on_save_error", ["error", "continue"]),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: use one of {choices}.")
        for name in ("resolution", "rollout_batch_size", "num_inference_steps", "true_cfg_scale"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.max_skipped_updates < 0:
            raise ValueError(f"max_skipped_updates={self.max_skipped_updates} must not be negative.")
        for name in ("beta", "logit_std"):
            if not getattr(self, name) > 0:  # nor NaN
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
