"""HP-Scorer: a judge's score of an edit, and the reward computed from it."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from ..judges import Judge, Judgement, load_judge
from ..judges.base import ScoreMode
from .prompts import ScorerPrompt, load_scorer_prompts
from .vlm import VLMReward, equal_areas


class HPScorerReward(VLMReward):
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
        super().__init__(
            load_scorer_prompts(scorer_prompts, scorer_prompts_revision),
            None,
            self._sigmoid,
            load_judge(judge, judge_base_url, score_mode=score_mode),
        )
        self.task = task
        self.alpha = alpha
        self.beta = beta
        if task is not None:
            self.check_tasks([task])

    def _sigmoid(self, score: float) -> float:
        return 1 / (1 + math.exp(self.beta - self.alpha * score))

    @property
    def description(self) -> str:
        """Judge, prompts and task in one line: scores of scorers with different descriptions should not be mixed."""
        return f"{super().description}, task {self.task or 'of the case'}"

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

    def questions(self, *case: Any, **columns: Any) -> dict[str, list[dict[str, Any]]]:
        """The conversation that the judge sees for one edit, see [`HPScorerReward.conversation`]."""
        return {"hp_score": self.conversation(*case, **columns)}

    def ask(
        self,
        prompts: list[str],
        edits: list[Image.Image],
        references: list[list[Image.Image]],
        tasks: list[str | None],
        requirements: list[str | None],
    ) -> list[dict[str, Judgement]]:
        """Judges edits, see [`VLMReward.ask`]. Raises `ValueError` if there is no prompt for a task."""
        self.check_tasks([self.task or task for task in tasks])
        return super().ask(prompts, edits, references, tasks, requirements)

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
        return [one["hp_score"] for one in self.ask(prompts, edits, references, tasks, requirements)]
