"""
What a quantized base model changes in the miniature, on one CPU thread. Prints a table, asserts nothing.

    python benchmarks/quantization.py --updates 64

- ratio: the largest mean of |log ρ| of a step in the first update, with other batches in training than in the rollout.
- cosine: of the adapter's gradient with that of the unquantized base, on the same samples with the same advantages.
- before, after: mean reward of 96 other cases before and after training, by the rules of the miniature's scorer.

Only the transformer is quantized. On the CPU the layers are those of bitsandbytes and torchao, put in place here:
diffusers loads bitsandbytes' models on GPUs only.
"""

import argparse
import copy
import os
import tempfile


os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import bitsandbytes
import torch
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

from hp_edit_trl import FlowGRPOEditConfig, FlowGRPOEditTrainer, miniature


torch.set_num_threads(1)
KINDS = ("none", "nf4", "nf4 nested", "torchao int8", "torchao fp8", "bitsandbytes int8")


def quantize(transformer: nn.Module, kind: str) -> None:
    """Quantizes all linear layers of a transformer in place."""
    if kind == "none":
        return
    if kind.startswith("torchao"):
        quantize_(transformer, Int8WeightOnlyConfig() if kind.endswith("int8") else Float8WeightOnlyConfig())
        return
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, nn.Linear):
            shape, weight = (layer.in_features, layer.out_features), layer.weight.data
            if kind.startswith("nf4"):
                new = bitsandbytes.nn.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
                nested = kind.endswith("nested")
                new.weight = bitsandbytes.nn.Params4bit(weight, quant_type="nf4", compress_statistics=nested)
                new.support_avx512bf16_for_cpu = False  # a kernel for inference alone
            else:
                new = bitsandbytes.nn.Linear8bitLt(*shape, has_fp16_weights=False)
                new.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False)
            new.bias = layer.bias
            parent, _, last = name.rpartition(".")
            setattr(transformer.get_submodule(parent), last, new.to("cpu"))  # quantizes


def build_trainer(pipeline, kind: str, updates: int) -> FlowGRPOEditTrainer:
    pipeline = copy.copy(pipeline)
    pipeline.transformer = copy.deepcopy(pipeline.transformer)
    quantize(pipeline.transformer, kind)
    args = FlowGRPOEditConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=1, per_device_eval_batch_size=96, num_sample_edits=0,
        resolution=32, num_inference_steps=5, true_cfg_scale=1.0, noise_level=0.7, sde_window_size=3,
        sde_window_range=[0, 3], num_generations=12, per_device_train_batch_size=24, gradient_accumulation_steps=1,
        steps_per_generation=4, rollout_batch_size=96, max_steps=updates, learning_rate=1.5e-4, epsilon=1e-3,
    )  # fmt: skip
    return FlowGRPOEditTrainer(
        model=pipeline,
        reward_funcs=miniature.RuleScorer(),
        args=args,
        train_dataset=miniature.load_dataset("train", 1000),
    )


def gradient(trainer: FlowGRPOEditTrainer, samples: list) -> torch.Tensor:
    """Gradient of the adapter for samples, whichever policy sampled them."""
    trainer.epsilon_low = trainer.epsilon_high = 1e9  # nothing is clipped
    trainer.current_gradient_accumulation_steps = 1
    # A LoRA's B starts at 0, and A then has no gradient: as if after a few updates
    generator = torch.Generator().manual_seed(0)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    trainer.model.train()
    trainer._accumulate_gradients(trainer.model, samples)
    return torch.cat([p.grad.flatten() for p in parameters])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    args = parser.parse_args()
    pipeline = miniature.load_pipeline()
    cases = miniature.load_dataset("validation", 96)
    samples = reference = None
    print(f"{'base':18} {'ratio':>9} {'cosine':>8} {'before':>7} {'after':>7}")
    for kind in args.kinds:
        if samples is None:
            sampler = build_trainer(pipeline, "none", 1)
            samples = sampler._generate_and_score([i for i in range(8) for _ in range(12)], 0)
            reference = gradient(sampler, samples)
        own = gradient(build_trainer(pipeline, kind, 1), samples)
        cosine = torch.cosine_similarity(own, reference, dim=0).item()
        trainer = build_trainer(pipeline, kind, args.updates)
        before = trainer.evaluate(cases)["eval_reward"]
        trainer.train()
        after = trainer.evaluate(cases)["eval_reward"]
        first = next(log for log in trainer.state.log_history if "loss" in log)
        ratio = max(value for name, value in first.items() if name.startswith("logp_diff"))
        print(f"{kind:18} {ratio:9.1e} {cosine:8.4f} {before:7.3f} {after:7.3f}", flush=True)


if __name__ == "__main__":
    main()
