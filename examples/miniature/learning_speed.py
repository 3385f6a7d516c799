"""
How fast the miniature learns: score against transformer passes and CPU seconds, for the whole trajectory and for
windows of 4, 2 and 1 stochastic steps, with Flow-SDE and CPS, with the plain ratio and the normalized ratio of
GRPO-Guard.

    python examples/miniature/learning_speed.py

Results go to docs/results/. The script can be stopped at any time, and resumes with the missing runs.
"""

from pathlib import Path

from experiments import Arm, command


CONFIG = Path(__file__).parent / "experiment.yaml"
WINDOWS = {
    "all 7": {"sde_window_size": 7, "sde_window_range": [0, 7]},
    "4": {"sde_window_size": 4, "sde_window_range": [0, 4]},
    "2": {"sde_window_size": 2, "sde_window_range": [0, 4], "sde_window_mode": "random"},
    "1": {"sde_window_size": 1, "sde_window_range": [0, 4], "sde_window_mode": "random"},
}
# Clip ranges at which some steps are clipped: ratios are closer to 1 with CPS, and when they are normalized.
DYNAMICS = {
    "Flow-SDE": {"dynamics": "flow_sde", "noise_level": 0.7, "epsilon": 2e-4},
    "CPS": {"dynamics": "cps", "noise_level": 0.7, "epsilon": 1e-4},
}
RATIOS = {"": {}, ", Guard": {"normalize_ratio": True, "epsilon": 1e-4}}
# More denoising steps than in the other experiments, so that windows differ from the whole trajectory
STEPS = {"num_inference_steps": 8, "max_steps": 64, "eval_steps": 16, "num_finish_steps": None}
ARMS = [
    Arm(f"{dynamics}, {window}{ratio}", options=a | b | c | STEPS)
    for dynamics, a in DYNAMICS.items()
    for ratio, c in RATIOS.items()
    for window, b in WINDOWS.items()
]

if __name__ == "__main__":
    command("learning_speed", ARMS, CONFIG, __doc__)
