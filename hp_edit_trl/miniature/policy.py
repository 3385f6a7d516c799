"""The miniature's policy: a small `QwenImageEditPlusPipeline` that edits the miniature's scenes."""

from pathlib import Path

import torch
from diffusers import QwenImageEditPlusPipeline


WEIGHTS = Path(__file__).parent / "weights"


def load_pipeline() -> QwenImageEditPlusPipeline:
    """
    Loads the pretrained policy of the miniature, whose weights are part of the package. Its classes are those of
    diffusers and transformers; its transformer has 2.5 million parameters.

    It edits scenes of [`load_dataset`] at `resolution=32`, without guidance (`true_cfg_scale=1.0`), in about 5 steps.
    `examples/miniature/pretrain.py` trained it.

    Returns:
        [`~diffusers.QwenImageEditPlusPipeline`], in float32, on the CPU.
    """
    pipeline = QwenImageEditPlusPipeline.from_pretrained(str(WEIGHTS), dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
