"""
Makes the frozen set anew: `python -m tests.regression.freeze --train` trains the LoRA and keeps cases, edits and
scores; without `--train` it keeps LoRA and cases, and edits and scores them again. Do so only when what a policy
produces was meant to change, and say why in the changelog.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from experiments import make_trainer
from PIL import Image

from hp_edit_trl.bench import RealPrefBench, Run, run_benchmark
from hp_edit_trl.editors import PolicyEditor
from hp_edit_trl.miniature import RuleScorer, load_dataset, load_pipeline
from hp_edit_trl.policies import policy_class
from tests.helpers import RuleJudge


HERE = Path(__file__).parent
SIDE = 32  # of an edit, in pixels


def load_cases() -> Dataset:
    return Dataset.from_parquet(str(HERE / "cases.parquet"))


def bench(cases: Dataset, folder: str | Path, lora: bool = True, scale: float = 1.0, **options) -> Run:
    """
    A run of RealPref-Bench on the frozen cases. Its judge says 0: the scores that count are those of `exact_scores`.
    """
    pipeline = load_pipeline()
    if lora:
        pipeline.load_lora_weights(str(HERE / "lora"), weight_name="pytorch_lora_weights.safetensors")
        pipeline.set_adapters(pipeline.get_active_adapters(), [scale])
    policy = policy_class(pipeline)(pipeline)
    options = {"num_inference_steps": 5, "true_cfg_scale": 1.0, "batch_size": 16, **options}
    editor = PolicyEditor(policy, "frozen LoRA", resolution=SIDE, **options)
    judge = RuleJudge(rule=lambda text, pictures: 0)
    return run_benchmark(RealPrefBench(judge, cases), editor, folder, batch_size=64)


def exact_scores(run: Run, cases: Dataset) -> list[float]:
    """RuleScorer's score of each edit, not rounded."""
    edits = [Image.open(run.folder / row["edit"]) for row in run.cases]
    columns = zip(edits, cases["image"], cases["target"], strict=True)
    return [RuleScorer().score(edit, source, target) for edit, source, target in columns]


def sheet(run: Run) -> Image.Image:
    """All edits in one picture, eight in a row."""
    picture = Image.new("RGB", (8 * SIDE, len(run.cases) // 8 * SIDE))
    for number, row in enumerate(run.cases):
        picture.paste(Image.open(run.folder / row["edit"]), (number % 8 * SIDE, number // 8 * SIDE))
    return picture


def train() -> None:
    config = HERE.parents[1] / "examples" / "miniature" / "experiment.yaml"
    with tempfile.TemporaryDirectory() as folder:
        options = {"save_strategy": "no", "lora_r": 8, "lora_alpha": 16}
        trainer = make_trainer(config, options, Path(folder), 0, RuleScorer(), load_dataset("train", 1500))
        trainer.train()
        trainer.save_model(folder)
        weights = Path(folder) / "pytorch_lora_weights.safetensors"
        (HERE / "lora").mkdir(exist_ok=True)
        (HERE / "lora" / weights.name).write_bytes(weights.read_bytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train another LoRA, and draw the cases again")
    if parser.parse_args().train:
        torch.set_num_threads(1)
        train()
        load_dataset("test", 64, seed=7).remove_columns(["category", "source"]).to_parquet(str(HERE / "cases.parquet"))
    with tempfile.TemporaryDirectory() as folder:
        cases = load_cases()
        run = bench(cases, Path(folder) / "lora")
        base = bench(cases, Path(folder) / "base", lora=False)
        sheet(run).save(HERE / "edits.png")
        scores = dict(zip(cases["id"], exact_scores(run, cases), strict=True))
        before = exact_scores(base, cases)
        known = {"mean": sum(scores.values()) / 64, "mean_without_lora": sum(before) / 64, "scores": scores}
        (HERE / "scores.json").write_text(json.dumps(known, indent=1) + "\n")
        print(f"{known['mean']:.4f} with the LoRA, {known['mean_without_lora']:.4f} without")
