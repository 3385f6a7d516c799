"""
Compares any arms in miniature: learners with their options and rewards, by a YAML file.

    python examples/miniature/compare.py --arms examples/miniature/learners_and_rewards.yaml

Each arm is a mapping of a name, a method (grpo, nft, dpo or none), options of its trainer, and rewards by name. The
others are compared with the first. All are evaluated by RuleScorer. What is wrong with an arm is told before the first
run. The paper's table S5 is compare_dpo_grpo.py.
"""

import argparse
import sys
from pathlib import Path

from experiments import read_arms, run_experiment


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=Path, required=True, help="YAML file with the arms")
    parser.add_argument(
        "--config", type=Path, default=Path(__file__).parent / "experiment.yaml", help="options that the arms share"
    )
    parser.add_argument("--num_cases", type=int, default=600, help="number of training cases")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="number of runs at a time, one core each")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/comparison"), help="folder for the results")
    args = parser.parse_args(words)
    try:
        arms = read_arms(args.arms, args.config)
    except ValueError as error:
        sys.exit(f"compare.py: {error}")
    run_experiment(args.arms.stem, arms, args.seeds, args.config, args.output_dir, args.num_cases, args.processes)


if __name__ == "__main__":
    main()
