"""A gate before a reward: there is none where a test fails."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from PIL import Image
from trl.trainer.utils import get_callable_name, is_async_callable

from ..judges import JudgeRefusedError, JudgeTally
from .base import Reward, Rewards, check_reward_tasks, load_reward
from .checks import check_rewards


class Gate(Reward):
    """
    A reward that is only given where a test is passed, e.g. that the edit has left the rest of the image alone. A sum
    of both would not do: an edit that repaints the image could make up for it by a higher reward.

    Both functions are called with all samples. If the value of the test is below the threshold, the reward is
    `closed`, whatever `reward` returned. Where the test does not apply (it returns `None`), the gate is open. Where
    the test failed, or the gate is open and the reward failed, the reward stays missing: a gate never makes a reward
    of a failure.

    Args:
        reward (`Callable`):
            A reward function. Async functions cannot be used.
        test (`Callable`):
            Another one, whose higher values are better, e.g. [`IdentityReward`].
        threshold (`float`):
            Smallest value with which the test is passed.
        closed (`float`, *optional*, defaults to `0.0`):
            The reward where the test is not passed. Choose the lowest of the reward's scale. Of the rewards of this
            package that is 0; of an [`HTTPReward`] without `normalize` it may be another value.

    Raises:
        `TypeError`: If one of them cannot be called, or is async.
        `ValueError`: If a number is not finite.

    Example:

    ```python
    >>> reward = Gate(HPScorerReward(judge), IdentityReward(), threshold=0.8)
    ```
    """

    def __init__(
        self, reward: Callable[..., Any], test: Callable[..., Any], threshold: float, closed: float = 0.0
    ) -> None:
        super().__init__()
        for name, func in (("reward", reward), ("test", test)):
            if not callable(func) or is_async_callable(func):
                raise TypeError(f"{name}={func!r} must be a reward function that is not async.")
        if not math.isfinite(threshold) or not math.isfinite(closed):
            raise ValueError(f"threshold={threshold} and closed={closed} must be finite.")
        self.reward = reward
        self.test = test
        self.threshold = threshold
        self.closed = closed
        self.__name__ = f"gated_{get_callable_name(reward)}"  # in metrics
        self._inner = [func for func in (reward, test) if isinstance(func, Reward)]
        self.needs_groups = any(func.needs_groups for func in self._inner)

    @property
    def description(self) -> str:
        """Both functions and the threshold in one line."""
        names = [
            func.description if isinstance(func, Reward) else get_callable_name(func)
            for func in (self.reward, self.test)
        ]
        return f"{names[0]}; {self.closed:g} unless {names[1]} is at least {self.threshold:g}"

    @property
    def prompt_revisions(self) -> list[str]:
        """The revisions of the scorer prompts of both."""
        return sorted({revision for func in self._inner for revision in func.prompt_revisions})

    @property
    def is_remote(self) -> bool:
        """Whether one of them is computed by others, and both are of this package."""
        return len(self._inner) == 2 and any(func.is_remote for func in self._inner)

    def check_tasks(self, tasks: Iterable[str | None]) -> None:
        """Raises `ValueError` if one of them cannot judge one of `tasks`."""
        tasks = list(tasks)
        for func in (self.reward, self.test):
            check_reward_tasks(func, tasks)

    def load(self, num_images: int = 2) -> None:
        """Gets both ready, see [`Reward.load`]."""
        for func in (self.reward, self.test):
            load_reward(func, num_images)

    def __call__(self, prompts: list[str], completions: list[Image.Image], **columns: Any) -> Rewards:
        """
        Rewards of edits, in TRL's convention for reward functions. `log_metric` receives `gate_closed`, the share of
        samples that did not pass the test.
        """
        ids = columns.get("id") or range(len(completions))
        tally = JudgeTally()

        def call(func: Callable[..., Any]) -> tuple[list[float], list[bool]]:
            try:
                returned = func(prompts=prompts, completions=completions, **columns)
            except JudgeRefusedError as error:
                raise JudgeRefusedError(str(error)) from error  # its rewards have not passed the gate
            failed = returned.failed if isinstance(returned, Rewards) else [False] * len(completions)
            tally.merge(returned.tally if isinstance(returned, Rewards) else JudgeTally())
            return check_rewards(returned, get_callable_name(func), ids), failed

        tested, test_failed = call(self.test)
        given, reward_failed = call(self.reward)
        rewards: list[float | None] = []
        failed = []
        for value, no_test, reward, no_reward in zip(tested, test_failed, given, reward_failed, strict=True):
            is_closed = not no_test and value < self.threshold  # false for NaN, where the test does not apply
            missing = no_test or (not is_closed and math.isnan(reward))
            rewards.append(None if missing else self.closed if is_closed else reward)
            failed.append(no_test or (missing and no_reward))
        if log_metric := columns.get("log_metric"):
            log_metric("gate_closed", sum(value < self.threshold for value in tested) / max(len(tested), 1))
        return Rewards(rewards, failed, tally)
