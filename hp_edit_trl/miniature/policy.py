"""The miniature's policy: a small `QwenImageEditPlusPipeline` that edits the miniature's scenes."""

from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageEditPlusPipeline

from ..trainer.flow_grpo_edit_config import FlowGRPOEditConfig


WEIGHTS = Path(__file__).parent / "weights"
RESOLUTION = 32  # of the scenes, in pixels
# Of `training_args`; docs/miniature.md lists them
TRAINING_OPTIONS: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
    "resolution": RESOLUTION, "num_inference_steps": 5, "true_cfg_scale": 1.0, "noise_level": 0.7,
    "sde_window_size": 3, "sde_window_range": [0, 3], "same_latent": True, "weight_by_noise": True,
    "num_generations": 12, "num_trained_generations": 6, "per_device_train_batch_size": 24,
    "gradient_accumulation_steps": 1, "steps_per_generation": 2, "rollout_batch_size": 96, "max_steps": 480,
    "learning_rate": 4e-4, "lr_scheduler_type": "linear", "epsilon": 1e-3, "logging_steps": 4,
    "per_device_eval_batch_size": 100,
}  # fmt: skip


def load_pipeline() -> QwenImageEditPlusPipeline:
    """
    Loads the pretrained policy of the miniature, whose weights are part of the package. Its classes are those of
    diffusers and transformers; its transformer has 2.5 million parameters.

    It edits scenes of [`load_dataset`] at `resolution=32`, without guidance (`true_cfg_scale=1.0`), in about 5 steps:
    [`training_args`] has these options.
    `examples/miniature/pretrain.py` trained it.

    Returns:
        [`~diffusers.QwenImageEditPlusPipeline`], in float32, on the CPU.
    """
    pipeline = QwenImageEditPlusPipeline.from_pretrained(str(WEIGHTS), dtype=torch.float32, local_files_only=True)
    pipeline.register_to_config(_native_resolution=RESOLUTION)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def training_args(output_dir: str, **options: Any) -> FlowGRPOEditConfig:
    """
    The options that suit the miniature's policy on a CPU, as in `examples/configs/embedded.yaml`: about eight
    minutes on one core. `docs/miniature.md` lists them. The defaults of [`FlowGRPOEditConfig`] are those of
    full-size pipelines.

    Args:
        output_dir (`str`):
            The output folder.
        **options:
            Other options of [`FlowGRPOEditConfig`], or other values. Values that are not given follow them: with fewer
            than 4 denoising steps the SDE window is smaller; of an even `num_generations` half are trained on, of an
            odd one all; with `normalize_ratio` the steps have no further weights; with `gradient_accumulation_steps`
            or `generation_batch_size` the steps per generation are those of the config.

    Raises:
        `ValueError`: If an option is not valid.
    """
    values = TRAINING_OPTIONS | options
    size = min(values["sde_window_size"], values["num_inference_steps"] - 1)
    if not options.keys() & {"sde_window_size", "sde_window_range"} and size > 0:
        values |= {"sde_window_size": size, "sde_window_range": [0, size]}
    sampled = values["num_generations"]
    values["num_trained_generations"] = None if sampled % 2 else sampled // 2
    if options.get("normalize_ratio"):
        values["weight_by_noise"] = False
    if options.keys() & {"gradient_accumulation_steps", "generation_batch_size"}:
        values["steps_per_generation"] = None
    return FlowGRPOEditConfig(output_dir, **values | options)
