from dataclasses import dataclass, field

from ..flow.dynamics import DYNAMICS
from .online_edit_config import OnlineEditConfig


DEFAULT_WINDOW = 4  # steps


@dataclass(repr=False)
class FlowGRPOEditConfig(OnlineEditConfig):
    r"""
    Configuration class for the [`FlowGRPOEditTrainer`].

    This class includes only the parameters that are specific to Flow-GRPO. For data, batches, rewards, logging and
    the model, see [`OnlineEditConfig`]; for the other training arguments, [`~transformers.TrainingArguments`].

    The HP-Edit paper gives the learning rate, the LoRA rank, the optimizer and the reward's sigmoid. It does not give
    group size, steps, resolution, noise level, clip range or KL weight: those defaults are what public trainers use
    for Qwen-Image-Edit, and are marked *field*.

    Parameters:
        > Parameters that control sampling

        true_cfg_scale (`float`, *optional*):
            Scale of classifier-free guidance, in sampling and in training. Defaults to the pipeline's recommended
            value: 4.0 for Qwen-Image-Edit and the base models of FLUX.2-klein, 1.0 for FLUX.1-Kontext and the
            distilled models. At 1.0 there is no unconditional pass: training is faster and tends to be more stable.
        negative_prompt (`str`, *optional*):
            Prompt of the unconditional pass. Defaults to the pipeline's recommended one.
        dynamics (`str`, *optional*, defaults to `"flow_sde"`):
            How the stochastic steps add noise: `"flow_sde"` (the paper's equation 6), `"cps"` or `"dance_sde"`.
        noise_level (`float`, *optional*, defaults to `1.0`):
            How much noise they add (\\( \eta \\), *field*). For `"cps"` at most 1.0, which replaces all noise; its
            authors use 0.7 to 0.9.
        sde_window_size (`int`, *optional*):
            Number of consecutive steps that are stochastic and trained. The others follow the ODE. Defaults to 4
            (*field*), or to fewer where `sde_window_range` or the steps without the last one are fewer.
        sde_window_range (`list[int]`, *optional*):
            First step and end (exclusive) of the steps that the window may cover. Defaults to the first half of the
            steps, or as many as the window needs (*field*). The last step is never stochastic.
        sde_window_mode (`str`, *optional*, defaults to `"random"`):
            `"fixed"`, `"random"` or `"sliding"`: where the window lies in each generation batch (*field*).
        same_latent (`bool`, *optional*, defaults to `False`):
            Let the edits of a case start from the same noise. The steps before the window and the prediction at its
            first step are then computed once per case and process, in sampling and in training. Edits of a group
            differ by the noise of the window alone.
        num_finish_steps (`int`, *optional*, defaults to `2`):
            Number of steps in which a rollout is finished after the window, with a method of second order, if more
            are left. With `None`, and where fewer are left, the schedule's own steps are taken.

        > Parameters that control the training

        epsilon (`float`, *optional*, defaults to `1e-4`):
            Clip range of the probability ratio (*field*). Log-probabilities are means over latent dimensions, hence so
            small.
        epsilon_high (`float`, *optional*):
            Upper clip range. Defaults to `epsilon`.
        normalize_ratio (`bool`, *optional*, defaults to `False`):
            Normalize the probability ratio, and weight each step by \\( 1 / |dt| \\), as
            [GRPO-Guard](https://huggingface.co/papers/2510.22319) does, so that clipping works alike at every step.
            The normalized ratio is closer to 1: `epsilon` should be smaller with it. Its authors derive it for
            Flow-SDE; with the other dynamics it is the same formula, without that derivation.
        weight_by_noise (`bool`, *optional*, defaults to `False`):
            Weight the policy's loss at each step by the standard deviation of the noise that the step adds, relative
            to the mean over the steps of `sde_window_range`, as
            [TempFlow-GRPO](https://huggingface.co/papers/2508.04324) does. Not together with `normalize_ratio`, which
            has weights of its own.
    """

    # Parameters that control sampling
    true_cfg_scale: float | None = field(
        default=None,
        metadata={
            "help": "Guidance scale, in sampling and training. 1.0 disables the unconditional pass. Defaults to the "
            "policy's."
        },
    )
    negative_prompt: str | None = field(
        default=None, metadata={"help": "Prompt of the unconditional pass. Defaults to the policy's."}
    )
    dynamics: str = field(
        default="flow_sde",
        metadata={
            "help": "How the stochastic steps add noise.",
            "choices": [name for name in DYNAMICS if name != "ode"],
        },
    )
    noise_level: float = field(default=1.0, metadata={"help": "How much noise the stochastic steps add (eta)."})
    sde_window_size: int | None = field(
        default=None,
        metadata={"help": "Number of consecutive steps that are stochastic and trained. Default: 4, if so many fit."},
    )
    sde_window_range: list[int] | None = field(
        default=None,
        metadata={"help": "First step and end (exclusive) of the steps that the window may cover."},
    )
    sde_window_mode: str = field(
        default="random",
        metadata={
            "help": "Where the window lies in each generation batch.",
            "choices": ["fixed", "random", "sliding"],
        },
    )
    same_latent: bool = field(
        default=False, metadata={"help": "Let the edits of a case start from the same noise, which saves passes."}
    )
    num_finish_steps: int | None = field(
        default=2, metadata={"help": "Number of steps of second order after the window. None: the schedule's own."}
    )

    # Parameters that control the training
    epsilon: float = field(default=1e-4, metadata={"help": "Clip range of the probability ratio."})
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Upper clip range of the probability ratio. Defaults to `epsilon`."}
    )
    normalize_ratio: bool = field(
        default=False, metadata={"help": "Normalize the probability ratio, and weight steps, as GRPO-Guard does."}
    )
    weight_by_noise: bool = field(
        default=False, metadata={"help": "Weight the loss of each step by the noise that it adds."}
    )

    def __post_init__(self):
        super().__post_init__()

        for name, choices in (
            ("dynamics", [name for name in DYNAMICS if name != "ode"]),
            ("sde_window_mode", ["fixed", "random", "sliding"]),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: use one of {choices}.")
        for name in ("sde_window_size", "true_cfg_scale", "num_finish_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("epsilon", "epsilon_high", "noise_level"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        if self.weight_by_noise and self.normalize_ratio:
            raise ValueError(
                "weight_by_noise=True and normalize_ratio=True both weight the steps: leave out one of the two."
            )
        if self.dynamics == "cps" and self.noise_level > 1:
            raise ValueError(f"noise_level={self.noise_level} must be at most 1 for dynamics='cps'.")

        # The last step ends at sigma 0, where the added noise would vanish and its density would not exist.
        last = self.num_inference_steps - 1
        if last < 1:
            raise ValueError("num_inference_steps=1 must be at least 2: the last step is never stochastic.")
        if self.sde_window_range is None:
            size = self.sde_window_size or min(DEFAULT_WINDOW, last)
            self.sde_window_range = [0, max(size, self.num_inference_steps // 2)]
        if len(self.sde_window_range) != 2:
            raise ValueError(f"sde_window_range={self.sde_window_range} must be two numbers: first step and end.")
        start, stop = self.sde_window_range
        if self.sde_window_size is None:
            self.sde_window_size = max(1, min(DEFAULT_WINDOW, stop - start))
        if start < 0 or stop > last or stop - start < self.sde_window_size:
            raise ValueError(
                f"The SDE window does not fit: sde_window_size={self.sde_window_size} steps in "
                f"sde_window_range=[{start}, {stop}) with num_inference_steps={self.num_inference_steps}. The range "
                f"must lie within [0, {last}), because the last step is never stochastic, and hold the window."
            )
