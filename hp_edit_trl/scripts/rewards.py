"""Reward functions that are named in a file or on the command line, as strings and mappings."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from .. import rewards as catalogue
from ..utils.imports import import_object
from ..utils.secrets import redacted
from .utils import EditScriptArguments, load_scorer


NAMES = sorted({"Gate", *(name for name in catalogue.__all__ if name.endswith("Reward"))} - {"Reward"})
# Options that are reward functions themselves, and those that are other functions
OF_REWARDS, OF_FUNCTIONS = ("reward", "test"), ("parse", "normalize")

Named = str | Mapping[str, Mapping[str, Any] | None]


@dataclass
class OnlineScriptArguments(EditScriptArguments):
    """
    [`EditScriptArguments`] with the reward functions of `hp-edit grpo` and `nft`. [`load_rewards`] makes them.

    Args:
        reward_funcs (`list[str]`, *optional*):
            Reward functions, weighted by `reward_weights`: a name of `hp_edit_trl.rewards`, e.g. `IdentityReward`, a
            mapping of such a name to its options, a function as `file.py:name` or `package.module:name`, a judge's Hub
            id, or the address of its server. By default HP-Scorer, for which the options of the judge are;
            `HPScorerReward` names it among others.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: names of hp_edit_trl.rewards, in YAML with options, e.g. 'Gate: {reward: "
            "HPScorerReward, test: IdentityReward, threshold: 0.8}', or file.py:name. Default: HP-Scorer."
        },
    )


def load_rewards(script_args: OnlineScriptArguments) -> list[Any]:
    """
    Builds the reward functions that a script's options name.

    Args:
        script_args ([`OnlineScriptArguments`]):
            The options.

    Raises:
        `ValueError`: If a reward or an option of one is unknown, missing or not valid.
    """
    own = {"HPScorerReward": lambda: load_scorer(script_args)}
    if script_args.reward_funcs is None:
        return [load_scorer(script_args)]
    return [make_reward(named, own) for named in named_rewards(script_args.reward_funcs)]


def named_rewards(given: Any) -> list[Named]:
    """
    The names of reward functions, as a list. A word of the command line may be a mapping in YAML.

    Args:
        given (`Any`):
            What an option holds: a name, a mapping, or a list of them.

    Raises:
        `ValueError`: If it is something else, or a word is no YAML.
    """
    listed = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not listed:
        raise ValueError("reward_funcs is empty: name at least one reward function.")
    named: list[Named] = []
    for one in listed:
        try:
            one = yaml.safe_load(one) if isinstance(one, str) else one
        except yaml.YAMLError as error:
            raise ValueError(f"reward_funcs: {redacted(one)!r} is no YAML: {' '.join(str(error).split())}") from error
        named.append(one)
    return named


def make_reward(named: Named, own: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """
    Makes one reward function.

    Args:
        named (`str` or `Mapping`):
            Its name, see [`OnlineScriptArguments`], or a mapping of its name to its options. Options that are reward
            functions themselves, those of [`~hp_edit_trl.rewards.Gate`], are named in the same way, and other
            functions as `file.py:name`.
        own (`Mapping[str, Callable]`, *optional*):
            What makes further rewards by name, or those of the catalogue where they are named without options.

    Returns:
        A reward function, or a string that the trainers take for one: a Hub id, a folder, an address.

    Raises:
        `ValueError`: If the name or an option is unknown, or an option is missing or not valid.
    """
    own = own or {}
    options: Any = None
    if isinstance(named, Mapping) and len(named) == 1:
        ((named, options),) = named.items()
    if not isinstance(named, str) or not (options is None or isinstance(options, Mapping)):
        raise ValueError(
            f"reward_funcs: {redacted(named)!r} must be a name, or a mapping of a name to its options, as in "
            "`IdentityReward: {unchanged: 0.7}`."
        )
    makers = {name: getattr(catalogue, name) for name in NAMES if name == named}
    if options is None or named not in makers:
        makers |= own
    if named not in makers:
        if options is not None:
            raise ValueError(_unknown(named, own))
        if ":" in named and "://" not in named:
            return import_object(named, "reward_funcs")
        if "/" not in named:
            raise ValueError(_unknown(named, own))
        return named
    return _made(named, makers[named], dict(options or {}), own)


def _made(name: str, make: Callable[..., Any], options: dict[str, Any], own: Mapping[str, Callable[..., Any]]) -> Any:
    parameters = inspect.signature(make).parameters
    if unknown := [option for option in options if option not in parameters]:
        known = ", ".join(parameters) or "none"
        raise ValueError(f"reward_funcs: {name} has no option {', '.join(map(str, unknown))}; it has {known}.")
    needed = [one.name for one in parameters.values() if one.default is one.empty and one.name not in options]
    if needed:
        raise ValueError(f"reward_funcs: {name} needs {', '.join(needed)}, as in `{name}: {{{needed[0]}: ...}}`.")
    for option, value in options.items():
        if option in OF_REWARDS:
            options[option] = make_reward(value, own)
            if isinstance(options[option], str):
                raise ValueError(
                    f"reward_funcs: {option}={value!r} of {name} must name a reward function: write "
                    f"`HPScorerReward: {{judge: {value}}}`."
                )
        elif option in OF_FUNCTIONS and isinstance(value, str):
            options[option] = import_object(value, option)
    try:
        return make(**options)
    except TypeError as error:
        raise ValueError(f"reward_funcs: {name} cannot be made with {redacted(options)!r}: {error}") from error


def _unknown(name: str, own: Mapping[str, Any]) -> str:
    known = ", ".join(sorted({*NAMES, *own}))
    return (
        f"reward_funcs: there is no reward {redacted(name)!r}: use {known}, file.py:name, package.module:name, a "
        "judge's Hub id, or the address of its server."
    )
