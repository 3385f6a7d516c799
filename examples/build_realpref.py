# /// script
# dependencies = ["hp-edit-trl[server]"]
# ///
"""
Builds a dataset of hard cases from images (docs/building_a_dataset.md), and trains on it.

Without arguments it builds a small dataset from drawn scenes and photographs of scikit-image, with the policy of the
miniature as the editor, and trains two steps on it. Writer and judge are simulated, and the CLIP model is a tiny one
with random weights, so its categories are meaningless:

    python examples/build_realpref.py

For a real dataset, list your images in a configuration:

    python examples/build_realpref.py --config examples/configs/build_realpref.yaml
"""

import argparse
from pathlib import Path

import torch

from hp_edit_trl import FlowGRPOEditConfig, FlowGRPOEditTrainer, HPScorerReward, miniature
from hp_edit_trl.data import load_realpref
from hp_edit_trl.data.builder import BuildConfig, build_dataset
from hp_edit_trl.editors import PolicyEditor
from hp_edit_trl.miniature.tiny import tiny_clip
from hp_edit_trl.policies import policy_class
from hp_edit_trl.tasks import TASKS
from hp_edit_trl.utils.config import read_config


def main(output_dir: Path, num_scenes: int, engine: str) -> None:
    torch.set_num_threads(1)
    pictures, clip = output_dir / "pictures", output_dir / "clip"
    miniature.save_pictures(pictures, num_scenes)
    if not clip.exists():
        tiny_clip(str(clip))
    config = BuildConfig(
        sources=[
            {"folder": str(pictures / "scenes"), "license": "cc0-1.0"},
            {"folder": str(pictures / "photographs"), "license": "cc0-1.0", "source": "scikit-image"},
        ],
        output_dir=str(output_dir / "build"),
        min_side=32,
        resolution=128,
        clip_model=str(clip),
        task_counts=dict.fromkeys(TASKS, max(1, num_scenes // 16)),
        sample_size=max(1, num_scenes // 40),
        benchmark_counts=dict.fromkeys(TASKS, max(1, num_scenes // 40)),
    )
    pipeline = miniature.load_pipeline()
    policy = policy_class(pipeline)(pipeline)
    editor = PolicyEditor(policy, "miniature", 32, num_inference_steps=5, true_cfg_scale=1.0, batch_size=32)
    writer = miniature.SimulatedWriter(num_scenes)
    scorer = HPScorerReward(miniature.SceneJudge(writer))
    folder = build_dataset(
        config, writer=writer, editor=editor, scorer=scorer, styles=miniature.MINIATURE_STYLES, engine=engine
    )

    dataset = load_realpref(str(folder), split="train")
    mean_score = sum(dataset["score"]) / len(dataset)
    print(f"{len(dataset)} hard cases in {folder}; the mean of their scores is {mean_score:.2f}.")
    args = FlowGRPOEditConfig(
        str(output_dir / "lora"),
        resolution=32,
        num_inference_steps=5,
        true_cfg_scale=1.0,
        num_generations=4,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        max_steps=2,
        bf16=False,
        report_to="none",
    )
    trainer = FlowGRPOEditTrainer(miniature.load_pipeline(), scorer, args=args, train_dataset=dataset)
    trainer.train()
    print(f"Two steps of training: mean reward {trainer.state.log_history[-2].get('reward', float('nan')):.3f}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file: build this dataset, without training")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/build-realpref"))
    parser.add_argument("--num_scenes", type=int, default=240)
    args = parser.parse_args()
    if args.config is not None:
        print(build_dataset(read_config(BuildConfig, args.config), engine=args.engine))
    else:
        main(args.output_dir, args.num_scenes, args.engine)
