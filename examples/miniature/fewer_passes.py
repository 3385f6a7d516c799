"""
What it costs to leave out passes through the transformer: one noise for all edits of a case, rollouts that are
finished in two steps of second order, and training only on those half of the edits that have the largest advantages.

    python examples/miniature/fewer_passes.py

Results go to docs/results/. The script can be stopped at any time, and resumes with the missing runs.
"""

from pathlib import Path

from experiments import Arm, command


CONFIG = Path(__file__).parent / "experiment.yaml"
# As many steps, and such a window, as full-size recipes have
STEPS = {
    "num_inference_steps": 10,
    "sde_window_size": 4,
    "sde_window_range": [0, 5],
    "max_steps": 64,
    "eval_steps": 16,
    "num_finish_steps": None,
}
# Half of the edits in each update, and as many updates from a generation batch
HALF = {"num_trained_generations": 6, "per_device_train_batch_size": 12}
ARMS = [
    Arm("all passes", options=STEPS),
    Arm("same latent", options=STEPS | {"same_latent": True}),
    Arm("2 finish steps", options=STEPS | {"num_finish_steps": 2}),
    Arm("half trained", options=STEPS | HALF),
    Arm("all three", options=STEPS | HALF | {"same_latent": True, "num_finish_steps": 2}),
    Arm("all three, 3 finish steps", options=STEPS | HALF | {"same_latent": True, "num_finish_steps": 3}),
]

if __name__ == "__main__":
    command("fewer_passes", ARMS, CONFIG, __doc__)
