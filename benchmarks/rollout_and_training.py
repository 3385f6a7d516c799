"""
What this library adds to the model calls that it cannot avoid, on one CPU thread. Prints ratios, asserts nothing.

    python benchmarks/rollout_and_training.py

Setting: a tiny Qwen-Image-Edit pipeline (190,720 transformer parameters, a VAE of 4.05M that divides by 4), 2 cases x
4 edits, 4 steps of which 3 are stochastic and trained, Flow-SDE with eta 0.7, LoRA rank 8, fp32. Times are CPU
seconds, the median of several repetitions after a warm-up. "Bare" are the same calls of transformer and VAE with
prepared tensors.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time


os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
from datasets import Dataset
from diffusers import AutoencoderKLQwenImage, QwenImageEditPlusPipeline
from peft import LoraConfig
from PIL import Image

from hp_edit_trl import FlowGRPOEditConfig, FlowGRPOEditTrainer
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.policies import decode, rollout
from hp_edit_trl.utils.seeding import seeded_generator


torch.set_num_threads(1)


def cpu_seconds(own, bare, repeats: int) -> tuple[float, float]:
    """Median CPU seconds of two functions, in turns, so that a machine that slows down slows both down."""
    own(), bare()
    times: dict = {own: [], bare: []}
    for _ in range(repeats):
        for function in (own, bare):
            start = time.process_time()
            function()
            times[function].append(time.process_time() - start)
    return statistics.median(times[own]), statistics.median(times[bare])


def build_trainer(size: int, cfg: float, steps: int = 3, batch: int = 8, max_steps: int = 1, inference_steps: int = 4):
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipeline = QwenImageEditPlusPipeline(**{**pipeline.components, "vae": vae.eval()})
    # As many text-encoder tokens per picture as the real processor makes of 384² pixels
    pipeline.processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    pixels = np.random.default_rng(0)
    cases = [
        {"prompt": f"make the image more red, variant {i}",
         "image": Image.fromarray(pixels.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((size, size), 2)}
        for i in range(2)
    ]  # fmt: skip

    def redness(completions, **kwargs):
        arrays = [np.asarray(image, dtype=float) for image in completions]
        return [float(a[..., 0].mean() - a[..., 1:].mean()) for a in arrays]

    args = FlowGRPOEditConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        num_generations=4, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch, resolution=size,
        num_inference_steps=inference_steps, true_cfg_scale=cfg, noise_level=0.7, sde_window_size=steps,
        sde_window_range=[0, inference_steps - 1], max_steps=max_steps, rollout_batch_size=batch,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return FlowGRPOEditTrainer(pipeline, redness, args, Dataset.from_list(cases), peft_config=LoraConfig(r=8))


def measure(size: int, cfg: float, batch: int, repeats: int) -> dict[str, float]:
    trainer = build_trainer(size, cfg, batch=batch)
    trainer.train()  # as prepared by the Trainer, with warm caches
    policy, model = trainer.policy, trainer.model
    pipeline, vae = policy.pipeline, policy.pipeline.vae
    cases = [trainer._read_case(trainer.train_dataset, i) for i in range(2)]
    model.eval()

    def encode():
        negative_prompt = trainer.negative_prompt if cfg > 1 else None
        return [policy.encode(images, row["prompt"], negative_prompt, size) for row, images in cases]

    def roll(encoded):
        conditions = [c for c in encoded for _ in range(4)]
        trajectories = rollout(
            policy, model, conditions, [seeded_generator(i) for i in range(8)], num_inference_steps=4,
            true_cfg_scale=cfg, batch_size=batch, dynamics="flow_sde", noise_level=0.7, steps=range(0, 3),
        )  # fmt: skip
        return decode(policy, [t.final for t in trajectories], conditions, batch)

    encoded = encode()
    samples = trainer._buffered_samples
    trainer.current_gradient_accumulation_steps = 8 // batch

    def train():
        model.zero_grad()
        for start in range(0, 8, batch):
            trainer._accumulate_gradients(model, samples[start : start + batch])
        trainer.optimizer.step()

    # The same model calls, with nothing around them
    collated = policy.collate([c for c in encoded for _ in range(4)][:batch])
    tokens, channels = encoded[0].num_tokens, encoded[0].num_channels
    side = size // pipeline.vae_scale_factor
    hidden = torch.cat([torch.randn(batch, tokens, channels), collated["image_latents"]], dim=1)
    timestep = torch.full((batch,), 0.5)
    pixels = pipeline.image_processor.preprocess(cases[0][1][0], size, size).unsqueeze(2)
    latent = torch.randn(batch, 4, 1, side, side)
    names = ["prompt_embeds", "negative_prompt_embeds"][: 1 + (cfg > 1)]

    def forward():
        return [
            model(hidden_states=hidden, timestep=timestep, encoder_hidden_states=collated[name],
                  encoder_hidden_states_mask=collated[f"{name}_mask"], img_shapes=collated["img_shapes"],
                  return_dict=False)[0]
            for name in names
        ]  # fmt: skip

    @torch.no_grad()
    def bare_rollout():
        for _ in range(8 // batch):
            for _ in range(4):
                forward()
            vae.decode(latent, return_dict=False)

    @torch.no_grad()
    def bare_encode():
        for _ in range(2):
            vae.encode(pixels)

    def bare_train():
        model.zero_grad()
        for _ in range(8 // batch * 3):
            sum(out[:, :tokens].square().mean() for out in forward()).backward()
        trainer.optimizer.step()

    model.eval()
    encode_own, encode_bare = cpu_seconds(encode, bare_encode, repeats)
    rollout_own, rollout_bare = cpu_seconds(lambda: roll(encoded), bare_rollout, repeats)
    model.train()
    train_own, train_bare = cpu_seconds(train, bare_train, repeats)
    return {
        "rollout s": rollout_own,
        "of bare": rollout_own / rollout_bare,
        "encode s": encode_own,
        "of it VAE": encode_bare / encode_own,
        "train s": train_own,
        "train of bare": train_own / train_bare,
    }


def peak_memory(steps: int) -> float:
    """Peak resident memory in MB of one training run with this many trained steps, in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r}); "
        "from rollout_and_training import build_trainer; "
        f"build_trainer(128, 1.0, steps={steps}, inference_steps=12, max_steps=3).train(); "
        "print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return int(out.split("peak")[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two cases, no memory")
    options = parser.parse_args()
    settings = [(64, 1.0, 8), (64, 1.0, 4), (64, 1.0, 1), (64, 4.0, 4)]
    settings += [(128, 1.0, 8), (128, 1.0, 4), (128, 1.0, 1), (128, 4.0, 4)]
    if options.quick:
        settings = settings[2:4]
    rows = {
        f"{size} px, {'CFG 4' if cfg > 1 else 'no CFG'}, batch {batch}": measure(size, cfg, batch, options.repeats)
        for size, cfg, batch in settings
    }
    names = list(next(iter(rows.values())))
    print("| case | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for label, row in rows.items():
        print(f"| {label} | " + " | ".join(f"{row[name]:.3g}" for name in names) + " |")
    if options.quick:
        return
    for size in (64, 128):
        one, four = (rows[f"{size} px, no CFG, batch {b}"]["rollout s"] for b in (1, 4))
        print(f"{size} px: batch 4 costs {four / one:.2f} of the CPU time per image that batch 1 costs in rollout")
    memory = {steps: peak_memory(steps) for steps in (1, 4, 10)}
    print("peak memory by trained steps: " + ", ".join(f"{s}: {m:.0f} MB" for s, m in memory.items()))


if __name__ == "__main__":
    main()
