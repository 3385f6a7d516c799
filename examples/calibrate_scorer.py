# /// script
# dependencies = ["hp-edit-trl"]
# ///
"""
Builds an HP-Scorer: people rate edits, a judge scores them, their agreement is measured, and the scorer prompts are
refined until both agree (docs/building_an_hp_scorer.md).

    python examples/calibrate_scorer.py

People, judge and proposer are simulated, and the raters' noise is known. So is the correct agreement, which is printed
beside the measured one. With people and a real judge, each step is a command:

    hp-edit annotate someone/edits --output_dir ratings
    hp-edit score someone/edits --output_dir scores --judge_base_url http://localhost:8000/v1
    hp-edit measure-agreement ratings scores --dataset someone/edits --output_dir agreement
    hp-edit refine-prompt remove someone/edits --ratings ratings --output_dir my-prompts --propose \\
        --judge_base_url http://localhost:8000/v1
"""

import argparse
from pathlib import Path

from hp_edit_trl import HPScorerReward, miniature
from hp_edit_trl.calibration import PromptRefiner, compare_with_people, read_scores, score_dataset, write_agreement
from hp_edit_trl.judges import CachedJudge


EDITORS = {"careful": 0.25, "careless": 0.7}  # how often an edit stops half-way, and how often it spoils the rest
NOISE = {"anna": 0.3, "ben": 0.6, "carla": 1.0}  # standard deviation of what a rater adds to the true score


def main(output_dir: Path, cases_per_task: int, rounds: int, num_resamples: int) -> None:
    cases = miniature.load_dataset("train", 8 * cases_per_task)
    edits = miniature.flawed_edits(cases, EDITORS)
    truths = miniature.true_scores(edits)
    ratings = miniature.simulate_ratings(edits, NOISE)
    judge = CachedJudge(miniature.SimulatedJudge(cases), output_dir / "judgements.sqlite")

    def measure(scorer: HPScorerReward, name: str) -> None:
        score_dataset(scorer, edits, output_dir / f"scores-{name}")
        lines = read_scores(output_dir / f"scores-{name}")
        result = compare_with_people(ratings, lines, edits, num_resamples=num_resamples)
        write_agreement(result, output_dir / f"agreement-{name}", edits)
        scores = {(line["id"], line["editor"]): line["score"] for line in lines}
        expected = miniature.known_pearson(
            truths, [scores[row["id"], row["editor"]] for row in edits], list(NOISE.values())
        )
        found = result["agreement"]["overall"]["pearson"]
        print(
            f"{name}: Pearson {found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f}), by the raters' noise "
            f"{expected:.3f}; tables and figures in {output_dir / f'agreement-{name}'}"
        )

    # The paper starts with a prompt that contains only the scale, ...
    start = HPScorerReward(judge, task="base")
    measure(start, "base")

    # ... and adds questions to it, task by task. Here each task starts from the base prompt.
    scorer = HPScorerReward(judge)
    scorer.scorer_prompts = {"base": scorer.scorer_prompts["base"]}
    for task in miniature.world.TASKS:
        refiner = PromptRefiner(task, scorer, edits, ratings, output_dir / "prompts")
        for _ in range(rounds - len(refiner.history)):  # a second run resumes
            refiner.compare(*refiner.propose(miniature.SimulatedProposer()))
        print(f"\n{task}\n{refiner.table()}")

    print()
    measure(HPScorerReward(judge, scorer_prompts=str(output_dir / "prompts")), "refined")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/calibrate-scorer"))
    parser.add_argument("--cases_per_task", type=int, default=60, help="each edited by two editors")
    parser.add_argument("--rounds", type=int, default=2, help="of proposals for each task")
    parser.add_argument("--num_resamples", type=int, default=1000, help="of the bootstrap")
    main(**vars(parser.parse_args()))
