"""What all trainers share, apart from the algorithms: loading, reading cases, sampling edits, saving, sharing."""

import contextlib
import copy
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, patch_environment
from datasets import Dataset
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import GreedyLR, PrinterCallback, TrainerState
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput, rotate_checkpoints
from transformers.utils import PushInProgress
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import RepeatSampler, use_adapter

from ..cases import BadCaseError, case_images, check_references, decoded, leave_out, without_decoding
from ..editors import PolicyEditor
from ..policies import EditConditions, EditPolicy, check_prompt_lengths, policy_class
from ..utils.distributed import OutOfStepError, in_step, lost_processes
from ..utils.dtypes import parse_dtype
from ..utils.files import read_json
from ..utils.hub import create_repository, hub_options
from ..utils.images import UnreadableImageError
from ..utils.loading import load_shared_pipeline
from ..utils.quantization import check_quantization, describe_quantization, quantization_config
from ..utils.revisions import dataset_revision
from ..utils.secrets import redact_error, redacted
from ..utils.seeding import seeded_generator
from .adapter_copy import AdapterCopy, AfterUpdates, average_decay
from .checkpoints import (
    COPIES,
    MANIFEST,
    UNFINISHED,
    WEIGHTS,
    checkpoint_to_resume,
    clean_up,
    files_below,
    find_fault,
    move_into_place,
    restoring,
    save_errors,
    write_manifest,
)
from .hub import CARD_PICTURES, MODEL_FILES, card_pictures, copy_published, upload, write_published_state
from .lora import check_same_lora, save_lora
from .model_card import remove_before_after, save_before_after, tracker_links, write_model_card
from .plan import TrainingPlan, plan_training
from .progress import ProgressLines
from .recomputation import prepare_checkpointing
from .sharding import PassCount, check_fsdp, check_same_weights, equal_passes, most_of_all, shard, wrap
from .streamed_cases import StreamedCases
from .streaming import BlockStream


logger = get_logger(__name__)

SAVED = "_saved.json"  # written when the output folder is complete: step, weights, and where they were pushed to


def find_policy(model: str | DiffusionPipeline, args: Any) -> type[EditPolicy]:
    """
    Finds the policy of a pipeline. Only `model_index.json` is read, no weights, after a check that this machine can
    quantize the model as `args` say.

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The editor: a Hub id, a local folder, or a loaded pipeline.
        args ([`FlowGRPOEditConfig`], [`FlowNFTEditConfig`] or [`DPOEditConfig`]):
            The trainer's configuration: `model_init_kwargs` and the device are read.
    """
    init_kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})
    if isinstance(model, str):
        check_quantization(init_kwargs.get("quantization_config"), args.device)
    return policy_class(model, **hub_options(init_kwargs))


def warn_of_resolution(policy_type: type[EditPolicy], model: str | DiffusionPipeline, args: Any) -> None:
    """
    Warns if `resolution` is far from that of a pipeline's own edits, as its `model_index.json` or its policy has it:
    such edits are poor, and may take minutes where a smaller one takes seconds.

    Args:
        policy_type (`type[EditPolicy]`):
            The policy's class.
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The editor.
        args ([`FlowGRPOEditConfig`], [`FlowNFTEditConfig`] or [`DPOEditConfig`]):
            The trainer's configuration: `resolution` and `model_init_kwargs` are read.
    """
    options = hub_options(args.model_init_kwargs or {})
    config = DiffusionPipeline.load_config(model, **options) if isinstance(model, str) else model.config
    native = config.get("_native_resolution", policy_type.native_resolution)
    if not native / 4 < args.resolution < native * 4:
        logger.warning(
            f"resolution={args.resolution} is far from the {native} pixels of this pipeline's own edits, which will "
            f"be poor{' and slow' if args.resolution > native else ''}. Set resolution={native}, or one nearer to it."
        )


def load_policy(policy_type: type[EditPolicy], model: str | DiffusionPipeline, args: Any) -> tuple[EditPolicy, str]:
    """
    Loads the policy of a pipeline.

    Args:
        policy_type (`type[EditPolicy]`):
            The policy's class, see [`find_policy`].
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The editor: a Hub id, a local folder, or a loaded pipeline.
        args ([`FlowGRPOEditConfig`], [`FlowNFTEditConfig`] or [`DPOEditConfig`]):
            The trainer's configuration: `model_init_kwargs`, `bf16` and `offload_encoders` are read.

    Returns:
        `tuple[EditPolicy, str]`: the policy, and the name of its base model.
    """
    warn_of_resolution(policy_type, model, args)
    if not isinstance(model, str):
        base_model = str(model.config.get("_name_or_path") or "base-model")  # it may have been loaded from a Path
        return policy_type(model, args.offload_encoders), redacted(base_model)
    options = loading_options(args)
    if (config := options.get("quantization_config")) is not None:
        options["quantization_config"] = quantization_config(
            config, policy_type.quantized_components, options["dtype"]
        )
    pipeline = load_shared_pipeline(model, options)
    return policy_type(pipeline, args.offload_encoders), redacted(model)


def loading_options(args: Any) -> dict[str, Any]:
    """
    The keyword arguments that a pipeline is loaded with.

    Args:
        args ([`FlowGRPOEditConfig`], [`FlowNFTEditConfig`] or [`DPOEditConfig`]):
            The trainer's configuration: `model_init_kwargs` and `bf16` are read.
    """
    init_kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})
    dtype = init_kwargs.pop("torch_dtype", None) or init_kwargs.get("dtype")
    if dtype is None:
        dtype = torch.bfloat16 if args.bf16 else torch.float32
    init_kwargs["dtype"] = parse_dtype(dtype)  # a name, if it comes from YAML or the command line
    return init_kwargs


class EpochRepeatSampler(RepeatSampler):
    """
    [`~trl.trainer.utils.RepeatSampler`] whose order depends on seed and epoch alone, so that a resumed run has the
    order of its epoch. TRL's draws the orders of all epochs from one generator, which a resumed run starts anew.

    Args:
        *args, **kwargs:
            Those of [`~trl.trainer.utils.RepeatSampler`].
        epoch (`Callable[[], int]`):
            Returns the present epoch, counted from 0. Called when an iteration starts.
    """

    def __init__(self, *args: Any, epoch: Callable[[], int], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(seeded_generator(self.seed, "epoch", self.epoch()).initial_seed())
            return super().__iter__()
        # Without a list of all rows, which a stream may have without end
        starts = range(0, self.num_samples - self.batch_size + 1, self.batch_size)
        batches = (range(start, start + self.batch_size) for start in starts for _ in range(self.repeat_count))
        return (row for batch in batches for row in batch for _ in range(self.mini_repeat_count))


class BaseEditTrainer(_BaseTrainer):
    # A trainer sets these before anything here is called.
    policy: EditPolicy
    base_model: str
    true_cfg_scale: float
    negative_prompt: str
    sample_num_inference_steps: int
    _bad_cases: set[tuple[int, str]]
    push_in_progress: PushInProgress | None
    _left_out: dict[str, int]  # number of bad cases that were left out of a dataset, by its fingerprint

    # State of the present update, see `_drop_bad_update`, and counts of skipped ones
    _update_is_finite: torch.Tensor | bool = True
    _update_learns = False
    _update_cases: tuple[Any, ...] = ()
    _skipped_updates = 0
    _skipped_in_a_row = 0

    # Copies of the adapter that follow it: "ema" is evaluated, saved and pushed in its place
    _copies: dict[str, AdapterCopy] = {}

    # While a checkpoint is being written; the best model before the last evaluation; a run that is saved already
    _saving = False
    _best_before: tuple[float | None, int | None] = (None, None)
    _is_saved = False

    def __init__(self, model: PeftModel, args: Any, **kwargs: Any):
        prepare_checkpointing(model, args.num_checkpointed_blocks)
        # Before anything moves the model to the device, where it may not fit whole
        self._is_sharded = check_fsdp() and PartialState().num_processes > 1
        self._pass_count = PassCount()
        self._keeps_step = False  # whether passes are made equal already
        if PartialState().num_processes > 1 and (self._is_sharded or args.offload_transformer):
            check_same_weights(model)  # which DDP would make equal, if it took care of them
        if self._is_sharded:
            shard(model, args.device)
            self.policy.has_prefix = False  # the processes would make different numbers of passes with gradients
        self._stream = BlockStream(model, args.device) if args.offload_transformer else None
        if kwargs.get("eval_dataset") is not None and args.eval_strategy == "no" and not args.eval_on_start:
            logger.warning(
                "eval_dataset is used by trainer.evaluate() and for the model card's pictures only, because "
                "eval_strategy='no': set eval_strategy='steps' and eval_steps=... to evaluate during training."
            )
        super().__init__(model=model, args=args, **kwargs)
        self._copies = {"ema": AdapterCopy(model)} if args.ema_decay is not None else {}
        self.add_callback(AfterUpdates(self._follow_weights))
        for callback in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):  # whichever Trainer has chosen
            self.remove_callback(callback)
        self.add_callback(ProgressLines)

    def _follow_weights(self) -> None:
        """Called after each update, before it is counted: the copies of the adapter follow."""
        if "ema" in self._copies:
            self._copies["ema"].update(average_decay(self.args.ema_decay, self.state.global_step + 1))

    def _published(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model has the weights that are evaluated, saved and pushed."""
        return self._copies["ema"].applied() if "ema" in self._copies else contextlib.nullcontext()

    # With FSDP accelerate would shard the LoRA as well, and Trainer would write checkpoints of another form.
    def create_accelerator_and_postprocess(self) -> None:
        with patch_environment(ACCELERATE_USE_FSDP="false"):
            super().create_accelerator_and_postprocess()
        self.accelerator.device_placement = self._stream is None
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(
                "An Accelerator was made before the trainer, for FSDP: let the trainer make the first one."
            )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self._stream is not None:
            self._stream.place(model, device)
        else:
            super()._move_model_to_device(model, device)
        for adapter in self._copies.values():
            adapter.place()

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if not (self._is_sharded and training and model is self.model):
            return super()._wrap_model(model, training, dataloader)
        # Accelerate only adds autocast.
        model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return wrap(model, bool(self.args.ddp_find_unused_parameters))

    @contextlib.contextmanager
    def _passes_in_step(self) -> Iterator[None]:
        """As `in_step`, for work with passes without gradients: with a sharded model, their number becomes equal."""
        if self._keeps_step:  # already
            yield
            return
        with in_step(self.accelerator):
            if not self._is_sharded:
                yield
                return
            self._keeps_step = True
            try:
                with equal_passes(self.model, self.accelerator.device, self._pass_count):
                    yield
            finally:
                self._keeps_step = False

    def _missing_passes(self, count: int) -> int:
        """How many passes with gradients fewer than another process this one makes, if they have to be equal."""
        if not self._is_sharded:
            return 0
        most = most_of_all(count, self.accelerator.device)
        self._pass_count.made += most
        self._pass_count.filled += most - count
        return most - count

    def _log_filled_passes(self, logs: dict[str, float]) -> None:
        """Adds the share of passes that processes have made only because others did."""
        if self._is_sharded:
            counts = gather_object([self._pass_count])
            logs["frac_filled_passes"] = sum(c.filled for c in counts) / max(sum(c.made for c in counts), 1)
            self._pass_count = PassCount()

    def _send_telemetry(self):
        # TRL's telemetry would count this trainer as a TRL trainer.
        pass

    @property
    def num_train_cases(self) -> int:
        """Number of cases that are trained on; of a stream, that were."""
        return (
            self.train_dataset.num_seen if isinstance(self.train_dataset, StreamedCases) else len(self.train_dataset)
        )

    def _card_settings(self) -> dict[str, str]:
        """Settings that the model card lists."""
        raise NotImplementedError

    def _card_curves(self) -> list[tuple[str, str, str]]:
        """Name in the log, label and color of the curves that the model card shows."""
        raise NotImplementedError

    def _leave_out(self, dataset: Dataset, bad: dict[int, str]) -> Dataset:
        """The dataset without bad cases, which are counted, and with its images encoded."""
        usable = without_decoding(leave_out(dataset, bad))
        self._left_out[usable._fingerprint] = self._left_out.get(dataset._fingerprint, 0) + len(bad)
        return usable

    def _checked(self, dataset: Dataset, check: Callable[..., dict[int, str]], name: str = "eval_dataset") -> Dataset:
        """The usable cases of a dataset for evaluation. One that was checked before is taken as it is."""
        if dataset._fingerprint not in self._left_out:
            on_bad_case = self.args.on_bad_case
            dataset = self._leave_out(dataset, check(dataset, name, on_bad_case))
            limit = self.policy.max_references
            dataset = self._leave_out(dataset, check_references(dataset, name, limit, on_bad_case))
            dataset = self._leave_out(dataset, check_prompt_lengths(self.policy, dataset, name, on_bad_case))
        return dataset

    def _read_case(self, dataset: Dataset, index: int) -> tuple[dict[str, Any], list[Image.Image]]:
        """Row and images of a case. Raises `BadCaseError` if an image cannot be decoded."""
        row = dict(dataset[index])
        row.setdefault("id", index)
        try:
            images = case_images(row, row["id"])
        except UnreadableImageError as error:
            raise BadCaseError(str(error), str(row["id"])) from error
        row = decoded(row, dataset.features, row["id"])
        row |= {"images": images} if row.get("images") is not None else {"image": images[0]}
        return row, images

    def _encode_case(self, dataset: Dataset, index: int) -> tuple[dict[str, Any], list[Image.Image], EditConditions]:
        """Row, images and encoding of a case; of the next one that can be used, if bad cases are to be skipped."""
        negative_prompt = self.negative_prompt if self.true_cfg_scale > 1 else None
        for offset in range(len(dataset)):
            try:
                row, images = self._read_case(dataset, (index + offset) % len(dataset))
                conditions = self.policy.encode_case(
                    row["id"], images, row["prompt"], negative_prompt, self.args.resolution
                )
            except BadCaseError as error:
                if self.args.on_bad_case == "error":
                    raise BadCaseError(
                        f"{str(error).rstrip('.')}. Set on_bad_case='skip' to leave it out. `hp-edit check-dataset` "
                        "decodes all images of a dataset, and names those that are broken.",
                        error.case_id,
                    ) from error
                logger.warning(f"{error} The next case takes its place.")
                self._bad_cases.add((self.state.global_step, str(error.case_id)))
                continue
            return row, images, conditions
        raise BadCaseError("No case of the dataset can be used.")

    def _without_casts(self) -> contextlib.AbstractContextManager[None]:
        """
        For passes under autocast, which casts the inputs of a LoRA itself: PEFT's casts of them to float32 change no
        bit and take time. To be entered around the backward pass too, which may recompute the forward pass.
        """
        return disable_input_dtype_casting(self.model, active=self.accelerator.mixed_precision != "no")

    def sample_edits(
        self, cases: list[tuple[dict[str, Any], list[Image.Image]]], adapter: bool = True, num_edits: int = 1
    ) -> list[Image.Image]:
        """
        Samples edits of each case along the ODE, from noises that belong to the case. With a sharded transformer
        (FSDP2) all processes must call it, with as many cases as each likes.

        Args:
            cases (`list[tuple[dict, list[PIL.Image.Image]]]`):
                Row and images of each case; a row has `prompt` and `id`.
            adapter (`bool`, *optional*, defaults to `True`):
                Whether to sample from the trained policy or from the model without its adapter.
            num_edits (`int`, *optional*, defaults to `1`):
                Number of edits of each case. They follow each other in the result.
        """
        args = self.args
        self.model.eval()
        editor = PolicyEditor(
            self.policy,
            self.base_model,
            args.resolution,
            self.sample_num_inference_steps,
            self.true_cfg_scale,
            self.negative_prompt,
            batch_size=args.rollout_batch_size,
            model=self.model,
            autocast=self.accelerator.autocast,
        )
        repeated = [(*case, number) for case in cases for number in range(num_edits)]
        ids = [str(row["id"]) for row, _, _ in repeated]
        # The first edit of a case is the same, however many there are.
        names = [(str(row["id"]), number) if number else (str(row["id"]),) for row, _, number in repeated]
        seeds = [seeded_generator(args.seed, "eval", *name).initial_seed() for name in names]
        together = self._passes_in_step() if self._is_sharded else contextlib.nullcontext()
        weights = self._published() if adapter else use_adapter(self.model, None)
        with together, self._without_casts(), weights:
            return editor([images for _, images, _ in repeated], [row["prompt"] for row, _, _ in repeated], ids, seeds)

    def plan(self, **options: Any) -> TrainingPlan:
        """
        Plans the training of this model with these settings: memory, passes, time and cost, by a dry run that needs no
        GPU. The trainer is left as it is.

        Args:
            **options:
                Those of [`~hp_edit_trl.trainer.plan.plan_training`]: `gpu`, `gpu_memory`, `utilization`,
                `price_per_gpu_hour`, `num_references`, `prompt_tokens`, ...

        Raises:
            `ValueError`: If an option is not valid, or the model is quantized or sharded.
        """
        if self._is_sharded:
            raise ValueError("A sharded model cannot be planned: use `hp-edit plan`, before the launch.")
        peft_config = copy.copy(self.accelerator.unwrap_model(self.model).peft_config["default"])
        if peft_config.exclude_modules == self.policy.lora_exclude_modules:
            peft_config.exclude_modules = None  # it names the last block, which a dry run has elsewhere
        options = {"num_cases": self.num_train_cases or None, **options}
        return plan_training(type(self), self.policy.pipeline, self.args, {}, peft_config, **options)

    def _drop_bad_update(self, loss: torch.Tensor, case_ids: list[Any], learns: bool = True) -> None:
        """
        Called after the backward pass of every microbatch. Before the optimizer would move, drops the gradients of an
        update that has a loss or a gradient that is not finite on any process, or nothing to learn from on all of
        them: an optimizer leaves parameters without a gradient as they are, momentum included.

        Args:
            loss (`torch.Tensor`):
                Loss of the microbatch, a scalar.
            case_ids (`list`):
                Its cases, for the warning.
            learns (`bool`, *optional*, defaults to `True`):
                Whether the microbatch has a sample that can be learned from.

        Raises:
            `RuntimeError`: If more than `max_skipped_updates` updates in a row were not finite.
        """
        # A tensor until the update: nothing waits for the device before
        finite = loss.isfinite().all() & self._update_is_finite
        self._update_is_finite = finite
        self._update_learns |= learns
        self._update_cases += tuple(case_ids)
        if not self.accelerator.sync_gradients:
            return
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        # With float16 the gradient scaler has its own way with infinite gradients.
        if self.accelerator.scaler is None and parameters:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            finite = finite & norm.isfinite().to(finite.device)
        flags = torch.stack([~finite, torch.full_like(finite, self._update_learns)])
        broken, learns = self.accelerator.reduce(flags.float()).bool().tolist()
        if (broken or not learns) and self.accelerator.scaler is None:
            for parameter in parameters:
                parameter.grad = None
        if broken:
            self._skipped_updates += 1
            self._skipped_in_a_row += 1
            cases = ", ".join(dict.fromkeys(map(str, self._update_cases)))
            logger.warning(
                f"Update {self.state.global_step + 1} was skipped: its loss or gradient is not finite. Its cases on "
                f"this process: {cases}.",
                main_process_only=False,
            )
            if self._skipped_in_a_row > self.args.max_skipped_updates:
                raise RuntimeError(
                    f"{self._skipped_in_a_row} updates in a row were not finite; the last one had the cases {cases}. "
                    f"Lower learning_rate={self.args.learning_rate}, look at these cases, and resume from the last "
                    f"checkpoint in {self.args.output_dir}, which is not affected."
                )
        elif learns:
            self._skipped_in_a_row = 0
        self._update_is_finite, self._update_learns, self._update_cases = True, False, ()

    def _metric_for_best_model(self, metrics: dict[str, float], use: str) -> float | None:
        """The metric that decides, with a warning if an evaluation has none, e.g. because nothing was scored."""
        name = str(self.args.metric_for_best_model)
        name = name if name.startswith("eval_") else f"eval_{name}"
        if math.isfinite(metrics.get(name, math.nan)):
            return metrics[name]
        logger.warning(
            f"Step {self.state.global_step} is not a candidate for {use}: its evaluation has no {name}. It has: "
            f"{', '.join(metrics)}."
        )
        return None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        wanted = self.args.metric_for_best_model is not None
        if wanted and self._metric_for_best_model(metrics, "the best model") is None:
            return False
        self._best_before = self.state.best_metric, self.state.best_global_step
        return super()._determine_best_metric(metrics, trial)

    # Trainer would stop at an evaluation without the metric that its scheduler goes by.
    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=True)
        if isinstance(self.lr_scheduler, ReduceLROnPlateau | GreedyLR) and not skip_scheduler:
            value = self._metric_for_best_model(metrics, "the scheduler")
            if value is not None:
                self.lr_scheduler.step(value)
        return metrics

    def _resume_files(self) -> list[str]:
        """Names of the files that an exact resume needs besides the weights, of all processes."""
        world = self.args.world_size
        states = [f"rng_state_{process}.pth" for process in range(world)] if world > 1 else ["rng_state.pth"]
        scaler = ["scaler.pt"] if self.accelerator.scaler is not None else []
        copies = [COPIES] if self._copies else []
        return [OPTIMIZER_NAME, SCHEDULER_NAME, *scaler, *copies, *states]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Trains, or resumes.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint; or `True` for the newest whole one of `output_dir`, and for a new start where there is
                none. A run that is finished already is not trained further.
            *args, **kwargs:
                Passed to [`~transformers.Trainer.train`].

        Raises:
            `ValueError`: If the checkpoint is not whole, or holds another LoRA or the state of another optimizer.
        """
        checkpoint, skipped = None, None
        with in_step(self.accelerator):
            if self.args.should_save:
                clean_up(self.args.output_dir)
            if self.accelerator.is_main_process:
                checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir, self._resume_files())
                if checkpoint is not None:
                    check_same_lora(self.accelerator.unwrap_model(self.model), checkpoint)
                    skipped = (read_json(Path(checkpoint, MANIFEST)) or {}).get("skipped_updates")
        checkpoint, skipped = broadcast_object_list([checkpoint, skipped])
        self._skipped_updates, self._skipped_in_a_row = skipped or (0, 0)
        self._is_saved = False
        if checkpoint is not None:
            state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
            *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
            # save_total_limit=1 with load_best_model_at_end leaves only the best checkpoint of a finished run.
            if max(state.global_step, self._saved_run(checkpoint).get("step", 0)) >= max_steps:
                return self._restore_finished(checkpoint, state)
        try:
            with lost_processes():
                return super().train(checkpoint, *args, **kwargs)
        except KeyboardInterrupt as error:
            error.add_note(
                f"Stopped after update {self.state.global_step}. `trainer.train(resume_from_checkpoint=True)` goes on "
                f"from the last checkpoint in {self.args.output_dir}."
            )
            raise

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with in_step(self.accelerator), restoring(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and not self.optimizer.param_groups[0].keys() >= self.optimizer.defaults.keys():
                raise ValueError("it is of another kind of optimizer")
            if checkpoint is not None:
                self._load_copies(os.path.join(checkpoint, COPIES))

    def _unpublished(self) -> dict[str, dict[str, torch.Tensor]]:
        """The weights of the adapter that a checkpoint holds beside those that are published."""
        weights = {name: adapter.weights for name, adapter in self._copies.items() if name != "ema"}
        return weights | ({"trained": self._copies["ema"].trained} if "ema" in self._copies else {})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._copies and self.args.should_save:
            torch.save(self._unpublished(), os.path.join(output_dir, COPIES))

    def _load_copies(self, file: str) -> None:
        if not os.path.isfile(file):  # `train` has said so, if there is one to load
            return
        state, weights = torch.load(file, map_location="cpu", weights_only=True), self._unpublished()
        shapes, expected = (
            {(kind, name): w.shape for kind, part in parts.items() for name, w in part.items()}
            for parts in (state, weights)
        )
        if shapes != expected:
            raise ValueError(f"it has other copies of the adapter: {sorted(state)} and not {sorted(weights)}")
        for kind, part in weights.items():
            for name, weight in part.items():
                weight.copy_(state[kind][name])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for adapter in self._copies.values():
            adapter.reset()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with in_step(self.accelerator), restoring(checkpoint):
            super()._load_rng_state(checkpoint)

    # Trainer would train one update more, log, and start trackers.
    def _restore_finished(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        logger.warning(f"{checkpoint} is at step {state.global_step}, where the run ends: nothing is left to train.")
        self._load_from_checkpoint(checkpoint)
        self.state = state
        state.is_local_process_zero, state.is_world_process_zero = (
            self.is_local_process_zero(),
            self.is_world_process_zero(),
        )
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # Beside this one, also if the folder was moved
            checkpoint = os.path.join(os.path.dirname(checkpoint), os.path.basename(state.best_model_checkpoint))
            state.best_model_checkpoint = checkpoint
            self._load_best_model()
        saved = self._saved_run(checkpoint)
        self._is_saved = bool(saved) and (not self.args.push_to_hub or saved.get("pushed_to") == self.hub_model_id)
        return TrainOutput(state.global_step, math.nan, {})

    def _saved_run(self, checkpoint: str) -> dict[str, Any]:
        """What `save_model` noted, if the output folder holds the weights of this checkpoint."""
        noted: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            folder, listed = Path(self.args.output_dir), read_json(Path(checkpoint, MANIFEST)) or {"files": {}}
            if find_fault(folder, SAVED, [WEIGHTS]) is None:
                noted = read_json(folder / SAVED) or {}
                same = noted["files"][WEIGHTS] == listed["files"].get(WEIGHTS)
                noted = noted if same and isinstance(noted.get("step"), int) else {}
        (noted,) = broadcast_object_list([noted])
        return noted

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        with in_step(self.accelerator):
            fault = find_fault(best) if self.accelerator.is_main_process else None
            if fault is not None:
                raise ValueError(
                    f"{best}, the best checkpoint, cannot be loaded: {fault}. The last checkpoint in "
                    f"{self.args.output_dir} holds the end of the run: resume from it with "
                    "load_best_model_at_end=False."
                )
        super()._load_best_model()
        for adapter in self._copies.values():
            adapter.reset()

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saving else folder

    # Trainer writes into the folder `_unfinished`. What it does at the end of its method is done here when the
    # checkpoint is whole: finding the best one, the push, and the deletion of older ones.
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir, name = self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished, place = Path(run_dir, UNFINISHED, name), os.path.join(run_dir, name)
        best_step, best_checkpoint = self.state.best_global_step, self.state.best_model_checkpoint
        try:
            with in_step(self.accelerator), save_errors(place):
                if self.args.should_save and unfinished.parent.exists():
                    shutil.rmtree(unfinished.parent)
            with in_step(self.accelerator), save_errors(place):
                # Without a best step Trainer has no barrier there, at which a process that fails would be missed.
                self._saving, self.state.best_global_step = True, None
                try:
                    super()._save_checkpoint(model, trial)
                finally:
                    self._saving, self.state.best_global_step = False, best_step
            names = files_below(unfinished) if unfinished.exists() else []
            if not self.args.save_on_each_node:
                names = sorted(set().union(*gather_object([names])))
            best = place if best_step == self.state.global_step else f"{run_dir}/{PREFIX_CHECKPOINT_DIR}-{best_step}"
            if best == place or os.path.isdir(best):
                self.state.best_model_checkpoint = best
            with in_step(self.accelerator), save_errors(place):
                if self.args.should_save:
                    self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
                    skipped = (self._skipped_updates, self._skipped_in_a_row)
                    write_manifest(unfinished, names, skipped_updates=skipped)
                    move_into_place(unfinished, place)
        except OSError as error:
            self.state.best_model_checkpoint = best_checkpoint
            if best_step == self.state.global_step:
                self.state.best_metric, self.state.best_global_step = self._best_before
            if self.args.should_save:
                shutil.rmtree(unfinished.parent, ignore_errors=True)
            if self.args.on_save_error == "error":
                raise
            logger.warning(f"{error} The run goes on without this checkpoint (on_save_error='continue').")
            return
        if self.args.push_to_hub:
            self._push_from_checkpoint(place)
        if self.args.should_save:
            rotate_checkpoints(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

    # Every folder that is saved can be resumed from (PEFT's files) and loaded with `pipeline.load_lora_weights`.
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self._check_finite()
        with self._published():
            self._check_finite()
            if self.args.should_save:
                folder = output_dir or self.args.output_dir
                os.makedirs(folder, exist_ok=True)
                # Not `super()._save`: it pickles the arguments, tokens included. Nothing reads them in a resumed run.
                self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
                save_lora(self.policy, self.accelerator.unwrap_model(self.model), folder)
                self._write_card(Path(folder))  # in place of PEFT's

    def _check_finite(self) -> None:
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                raise ValueError(
                    f"{name} has values that are not finite at step {self.state.global_step}: the LoRA is not saved. "
                    f"Resume from an earlier checkpoint in {self.args.output_dir} with a lower learning_rate."
                )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saving:  # it is not whole yet
            return
        # Not `super()._push_from_checkpoint`, which uploads all files of the output folder.
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self._finish_current_push()  # it reads the files that are written now
        files = copy_published(Path(checkpoint_folder), Path(args.output_dir))
        message = f"Training in progress, step {self.state.global_step}"
        job = upload(args.output_dir, args, self.hub_model_id, files, message, run_as_future=True)
        self.push_in_progress = PushInProgress([job])

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if not self.is_world_process_zero():
            return
        args = self.args
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        private = private if private is not None else args.hub_private_repo
        self.hub_model_id = create_repository(name, "model", private=private, token=token or args.hub_token)
        self.push_in_progress = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call or output_dir not in (None, self.args.output_dir):
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(self.args.output_dir)
        if self._is_saved:
            logger.warning(f"{folder} holds the finished run already: it is left as it is.")
            return
        with save_errors(folder):
            if self.is_world_process_zero():
                (folder / SAVED).unlink(missing_ok=True)
            super().save_model(output_dir, _internal_call)
            # The weights first. A push, which a save may end with, has made the pictures and the card itself.
            if not self.args.push_to_hub:
                self.save_sample_edits()
                self.create_model_card()
            if self.is_world_process_zero():
                names = (WEIGHTS, "adapter_config.json", LORA_WEIGHT_NAME_SAFE)
                pushed_to = self.hub_model_id if self.args.push_to_hub else None
                write_manifest(folder, names, SAVED, step=self.state.global_step, pushed_to=pushed_to)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        Uploads the LoRA, the adapter's configuration, the model card with its curve and pictures, and the trainer's
        state to the Hub. No other file of the output folder is uploaded.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to return only when the upload has finished.
            token (`str`, *optional*):
                Token with write permission. Defaults to `args.hub_token`.
            revision (`str`, *optional*):
                Branch to commit to. Defaults to `args.hub_revision`.
            private (`bool`, *optional*):
                Whether the repository must be private if it does not exist yet. Defaults to `args.hub_private_repo`.
            **kwargs:
                Passed to [`create_model_card`].

        Returns:
            The commit, or a `Future` of it without `blocking`; `None` on other processes than the first.

        Raises:
            `ValueError`: If the repository must be private, but exists and is public.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        self.save_sample_edits()
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        self.save_state()
        folder = Path(args.output_dir)
        write_published_state(folder / "trainer_state.json", folder)
        options: dict[str, Any] = {"token": token} if token is not None else {}
        options |= {"revision": revision} if revision is not None else {}
        # Pictures of an earlier commit that the card does not show any more are deleted.
        options |= {"delete_patterns": list(CARD_PICTURES), "run_as_future": not blocking}
        files = [*MODEL_FILES, *(card_pictures(folder) if args.num_sample_edits else ())]
        return upload(args.output_dir, args, self.hub_model_id, files, commit_message, **options)

    def save_sample_edits(self, num_cases: int | None = None) -> None:
        """
        Saves edits before and after training, of the first cases of the evaluation set (or else of the training set),
        to `output_dir/images`. They illustrate the model card. If sampling fails, a warning gives the reason.

        Args:
            num_cases (`int`, *optional*):
                Number of cases. Defaults to `args.num_sample_edits`; with 0, pictures of an earlier run are removed.
                Of a stream there are no more.
        """
        if not (self.is_world_process_zero() or self._is_sharded):  # a sharded model needs all processes
            return
        num_cases = self.args.num_sample_edits if num_cases is None else num_cases
        if num_cases == 0:
            if self.is_world_process_zero():
                remove_before_after(Path(self.args.output_dir))
            return
        dataset = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        if isinstance(dataset, StreamedCases):
            dataset = dataset.first_cases
        was_training = self.model.training
        try:
            cases: list[tuple[dict[str, Any], list[Image.Image]]] = []
            for index in range(len(dataset)):
                if len(cases) == num_cases:
                    break
                with contextlib.suppress(BadCaseError):
                    cases.append(self._read_case(dataset, index))
            before, after = self.sample_edits(cases, adapter=False), self.sample_edits(cases)
            if self.is_world_process_zero():
                save_before_after(Path(self.args.output_dir), cases, before, after)
        except OutOfStepError:
            raise
        except Exception as error:  # a trained model must not be lost because of a picture
            redact_error(error)
            logger.warning(f"No sample edits for the model card: {type(error).__name__}: {error}")
        self.model.train(was_training)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Writes `README.md` and the reward curve to `output_dir`.

        Args:
            model_name (`str`, *optional*):
                Name of the model. Defaults to the last part of the output folder.
            dataset_name (`str`, *optional*):
                Name of the training dataset. Defaults to the repository that the dataset was loaded from.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else tags or []
            self._write_card(Path(self.args.output_dir), model_name, dataset_name, tags)

    def _write_card(
        self, folder: Path, model_name: str | None = None, dataset_name: str | None = None, tags: Sequence[str] = ()
    ) -> None:
        args = self.args
        name = model_name or (args.hub_model_id or Path(args.output_dir).resolve().name).split("/")[-1]
        repository, revision = dataset_revision(self.train_dataset)
        lora = self.accelerator.unwrap_model(self.model).peft_config["default"]
        write_model_card(
            folder,
            model_name=name,
            repo_id=self.hub_model_id or args.hub_model_id or args.output_dir,
            base_model=self.base_model,
            base_model_revision=dict(args.model_init_kwargs or {}).get("revision"),
            base_quantization=describe_quantization(self.policy.pipeline),
            dtype=self.policy.dtype,
            dataset=dataset_name or repository,
            dataset_revision=revision if dataset_name in (None, repository) else None,
            num_cases=self.num_train_cases,
            method=self._name,
            paper=self._paper,
            tags=[*self._tag_names, *tags],
            settings={
                "LoRA rank, alpha": f"{lora.r}, {lora.lora_alpha}",
                **self._card_settings(),
                **({} if args.ema_decay is None else {"`ema_decay`": str(args.ema_decay)}),
                "Denoising steps in evaluation": str(self.sample_num_inference_steps),
                "Weights of the base model": f"{self.policy.dtype} on {self.accelerator.device.type}",
                "Steps trained": str(self.state.global_step),
            },
            pipeline_class=type(self.policy.pipeline).__name__,
            lora_loader=self.policy.lora_loader,
            call_arguments=self.policy.call_arguments(self.true_cfg_scale, self.negative_prompt),
            example=self.policy.example_of_size(args.resolution),
            default_num_inference_steps=self.policy.default_num_inference_steps,
            num_inference_steps=self.sample_num_inference_steps,
            resolution=args.resolution,
            log_history=self.state.log_history,
            curves=self._card_curves(),
            links=tracker_links(args.report_to),
        )
