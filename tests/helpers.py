"""What several tests need: small cases, rewards that can be worked out by hand, a config for the CPU."""

import numpy as np
from datasets import Dataset
from PIL import Image

from hp_edit_trl import FlowGRPOEditConfig


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def make_cases(count: int = 6, sizes=((64, 64), (128, 64))) -> Dataset:
    tasks = ["add", "remove", "swap", "background", "color", "bokeh", "relight", "style"]
    return Dataset.from_list(
        [
            {
                "id": f"case-{i}",
                "prompt": f"Make it red{' and bright' * (i % 3)}, number {i}",
                "image": photo(*sizes[i % len(sizes)], seed=i),
                "task": tasks[i % 8],
            }
            for i in range(count)
        ]
    )


def redness(completions, **kwargs) -> list[float]:
    pixels = [np.asarray(image, dtype=float) / 255 for image in completions]
    return [float(p[..., 0].mean() - p[..., 1:].mean()) for p in pixels]


def make_config(output_dir, **kwargs) -> FlowGRPOEditConfig:
    defaults = dict(
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        num_generations=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        resolution=64,
        num_inference_steps=4,
        sde_window_size=2,
        max_steps=2,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    return FlowGRPOEditConfig(output_dir=str(output_dir), **{**defaults, **kwargs})
