"""
What a judge in the process saves when the edits of one case share what comes before them, on one CPU thread. Prints
ratios, asserts nothing.

    python benchmarks/judging.py
    python benchmarks/judging.py --areas

The second measures how far an edit that changes nothing is from its source, for both ways to make an edit of a lower
resolution and a photograph comparable: to enlarge the edit, or to scale the photograph down.

Setting of the first: a random Qwen3-VL (8 layers of 256, a vision tower of 8 layers of 256), pictures of 256 x 256,
which are 64 tokens each, 8 edits of each case. The prompt is short, so that text and pictures have about the
proportion that the package's prompts have with the real tokenizer and pictures of one megapixel. "One by one" and
"batched" read each conversation whole, "shared" reads prompt and source once.
"""

import argparse
import os
import tempfile
import time


os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from transformers import Qwen3VLForConditionalGeneration

from hp_edit_trl import HPScorerReward, TransformersJudge
from hp_edit_trl.judges import base as judges
from hp_edit_trl.miniature.photographs import load_photographs
from hp_edit_trl.miniature.tiny import tiny_judge
from hp_edit_trl.policies.edit_policy import fitted_size
from hp_edit_trl.rewards import ScorerPrompt
from hp_edit_trl.rewards.vlm import equal_areas


torch.set_num_threads(1)


def make_judge(folder: str, mode: str, batch_size: int, size: int) -> TransformersJudge:
    judge = TransformersJudge(folder, mode, batch_size=batch_size, min_digit_mass=0.0, max_new_tokens=4)
    judge.processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": size * size}
    config = judge.model.config
    for part, values in (
        (config.text_config, {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8,
            "num_attention_heads": 16}),
        (config.vision_config, {"hidden_size": 256, "intermediate_size": 1024, "depth": 8, "out_hidden_size": 256}),
    ):  # fmt: skip
        for name, value in values.items():
            setattr(part, name, value)
    config.text_config.layer_types = ["full_attention"] * 8
    torch.manual_seed(0)
    judge.model = Qwen3VLForConditionalGeneration(config).requires_grad_(False).eval()
    return judge


def compare_areas() -> None:
    photographs = {row["source"]: row["image"] for row in load_photographs()}
    print("| photograph | edit | edit enlarged, dB | equal areas, dB | pixels read |\n|---|---|---|---|---|")
    for name, source in photographs.items():
        height, width = fitted_size(source, 256, 16)
        edit = source.resize((width, height), Image.Resampling.LANCZOS)
        enlarged = edit.resize(source.size, Image.Resampling.LANCZOS)
        edit, (shown,) = equal_areas(edit, [source])
        distances = [
            peak_signal_noise_ratio(*map(np.asarray, pair))
            for pair in ((source, enlarged), (shown.resize(edit.size), edit))
        ]
        pixels = edit.width * edit.height / (source.width * source.height)
        print(
            f"| {name}, {source.width} x {source.height} | {edit.width} x {edit.height} | {distances[0]:.1f} | "
            f"{distances[1]:.1f} | {pixels:.2f} |"
        )


def main(cases: int, edits: int, size: int) -> None:
    rng = np.random.default_rng(0)

    def picture() -> Image.Image:
        return Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((size, size))

    sources = [picture() for _ in range(cases)]
    with tempfile.TemporaryDirectory() as folder:
        tiny_judge(folder)
        print("| mode | how | tokens read | CPU s | of one by one |\n|---|---|---|---|---|")
        for mode in ("expected", "integer"):
            bare = 0.0
            for how, batch_size, sharing in (
                ("one by one", 1, ()),
                ("batched", edits, ()),
                ("shared", edits, ("qwen3_vl",)),
            ):
                judges.SHARES_PREFIX = sharing
                scorer = HPScorerReward(make_judge(folder, mode, batch_size, size))
                scorer.scorer_prompts = {"color": ScorerPrompt("color", "benchmark:color:1", "Score {prompt}")}
                chats = [
                    scorer.conversation("red cup", picture(), [one], "color") for one in sources for _ in range(edits)
                ]
                scorer.judge(chats[:1])
                start = time.process_time()
                judged = scorer.judge(chats)
                seconds = time.process_time() - start
                bare = bare or seconds
                tokens = sum(judgement.input_tokens for judgement in judged)
                print(f"| {mode} | {how} | {tokens} | {seconds:.3g} | {seconds / bare:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--edits", type=int, default=8, help="of each case")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--areas", action="store_true", help="compare ways to show an edit beside a larger photograph")
    args = parser.parse_args()
    if args.areas:
        compare_areas()
    else:
        main(args.cases, args.edits, args.size)
