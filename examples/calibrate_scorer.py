# /// script
# dependencies = ["hp-edit-trl"]
# ///
"""
Builds an HP-Scorer: edits are rated by people and scored by a judge, agreement is measured, and the prompt is refined until the
judge finds what people find (docs/building_an_hp_scorer.md).

    python examples/calibrate_scorer.py

People, judge and proposer are simulated here, and the raters' noise is known. So is the agreement that must come out, which is
printed beside what was measured. With people and a real judge, each step is a command:

    hp-edit annotate someone/edits --ratings ratings
    hp-edit score someone/edits --base-url http://localhost:8000/v1 --out scores.jsonl
    hp-edit agreement ratings scores.jsonl --dataset someone/edits --out agreement
    hp-edit refine-prompt remove someone/edits --ratings ratings --out my-prompts --propose --base-url http://localhost:8000/v1
"""

import argparse
from pathlib import Path

from hp_edit_trl import HPScorerReward, miniature
from hp_edit_trl.calibration import PromptRefiner, compare_with_people, read_scores, score_dataset, write_report
from hp_edit_trl.judges import CachedJudge


EDITORS = {"careful": 0.25, "careless": 0.7}  # how often an edit stops half-way, and how often it spoils the rest
NOISE = {"anna": 0.3, "ben": 0.6, "carla": 1.0}  # standard deviation of what a rater adds to the true score


def main(output_dir: Path, cases_per_task: int, rounds: int) -> None:
    cases = miniature.load_dataset("train", 8 * cases_per_task)
    edits = miniature.flawed_edits(cases, EDITORS)
    truths = miniature.true_scores(edits)
    ratings = miniature.simulate_ratings(edits, NOISE)
    judge = CachedJudge(miniature.SimulatedJudge(cases), output_dir / "judgements.sqlite")

    def measure(scorer: HPScorerReward, name: str) -> None:
        file = output_dir / f"scores-{name}.jsonl"
        score_dataset(scorer, edits, file)
        lines = read_scores(file)
        result = compare_with_people(ratings, lines, edits)
        write_report(result, output_dir / f"agreement-{name}", edits)
        scores = {(line["id"], line["editor"]): line["score"] for line in lines}
        expected = miniature.known_pearson(
            truths, [scores[row["id"], row["editor"]] for row in edits], list(NOISE.values())
        )
        found = result["agreement"]["overall"]["pearson"]
        print(
            f"{name}: Pearson {found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f}), by the raters' noise "
            f"{expected:.3f}; report in {output_dir / f'agreement-{name}'}"
        )

    # The paper begins with a prompt that holds nothing but the scale, ...
    start = HPScorerReward(judge, task="base")
    measure(start, "base")

    # ... and adds questions to it, task by task. Here each task's prompt begins with the base prompt.
    scorer = HPScorerReward(judge)
    scorer.scorer_prompts = {"base": scorer.scorer_prompts["base"]}
    for task in miniature.world.TASKS:
        refiner = PromptRefiner(task, scorer, edits, ratings, output_dir / "prompts")
        for _ in range(rounds - len(refiner.history)):  # a second run goes on
            refiner.compare(*refiner.propose(miniature.SimulatedProposer()))
        print(f"\n{task}\n{refiner.table()}")

    print()
    measure(HPScorerReward(judge, scorer_prompts=str(output_dir / "prompts")), "refined")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/calibrate-scorer"))
    parser.add_argument("--cases_per_task", type=int, default=60, help="each edited by two editors")
    parser.add_argument("--rounds", type=int, default=2, help="of proposals for each task")
    args = parser.parse_args()
    main(args.output_dir, args.cases_per_task, args.rounds)
