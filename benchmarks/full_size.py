"""
Rollout and training at full size: Qwen-Image-Edit's transformer (20 billion parameters) with random weights, on one
GPU.

    python benchmarks/full_size.py                 # a GPU with about 80 GB or more
    python benchmarks/full_size.py --tiny          # the same code at a tiny shape on the CPU

The transformer, the LoRA of rank 32, the shapes (one reference, as many text tokens as a picture of 384² and an
instruction make), the policy, the rollout and the trainer's own update are real; text encoder and VAE are not part of
the measurement. Model FLOPs utilisation is the FLOPs of the forward (and backward) passes, counted by torch's
FlopCounterMode, per second, over those of a large bfloat16 matrix product timed in the same run. The recomputation of
gradient checkpointing does not count as useful work.
"""

import argparse
import tempfile
import time

import diffusers
import numpy as np
import torch
import transformers
from datasets import Dataset
from diffusers import QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from peft import LoraConfig
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from hp_edit_trl import FlowGRPOEditConfig, FlowGRPOEditTrainer
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.policies import EditConditions, rollout
from hp_edit_trl.trainer.flow_grpo_edit_trainer import Sample
from hp_edit_trl.utils.seeding import seeded_generator


def timed(function, device: torch.device, repeats: int) -> float:
    """Median seconds, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def matmul_flops(device: torch.device, size: int) -> float:
    """FLOPs per second of a bfloat16 matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, device, 20)


def build_trainer(tiny: bool, device: torch.device) -> FlowGRPOEditTrainer:
    torch.manual_seed(0)
    shape = dict(num_layers=2, num_attention_heads=2) if tiny else {}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        transformer = QwenImageTransformer2DModel(**shape)
    torch.set_default_dtype(torch.float32)
    pipeline = QwenImageEditPlusPipeline(**{**tiny_pipeline().components, "transformer": transformer.eval()})
    args = FlowGRPOEditConfig(
        output_dir=tempfile.mkdtemp(), bf16=True, use_cpu=tiny, report_to="none", num_generations=2,
        per_device_train_batch_size=1, gradient_accumulation_steps=2, save_strategy="no",
        num_inference_steps=2 if tiny else 10, sde_window_size=1,
    )  # fmt: skip
    cases = Dataset.from_list([{"prompt": "unused", "image": Image.new("RGB", (64, 64))}])
    lora = LoraConfig(r=32, lora_alpha=64)
    trainer = FlowGRPOEditTrainer(
        pipeline, lambda completions, **_: [0.0] * len(completions), args, cases, peft_config=lora
    )
    transformer.enable_gradient_checkpointing()
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def random_conditions(resolution: int, device: torch.device, text_tokens: int) -> EditConditions:
    generator = torch.Generator(device).manual_seed(0)
    tokens = (resolution // 16) ** 2

    def noise(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)

    tensors = {
        "prompt_embeds": noise(text_tokens, 3584),
        "negative_prompt_embeds": noise(text_tokens - 20, 3584),
        "image_latents": noise(tokens, 64),
    }
    return EditConditions(resolution, resolution, tokens, 64, ((resolution, resolution),), tensors)


def measure(trainer, resolution: int, cfg: float, batch: int, peak: float, repeats: int, text_tokens: int) -> list:
    policy, model, device = trainer.policy, trainer.model, trainer.accelerator.device
    steps = trainer.args.num_inference_steps
    trainer.true_cfg_scale = cfg
    conditions = random_conditions(resolution, device, text_tokens)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def roll():
        with trainer._without_casts(), trainer.accelerator.autocast():
            return rollout(
                policy, model, [conditions] * batch, [seeded_generator(i) for i in range(batch)],
                num_inference_steps=steps, true_cfg_scale=cfg, batch_size=batch, dynamics="flow_sde", noise_level=1.0,
                steps=range(0, 1),
            )  # fmt: skip

    model.eval()
    rollout_seconds = timed(roll, device, repeats) / batch
    rollout_memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    trajectory = roll()[0]
    sample = Sample("case", 0, conditions, trajectory, 1.0, 1.0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def train():
        with trainer._without_casts():
            trainer._accumulate_gradients(trainer.model_wrapped, [sample])

    model.train()
    train_seconds = timed(train, device, repeats)
    train_memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")

    # FLOPs of one image's denoising step, and of one trained step without recomputation
    collated = policy.collate([conditions])
    latents = torch.randn(1, conditions.num_tokens, 64, device=device)
    transformer = policy.pipeline.transformer
    with torch.no_grad(), FlopCounterMode(display=False) as forward, trainer.accelerator.autocast():
        policy.velocity(model, latents, torch.tensor(0.5), collated, cfg)
    transformer.disable_gradient_checkpointing()
    model.zero_grad()
    try:
        with FlopCounterMode(display=False) as both:
            train()
        useful = both.get_total_flops()
    except torch.OutOfMemoryError:  # activations of the whole network at once; the weights' gradients are not computed
        useful = 2 * forward.get_total_flops()
    transformer.enable_gradient_checkpointing()
    model.zero_grad()
    return [
        f"{resolution}", f"{cfg:g}", f"{batch}", f"{rollout_seconds:.3g}", f"{rollout_memory:.1f}",
        f"{forward.get_total_flops() * steps / rollout_seconds / peak:.0%}", f"{train_seconds:.3g}",
        f"{train_memory:.1f}", f"{useful / train_seconds / peak:.0%}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two layers, small images, on the CPU")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = torch.device("cpu" if options.tiny else "cuda")
    peak = matmul_flops(device, 512 if options.tiny else 8192)
    trainer = build_trainer(options.tiny, device)
    parameters = sum(p.numel() for p in trainer.policy.pipeline.transformer.parameters())
    card = "CPU" if options.tiny else torch.cuda.get_device_name()
    print(
        f"{time.strftime('%Y-%m-%d')}, {card}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"transformers {transformers.__version__}; {parameters / 1e9:.2f}B parameters with LoRA; "
        f"matrix product {peak / 1e12:.3g} TFLOP/s\n"
    )
    steps = trainer.args.num_inference_steps
    print(
        f"| px | CFG | rollout batch | s / image ({steps} steps) | GiB | MFU | s / trained step, batch 1 | GiB | MFU |"
    )
    print("|---" * 9 + "|")
    resolutions, text_tokens = ([64], 40) if options.tiny else ([512, 1024], 220)
    for resolution in resolutions:
        for cfg in (1.0, 4.0):
            for batch in (1, 4):
                row = measure(trainer, resolution, cfg, batch, peak, options.repeats, text_tokens)
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
