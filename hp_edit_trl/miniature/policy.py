"""The miniature's policy: a small `QwenImageEditPlusPipeline` that edits the miniature's scenes."""

from pathlib import Path

import torch
from diffusers import QwenImageEditPlusPipeline


WEIGHTS = Path(__file__).parent / "weights"


def load_pipeline() -> QwenImageEditPlusPipeline:
    """
    Loads the pretrained miniature: stock classes, a transformer of 2.5 million parameters, weights from the package.

    It edits scenes of [`load_dataset`] at `resolution=32`, without guidance (`true_cfg_scale=1.0`), in about 5 steps.
    `pretrain.py` made it.

    Returns:
        [`~diffusers.QwenImageEditPlusPipeline`], in float32, on the CPU.
    """
    pipeline = QwenImageEditPlusPipeline.from_pretrained(str(WEIGHTS), dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
