"""The options of a build."""

import math
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ...judges.base import ScoreMode
from ...utils.config import check_positive
from .estimate import PRICES
from .plan import TASK_COUNTS, checked_counts
from .split import BENCHMARK_COUNTS


# Number of rows per batch of the stages that work in batches
BATCH_SIZES = {"sources": 32, "category": 64, "instructions": 16, "edits": 4, "scores": 32}


@dataclass
class BuildConfig:
    r"""
    Options of [`build_dataset`]. They are also the keys of the YAML file of `hp-edit build-dataset`.

    Args:
        sources (`list[dict]`):
            Where images come from, see [`Sources`]: each entry names a `folder`, a `dataset`, `parquet` files or a
            `webdataset`, and optionally its `license`.
        output_dir (`str`):
            Work folder. The finished dataset is in its subfolder `dataset`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of every random choice.
        min_side (`int`, *optional*, defaults to `256`):
            Images with a shorter side, in pixels, are rejected.
        max_side (`int`, *optional*, defaults to `16384`):
            Images with a longer side, in pixels, are rejected.
        resolution (`int`, *optional*):
            Larger images are scaled down to the area of a square with this side, in pixels. By default images keep
            their size.
        duplicate_distance (`int`, *optional*, defaults to `4`):
            Images are near duplicates if their perceptual hashes differ in at most this many of 64 bits.
        clip_model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            CLIP model that finds the MS-COCO category of an image.
        clip_revision (`str`, *optional*):
            Branch, tag or commit of its repository.
        min_category_score (`float`, *optional*):
            Images are rejected if the cosine similarity to their best category is lower.
        max_images (`int`, *optional*):
            Number of images to choose from, evenly over the categories. By default all.
        category_quota (`int`, *optional*):
            Largest number of images per category.
        task_counts (`dict[str, int]`, *optional*):
            Number of cases per task for the split `train`, after the filter. Cases are made in rounds until each task
            has its count, or its images are used up. Defaults to the counts of RealPref-50K (HP-Edit, table S6).
        tasks_per_image (`int`, *optional*, defaults to `1`):
            Largest number of different tasks per image.
        sample_size (`int`, *optional*, defaults to `100`):
            Number of cases per task in the first round, besides those for the benchmark. It measures how many cases
            the filter keeps, on which the size of later rounds depends. 0 assumes it in the first round, from table 1
            of HP-Edit.
        prices (`dict[str, float]`, *optional*):
            Price of an `edit`, a `judgement` and a `prompt`, as far as they cost something: what a build will cost is
            told with what it will take.
        languages (`dict[str, float]`, *optional*, defaults to `{"en": 1.0}`):
            Shares of the languages `en` and `zh`.
        writer (`str`, *optional*, defaults to `"Qwen/Qwen3-VL-32B-Instruct"`):
            Vision-language model that writes the prompts.
        writer_base_url (`str` or `list[str]`, *optional*):
            Address of an OpenAI-compatible server with that model, or of several. By default it runs in this process.
        writer_revision (`str`, *optional*):
            Branch, tag or commit of its repository.
        instruction_templates (`str`, *optional*):
            Folder or Hub repository of instruction templates. By default those of this package.
        instruction_templates_revision (`str`, *optional*):
            Branch, tag or commit of that repository.
        style_images (`str`, *optional*):
            Folder of pictures of the styles, see [`StyleImages`]. The writer is shown one of them with each image for
            the task `style`; it is kept in the column `style_image`.
        check_feasibility (`bool`, *optional*, defaults to `True`):
            Ask the writer whether each prompt can be carried out.
        max_repeats (`int`, *optional*, defaults to `20`):
            How often the same prompt may occur in a task.
        benchmark_counts (`dict[str, int]`, *optional*):
            Number of cases per task for the split `test`; `{}` for no such split. Defaults to the counts of
            RealPref-Bench (HP-Edit, table S6).
        benchmark_distance (`int`, *optional*, defaults to `8`):
            Images are excluded from training if their perceptual hash differs from that of a benchmark image in at
            most this many bits.
        benchmark_reserve (`float`, *optional*, defaults to `0.25`):
            Further cases per task, as a share of `benchmark_counts`, that replace those that people reject or that the
            editor fails with. They are kept out of training, too.
        verified (`str`, *optional*):
            File or folder of people's reviews of the benchmark's candidates (`hp-edit annotate --verify`). With it,
            the split `test` has only cases that were accepted. It is read when the dataset is exported, so that
            reviews can be given while edits are made.
        editor (`str`, *optional*, defaults to `"Qwen/Qwen-Image-Edit-2509"`):
            A diffusers pipeline, a folder of finished edits, or a function, see [`load_editor`]: the editors of
            `hp-edit bench`.
        editor_revision (`str`, *optional*):
            Branch, tag or commit of its repository.
        editor_options (`dict`, *optional*):
            Options of a pipeline: `lora`, `resolution`, `dtype`, `policy`, and arguments of its call, e.g.
            `{"num_inference_steps": 40, "lora": "..."}`, see [`PipelineEditor`].
        judge (`str`, *optional*, defaults to `"Qwen/Qwen3-VL-32B-Instruct"`):
            Vision-language model that scores the edits.
        judge_base_url (`str` or `list[str]`, *optional*):
            Address of an OpenAI-compatible server with that model, or of several. By default it runs in this process.
        judge_revision (`str`, *optional*):
            Branch, tag or commit of its repository.
        score_mode (`str`, *optional*, defaults to `"integer"`):
            `"integer"` or `"expected"`, see [`load_judge`].
        scorer_prompts (`str`, *optional*):
            Folder or Hub repository of scorer prompts. By default those of this package.
        scorer_prompts_revision (`str`, *optional*):
            Branch, tag or commit of that repository.
        filter_rule (`str`, *optional*, defaults to `"below"`):
            `"below"`: train on cases with scores below `filter_threshold`. `"hardest"`: train on this share of the
            cases of each task and round, those with the lowest scores.
        filter_threshold (`float`, *optional*, defaults to `5.0`):
            The score or the share.
        batch_sizes (`dict[str, int]`, *optional*):
            Number of rows per batch of the stages `sources`, `category`, `instructions`, `edits` and `scores`. A build
            that is stopped loses at most one batch per process.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Largest number of concurrent requests, to all servers together.
        push_to_hub (`str`, *optional*):
            Hub repository to push the finished dataset to.
        private (`bool`, *optional*, defaults to `True`):
            Whether to create that repository as a private one.

    Raises:
        `ValueError`: If a count, a price, `batch_sizes` or `max_concurrency` is not valid.
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
    task_counts: dict[str, int] = field(default_factory=TASK_COUNTS.copy)
    tasks_per_image: int = 1
    sample_size: int = 100
    prices: dict[str, float] = field(default_factory=dict)
    languages: dict[str, float] = field(default_factory=lambda: {"en": 1.0})
    writer: str = "Qwen/Qwen3-VL-32B-Instruct"
    writer_base_url: str | list[str] | None = None
    writer_revision: str | None = None
    instruction_templates: str | None = None
    instruction_templates_revision: str | None = None
    style_images: str | None = None
    check_feasibility: bool = True
    max_repeats: int = 20
    benchmark_counts: dict[str, int] = field(default_factory=BENCHMARK_COUNTS.copy)
    benchmark_distance: int = 8
    benchmark_reserve: float = 0.25
    verified: str | None = None
    editor: str = "Qwen/Qwen-Image-Edit-2509"
    editor_revision: str | None = None
    editor_options: dict[str, Any] = field(default_factory=dict)
    judge: str = "Qwen/Qwen3-VL-32B-Instruct"
    judge_base_url: str | list[str] | None = None
    judge_revision: str | None = None
    score_mode: ScoreMode = "integer"
    scorer_prompts: str | None = None
    scorer_prompts_revision: str | None = None
    filter_rule: str = "below"
    filter_threshold: float = 5.0
    batch_sizes: dict[str, int] = field(default_factory=dict)
    max_concurrency: int = 16
    push_to_hub: str | None = None
    private: bool = True

    def __post_init__(self):
        if unknown := sorted(self.batch_sizes.keys() - BATCH_SIZES):
            raise ValueError(f"batch_sizes has unknown stages {unknown}; stages with batches: {list(BATCH_SIZES)}.")
        self.batch_sizes = BATCH_SIZES | self.batch_sizes
        check_positive(**self.batch_sizes, max_concurrency=self.max_concurrency)
        for name in ("task_counts", "benchmark_counts", "prices"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a mapping, e.g. {{}}.")
        self.task_counts = checked_counts("task_counts", self.task_counts)
        if not self.task_counts:
            raise ValueError(
                f"task_counts asks for no case: give at least one of {list(TASK_COUNTS)} a count above 0."
            )
        benchmark = checked_counts("benchmark_counts", self.benchmark_counts)
        if others := [task for task in benchmark if task not in self.task_counts]:
            raise ValueError(
                f"benchmark_counts asks for cases of {others}, which task_counts does not: give both the same tasks."
            )
        if self.style_images is not None and "style" not in self.task_counts:
            raise ValueError(
                f"style_images={self.style_images!r} is set, but task_counts has no 'style': leave it out, or add it."
            )
        if isinstance(self.sample_size, bool) or not isinstance(self.sample_size, int) or self.sample_size < 0:
            raise ValueError(f"sample_size={self.sample_size!r} must be an integer of at least 0.")
        if self.push_to_hub is not None:
            try:
                validate_repo_id(self.push_to_hub)
            except HFValidationError as error:
                raise ValueError(f"push_to_hub={self.push_to_hub!r} is no name of a repository: {error}") from error
        for what, price in self.prices.items():
            if what not in PRICES:
                raise ValueError(f"prices names {what!r}; there are prices of {list(PRICES)}.")
            if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < math.inf:
                raise ValueError(f"prices: the price of {what!r} is {price!r}, but must be a number of at least 0.")
