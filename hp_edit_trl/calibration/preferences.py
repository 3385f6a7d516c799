"""How often a reward prefers the edit that people preferred, on public benchmarks of such preferences."""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from trl.trainer.utils import get_callable_name

from ..cases import load_split, without_decoding
from ..judges import FailureLimit, JudgeTally
from ..rewards import Reward, Rewards
from ..rewards.base import load_reward
from ..rewards.checks import check_rewards
from ..utils.files import is_below, read_jsonl
from ..utils.images import image_digest, read_image
from ..utils.statistics import mean_with_interval
from ..utils.tables import format_estimate, markdown_table


logger = logging.getLogger(__name__)

# Columns by which a benchmark is known
EDITSCORE = {"key", "instruction", "input_image", "output_images", "task_type", "dimension"}
EDITREWARD = {"id", "instruction", "source_image", "candidate_1", "candidate_2", "ranking", "comparison_type"}
VCREWARD = {"key", "instruction", "source_image", "edited_images", "winner", "task"}
NO_DIMENSION = "overall"


@dataclass(frozen=True)
class Preference:
    """
    Which of two edits of a case people preferred.

    Args:
        id (`str`):
            Id of the pair.
        prompt (`str`):
            The instruction.
        reference, first, second (`Any`):
            The reference and the edits, as [`~hp_edit_trl.utils.images.read_image`] takes them.
        preferred (`float`):
            1 if the first edit is preferred, 0 if the second is, 0.5 for a tie.
        task (`str`):
            The task, as the benchmark calls it.
        dimension (`str`):
            What people compared, e.g. `"consistency"`.
    """

    id: str
    prompt: str
    reference: Any
    first: Any
    second: Any
    preferred: float
    task: str
    dimension: str = NO_DIMENSION


def load_preferences(
    path: str, split: str = "train", revision: str | None = None, image_root: str | None = None
) -> Dataset:
    """
    Loads a benchmark of preferences: `EditScore/EditReward-Bench`, `TIGER-Lab/EditReward-Bench`, a folder of
    VCReward-Bench with its `metadata.jsonl`, or a dataset with the columns of one of them. Its images stay encoded.

    Args:
        path (`str`):
            A folder or a Hub repository, see [`~hp_edit_trl.cases.load_split`].
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        image_root (`str`, *optional*):
            Where images may lie outside the dataset, see [`~hp_edit_trl.cases.load_split`].

    Raises:
        `ValueError`: If it has other columns, or names an image outside.
    """
    lines = Path(path) / "metadata.jsonl"
    if lines.is_file():
        read = [(number, row) for number, row, _ in read_jsonl(lines)]
        rows = [row for _, row in read if isinstance(row, dict) and row.keys() >= VCREWARD]
        if rows and len(rows) < len(read):
            number = next(number for number, row in read if row not in rows)
            raise ValueError(f"Line {number} of {lines} has not the keys {', '.join(sorted(VCREWARD))}.")
        for row in rows:
            images = [Path(path) / one for one in (row["source_image"], *row["edited_images"])]
            if outside := [image for image in images if not is_below(image, image_root or path)]:
                raise ValueError(f"{lines} names the image {outside[0]}, which is not below {image_root or path}.")
            row["source_image"], *row["edited_images"] = map(str, images)
        if rows:
            return Dataset.from_list([{name: row[name] for name in sorted(VCREWARD)} for row in rows])
    dataset = without_decoding(load_split(path, split, image_root, revision=revision))
    if not any(columns <= set(dataset.column_names) for columns in (EDITSCORE, EDITREWARD, VCREWARD)):
        raise ValueError(
            f"{path} is no benchmark of preferences: it has the columns {dataset.column_names}, but needs those of "
            f"EditScore's ({', '.join(sorted(EDITSCORE))}), of TIGER-Lab's EditReward-Bench "
            f"({', '.join(sorted(EDITREWARD))}) or of VCReward-Bench ({', '.join(sorted(VCREWARD))})."
        )
    return dataset


def read_preferences(dataset: Dataset) -> Iterator[Preference]:
    """
    The preferences in a dataset that [`load_preferences`] has loaded, one after the other.

    Raises:
        `ValueError`: If a row does not say what was preferred, or has not two edits.
    """
    columns = set(dataset.column_names)
    for number, row in enumerate(dataset):
        if columns >= EDITSCORE:
            name, edits = f"{number}", row["output_images"]  # a pair occurs once for each dimension
            share: float | None = 1.0  # the better one comes first
            more = {"reference": row["input_image"], "task": row["task_type"], "dimension": row["dimension"]}
        elif columns >= EDITREWARD:
            name, edits = row["id"], [row["candidate_1"], row["candidate_2"]]
            share = _ranked(row["ranking"], row["comparison_type"])
            more = {"reference": row["source_image"], "task": row.get("dataset") or "all", "dimension": NO_DIMENSION}
        else:
            name, edits = row["key"], row["edited_images"]
            share = {"Image A": 1.0, "Image B": 0.0, "Tie": 0.5}.get(row["winner"])
            more = {"reference": row["source_image"], "task": row["task"], "dimension": "visual_consistency"}
        if len(edits) != 2 or share is None:
            raise ValueError(
                f"Row {number} ({name}) must have two edits and say which is preferred: it has {len(edits)} and says "
                f"{row.get('ranking', row.get('winner'))!r}."
            )
        yield Preference(str(name), row["instruction"], first=edits[0], second=edits[1], preferred=share, **more)


def _ranked(ranking: str, comparison: str | None) -> float | None:
    """Reads `"A>B"`, `"C<A"` or `"A=B=Good"` for the comparison `"AvsB"` or `"AvsC"`."""
    match = re.fullmatch(r"([A-D])\s*([<>=])\s*([A-D])(?:=(?:Good|Bad))?", ranking or "")
    letters = (comparison or "AvsB").split("vs")
    if match is None or sorted((match[1], match[3])) != sorted(letters):
        return None
    if match[2] == "=":
        return 0.5
    return float((match[1] == letters[0]) == (match[2] == ">"))


def measure_preferences(
    reward: Callable[..., Any],
    dataset: Dataset,
    chunk_size: int = 16,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """
    Measures how often a reward prefers the edit that people preferred.

    Both edits of a pair are given the reward, in one call and with one id, so that rewards by comparison work as well.
    Equal rewards are wrong where people had a preference, and right where they saw a tie. Pairs with a missing reward
    are counted and left out. HP-Scorer judges with its base prompt, or with that of its `task`.

    Args:
        reward (`Callable`):
            A reward function.
        dataset ([`~datasets.Dataset`]):
            The preferences, see [`load_preferences`].
        chunk_size (`int`, *optional*, defaults to `16`):
            Number of pairs that are judged together.
        confidence, num_resamples, seed:
            See [`agreement`].

    Returns:
        `list[dict]`: for each dimension a row over all its tasks (`task` is `None`) and one for each task, with `n`
        (pairs with both rewards), `missing` (pairs without), `accuracy` (an estimate, see
        [`~hp_edit_trl.utils.statistics.estimate`]; cases are resampled within their tasks) and `all_pairs` (the share
        of cases with several pairs that have all of them right, or `None`).

    Raises:
        `ValueError`: If a row is not valid.
        `ConnectionError`: If the judge is gone.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1.")
    name, limit = get_callable_name(reward), FailureLimit(in_a_row=3, window=8)
    if isinstance(reward, Reward):
        reward.check_tasks([reward.task])
    load_reward(reward, 2)
    judged: list[tuple[Preference, bytes, float | None]] = []
    progress = tqdm(total=len(dataset), desc="Preferences", unit="pair")
    preferences = read_preferences(dataset)
    while chunk := list(islice(preferences, chunk_size)):
        ids = [one.id for one in chunk for _ in range(2)]
        returned = reward(
            prompts=[one.prompt for one in chunk for _ in range(2)],
            completions=[
                read_image(edit, f"An edit of pair {one.id}") for one in chunk for edit in (one.first, one.second)
            ],
            image=[read_image(one.reference, f"The reference of pair {one.id}") for one in chunk for _ in range(2)],
            id=ids,
            trainer_state=None,
            log_extra=lambda column, values: None,
            log_metric=lambda name, value: None,
        )
        rewards = check_rewards(returned, name, ids, on_bad_reward="missing")
        for one, first, second in zip(chunk, rewards[::2], rewards[1::2], strict=True):
            right = None
            if first == first and second == second:  # neither is NaN
                right = float((first > second) + 0.5 * (first == second) == one.preferred)
            case = image_digest(one.reference) + one.prompt.encode()
            judged.append((one, case, right))
        missing = sum(right is None for _, _, right in judged[-len(chunk) :]) / len(chunk)
        tally = returned.tally if isinstance(returned, Rewards) else JudgeTally()
        if exceeded := limit.add(missing, tally):
            raise ConnectionError(
                f"Too many pairs have no rewards: {exceeded} of the calls failed. The failures by kind: "
                f"{limit.reasons() or f'{name!r} returned None'}."
            )
        progress.update(len(chunk))
    progress.close()

    rows = []
    for dimension in dict.fromkeys(one.dimension for one, _, _ in judged):
        of_dimension = [line for line in judged if line[0].dimension == dimension]
        tasks = list(dict.fromkeys(one.task for one, _, _ in of_dimension))
        for task in [None, *tasks] if len(tasks) > 1 else tasks:
            lines = [line for line in of_dimension if task in (None, line[0].task)]
            known = [(one.task, case, right) for one, case, right in lines if right is not None]
            cases: dict[tuple[str, bytes], list[float]] = {}
            for of_task, case, right in known:
                cases.setdefault((of_task, case), []).append(right)
            several = [min(rights) for rights in cases.values() if len(rights) > 1]
            rows.append(
                {
                    "dimension": dimension,
                    "task": task,
                    "n": len(known),
                    "missing": len(lines) - len(known),
                    "accuracy": mean_with_interval(
                        [right for _, _, right in known],
                        [of_task for of_task, _, _ in known],
                        [(of_task, case) for of_task, case, _ in known],
                        confidence,
                        num_resamples,
                        seed,
                    ),
                    "all_pairs": sum(several) / len(several) if several else None,
                }
            )
    return rows


def preferences_table(rows: list[dict[str, Any]]) -> str:
    """What [`measure_preferences`] returned, as a Markdown table."""
    return markdown_table(
        ["dimension", "task", "pairs", "missing", "accuracy", "all pairs"],
        [
            [
                row["dimension"],
                row["task"] or "all",
                row["n"],
                row["missing"],
                format_estimate(row["accuracy"]),
                "–" if row["all_pairs"] is None else f"{row['all_pairs']:.2f}",
            ]
            for row in rows
        ],
    )
