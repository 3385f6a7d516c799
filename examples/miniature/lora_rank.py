"""
Table S1 of HP-Edit in miniature: the rank of the LoRA.

    python examples/miniature/lora_rank.py

Three ranks, each with several seeds; alpha is twice the rank. Results go to docs/results/. The script can be stopped
at any time, and resumes with the missing runs.
"""

from pathlib import Path

from experiments import Arm, command


ARMS = [Arm(f"rank {rank}", options={"lora_r": rank, "lora_alpha": 2 * rank}, filtered=True) for rank in (8, 32, 128)]

if __name__ == "__main__":
    command("lora_rank", ARMS, Path(__file__).parent / "experiment.yaml", __doc__)
