"""What the modules for `evaluate` share. `evaluate` copies each module, but imports this one from the package."""

import math
from collections.abc import Sequence

import datasets
import evaluate


def metric_info(description: str, inputs: str, **columns: str) -> evaluate.MetricInfo:
    """The description of a metric: what it computes, its inputs and results, and the type of each column."""
    features = datasets.Features({name: datasets.Value(kind) for name, kind in columns.items()})
    return evaluate.MetricInfo(description=description, citation="", inputs_description=inputs, features=features)


def check_values(values: Sequence[float | None], name: str, maximum: float) -> list[float | None]:
    """The values with `None` for NaN. Raises a `ValueError` if one is not between 0 and `maximum`."""
    checked = [None if value is None or math.isnan(value) else value for value in values]
    for number, value in enumerate(checked):
        if value is not None and not 0 <= value <= maximum:
            raise ValueError(f"{name}[{number}] is {value}, but must be a number from 0 to {maximum:g}.")
    return checked


def check_groups(groups: Sequence[str | None], name: str, taken: Sequence[str] = ()) -> list[str]:
    """The groups. Raises a `ValueError` if one is missing, or has the name of another result."""
    for number, group in enumerate(groups):
        if group is None or group in taken:
            raise ValueError(
                f"{name}[{number}] is {group!r}, but must name a group"
                + (f" other than {', '.join(taken)}, which are names of other results." if taken else ".")
            )
    return [str(group) for group in groups]
