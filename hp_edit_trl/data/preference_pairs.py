"""
Preference pairs, mined from a policy: several edits of each case are sampled and scored, and the best is paired with the worst.

Everything is on disk as soon as it exists: an edit when it is decoded, a score when it is given. A run that was stopped goes on
where it was, with any number of processes.
"""

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from datasets.table import embed_table_storage
from diffusers import DiffusionPipeline
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image
from tqdm import tqdm
from trl.trainer.utils import get_callable_name

from ..cases import case_images, check_columns, check_references, without_decoding
from ..editors import PolicyEditor
from ..policies import policy_class
from ..rewards import HPScorerReward
from ..utils.distributed import patient_accelerator
from ..utils.files import (
    append_jsonl,
    check_unchanged,
    read_json,
    read_jsonl,
    write_atomically,
    write_json,
    write_text,
)
from ..utils.images import UnreadableImageError, image_digest, png_bytes, read_image
from ..utils.seeding import seeded_generator
from ..version import __version__


logger = logging.getLogger(__name__)

SHARD_BYTES = 500_000_000  # of a Parquet file


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
    Samples edits of each case, scores them, and pairs the best with the worst: first [`sample_and_score`], then
    [`build_preference_dataset`].

    The paper samples 5 edits per case; it does not say by which gap winner and loser must differ.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The editor, with a LoRA if one is loaded.
        reward_func (`Callable`):
            A reward function in TRL's convention that scores the edits, e.g. [`HPScorerReward`].
        dataset ([`~datasets.Dataset`]):
            The cases: `prompt`, `image` or `images`, optionally `id` and whatever the reward function wants.
        output_dir (`str` or `Path`):
            Folder for the edits, their scores and the resulting dataset.
        num_generations (`int`, *optional*, defaults to `5`):
            Number of edits per case.
        score_name (`str`, *optional*, defaults to `"hp_score"`):
            Name under which the reward function logs the scores that pairs are chosen by. `None` takes its rewards.
        min_gap (`float`, *optional*, defaults to `1.0`):
            Smallest difference of the two scores of a pair.
        min_chosen_score (`float`, *optional*, defaults to `3.0`):
            Lowest score of a chosen edit: where all edits failed, the best of them is no example.
        **options:
            Passed to [`sample_and_score`]: `resolution`, `num_inference_steps`, `true_cfg_scale`, `batch_size`, `seed` and so
            on.

    Returns:
        [`~datasets.Dataset`]: the pairs, as `load_dataset(output_dir / "dataset", split="train")` loads them.
    """
    _check_free(dataset)
    sample_and_score(
        pipeline, reward_func, dataset, output_dir, num_generations=num_generations, score_name=score_name, **options
    )
    accelerator = patient_accelerator()
    if accelerator.is_main_process:
        build_preference_dataset(dataset, output_dir, min_gap=min_gap, min_chosen_score=min_chosen_score)
    accelerator.wait_for_everyone()
    files = sorted(map(str, (Path(output_dir) / "dataset" / "pairs").glob("*.parquet")))
    return Dataset.from_parquet(files, cache_dir=str(Path(output_dir) / "cache"))


def _check_free(dataset: Dataset) -> None:
    taken = sorted({"chosen", "rejected", "score_chosen", "score_rejected"} & set(dataset.column_names))
    if taken:
        raise ValueError(f"dataset has columns {taken} already, which pairs would have: rename or remove them.")


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
    on_bad_image: str = "error",
    offload_encoders: bool = False,
    seed: int = 0,
) -> None:
    """
    Samples edits of each case and scores them. Edits go to `output_dir/samples`, one PNG each, and scores to
    `output_dir/scores-*.jsonl`, a line each. What is there already is not done again; an edit without a score is scored again.

    Launched with `accelerate launch`, each process takes a part of the cases.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The editor, with a LoRA if one is loaded.
        reward_func (`Callable`):
            A reward function in TRL's convention that scores the edits.
        dataset ([`~datasets.Dataset`]):
            The cases.
        output_dir (`str` or `Path`):
            Folder for edits and scores.
        num_generations (`int`, *optional*, defaults to `5`):
            Number of edits per case.
        score_name (`str`, *optional*, defaults to `"hp_score"`):
            Name under which the reward function logs the scores. `None` takes its rewards.
        resolution (`int`, *optional*, defaults to `512`):
            Side in pixels of the square whose area every edit has.
        num_inference_steps (`int`, *optional*):
            Number of denoising steps. Defaults to what the pipeline is meant to be used with.
        true_cfg_scale (`float`, *optional*):
            Scale of classifier-free guidance. Defaults to what the pipeline is meant to be used with.
        negative_prompt (`str`, *optional*):
            Prompt of the second pass. Defaults to the one that the pipeline is meant to be used with.
        guidance_scale (`float`, *optional*):
            Guidance that the transformer takes as an input, if it does.
        batch_size (`int`, *optional*, defaults to `4`):
            Largest number of edits that are denoised together.
        cases_per_round (`int`, *optional*, defaults to `8`):
            Number of cases whose edits are handed to the reward function together.
        on_bad_image (`str`, *optional*, defaults to `"error"`):
            What to do with a case whose image cannot be decoded: `"error"` stops, `"skip"` leaves it out with a warning.
        offload_encoders (`bool`, *optional*, defaults to `False`):
            Keep the text encoder and the VAE in CPU memory while they are not used.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the edits' noise, which depends on it, on the case and on the number of the sample.

    Raises:
        `ValueError`: If an option or the dataset is not usable, the reward function logs no scores, or `output_dir` holds
            samples that were made otherwise.
    """
    if num_generations < 2:
        raise ValueError(f"num_generations={num_generations} must be at least 2: a pair has two edits.")
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image={on_bad_image!r} is not known: use one of ['error', 'skip'].")
    for name, value in (("batch_size", batch_size), ("cases_per_round", cases_per_round), ("resolution", resolution)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    check_columns(dataset, "dataset")
    policy_type = policy_class(pipeline)
    check_references(dataset, "dataset", policy_type.max_references)
    editor = PolicyEditor(
        policy_type(pipeline, offload_encoders),
        str(pipeline.config.get("_name_or_path") or "base-model"),
        resolution,
        num_inference_steps,
        true_cfg_scale,
        negative_prompt,
        guidance_scale,
        batch_size,
    )
    if isinstance(reward_func, HPScorerReward) and reward_func.task is None:
        reward_func.check_tasks(dataset.unique("task") if "task" in dataset.column_names else [None])
    sampling = {**editor.identity, "seed": seed}
    scoring = {"reward_func": get_callable_name(reward_func), "score_name": score_name}
    if isinstance(reward_func, HPScorerReward):
        scoring["scorer"] = reward_func.description
    accelerator = patient_accelerator()
    output_dir = Path(output_dir)
    _begin(output_dir, sampling, scoring, accelerator)
    editor.load()

    dataset = without_decoding(dataset)
    known = read_mined_scores(output_dir)
    places = _sample_folders(dataset, output_dir)
    # Cases are dealt out before those that are done are left out: a process must not depend on how far another has come.
    todo = [
        index
        for index in range(accelerator.process_index, len(places), accelerator.num_processes)
        if any(known.get((places[index].name, k), {}).get("score") is None for k in range(num_generations))
    ]
    scores_file = output_dir / f"scores-{accelerator.process_index}.jsonl"
    progress = tqdm(
        range(0, len(todo), cases_per_round), "Mining", unit="round", disable=not accelerator.is_main_process
    )
    for start in progress:
        cases, missing = [], []
        for index in todo[start : start + cases_per_round]:
            row = dict(dataset[index])
            row.setdefault("id", index)
            try:
                images = case_images(row, row["id"])
            except UnreadableImageError as error:
                if on_bad_image == "error":
                    raise UnreadableImageError(f"{error} Set on_bad_image='skip' to go on without it.") from error
                logger.warning("%s It is left out.", error)
                continue
            row |= {"images": images} if row.get("images") is not None else {"image": images[0]}
            cases.append((row, images, places[index]))
            missing += [
                (len(cases) - 1, k) for k in range(num_generations) if not (places[index] / f"{k}.png").exists()
            ]
        _sample(editor, cases, missing, seed)
        unscored = [
            (row, place, k)
            for row, _, place in cases
            for k in range(num_generations)
            if known.get((place.name, k), {}).get("score") is None
        ]
        if unscored:
            _score(reward_func, unscored, score_name, scores_file)
    accelerator.wait_for_everyone()


def _begin(output_dir: Path, sampling: dict[str, Any], scoring: dict[str, Any], accelerator: Accelerator) -> None:
    """Writes down how edits and scores are made; raises `ValueError` if those in the folder were made in another way."""
    file = output_dir / "mining.json"
    before = read_json(file) or {}
    scored = any(file.stat().st_size for file in output_dir.glob("scores-*.jsonl"))
    accelerator.wait_for_everyone()  # before anything is written that another process has yet to look at
    remedy = "choose another output_dir"
    if "sampling" in before:
        check_unchanged(f"{output_dir} holds edits", before["sampling"], sampling, remedy)
    if scored:
        remedy += ", or delete its scores-*.jsonl to score its edits again"
        check_unchanged(f"{output_dir} holds scores", before.get("scoring", {}), scoring, remedy)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(file, {"sampling": sampling, "scoring": scoring})
    accelerator.wait_for_everyone()


def _sample_folders(dataset: Dataset, output_dir: Path) -> list[Path]:
    """The folder of each case's samples. Its name is a hash of the case, so that a changed case gets samples of its own."""
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
    cases: list[tuple[dict[str, Any], list[Image.Image], Path]],
    missing: list[tuple[int, int]],
    seed: int,
) -> None:
    """Samples and saves edits; `missing` has the number of the case and of the sample."""
    ids = [str(cases[i][0]["id"]) for i, _ in missing]
    batches = editor.batches(
        [cases[i][1] for i, _ in missing],
        [cases[i][0]["prompt"] for i, _ in missing],
        ids,
        [seeded_generator(seed, "mining", ids[m], k).initial_seed() for m, (_, k) in enumerate(missing)],
    )
    for members, edits in batches:
        for member, edit in zip(members, edits, strict=True):
            case, k = missing[member]
            folder = cases[case][2]
            folder.mkdir(parents=True, exist_ok=True)
            content = png_bytes(edit)
            write_atomically(folder / f"{k}.png", lambda part, content=content: part.write_bytes(content))


def _score(
    reward_func: Callable[..., Any],
    samples: list[tuple[dict[str, Any], Path, int]],
    score_name: str | None,
    file: Path,
) -> None:
    """Scores saved edits and appends the scores to a file; a score that was not given is written as null."""
    rows = [row for row, _, _ in samples]
    edits = []
    for _, place, k in samples:
        edits.append(read_image(str(place / f"{k}.png"), f"Edit {k} of a case in {place}"))
    extra: dict[str, list] = {}
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    rewards = reward_func(
        prompts=[row["prompt"] for row in rows],
        completions=edits,
        trainer_state=None,
        log_extra=extra.__setitem__,
        log_metric=lambda name, value: None,
        **columns,
    )
    if score_name is not None and score_name not in extra:
        raise ValueError(
            f"The reward function {get_callable_name(reward_func)!r} logs no {score_name!r}; it logs {sorted(extra)}. Name one "
            "of those with score_name=, or take its rewards with score_name=None."
        )
    scores = rewards if score_name is None else extra[score_name]
    if len(scores) != len(samples):
        raise ValueError(f"The reward function returned {len(scores)} scores for {len(samples)} edits.")
    lines = []
    for (row, place, k), score in zip(samples, scores, strict=True):
        value = None if score is None or math.isnan(score) else float(score)
        if value is None:
            logger.warning("No score for sample %d of case %s.", k, row["id"])
        lines.append({"id": str(row["id"]), "case": place.name, "sample": k, "score": value})
    append_jsonl(file, lines)


def read_mined_scores(output_dir: str | Path) -> dict[tuple[str, int], dict[str, Any]]:
    """All scores of a folder, by the name of the case's folder and the number of the sample; the latest one counts."""
    scores: dict[tuple[str, int], dict[str, Any]] = {}
    for file in sorted(Path(output_dir).glob("scores-*.jsonl")):
        for _, entry, _ in read_jsonl(file):
            if entry is None:  # cut off by a kill: the sample is scored again
                continue
            key = entry["case"], entry["sample"]
            if entry["score"] is not None or key not in scores:
                scores[key] = entry
    return scores


def build_preference_dataset(
    dataset: Dataset, output_dir: str | Path, *, min_gap: float = 1.0, min_chosen_score: float = 3.0
) -> Counter:
    """
    Makes a preference dataset of the scored samples in a folder: for each case its best and its worst edit.

    `output_dir/dataset` then is a dataset as it lies on the Hub, with a card: the configuration `pairs` has all columns of the
    cases and `chosen`, `rejected`, `score_chosen`, `score_rejected`; `samples` has every edit with its score; `dropped.jsonl`
    says of every case without a pair why it has none. Of edits with equal scores the one sampled first counts.

    Args:
        dataset ([`~datasets.Dataset`]):
            The cases.
        output_dir (`str` or `Path`):
            Folder that [`sample_and_score`] has written to.
        min_gap (`float`, *optional*, defaults to `1.0`):
            Smallest difference of the two scores of a pair.
        min_chosen_score (`float`, *optional*, defaults to `3.0`):
            Lowest score of a chosen edit.

    Returns:
        `Counter`: number of pairs, and of cases dropped for each reason.

    Raises:
        `ValueError`: If not one pair is left.
    """
    check_columns(dataset, "dataset")
    _check_free(dataset)
    output_dir = Path(output_dir)
    settings = read_json(output_dir / "mining.json")
    if settings is None:
        raise ValueError(f"{output_dir} holds no mined edits: its mining.json is missing or damaged. Mine them first.")
    settings = settings["sampling"] | settings["scoring"]
    # Sources are written as images, also where the cases only have their paths.
    kinds = {"image": ImageFeature(), "images": List(ImageFeature())}
    sources = {name: kind for name, kind in kinds.items() if name in dataset.features}
    dataset = without_decoding(dataset)
    if "id" not in dataset.column_names:
        dataset = dataset.add_column("id", [str(i) for i in range(len(dataset))])
    places = _sample_folders(dataset, output_dir)
    scores = read_mined_scores(output_dir)
    by_case: dict[str, dict[int, float]] = {}
    for (case, k), entry in scores.items():
        if entry["score"] is not None:
            by_case.setdefault(case, {})[k] = entry["score"]

    pairs, dropped, samples = [], [], []
    for index, (case_id, place) in enumerate(zip(dataset["id"], places, strict=True)):
        found = by_case.get(place.name, {})
        samples += [(index, k, place, found.get(k)) for k in sorted(int(path.stem) for path in place.glob("*.png"))]
        ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
        reason = None
        if len(ranked) < 2:
            reason = f"fewer than two scores: {len(ranked)}"
        else:
            best, worst = ranked[0][1], ranked[-1][1]
            if best == worst:
                reason = f"tie: all scores are {best:g}"
            elif best < min_chosen_score:
                reason = f"failed: the best score {best:g} is below min_chosen_score={min_chosen_score:g}"
            elif best - worst < min_gap:
                reason = f"gap: {best:g} and {worst:g} differ by less than min_gap={min_gap:g}"
        if reason is None:
            last = next(k for k, score in ranked if score == worst)
            pairs.append((index, place / f"{ranked[0][0]}.png", place / f"{last}.png", best, worst))
        else:
            dropped.append({"id": str(case_id), "reason": reason})
    counts = Counter({"pairs": len(pairs)}) + Counter(entry["reason"].partition(":")[0] for entry in dropped)
    if not pairs:
        raise ValueError(
            f"Not one of {len(dataset)} cases gave a pair ({dict(counts)}): lower min_gap={min_gap:g} or "
            f"min_chosen_score={min_chosen_score:g}, or sample more edits per case."
        )

    paired = dataset.select([index for index, *_ in pairs])
    _, chosen, rejected, best_scores, worst_scores = zip(*pairs, strict=True)
    for column, edits in (("chosen", chosen), ("rejected", rejected)):
        paired = paired.add_column(column, [str(edit) for edit in edits]).cast_column(column, ImageFeature())
    for column, values in (("score_chosen", best_scores), ("score_rejected", worst_scores)):
        paired = paired.add_column(column, list(values)).cast_column(column, Value("float32"))
    paired = paired.cast(Features({**paired.features, **sources}))
    texts = {name: dataset[name][:] for name in ("id", "prompt", "task") if name in dataset.column_names}
    texts["id"] = list(map(str, texts["id"]))
    listed = Dataset.from_dict(
        {name: [values[index] for index, *_ in samples] for name, values in texts.items()}
        | {"sample": [k for _, k, *_ in samples], "score": [score for *_, score in samples]}
        | {"edit": [str(place / f"{k}.png") for _, k, place, _ in samples]}
    ).cast_column("edit", ImageFeature())

    folder = output_dir / "dataset"
    for name, part in (("pairs", paired), ("samples", listed)):
        _write_parquet(part, folder / name)
    write_text(folder / "dropped.jsonl", "".join(json.dumps(entry) + "\n" for entry in dropped))
    _write_card(folder, settings, counts, listed, min_gap, min_chosen_score)
    logger.info("%s", dict(counts))
    return counts


def _write_parquet(dataset: Dataset, folder: Path) -> None:
    """Writes a dataset as Parquet files with their images inside, of about `SHARD_BYTES` each."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.parquet"):
        old.unlink()
    column = "edit" if "edit" in dataset.column_names else "chosen"
    paths = [value["path"] for value in dataset.cast_column(column, ImageFeature(decode=False))[column]]
    per_row = 3 if column == "chosen" else 1  # source, chosen and rejected are about equally large
    num_shards = max(1, math.ceil(per_row * sum(os.path.getsize(path) for path in paths) / SHARD_BYTES))
    for i in range(num_shards):
        file = folder / f"train-{i:05d}-of-{num_shards:05d}.parquet"
        shard = dataset.shard(num_shards, i, contiguous=True).with_format("arrow")
        # What is still a path becomes the file's content.
        shard = shard.map(embed_table_storage, batched=True, batch_size=100, keep_in_memory=True)
        shard.with_format(None).to_parquet(file)


def _write_card(
    folder: Path, settings: dict[str, Any], counts: Counter, samples: Dataset, min_gap: float, min_chosen_score: float
) -> None:
    known = [score for score in samples["score"] if score is not None]
    configs = []
    for name in ("pairs", "samples"):
        digest = hashlib.sha256()
        for file in sorted((folder / name).glob("*.parquet")):
            digest.update(file.read_bytes())
        # `load_dataset` finds a local folder in its cache by the name of the folder and by what the card says. Without the
        # description it would take other pairs, in a folder of the same name, for these.
        description = f"content {digest.hexdigest()[:16]}"
        files = [{"split": "train", "path": f"{name}/*.parquet"}]
        configs.append(
            {"config_name": name, "description": description, "data_files": files, "default": name == "pairs"}
        )
    data = DatasetCardData(
        configs=configs,
        task_categories=["image-to-image"],
        tags=["hp-edit-trl", "dpo", "preference", "image-editing"],
    )  # fmt: skip
    card = DatasetCard.from_template(
        data,
        template_path=str(Path(__file__).parent / "pairs_card.md"),
        counts=dict(counts),
        settings=settings,
        model=Path(settings["editor"]).name if os.path.isdir(settings["editor"]) else settings["editor"],
        num_edits=len(samples),
        num_scored=len(known),
        mean_score=sum(known) / len(known),
        min_gap=min_gap,
        min_chosen_score=min_chosen_score,
        version=__version__,
    )
    card.save(folder / "README.md")
