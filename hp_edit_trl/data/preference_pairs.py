"""
Preference pairs, mined from a policy: several edits of each case are sampled and scored, and the best is paired with
the worst.

Every edit is saved as soon as it is decoded, and every score as soon as it is given. A run that was stopped resumes
where it stopped, with any number of processes.
"""

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets import Image as ImageFeature
from datasets.table import embed_table_storage
from diffusers import DiffusionPipeline
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image
from tqdm import tqdm
from trl.trainer.utils import get_callable_name

from ..cases import (
    BadCaseError,
    case_images,
    check_cases,
    check_references,
    decoded,
    find_bad_cases,
    max_references,
    without_decoding,
)
from ..editors import PolicyEditor
from ..judges import FailureLimit, JudgeRefusedError, JudgeTally
from ..judges.failures import REFUSED
from ..policies import check_prompt_lengths, policy_class
from ..rewards import Gate, Reward, Rewards
from ..rewards.base import check_reward_tasks, load_reward
from ..rewards.checks import check_rewards, failed_rewards, own_copy
from ..utils.config import check_positive
from ..utils.distributed import in_step, patient_accelerator
from ..utils.files import (
    append_jsonl,
    check_unchanged,
    read_json,
    read_jsonl,
    write_atomically,
    write_json,
    write_text,
)
from ..utils.hub import CITATION
from ..utils.images import UnreadableImageError, image_digest, png_bytes, read_image
from ..utils.secrets import redacted
from ..utils.seeding import seeded_generator
from ..version import __version__
from .schema import content_description


logger = logging.getLogger(__name__)

FILE_BYTES = 500_000_000  # approximate size of a Parquet file
PAIR_COLUMNS = ("chosen", "rejected", "score_chosen", "score_rejected")


def mine_preference_pairs(
    pipeline: DiffusionPipeline,
    reward_func: Callable[..., Any],
    dataset: Dataset,
    output_dir: str | Path,
    *,
    num_generations: int = 5,
    score_name: str | None = "hp_score",
    min_gap: float = 1.0,
    min_chosen_score: float = 3.0,
    **options: Any,
) -> Dataset:
    """
    Samples edits of each case, scores them, and pairs the best with the worst: [`sample_and_score`], followed by
    [`build_preference_dataset`].

    The paper samples 5 edits per case. It does not say how much the scores of a pair must differ.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline to sample from, including a loaded LoRA.
        reward_func (`Callable`):
            A reward function with TRL's API that scores the edits, e.g. [`HPScorerReward`].
        dataset ([`~datasets.Dataset`]):
            The cases: `prompt`, `image` or `images`, optionally `id` and other columns for the reward function.
        output_dir (`str` or `Path`):
            Folder for the edits, their scores and the resulting dataset.
        num_generations (`int`, *optional*, defaults to `5`):
            Number of edits per case.
        score_name (`str`, *optional*, defaults to `"hp_score"`):
            Name under which the reward function logs the scores that pairs are chosen by. `None` uses its rewards.
        min_gap (`float`, *optional*, defaults to `1.0`):
            Smallest difference between the two scores of a pair.
        min_chosen_score (`float`, *optional*, defaults to `3.0`):
            Lowest score of a chosen edit. If all edits of a case failed, the best of them is not a good example.
        **options:
            Options of [`sample_and_score`]: `resolution`, `num_inference_steps`, `true_cfg_scale`, `batch_size`,
            `seed` and others.

    Returns:
        [`~datasets.Dataset`]: the pairs, as `load_dataset(output_dir / "dataset", split="train")` loads them.

    Raises:
        `ValueError`: If an option or the dataset is not valid, `output_dir` holds edits or scores that were made with
            other settings, or no case gives a pair.
    """
    _check_columns_are_free(dataset)
    sample_and_score(
        pipeline, reward_func, dataset, output_dir, num_generations=num_generations, score_name=score_name, **options
    )
    accelerator = patient_accelerator()
    with in_step(accelerator):
        if accelerator.is_main_process:
            build_preference_dataset(dataset, output_dir, min_gap=min_gap, min_chosen_score=min_chosen_score)
    files = sorted(map(str, (Path(output_dir) / "dataset" / "pairs").glob("*.parquet")))
    return Dataset.from_parquet(files, cache_dir=str(Path(output_dir) / "cache"))


def _check_columns_are_free(dataset: Dataset) -> None:
    if taken := sorted(set(PAIR_COLUMNS) & set(dataset.column_names)):
        raise ValueError(f"dataset already has the columns {taken}, which pairs would get: rename or remove them.")


def sample_and_score(
    pipeline: DiffusionPipeline,
    reward_func: Callable[..., Any],
    dataset: Dataset,
    output_dir: str | Path,
    *,
    num_generations: int = 5,
    score_name: str | None = "hp_score",
    resolution: int = 512,
    num_inference_steps: int | None = None,
    true_cfg_scale: float | None = None,
    negative_prompt: str | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 4,
    cases_per_round: int = 8,
    on_bad_case: str = "error",
    offload_encoders: bool = False,
    seed: int = 0,
) -> None:
    """
    Samples edits of each case and scores them. Edits are saved in `output_dir/samples`, one PNG each, and scores in
    `output_dir/scores-*.jsonl`, one line each. Edits and scores that exist are not made again; an edit without a score
    is scored again.

    Launched with `accelerate launch`, each process takes a part of the cases.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline to sample from, including a loaded LoRA.
        reward_func (`Callable`):
            A reward function with TRL's API that scores the edits.
        dataset ([`~datasets.Dataset`]):
            The cases.
        output_dir (`str` or `Path`):
            Folder for edits and scores.
        num_generations (`int`, *optional*, defaults to `5`):
            Number of edits per case.
        score_name (`str`, *optional*, defaults to `"hp_score"`):
            Name under which the reward function logs the scores. `None` uses its rewards.
        resolution (`int`, *optional*, defaults to `512`):
            Side in pixels of the square whose area every edit has.
        num_inference_steps (`int`, *optional*):
            Number of denoising steps. Defaults to the recommended value of the pipeline.
        true_cfg_scale (`float`, *optional*):
            Scale of classifier-free guidance. Defaults to the recommended value of the pipeline.
        negative_prompt (`str`, *optional*):
            Prompt of the unconditional pass. Defaults to the recommended value of the pipeline.
        guidance_scale (`float`, *optional*):
            Guidance scale that the transformer takes as an input, if it takes one.
        batch_size (`int`, *optional*, defaults to `4`):
            Largest number of edits that are denoised together.
        cases_per_round (`int`, *optional*, defaults to `8`):
            Number of cases whose edits are passed to the reward function together.
        on_bad_case (`str`, *optional*, defaults to `"error"`):
            What to do with a case that cannot be used, see [`~hp_edit_trl.cases.check_cases`]: `"error"` stops, before
            anything is sampled where it can be known then; `"skip"` leaves it out with a warning.
        offload_encoders (`bool`, *optional*, defaults to `False`):
            Keep the text encoder and the VAE in CPU memory while they are not used.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the noise, which depends on it, on the case and on the number of the sample.

    Raises:
        `ValueError`: If an option or the dataset is not valid, the reward function does not log `score_name`, or
            `output_dir` holds edits or scores that were made with other settings.
        `RuntimeError`: If the reward function raises an error in the first round. Later, the scores of such a round
            are missing.
        `ConnectionError`: If the judge is gone: its trial or its key fails, or there are no scores in three rounds in
            a row or in the whole run, or not even half of them in eight rounds. Edits and scores are kept.
    """
    if num_generations < 2:
        raise ValueError(f"num_generations={num_generations} must be at least 2: a pair has two edits.")
    if on_bad_case not in ("error", "skip"):
        raise ValueError(f"on_bad_case={on_bad_case!r} is not known: use one of ['error', 'skip'].")
    check_positive(batch_size=batch_size, cases_per_round=cases_per_round, resolution=resolution)
    bad = check_cases(dataset, "dataset", on_bad_case)
    policy_type = policy_class(pipeline)
    bad |= check_references(dataset, "dataset", policy_type.max_references, on_bad_case)
    policy = policy_type(pipeline, offload_encoders)
    bad |= check_prompt_lengths(policy, dataset, "dataset", on_bad_case)
    editor = PolicyEditor(
        policy,
        str(pipeline.config.get("_name_or_path") or "base-model"),
        resolution,
        num_inference_steps,
        true_cfg_scale,
        negative_prompt,
        guidance_scale,
        batch_size,
    )
    sampling = redacted({**editor.identity, "seed": seed})
    scoring = {"reward_func": get_callable_name(reward_func), "score_name": score_name}
    if isinstance(reward_func, Reward):
        if reward_func.needs_groups:
            raise ValueError(
                f"{get_callable_name(reward_func)} compares the edits of a case with each other. Edits are mined and "
                "scored one by one, so that a run can resume: use a reward that judges each edit by itself."
            )
        if isinstance(reward_func, Gate) and score_name is not None:
            raise ValueError(
                f"score_name={score_name!r} names scores that have not passed the gate: use score_name=None, and "
                "choose min_gap and min_chosen_score on the scale of the rewards."
            )
        scoring["scorer"] = reward_func.description
    check_reward_tasks(reward_func, dataset.unique("task") if "task" in dataset.column_names else [None])
    accelerator = patient_accelerator()
    output_dir = Path(output_dir)
    _begin(output_dir, sampling, scoring, accelerator)
    with in_step(accelerator):
        load_reward(reward_func, 1 + max_references(dataset))
        editor.load()

    dataset = without_decoding(dataset)
    scores = read_mined_scores(output_dir)
    folders = _sample_folders(dataset, output_dir)

    def unscored(folder: Path) -> list[int]:
        return [k for k in range(num_generations) if scores.get((folder.name, k)) is None]

    def skip(error: ValueError) -> None:
        if on_bad_case == "error":
            raise BadCaseError(f"{error} Set on_bad_case='skip' to continue without it.") from error
        logger.warning("%s It is skipped.", error)

    # All cases are divided, also finished ones: the share of a process must not depend on the progress of others.
    share = range(accelerator.process_index, len(folders), accelerator.num_processes)
    todo = [index for index in share if index not in bad and unscored(folders[index])]
    rounds = range(0, len(todo), cases_per_round)
    limit, scored = FailureLimit(in_a_row=3, window=8), 0
    scores_file = output_dir / f"scores-{accelerator.process_index}.jsonl"
    with in_step(accelerator):  # a process that stops tells the others when their shares are done
        for start in tqdm(rounds, "Mining", unit="round", disable=not accelerator.is_main_process):
            rows, references, places = [], [], []
            for index in todo[start : start + cases_per_round]:
                row = {"id": index, **dataset[index]}
                try:
                    images = case_images(row, row["id"])
                    row = decoded(row, dataset.features, row["id"])
                except (UnreadableImageError, BadCaseError) as error:
                    skip(error)
                    continue
                rows.append(row | ({"images": images} if row.get("images") is not None else {"image": images[0]}))
                references.append(images)
                places.append(folders[index])
            while rows:
                try:
                    _sample(editor, rows, references, places, num_generations, seed)
                    break
                except BadCaseError as error:  # from encoding, before anything is sampled
                    skip(error)
                    usable = [i for i, row in enumerate(rows) if str(row["id"]) != error.case_id]
                    rows, references = [rows[i] for i in usable], [references[i] for i in usable]
                    places = [places[i] for i in usable]
            samples = [
                (row, place / f"{k}.png") for row, place in zip(rows, places, strict=True) for k in unscored(place)
            ]
            if samples:
                lines, tally = _score(reward_func, samples, score_name, first=start == 0)
                append_jsonl(scores_file, lines)
                if REFUSED in tally.failures:
                    raise JudgeRefusedError(f"{tally.reasons[REFUSED]} Edits and scores are kept in {output_dir}.")
                missing = sum(line["score"] is None for line in lines)
                scored += len(lines) - missing
                exceeded = limit.add(missing / len(lines), tally)
                if exceeded or (start == rounds[-1] and not scored):
                    raise ConnectionError(
                        f"Too many edits have no score: {exceeded or 'all'} of the rounds failed. The failures by "
                        f"kind: {limit.reasons()}. Edits and scores are kept in {output_dir}: run it again to resume."
                    )
    if isinstance(reward_func, Reward) and reward_func.tally.judgements:
        logger.info("The judge: %s.", reward_func.tally)


def _begin(output_dir: Path, sampling: dict[str, Any], scoring: dict[str, Any], accelerator: Accelerator) -> None:
    """Writes down how edits and scores are made. Raises `ValueError` if the folder holds others."""
    file = output_dir / "mining.json"
    before = read_json(file) or {}
    has_scores = any(file.stat().st_size for file in output_dir.glob("scores-*.jsonl"))
    with in_step(accelerator):  # nothing is written that another process has yet to read
        remedy = "choose another output_dir"
        if before:
            check_unchanged(f"{output_dir} holds edits", before["sampling"], sampling, remedy)
        if has_scores:
            remedy += ", or delete its scores-*.jsonl to score its edits again"
            check_unchanged(f"{output_dir} holds scores", before.get("scoring", {}), scoring, remedy)
    with in_step(accelerator):
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            write_json(file, {"sampling": sampling, "scoring": scoring})


def _sample_folders(dataset: Dataset, output_dir: Path) -> list[Path]:
    """The folder of each case's samples. Its name is a hash of the case, so that a changed case gets new samples."""
    folders = []
    for index in range(len(dataset)):
        row = dataset[index]
        digest = hashlib.sha256(repr((str(row.get("id", index)), row["prompt"])).encode())
        for value in row["images"] if row.get("images") is not None else [row.get("image")]:
            digest.update(image_digest(value))
        folders.append(output_dir / "samples" / digest.hexdigest()[:20])
    return folders


def _sample(
    editor: PolicyEditor,
    rows: list[dict[str, Any]],
    references: list[list[Image.Image]],
    folders: list[Path],
    num_generations: int,
    seed: int,
) -> None:
    """Samples and saves the edits that are missing in the folders of cases."""
    files = [(i, k, folder / f"{k}.png") for i, folder in enumerate(folders) for k in range(num_generations)]
    missing = [(i, k, file) for i, k, file in files if not file.exists()]
    ids = [str(rows[i]["id"]) for i, _, _ in missing]
    seeds = [seeded_generator(seed, "mining", ids[m], k).initial_seed() for m, (_, k, _) in enumerate(missing)]
    prompts = [rows[i]["prompt"] for i, _, _ in missing]
    for members, edits in editor.batches([references[i] for i, _, _ in missing], prompts, ids, seeds):
        for member, edit in zip(members, edits, strict=True):
            file = missing[member][2]
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, partial(Path.write_bytes, data=png_bytes(edit)))


def _score(
    reward_func: Callable[..., Any], samples: list[tuple[dict[str, Any], Path]], score_name: str | None, first: bool
) -> tuple[list[dict[str, Any]], JudgeTally]:
    """
    Scores saved edits, each given by its case and its file. Returns a line for each, in which a missing score is
    `None`, and the failures. An error of the reward function is one for all of them, unless it is the first call.
    """
    rows = [row for row, _ in samples]
    completions = [read_image(str(file), f"The edit {file} of case {row['id']!r}") for row, file in samples]
    extra: dict[str, list] = {}
    # As in training, the function may change what it is given.
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    tally = JudgeTally()
    name = get_callable_name(reward_func)
    try:
        rewards = reward_func(
            prompts=[row["prompt"] for row in rows],
            completions=completions,
            trainer_state=None,
            log_extra=extra.__setitem__,
            log_metric=lambda name, value: None,
            **own_copy(columns),
        )
    except JudgeRefusedError as error:
        rewards = error.rewards or [None] * len(rows)
        extra = {} if score_name is None else {score_name: rewards, **extra}
        tally.fail(REFUSED, str(error))
    except (Exception, SystemExit) as error:
        rewards = failed_rewards(error, name, [row["id"] for row in rows], tally, first)
        extra = {} if score_name is None else {score_name: rewards}
    else:
        if isinstance(rewards, Rewards):
            tally.merge(rewards.tally)
    if score_name is not None and score_name not in extra:
        raise ValueError(
            f"The reward function {name!r} does not log {score_name!r}; it logs "
            f"{sorted(extra)}. Choose one of these with score_name=, or use its rewards with score_name=None."
        )
    returned = rewards if score_name is None else extra[score_name]
    ids = [row["id"] for row in rows]
    lines = []
    for (row, file), score in zip(samples, check_rewards(returned, name, ids, on_bad_reward="missing"), strict=True):
        value = None if math.isnan(score) else score
        if value is None:
            logger.warning("No score for sample %s of case %s.", file.stem, row["id"])
        lines.append({"id": str(row["id"]), "case": file.parent.name, "sample": int(file.stem), "score": value})
    missing = sum(line["score"] is None for line in lines)
    if missing > tally.failures.total():
        tally.fail("no score", f"{name!r} returned None", missing - tally.failures.total())
    return lines, tally


def read_mined_scores(output_dir: str | Path) -> dict[tuple[str, int], float | None]:
    """
    Reads the scores that [`sample_and_score`] has written to a folder.

    Returns:
        `dict[tuple[str, int], float | None]`: the latest score of each edit, by the name of its case's folder and the
        number of the sample; `None` if it was never given.
    """
    scores: dict[tuple[str, int], float | None] = {}
    for file in sorted(Path(output_dir).glob("scores-*.jsonl")):
        for _, line, _ in read_jsonl(file):
            if line is None:  # cut off by a kill; the edit is scored again
                continue
            key = line["case"], line["sample"]
            scores[key] = scores.get(key) if line["score"] is None else line["score"]
    return scores


def build_preference_dataset(
    dataset: Dataset, output_dir: str | Path, *, min_gap: float = 1.0, min_chosen_score: float = 3.0
) -> Counter:
    """
    Builds a preference dataset from scored edits: the best and the worst edit of each case.

    It is written to `output_dir/dataset` in the form of a Hub repository, with a card. The configuration `pairs` has
    all columns of the cases and `chosen`, `rejected`, `score_chosen`, `score_rejected`. The configuration `samples`
    has every edit with its score. `dropped.jsonl` lists the cases without a pair, with the reason. Of edits with equal
    scores, the one that was sampled first is used.

    Args:
        dataset ([`~datasets.Dataset`]):
            The cases.
        output_dir (`str` or `Path`):
            Folder that [`sample_and_score`] has written to.
        min_gap (`float`, *optional*, defaults to `1.0`):
            Smallest difference between the two scores of a pair.
        min_chosen_score (`float`, *optional*, defaults to `3.0`):
            Lowest score of a chosen edit.

    Returns:
        `Counter`: number of pairs, and of cases dropped for each reason.

    Raises:
        `ValueError`: If no case gives a pair.
    """
    check_cases(dataset, "dataset", on_bad_case=None)
    _check_columns_are_free(dataset)
    bad = find_bad_cases(dataset, "dataset")
    output_dir = Path(output_dir)
    settings = read_json(output_dir / "mining.json")
    if settings is None:
        raise ValueError(f"{output_dir} holds no mined edits: its mining.json is missing or damaged. Mine them first.")
    dataset = without_decoding(dataset)
    if "id" not in dataset.column_names:
        dataset = dataset.add_column("id", [str(i) for i in range(len(dataset))])
    by_case: dict[str, dict[int, float]] = {}
    for (name, k), score in read_mined_scores(output_dir).items():
        if score is not None:
            by_case.setdefault(name, {})[k] = score

    pairs: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    dropped: list[dict[str, str]] = []
    for case, (case_id, folder) in enumerate(zip(dataset["id"], _sample_folders(dataset, output_dir), strict=True)):
        scores = by_case.get(folder.name, {})
        for k in sorted(int(file.stem) for file in folder.glob("*.png")):
            samples.append({"case": case, "sample": k, "score": scores.get(k), "edit": str(folder / f"{k}.png")})
        reason = _reason_against_pair(list(scores.values()), min_gap, min_chosen_score)
        if reason and case in bad:
            reason = f"bad case: {bad[case]}"
        if reason:
            dropped.append({"id": str(case_id), "reason": reason})
            continue
        in_order = sorted(scores)  # of equal scores, `max` and `min` take the first
        pair: dict[str, Any] = {"case": case}
        for name, choose in (("chosen", max), ("rejected", min)):
            k = choose(in_order, key=scores.__getitem__)
            pair |= {name: str(folder / f"{k}.png"), f"score_{name}": scores[k]}
        pairs.append(pair)
    counts = Counter({"pairs": len(pairs)}) + Counter(entry["reason"].partition(":")[0] for entry in dropped)
    if not pairs:
        raise ValueError(
            f"Not one of {len(dataset)} cases gave a pair ({dict(counts)}): lower min_gap={min_gap:g} or "
            f"min_chosen_score={min_chosen_score:g}, or sample more edits per case."
        )

    folder = output_dir / "dataset"
    _write_parquet(_joined(dataset, pairs), folder / "pairs", "chosen")
    texts = dataset.select_columns([name for name in ("id", "prompt", "task") if name in dataset.column_names])
    _write_parquet(_joined(texts.cast_column("id", Value("string")), samples), folder / "samples", "edit")
    write_text(folder / "dropped.jsonl", "".join(json.dumps(entry) + "\n" for entry in dropped))
    thresholds = {"min_gap": min_gap, "min_chosen_score": min_chosen_score}
    all_scores = [sample["score"] for sample in samples]
    _write_card(folder, settings["sampling"] | settings["scoring"], counts, all_scores, thresholds)
    logger.info("%s", dict(counts))
    return counts


def _joined(dataset: Dataset, rows: list[dict[str, Any]]) -> Dataset:
    """The cases that rows name by number in `case`, with the other columns of the rows. Paths become images."""
    columns = Dataset.from_list(rows)
    joined = concatenate_datasets([dataset.select(columns["case"]), columns.remove_columns("case")], axis=1)
    kinds = {name: ImageFeature() for name in ("image", "chosen", "rejected", "edit")}
    kinds |= {"images": List(ImageFeature()), "score_chosen": Value("float32"), "score_rejected": Value("float32")}
    return joined.cast(Features({name: kinds.get(name, kind) for name, kind in joined.features.items()}))


def _reason_against_pair(scores: list[float], min_gap: float, min_chosen_score: float) -> str | None:
    """Why a case with these scores gives no pair; `None` if it gives one."""
    if len(scores) < 2:
        return f"fewer than two scores: {len(scores)}"
    best, worst = max(scores), min(scores)
    if best == worst:
        return f"tie: all scores are {best:g}"
    if best < min_chosen_score:
        return f"failed: the best score {best:g} is below min_chosen_score={min_chosen_score:g}"
    if best - worst < min_gap:
        return f"gap: {best:g} and {worst:g} differ by less than min_gap={min_gap:g}"
    return None


def _write_parquet(dataset: Dataset, folder: Path, column: str) -> None:
    """Writes a dataset as Parquet files of about `FILE_BYTES` with the images inside; `column` has mined edits."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.parquet"):
        old.unlink()
    paths = [value["path"] for value in dataset.cast_column(column, ImageFeature(decode=False))[column]]
    per_row = 3 if column == "chosen" else 1  # reference, chosen and rejected image have about the same size
    num_files = max(1, math.ceil(per_row * sum(os.path.getsize(path) for path in paths) / FILE_BYTES))
    for i in range(num_files):
        shard = dataset.shard(num_files, i, contiguous=True).with_format("arrow")
        # Replaces paths by the content of the files
        shard = shard.map(embed_table_storage, batched=True, batch_size=100, keep_in_memory=True)
        shard.with_format(None).to_parquet(folder / f"train-{i:05d}-of-{num_files:05d}.parquet")


def _write_card(
    folder: Path, settings: dict[str, Any], counts: Counter, scores: list[float | None], thresholds: dict[str, float]
) -> None:
    known = [score for score in scores if score is not None]
    configs = [
        {
            "config_name": name,
            "description": content_description(folder / name),
            "data_files": [{"split": "train", "path": f"{name}/*.parquet"}],
            "default": name == "pairs",
        }
        for name in ("pairs", "samples")
    ]
    tags = ["hp-edit-trl", "dpo", "preference", "image-editing"]
    card = DatasetCard.from_template(
        DatasetCardData(configs=configs, task_categories=["image-to-image"], tags=tags),
        template_path=str(Path(__file__).parent / "pairs_card.md"),
        counts=dict(counts),
        settings=settings,
        model=Path(settings["editor"]).name if os.path.isdir(settings["editor"]) else settings["editor"],
        num_edits=len(scores),
        num_scored=len(known),
        mean_score=sum(known) / len(known),
        citation=CITATION,
        version=__version__,
        **thresholds,
    )
    write_text(folder / "README.md", str(card))
