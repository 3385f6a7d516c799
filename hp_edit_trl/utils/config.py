"""Options: dataclasses of them read from YAML files, and the check that a number is at least 1."""

from dataclasses import MISSING, fields
from inspect import formatannotation
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .secrets import redacted, remember_secrets


Config = TypeVar("Config")


def read_config(cls: type[Config], path: str | Path) -> Config:
    """
    Reads a dataclass of options from a YAML file that maps names to values. A name without a value means the default.

    Args:
        cls (`type`):
            The dataclass.
        path (`str` or `Path`):
            The YAML file.

    Returns:
        An instance of `cls`.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If it is not a mapping, or an option is unknown, missing, of the wrong type or rejected by `cls`.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping of options, but is a {type(values).__name__}.")
    options = {option.name: option for option in fields(cls) if option.init}  # type: ignore[arg-type]
    if unknown := sorted(map(str, values.keys() - options.keys())):
        raise ValueError(f"{path} has unknown options {unknown}. Known options: {', '.join(options)}.")
    values = {name: value for name, value in values.items() if value is not None}
    needed = {name for name, one in options.items() if one.default is MISSING and one.default_factory is MISSING}
    if missing := sorted(needed - values.keys()):
        raise ValueError(f"{path} lacks the options {missing}.")
    remember_secrets(values)
    types = get_type_hints(cls)
    for name, value in values.items():
        if not _is_of_type(value, types[name]):
            raise ValueError(
                f"{path}: {name} must be of type {formatannotation(types[name])}, but is "
                f"{redacted({name: value})[name]!r}."
            )
    return cls(**values)


def _is_of_type(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(_is_of_type(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if isinstance(value, bool):  # an int to Python
        return kind is bool
    if isinstance(value, list) and origin is list:
        return all(_is_of_type(item, parts[0]) for item in value)
    if isinstance(value, dict) and origin is dict:
        return all(_is_of_type(key, parts[0]) and _is_of_type(item, parts[1]) for key, item in value.items())
    return isinstance(value, (int, float) if kind is float else origin or kind)


def check_positive(**numbers: int | None) -> None:
    """Raises `ValueError` that names the first option that is neither an integer of at least 1 nor `None`."""
    for name, number in numbers.items():
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"{name}={number!r} must be an integer of at least 1.")
