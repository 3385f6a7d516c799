"""Probes of a judge: edits whose scores should be known show its biases."""

import logging
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from ..cases import case_images, check_edits, edit_keys, without_decoding
from ..judges import FailureLimit
from ..rewards import HPScorerReward
from ..utils.images import UnreadableImageError, read_image
from ..utils.seeding import seeded_generator


logger = logging.getLogger(__name__)

PROBES = {
    "as given": "the edit as it is",
    "edit first": "the same, but the edit is shown before the reference",
    "roles swapped": "the edit as the reference, and the reference as the edit",
    "unchanged": "the reference itself as the edit",
    "unrelated": "the edit of another case",
}


def probe_judge(scorer: HPScorerReward, dataset: Dataset, num_cases: int = 50, seed: int = 0) -> list[dict[str, Any]]:
    """
    Probes a judge for biases, with edits whose scores should be known.

    The order of the images should not matter. An unchanged reference and the edit of another case should score 0 or 1.
    A reference and an edit with swapped roles should score low too, unless the prompt means the same in both
    directions.

    Args:
        scorer ([`HPScorerReward`]):
            The scorer.
        dataset ([`~datasets.Dataset`]):
            The edits, as in [`score_dataset`].
        num_cases (`int`, *optional*, defaults to `50`):
            Largest number of cases. They are drawn at random, with one edit each.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.

    Returns:
        `list[dict]`: one row per probe, with `probe` (its name), `shown` (what the judge sees), `scores` (their
        number), `failed` (cases without a score), `mean` (of the scores), `low` (share of scores of at most 1), and
        `shift` and `change` (mean and mean absolute difference from the same case as given). Unknown values are
        `None`.

    Raises:
        `ValueError`: If there are fewer than two cases with readable images, or the dataset is not a dataset of edits.
        `ConnectionError`: If the judge is gone, see [`score_dataset`].
    """
    if num_cases < 2:
        raise ValueError(f"num_cases={num_cases}: a judge is probed with at least two cases.")
    check_edits(dataset, "dataset")
    dataset = without_decoding(dataset)
    keys = edit_keys(dataset)
    rows = list({case_id: i for i, (case_id, _) in reversed(list(enumerate(keys)))}.values())
    rows.sort(key=lambda i: seeded_generator(seed, "probe", keys[i][0]).initial_seed())
    cases: list[tuple[dict[str, Any], list[Image.Image], Image.Image]] = []
    for i in rows:
        row, (case_id, _) = dataset[i], keys[i]
        try:
            cases.append((row, case_images(row, case_id), read_image(row["edit"], f"The edit of case {case_id!r}")))
        except UnreadableImageError as error:
            logger.warning("Left out: %s", error)
        if len(cases) == num_cases:
            break
    if len(cases) < 2:
        raise ValueError(f"A judge is probed with at least two cases, but {len(cases)} have readable images.")
    scorer.check_tasks([scorer.task or row.get("task") for row, *_ in cases])
    scorer.load(1 + max(len(references) for _, references, _ in cases))

    limit = FailureLimit()
    scores: dict[str, list[float | None]] = {}
    for name in PROBES:
        conversations = []
        for number, (row, references, edit) in enumerate(cases):
            # All edits of a case are shown in one size, because another size would give an edit away.
            other = cases[(number + 1) % len(cases)][2].resize(edit.size)
            unchanged = references[-1].resize(edit.size)
            swapped = [*references[:-1], edit.resize(references[-1].size)]
            shown = {
                "as given": (edit, references),
                "edit first": (edit, references),
                "roles swapped": (unchanged, swapped),
                "unchanged": (unchanged, references),
                "unrelated": (other, references),
            }[name]
            conversation = scorer.conversation(row["prompt"], *shown, row.get("task"), row.get("requirement"))
            if name == "edit first":
                content = conversation[1]["content"]
                conversation[1]["content"] = content[-2:] + content[:-2]
            conversations.append(conversation)
        judgements = scorer.judge(conversations)
        limit.check(judgements, "edits", "Run it again when the judge is back.")
        scores[name] = [judgement.score for judgement in judgements]

    table = []
    for name, values in scores.items():
        known = [value for value in values if value is not None]
        shifts = [b - a for a, b in zip(scores["as given"], values, strict=True) if a is not None and b is not None]
        table.append(
            {
                "probe": name,
                "shown": PROBES[name],
                "scores": len(known),
                "failed": len(values) - len(known),
                "mean": float(np.mean(known)) if known else None,
                "low": float(np.mean([value <= 1 for value in known])) if known else None,
                "shift": float(np.mean(shifts)) if shifts else None,
                "change": float(np.mean(np.abs(shifts))) if shifts else None,
            }
        )
    return table
