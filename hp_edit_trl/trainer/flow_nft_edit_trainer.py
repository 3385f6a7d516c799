import contextlib
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

from ..flow.nft import awm_loss, nft_loss, optimality
from ..flow.preference import draw_sigma
from ..policies import EditConditions, Trajectory, bucketed, rollout_batches
from ..utils.seeding import seeded_generator
from .adapter_copy import AdapterCopy
from .base_edit_config import check_config
from .flow_nft_edit_config import FlowNFTEditConfig
from .online_edit_trainer import OnlineEditTrainer, RewardFunc, Sample


class FlowNFTEditTrainer(OnlineEditTrainer):
    r"""
    Trainer for online reinforcement learning of a LoRA on the forward process of image-editing models:
    [DiffusionNFT](https://huggingface.co/papers/2509.16117) or, with `loss_type="awm"`, [Advantage Weighted
    Matching](https://huggingface.co/papers/2509.25050). Edits are sampled along the ODE, without guidance; only
    they are kept, not the path to them. Noise is added to them, and the model learns to denoise the better ones of a
    group more than the policy that sampled them, and the worse ones less.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from hp_edit_trl import FlowNFTEditConfig, FlowNFTEditTrainer, HPScorerReward

    trainer = FlowNFTEditTrainer(
        model="Qwen/Qwen-Image-Edit-2509",
        reward_funcs=HPScorerReward("Qwen/Qwen3-VL-32B-Instruct"),
        args=FlowNFTEditConfig(output_dir="qwen-edit-nft"),
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
        args ([`FlowNFTEditConfig`], *optional*):
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
            The LoRA to train. Without `target_modules` it gets the policy's own list. By default rank 32 with an alpha
            of 64.

    Raises:
        `ValueError`: If a dataset, an option, a task or the model is not usable. Datasets and options are checked
            before any model is loaded.
        `ConnectionError`: If a judge on a server gives no judgements. `train` raises it too, see `max_failed_batches`.
    """

    _tag_names = ["hp-edit-trl", "diffusion-nft"]
    _name = "DiffusionNFT"
    _paper = {
        "title": "DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
        "id": "2509.16117",
        "citation": """\
@article{zheng2025diffusionnft,
    title   = {DiffusionNFT: Online Diffusion Reinforcement with Forward Process},
    author  = {Kaiwen Zheng and Huayu Chen and Haotian Ye and Haoxiang Wang and Qinsheng Zhang and Kai Jiang and
               Hang Su and Stefano Ermon and Jun Zhu and Ming-Yu Liu},
    journal = {arXiv preprint arXiv:2509.16117},
    year    = {2025}
}""",
    }

    _awm_paper = {
        "title": "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models",
        "id": "2509.25050",
        "citation": """\
@article{xue2025awm,
    title   = {Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models},
    author  = {Shuchen Xue and Chongjian Ge and Shilong Zhang and Yichen Li and Zhi-Ming Ma},
    journal = {arXiv preprint arXiv:2509.25050},
    year    = {2025}
}""",
    }

    _card_options = (
        "learning_rate", "num_generations", "generation_batch_size", "num_iterations", "resolution",
        "num_inference_steps", "guidance_scale", "num_trained_generations", "num_train_sigmas", "loss_type",
        "nft_beta", "awm_beta", "adv_clip_max", "old_decay_rate", "old_decay_max", "beta", "scale_rewards", "seed",
    )  # fmt: skip

    args: FlowNFTEditConfig

    def __init__(
        self,
        model: str | DiffusionPipeline,
        reward_funcs: RewardFunc | str | list[RewardFunc | str],
        args: FlowNFTEditConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else type(model).__name__
            args = FlowNFTEditConfig(f"{name.rstrip('/').split('/')[-1]}-NFT")
        check_config(args, FlowNFTEditConfig)
        if args.loss_type == "awm":
            self._name, self._paper = "Advantage Weighted Matching", self._awm_paper
            self._tag_names = ["hp-edit-trl", "advantage-weighted-matching"]
        loss_beta = args.nft_beta if args.loss_type == "nft" else args.awm_beta
        assert loss_beta is not None  # the config saw to it
        self.loss_beta = loss_beta
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, callbacks, optimizers, peft_config)
        self._copies["old"] = AdapterCopy(self.model)  # the policy that samples

    def _rollout(
        self,
        generation: int,
        rows: list[dict[str, Any]],
        groups: list[int],
        conditions: list[EditConditions],
        generators: list[torch.Generator],
    ) -> Iterator[tuple[list[int], list[Trajectory]]]:
        return rollout_batches(
            self.policy,
            self.model,
            conditions,
            generators,
            num_inference_steps=self.args.num_inference_steps,
            true_cfg_scale=self.true_cfg_scale,
            batch_size=self.args.rollout_batch_size,
        )

    def _sampling(self) -> contextlib.AbstractContextManager[None]:
        return self._copies["old"].applied()

    def _passes(self, samples: list[Sample]) -> list[list[Sample]]:
        """
        The samples of each pass with gradients for a microbatch. Each sample is in `num_train_sigmas` of them; those
        that are made for the sake of other processes have one that does not learn.
        """
        learning = [sample for sample in samples if self._learns(sample)]
        batches = bucketed([sample.conditions for sample in learning], len(learning))
        passes = [[learning[i] for i in members] for members in batches for _ in range(self.args.num_train_sigmas)]
        missing = self._missing_passes(len(passes))
        if not len(passes) + missing and self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            missing = 1  # the other processes wait for a backward pass of this one
        return passes + [[replace(samples[0], advantage=0.0, kl_weight=0.0)]] * missing

    def _accumulate_gradients(
        self, model: nn.Module, samples: list[Sample], update: list[Sample] | None = None
    ) -> torch.Tensor:
        args, policy, device = self.args, self.policy, self.accelerator.device
        # Each pass over the generation batch draws other noise and noise levels.
        generation, microbatch = divmod(self._step, self.generate_every)
        address = (args.seed, "forward", generation, microbatch // self.steps_per_generation)
        generators = {
            (sample.group, sample.number): seeded_generator(*address, sample.case_id, sample.group, sample.number)
            for sample in samples
        }
        passes = self._passes(samples)
        left = len(passes)
        num_terms = len(samples) * args.num_train_sigmas * self.current_gradient_accumulation_steps
        total = torch.zeros((), device=device)
        for trained in passes:
            left -= 1
            learns = self._learns(trained[0])
            own = [generators[sample.group, sample.number] for sample in trained]
            clean = torch.stack([sample.trajectory.final for sample in trained])
            sigmas = torch.stack([draw_sigma(trained[0].trajectory.sigmas, "uniform", one) for one in own]).to(device)
            noise = torch.stack([torch.randn(clean.shape[1:], generator=one) for one in own]).to(device)
            latents = torch.lerp(clean, noise, sigmas[:, None, None])
            optimal = optimality(torch.tensor([s.advantage for s in trained], device=device), args.adv_clip_max)
            batch = policy.collate([sample.conditions for sample in trained])
            sync = contextlib.nullcontext() if left == 0 else self.accelerator.no_sync(model)
            with sync, self.compute_loss_context_manager():
                with torch.no_grad(), self._copies["old"].applied():
                    batch = self._other_prefixes["old"].added(batch, self.model)
                    old_velocity = policy.velocity(self.model, latents, sigmas, batch, self.true_cfg_scale)
                batch = self._prefixes.added(batch, model, left == 0 and self.accelerator.sync_gradients)
                velocity = policy.velocity(model, latents, sigmas, batch, self.true_cfg_scale)
                predictions = velocity, old_velocity, clean, noise, sigmas
                # In the scale of NFT's paper: at the old policy a gradient depends on neither beta nor adv_clip_max.
                if args.loss_type == "nft":
                    losses = nft_loss(*predictions, optimal, self.loss_beta) * args.adv_clip_max / self.loss_beta
                else:
                    losses = awm_loss(*predictions, 2 * optimal - 1, self.loss_beta) * args.adv_clip_max
                if args.beta != 0.0:
                    with torch.no_grad(), use_adapter(self.accelerator.unwrap_model(model), None):
                        batch = self._other_prefixes["reference"].added(batch, self.model)
                        reference = policy.velocity(self.model, latents, sigmas, batch, self.true_cfg_scale)
                    kl = (velocity - reference).square().flatten(1).mean(1)
                    losses = losses + args.beta * kl
                    if learns:
                        self._record("kl", kl)
                loss = losses.sum() / num_terms
                self.accelerator.backward(loss if learns else 0 * loss)
            if learns:
                total += loss.detach()
                self._record("old_deviation", (velocity - old_velocity).square().flatten(1).mean(1))
        return total

    # The policy that samples follows when all updates from a generation batch are made.
    def _follow_weights(self) -> None:
        super()._follow_weights()
        if self._step % self.generate_every == 0:
            decay = min(self.args.old_decay_rate * (self.state.global_step + 1), self.args.old_decay_max)
            self._copies["old"].update(decay)
            self._metrics["old_decay"].append(decay)
