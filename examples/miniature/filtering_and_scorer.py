"""
Figure 5 and table 2 of HP-Edit in miniature: does it pay to drop the cases that the model edits well already, and to
reward with a task-aware scorer?

    python examples/miniature/filtering_and_scorer.py

Three recipes, each with several seeds; the task-aware scorer evaluates all of them. Results go to docs/results/. It can be
stopped at any time and goes on with the runs that are missing.
"""

from pathlib import Path

from experiments import Arm, command


ARMS = [
    Arm("all cases, base scorer", task_aware=False),
    Arm("hard cases, base scorer", task_aware=False, filtered=True),
    Arm("hard cases, task-aware scorer", filtered=True),
    Arm("all cases, task-aware scorer"),  # not in the paper: what the filter does for the better scorer
]

if __name__ == "__main__":
    command("filtering_and_scorer", ARMS, Path(__file__).parent / "experiment.yaml", __doc__)
