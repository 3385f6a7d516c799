"""What the reward functions of this package have in common, and what trainers and pair mining ask of them."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from PIL import Image

from ..judges import JudgeTally
from ..utils.images import read_image


class Rewards(list[float | None]):
    """
    What a [`Reward`] returns: a list of rewards, as TRL expects it, that says more about those that are missing.

    Args:
        rewards (`Iterable[float | None]`):
            The rewards.
        failed (`Sequence[bool]`, *optional*):
            Where the reward is missing because something failed. Elsewhere `None` means that the function does not
            apply to the case. By default all that are missing failed.
        tally ([`~hp_edit_trl.judges.JudgeTally`], *optional*):
            What the judgements cost, and the failures by kind.

    Raises:
        `ValueError`: If `failed` has another length.
    """

    def __init__(
        self, rewards: Iterable[float | None], failed: Sequence[bool] | None = None, tally: JudgeTally | None = None
    ):
        super().__init__(rewards)
        self.failed = [reward is None for reward in self] if failed is None else list(failed)
        self.tally = tally or JudgeTally()
        if len(self.failed) != len(self):
            raise ValueError(f"failed has {len(self.failed)} entries for {len(self)} rewards: each needs one.")


class Reward:
    """
    A reward function with TRL's API: call it with `prompts`, `completions` (the edited images) and the columns of the
    dataset as lists. It returns [`Rewards`]. Functions of your own need none of this: any function that returns a list
    does. If they have the methods `check_tasks` or `load`, these are called as well, before any model is loaded.
    """

    task: str | None = None
    # Whether an edit is compared with the others of its case, which must then be in the same call
    needs_groups = False

    def __init__(self) -> None:
        self.tally = JudgeTally()  # of all judgements

    @property
    def description(self) -> str:
        """What decides the rewards in one line: rewards with different descriptions should not be mixed."""
        return type(self).__name__

    @property
    def prompt_revisions(self) -> list[str]:
        """The revisions of the scorer prompts, for the model card."""
        return []

    @property
    def is_remote(self) -> bool:
        """Whether others compute the rewards, so that this machine can do other work in the meantime."""
        return False

    def check_tasks(self, tasks: Iterable[str | None]) -> None:
        """Raises `ValueError` if cases of one of `tasks` cannot be judged."""

    def load(self, num_images: int = 2) -> None:
        """
        Gets ready, and raises an error if that is impossible. Trainers call this before the first rollout.

        Args:
            num_images (`int`, *optional*, defaults to `2`):
                Number of images of the largest case: its references and the edit.
        """

    def __call__(self, prompts: list[str], completions: list[Image.Image], **columns: Any) -> Rewards:
        raise NotImplementedError


def check_reward_tasks(func: Callable[..., Any], tasks: Iterable[str | None]) -> None:
    """
    Asks a reward function whether it can judge cases of `tasks`, if it has a method `check_tasks` and no `task` of its
    own that it uses for all cases.

    Args:
        func (`Callable`):
            A [`Reward`], or any reward function.
        tasks (`Iterable[str | None]`):
            The tasks.

    Raises:
        `ValueError`: If it cannot.
    """
    if has_method(func, "check_tasks", tasks) and getattr(func, "task", None) is None:
        func.check_tasks(tasks)  # type: ignore[attr-defined]


def load_reward(func: Callable[..., Any], num_images: int = 2) -> None:
    """
    Lets a reward function get ready, if it has a method `load`, see [`Reward.load`]. It need not take an argument.

    Args:
        func (`Callable`):
            A [`Reward`], or any reward function.
        num_images (`int`, *optional*, defaults to `2`):
            Number of images of the largest case: its references and the edit.
    """
    if has_method(func, "load", num_images=num_images):
        func.load(num_images=num_images)  # type: ignore[attr-defined]
    elif has_method(func, "load"):
        func.load()  # type: ignore[attr-defined]


def has_method(func: Any, method: str, *args: Any, **kwargs: Any) -> bool:
    """Whether an object has a method that can be called so. A class is not asked: its methods need an object."""
    found = None if inspect.isclass(func) else getattr(func, method, None)
    if not callable(found):
        return False
    try:
        inspect.signature(found).bind(*args, **kwargs)
    except (TypeError, ValueError):  # it takes other arguments, or cannot be asked
        return False
    return True


def read_cases(
    name: str,
    completions: Sequence[Any],
    image: Sequence[Any] | None,
    images: Sequence[Any] | None,
    ids: Sequence[Any] | None,
) -> tuple[Sequence[Any], list[list[Image.Image]], list[Image.Image]]:
    """
    Reads the images that a reward function is called with.

    Args:
        name (`str`):
            Name of the reward function, for errors.
        completions (`Sequence`):
            The edits.
        image (`Sequence`, *optional*):
            The reference of each case.
        images (`Sequence`, *optional*):
            Instead of `image`, or of some of its rows: several references of each case.
        ids (`Sequence`, *optional*):
            Ids of the cases. By default they are numbered.

    Returns:
        `tuple`: the ids, the references and the edits.

    Raises:
        `ValueError`: If a case has no reference.
        [`UnreadableImageError`]: If an image cannot be read.
    """
    count = len(completions)
    several: Sequence[Any] = images or [None] * count
    single: Sequence[Any] = image or [None] * count
    given = [many if many is not None else [one] for many, one in zip(several, single, strict=True)]
    if any(image is None for images in given for image in images) or not all(given):
        raise ValueError(f"{name} needs the reference images of every case: a column `image` or `images`.")
    ids = ids or range(count)
    references = [
        [read_image(one, f"An image of case {case!r}") for one in several]
        for case, several in zip(ids, given, strict=True)
    ]
    edits = [read_image(edit, f"The edit of case {case!r}") for case, edit in zip(ids, completions, strict=True)]
    return ids, references, edits
