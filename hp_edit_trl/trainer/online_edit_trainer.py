"""What the trainers share that sample edits and learn from their rewards: all but the rollout and the loss."""

import asyncio
import atexit
import contextlib
import logging
import math
import operator
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather, gather_object
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.utils import (
    identity,
    is_async_callable,
    nanstd,
    shutdown_event_loop_in_daemon,
    start_event_loop_in_daemon,
)

from ..cases import BadCaseError, check_cases, check_references, max_references
from ..judges import FailureLimit, JudgeRefusedError, JudgeTally
from ..judges.base import fit_image
from ..judges.failures import REFUSED
from ..policies import EditConditions, Prefixes, Trajectory, check_prompt_lengths, decode
from ..rewards import Reward, Rewards
from ..rewards.base import check_reward_tasks, load_reward
from ..rewards.checks import (
    as_reward_funcs,
    awaited,
    check_rewards,
    check_signature,
    check_whole_groups,
    failed_rewards,
    own_copy,
    reward_names,
)
from ..utils.distributed import in_step
from ..utils.files import write_json
from ..utils.seeding import seeded_generator
from ..utils.texts import shortened
from .base_edit_trainer import BaseEditTrainer, EpochRepeatSampler, find_policy, load_policy
from .batches import check_enough_cases
from .checkpoints import restoring
from .completions import log_completions_table
from .hub import completions_scheduler
from .lora import check_peft_config, prepare_lora
from .online_edit_config import OnlineEditConfig
from .prefixes import TrainedPrefixes
from .same_run import check_same_run
from .streamed_cases import STREAM, StreamedCases, restore_stream


logger = get_logger(__name__)

NO_REWARD = "no reward"  # the kind of failure where functions returned None
REWARD_WINDOW = 8  # generation batches that `max_missing_rewards` is taken over

# Takes prompts, completions and the dataset's columns as lists; returns, or awaits, a list[float | None].
RewardFunc = Callable[..., Any]

# What the trainer itself reads, and keeps with `remove_unused_columns`
READ_COLUMNS = {"id", "prompt", "image", "images"}


@dataclass
class Sample:
    """One edit of a generation batch, with what its update needs."""

    case_id: str
    group: int  # its number in the generation batch
    number: int  # of the sample in its group
    conditions: EditConditions
    trajectory: Trajectory
    advantage: float
    # 0 if all rewards of the group are equal: then its KL must not move the policy either.
    kl_weight: float


@contextlib.contextmanager
def cancelled_on_error(begun: list[tuple[list[int], dict[int, Future]]]) -> Iterator[None]:
    """Calls of reward functions that have not started are given up if the context ends with an error."""
    try:
        yield
    except BaseException:
        for _, futures in begun:
            for future in futures.values():
                future.cancel()
        raise


class OnlineEditTrainer(BaseEditTrainer):
    """
    Base of the trainers that sample edits and learn from their rewards. A subclass says how edits are sampled,
    [`_rollout`], and what they are trained by, [`_accumulate_gradients`]. Arguments are those of
    [`FlowGRPOEditTrainer`].
    """

    # The loss of a microbatch is scaled where it is computed, in `training_step`.
    loss_is_scaled_for_ga = True

    _card_options: tuple[str, ...]  # that the model card lists

    args: OnlineEditConfig
    control: TrainerControl
    train_dataset: Dataset | StreamedCases
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: str | DiffusionPipeline,
        reward_funcs: RewardFunc | str | list[RewardFunc | str],
        args: Any,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ):
        # Reward functions
        self.reward_funcs = as_reward_funcs(reward_funcs)
        self.reward_func_names = reward_names(self.reward_funcs)
        weights = args.reward_weights if args.reward_weights is not None else [1.0] * len(self.reward_funcs)
        if len(weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights has {len(weights)} entries, but there are {len(self.reward_funcs)} reward functions."
            )
        self.reward_weights = torch.tensor(weights, dtype=torch.float32)
        if not (self.reward_weights.isfinite().all() and self.reward_weights.any()):
            raise ValueError(f"reward_weights={weights} must be finite, and at least one of them not 0.")

        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to a single process, for which Trainer would use nn.DataParallel. "
                "Launch with `accelerate launch` or `torchrun`, or make one GPU visible with CUDA_VISIBLE_DEVICES."
            )
        check_peft_config(peft_config)

        # Data
        if train_dataset is None:
            raise ValueError("`train_dataset` is required.")
        stream = None
        if isinstance(train_dataset, IterableDataset):  # its first rows are checked as a dataset
            stream = StreamedCases(train_dataset, args, READ_COLUMNS if args.remove_unused_columns else None)
        datasets = {"train_dataset": train_dataset if stream is None else stream.rows}
        if isinstance(eval_dataset, dict):
            datasets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            datasets["eval_dataset"] = eval_dataset
        self._left_out = {}
        for name, dataset in datasets.items():
            datasets[name] = dataset = self._leave_out(dataset, check_cases(dataset, name, args.on_bad_case))
            columns = set(dataset.column_names)
            tasks = dict.fromkeys(dataset["task"][:] if "task" in columns else [None])
            for func in self.reward_funcs:
                check_signature(func, {"id"} | (READ_COLUMNS & columns if args.remove_unused_columns else columns))
                check_reward_tasks(func, tasks)
        assert args.generation_batch_size and args.steps_per_generation  # the config saw to it
        self.num_generations = args.num_generations  # = G in the paper
        self.cases_per_batch = args.generation_batch_size // args.num_generations
        self.steps_per_generation = args.steps_per_generation
        check_whole_groups(
            self.reward_funcs, args.per_device_train_batch_size * args.steps_per_generation, args.num_generations
        )
        self.num_trained = args.num_trained_generations or args.num_generations
        self.generate_every = args.steps_per_generation * args.num_iterations  # in microbatches
        if stream is None or stream.is_short:
            check_enough_cases(args, len(datasets["train_dataset"]))

        check_same_run(args, datasets, peft_config)

        # Policy. Its class is found, and the judges are asked, before its weights are loaded.
        policy_type = find_policy(model, args)
        for name, dataset in datasets.items():
            bad = check_references(dataset, name, policy_type.max_references, args.on_bad_case)
            datasets[name] = self._leave_out(dataset, bad)
        for func in self.reward_funcs:
            load_reward(func, 1 + max(map(max_references, datasets.values())))
        self.policy, self.base_model = load_policy(policy_type, model, args)
        for name, dataset in datasets.items():
            bad = check_prompt_lengths(self.policy, dataset, name, args.on_bad_case)
            datasets[name] = self._leave_out(dataset, bad)
        train_dataset = datasets["train_dataset"]
        if stream is not None:
            stream.start(train_dataset, self._usable)
            train_dataset = stream
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: datasets[f"eval_dataset[{name!r}]"] for name in eval_dataset}
        elif eval_dataset is not None:
            eval_dataset = datasets["eval_dataset"]
        self.true_cfg_scale, self.negative_prompt = self.policy.resolve_guidance(
            args.true_cfg_scale, args.negative_prompt, args.guidance_scale
        )
        self.sample_num_inference_steps = args.eval_num_inference_steps or args.num_inference_steps
        peft_model = prepare_lora(self.policy, peft_config, self.base_model, args.seed)

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

        # Prefixes of cases in an update, where the policy has them: of passes that are trained, and of those through
        # the old policy and the model without its adapter
        self._prefixes = TrainedPrefixes(self.policy, self.true_cfg_scale, self.accelerator.no_sync)
        self._other_prefixes = {name: Prefixes(self.policy, self.true_cfg_scale) for name in ("old", "reference")}

        # Number of microbatches trained so far, and the samples that the present ones are taken from
        self._step = 0
        self._buffered_samples: list[Sample] | None = None

        # Measurements since the last log
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._sample_stats: dict[str, torch.Tensor] = {}
        self._bad_cases: set[tuple[int, str]] = set()
        self._phase_seconds: dict[str, float] = defaultdict(float)
        self._num_sampled = 0
        self._logged_steps = 0
        self._completions: list[dict[str, Any]] = []
        self._completions_upload = None
        if args.log_completions_hub_repo is not None and self.is_world_process_zero():
            self._completions_upload = completions_scheduler(args)
        self._pending_metrics: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self._logged_extra: list[tuple[str, list, list[int]]] = []  # column, values, places of the samples
        self._pending_extra: dict[str, list] = {}
        self._tally = JudgeTally()

        # Missing rewards, see `_watch_rewards`
        self._reset_watch()

        # Where reward functions wait for others
        self._threads = {func: ThreadPoolExecutor(1) for func in self.reward_funcs if isinstance(func, Reward)}
        if any(is_async_callable(func) for func in self.reward_funcs):
            thread, self.async_loop, ready = start_event_loop_in_daemon(name=f"{type(self).__name__}-AsyncLoop")
            ready.wait()
            atexit.register(shutdown_event_loop_in_daemon, thread, self.async_loop)

    def _card_settings(self) -> dict[str, str]:
        scorers = [func for func in self.reward_funcs if isinstance(func, Reward)]
        settings = {
            "Reward functions": ", ".join(
                f"{name} (weight {weight:g})"
                for name, weight in zip(self.reward_func_names, self.reward_weights.tolist(), strict=True)
            ),
            "Scorer prompts": ", ".join(
                sorted({revision for scorer in scorers for revision in scorer.prompt_revisions})
            ) or "none",
        }  # fmt: skip
        for option in self._card_options:
            settings[f"`{option}`"] = str(getattr(self.args, option))
        return settings | {"`true_cfg_scale`": str(self.true_cfg_scale)}  # the pipeline's, if `args` has none

    def _card_curves(self) -> list[tuple[str, str, str]]:
        curves = [("reward", "training", "C0"), ("eval_reward", "evaluation", "C3")]
        if len(self.reward_func_names) > 1:
            curves += [(f"rewards/{name}/mean", name, f"C{i + 4}") for i, name in enumerate(self.reward_func_names)]
        return curves

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = sorted(READ_COLUMNS)

    # The dataloader yields row numbers, and each distinct case is read and decoded once per generation batch. Yielding
    # rows would decode each image num_generations * steps_per_generation * num_iterations times.
    def get_train_dataloader(self) -> DataLoader:
        if self.args.remove_unused_columns and not isinstance(self.train_dataset, StreamedCases):
            left_out = self._left_out.get(self.train_dataset._fingerprint, 0)
            self.train_dataset = self._remove_unused_columns(self.train_dataset, description="training")
            self._left_out[self.train_dataset._fingerprint] = left_out
        return self._get_dataloader(
            dataset=range(len(self.train_dataset)),
            description="Training",
            batch_size=self.args.generation_batch_size // self.args.world_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset=None) -> EpochRepeatSampler:
        # Each case `num_generations` times in a row, each generation batch once for every microbatch taken from it.
        # Cases that do not fill a last generation batch are left out of the epoch. A stream has shuffled them already.
        return EpochRepeatSampler(
            range(len(self.train_dataset)),
            mini_repeat_count=self.num_generations,
            batch_size=self.cases_per_batch,
            repeat_count=self.generate_every,
            shuffle=self.args.shuffle_dataset and not isinstance(self.train_dataset, StreamedCases),
            seed=self.args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def _usable(self, rows: Dataset, name: str) -> Dataset:
        """The usable cases of further rows of a stream."""
        cases = self._checked(rows, check_cases, name)
        for func in self.reward_funcs:
            check_reward_tasks(func, dict.fromkeys(cases["task"][:] if "task" in cases.features else [None]))
        return cases

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        dataset = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("Evaluation needs an `eval_dataset`.")
        self._current_eval_dataset = dataset = self._checked(dataset, check_cases)
        return self._get_dataloader(
            dataset=range(len(dataset)), description="Evaluation", batch_size=self.args.eval_batch_size
        )

    @contextlib.contextmanager
    def _timed(self, phase: str):
        start = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self._phase_seconds[phase] += time.perf_counter() - start

    def train(self, *args: Any, **kwargs: Any):
        # A new run starts with a new generation batch, even if an earlier run of this trainer left samples over.
        self._step, self._buffered_samples = 0, None
        self._prefixes.clear()
        self._reset_watch()
        output = super().train(*args, **kwargs)
        if isinstance(self.train_dataset, StreamedCases):
            self.train_dataset.close()
        if self._completions_upload is not None:
            self._completions_upload.trigger()
        return output

    def _reset_watch(self) -> None:
        self._limit = FailureLimit(self.args.max_failed_batches, self.args.max_missing_rewards, REWARD_WINDOW)
        self._rewards_work = False  # whether a generation batch was scored without an error
        self._accumulated = 0  # microbatches of the present update that were trained
        self._rewards_gone: Exception | None = None  # why the run has to stop

    def _prepare_inputs(self, indices: list[int]) -> list[Sample]:
        # Samples are drawn once for a whole generation batch, ordered, and handed out microbatch by microbatch, as
        # often as `num_iterations` says.
        generation, microbatch = divmod(self._step, self.generate_every)
        if microbatch == 0 or self._buffered_samples is None:
            samples = self._choose(self._generate_and_score(indices, generation))
            generator = seeded_generator(self.args.seed, "shuffle", generation, self.accelerator.process_index)
            self._buffered_samples = self._ordered(samples, generator)
        size = self.args.per_device_train_batch_size
        start = size * (microbatch % self.steps_per_generation)
        return self._buffered_samples[start : start + size]

    def _learns(self, sample: Sample) -> bool:
        """Whether the sample moves the policy. If not, no pass is made for it: its gradient is 0."""
        return sample.advantage != 0 or (self.args.beta != 0.0 and sample.kl_weight != 0)

    def _choose(self, samples: list[Sample]) -> list[Sample]:
        """
        The samples of this process to train on: the `num_trained_generations` with the largest absolute advantages of
        each group. In place of those that cannot be learned from, the next ones of other groups.
        """
        ranks: dict[int, int] = {}
        taken: dict[int, int] = defaultdict(int)
        for index in sorted(range(len(samples)), key=lambda i: -abs(samples[i].advantage)):
            ranks[index] = taken[samples[index].group]
            taken[samples[index].group] += 1
        order = sorted(ranks, key=lambda i: (not self._learns(samples[i]), ranks[i] >= self.num_trained))
        return [samples[i] for i in sorted(order[: len(samples) * self.num_trained // self.num_generations])]

    def _shuffled(self, samples: list[Sample], generator: torch.Generator) -> list[Sample]:
        return [samples[i] for i in torch.randperm(len(samples), generator=generator).tolist()]

    def _ordered(self, samples: list[Sample], generator: torch.Generator) -> list[Sample]:
        """
        Shuffles samples. Those without a pass come first in each update; where passes share the prefix of a case,
        those of a case come one after the other.
        """
        samples = self._shuffled(samples, generator)
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        updates = [samples[start : start + size] for start in range(0, len(samples), size)]
        if self.policy.has_prefix:
            places = {case_id: i for i, case_id in enumerate(dict.fromkeys(sample.case_id for sample in samples))}
            updates = [sorted(update, key=lambda sample: places[sample.case_id]) for update in updates]
        return [sample for update in updates for sample in sorted(update, key=self._learns)]

    def _rollout(
        self,
        generation: int,
        rows: list[dict[str, Any]],
        groups: list[int],
        conditions: list[EditConditions],
        generators: list[torch.Generator],
    ) -> Iterator[tuple[list[int], list[Trajectory]]]:
        """
        Samples the edits of a generation batch on this process, as
        [`~hp_edit_trl.policies.rollout.rollout_batches`] does.

        Args:
            generation (`int`):
                Number of the generation batch.
            rows (`list[dict]`):
                The row of each sample.
            groups (`list[int]`):
                Its group's number in the generation batch.
            conditions (`list[EditConditions]`):
                Its encoded case.
            generators (`list[torch.Generator]`):
                What its noise is drawn from.
        """
        raise NotImplementedError

    def _sampling(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model has the weights that edits of a generation batch are sampled with."""
        return contextlib.nullcontext()

    def _generate_and_score(self, indices: list[int], generation: int) -> list[Sample]:
        args, policy = self.args, self.policy
        seed = args.seed
        self.model.eval()

        if isinstance(self.train_dataset, StreamedCases):
            with self._timed("encode"):
                self.train_dataset.reach(generation, self.accelerator)
        # An error on one process, e.g. about a case or of its memory, stops all of them.
        with self._timed("encode"), in_step(self.accelerator), policy.loaded(*policy.encoders):
            cases = {index: self._encode_case(self.train_dataset, index) for index in dict.fromkeys(indices)}
        rows = [cases[index][0] for index in indices]
        conditions = [cases[index][2] for index in indices]

        # The place of a sample in the whole batch does not depend on how the groups are spread over processes. The
        # group is part of the key, because a case that stands in for a bad one may have a group of its own
        # already.
        first = self.accelerator.process_index * len(indices)
        generators = [
            seeded_generator(seed, "rollout", generation, str(row["id"]), *divmod(first + i, self.num_generations))
            for i, row in enumerate(rows)
        ]
        groups = [(first + i) // self.num_generations for i in range(len(rows))]
        batches = self._rollout(generation, rows, groups, conditions, generators)
        trajectories: dict[int, Trajectory] = {}
        images: dict[int, Image.Image] = {}
        begun: list[tuple[list[int], dict[int, Future]]] = []
        with self._passes_in_step(), policy.loaded("vae"), cancelled_on_error(begun):
            while len(images) < len(rows):
                with (
                    self._timed("rollout"),
                    self._sampling(),
                    self._without_casts(),
                    self.accelerator.autocast(),
                ):
                    members, paths = next(batches)
                with self._timed("decode"):
                    shapes = [conditions[i] for i in members]
                    edits = decode(policy, [path.final for path in paths], shapes, args.rollout_batch_size)
                trajectories.update(zip(members, paths, strict=True))
                images.update(zip(members, edits, strict=True))
                # Groups of which this batch had the last edit
                for group in dict.fromkeys(groups[i] for i in members):
                    places = [i for i in range(len(rows)) if groups[i] == group]
                    if all(i in images for i in places):
                        begun.append((places, self._begin_rewards(rows, images, places)))
        with self._timed("reward"), in_step(self.accelerator):
            edits = [images[i] for i in range(len(rows))]
            rewards_per_func, failed, tally = self._calculate_rewards(rows, edits, begun, in_training=True)

        # Advantages are relative to the group, whose samples may lie on several processes.
        self._check_groups([row["id"] for row in rows])
        all_rewards_per_func = gather(rewards_per_func)
        all_failed = gather(failed)
        self._watch_rewards(all_rewards_per_func, all_failed, tally)
        rewards, advantages, zero_std = self._compute_advantages(all_rewards_per_func, all_failed)
        local = slice(first, first + len(rows))

        self._num_sampled += len(rewards)
        self._metrics["reward"].append(torch.nanmean(rewards).item())
        self._metrics["reward_std"].append(nanstd(rewards).item())
        self._metrics["frac_reward_zero_std"].append(zero_std.float().mean().item())
        self._metrics["frac_reward_missing"].append(rewards.isnan().float().mean().item())
        for i, name in enumerate(self.reward_func_names):
            self._metrics[f"rewards/{name}/mean"].append(torch.nanmean(all_rewards_per_func[:, i]).item())
            self._metrics[f"rewards/{name}/std"].append(nanstd(all_rewards_per_func[:, i]).item())
        for name, value in self._flush_pending_metrics().items():
            self._metrics[name].append(value)

        local_advantages, local_zero_std = advantages[local].tolist(), zero_std[local].tolist()
        if args.log_completions and self.accelerator.is_main_process:
            # The first sample of each case, then the second of each, while there is room
            by_turn = sorted(range(len(rows)), key=lambda i: (first + i) % self.num_generations)
            if args.log_unique_prompts:
                logged = {row["prompt"] for row in self._completions}
                news = {rows[i]["prompt"]: i for i in reversed(by_turn) if rows[i]["prompt"] not in logged}
                by_turn = [i for i in by_turn if i in news.values()]
            for i in sorted(by_turn[: args.num_completions_to_log - len(self._completions)]):
                self._completions.append(
                    {
                        "step": self.state.global_step,
                        "id": str(rows[i]["id"]),
                        "prompt": rows[i]["prompt"],
                        "reference": fit_image(cases[indices[i]][1][0], args.resolution**2),
                        "completion": fit_image(edits[i], args.resolution**2),
                        **dict(zip(self.reward_func_names, rewards_per_func[i].tolist(), strict=True)),
                        "advantage": local_advantages[i],
                        **{column: values[i] for column, values in self._pending_extra.items()},
                    }
                )
        self._pending_extra.clear()

        return [
            Sample(
                case_id=str(row["id"]),
                group=groups[i],
                number=(first + i) % self.num_generations,
                conditions=conditions[i],
                trajectory=trajectories[i],
                advantage=local_advantages[i],
                kl_weight=0.0 if local_zero_std[i] else 1.0,
            )
            for i, row in enumerate(rows)
        ]

    def _check_groups(self, case_ids: list[Any]) -> None:
        """Every group must consist of one case. Ids are compared as 64-bit hashes, which floats could not hold."""
        hashes = [seeded_generator("case", str(case_id)).initial_seed() for case_id in case_ids]
        local = torch.tensor(hashes, dtype=torch.int64, device=self.accelerator.device)
        groups = gather(local).view(-1, self.num_generations)
        if not (groups == groups[:, :1]).all():
            raise RuntimeError(f"Samples of different cases ended up in one group; on this process: {case_ids}.")

    def _watch_rewards(self, rewards_per_func: torch.Tensor, failed: torch.Tensor, tally: JudgeTally) -> None:
        """
        Stops the run if too many rewards are missing: those of samples that no function gave a reward, or for which
        one failed. All processes see the same rewards, so that all decide alike.

        At the beginning of an update, a checkpoint is saved as if this batch had not been sampled, so that a resumed
        run samples it again. Inside of one, the update is finished first, see `_maybe_log_save_evaluate`.

        Args:
            rewards_per_func (`torch.Tensor`):
                Rewards of all processes, of shape `(num_samples, num_reward_funcs)`.
            failed (`torch.Tensor`):
                Where a function failed, of the same shape.
            tally ([`JudgeTally`]):
                The failures of this process by kind.

        Raises:
            `ConnectionError`: If the run stops because a judge gives no scores.
            `RuntimeError`: If it stops because reward functions raise errors or return nothing.
        """
        together = JudgeTally()
        for one in gather_object([tally]):
            together.merge(one)
        counted = self.reward_weights != 0
        missing = (failed[:, counted].any(1) | rewards_per_func[:, counted].isnan().all(1)).float().mean().item()
        if missing and not together.failures:
            together.fail(NO_REWARD, "the reward functions returned None: if they are meant to, raise these two")
        exceeded = self._limit.add(missing, together)
        self._rewards_work = True
        error_type: type[Exception] = ConnectionError
        if REFUSED in together.failures:
            reason = together.reasons[REFUSED]
        elif exceeded:
            own = (NO_REWARD, *self.reward_func_names)  # and no judge's
            if all(kind.partition(": ")[0] in own for kind in self._limit.tally().failures):
                error_type = RuntimeError
            reason = (
                f"Too many rewards of the generation batches are missing: {exceeded} (max_failed_batches="
                f"{self.args.max_failed_batches}, max_missing_rewards={self.args.max_missing_rewards}). The failures "
                f"by kind: {self._limit.reasons()}."
            )
        else:
            return
        self._rewards_gone = error_type(
            f"{reason} Mend the cause and resume from the last checkpoint in {self.args.output_dir}."
        )
        if not self._accumulated:
            if self.state.global_step > 0:
                self._save_checkpoint(self.model, None)
            raise self._rewards_gone

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._rewards_gone is not None:
            self.control.should_save, self.control.should_evaluate = True, False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._rewards_gone is not None:
            raise self._rewards_gone

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            return super()._evaluate(*args, **kwargs)
        except ConnectionError:  # on all processes
            self._save_checkpoint(self.model, None)
            raise

    def _reward_arguments(
        self, rows: list[dict[str, Any]], images: Mapping[int, Image.Image], places: list[int]
    ) -> dict[str, Any]:
        """The arguments of a reward function for the samples at some places. Each function gets copies of its own."""
        chosen = [rows[i] for i in places]
        columns = {name: [row.get(name) for row in chosen] for name in rows[0] if name not in ("prompt", "completion")}
        columns |= {"prompts": [row["prompt"] for row in chosen], "completions": [images[i] for i in places]}
        return own_copy(columns) | {
            "trainer_state": self.state,
            "log_extra": lambda column, values: self._log_extra(column, values, places),
            "log_metric": lambda name, value: self._log_metric(name, value, len(places)),
        }

    def _begin_rewards(
        self, rows: list[dict[str, Any]], images: Mapping[int, Image.Image], places: list[int]
    ) -> dict[int, Future]:
        """
        Calls those reward functions that wait for others: async ones, and scorers with a judge on a server. They work
        while the next edits are sampled. Returns what they will return, by the number of the function.
        """
        begun: dict[int, Future] = {}
        for i, func in enumerate(self.reward_funcs):
            if is_async_callable(func):
                arguments = self._reward_arguments(rows, images, places)
                begun[i] = asyncio.run_coroutine_threadsafe(awaited(func, arguments), self.async_loop)
            elif isinstance(func, Reward) and func.is_remote:
                arguments = self._reward_arguments(rows, images, places)
                begun[i] = self._threads[func].submit(func, **arguments)
        return begun

    def _calculate_rewards(
        self,
        rows: list[dict[str, Any]],
        images: list[Image.Image],
        begun: list[tuple[list[int], dict[int, Future]]] | None = None,
        in_training: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, JudgeTally]:
        """
        Rewards of this process's samples.

        Args:
            rows (`list[dict]`):
                The row of each sample.
            images (`list[PIL.Image.Image]`):
                The edits.
            begun (`list[tuple[list[int], dict[int, Future]]]`, *optional*):
                Places of samples, and what [`_begin_rewards`] has returned for them. All samples must be in one. By
                default all are begun here.
            in_training (`bool`, *optional*, defaults to `False`):
                Whether a judge that refuses its key is a failure like others, so that the run can save a checkpoint
                before it stops.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, JudgeTally]`: the rewards, of shape `(num_samples, num_reward_funcs)`,
            NaN where not applicable; where a function failed, which is another thing, of the same shape; and the
            failures by kind.
        """
        edits, everything = dict(enumerate(images)), list(range(len(rows)))
        if begun is None:
            begun = [(everything, self._begin_rewards(rows, edits, everything))]
        rewards_per_func = torch.full((len(rows), len(self.reward_funcs)), math.nan)
        failed = torch.zeros_like(rewards_per_func, dtype=torch.bool)
        tally = JudgeTally()
        for i, (name, func) in enumerate(zip(self.reward_func_names, self.reward_funcs, strict=True)):
            for places, futures in begun if i in begun[0][1] else [(everything, {})]:
                ids = [rows[place]["id"] for place in places]
                lost = [False] * len(places)  # missing because something failed, and not because it does not apply
                try:
                    if i in futures:
                        returned = self._answer(i, futures[i])
                    else:
                        returned = func(**self._reward_arguments(rows, edits, places))
                    if isinstance(returned, Rewards):
                        lost = returned.failed
                        tally.merge(returned.tally)
                except JudgeRefusedError as error:
                    if not in_training or not self._rewards_work:
                        raise
                    tally.fail(REFUSED, str(error), len(places))
                    returned, lost = [None] * len(places), [True] * len(places)
                except (Exception, SystemExit) as error:
                    returned = failed_rewards(error, name, ids, tally, first=not self._rewards_work)
                    lost = [True] * len(places)
                values = torch.tensor(check_rewards(returned, name, ids, self.args.on_bad_reward))
                rewards_per_func[places, i] = values
                failed[places, i] = values.isnan() & torch.tensor(lost)
        self._tally.merge(tally)

        for column, extra, places in self._logged_extra:
            if len(extra) != len(places):
                raise ValueError(f"log_extra({column!r}, ...) got {len(extra)} values for {len(places)} completions.")
            filled = self._pending_extra.setdefault(column, [None] * len(rows))
            for place, value in zip(places, extra, strict=True):
                filled[place] = value
        self._logged_extra.clear()
        unscored = [row for row, none in zip(rows, rewards_per_func.isnan().all(1), strict=True) if none]
        if unscored:
            cases = shortened(", ".join(dict.fromkeys(f"{row['id']!r} ({row['prompt']!r})" for row in unscored)))
            logger.log(
                logging.INFO if self._rewards_work else logging.WARNING,  # later the log has the share
                f"No reward function scored {len(unscored)} of {len(rows)} edits, of the cases {cases}.",
                main_process_only=False,
            )
        device = self.accelerator.device
        return rewards_per_func.to(device), failed.to(device), tally

    def _answer(self, i: int, waiting: Future) -> Any:
        """What a function that was begun returns. Raises an error if a task of it has ended the event loop."""
        if is_async_callable(self.reward_funcs[i]):
            while not wait([waiting], timeout=1).done:
                if not self.async_loop.is_running():
                    raise RuntimeError("a task of an async reward function has ended the event loop, e.g. by sys.exit")
        return waiting.result()

    def _log_extra(self, column: str, values: list, places: list[int]) -> None:
        values = values.tolist() if isinstance(values, torch.Tensor | np.ndarray) else values
        if not isinstance(values, list | tuple):
            raise TypeError(f"log_extra({column!r}, ...) takes a list, a value for each completion.")
        self._logged_extra.append((column, values, places))

    def _log_metric(self, name: str, value: float, count: int) -> None:
        number = float(value)  # numbers of NumPy and torch could not be written into the trainer's state
        self._pending_metrics[name].append((number, count))

    def _flush_pending_metrics(self) -> dict[str, float]:
        """
        Metrics logged by reward functions: their mean over all calls and processes, weighted by numbers of samples.
        """
        collected: dict[str, list[tuple[float, int]]] = defaultdict(list)
        for metrics in gather_object([dict(self._pending_metrics)]):
            for name, values in metrics.items():
                collected[name] += values
        self._pending_metrics.clear()
        # An exact sum: calls that work at the same time come in any order.
        return {
            name: math.fsum(value * count for value, count in values) / sum(count for _, count in values)
            for name, values in collected.items()
        }

    def _total_rewards(
        self, rewards_per_func: torch.Tensor, group_size: int, failed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Weighted sums of the rewards, of shape `(num_samples,)`. A function without a single reward in a group does not
        apply there. A sample that lacks the reward of a function that applies has no total, NaN: its sum would not be
        comparable with the others'. The same holds for a sample to which no function applies, or for which one failed.
        Functions with a weight of 0, which only measure, decide none of this.

        Args:
            rewards_per_func (`torch.Tensor` of shape `(num_samples, num_reward_funcs)`):
                Rewards, whole groups one after the other, NaN where missing.
            group_size (`int`):
                Number of samples of a group.
            failed (`torch.Tensor` of shape `(num_samples, num_reward_funcs)`, *optional*):
                Where a function failed. By default nowhere.
        """
        weights = self.reward_weights.to(rewards_per_func.device)
        missing = rewards_per_func.isnan().view(-1, group_size, rewards_per_func.shape[1])
        applies = ~missing.all(1, keepdim=True) & (weights != 0)
        incomplete = ((missing & applies).any(2) | ~applies.any(2)).flatten()
        if failed is not None:
            incomplete = incomplete | (failed & (weights != 0)).any(1)
        totals = (rewards_per_func * weights).nansum(1)
        return totals.masked_fill(incomplete, math.nan)

    def _compute_advantages(
        self, rewards_per_func: torch.Tensor, failed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Group-relative advantages (equation 3 of the paper).

        Args:
            rewards_per_func (`torch.Tensor` of shape `(num_samples, num_reward_funcs)`):
                Rewards of the samples of all processes, whole groups one after the other, NaN where not applicable.
            failed (`torch.Tensor`, *optional*):
                Where a function failed, see [`_total_rewards`].

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`, each of shape `(num_samples,)`: the weighted sum of the
            rewards (NaN if one is missing, see [`_total_rewards`]), the advantages, and whether the sample's group has
            no spread or the sample no reward, so that nothing can be learned from it.
        """
        rewards = self._total_rewards(rewards_per_func, self.num_generations, failed)
        unscored = rewards.isnan()
        groups = rewards.view(-1, self.num_generations)
        centered = (groups - groups.nanmean(1, keepdim=True)).flatten()
        group_std = torch.nan_to_num(nanstd(groups, dim=1)).repeat_interleave(self.num_generations)
        # By the range, because the standard deviation of equal numbers is not always 0 in floating point. A group of
        # which fewer than two samples are scored has none either.
        spread = groups.nan_to_num(-math.inf).amax(1) - groups.nan_to_num(math.inf).amin(1)
        flat = (spread <= 1e-6).repeat_interleave(self.num_generations) | unscored
        if self.args.scale_rewards == "group":
            centered = centered / (group_std + 1e-4)
        elif self.args.scale_rewards == "batch":
            centered = centered / (torch.nan_to_num(nanstd(rewards)) + 1e-4)
        return rewards, centered.masked_fill(flat, 0.0), flat

    def training_step(self, model: nn.Module, inputs: list[int], num_items_in_batch=None) -> torch.Tensor:
        if hasattr(self.optimizer, "train"):  # schedule-free optimizers: sample from the weights that are trained
            self.optimizer.train()
        samples = self._prepare_inputs(inputs)
        # The samples of this update that are in the buffer: a pass may serve several microbatches.
        size, microbatch = self.args.per_device_train_batch_size, self._step % self.steps_per_generation
        begin = max(0, microbatch - self._accumulated)
        end = microbatch - self._accumulated + self.args.gradient_accumulation_steps
        update = (self._buffered_samples or [])[size * begin : size * end]
        model.train()
        with self._timed("train"), self._without_casts():
            loss = self._accumulate_gradients(model, samples, update)
            later = (self._buffered_samples or [])[size * (microbatch + 1) : size * end]
            still_needed = [sample.conditions for sample in later if self._learns(sample)]
            self._prefixes.keep(still_needed)
            for prefixes in self._other_prefixes.values():
                prefixes.keep(still_needed)
            learns = any(map(self._learns, samples))
            self._drop_bad_update(loss, [sample.case_id for sample in samples], learns)
        self._step += 1
        self._accumulated = 0 if self.accelerator.sync_gradients else self._accumulated + 1
        return loss

    def _accumulate_gradients(
        self, model: nn.Module, samples: list[Sample], update: list[Sample] | None = None
    ) -> torch.Tensor:
        """
        Adds the gradients of a microbatch.

        Args:
            model (`torch.nn.Module`):
                The model, as Trainer has wrapped it.
            samples (`list[Sample]`):
                The microbatch.
            update (`list[Sample]`, *optional*):
                All samples of the update, of which the microbatch is a part. Defaults to the microbatch.

        Returns:
            `torch.Tensor`: the loss, a scalar.
        """
        raise NotImplementedError

    def _record(self, name: str, values: torch.Tensor) -> None:
        """Updates sum, count, minimum and maximum of a statistic on the device, without synchronizing with it."""
        values = values.detach()
        new = torch.stack([values.sum(), values.new_tensor(len(values)), values.min(), values.max()])
        old = self._sample_stats.get(name)
        if old is not None:
            new = torch.stack([*(old[:2] + new[:2]), torch.minimum(old[2], new[2]), torch.maximum(old[3], new[3])])
        self._sample_stats[name] = new

    def _edit_usable(
        self, dataset: Dataset, indices: list[int]
    ) -> tuple[dict[int, tuple[dict[str, Any], list[Image.Image]]], list[Image.Image]]:
        """
        Row and images of the cases that can be used, by their place in `indices`, and `num_generations_eval` edits of
        each.
        """
        cases: dict[int, tuple[dict[str, Any], list[Image.Image]]] = {}

        def skip(error: BadCaseError) -> None:
            if self.args.on_bad_case == "error":
                raise BadCaseError(
                    f"{str(error).rstrip('.')}. Set on_bad_case='skip' to leave it out.", error.case_id
                ) from error
            logger.warning(f"{error} It is left out of the evaluation.", main_process_only=False)

        for place, index in enumerate(indices):
            try:
                cases[place] = self._read_case(dataset, index)
            except BadCaseError as error:
                skip(error)
        while cases:
            try:
                return cases, self.sample_edits(list(cases.values()), num_edits=self.args.num_generations_eval)
            except BadCaseError as error:  # from encoding, before anything is sampled
                skip(error)
                cases = {place: case for place, case in cases.items() if str(case[0]["id"]) != error.case_id}
        return {}, []

    # Evaluation samples the ODE, with a noise that belongs to the case: figures of different checkpoints, and of runs
    # with another number of processes, are comparable.
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.callback_handler.eval_dataloader = dataloader
        dataset, was_training = self._current_eval_dataset, self.model.training
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        results: list[dict[str, Any]] = []
        for indices in dataloader:
            # One entry per index, also of a bad case: a case is never judged in the place of another.
            local: list[list[dict[str, Any]]] = [[] for _ in indices]
            with self._passes_in_step():
                cases, images = self._edit_usable(dataset, indices)
            for place in set(range(len(indices))) - cases.keys():
                local[place] = [{"bad_cases": 1}]
            with in_step(self.accelerator):
                if cases:
                    edited = [place for place in cases for _ in range(self.args.num_generations_eval)]
                    rows = [cases[place][0] for place in edited]
                    rewards_per_func, failed, _ = self._calculate_rewards(rows, images)
                    for i, (place, row) in enumerate(zip(edited, rows, strict=True)):
                        result = {name: values[i] for name, values in self._pending_extra.items()}
                        result |= {"task": row.get("task"), "rewards": rewards_per_func[i].tolist()}
                        local[place].append(result | {"failed": failed[i].tolist()})
            self._pending_extra.clear()
            # The last batch may be filled up with repeated cases to keep the processes level; they are dropped here.
            gathered = self.accelerator.gather_for_metrics(local, use_gather_object=True)
            results += [result for case in gathered for result in case]
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.model.train(was_training)

        # As in training, a function without a single reward in a task does not apply there, and a case that lacks the
        # reward of one that applies has none.
        for task in {result["task"] for result in results if "rewards" in result}:
            members = [result for result in results if "rewards" in result and result["task"] == task]
            totals = self._total_rewards(
                torch.tensor([member["rewards"] for member in members]),
                len(members),
                torch.tensor([member.pop("failed") for member in members]),
            ).tolist()
            for member, total in zip(members, totals, strict=True):
                member |= {"reward": total, "frac_reward_missing": float(math.isnan(total))}
                member |= {} if task is None else {f"reward/{task}": total}
                for name, reward in zip(self.reward_func_names, member["rewards"], strict=True):
                    member[f"rewards/{name}/mean"] = reward

        # Metrics that reward functions logged per batch; metrics per case, which do not depend on batches, replace
        # them
        metrics: dict[str, float] = self._flush_pending_metrics()
        for name in sorted({name for result in results for name in result}):
            values = [result[name] for result in results if isinstance(result.get(name), int | float)]
            values = [value for value in values if not math.isnan(value)]
            if values:
                metrics[name] = sum(values) if name == "bad_cases" else sum(values) / len(values)
        if left_out := self._left_out[dataset._fingerprint]:
            metrics["bad_cases"] = metrics.get("bad_cases", 0) + left_out
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(results),
        )

    def _logged_statistics(self, stats: dict[str, list[tuple[float, ...]]]) -> dict[str, float]:
        """What is logged of the statistics of [`_record`]: sums, counts, minima and maxima of all processes."""
        return {name: sum(values[0]) / sum(values[1]) for name, values in stats.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a log of training, not of evaluation
            # All processes log at the same time, so their measurements are combined here.
            local = {name: values.tolist() for name, values in self._sample_stats.items()}
            gathered = gather_object([(local, self._bad_cases, self._tally)])
            names = sorted({name for stats, _, _ in gathered for name in stats})
            stats = {name: list(zip(*(s[name] for s, _, _ in gathered if name in s), strict=True)) for name in names}
            bad_cases = set().union(*(bad for _, bad, _ in gathered))
            tally = JudgeTally()
            for _, _, one in gathered:
                tally.merge(one)
            if tally.judgements or tally.failures:
                logs |= tally.metrics
            for name, values in self._metrics.items():
                known = [value for value in values if not math.isnan(value)]
                if known:
                    logs[name] = sum(known) / len(known)
            if isinstance(self.train_dataset, StreamedCases):
                left_out = self.train_dataset.num_left_out
            else:
                left_out = self._left_out.get(self.train_dataset._fingerprint, 0)
            if count := left_out + len(bad_cases):
                logs["bad_cases"] = count
            if self._skipped_updates:
                logs["skipped_updates"] = self._skipped_updates
            logs |= self._logged_statistics(stats)
            seconds = sum(self._phase_seconds.values())
            logs |= {f"time/{phase}": value for phase, value in self._phase_seconds.items()}
            logs["step_time"] = seconds / max(self.state.global_step - self._logged_steps, 1)
            if self._num_sampled:
                logs["images_per_second"] = self._num_sampled / seconds
            self._logged_steps = self.state.global_step
            self._num_sampled = 0
            self._metrics.clear()
            self._sample_stats.clear()
            self._bad_cases.clear()
            self._tally = JudgeTally()
            self._phase_seconds.clear()
            self._log_filled_passes(logs)
        super().log(logs, start_time)
        if "loss" in logs and self._completions:
            callbacks = [c for c in self.callback_handler.callbacks if isinstance(c, TensorBoardCallback)]
            log_completions_table(
                self._completions,
                self.state.global_step,
                self.args.output_dir,
                self.args.report_to,
                [callback.tb_writer for callback in callbacks if callback.tb_writer is not None],
                self.args.num_completions_to_print,
            )
            self._completions = []

    # A checkpoint also holds the number of microbatches and, if it lies inside a generation batch, the samples that
    # are still to be trained on, so that a resumed run is identical to an uninterrupted one.
    def _resume_files(self) -> list[str]:
        stream = [STREAM] if isinstance(self.train_dataset, StreamedCases) else []
        return super()._resume_files() + stream + [f"rollouts_{rank}.pt" for rank in range(self.args.world_size)]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        state: dict[str, Any] = {"step": self._step, "samples": None}
        if self._step % self.generate_every:
            state["samples"] = [
                {
                    "case_id": sample.case_id,
                    "group": sample.group,
                    "number": sample.number,
                    "conditions": vars(sample.conditions),
                    "trajectory": {
                        **vars(sample.trajectory),
                        "steps": (sample.trajectory.steps.start, sample.trajectory.steps.stop),
                    },
                    "advantage": sample.advantage,
                    "kl_weight": sample.kl_weight,
                }
                for sample in self._buffered_samples or []
            ]
        torch.save(state, os.path.join(output_dir, f"rollouts_{self.accelerator.process_index}.pt"))
        if isinstance(self.train_dataset, StreamedCases) and self.args.should_save:
            write_json(os.path.join(output_dir, STREAM), self.train_dataset.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        with in_step(self.accelerator):
            restore_stream(self.train_dataset, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self._logged_steps = self.state.global_step
        with in_step(self.accelerator):
            self._load_rollouts(checkpoint)

    def _load_rollouts(self, checkpoint: str) -> None:
        path = os.path.join(checkpoint, f"rollouts_{self.accelerator.process_index}.pt")
        if not os.path.isfile(path):  # `train` has said so
            return
        device = self.accelerator.device
        with restoring(checkpoint):
            # torch does not know of "cpu:1", which accelerate may call the device of a process
            state = torch.load(path, map_location="cpu" if device.type == "cpu" else device, weights_only=True)
            self._step = operator.index(state["step"])
            if state["samples"] is None:
                return
            # Samples of a case had one encoding, and have one in the file.
            cases = {id(s["conditions"]): EditConditions(**s["conditions"]) for s in state["samples"]}
            self._buffered_samples = [
                Sample(
                    case_id=sample["case_id"],
                    group=sample["group"],
                    number=sample["number"],
                    conditions=cases[id(sample["conditions"])],
                    trajectory=Trajectory(**{**sample["trajectory"], "steps": range(*sample["trajectory"]["steps"])}),
                    advantage=sample["advantage"],
                    kl_weight=sample["kl_weight"],
                )
                for sample in state["samples"]
            ]
        expected = self.args.per_device_train_batch_size * self.steps_per_generation
        if len(self._buffered_samples) != expected:
            raise ValueError(
                f"{checkpoint} was saved in the middle of a generation batch of {len(self._buffered_samples)} samples "
                f"per process, but the arguments give {expected}. Resume with the batch sizes of the checkpoint."
            )
