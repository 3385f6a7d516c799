import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback
from trl.trainer.utils import use_adapter

from ..flow.dynamics import kl_divergence, log_prob, noise_weight, normalized_log_ratio, sde_window, transition
from ..policies import EditConditions, Trajectory, bucketed, rollout_batches
from ..utils.seeding import seeded_generator
from .base_edit_config import check_config
from .flow_grpo_edit_config import FlowGRPOEditConfig
from .online_edit_trainer import OnlineEditTrainer, RewardFunc, Sample


class FlowGRPOEditTrainer(OnlineEditTrainer):
    r"""
    Trainer for Flow-GRPO on image-editing models, the third stage of HP-Edit: online reinforcement learning of a LoRA
    with group-relative advantages, on the stochastic steps of a flow-matching sampler
    ([Flow-GRPO](https://huggingface.co/papers/2505.05470)).

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from hp_edit_trl import FlowGRPOEditConfig, FlowGRPOEditTrainer, HPScorerReward

    trainer = FlowGRPOEditTrainer(
        model="Qwen/Qwen-Image-Edit-2509",
        reward_funcs=HPScorerReward("Qwen/Qwen3-VL-32B-Instruct"),
        args=FlowGRPOEditConfig(output_dir="qwen-edit-hp"),
        train_dataset=load_dataset("someone/RealPref-50K", split="train"),
        peft_config=LoraConfig(r=32, lora_alpha=64),
    )
    trainer.train()
    trainer.push_to_hub()
    ```

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The editor: a Hub id, a local folder, or a loaded pipeline. See the table of supported pipelines in the
            documentation.
        reward_funcs (`Callable`, `str` or a list of them):
            One or several reward functions. A string stands for [`HPScorerReward`] by a judge: its Hub id or local
            folder, or the address of its server, e.g. `"http://localhost:8000/v1"`. Functions, sync or async, are
            called as in TRL: with `prompts`, `completions` (the edited
            PIL images), every other column of the dataset as a list (`image` or `images` and `task` included),
            `trainer_state`, `log_extra` and `log_metric`. Each returns a list with a reward per completion, `None`
            where it does not apply.
        args ([`FlowGRPOEditConfig`], *optional*):
            Configuration of this trainer.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The cases: `prompt`, and `image` or `images`. Optional: `id` (kept with everything that is made of the
            case; by default its row number), `task`, `requirement`, and columns for the reward functions. A stream
            needs `max_steps`.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Cases for evaluation.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Further callbacks.
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*,
        defaults to `(None, None)`):
            Optimizer and scheduler, if not those that `args` names.
        peft_config ([`~peft.LoraConfig`], *optional*):
            The LoRA to train. Without `target_modules` it gets the policy's own list. By default the paper's rank of
            32 with an alpha of 64.

    Raises:
        `ValueError`: If a dataset, an option, a task or the model is not usable. Datasets and options are checked
            before any model is loaded.
        `ConnectionError`: If a judge on a server gives no judgements. `train` raises it too, see `max_failed_batches`.
    """

    _tag_names = ["hp-edit-trl", "flow-grpo"]
    _name = "Flow-GRPO"
    _paper = {
        "title": "Flow-GRPO: Training Flow Matching Models via Online RL",
        "id": "2505.05470",
        "citation": """\
@article{liu2025flowgrpo,
    title   = {Flow-GRPO: Training Flow Matching Models via Online RL},
    author  = {Jie Liu and Gongye Liu and Jiajun Liang and Yangguang Li and Jiaheng Liu and Xintao Wang and
               Pengfei Wan and Di Zhang and Wanli Ouyang},
    journal = {arXiv preprint arXiv:2505.05470},
    year    = {2025}
}""",
    }

    _card_options = (
        "learning_rate", "num_generations", "generation_batch_size", "num_iterations", "resolution",
        "num_inference_steps", "true_cfg_scale", "guidance_scale", "dynamics", "noise_level", "sde_window_size",
        "sde_window_range", "sde_window_mode", "same_latent", "num_finish_steps", "num_trained_generations",
        "epsilon", "weight_by_noise", "beta", "scale_rewards", "seed",
    )  # fmt: skip

    args: FlowGRPOEditConfig

    def __init__(
        self,
        model: str | DiffusionPipeline,
        reward_funcs: RewardFunc | str | list[RewardFunc | str],
        args: FlowGRPOEditConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else type(model).__name__
            args = FlowGRPOEditConfig(f"{name.rstrip('/').split('/')[-1]}-Flow-GRPO")
        check_config(args, FlowGRPOEditConfig)
        assert args.sde_window_range and args.sde_window_size  # the config saw to it
        self.sde_window_size = args.sde_window_size
        self.sde_window_range = (args.sde_window_range[0], args.sde_window_range[1])
        self.epsilon_low = args.epsilon
        self.epsilon_high = args.epsilon_high if args.epsilon_high is not None else args.epsilon
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, callbacks, optimizers, peft_config)

    # One SDE window for the whole generation batch. With `same_latent` the samples of a group start from one noise.
    def _rollout(
        self,
        generation: int,
        rows: list[dict[str, Any]],
        groups: list[int],
        conditions: list[EditConditions],
        generators: list[torch.Generator],
    ) -> Iterator[tuple[list[int], list[Trajectory]]]:
        args = self.args
        steps = sde_window(
            args.sde_window_mode,
            self.sde_window_size,
            self.sde_window_range,
            generation,
            seeded_generator(args.seed, "window", generation),
        )
        start_generators = None
        if args.same_latent:
            by_group = {
                group: seeded_generator(args.seed, "start", generation, str(row["id"]), group)
                for row, group in zip(rows, groups, strict=True)
            }
            start_generators = [by_group[group] for group in groups]
        return rollout_batches(
            self.policy,
            self.model,
            conditions,
            generators,
            num_inference_steps=args.num_inference_steps,
            true_cfg_scale=self.true_cfg_scale,
            batch_size=args.rollout_batch_size,
            dynamics=args.dynamics,
            noise_level=args.noise_level,
            steps=steps,
            start_generators=start_generators,
            num_finish_steps=args.num_finish_steps,
            keep_means=args.normalize_ratio,
        )

    # With `same_latent` groups as a whole
    def _shuffled(self, samples: list[Sample], generator: torch.Generator) -> list[Sample]:
        samples = super()._shuffled(samples, generator)
        if self.args.same_latent:
            places = {group: i for i, group in enumerate(dict.fromkeys(sample.group for sample in samples))}
            samples = sorted(samples, key=lambda sample: places[sample.group])
        return samples

    def _passes(
        self, samples: list[Sample], update: list[Sample]
    ) -> list[tuple[list[Sample], list[Sample], list[int], range]]:
        """
        The passes through the model for a microbatch, in batches of equal sizes. For each batch: the samples whose
        latents are its inputs, the samples that are trained, the input of each of these, and the steps of the window
        at which there is a pass.

        With `same_latent` the samples of a group have one input at the first step. One pass serves all those of the
        update, with the microbatch that has the first of them.
        """
        window = len(samples[0].trajectory.steps)
        learning = [sample for sample in samples if self._learns(sample)]
        passes = []
        for members in bucketed([sample.conditions for sample in learning], len(learning)):
            batch = [learning[i] for i in members]
            passes.append((batch, batch, list(range(len(batch))), range(1 if self.args.same_latent else 0, window)))
        if self.args.same_latent:
            groups: dict[int, list[Sample]] = defaultdict(list)
            for sample in filter(self._learns, update):
                groups[sample.group].append(sample)
            leaders = [sample for sample in learning if groups[sample.group][0] is sample]
            for members in bucketed([sample.conditions for sample in leaders], len(leaders)):
                batch = [leaders[i] for i in members]
                trained = [(sample, row) for row, leader in enumerate(batch) for sample in groups[leader.group]]
                passes.append((batch, [sample for sample, _ in trained], [row for _, row in trained], range(1)))
        number = sum(len(steps) for *_, steps in passes)
        missing = self._missing_passes(number)
        if not number + missing and self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            missing = 1  # the other processes wait for a backward pass of this one
        idle = replace(samples[0], advantage=0.0, kl_weight=0.0)
        return passes + [([idle], [idle], [0], range(window - 1, window))] * missing

    def _accumulate_gradients(
        self, model: nn.Module, samples: list[Sample], update: list[Sample] | None = None
    ) -> torch.Tensor:
        # One backward pass per step of each batch: memory holds the activations of one step, however many there are.
        # Under DDP only the last one synchronizes; the processes may differ in their number.
        passes = self._passes(samples, samples if update is None else update)
        left = sum(len(steps) for *_, steps in passes)
        num_terms = len(samples) * len(samples[0].trajectory.steps) * self.current_gradient_accumulation_steps
        total = torch.zeros((), device=self.accelerator.device)
        for inputs, trained, rows, steps in passes:
            batch = self.policy.collate([sample.conditions for sample in inputs])
            path = inputs[0].trajectory
            before = torch.stack([sample.trajectory.latents for sample in inputs], dim=1)
            after = torch.stack([sample.trajectory.latents for sample in trained], dim=1)
            old_log_probs = torch.stack([sample.trajectory.log_probs for sample in trained], dim=1)
            advantages = torch.tensor([sample.advantage for sample in trained], device=after.device)
            kl_weights = torch.tensor([sample.kl_weight for sample in trained], device=after.device)
            for k in steps:
                step = path.steps[k]
                left -= 1
                sync = contextlib.nullcontext() if left == 0 else self.accelerator.no_sync(model)
                with sync, self.compute_loss_context_manager():
                    batch = self._prefixes.added(batch, model, left == 0 and self.accelerator.sync_gradients)
                    mean, std = self._transition(model, before[k], path, step, batch)
                    log_probs = log_prob(self.args.dynamics, after[k + 1], mean[rows], std)
                    log_ratio = log_probs - old_log_probs[k]
                    if self.args.normalize_ratio:
                        old_mean = torch.stack([sample.trajectory.means[k] for sample in trained])
                        ratio = torch.exp(normalized_log_ratio(after[k + 1], mean[rows], old_mean, std))
                    else:
                        ratio = torch.exp(log_ratio)
                    clipped = torch.clamp(ratio, 1 - self.epsilon_low, 1 + self.epsilon_high)
                    losses = -torch.min(ratio * advantages, clipped * advantages)
                    if self.args.normalize_ratio:
                        losses = losses / (path.sigmas[step] - path.sigmas[step + 1])
                    if self.args.weight_by_noise:
                        losses = losses * noise_weight(
                            self.args.dynamics, path.sigmas, step, self.sde_window_range, self.args.noise_level
                        ).to(losses.device)
                    if self.args.beta != 0.0:
                        with torch.no_grad(), use_adapter(self.accelerator.unwrap_model(model), None):
                            batch = self._other_prefixes["reference"].added(batch, self.model)
                            mean_ref, _ = self._transition(self.model, before[k], path, step, batch)
                        kl = kl_divergence(mean, mean_ref, std)[rows]
                        losses = losses + self.args.beta * kl_weights * kl
                        if self._learns(trained[0]):
                            self._record("kl", kl)
                    loss = losses.sum() / num_terms
                    self.accelerator.backward(loss)
                total += loss.detach()
                if not self._learns(trained[0]):  # a pass for the sake of other processes
                    continue
                self._record(f"logp_diff/step_{step}", log_ratio.abs())
                low = (ratio < 1 - self.epsilon_low) & (advantages < 0)
                high = (ratio > 1 + self.epsilon_high) & (advantages > 0)
                self._record("clip_low", low.float().mean().expand(len(low)))
                self._record("clip_high", high.float().mean().expand(len(high)))
        return total

    def _transition(
        self, model: nn.Module, latents: torch.Tensor, path: Trajectory, step: int, batch: dict
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sigmas = path.sigmas
        velocity = self.policy.velocity(model, latents, sigmas[step], batch, self.true_cfg_scale)
        return transition(
            self.args.dynamics, latents, velocity, sigmas[step], sigmas[step + 1], self.args.noise_level, sigmas[1]
        )

    def _logged_statistics(self, stats: dict[str, list[tuple[float, ...]]]) -> dict[str, float]:
        means = super()._logged_statistics(stats)
        if not stats:
            return means
        low, high = means.pop("clip_low"), means.pop("clip_high")
        return {
            "clip_ratio/low_mean": low,
            "clip_ratio/low_min": min(stats["clip_low"][2]),
            "clip_ratio/high_mean": high,
            "clip_ratio/high_max": max(stats["clip_high"][3]),
            "clip_ratio/region_mean": low + high,
            **means,
        }
