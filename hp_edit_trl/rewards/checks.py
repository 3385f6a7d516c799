"""The contract of reward functions: they are given copies, and what they return is checked before it is used."""

import inspect
import itertools
import logging
import math
import re
import reprlib
import site
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from trl.trainer.utils import get_callable_name

from ..judges import JudgeTally
from ..judges.server import served_model
from ..utils.texts import shortened
from .hp_scorer import HPScorerReward


logger = logging.getLogger(__name__)

# The squares of larger rewards overflow when a group's standard deviation is computed in single precision.
LARGEST_REWARD = 1e18

SIGNATURE = "def reward(prompts, completions, **columns) -> list[float | None]  # one per completion"


def check_rewards(returned: Any, name: str, case_ids: Sequence[Any], on_bad_reward: str = "error") -> list[float]:
    """
    Checks what a reward function returned.

    Args:
        returned (`Any`):
            A list, a tuple, or a one-dimensional array or tensor, with a number or `None` for each completion.
        name (`str`):
            Name of the function, for errors.
        case_ids (`Sequence`):
            Id of the case of each completion, for errors.
        on_bad_reward (`str`, *optional*, defaults to `"error"`):
            What to do with a reward that is infinite, NaN or above 1e18 (or below -1e18): `"error"` raises,
            `"missing"` treats it as `None`.

    Returns:
        `list[float]`: the rewards, NaN where there is none.

    Raises:
        `TypeError`: If it is not a sequence of numbers and `None`.
        `ValueError`: If it has the wrong length, or a reward is infinite, NaN or above 1e18.
    """
    returned = _as_python(returned, name)
    if isinstance(returned, tuple) and len(returned) == 2 and _is_flow_grpos(*returned):
        raise TypeError(
            f"The reward function {name!r} returned scores and details, as flow_grpo's do: return the scores alone, "
            f"and hand details to `log_extra` or `log_metric`: {SIGNATURE}."
        )
    if not isinstance(returned, list | tuple):
        what = "None (has it a `return`?)" if returned is None else f"a {type(returned).__name__}"
        raise TypeError(f"The reward function {name!r} returned {what}, but must return a list: {SIGNATURE}.")
    if len(returned) != len(case_ids):
        raise ValueError(
            f"The reward function {name!r} returned {len(returned)} rewards for {len(case_ids)} completions: "
            f"{SIGNATURE}."
        )
    rewards = []
    for case_id, value in zip(case_ids, returned, strict=True):
        if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
            value = _as_python(value, name)
        is_number = isinstance(value, int | float | np.integer | np.floating | np.bool_)
        if value is not None and (not is_number or isinstance(value, np.timedelta64)):  # which NumPy calls an integer
            raise TypeError(
                f"The reward function {name!r} returned {reprlib.repr(value)} for case {case_id!r}, but must return a "
                f"number or None: {SIGNATURE}."
            )
        if value is not None and not abs(value) <= LARGEST_REWARD:  # NaN too
            if on_bad_reward == "error":
                shown = (
                    f"{value:.3g}"
                    if isinstance(value, float | np.floating)
                    else f"a {type(value).__name__} that is too large"
                )
                raise ValueError(
                    f"The reward function {name!r} returned {shown} for case {case_id!r}: return a finite number of "
                    f"at most {LARGEST_REWARD:g}, or None where there is no reward, or set on_bad_reward='missing'."
                )
            value = None
        rewards.append(math.nan if value is None else float(value))
    return rewards


def _is_flow_grpos(scores: Any, details: Any) -> bool:
    """Whether two values are scores and details of all samples, and not the rewards of two."""
    is_many = isinstance(scores, list | tuple | dict) or (
        isinstance(scores, torch.Tensor | np.ndarray) and scores.ndim
    )
    return bool(is_many) and isinstance(details, dict | list | tuple)


def as_reward_funcs(reward_funcs: Any) -> list[Callable[..., Any]]:
    """
    The reward functions that a trainer is given, as a list.

    Args:
        reward_funcs (`Callable`, `str`, or a list of them):
            Reward functions. A string stands for [`HPScorerReward`] by a judge: its Hub id or local folder, or the
            address of an OpenAI-compatible server of one model, e.g. `"http://localhost:8000/v1"`.

    Raises:
        `TypeError`: If one of them is something else.
        `ValueError`: If there are none, or a string names no judge.
        `ConnectionError`: If a server does not say which model it serves.
    """
    given = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not given:
        raise ValueError("reward_funcs is empty: at least one reward function is needed.")
    return [_named_judge(func) if isinstance(func, str) else _checked_callable(func) for func in given]


def _named_judge(name: str) -> HPScorerReward:
    if re.match("https?://", name):
        return HPScorerReward(served_model(name), judge_base_url=name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).is_dir():
        raise ValueError(
            f"The reward function {name!r} is a string: it must be a judge's Hub id, e.g. "
            "'Qwen/Qwen3-VL-32B-Instruct', a folder with one, or the address of its server, e.g. "
            f"'http://localhost:8000/v1'. A function is passed itself: {SIGNATURE}."
        )
    return HPScorerReward(name)


def _checked_callable(func: Any) -> Callable[..., Any]:
    if isinstance(func, nn.Module) or not callable(func) or inspect.isclass(func):
        what = "the class " + func.__name__ if inspect.isclass(func) else f"an object of {type(func).__name__}"
        remedy = "make an object of it" if inspect.isclass(func) else "call it in a function"
        raise TypeError(f"A reward function must be a plain callable, but got {what}: {remedy}: {SIGNATURE}.")
    return func


def check_signature(func: Callable[..., Any], columns: Iterable[str]) -> None:
    """
    Checks that a reward function can be called as trainers do, before any model is loaded.

    Args:
        func (`Callable`):
            The reward function.
        columns (`Iterable[str]`):
            Columns of the dataset.

    Raises:
        `TypeError`: If it lacks a parameter for what it is called with, or needs one that it does not get.
    """
    try:
        signature = inspect.signature(func)
    except (TypeError, ValueError):  # e.g. of a builtin
        return
    names = ["prompts", "completions", *(name for name in columns if name not in ("prompt", "completion"))]
    names += ["trainer_state", "log_extra", "log_metric"]
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError as error:
        remedy = f"Write {SIGNATURE}"
        if {"images", "prompts", "metadata"} <= set(signature.parameters):
            remedy = (
                "Those of flow_grpo have other arguments: wrap it in def reward(prompts, completions, "
                "**columns): return list(func(completions, prompts, [{}] * len(prompts))[0])"
            )
        raise TypeError(
            f"The reward function {get_callable_name(func)!r}{signature} cannot be called with prompts, completions "
            f"and the columns of the dataset, {', '.join(names[2:-3])} ({error}). {remedy}."
        ) from error


def reward_names(reward_funcs: Sequence[Callable[..., Any]]) -> list[str]:
    """
    Names of reward functions for metrics and tables. Further functions of one name, e.g. two of one class, get a
    number, because their values would be mixed up.
    """
    names: list[str] = []
    for func in reward_funcs:
        name = get_callable_name(func)
        number = next(n for n in itertools.count(1) if (name if n == 1 else f"{name}_{n}") not in names)
        names.append(name if number == 1 else f"{name}_{number}")
    return names


def check_whole_groups(reward_funcs: Sequence[Callable[..., Any]], per_process: int, num_generations: int) -> None:
    """
    Checks that a reward function which compares the edits of a case sees all of them.

    Args:
        reward_funcs (`Sequence[Callable]`):
            The reward functions.
        per_process (`int`):
            Number of edits of a generation batch that a process samples.
        num_generations (`int`):
            Number of edits of a case.

    Raises:
        `ValueError`: If there is such a function, and edits of a case are sampled by several processes.
    """
    for func in reward_funcs:
        if getattr(func, "needs_groups", False) and per_process % num_generations:
            raise ValueError(
                f"{get_callable_name(func)} compares the edits of a case, but a process samples {per_process} edits "
                f"of a generation batch (per_device_train_batch_size x steps_per_generation), which is no multiple of "
                f"num_generations={num_generations}: change one of them."
            )


def _as_python(value: Any, name: str) -> Any:
    """Tensors and arrays as numbers or lists of them; masked values as `None`."""
    if not isinstance(value, torch.Tensor | np.ndarray):
        return value
    try:
        return None if value is np.ma.masked else value.tolist()
    except (RuntimeError, TypeError) as error:  # sparse tensors, tensors without values and others
        raise TypeError(
            f"The reward function {name!r} returned a {type(value).__name__} whose values cannot be read ({error}): "
            f"{SIGNATURE}."
        ) from error


def own_copy(value: Any) -> Any:
    """
    A copy of the values of rows, which can be changed without changing them for others: images, arrays and tensors are
    copied, in lists and dictionaries of any depth. Other values are returned as they are.
    """
    if isinstance(value, Image.Image | np.ndarray):
        return value.copy()
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list):
        return [own_copy(item) for item in value]
    if isinstance(value, tuple):
        return tuple(own_copy(item) for item in value)
    if isinstance(value, dict):
        return {key: own_copy(item) for key, item in value.items()}
    return value


async def awaited(func: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """
    What an async reward function returns. An error that would end the thread of the event loop, so that nobody ever
    got an answer, e.g. of `sys.exit`, is raised as a `RuntimeError`.
    """
    try:
        return await func(**arguments)
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def failed_rewards(
    error: BaseException, name: str, case_ids: Sequence[Any], tally: JudgeTally, first: bool
) -> list[float | None]:
    """
    What stands for the rewards of a function that raised an error: a missing reward of each completion, counted. In
    the first call of a run the error is one of the program, and stops it.

    Args:
        error (`BaseException`):
            The error, `SystemExit` included.
        name (`str`):
            Name of the function.
        case_ids (`Sequence`):
            Id of the case of each completion.
        tally ([`JudgeTally`]):
            Where the failures are counted, under the name of the function and the kind of error.
        first (`bool`):
            Whether no call of this run has succeeded yet.

    Raises:
        `RuntimeError`: If it is the first call.
    """
    cases = shortened(", ".join(dict.fromkeys(map(str, case_ids))))
    reason = f"{type(error).__name__}: {shortened(str(error))}"
    libraries = (sysconfig.get_path("stdlib"), *site.getsitepackages(), str(Path(__file__).parents[1]))
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(libraries)]
    if own:
        reason += f" ({Path(own[-1].filename).name}, line {own[-1].lineno})"
    if first:
        raise RuntimeError(
            f"The reward function {name!r} failed for the cases {cases}: {reason}. Correct it and start again: later "
            "in a run such an error counts as a missing reward."
        ) from error
    logger.warning("The reward function %r failed for the cases %s: %s. They have no reward.", name, cases, reason)
    tally.fail(f"{name}: {type(error).__name__}", reason, len(case_ids))
    return [None] * len(case_ids)
