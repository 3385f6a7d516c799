"""Building a dataset of hard cases (stage 2 of HP-Edit) from images: the stages, one after the other."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ...editors import Editor, PipelineEditor, empty_device_cache, load_editor
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
from .estimate import Estimate, assumed_shares
from .export import export_build, export_candidates, push_dataset
from .filter import Filter
from .instructions import WriteInstructions, load_instruction_templates
from .plan import Plan
from .rounds import Earlier, Outcome
from .scores import ScoreEdits
from .sources import ImageCheck, Sources
from .split import Split
from .styles import STYLES, Style, StyleImages
from .verified import BenchmarkChoice


logger = logging.getLogger(__name__)

# Each stage is in the module of its name.
IMAGE_STAGES = ("sources", "duplicates", "category", "balance")
ROUND_STAGES = ("plan", "instructions", "split", "edits", "scores", "filter")
STAGES = (*IMAGE_STAGES, *ROUND_STAGES, "export")

FEW = 10  # a later round may be so small that all of its rows are rejected


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

    Cases are made in rounds, until each task has its count or its images are used up. Before each round, the log says
    what the build will still take.

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
            Names from `STAGES`: run only these. All stages before them must be finished. A new round begins only with
            `"plan"`.
        engine (`str`, *optional*, defaults to `"local"`):
            `"local"` or `"ray"`, see [`run_stage`].
        num_workers (`int`, *optional*, defaults to `1`):
            With Ray: number of workers per stage.
        gpus_per_worker (`float`, *optional*, defaults to `0`):
            With Ray: number of GPUs per worker.

    Returns:
        `Path`: the folder of the dataset, which [`load_realpref`] reads.

    Raises:
        `ValueError`: If an option is not valid, a task has no source or no usable image, a stage was made with other
            settings, an earlier stage is not finished, another builder is running in the folder, a stage rejects all
            rows, or the benchmark is not verified yet.
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
    build = _Build(config, _stages(config, writer, editor, scorer, styles), stages, accelerator)
    # Editor, writer and judge are named in the options: a mistake shows before the first of them is asked.
    for name in ("edits", "instructions", "scores"):
        if name in build.stages:
            build.make[name]()
    build.options = {"engine": engine, "num_workers": num_workers, "gpus_per_worker": gpus_per_worker}
    if config.verified is not None and not Path(config.verified).exists() and accelerator.is_main_process:
        logger.warning("There are no reviews at verified=%s yet; the export will need them.", config.verified)
    # Locked first: a second builder must learn that before it has read all of its sources.
    with WorkFolder.locked(config.output_dir) if accelerator.is_main_process else nullcontext():
        sources = Sources(config.sources)
        if unserved := [task for task in config.task_counts if task not in sources.tasks]:
            raise ValueError(
                f"No source is for the tasks {unserved}, of which task_counts asks for cases: add one, name the task "
                "in the `tasks` of one, or leave it out of task_counts and benchmark_counts."
            )
        for name in ("sources", "instructions"):
            build.make[name] = partial(build.make[name], sources.have_targets)
        images = WorkFolder(config.output_dir, sources)
        dataset = images.path / "dataset"
        rounds = build.make_rounds(images)
        if build.last == "export":
            # Read once, because people may be adding reviews now, and all processes must have the same.
            with in_step(accelerator):
                is_reader = config.verified is not None and accelerator.is_main_process
                reviews = read_reviews(config.verified)[0] if is_reader else None  # type: ignore[arg-type]
            (reviews,) = broadcast_object_list([reviews])
            benchmark = BenchmarkChoice(rounds[0], config.benchmark_counts, reviews, config.verified)
            benchmark.edit_corrected(build.make, build.run)
            with in_step(accelerator):
                if accelerator.is_main_process:
                    export_build(rounds, dataset, benchmark, config.task_counts)
                    if config.push_to_hub is not None:
                        logger.info("%s", push_dataset(dataset, config.push_to_hub, private=config.private))
        accelerator.wait_for_everyone()
    return dataset


class _Build:
    """A build in progress: takes work folders through their stages."""

    def __init__(
        self,
        config: BuildConfig,
        make: dict[str, Callable[..., Stage]],
        stages: list[str] | None,
        accelerator: Accelerator,
    ):
        self.config = config
        self.make = make
        self.stages = STAGES if stages is None else stages
        self.last = max(self.stages, key=STAGES.index)
        self.accelerator = accelerator
        self.options: dict[str, Any] = {}  # of `run_stage`

    def run(self, folder: WorkFolder, stage: Stage) -> Counter:
        """Runs a stage, and says what became of its rows."""
        reasons = run_stage(folder, stage, self.accelerator, **self.options)
        kept, all_rows = len(folder.live), len(folder.stages[-1].rows)
        if self.accelerator.is_main_process:
            logger.info("%s: %d of %d rows kept; rejected: %s", stage.name, kept, all_rows, dict(reasons))
            if stage.tally is not None and stage.tally.judgements:
                logger.info("%s: %s", stage.name, stage.tally)
        empty_device_cache()
        return reasons

    def make_rounds(self, images: WorkFolder) -> list[WorkFolder]:
        """Takes images through their stages, and makes rounds of cases from them. Returns the finished rounds."""
        rounds: list[WorkFolder] = []
        is_finished = self._take(images, {name: self.make[name] for name in IMAGE_STAGES})
        while is_finished:
            number = len(rounds) + 1
            folder = images.branch("." if number == 1 else f"round-{number}")
            # Decided once, because all processes must agree.
            with in_step(self.accelerator):
                counts = self._counts(folder, rounds) if self.accelerator.is_main_process else None
            (counts,) = broadcast_object_list([counts])
            if counts is None:
                break
            earlier = Earlier(rounds)
            make = {name: self.make[name] for name in ROUND_STAGES}
            make |= {"plan": partial(make["plan"], counts, earlier), "split": partial(make["split"], earlier)}
            is_finished = self._take(folder, make, is_first=number == 1)
            rounds += [folder] if is_finished else []
        return rounds

    def _take(self, folder: WorkFolder, make: Mapping[str, Callable[[], Stage]], is_first: bool = True) -> bool:
        """Takes a folder through stages. Returns whether all of them are finished."""
        for name in make:
            is_wanted = name in self.stages
            stage = make[name]() if is_wanted or folder.has_begun(name) else None
            if stage is None or not (is_wanted or folder.is_finished(stage)):
                if is_first and STAGES.index(name) < STAGES.index(self.last):
                    raise ValueError(f"The stage {name!r} is not finished in {folder.path}: run it first.")
                if not is_first and self.accelerator.is_main_process:
                    logger.info("%s stops before the stage %r, which is not among %s.", folder.path, name, self.stages)
                return False
            if name == "edits" and STAGES.index(self.last) > STAGES.index(name) and not folder.is_finished(stage):
                scores = make["scores"]()
                assert isinstance(scores, ScoreEdits)
                load_early(scores.scorer.judge)
            reasons = self.run(folder, stage)
            if name == "split" and is_first:
                with in_step(self.accelerator):
                    if self.accelerator.is_main_process:
                        export_candidates(folder, folder.path / "candidates")
            all_rows = len(folder.stages[-1].rows)
            # That the prompts of a later round have all been there is no fault: other images may give new ones.
            if len(folder.live) == 0 and (is_first or all_rows > FEW and name != "split"):
                raise ValueError(
                    f"The stage {name!r} rejected all of {all_rows} rows ({dict(reasons)}): read the reasons in "
                    f"{folder.path / name}, correct the cause, and remove that folder."
                )
            del stage  # it may have a model, which must be gone before the next one is loaded
            empty_device_cache()
        return True

    def _counts(self, folder: WorkFolder, rounds: list[WorkFolder]) -> dict[str, int] | None:
        """
        The number of cases per task of a round; `None` if there is none, because all tasks have their cases, their
        images are used up, or it may not begin. A round that has begun keeps its numbers.
        """
        config = self.config
        if folder.has_begun("plan"):
            return json.loads((folder.path / "plan" / "manifest.json").read_text())["settings"]["counts"]
        if "plan" not in self.stages:
            if not rounds:
                raise ValueError(f"The stage 'plan' is not finished in {folder.path}: run it first.")
            return None
        split = self.make["split"](Earlier())
        assert isinstance(split, Split)
        candidates = {} if rounds else split.candidates
        outcome = Outcome.of(rounds)
        assumed = assumed_shares(config.filter_rule, config.filter_threshold)
        estimate = Estimate(config.task_counts, assumed, outcome, candidates, config.prices)
        batch = folder.read(folder.live, Plan.inputs)
        served = {task for tasks in set(batch["tasks"]) for task in tasks.split(",")}
        if unserved := [task for task in config.task_counts if task not in served]:
            raise ValueError(
                f"All images of the sources for the tasks {unserved} were rejected: read the reasons in "
                f"{folder.path / 'sources'} and the stages after it, correct the cause, and remove those folders."
            )
        plan = self.make["plan"](estimate.planned, Earlier(rounds))
        assert isinstance(plan, Plan)
        available = Counter(task for _, task in plan.assign(batch))
        if not available:
            if missing := [task for task, count in estimate.missing.items() if count]:
                logger.warning("No images are left for the tasks %s, which have fewer cases than wanted.", missing)
            return None
        logger.info("Before round %d:\n%s", len(rounds) + 1, estimate.describe(available))
        return estimate.next_round(config.sample_size)


def _stages(
    config: BuildConfig,
    writer: Judge | None,
    editor: Editor | Callable[..., Any] | None,
    scorer: HPScorerReward | None,
    styles: Sequence[Style],
) -> dict[str, Callable[..., Stage]]:
    """What makes each stage, when its turn comes. Options of later stages are checked now, before hours of work."""
    sizes, seed = config.batch_sizes, config.seed
    style_images = None
    if config.style_images is not None:
        style_images = StyleImages(config.style_images, styles, config.resolution)
    templates = load_instruction_templates(config.instruction_templates, config.instruction_templates_revision)

    def load_model(name: str, base_url: str | list[str] | None, revision: str | None, **options: Any) -> Judge:
        return load_judge(name, base_url, revision, max_concurrency=config.max_concurrency, **options)

    def make_instructions(have_targets: bool = False) -> Stage:
        model = writer or load_model(config.writer, config.writer_base_url, config.writer_revision, max_new_tokens=384)
        size, check = sizes["instructions"], config.check_feasibility
        return WriteInstructions(
            model, templates, styles, style_images, have_targets, batch_size=size, check_feasibility=check
        )

    def make_edits() -> Stage:
        made = editor or load_editor(config.editor, config.editor_revision, **config.editor_options)
        if isinstance(made, PipelineEditor):
            made.check()
        return MakeEdits(made, sizes["edits"], seed)

    def make_scores() -> Stage:
        if scorer is not None:
            return ScoreEdits(scorer, sizes["scores"])
        mode = config.score_mode
        judge = load_model(config.judge, config.judge_base_url, config.judge_revision, score_mode=mode)
        prompts, revision = config.scorer_prompts, config.scorer_prompts_revision
        made = HPScorerReward(judge, scorer_prompts=prompts, scorer_prompts_revision=revision)
        return ScoreEdits(made, sizes["scores"])

    make: dict[str, Callable[..., Stage]] = {
        "sources": lambda have_targets=False: ImageCheck(
            config.min_side, config.max_side, config.resolution, sizes["sources"], have_targets
        ),
        "duplicates": lambda: Duplicates(config.duplicate_distance),
        "category": lambda: ClipCategories(
            config.clip_model, config.clip_revision, batch_size=sizes["category"], min_score=config.min_category_score
        ),
        "balance": lambda: Balance(config.max_images, config.category_quota, seed),
        "plan": lambda counts, earlier: Plan(
            counts, config.tasks_per_image, config.languages, seed, styles, style_images, earlier
        ),
        "instructions": make_instructions,
        "split": lambda earlier: Split(
            config.benchmark_counts,
            config.benchmark_distance,
            config.max_repeats,
            seed,
            config.benchmark_reserve,
            earlier,
        ),
        "edits": make_edits,
        "scores": make_scores,
        "filter": lambda: Filter(config.filter_rule, config.filter_threshold),
    }
    for name in ("sources", "duplicates", "balance", "filter"):
        make[name]()
    make["plan"](config.task_counts, None)
    make["split"](None)
    prompts = (
        scorer.scorer_prompts if scorer else load_scorer_prompts(config.scorer_prompts, config.scorer_prompts_revision)
    )
    for task in config.task_counts:
        for what, known in (("instruction template", templates), ("scorer prompt", prompts)):
            if task not in known:
                raise ValueError(
                    f"There is no {what} for the task {task!r}, which task_counts asks for; there are {list(known)}."
                )
    return make
