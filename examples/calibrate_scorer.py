# /// script
# dependencies = ["hp-edit-trl"]
# ///
"""
Builds an HP-Scorer: people rate edits, a judge scores them, their agreement is measured, and the scorer prompts are
refined until both agree (docs/building_an_hp_scorer.md).

    python examples/calibrate_scorer.py

People, judge and proposer are simulated, and the raters' noise is known. So is the correct agreement, which is printed
beside the measured one. With people and a real judge, each step is a command:

    hp-edit bench realpref --dataset someone/cases --editor someone/editor --output_dir runs/a   # and runs/b, runs/c
    hp-edit annotate runs/* --output_dir ratings
    hp-edit measure-agreement ratings runs/* --output_dir agreement
    hp-edit refine-prompt runs/* --ratings ratings --output_dir my-prompts --from_base --target 0.85 \\
        --judge_base_url http://localhost:8000/v1
"""

import argparse
from pathlib import Path

from hp_edit_trl import HPScorerReward, miniature
from hp_edit_trl.calibration import (
    compare_with_people,
    history_table,
    plan_refinement,
    plan_table,
    rated_tasks,
    read_history,
    read_scores,
    refine_tasks,
    score_dataset,
    summary_table,
    write_agreement,
)
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

    # ... and adds questions to it, task by task. A second run resumes.
    prompts = output_dir / "prompts"
    tasks, _ = rated_tasks(edits, ratings)
    print(plan_table(plan_refinement(tasks, HPScorerReward(judge), prompts, from_base=True), rounds))
    proposer = miniature.SimulatedProposer()
    summaries = refine_tasks(
        tasks, HPScorerReward(judge), edits, ratings, prompts, proposer, rounds, target=0.95, from_base=True
    )
    table = summary_table(list(summaries))
    print(f"{history_table(read_history(prompts))}\n{table}")

    print()
    measure(HPScorerReward(judge, scorer_prompts=str(prompts)), "refined")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/calibrate-scorer"))
    parser.add_argument("--cases_per_task", type=int, default=60, help="each edited by two editors")
    parser.add_argument("--rounds", type=int, default=3, help="of proposals for each task")
    parser.add_argument("--num_resamples", type=int, default=1000, help="of the bootstrap")
    main(**vars(parser.parse_args()))
