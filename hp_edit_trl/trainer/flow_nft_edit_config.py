from dataclasses import dataclass, field
from typing import ClassVar

from ..flow.nft import LOSS_TYPES
from .online_edit_config import OnlineEditConfig


@dataclass(repr=False)
class FlowNFTEditConfig(OnlineEditConfig):
    r"""
    Configuration class for the [`FlowNFTEditTrainer`].

    This class includes only the parameters that are specific to DiffusionNFT and Advantage Weighted Matching. For
    data, batches, rewards, logging and the model, see [`OnlineEditConfig`]; for the other training arguments,
    [`~transformers.TrainingArguments`].
    There is no classifier-free guidance, neither in sampling nor in training: the method replaces it.

    Defaults are those of the [paper](https://huggingface.co/papers/2509.16117) and its code, except for the number of
    noise levels.

    Parameters:
        > Parameters that control the training

        loss_type (`str`, *optional*, defaults to `"nft"`):
            `"nft"`, the loss of DiffusionNFT, or `"awm"`, that of [Advantage Weighted
            Matching](https://huggingface.co/papers/2509.25050): the probability ratio of the edit times its
            advantage, with the error of flow matching in the place of the log-likelihood. Everything else is the same.
        nft_beta (`float`, *optional*):
            With `loss_type="nft"`, to which it belongs, defaults to 1.0. How far the implicit positive and negative
            policies are from the one that sampled (\\( \beta \\) in the paper). At 1.0 the positive policy is the
            trained one. Smaller values make larger steps.
        awm_beta (`float`, *optional*):
            With `loss_type="awm"`, to which it belongs, defaults to 1.0. Weight of the mean squared difference to the
            velocity of the policy that sampled. Smaller values make larger steps.
        adv_clip_max (`float`, *optional*, defaults to `5.0`):
            Advantages are clipped to this range; one at its end counts as optimal, or as the opposite.
        num_train_sigmas (`int`, *optional*, defaults to `2`):
            Number of noise levels that each edit is trained at in each pass over a generation batch. They are drawn
            at random along the schedule of sampling. Each takes a pass with gradients, and one without of the policy
            that sampled.
        old_decay_rate (`float`, *optional*, defaults to `0.001`):
            After a generation batch the policy that samples becomes \\( d \\) times itself and \\( 1 - d \\) times the
            trained one, with \\( d \\) this rate times the number of updates so far, at most `old_decay_max`. At 0.0
            the next batch is always sampled with the trained policy.
        old_decay_max (`float`, *optional*, defaults to `0.5`):
            Largest decay.
        beta (`float`, *optional*, defaults to `1e-4`):
            Weight of the mean squared difference to the velocity of the model without the adapter. At 0.0 it is not
            computed.
    """

    # Not options: there is no unconditional pass.
    true_cfg_scale: ClassVar[float] = 1.0
    negative_prompt: ClassVar[str | None] = None

    # Parameters that control the training
    loss_type: str = field(
        default="nft",
        metadata={"help": "Loss of DiffusionNFT or of Advantage Weighted Matching.", "choices": LOSS_TYPES},
    )
    nft_beta: float | None = field(
        default=None,
        metadata={"help": "NFT: how far the implicit policies are from the one that sampled. Default: 1.0."},
    )
    awm_beta: float | None = field(
        default=None,
        metadata={"help": "AWM: weight of the difference to the velocity of the policy that sampled. Default: 1.0."},
    )
    adv_clip_max: float = field(default=5.0, metadata={"help": "Advantages are clipped to this range."})
    num_train_sigmas: int = field(
        default=2, metadata={"help": "Number of noise levels that each edit is trained at in each pass."}
    )
    old_decay_rate: float = field(
        default=0.001, metadata={"help": "By how much an update raises the decay of the policy that samples."}
    )
    old_decay_max: float = field(default=0.5, metadata={"help": "Largest decay of the policy that samples."})
    beta: float = field(
        default=1e-4, metadata={"help": "Weight of the difference to the velocity of the model without adapter."}
    )

    def __post_init__(self):
        super().__post_init__()

        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type={self.loss_type!r} is not known: use one of {LOSS_TYPES}.")
        for loss_type in LOSS_TYPES:
            name = f"{loss_type}_beta"
            if loss_type == self.loss_type:
                setattr(self, name, 1.0 if getattr(self, name) is None else getattr(self, name))
            elif getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} belongs to loss_type={loss_type!r} and means nothing with "
                    f"loss_type={self.loss_type!r}: leave out one of the two."
                )
        for name in (f"{self.loss_type}_beta", "adv_clip_max"):
            if not getattr(self, name) > 0:  # nor NaN
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        if self.num_train_sigmas < 1:
            raise ValueError(f"num_train_sigmas={self.num_train_sigmas} must be at least 1.")
        if not (self.old_decay_rate >= 0 and 0 <= self.old_decay_max < 1):
            raise ValueError(
                f"old_decay_rate={self.old_decay_rate} must not be negative, and old_decay_max={self.old_decay_max} "
                "must be at least 0 and below 1: at 1 the policy that samples would never change."
            )
        assert self.steps_per_generation
        microbatches = self.steps_per_generation * self.num_iterations
        if microbatches % self.gradient_accumulation_steps:
            raise ValueError(
                f"A generation batch of steps_per_generation={self.steps_per_generation} * num_iterations="
                f"{self.num_iterations} microbatches must be divisible by gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: the policy that samples changes between generation batches, not "
                "inside of an update."
            )
