"""Building a dataset of hard cases (stage 2 of HP-Edit) from images: the stages, one after the other."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from ...editors import Editor, empty_device_cache, load_editor
from ...judges import Judge, load_early, load_judge
from ...reviews import read_reviews
from ...rewards import HPScorerReward, load_scorer_prompts
from ...utils.config import check_positive
from ...utils.distributed import in_step, patient_accelerator
from .balance import Balance
from .category import ClipCategories
from .config import BuildConfig
from .duplicates import Duplicates
from .edits import MakeEdits
from .engine import Stage, WorkFolder, run_stage
from .export import export_build, export_candidates, push_dataset
from .filter import Filter
from .instructions import WriteInstructions, load_instruction_templates
from .plan import Plan
from .scores import ScoreEdits
from .sources import ImageCheck, Sources
from .split import Split
from .styles import STYLES, Style
from .verified import BenchmarkChoice


logger = logging.getLogger(__name__)

# Each stage is in the module of its name.
STAGES = (
    "sources", "duplicates", "category", "balance", "plan", "instructions", "split", "edits", "scores", "filter",
    "export",
)  # fmt: skip


def build_dataset(
    config: BuildConfig,
    *,
    writer: Judge | None = None,
    editor: Editor | Callable[..., Any] | None = None,
    scorer: HPScorerReward | None = None,
    styles: Sequence[Style] = STYLES,
    stages: list[str] | None = None,
    engine: str = "local",
    num_workers: int = 1,
    gpus_per_worker: float = 0,
) -> Path:
    """
    Builds a dataset: reads images, finds their categories, has prompts written and edits made, scores the edits, keeps
    the hard cases for training, and writes all of it as a dataset with a card. The benchmark's candidates are written
    as soon as they are drawn, for people to verify.

    It can be stopped at any time. Started again, it resumes where it stopped, repeats at most one batch per process,
    and ends with the same files. A rejected row keeps its reason; `rejected.parquet` in the work folder lists all of
    them. Launched with `accelerate launch`, each process takes a part of the batches.

    Args:
        config ([`BuildConfig`]):
            The options.
        writer ([`Judge`], *optional*):
            Writes the prompts, instead of the model that `config` names.
        editor ([`Editor`] or `Callable`, *optional*):
            Makes the edits, instead of the one that `config` names: an editor, or a function from images and prompts
            to images.
        scorer ([`HPScorerReward`], *optional*):
            Scores the edits, instead of the judge that `config` names.
        styles (`Sequence[Style]`, *optional*):
            The styles that the task `style` draws from. Defaults to `STYLES`.
        stages (`list[str]`, *optional*):
            Names from `STAGES`: run only these. All stages before them must be finished.
        engine (`str`, *optional*, defaults to `"local"`):
            `"local"` or `"ray"`, see [`run_stage`].
        num_workers (`int`, *optional*, defaults to `1`):
            With Ray: number of workers per stage.
        gpus_per_worker (`float`, *optional*, defaults to `0`):
            With Ray: number of GPUs per worker.

    Returns:
        `Path`: the folder of the dataset, which [`load_realpref`] reads.

    Raises:
        `ValueError`: If an option is not valid, a stage was made with other settings, an earlier stage is not
            finished, another builder is running in the folder, a stage rejects all rows, or the benchmark is not
            verified yet.
        `ConnectionError`: If a server does not answer. Finished batches are kept.
        `OSError`: If the disk is full. Finished batches are kept.
    """
    if engine not in ("local", "ray"):
        raise ValueError(f"engine={engine!r} is not known: use 'local' or 'ray'.")
    check_positive(num_workers=num_workers)
    if gpus_per_worker < 0:
        raise ValueError(f"gpus_per_worker={gpus_per_worker} must be at least 0.")
    if unknown := sorted(set(stages or []) - set(STAGES)):
        raise ValueError(f"There are no stages {unknown}; there are {list(STAGES)}.")
    accelerator = patient_accelerator()
    if engine == "ray" and accelerator.num_processes > 1:
        raise ValueError("engine='ray' starts its own workers: start the build without accelerate launch.")
    make = _stages(config, writer, editor, scorer, styles)
    last = max(STAGES.index(name) for name in stages or STAGES)
    if config.verified is not None and not Path(config.verified).exists() and accelerator.is_main_process:
        logger.warning("There are no reviews at verified=%s yet; the export will need them.", config.verified)
    # Locked first: a second builder must learn that before it has read all of its sources.
    with WorkFolder.locked(config.output_dir) if accelerator.is_main_process else nullcontext():
        folder = WorkFolder(config.output_dir, Sources(config.sources))
        for name in STAGES[: min(last, len(make) - 1) + 1]:
            stage = make[name]()
            if stages is not None and name not in stages and not folder.is_finished(stage):
                raise ValueError(f"The stage {name!r} is not finished in {config.output_dir}: run it first.")
            if name == "edits" and last >= STAGES.index("scores") and not folder.is_finished(stage):
                scores = make["scores"]()
                assert isinstance(scores, ScoreEdits)
                load_early(scores.scorer.judge)
            reasons = run_stage(folder, stage, accelerator, engine, num_workers, gpus_per_worker)
            kept, all_rows = len(folder.live), len(folder.stages[-1].rows)
            if accelerator.is_main_process:
                logger.info("%s: %d of %d rows kept; rejected: %s", name, kept, all_rows, dict(reasons))
            if stage.tally is not None and stage.tally.judgements and accelerator.is_main_process:
                logger.info("%s: %s", name, stage.tally)
            if name == "split":
                with in_step(accelerator):
                    if accelerator.is_main_process:
                        export_candidates(folder, folder.path / "candidates")
            if kept == 0:
                raise ValueError(
                    f"The stage {name!r} rejected all of {all_rows} rows ({dict(reasons)}): read the reasons in "
                    f"{folder.path / name}, correct the cause, and remove that folder."
                )
            if stage.batch_size is not None:  # it may have a model, which must be gone before the next one is loaded
                del stage
                empty_device_cache()
        dataset = folder.path / "dataset"
        if STAGES[last] == "export":
            # Read once, because people may be adding reviews now, and all processes must have the same.
            with in_step(accelerator):
                is_reader = config.verified is not None and accelerator.is_main_process
                reviews = read_reviews(config.verified)[0] if is_reader else None  # type: ignore[arg-type]
            (reviews,) = broadcast_object_list([reviews])
            benchmark = BenchmarkChoice(folder, config.benchmark_counts, reviews, config.verified)

            def run(work: WorkFolder, stage: Stage) -> None:
                run_stage(work, stage, accelerator, engine, num_workers, gpus_per_worker)
                empty_device_cache()

            benchmark.edit_corrected(make, run)
            with in_step(accelerator):
                if accelerator.is_main_process:
                    export_build(folder, dataset, benchmark)
                    if config.push_to_hub is not None:
                        logger.info("%s", push_dataset(dataset, config.push_to_hub, private=config.private))
        accelerator.wait_for_everyone()
    return dataset


def _stages(
    config: BuildConfig,
    writer: Judge | None,
    editor: Editor | Callable[..., Any] | None,
    scorer: HPScorerReward | None,
    styles: Sequence[Style],
) -> dict[str, Callable[[], Stage]]:
    """What makes each stage, when its turn comes. Options of later stages are checked now, before hours of work."""
    sizes, seed = config.batch_sizes, config.seed
    templates = load_instruction_templates(config.instruction_templates, config.instruction_templates_revision)

    def load_model(name: str, base_url: str | list[str] | None, revision: str | None, **options: Any) -> Judge:
        return load_judge(name, base_url, revision, max_concurrency=config.max_concurrency, **options)

    def make_instructions() -> Stage:
        model = writer or load_model(config.writer, config.writer_base_url, config.writer_revision, max_new_tokens=384)
        size, check = sizes["instructions"], config.check_feasibility
        return WriteInstructions(model, templates, styles, batch_size=size, check_feasibility=check)

    def make_edits() -> Stage:
        made = editor or load_editor(config.editor, config.editor_revision, **config.editor_options)
        return MakeEdits(made, sizes["edits"], seed)

    def make_scores() -> Stage:
        if scorer is not None:
            return ScoreEdits(scorer, sizes["scores"])
        mode = config.score_mode
        judge = load_model(config.judge, config.judge_base_url, config.judge_revision, score_mode=mode)
        prompts, revision = config.scorer_prompts, config.scorer_prompts_revision
        made = HPScorerReward(judge, scorer_prompts=prompts, scorer_prompts_revision=revision)
        return ScoreEdits(made, sizes["scores"])

    make: dict[str, Callable[[], Stage]] = {
        "sources": lambda: ImageCheck(config.min_side, config.max_side, config.resolution, sizes["sources"]),
        "duplicates": lambda: Duplicates(config.duplicate_distance),
        "category": lambda: ClipCategories(
            config.clip_model, config.clip_revision, batch_size=sizes["category"], min_score=config.min_category_score
        ),
        "balance": lambda: Balance(config.max_images, config.category_quota, seed),
        "plan": lambda: Plan(
            config.num_cases, config.tasks_per_image, config.task_weights, config.languages, seed, styles
        ),
        "instructions": make_instructions,
        "split": lambda: Split(
            config.benchmark_counts, config.benchmark_distance, config.max_repeats, seed, config.benchmark_reserve
        ),
        "edits": make_edits,
        "scores": make_scores,
        "filter": lambda: Filter(config.filter_rule, config.filter_threshold),
    }
    for name in ("sources", "duplicates", "balance", "plan", "split", "filter"):
        make[name]()
    prompts = (
        scorer.scorer_prompts if scorer else load_scorer_prompts(config.scorer_prompts, config.scorer_prompts_revision)
    )
    for task in (task for task, weight in config.task_weights.items() if weight):
        for what, known in (("instruction template", templates), ("scorer prompt", prompts)):
            if task not in known:
                raise ValueError(
                    f"There is no {what} for the task {task!r}, which task_weights asks for; there are {list(known)}."
                )
    return make
