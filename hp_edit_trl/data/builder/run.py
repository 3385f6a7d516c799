"""Building a dataset of hard cases (stage 2 of HP-Edit) from images, stage by stage."""

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from accelerate import Accelerator

from ...editors import Editor, FolderEditor, PipelineEditor
from ...judges import Judge, ServerJudge, TransformersJudge
from ...rewards import HPScorerReward, load_scorer_prompts
from ...tasks import TASKS
from ...utils.distributed import patient_accelerator
from ...utils.files import write_atomically
from ..schema import CASE_FEATURES, EDIT_FEATURES, SCHEMA_VERSION, SCORE_FEATURES
from .categories import Balance, ClipCategories
from .edits import MakeEdits, ScoreEdits
from .engine import Batch, Stage, WorkFolder, run_stage
from .export import export_dataset, push_dataset
from .instructions import Plan, WriteInstructions, load_instruction_templates
from .sources import Duplicates, ImageCheck, Sources
from .splits import Filter, Split
from .styles import STYLES, Style


logger = logging.getLogger(__name__)

STAGES = (
    "sources",
    "duplicates",
    "category",
    "balance",
    "plan",
    "instructions",
    "split",
    "edits",
    "scores",
    "filter",
    "export",
)


@dataclass
class BuildConfig:
    r"""
    How a dataset is built. The keys of a YAML file for `hp-edit build-dataset` are these.

    Args:
        sources (`list[dict]`):
            Where images come from, see [`Sources`]: each names a `folder`, a `dataset`, `parquet` files or a `webdataset`, and may
            name its `license`.
        output_dir (`str`):
            Work folder. The dataset is in its folder `dataset` in the end.
        seed (`int`, *optional*, defaults to `0`):
            Seed of every choice.
        min_side (`int`, *optional*, defaults to `256`):
            Images with a shorter side, in pixels, are rejected.
        max_side (`int`, *optional*, defaults to `16384`):
            Images with a longer side, in pixels, are rejected.
        resolution (`int`, *optional*):
            Images larger than its square are scaled down to that area. By default all keep their size.
        duplicate_distance (`int`, *optional*, defaults to `4`):
            Images are near duplicates if their perceptual hashes differ in at most this number of 64 bits.
        clip_model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            The CLIP model that finds the MS-COCO category of an image.
        clip_revision (`str`, *optional*):
            Branch, tag or commit of its repository.
        min_category_score (`float`, *optional*):
            Images whose best category has a lower cosine similarity are rejected.
        max_images (`int`, *optional*):
            Number of images that are chosen, evenly over the categories. By default all.
        category_quota (`int`, *optional*):
            Largest number of images of a category.
        num_cases (`int`, *optional*):
            Number of cases. By default `tasks_per_image` for each image.
        tasks_per_image (`int`, *optional*, defaults to `1`):
            Number of tasks for which an image gets an instruction.
        task_weights (`dict[str, float]`, *optional*):
            How the cases are shared among the tasks. Defaults to the counts of RealPref-50K (HP-Edit, table S6).
        languages (`dict[str, float]`, *optional*, defaults to `{"en": 1.0}`):
            How the instructions are shared among the languages `en` and `zh`.
        writer (`str`, *optional*, defaults to `"Qwen/Qwen3-VL-32B-Instruct"`):
            The vision-language model that writes instructions.
        writer_base_url (`str`, *optional*):
            OpenAI-compatible server that serves it. By default it runs in this process.
        writer_revision (`str`, *optional*):
            Branch, tag or commit of its repository.
        instruction_templates (`str`, *optional*):
            Folder or Hub repository of instruction templates. By default this package's.
        instruction_templates_revision (`str`, *optional*):
            Branch, tag or commit of that repository.
        check_feasibility (`bool`, *optional*, defaults to `True`):
            Ask the writer of each instruction whether it can be carried out.
        max_repeats (`int`, *optional*, defaults to `20`):
            How often one prompt may occur in a task.
        benchmark_counts (`dict[str, int]`, *optional*):
            Number of cases of each task that become the split `test`; `{}` for none. Defaults to those of RealPref-Bench (table S6).
        benchmark_distance (`int`, *optional*, defaults to `8`):
            Images whose perceptual hash is at most this number of bits from one of the benchmark are not trained on.
        editor (`str`, *optional*, defaults to `"Qwen/Qwen-Image-Edit-2509"`):
            A diffusers pipeline that edits, or a folder of edits named by their case's id.
        editor_revision (`str`, *optional*):
            Branch, tag or commit of its repository.
        editor_options (`dict`, *optional*):
            Options of [`PipelineEditor`], e.g. `{"num_inference_steps": 40, "lora": "..."}`.
        judge (`str`, *optional*, defaults to `"Qwen/Qwen3-VL-32B-Instruct"`):
            The vision-language model that scores.
        judge_base_url (`str`, *optional*):
            OpenAI-compatible server that serves it.
        judge_revision (`str`, *optional*):
            Branch, tag or commit of its repository.
        score_mode (`str`, *optional*, defaults to `"integer"`):
            `"integer"` or `"expected"`, see [`TransformersJudge`].
        scorer_prompts (`str`, *optional*):
            Folder or Hub repository of scorer prompts. By default this package's.
        scorer_prompts_revision (`str`, *optional*):
            Branch, tag or commit of that repository.
        filter_rule (`str`, *optional*, defaults to `"below"`):
            `"below"`: train on scores below `filter_threshold`. `"hardest"`: on this share of each task's cases, those with the
            lowest scores.
        filter_threshold (`float`, *optional*, defaults to `5.0`):
            The score or the share.
        batch_sizes (`dict[str, int]`, *optional*):
            Number of rows that the stages `sources`, `category`, `instructions`, `edits` and `scores` take at once. It is also what
            is lost when the build is stopped.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Requests at once to a server.
        push_to_hub (`str`, *optional*):
            Repository to which the finished dataset is pushed.
        private (`bool`, *optional*, defaults to `True`):
            Whether that repository is private, if it is new.

    Raises:
        `ValueError`: If an option is not usable.
    """

    sources: list[dict[str, Any]]
    output_dir: str
    seed: int = 0
    min_side: int = 256
    max_side: int = 16384
    resolution: int | None = None
    duplicate_distance: int = 4
    clip_model: str = "openai/clip-vit-large-patch14"
    clip_revision: str | None = None
    min_category_score: float | None = None
    max_images: int | None = None
    category_quota: int | None = None
    num_cases: int | None = None
    tasks_per_image: int = 1
    task_weights: dict[str, float] = field(
        default_factory=lambda: {task.name: task.realpref_50k for task in TASKS.values()}
    )
    languages: dict[str, float] = field(default_factory=lambda: {"en": 1.0})
    writer: str = "Qwen/Qwen3-VL-32B-Instruct"
    writer_base_url: str | None = None
    writer_revision: str | None = None
    instruction_templates: str | None = None
    instruction_templates_revision: str | None = None
    check_feasibility: bool = True
    max_repeats: int = 20
    benchmark_counts: dict[str, int] = field(
        default_factory=lambda: {task.name: task.realpref_bench for task in TASKS.values()}
    )
    benchmark_distance: int = 8
    editor: str = "Qwen/Qwen-Image-Edit-2509"
    editor_revision: str | None = None
    editor_options: dict[str, Any] = field(default_factory=dict)
    judge: str = "Qwen/Qwen3-VL-32B-Instruct"
    judge_base_url: str | None = None
    judge_revision: str | None = None
    score_mode: str = "integer"
    scorer_prompts: str | None = None
    scorer_prompts_revision: str | None = None
    filter_rule: str = "below"
    filter_threshold: float = 5.0
    batch_sizes: dict[str, int] = field(default_factory=dict)
    max_concurrency: int = 16
    push_to_hub: str | None = None
    private: bool = True

    def __post_init__(self):
        sizes = {"sources": 32, "category": 64, "instructions": 16, "edits": 4, "scores": 32}
        if unknown := sorted(self.batch_sizes.keys() - sizes):
            raise ValueError(f"batch_sizes names {unknown}, which take no batches; those that do are {list(sizes)}.")
        self.batch_sizes = sizes | self.batch_sizes
        for name, size in {**self.batch_sizes, "max_concurrency": self.max_concurrency}.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}={size!r} must be a whole number of at least 1.")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "BuildConfig":
        """
        Reads a configuration.

        Args:
            path (`str` or `Path`):
                The YAML file.

        Raises:
            `ValueError`: If it is no mapping, or an option is unknown, missing or not usable.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must be a mapping of options, but is a {type(values).__name__}.")
        known = {option.name: option for option in fields(cls)}
        if unknown := sorted(map(str, values.keys() - known.keys())):
            raise ValueError(f"{path} has unknown options {unknown}. Known are: {', '.join(known)}.")
        if missing := sorted({"sources", "output_dir"} - values.keys()):
            raise ValueError(f"{path} lacks the options {missing}.")
        # A key without a value means the default.
        config = cls(**{name: value for name, value in values.items() if value is not None})
        for name, option in known.items():
            value, kind = getattr(config, name), option.type
            if isinstance(kind, type) and not isinstance(value, (int, float) if kind is float else kind):
                raise ValueError(f"{path}: {name} must be a {kind.__name__}, but is {value!r}.")
        return config


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
    Builds a dataset: reads images, finds their categories, has instructions written and edits made, scores the edits, keeps the
    hard cases for training, and writes it all as a dataset with a card.

    Stop it at any time and run it again: it goes on where it was, redoes at most one batch of each process, and ends with the same
    files. A row that is rejected keeps its reason; `rejected.parquet` in the work folder has them all. Launched with
    `accelerate launch`, each process takes a part of the batches.

    Args:
        config ([`BuildConfig`]):
            The configuration.
        writer ([`Judge`], *optional*):
            Writes instructions in place of the model that `config` names.
        editor ([`Editor`] or `Callable`, *optional*):
            Edits in place of the pipeline that `config` names: also a function from images and prompts to images.
        scorer ([`HPScorerReward`], *optional*):
            Scores in place of the judge that `config` names.
        styles (`Sequence[Style]`, *optional*):
            The styles that the task `style` draws from. Defaults to `STYLES`.
        stages (`list[str]`, *optional*):
            Run these of `STAGES` only. All before them must be finished.
        engine (`str`, *optional*, defaults to `"local"`):
            `"local"` or `"ray"`, see [`run_stage`].
        num_workers (`int`, *optional*, defaults to `1`):
            With Ray: number of workers of each stage.
        gpus_per_worker (`float`, *optional*, defaults to `0`):
            With Ray: number of GPUs of a worker.

    Returns:
        `Path`: the folder of the dataset, which [`load_realpref`] reads.

    Raises:
        `ValueError`: If an option is not usable, a stage was built with other settings, an earlier stage is not finished, another
            builder is at work in the folder, or a stage leaves no row.
        `ConnectionError`: If a server gives no answers. What is there is kept.
        `OSError`: If the disk is full. What is there is kept.
    """
    if engine not in ("local", "ray"):
        raise ValueError(f"engine={engine!r} is not known: use 'local' or 'ray'.")
    if num_workers < 1 or gpus_per_worker < 0:
        raise ValueError(
            f"num_workers={num_workers} must be at least 1, and gpus_per_worker={gpus_per_worker} at least 0."
        )
    if unknown := sorted(set(stages or []) - set(STAGES)):
        raise ValueError(f"There are no stages {unknown}; there are {list(STAGES)}.")
    accelerator = patient_accelerator()
    if engine == "ray" and accelerator.num_processes > 1:
        raise ValueError("engine='ray' starts its own workers: start the build without accelerate launch.")
    # Before anything else, as a second builder must be told before it has read all its sources.
    with WorkFolder.locked(config.output_dir) if accelerator.is_main_process else nullcontext():
        return _build(
            config, writer, editor, scorer, styles, stages, accelerator, engine, num_workers, gpus_per_worker
        )


def _build(
    config: BuildConfig,
    writer: Judge | None,
    editor: Editor | Callable[..., Any] | None,
    scorer: HPScorerReward | None,
    styles: Sequence[Style],
    stages: list[str] | None,
    accelerator: Accelerator,
    engine: str,
    num_workers: int,
    gpus_per_worker: float,
) -> Path:
    sizes, seed = config.batch_sizes, config.seed

    def make_writer() -> Judge:
        return _vlm(config.writer, config.writer_base_url, config.writer_revision, config, max_new_tokens=384)

    def make_scorer() -> HPScorerReward:
        judge = _vlm(config.judge, config.judge_base_url, config.judge_revision, config, score_mode=config.score_mode)
        return HPScorerReward(
            judge, scorer_prompts=config.scorer_prompts, scorer_prompts_revision=config.scorer_prompts_revision
        )

    # Made one after the other, so that the models of one stage are gone before those of the next are loaded
    make: dict[str, Callable[[], Stage]] = {
        "sources": lambda: ImageCheck(config.min_side, config.max_side, config.resolution, sizes["sources"]),
        "duplicates": lambda: Duplicates(config.duplicate_distance),
        "category": lambda: ClipCategories(
            config.clip_model,
            config.clip_revision,
            batch_size=sizes["category"],
            min_score=config.min_category_score,
        ),
        "balance": lambda: Balance(config.max_images, config.category_quota, seed),
        "plan": lambda: Plan(
            config.num_cases, config.tasks_per_image, config.task_weights, config.languages, seed, styles
        ),
        "instructions": lambda: WriteInstructions(
            writer or make_writer(),
            templates,
            styles,
            batch_size=sizes["instructions"],
            check_feasibility=config.check_feasibility,
        ),
        "split": lambda: Split(config.benchmark_counts, config.benchmark_distance, config.max_repeats, seed),
        "edits": lambda: MakeEdits(editor or make_editor(config), sizes["edits"], seed),
        "scores": lambda: ScoreEdits(scorer or make_scorer(), sizes["scores"]),
        "filter": lambda: Filter(config.filter_rule, config.filter_threshold),
    }
    # What can be wrong with an option of a later stage is said before days of work on the earlier ones.
    for name in ("balance", "plan", "split", "filter", "duplicates", "sources"):
        make[name]()
    templates = load_instruction_templates(config.instruction_templates, config.instruction_templates_revision)
    prompts = (
        scorer.scorer_prompts if scorer else load_scorer_prompts(config.scorer_prompts, config.scorer_prompts_revision)
    )
    for task in (task for task, weight in config.task_weights.items() if weight):
        for what, known in (("instruction template", templates), ("scorer prompt", prompts)):
            if task not in known:
                raise ValueError(
                    f"There is no {what} for the task {task!r}, which task_weights asks for; there are {list(known)}."
                )
    folder = WorkFolder(config.output_dir, Sources(config.sources))
    last = max(STAGES.index(name) for name in stages or STAGES)
    for name in STAGES[: min(last, len(make) - 1) + 1]:
        stage = make[name]()
        if stages is not None and name not in stages and not folder.is_finished(stage):
            raise ValueError(f"The stage {name!r} is not finished in {config.output_dir}: run it first.")
        reasons = run_stage(folder, stage, accelerator, engine, num_workers, gpus_per_worker)
        kept, all_rows = len(folder.live), len(folder.stages[-1].rows)
        if accelerator.is_main_process:
            logger.info("%s: %d of %d rows kept; rejected: %s", name, kept, all_rows, dict(reasons))
        if kept == 0:
            raise ValueError(
                f"The stage {name!r} rejected all of {all_rows} rows ({dict(reasons)}): see the reasons in "
                f"{folder.path / name}, change what causes them, and remove that folder."
            )
        del stage
        gc.collect()
        torch.cuda.empty_cache()
    dataset = folder.path / "dataset"
    if STAGES[last] == "export" and accelerator.is_main_process:
        _export(folder, config, dataset)
    accelerator.wait_for_everyone()
    return dataset


def _vlm(name: str, base_url: str | None, revision: str | None, config: BuildConfig, **options: Any) -> Judge:
    if base_url is not None:
        return ServerJudge(name, base_url, revision=revision, max_concurrency=config.max_concurrency, **options)
    return TransformersJudge(name, model_init_kwargs={} if revision is None else {"revision": revision}, **options)


def make_editor(config: BuildConfig) -> Editor:
    """The editor that a configuration names: a folder of edits, or a pipeline."""
    folder = Path(config.editor)
    if folder.is_dir() and not (folder / "model_index.json").exists():
        return FolderEditor(folder)
    return PipelineEditor(config.editor, config.editor_revision, **config.editor_options)


def _export(folder: WorkFolder, config: BuildConfig, dataset: Path) -> None:
    rejected = list(folder.rejected())
    columns = {
        name: pa.int64() if name == "row" else pa.string() for name in ("stage", "row", "reason", "source", "file")
    }
    table = pa.Table.from_pylist(rejected, schema=pa.schema(list(columns.items())))
    write_atomically(folder.path / "rejected.parquet", lambda part: pq.write_table(table, part))
    counts: dict[str, Counter] = {stage.name: Counter() for stage in folder.stages}
    for row in rejected:
        counts[row["stage"]][row["reason"].partition(":")[0]] += 1

    splits = folder.read(folder.live, ["split"])["split"]
    names = [name for name in [*CASE_FEATURES, *EDIT_FEATURES, *SCORE_FEATURES] if name != "schema_version"]

    def batches(split: str) -> Iterator[Batch]:
        rows = folder.live[[name == split for name in splits]]
        for start in range(0, len(rows), 16):
            batch = folder.read(rows[start : start + 16], names)
            yield {"schema_version": [SCHEMA_VERSION] * len(batch["id"]), **batch}

    there = [name for name in ("train", "test", "filtered") if name in splits]
    if "train" not in there:
        raise ValueError(
            f"No case is left for training ({dict(Counter(splits))}): raise filter_threshold={config.filter_threshold}, or build "
            "from more images."
        )
    export_dataset(
        {name: batches(name) for name in there},
        dataset,
        rejected={stage: dict(sorted(reasons.items())) for stage, reasons in counts.items() if reasons},
    )
    if config.push_to_hub is not None:
        logger.info("%s", push_dataset(dataset, config.push_to_hub, private=config.private))
