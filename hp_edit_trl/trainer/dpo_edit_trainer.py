import contextlib
import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.utils import identity, use_adapter

from ..cases import BadCaseError, case_images, check_pairs, check_references, pair_images, report_bad_cases
from ..flow.preference import draw_sigma, flow_error, implicit_reward, preference_loss, safeguard_scale
from ..policies import EditConditions, EditPolicy, bucketed, check_prompt_lengths
from ..utils.distributed import in_step
from ..utils.dtypes import plain_values
from ..utils.files import write_atomically
from ..utils.images import UnreadableImageError, image_digest
from ..utils.seeding import seeded_generator
from .base_edit_config import check_config
from .base_edit_trainer import BaseEditTrainer, EpochRepeatSampler, find_policy, load_policy
from .checkpoints import can_be_read
from .dpo_edit_config import DPOEditConfig
from .lora import check_peft_config, prepare_lora
from .same_run import check_same_run


logger = get_logger(__name__)

FORMAT = 1  # of the files of encoded pairs; another number makes all be encoded again


@dataclass
class Pair:
    """
    An encoded preference pair.

    Args:
        id (`str`):
            The pair's id.
        conditions ([`EditConditions`]):
            The encoded case.
        chosen (`torch.Tensor` of shape `(num_tokens, num_channels)`):
            Latents of the chosen edit, float32.
        rejected (`torch.Tensor` of shape `(num_tokens, num_channels)`):
            Latents of the rejected edit, float32.
    """

    id: str
    conditions: EditConditions
    chosen: torch.Tensor
    rejected: torch.Tensor


def encoders_key(policy: EditPolicy) -> str:
    """A hash of the encoders: their settings and all their weights."""
    digest = hashlib.sha256(type(policy).__name__.encode())
    for name, module in policy.encoders.items():
        config: Any = module.config
        settings = config if isinstance(config, dict) else config.to_dict()
        digest.update(repr((name, sorted((k, v) for k, v in settings.items() if not k.startswith("_")))).encode())
        for key, tensor in module.state_dict().items():
            # A sum weighted by place, in parts: it sees every value, in a fraction of a cryptographic hash's time.
            parts = plain_values(tensor).flatten().split(2**20)
            weights = torch.arange(1, len(parts[0]) + 1, device=tensor.device, dtype=torch.float64)
            content = [(part.double() @ weights[: len(part)]).item() for part in parts]
            digest.update(repr((key, tuple(tensor.shape), str(tensor.dtype), content)).encode())
    return digest.hexdigest()


def pair_key(row: dict[str, Any], case_id: Any, resolution: int, encoders: str) -> str:
    """A hash of all that the encoding of a pair depends on. Images that are still encoded are not decoded for it."""
    digest = hashlib.sha256(repr((FORMAT, encoders, resolution, str(case_id), row["prompt"])).encode())
    references = row["images"] if row.get("images") is not None else [row.get("image")]
    for value in (*references, row["chosen"], row["rejected"]):
        digest.update(image_digest(value))
    return digest.hexdigest()[:32]


class DPOEditTrainer(BaseEditTrainer):
    r"""
    Trainer for Diffusion-DPO on image-editing models: a LoRA learns offline, from pairs of a better and a worse edit
    ([Diffusion-DPO](https://huggingface.co/papers/2311.12908), for flow matching). HP-Edit compares it with Flow-GRPO.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from hp_edit_trl import DPOEditConfig, DPOEditTrainer

    trainer = DPOEditTrainer(
        model="Qwen/Qwen-Image-Edit-2509",
        args=DPOEditConfig(output_dir="qwen-edit-dpo"),
        train_dataset=load_dataset("someone/edit-preferences", split="train"),
        peft_config=LoraConfig(r=32, lora_alpha=64),
    )
    trainer.train()
    trainer.push_to_hub()
    ```

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The editor: a Hub id, a local folder, or a loaded pipeline. See the table of supported pipelines in the
            documentation. Without the LoRA it is the reference as well.
        args ([`DPOEditConfig`], *optional*):
            Configuration of this trainer.
        train_dataset ([`~datasets.Dataset`]):
            The pairs: `prompt`, `image` or `images`, and the edits `chosen` and `rejected`. Optional: `id` (by default
            the row number), `task`, `score_chosen`, `score_rejected`.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Pairs for evaluation.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Further callbacks.
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*,
        defaults to `(None, None)`):
            Optimizer and scheduler, if not those that `args` names.
        peft_config ([`~peft.LoraConfig`], *optional*):
            The LoRA to train. Without `target_modules` it gets the policy's own list. By default rank 32 with an alpha
            of 64.

    Raises:
        `ValueError`: If a dataset, an option or the model is not usable. Datasets and options are checked before any
            model is loaded.
    """

    # `compute_loss` returns the mean of a microbatch.
    loss_is_scaled_for_ga = False

    _tag_names = ["hp-edit-trl", "dpo"]
    _name = "Diffusion-DPO"
    _paper = {
        "title": "Diffusion Model Alignment Using Direct Preference Optimization",
        "id": "2311.12908",
        "citation": """\
@inproceedings{wallace2024diffusiondpo,
    title     = {Diffusion Model Alignment Using Direct Preference Optimization},
    author    = {Bram Wallace and Meihua Dang and Rafael Rafailov and Linqi Zhou and Aaron Lou and
                 Senthil Purushwalkam and Stefano Ermon and Caiming Xiong and Shafiq Joty and Nikhil Naik},
    booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
    year      = {2024}
}""",
    }

    args: DPOEditConfig
    control: TrainerControl
    train_dataset: Dataset

    def __init__(
        self,
        model: str | DiffusionPipeline,
        args: DPOEditConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else type(model).__name__
            args = DPOEditConfig(f"{name.rstrip('/').split('/')[-1]}-DPO")
        check_config(args, DPOEditConfig)
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to a single process, for which Trainer would use nn.DataParallel. "
                "Launch with `accelerate launch` or `torchrun`, or make one GPU visible with CUDA_VISIBLE_DEVICES."
            )
        check_peft_config(peft_config)

        # Data
        if train_dataset is None:
            raise ValueError("`train_dataset` is required.")
        datasets = {"train_dataset": train_dataset}
        if isinstance(eval_dataset, dict):
            datasets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            datasets["eval_dataset"] = eval_dataset
        self._left_out = {}
        for name, dataset in datasets.items():
            datasets[name] = self._leave_out(dataset, check_pairs(dataset, name, args.on_bad_case))

        check_same_run(args, datasets, peft_config)

        # Policy. Its class is found before its weights are loaded.
        policy_type = find_policy(model, args)
        for name, dataset in datasets.items():
            bad = check_references(dataset, name, policy_type.max_references, args.on_bad_case)
            datasets[name] = self._leave_out(dataset, bad)
        self.policy, self.base_model = load_policy(policy_type, model, args)
        for name, dataset in datasets.items():
            bad = check_prompt_lengths(self.policy, dataset, name, args.on_bad_case)
            datasets[name] = self._leave_out(dataset, bad)
        train_dataset = datasets["train_dataset"]
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: datasets[f"eval_dataset[{name!r}]"] for name in eval_dataset}
        elif eval_dataset is not None:
            eval_dataset = datasets["eval_dataset"]
        self.true_cfg_scale, self.negative_prompt = self.policy.resolve_guidance(
            args.true_cfg_scale, args.negative_prompt, args.guidance_scale
        )
        self.sample_num_inference_steps = args.num_inference_steps or self.policy.default_num_inference_steps
        peft_model = prepare_lora(self.policy, peft_config, self.base_model, args.seed)
        self.loss_weights = args.loss_weights or [1.0] * len(args.loss_type)

        super().__init__(
            model=peft_model,
            args=args,
            data_collator=identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=None,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.policy.place(self.accelerator.device)
        self._latents_folder = Path(args.latents_cache_dir or Path(args.output_dir) / "_latents")
        self._encoded: dict[str, list[str]] = {}  # files of the encoded pairs of a dataset, by its fingerprint

        # Sum and number of each metric since the last log
        self._sums: dict[str, torch.Tensor] = {}
        self._bad_cases: set[tuple[int, str]] = set()

    def _card_settings(self) -> dict[str, str]:
        options = (
            "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "beta", "loss_type",
            "loss_weights", "safeguard", "sigma_sampling", "logit_mean", "logit_std", "resolution", "guidance_scale",
            "seed",
        )  # fmt: skip
        return {f"`{option}`": str(getattr(self.args, option)) for option in options}

    def _card_curves(self) -> list[tuple[str, str, str]]:
        return [
            ("rewards/chosen", "chosen", "C2"),
            ("rewards/rejected", "rejected", "C1"),
            ("rewards/margins", "margin", "C0"),
            ("eval_rewards/margins", "margin in evaluation", "C3"),
        ]

    @property
    def num_train_cases(self) -> int:
        """Number of pairs that are trained on; those that cannot be used are left out."""
        return len(self._encoded.get(self.train_dataset._fingerprint, self.train_dataset))

    @property
    def epoch(self) -> int:
        """The present epoch, counted from 0."""
        return int(self.state.epoch or 0)

    @functools.cached_property
    def _encoders_key(self) -> str:
        return encoders_key(self.policy)

    # Every pair is encoded once, before the first step. Training then only reads files and does not need the encoders:
    # the dataloader's items are the names of these files.
    def _encode_pairs(self, dataset: Dataset, description: str) -> list[str]:
        if dataset._fingerprint in self._encoded:
            return self._encoded[dataset._fingerprint]
        process, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        rows = range(process, len(dataset), num_processes)
        files: dict[int, str] = {}
        bad: dict[int, str] = {}
        loaded = False
        with in_step(self.accelerator), contextlib.ExitStack() as stack:  # e.g. a full disk on one process
            self._latents_folder.mkdir(parents=True, exist_ok=True)
            for index in tqdm(
                rows, description, disable=self.args.disable_tqdm or not self.accelerator.is_main_process
            ):
                row = dict(dataset[index])
                row.setdefault("id", index)
                try:
                    key = pair_key(row, row["id"], self.args.resolution, self._encoders_key)
                    file = self._latents_folder / f"{key}.pt"
                    if not can_be_read(file):  # missing, truncated or damaged
                        if not loaded:  # once for all pairs, and not at all where all are known
                            stack.enter_context(self.policy.loaded(*self.policy.encoders))
                            loaded = True
                        write_atomically(file, functools.partial(torch.save, self._encode_pair(row)))
                except (UnreadableImageError, BadCaseError) as error:
                    bad[index] = str(error)
                    continue
                files[index] = str(file)
        # All bad pairs of all processes are told at once; what was encoded is kept for the next run.
        gathered, bad = ({i: v for part in gather_object([local]) for i, v in part.items()} for local in (files, bad))
        bad = {index: bad[index] for index in sorted(bad)}
        name = f"the dataset ({description[0].lower()}{description[1:]})"
        report_bad_cases(bad, len(dataset), name, self.args.on_bad_case)
        self._left_out[dataset._fingerprint] = self._left_out.get(dataset._fingerprint, 0) + len(bad)
        missing = [file for file in gathered.values() if not os.path.exists(file)]
        if missing:
            raise FileNotFoundError(
                f"{missing[0]}, which another process has written, is missing: latents_cache_dir must be a folder "
                "that all nodes share."
            )
        self._encoded[dataset._fingerprint] = [gathered[index] for index in sorted(gathered)]
        return self._encoded[dataset._fingerprint]

    def _encode_pair(self, row: dict[str, Any]) -> dict[str, Any]:
        images, edits = case_images(row, row["id"]), pair_images(row, row["id"])
        with self.policy.loaded(*self.policy.encoders):
            conditions = self.policy.encode_case(row["id"], images, row["prompt"], None, self.args.resolution)
            size, edit = (conditions.height, conditions.width), edits[0]
            # The edits have the shape of the reference, or of the reference rounded to whole latents.
            shapes = size, self.policy.target_size(images, 4096)
            if all(abs(edit.width * height / (edit.height * width) - 1) > 0.08 for height, width in shapes):
                raise UnreadableImageError(
                    f"The edits of pair {row['id']!r} have {edit.width} x {edit.height} pixels, but this model edits "
                    f"the case in the shape of its reference, {size[1]} x {size[0]} at resolution="
                    f"{self.args.resolution}: resizing would distort them. Crop them to the reference's shape, or "
                    "leave the pair out."
                )
            chosen, rejected = (self.policy.encode_image(edit, *size).float().cpu() for edit in edits)
        tensors = {name: tensor.cpu() for name, tensor in conditions.tensors.items()}
        return {
            "id": str(row["id"]),
            "conditions": {**vars(conditions), "tensors": tensors},
            "chosen": chosen,
            "rejected": rejected,
        }

    def _load_pair(self, file: str) -> Pair:
        return self._pair(torch.load(file, weights_only=True))

    def _pair(self, state: dict[str, Any]) -> Pair:
        device = self.accelerator.device
        conditions = EditConditions(**state["conditions"])
        conditions.tensors = {name: tensor.to(device) for name, tensor in conditions.tensors.items()}
        return Pair(state["id"], conditions, state["chosen"].to(device), state["rejected"].to(device))

    def get_train_dataloader(self) -> DataLoader:
        files = self._encode_pairs(self.train_dataset, "Encoding training pairs")
        if self.args.eval_strategy != "no" and self.eval_dataset is not None:  # errors in them show now
            datasets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
            for dataset in datasets:
                self._encode_pairs(dataset, "Encoding evaluation pairs")
        return self._get_dataloader(
            dataset=files,
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=lambda dataset: EpochRepeatSampler(
                files,
                mini_repeat_count=1,
                shuffle=self.args.shuffle_dataset,
                seed=self.args.seed,
                epoch=lambda: self.epoch,
            ),
            is_training=True,
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        dataset = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("Evaluation needs an `eval_dataset`.")
        dataset = self._current_eval_dataset = self._checked(dataset, check_pairs)
        return self._get_dataloader(
            dataset=self._encode_pairs(dataset, "Encoding evaluation pairs"),
            description="Evaluation",
            batch_size=self.args.eval_batch_size,
        )

    def training_step(self, model: nn.Module, inputs: list[str], num_items_in_batch=None) -> torch.Tensor:
        with self._without_casts():
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._drop_bad_update(loss, self._microbatch_ids)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: list[str], return_outputs: bool = False, num_items_in_batch=None
    ) -> torch.Tensor:
        with in_step(self.accelerator):
            pairs = [self._load_pair(file) for file in inputs]
        generators = [seeded_generator(self.args.seed, "train", self.epoch, pair.id) for pair in pairs]
        self._microbatch_ids = [pair.id for pair in pairs]
        losses, metrics = self._losses(model, pairs, generators)
        for name, values in metrics.items():
            sums = torch.stack([values.sum(), values.new_tensor(len(values))])
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        return losses.mean()

    def _losses(
        self, model: nn.Module, pairs: list[Pair], generators: list[torch.Generator]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Loss of each pair.

        Args:
            model (`torch.nn.Module`):
                The policy's transformer.
            pairs (`list[Pair]`):
                The pairs, of any sizes.
            generators (`list[torch.Generator]`):
                One for each pair. Its noise and noise level are those of both edits, and of the reference.

        Returns:
            `tuple[torch.Tensor, dict[str, torch.Tensor]]`: the losses, of shape `(num_pairs,)`, and the metrics, each
            of that shape and without gradient; in the order of the pairs.
        """
        args, policy, device = self.args, self.policy, self.accelerator.device
        all_losses, all_metrics = [], []
        buckets = bucketed([pair.conditions for pair in pairs], len(pairs))
        missing = self._missing_passes(len(buckets)) if torch.is_grad_enabled() else 0
        for members in buckets + [buckets[0][:1]] * missing:
            bucket = [pairs[i] for i in members]
            schedule = policy.sigmas(self.sample_num_inference_steps, bucket[0].conditions)
            options = (args.logit_mean, args.logit_std)
            drawn = [draw_sigma(schedule, args.sigma_sampling, generators[i], *options) for i in members]
            sigmas = torch.stack(drawn).to(device)
            noise = torch.stack([torch.randn(pairs[i].chosen.shape, generator=generators[i]) for i in members]).to(
                device
            )

            # The chosen edits, then the rejected ones, in one pass: both of a pair with the same noise and noise level
            clean = torch.stack([pair.chosen for pair in bucket] + [pair.rejected for pair in bucket])
            noise, sigmas = noise.repeat(2, 1, 1), sigmas.repeat(2)
            latents = torch.lerp(clean, noise, sigmas[:, None, None])
            batch = policy.collate([pair.conditions for pair in bucket] * 2)
            velocity = policy.velocity(model, latents, sigmas, batch, 1.0)
            with torch.no_grad(), use_adapter(self.accelerator.unwrap_model(model), None):
                reference_velocity = policy.velocity(self.model, latents, sigmas, batch, 1.0)

            chosen_error, rejected_error = flow_error(velocity, clean, noise).chunk(2)
            reference_chosen, reference_rejected = flow_error(reference_velocity, clean, noise).chunk(2)
            metrics = {}
            if args.safeguard:
                scale = safeguard_scale(*(velocity - (noise - clean)).chunk(2))
                # The same value, with less gradient
                rejected_error = torch.lerp(rejected_error.detach(), rejected_error, scale)
                metrics["safeguard_scale"] = scale
            chosen_reward = implicit_reward(chosen_error, reference_chosen, args.beta)
            rejected_reward = implicit_reward(rejected_error, reference_rejected, args.beta)
            margin = chosen_reward - rejected_reward
            terms = [preference_loss(name, margin, chosen_error) for name in args.loss_type]
            losses = torch.stack([w * term for w, term in zip(self.loss_weights, terms, strict=True)]).sum(0)
            metrics |= {
                "rewards/chosen": chosen_reward,
                "rewards/rejected": rejected_reward,
                "rewards/accuracies": (margin > 0).float(),
                "rewards/margins": margin,
                "flow_loss/chosen": chosen_error,
                "flow_loss/rejected": rejected_error,
                "flow_loss/reference_chosen": reference_chosen,
                "flow_loss/reference_rejected": reference_rejected,
            }
            if len(terms) > 1:
                metrics |= {f"loss/{name}": term for name, term in zip(args.loss_type, terms, strict=True)}
            all_losses.append(losses)
            all_metrics.append({name: values.detach() for name, values in metrics.items()})
        places = torch.tensor([i for members in buckets for i in members], device=device).argsort()
        number = len(buckets)
        joined = {name: torch.cat([m[name] for m in all_metrics[:number]])[places] for name in all_metrics[0]}
        # The missing passes change nothing, but have a backward pass.
        filled = sum(0 * loss.sum() for loss in all_losses[number:])
        return torch.cat(all_losses[:number])[places] + filled, joined

    # Noise and noise level of evaluation belong to the pair: losses of different checkpoints, and of runs with another
    # number of processes, are comparable.
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.callback_handler.eval_dataloader = dataloader
        was_training = self.model.training
        self.model.eval()
        if hasattr(self.optimizer, "eval"):  # schedule-free optimizers
            self.optimizer.eval()
        results: list[dict[str, float]] = []
        for files in dataloader:
            with (
                self._passes_in_step(), torch.no_grad(), self._published(),
                self._without_casts(), self.accelerator.autocast(),
            ):  # fmt: skip
                pairs = [self._load_pair(file) for file in files]
                generators = [seeded_generator(self.args.seed, "eval", pair.id) for pair in pairs]
                losses, metrics = self._losses(self.model, pairs, generators)
            columns = {"loss": losses, **metrics}
            local = [{name: values[i].item() for name, values in columns.items()} for i in range(len(pairs))]
            # The last batch may be filled up with repeated pairs to keep the processes level; they are dropped here.
            results += self.accelerator.gather_for_metrics(local, use_gather_object=True)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.model.train(was_training)
        means = {f"{metric_key_prefix}_{name}": sum(r[name] for r in results) / len(results) for name in results[0]}
        if left_out := self._left_out[self._current_eval_dataset._fingerprint]:
            means[f"{metric_key_prefix}_bad_cases"] = left_out
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=means, num_samples=len(results))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a log of training, not of evaluation
            # All processes log at the same time, so their measurements are combined here.
            gathered = gather_object([{name: sums.tolist() for name, sums in self._sums.items()}])
            for name in gathered[0]:
                total, number = (sum(part) for part in zip(*(sums[name] for sums in gathered), strict=True))
                logs[name] = total / number
            if left_out := self._left_out.get(self.train_dataset._fingerprint):
                logs["bad_cases"] = left_out
            if self._skipped_updates:
                logs["skipped_updates"] = self._skipped_updates
            self._sums.clear()
            self._log_filled_passes(logs)
        super().log(logs, start_time)
