"""HP-Scorer: a judge's score of an edit, and the reward computed from it."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from PIL import Image

from ..judges import CachedJudge, Judge, Judgement, JudgeTally, ServerJudge, describe_judge, load_judge
from ..judges.base import ScoreMode, fit_image, load_for
from ..judges.failures import check_not_refused
from ..utils.images import read_image
from .prompts import ScorerPrompt, load_scorer_prompts


logger = logging.getLogger(__name__)


def equal_areas(edit: Image.Image, references: list[Image.Image]) -> tuple[Image.Image, list[Image.Image]]:
    """
    An edit and its references as the judge sees them, wherever it judges: in training, in the dataset builder and in
    benchmarks. What has more pixels than the edit, or than the largest reference, is scaled down to as many; nothing
    is enlarged and no aspect ratio changed. So the judge compares contents, not sharpness: an edit at 512 px that
    changes nothing looks like its source, however large that is.

    Args:
        edit (`PIL.Image.Image`):
            The edit.
        references (`list[PIL.Image.Image]`):
            The reference images.

    Returns:
        `tuple[PIL.Image.Image, list[PIL.Image.Image]]`: the edit and the references.
    """
    areas = [image.width * image.height for image in references]
    limit = min(edit.width * edit.height, max(areas))
    return fit_image(edit, limit), [fit_image(reference, limit) for reference in references]


class HPScorerReward:
    r"""
    Reward of an edit by a vision-language judge with a scorer prompt per task (HP-Scorer of HP-Edit, section 4.1).

    The judge sees the source, the edit, the instruction and the task's prompt, and gives a score \\( s \\) in 0..5.
    The reward is \\( r = 1 / (1 + \exp(-\alpha s + \beta)) \\) (equation 7): .007, .047, .269, .731, .953 and .993 for
    the scores 0 to 5. A judgement that failed or cannot be read is `None`, which the trainer treats as not applicable.

    It is a plain TRL reward function: call it with `prompts`, `completions` (the edited images) and the columns of the
    dataset as lists.

    Args:
        judge (`str` or [`Judge`], *optional*, defaults to `"Qwen/Qwen3-VL-32B-Instruct"`):
            Model id for a [`TransformersJudge`] in this process, or for a [`ServerJudge`] if `judge_base_url` is
            given; or any judge, for settings beyond these.
        judge_base_url (`str` or `Sequence[str]`, *optional*):
            Address of an OpenAI-compatible server that serves the judge, e.g. `"http://localhost:8000/v1"`, or of
            several that share the requests, see [`ServerJudge`].
        scorer_prompts (`str`, *optional*):
            Where the scorer prompts come from: a folder or a Hub repository, see
            [`~hp_edit_trl.rewards.prompts.load_scorer_prompts`]. By default those of this package.
        scorer_prompts_revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        task (`str`, *optional*):
            Use this task's scorer prompt for every case instead of the one for its column `task`. `"base"` is the
            paper's base scorer.
        score_mode (`str`, *optional*, defaults to `"integer"`):
            `"integer"`: the digit answered. `"expected"`: the expectation over the digits' probabilities. Only read
            when `judge` is a string.
        alpha (`float`, *optional*, defaults to `2.0`):
            Scale \\( \alpha \\) of the reward, as in the paper.
        beta (`float`, *optional*, defaults to `5.0`):
            Shift \\( \beta \\) of the reward, as in the paper.

    Raises:
        `ValueError`: If an option or a prompt is not valid, or the judge cannot be used.
        `ImportError`: If `judge_base_url` is given and the extra `server` is not installed.

    Example:

    ```python
    >>> reward = HPScorerReward("Qwen/Qwen3-VL-32B-Instruct", judge_base_url="http://localhost:8000/v1")
    >>> reward(prompts=["Remove the cup"], completions=[edited], image=[source], task=["remove"])
    [0.9525741268224334]
    ```
    """

    def __init__(
        self,
        judge: str | Judge = "Qwen/Qwen3-VL-32B-Instruct",
        judge_base_url: str | Sequence[str] | None = None,
        scorer_prompts: str | None = None,
        scorer_prompts_revision: str | None = None,
        task: str | None = None,
        score_mode: ScoreMode = "integer",
        alpha: float = 2.0,
        beta: float = 5.0,
    ):
        self.scorer_prompts = load_scorer_prompts(scorer_prompts, scorer_prompts_revision)
        self.task = task
        self.alpha = alpha
        self.beta = beta
        if task is not None:
            self.check_tasks([task])
        self.judge = load_judge(judge, judge_base_url, score_mode=score_mode)
        self.tally = JudgeTally()  # of all judgements
        self.last_tally = JudgeTally()  # of those of the last call

    @property
    def description(self) -> str:
        """Judge, prompts and task in one line: scores of scorers with different descriptions should not be mixed."""
        prompts = ", ".join(sorted({prompt.revision for prompt in self.scorer_prompts.values()}))
        return f"{self.judge_description}, images at equal areas, prompts {prompts}, task {self.task or 'of the case'}"

    @property
    def is_remote(self) -> bool:
        """Whether the judge is on a server, so that this machine can do other work while it judges."""
        judge = self.judge.judge if isinstance(self.judge, CachedJudge) else self.judge
        return isinstance(judge, ServerJudge)

    @property
    def judge_description(self) -> str:
        """The judge's identity in one line, e.g. `"judge ServerJudge, name m, score_mode integer, ..."`."""
        return describe_judge(self.judge)

    def scorer_prompt(self, task: str | None) -> ScorerPrompt:
        """The scorer prompt for a case of `task`. Raises `ValueError` if there is none."""
        self.check_tasks([self.task or task])
        return self.scorer_prompts[self.task or task or "base"]

    def conversation(
        self,
        prompt: str,
        edit: Image.Image,
        references: list[Image.Image],
        task: str | None = None,
        requirement: str | None = None,
    ) -> list[dict[str, Any]]:
        """
        The conversation that the judge sees for one case: the scorer prompt, the references, the edit, see
        [`equal_areas`].
        """
        edit, references = equal_areas(edit, references)
        content: list[dict[str, Any]] = []
        for number, reference in enumerate(references, start=1):
            label = "Image A" if len(references) == 1 else f"Image A, picture {number}"
            content += [{"type": "text", "text": f"{label}:"}, {"type": "image", "image": reference}]
        content += [{"type": "text", "text": "Image B:"}, {"type": "image", "image": edit}]
        system = [{"type": "text", "text": self.scorer_prompt(task).fill(prompt, requirement)}]
        return [{"role": "system", "content": system}, {"role": "user", "content": content}]

    def check_tasks(self, tasks: Iterable[str | None]) -> None:
        """Raises `ValueError` if there is no prompt for one of `tasks`; `None` stands for the base prompt."""
        unknown = sorted({repr(task or "base") for task in tasks if (task or "base") not in self.scorer_prompts})
        if unknown:
            raise ValueError(
                f"No scorer prompt for the task {', '.join(unknown)}. There are prompts for: "
                f"{', '.join(self.scorer_prompts)}. Correct the column `task`, or add a prompt with `scorer_prompts=`."
            )

    def load(self, num_images: int = 2) -> None:
        """
        Loads the judge and raises an error if it cannot judge. Trainers call this before the first rollout.

        Args:
            num_images (`int`, *optional*, defaults to `2`):
                Number of images of the largest case: its references and the edit.
        """
        load_for(self.judge, num_images)

    def judge_edits(
        self,
        prompts: list[str],
        edits: list[Image.Image],
        references: list[list[Image.Image]],
        tasks: list[str | None],
        requirements: list[str | None],
    ) -> list[Judgement]:
        """
        Scores edits.

        Args:
            prompts (`list[str]`):
                The prompt of each case.
            edits (`list[PIL.Image.Image]`):
                The edits.
            references (`list[list[PIL.Image.Image]]`):
                The reference images of each case.
            tasks (`list[str | None]`):
                The task of each case.
            requirements (`list[str | None]`):
                Further requirements of each case.

        Returns:
            `list[Judgement]`: one per edit, with its score in [0, 5] or `None`.
        """
        self.check_tasks([self.task or task for task in tasks])
        columns = zip(prompts, edits, references, tasks, requirements, strict=True)
        conversations = [self.conversation(*case) for case in columns]
        judgements = self.judge(conversations)
        self.last_tally = JudgeTally().add(judgements)
        self.tally.merge(self.last_tally)
        return judgements

    def __call__(
        self,
        prompts: list[str],
        completions: list[Image.Image],
        image: list[Image.Image] | None = None,
        images: list[list[Image.Image]] | None = None,
        task: list[str | None] | None = None,
        requirement: list[str | None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Rewards of edits, in TRL's convention for reward functions.

        Args:
            prompts (`list[str]`):
                The instructions.
            completions (`list[PIL.Image.Image]`):
                The edited images.
            image (`list[PIL.Image.Image]`, *optional*):
                The source image of each case.
            images (`list[list[PIL.Image.Image]]`, *optional*):
                Instead of `image`, for cases with several reference images.
            task (`list[str]`, *optional*):
                The task of each case. Without it the base prompt is used.
            requirement (`list[str]`, *optional*):
                Further requirements of each case.
            log_extra (`Callable`, *optional*):
                Given by the trainer; receives the scores for the table of samples.
            log_metric (`Callable`, *optional*):
                Given by the trainer; receives `hp_score` (mean of the scores) and `hp_score_failed` (the share of
                cases without one).

        Raises:
            [`UnreadableImageError`]: If an image cannot be read. All images are read by
                [`~hp_edit_trl.utils.images.read_image`], and may also be paths.
            [`~hp_edit_trl.judges.JudgeRefusedError`]: If a server refuses the judge's key. It holds the rewards of
                the samples that were judged before.

        Returns:
            `list[float | None]`: the rewards in (0, 1), `None` where there is no score.
        """
        count = len(prompts)
        several: list = images or [None] * count
        single: list = image or [None] * count
        references = [many if many is not None else [one] for many, one in zip(several, single, strict=True)]
        if any(image is None for images in references for image in images):
            raise ValueError("HPScorerReward needs the reference images of every case: a column `image` or `images`.")
        ids = columns.get("id") or range(count)
        references = [
            [read_image(one, f"An image of case {case!r}") for one in several]
            for case, several in zip(ids, references, strict=True)
        ]
        edits = [read_image(edit, f"The edit of case {case!r}") for case, edit in zip(ids, completions, strict=True)]
        judgements = self.judge_edits(
            prompts, edits, references, task or [None] * count, requirement or [None] * count
        )
        for case, prompt, judgement in zip(ids, prompts, judgements, strict=True):
            if judgement.score is None:
                logger.warning(f"No score for case {case} ({prompt!r}): the judge answered {judgement.excerpt!r}.")
        scores = [judgement.score for judgement in judgements]
        known = [score for score in scores if score is not None]
        if log_extra is not None:
            log_extra("hp_score", scores)
        if log_metric is not None:
            log_metric("hp_score_failed", 1 - len(known) / count)
            if known:
                log_metric("hp_score", sum(known) / len(known))
        rewards = [None if score is None else 1 / (1 + math.exp(self.beta - self.alpha * score)) for score in scores]
        check_not_refused(judgements, rewards=rewards)
        return rewards
