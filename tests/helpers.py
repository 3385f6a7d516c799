"""What several tests need: small cases, rewards that can be worked out by hand, a config for the CPU."""

import json

import numpy as np
from datasets import Dataset
from PIL import Image

from hp_edit_trl import FlowGRPOEditConfig
from hp_edit_trl.judges import Judgement, parse_score
from hp_edit_trl.utils import quantization


# Last line of a script of several processes. A thread of gloo's may still hold a tensor when the interpreter ends, and
# then aborts the process: what is left to it is to end without.
END = "import os, sys; sys.stdout.flush(); os._exit(0)\n"


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


def make_config(output_dir, kind=FlowGRPOEditConfig, **kwargs):
    defaults = dict(
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        num_generations=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        resolution=64,
        num_inference_steps=4,
        **({"sde_window_size": 2} if kind is FlowGRPOEditConfig else {}),
        max_steps=2,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        num_sample_edits=2,
        disable_tqdm=True,
    )
    return kind(output_dir=str(output_dir), **{**defaults, **kwargs})


def write_model_index(folder) -> None:
    """What is read of an editor before its weights are."""
    components = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "vae": ["diffusers", "AutoencoderKLQwenImage"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"], "processor": ["transformers", "Qwen2VLProcessor"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    }  # fmt: skip
    index = {"_class_name": "QwenImageEditPlusPipeline", **components}
    (folder / "model_index.json").write_text(json.dumps(index))


def allow_bitsandbytes_on_cpu(monkeypatch) -> None:
    """Lets diffusers load models with bitsandbytes on the CPU, whose kernels compute the same, only slowly."""
    import bitsandbytes.nn.modules
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

    monkeypatch.setattr(quantization, "BITSANDBYTES_DEVICES", ("cpu",))
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda *args, **kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: device_map or {"": "cpu"})
    # Packs weights for inference on processors with AVX512, which no GPU does
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


class RuleJudge:
    """
    A judge that goes by a rule of the prompt and the pictures, by default how red the edit is. It counts its cases.
    """

    def __init__(self, name="rule", rule=None):
        self.name = name
        self.rule = rule or (
            lambda text, pictures: round(5 * np.asarray(pictures[-1], dtype=float)[..., 0].mean() / 255)
        )
        self.asked = 0

    @property
    def identity(self):
        return {"judge": "RuleJudge", "name": self.name, "score_mode": "integer"}

    def load(self, num_images=2):
        pass

    def __call__(self, conversations):
        self.asked += len(conversations)
        judgements = []
        for system, user in conversations:
            pictures = [part["image"] for part in user["content"] if part["type"] == "image"]
            answer = self.rule(system["content"][0]["text"], pictures)
            judgements.append(Judgement(parse_score(str(answer)), str(answer), input_tokens=100, output_tokens=1))
        return judgements


def make_edits(count: int = 6, editors=("one", "two")) -> Dataset:
    """
    Edits of the cases of `make_cases`, in plain colors: the k-th editor's are redder than those of the one before.
    """
    rows = []
    for i, case in enumerate(make_cases(count)):
        for k, editor in enumerate(editors):
            red = min(255, 50 * k + 255 * i // count)
            rows.append({**case, "edit": Image.new("RGB", case["image"].size, (red, 40, 40)), "editor": editor})
    return Dataset.from_list(rows)
