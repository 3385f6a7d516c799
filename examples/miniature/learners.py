"""
Which learner gains most from a number of transformer passes: Flow-GRPO on whole trajectories, Flow-GRPO with a window
and the options that leave out passes, TempFlow-GRPO's branching and weights, DiffusionNFT, and Advantage Weighted
Matching.

    python examples/miniature/learners.py

All have about as many passes, and are evaluated in 10 steps. Results go to docs/results/. The script can be stopped at
any time, and resumes with the missing runs.
"""

from pathlib import Path

from experiments import Arm, command


CONFIG = Path(__file__).parent / "experiment.yaml"
GRPO = {"num_inference_steps": 10, "num_finish_steps": None}
# Half of the edits in each update, and four updates from a generation batch of 96 edits
HALF = {"num_trained_generations": 6, "per_device_train_batch_size": 12}
WHOLE = GRPO | {"sde_window_size": 9, "sde_window_range": [0, 9], "max_steps": 24, "eval_steps": 12}
FEWER = (
    GRPO
    | HALF
    | {"sde_window_size": 4, "sde_window_range": [0, 5], "same_latent": True, "num_finish_steps": 2}
    | {"max_steps": 64, "eval_steps": 32}
)
# The edits of a case share all steps before the stochastic one, and its pass in training: training on half of them
# would save nothing.
BRANCHING = (
    GRPO
    | {"same_latent": True, "num_finish_steps": 2, "sde_window_size": 1, "sde_window_range": [0, 5]}
    | {"max_steps": 184, "eval_steps": 92}
)
# Edits are sampled in 3 steps; those of the evaluation have 10, as with the others.
NFT = (
    HALF
    | {"num_inference_steps": 3, "eval_num_inference_steps": 10, "num_train_sigmas": 2, "beta": 0.0}
    | {"max_steps": 84, "eval_steps": 42}
)
ARMS = [
    Arm("GRPO, fewer passes", FEWER),
    Arm("GRPO, fewer passes, moving average", FEWER | {"ema_decay": 0.9}),
    Arm("GRPO, fewer passes, sliding window", FEWER | {"sde_window_mode": "sliding"}),
    Arm("GRPO, fewer passes, noise weights", FEWER | {"weight_by_noise": True}),
    Arm("GRPO, branching in the first half", BRANCHING),
    Arm("GRPO, whole trajectory", WHOLE),
    Arm("NFT", NFT, method="nft"),
    Arm("NFT, moving average", NFT | {"ema_decay": 0.9}, method="nft"),
    Arm("AWM", NFT | {"loss_type": "awm"}, method="nft"),
]

if __name__ == "__main__":
    command("learners", ARMS, CONFIG, __doc__)
