"""
Table S5 of HP-Edit in miniature: the pretrained policy, DPO, Flow-GRPO with the task-aware scorer on all cases, which
the paper calls "GRPO (HP-scorer)", and Flow-GRPO in full: the same on the hard cases among them.

    python examples/miniature/compare_dpo_grpo.py

Each has several seeds and the same amount of data: the first 600 training cases and 3,000 edits of them. DPO mines its
pairs from these edits, and Flow-GRPO samples them during training. Results go to docs/results/. The script can be
stopped at any time, and resumes with the missing runs.

With a real model: examples/configs/bench/table_s5.yaml.
"""

from pathlib import Path

from experiments import Arm, command


# 125 updates of 24 edits; DPO sees its pairs, 24 at a time, about five times.
GRPO = {"max_steps": 125, "eval_steps": 25}
DPO = {"max_steps": 60, "beta": 500.0, "learning_rate": 1e-4, "eval_steps": 12}
ARMS = [
    Arm("base", method="none"),
    Arm("DPO", DPO, method="dpo"),
    Arm("GRPO, task-aware scorer", GRPO),
    Arm("GRPO in full", GRPO, filtered=True),
]

if __name__ == "__main__":
    config = Path(__file__).parent / "experiment.yaml"
    command("dpo_against_grpo", ARMS, config, __doc__, num_cases=600)
