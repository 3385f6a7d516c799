"""
How fast the miniature learns: score against transformer passes and against seconds, for the whole trajectory and for
windows of 4, 2 and 1 stochastic steps, Flow-SDE and CPS, with the plain and with GRPO-Guard's normalised ratio.

    python benchmarks/learning_speed.py

Results go to docs/results/. It can be stopped at any time and goes on with the runs that are missing.
"""

import argparse
from pathlib import Path

from hp_edit_trl.miniature.experiments import Arm, run_experiment


CONFIG = Path(__file__).parents[1] / "examples" / "miniature" / "experiment.yaml"
WINDOWS = {
    "all 7": {"sde_window_size": 7, "sde_window_range": [0, 7]},
    "4": {"sde_window_size": 4, "sde_window_range": [0, 4]},
    "2": {"sde_window_size": 2, "sde_window_range": [0, 4], "sde_window_mode": "random"},
    "1": {"sde_window_size": 1, "sde_window_range": [0, 4], "sde_window_mode": "random"},
}
DYNAMICS = {
    "Flow-SDE": {"dynamics": "flow_sde", "noise_level": 0.7},
    "CPS": {"dynamics": "cps", "noise_level": 0.7},
}
RATIOS = {"": {}, ", Guard": {"normalize_ratio": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--max_steps", type=int, default=120)
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    arms = [
        Arm(f"{dynamics}, {window}{ratio}", options=a | b | c | {"max_steps": args.max_steps, "eval_steps": 20})
        for dynamics, a in DYNAMICS.items()
        for ratio, c in RATIOS.items()
        for window, b in WINDOWS.items()
    ]
    run_experiment(
        "learning_speed", arms, args.seeds, args.config, args.results, processes=args.processes, x="seconds"
    )


if __name__ == "__main__":
    main()
