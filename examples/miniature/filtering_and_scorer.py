"""
Figure 5 and table 2 of HP-Edit in miniature: does it pay to drop the cases that the model edits well already, and to
reward with a task-aware scorer?

    python examples/miniature/filtering_and_scorer.py

Three recipes, each with several seeds; the task-aware scorer evaluates all of them. Results go to docs/results/. It can be
stopped at any time and goes on with the runs that are missing.
"""

import argparse
from pathlib import Path

from hp_edit_trl.miniature.experiments import Arm, run_experiment


ARMS = [
    Arm("all cases, base scorer", task_aware=False),
    Arm("hard cases, base scorer", task_aware=False, filtered=True),
    Arm("hard cases, task-aware scorer", filtered=True),
    Arm("all cases, task-aware scorer"),  # not in the paper: what the filter does for the better scorer
]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "experiment.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    run_experiment("filtering_and_scorer", ARMS, args.seeds, args.config, args.results, processes=args.processes)
