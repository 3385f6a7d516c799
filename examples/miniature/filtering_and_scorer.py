"""
Figure 5 and table 2 of HP-Edit in miniature: does it help to drop the cases that the model already edits well, and to
reward with a task-aware scorer?

    python examples/miniature/filtering_and_scorer.py

Four recipes, each with several seeds; the task-aware scorer evaluates all of them. Results go to docs/results/. The
script can be stopped at any time, and resumes with the missing runs.
"""

from pathlib import Path

from experiments import Arm, command


ARMS = [
    Arm("all cases, base scorer", task_aware=False),
    Arm("hard cases, base scorer", task_aware=False, filtered=True),
    Arm("hard cases, task-aware scorer", filtered=True),
    Arm("all cases, task-aware scorer"),  # not in the paper: the effect of the filter with the better scorer
]

if __name__ == "__main__":
    command("filtering_and_scorer", ARMS, Path(__file__).parent / "experiment.yaml", __doc__)
