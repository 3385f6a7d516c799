"""
The experiments of HP-Edit in miniature, on two CPU cores. Their numbers are not comparable with those of the paper.

    python examples/miniature/reproduce_tables.py                     # all tables, several hours
    python examples/miniature/reproduce_tables.py table_1 table_3     # about ten minutes

Results go to docs/results/. The script can be stopped at any time, and resumes where it stopped.

Table 1 compares the policy before and after training, the policy with few steps, and two editors that bound the scale.
Table 3 applies the protocol of GEdit-Bench to the same editors, in English only. The judge knows the target of each
prompt; when it sees an edit alone, its two scores are the same number. Tables S3 and S4 are left out: the miniature
has no subjects to put into other scenes, and pretrained CLIP or DINO models see nothing in it.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from experiments import fingerprint, hard_cases, make_trainer

from hp_edit_trl.bench import GEditBench, RealPrefBench, parse_pair, run_benchmark, write_bench_report
from hp_edit_trl.editors import Editor, FunctionEditor, PolicyEditor
from hp_edit_trl.miniature import CoarseScorer, RuleScorer, TargetJudge, load_dataset, load_pipeline
from hp_edit_trl.policies import policy_class


HERE = Path(__file__).parent
CONFIG = HERE / "experiment.yaml"
SCRIPTS = {
    "table_2": HERE / "filtering_and_scorer.py",  # and figure 5
    "table_s1": HERE / "lora_rank.py",
    "table_s5": HERE / "compare_dpo_grpo.py",
}


def trained(folder: Path, task_aware: bool) -> Path:
    """Trains a LoRA on all cases with the base scorer, or on hard cases with the task-aware one."""
    name = "grpo_in_full" if task_aware else "grpo_base_scorer"
    lora = folder / f"{name}_{fingerprint(CONFIG.read_bytes())}"  # trained again if the code or the recipe has changed
    if not lora.exists():
        folder.mkdir(parents=True, exist_ok=True)
        train = load_dataset("train", 1500)
        if task_aware:
            train = train.select(hard_cases(CONFIG, 1500, folder)[0])
        scorer = RuleScorer() if task_aware else CoarseScorer()
        unfinished = lora.with_suffix(".unfinished")
        trainer = make_trainer(CONFIG, {"save_strategy": "no"}, unfinished, 0, scorer, train)
        trainer.train()
        trainer.save_model(str(unfinished))
        unfinished.rename(lora)
    return lora


def policy(name: str, steps: int = 5, lora: Path | None = None) -> PolicyEditor:
    pipeline = load_pipeline()
    if lora is not None:
        pipeline.load_lora_weights(str(lora), weight_name="pytorch_lora_weights.safetensors")
    return PolicyEditor(policy_class(pipeline)(pipeline), name, 32, steps, true_cfg_scale=1.0, batch_size=32)


def compare_editors(names: list[str], folder: Path, output_dir: Path, num_cases: int) -> None:
    """Runs all editors on the benchmarks of tables 1 and 3, and writes the tables."""
    cases = load_dataset("test", num_cases, 1)
    targets = dict(zip(cases["id"], cases["target"], strict=True))
    editors: list[Editor] = [
        FunctionEditor(lambda images, prompts: images, "untouched source"),
        policy("pretrained, 2 steps", steps=2),
        policy("pretrained"),
        policy("GRPO, base scorer", lora=trained(folder, task_aware=False)),
        policy("GRPO in full", lora=trained(folder, task_aware=True)),
        FunctionEditor(lambda images, prompts, ids: [targets[case_id] for case_id in ids], "what was asked for"),
    ]
    gedit = cases.select_columns(["id", "image", "prompt", "task"]).rename_columns(
        {"id": "key", "image": "input_image", "prompt": "instruction", "task": "task_type"}
    )
    gedit = gedit.add_column("instruction_language", ["en"] * num_cases)
    gedit = gedit.add_column("Intersection_exist", [False] * num_cases)
    benchmarks = {
        "table_1": RealPrefBench(TargetJudge(cases), cases),
        "table_3": GEditBench(TargetJudge(cases, parse_pair), gedit),
    }
    for name in names:
        # A run resumes unless its cases or its editors have changed.
        key = fingerprint(CONFIG.read_bytes(), num_cases)
        place = folder / f"{name}_{key}"
        runs = [
            run_benchmark(benchmarks[name], editor, place / editor.identity["editor"], batch_size=100)
            for editor in editors
        ]
        print(write_bench_report(runs, place / "report", baseline="pretrained"))  # with a gallery of all edits
        write_bench_report(runs, output_dir / name, baseline="pretrained", gallery=False)
        with (output_dir / name / "table.md").open("a", encoding="utf-8") as page:
            page.write(
                f"\nMade by `python examples/miniature/reproduce_tables.py {name} --num_cases {num_cases}`, in "
                "miniature: the numbers are not comparable with those of the paper. Each LoRA comes from one training "
                "with seed 0: the intervals are over cases, not over trainings.\n"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help="table_1, table_2, table_3, table_s1, table_s5; by default all")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="folder for the results")
    parser.add_argument(
        "--runs_dir",
        type=Path,
        default=Path("outputs/reproduction"),
        help="folder for runs and LoRAs of tables 1 and 3",
    )
    parser.add_argument("--num_cases", type=int, default=400, help="number of test cases of tables 1 and 3")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tables = args.tables or ["table_1", "table_3", *SCRIPTS]
    if unknown := sorted(set(tables) - {"table_1", "table_3", *SCRIPTS}):
        parser.error(f"{', '.join(unknown)}: choose from table_1, table_3, {', '.join(SCRIPTS)}")
    if compared := [name for name in ("table_1", "table_3") if name in tables]:
        compare_editors(compared, args.runs_dir, args.output_dir, args.num_cases)
    for name in tables:
        if name in SCRIPTS:
            subprocess.run([sys.executable, str(SCRIPTS[name]), "--output_dir", str(args.output_dir)], check=True)
