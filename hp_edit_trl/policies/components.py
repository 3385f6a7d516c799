"""Whether the components of a pipeline are those that its class is made of."""

import importlib
import inspect
from typing import Any, get_args, get_type_hints

import diffusers
from diffusers import DiffusionPipeline
from torch import nn


def check_components(name: str, model: dict[str, Any] | DiffusionPipeline, told: str) -> None:
    """
    Checks that a pipeline lacks no component, and that its models are of the classes that its own class names.

    Args:
        name (`str`):
            The pipeline's class, one of diffusers.
        model (`dict` or [`~diffusers.DiffusionPipeline`]):
            What its `model_index.json` says, or the loaded pipeline.
        told (`str`):
            The pipeline's name in errors.

    Raises:
        `ValueError`: If a component is missing or of another class.
    """
    constructor: Any = getattr(diffusers, name).__init__
    hints = get_type_hints(constructor)
    for component, parameter in inspect.signature(constructor).parameters.items():
        if component == "self":
            continue
        kinds = [kind for kind in (get_args(hints[component]) or (hints[component],)) if isinstance(kind, type)]
        found = _found(model, component)
        needed = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
        if found is None:
            if parameter.default is inspect.Parameter.empty:
                raise ValueError(
                    f"{told} has no {component}, but a {name} needs one ({needed}): load the whole pipeline."
                )
        elif (
            found is not object
            and any(issubclass(kind, nn.Module) for kind in kinds)
            and not issubclass(found, tuple(kinds))
        ):
            raise ValueError(
                f"{told} has a {found.__name__} as its {component}, but a {name} needs a {needed}: load the pipeline "
                "that belongs to its weights, or the component that belongs to the pipeline."
            )


def _found(model: dict[str, Any] | DiffusionPipeline, component: str) -> type | None:
    """The class of a component, `object` if it is not known, `None` if there is none."""
    if not isinstance(model, dict):
        value = getattr(model, component, None)
        return None if value is None else type(getattr(value, "_orig_mod", value))  # of a compiled one
    value = model.get(component)
    if not isinstance(value, list | tuple):
        return None if value is None else object
    library, class_name = value
    if class_name is None:
        return None
    known = library in ("diffusers", "transformers")
    return getattr(importlib.import_module(library), class_name, object) if known else object
