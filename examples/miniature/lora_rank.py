"""
Table S1 of HP-Edit in miniature: the rank of the LoRA.

    python examples/miniature/lora_rank.py

Three ranks, each with several seeds; alpha is twice the rank. Results go to docs/results/. It can be stopped at any time
and goes on with the runs that are missing.
"""

import argparse
from pathlib import Path

from hp_edit_trl.miniature.experiments import Arm, run_experiment


ARMS = [Arm(f"rank {rank}", options={"lora_r": rank, "lora_alpha": 2 * rank}, filtered=True) for rank in (8, 32, 128)]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "experiment.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    run_experiment("lora_rank", ARMS, args.seeds, args.config, args.results, processes=args.processes)
