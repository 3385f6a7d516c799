"""
The example of docs/agreement.md: simulated ratings and scores, and what `hp-edit measure-agreement` makes of them.
Prints the tables and the difference of two scorers, and draws the page's figures.

    python benchmarks/agreement.py --output_dir outputs/agreement
    python benchmarks/agreement.py --output_dir outputs/agreement --assets docs/assets

8 tasks of 60 cases, 3 models, 3 annotators who make errors, and a scorer that makes more errors in some tasks and is
too generous to bad edits. The second scorer makes smaller errors.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

from hp_edit_trl.calibration import agreement_difference, agreement_tables, compare_with_people, write_agreement
from hp_edit_trl.ratings import Rating
from hp_edit_trl.tasks import TASKS


MODELS = {"model-a": -0.8, "model-b": 0.0, "model-c": 0.6}  # quality of their edits
ANNOTATORS = {"ada": 0.25, "ben": -0.35, "chloe": 0.1}  # bias of their ratings
JUDGE = {"judge": "simulated", "score_mode": "integer", "scorer_prompt": "simulated:1"}
PICTURES = {
    "human_against_scorer.png": "agreement-human-against-scorer.png",
    "mean_per_model.png": "agreement-mean-per-model.png",
}


def main(output_dir: Path, assets: Path | None) -> None:
    rng = np.random.default_rng(0)

    def whole(value: float) -> int:
        return int(np.clip(np.floor(value + 0.5), 0, 5))

    ratings, scores, compared = [], [], []
    for number, task in enumerate(TASKS):
        spread = 0.5 + 0.15 * number  # of the scorer's errors
        for case in range(60):
            difficulty = rng.normal(0, 0.7)
            for model, quality in MODELS.items():
                truth = np.clip(3.2 + quality - difficulty + rng.normal(0, 1), 0, 5)
                key = {"id": f"{task}-{case}", "editor": model}
                given = [
                    None if rng.random() < 0.03 else whole(truth + bias + rng.normal(0, 0.5))
                    for bias in ANNOTATORS.values()
                ]
                for name, score in zip(ANNOTATORS, given, strict=True):
                    ratings.append(Rating(name, *key.values(), score, "simulated:1", "2026-01-01T00:00:00+00:00"))
                error = rng.normal(0, spread)
                generous = 0.15 * (5 - truth)
                score = None if rng.random() < 0.01 else whole(truth + generous + error)
                scores.append(key | {"task": task, "score": score, **JUDGE})
                known = [one for one in given if one is not None]
                if known:
                    compared.append((np.mean(known), score, whole(truth + generous + 0.7 * error), key["id"]))
    result = compare_with_people(ratings, scores)
    write_agreement(result, output_dir)
    print(agreement_tables(result))
    people, first, second, ids = map(list, zip(*compared, strict=True))
    print("second scorer:", agreement_difference(people, first, second, clusters=ids))
    if assets is not None:
        for made, kept in PICTURES.items():
            shutil.copy(output_dir / made, assets / kept)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of tables and figures")
    parser.add_argument("--assets", type=Path, help="folder of the documentation's figures, which are replaced")
    main(**vars(parser.parse_args()))
