from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .base_edit_config import BaseEditConfig
from .batches import smallest_steps
from .hub import check_hub_options


@dataclass(repr=False)
class OnlineEditConfig(BaseEditConfig):
    r"""
    Options that the configurations of the trainers share that sample edits and learn from their rewards,
    [`FlowGRPOEditConfig`] and [`FlowNFTEditConfig`]. For the other training arguments, see
    [`~transformers.TrainingArguments`]; the note at the end lists those with different defaults. *field*: what public
    trainers use for Qwen-Image-Edit.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`str`, `dict[str, Any]`, *optional*):
            Keyword arguments for [`~diffusers.DiffusionPipeline.from_pretrained`], used when the `model` argument of
            the trainer is a string, e.g. `{"revision": "..."}`. Weights are loaded in bfloat16 if `bf16` is set,
            unless `dtype` is given here. `quantization_config` may be a mapping, see docs/quantization.md.
        offload_encoders (`bool`, *optional*, defaults to `False`):
            Keep the text encoder and the VAE in CPU memory between uses. Saves about 17 GB with Qwen-Image-Edit.
        offload_transformer (`bool`, *optional*, defaults to `False`):
            Keep the transformer's blocks in CPU memory, and copy each to the device while the one before it is
            computed, see docs/memory.md. Needs `gradient_checkpointing`.
        num_checkpointed_blocks (`int`, *optional*):
            Number of the transformer's blocks that `gradient_checkpointing` computes again in the backward pass.
            Defaults to all. Fewer take more memory and less time.

        > Parameters that control the data

        shuffle_dataset (`bool`, *optional*, defaults to `True`):
            Whether to shuffle the training dataset, differently in each epoch.
        shuffle_buffer_size (`int`, *optional*, defaults to `1000`):
            Number of rows of a stream (an [`~datasets.IterableDataset`]) that are in memory, checked and shuffled
            together, with their images encoded. Each process holds as many, and twice as many for a short time. A
            dataset that is no stream is shuffled as a whole.
        on_bad_case (`str`, *optional*, defaults to `"error"`):
            What to do with a case that cannot be used, see [`~hp_edit_trl.cases.check_cases`]. `"error"`: a dataset
            with such cases is refused before the model is loaded, and one that shows later, e.g. an image that breaks
            when it is decoded, stops the run. `"skip"`: they are left out with a warning, the next case takes the
            place of one that shows later, and the metric `bad_cases` counts both.

        > Parameters that control sampling

        num_generations (`int`, *optional*, defaults to `16`):
            Number of edits per case to sample (G, *field*).
        num_trained_generations (`int`, *optional*):
            Number of them that are trained on, on average over the cases of a process: those with the largest absolute
            advantages ([PODS](https://huggingface.co/papers/2504.13818) selects alike). Defaults to all. With fewer,
            each process samples whole groups.
        generation_batch_size (`int`, *optional*):
            Number of edits sampled at a time over all processes. Defaults to `per_device_train_batch_size *
            num_processes * steps_per_generation * num_generations / num_trained_generations`. Must be divisible by
            `num_generations`.
        steps_per_generation (`int`, *optional*):
            Number of microbatches that the trained edits of a generation batch are split into. Defaults to
            `gradient_accumulation_steps`.
        rollout_batch_size (`int`, *optional*, defaults to `4`):
            Largest number of edits that are denoised or decoded together on a device.
        resolution (`int`, *optional*, defaults to `512`):
            Side in pixels of the square whose area every edit and every reference has; aspect ratios are kept
            (*field*).
        num_inference_steps (`int`, *optional*, defaults to `10`):
            Number of denoising steps of a rollout (*field*).
        guidance_scale (`float`, *optional*):
            Guidance that the transformer takes as an input, which only FLUX.1-Kontext does. Defaults to 2.5 there
            (*field*). What FLUX.2-klein's pipeline calls so is `true_cfg_scale` here.

        > Parameters that control evaluation

        eval_num_inference_steps (`int`, *optional*):
            Number of denoising steps in evaluation, which samples the ODE with fixed noises of each case. Defaults to
            `num_inference_steps`.
        num_generations_eval (`int`, *optional*, defaults to `1`):
            Number of edits of each case in evaluation. More make the mean of few cases less noisy.

        > Parameters that control the training

        beta (`float`, *optional*, defaults to `0.0`):
            Weight of the KL divergence to the model without the adapter. At 0.0 it is not computed (*field*).
        num_iterations (`int`, *optional*, defaults to `1`):
            Number of passes over a generation batch (\\( \mu \\)). With guidance keep it at 1.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            Divide advantages by the standard deviation of the `"group"`, as in the paper's equation 3, of the
            `"batch"`, or not at all (`"none"`).
        reward_weights (`list[float]`, *optional*):
            Weight of each reward function. Defaults to 1.0 for each.
        on_bad_reward (`str`, *optional*, defaults to `"error"`):
            What to do with a reward that is infinite, NaN or beyond ±1e18: `"error"` stops with the name of the
            function and the case, `"missing"` treats it as `None`.
        max_failed_batches (`int`, *optional*, defaults to `3`):
            Number of generation batches in a row without a single reward after which the run saves a checkpoint and
            stops, with `ConnectionError` if a judge is gone. A sample has no reward if no function gave it one, or if
            one failed: it raised an error, or HP-Scorer gave no score.
        max_missing_rewards (`float`, *optional*, defaults to `0.5`):
            Largest share of samples without a reward in the last 8 generation batches; above it the run stops in the
            same way.
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

        > Parameters that control the logging

        log_completions (`bool`, *optional*, defaults to `False`):
            Log a sample of edits at every log: as a table in the terminal, as files in `output_dir/completions`, and
            in trackio, wandb or TensorBoard if they are in `report_to`. Images are scaled down to `resolution`, and
            each reference image is stored once. They are not part of what `push_to_hub` uploads.
        num_completions_to_log (`int`, *optional*, defaults to `8`):
            Largest number of edits per log, on the first process. They are kept in memory until then.
        num_completions_to_print (`int`, *optional*):
            Number of them in the terminal's table. Defaults to all.
        log_unique_prompts (`bool`, *optional*, defaults to `False`):
            Whether to log only one edit of each prompt.
        log_completions_hub_repo (`str`, *optional*):
            Dataset repository on the Hub that the logged edits are uploaded to, every two minutes. It is created as a
            private one, unless `hub_private_repo` is `False`. Needs `log_completions`.

        > Parameters that control the sample edits of the model card

        num_sample_edits (`int`, *optional*, defaults to `4`):
            Number of cases whose edits before and after training the model card shows, beside the reference image,
            scaled down. 0 leaves images and prompts of the cases out of the card.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: Defaults to `3e-4` instead of `5e-5` (the paper's).
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`.
    > - `per_device_train_batch_size`: Defaults to `1` instead of `8`.
    > - `gradient_accumulation_steps`: Defaults to `16` instead of `1`, so that one GPU holds one group.
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
    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning rate schedule."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Edits per device and microbatch."})
    gradient_accumulation_steps: int = field(
        default=16, metadata={"help": "Number of microbatches to accumulate gradients over before each update."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every X update steps."})
    save_steps: float = field(default=20, metadata={"help": "Save a checkpoint every X update steps."})
    save_total_limit: int | None = field(
        default=3, metadata={"help": "Number of checkpoints that are kept: the newest, and the best one."}
    )
    remove_unused_columns: bool | None = field(
        default=False,
        metadata={"help": "Keep only the columns 'prompt', 'image' and 'images'. Reward functions see the others."},
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
        default=False, metadata={"help": "Keep the text encoder and the VAE in CPU memory between uses."}
    )
    offload_transformer: bool = field(
        default=False, metadata={"help": "Keep the transformer's blocks in CPU memory while they are not computed."}
    )
    num_checkpointed_blocks: int | None = field(
        default=None, metadata={"help": "Number of blocks that gradient checkpointing computes again. Default: all."}
    )

    # Parameters that control the data
    shuffle_dataset: bool = field(default=True, metadata={"help": "Whether to shuffle the training dataset."})
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Number of rows of a stream that are in memory and shuffled together."}
    )
    on_bad_case: str = field(
        default="error",
        metadata={
            "help": "What to do with a case whose image cannot be decoded: stop, or replace it by the next case.",
            "choices": ["error", "skip"],
        },
    )

    # Parameters that control sampling
    num_generations: int = field(default=16, metadata={"help": "Number of edits per case to sample (G)."})
    num_trained_generations: int | None = field(
        default=None, metadata={"help": "Number of them that are trained on, those with the largest advantages."}
    )
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Number of edits sampled at a time over all processes."}
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "Number of microbatches that a generation batch is split into. Defaults to "
            "`gradient_accumulation_steps`."
        },
    )
    rollout_batch_size: int = field(
        default=4, metadata={"help": "Largest number of edits denoised or decoded together on a device."}
    )
    resolution: int = field(
        default=512,
        metadata={"help": "Side in pixels of the square whose area every edit has; aspect ratios are kept."},
    )
    num_inference_steps: int = field(default=10, metadata={"help": "Number of denoising steps of a rollout."})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance that the transformer takes as an input, if it does."}
    )

    # Parameters that control evaluation
    eval_num_inference_steps: int | None = field(
        default=None,
        metadata={"help": "Number of denoising steps in evaluation. Defaults to `num_inference_steps`."},
    )
    num_generations_eval: int = field(default=1, metadata={"help": "Number of edits of each case in evaluation."})

    # Parameters that control the training
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL divergence to the model without adapter."})
    num_iterations: int = field(default=1, metadata={"help": "Number of passes over a generation batch."})
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "Divide advantages by the standard deviation of the group, of the batch, or not at all.",
            "choices": ["group", "batch", "none"],
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function. Defaults to 1.0 for each."}
    )
    on_bad_reward: str = field(
        default="error",
        metadata={"help": "What to do with a reward that is infinite or NaN.", "choices": ["error", "missing"]},
    )

    max_failed_batches: int = field(
        default=3, metadata={"help": "Generation batches in a row without any reward after which the run stops."}
    )
    max_missing_rewards: float = field(
        default=0.5,
        metadata={"help": "Largest share of missing rewards in the last 8 generation batches; above it it stops."},
    )
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

    # Parameters that control the logging
    log_completions: bool = field(default=False, metadata={"help": "Show a table of sample edits at every log."})
    num_completions_to_log: int = field(default=8, metadata={"help": "Largest number of edits per log."})
    num_completions_to_print: int | None = field(
        default=None, metadata={"help": "Number of them in the terminal's table. Defaults to all."}
    )
    log_unique_prompts: bool = field(default=False, metadata={"help": "Whether to log only one edit of each prompt."})
    log_completions_hub_repo: str | None = field(
        default=None,
        metadata={"help": "Dataset repository on the Hub, private by default, that the edits are uploaded to."},
    )

    # Parameters that control the sample edits of the model card
    num_sample_edits: int = field(
        default=4, metadata={"help": "Number of cases whose edits the model card shows. 0 leaves images out of it."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_hub_options(self)

        for name, choices in (
            ("scale_rewards", ["group", "batch", "none"]),
            ("on_bad_case", ["error", "skip"]),
            ("on_bad_reward", ["error", "missing"]),
            ("on_save_error", ["error", "continue"]),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: use one of {choices}.")
        for name in (
            "rollout_batch_size", "resolution", "num_inference_steps", "num_iterations", "num_completions_to_log",
            "eval_num_inference_steps", "num_generations_eval", "shuffle_buffer_size",
        ):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.beta < 0:
            raise ValueError(f"beta={self.beta} must not be negative.")
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations} must be at least 2: an advantage compares a sample with the "
                "others of its group."
            )

        sampled, trained = self.num_generations, self.num_trained_generations
        trained = sampled if trained is None else trained
        if not 1 <= trained <= sampled:
            raise ValueError(f"num_trained_generations={trained} must be between 1 and num_generations={sampled}.")
        per_step = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError("generation_batch_size and steps_per_generation cannot both be set.")
        if self.generation_batch_size is not None:
            if self.generation_batch_size * trained % (sampled * per_step):
                part = f"{trained}/{sampled} of " if trained < sampled else ""
                raise ValueError(
                    f"{part}generation_batch_size={self.generation_batch_size} must be divisible by "
                    f"per_device_train_batch_size * num_processes = {per_step}."
                )
            self.steps_per_generation = self.generation_batch_size * trained // (sampled * per_step)
        else:
            self.steps_per_generation = self.steps_per_generation or self.gradient_accumulation_steps
            self.generation_batch_size = per_step * self.steps_per_generation * sampled // trained
        # The edits to train on are chosen by each process among its own, so that all have the same number.
        whole = sampled if trained == sampled else sampled * self.world_size
        if (
            self.generation_batch_size % whole
            or self.generation_batch_size * trained != per_step * self.steps_per_generation * sampled
        ):
            steps = self.steps_per_generation
            unit = smallest_steps(self.per_device_train_batch_size, self.world_size, sampled, trained)
            raise ValueError(
                f"The generation batch of {self.generation_batch_size} edits (per_device_train_batch_size="
                f"{self.per_device_train_batch_size} * {self.world_size} processes * steps_per_generation="
                f"{self.steps_per_generation}"
                + (f" * {sampled} / {trained} of which are trained on" if trained < sampled else "")
                + f") must be divisible by num_generations={sampled}: it holds whole groups"
                + (" on each process" if trained < sampled else "")
                + f". Set gradient_accumulation_steps to a multiple of {unit}, e.g. {-(-steps // unit) * unit}, and "
                "leave generation_batch_size and steps_per_generation out."
            )
        if self.max_failed_batches < 1 or not 0 <= self.max_missing_rewards <= 1:
            raise ValueError(
                f"max_failed_batches={self.max_failed_batches} must be at least 1, and max_missing_rewards="
                f"{self.max_missing_rewards} between 0 and 1."
            )
        if self.max_skipped_updates < 0:
            raise ValueError(f"max_skipped_updates={self.max_skipped_updates} must not be negative.")
        # Trainer's default is the loss, for `load_best_model_at_end` and some schedulers
        if self.metric_for_best_model in ("loss", "eval_loss", "eval_", ""):
            raise ValueError(
                "load_best_model_at_end=True, and schedulers that go by evaluations, need metric_for_best_model: an "
                "evaluation has no loss. Use e.g. 'reward', with greater_is_better=True."
            )
        if self.log_completions_hub_repo is not None and not self.log_completions:
            raise ValueError(
                f"log_completions_hub_repo={self.log_completions_hub_repo!r} needs log_completions=True: without it "
                "there are no edits to upload."
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size would break groups apart: lower per_device_train_batch_size instead."
            )
