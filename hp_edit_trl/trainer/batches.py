"""Which generation batches there can be, and which fit a dataset."""

import math
from typing import Any


def smallest_steps(per_device: int, num_processes: int, num_generations: int, num_trained: int | None) -> int:
    """
    The smallest `steps_per_generation` of a generation batch of whole groups. All others are multiples of it.

    Args:
        per_device (`int`):
            `per_device_train_batch_size`.
        num_processes (`int`):
            Number of processes.
        num_generations (`int`):
            Number of edits per case.
        num_trained (`int` or `None`):
            Number of them that are trained on. If not all are, each process samples whole groups.
    """
    if num_trained in (None, num_generations):
        return num_generations // math.gcd(num_generations, per_device * num_processes)
    return num_trained // math.gcd(num_trained, per_device)


def fitting_batch(args: Any, num_cases: int) -> dict[str, int] | None:
    """
    Options of the largest generation batch with at most `num_cases` cases, with a smaller microbatch only where it
    must be. `None` if there is none.

    Args:
        args ([`FlowGRPOEditConfig`] or [`FlowNFTEditConfig`]):
            The options to start from.
        num_cases (`int`):
            Number of cases of the dataset.
    """
    trained = args.num_trained_generations or args.num_generations
    for per_device in range(args.per_device_train_batch_size, 0, -1):
        unit = smallest_steps(per_device, args.world_size, args.num_generations, trained)
        if times := num_cases * trained // (per_device * args.world_size * unit):
            changed = (
                {} if per_device == args.per_device_train_batch_size else {"per_device_train_batch_size": per_device}
            )
            return changed | {"gradient_accumulation_steps": unit * times}
    return None


def check_enough_cases(args: Any, num_cases: int) -> None:
    """
    Checks that the training set has cases for a generation batch.

    Args:
        args ([`FlowGRPOEditConfig`] or [`FlowNFTEditConfig`]):
            The options.
        num_cases (`int`):
            Number of usable cases.

    Raises:
        `ValueError`: If it has not.
    """
    needed = args.generation_batch_size // args.num_generations
    if num_cases >= needed:
        return
    trained = args.num_trained_generations or args.num_generations
    options = fitting_batch(args, num_cases)
    remedy = "use fewer processes or raise num_generations"
    if options is not None:
        remedy = f"set {' and '.join(f'{name}={value}' for name, value in options.items())}"
        remedy += " and leave generation_batch_size and steps_per_generation out (None)"
    raise ValueError(
        f"train_dataset has {num_cases} usable cases, but one generation batch takes {needed}: "
        f"per_device_train_batch_size={args.per_device_train_batch_size} * {args.world_size} processes * "
        f"steps_per_generation={args.steps_per_generation} / {trained} edits of a case that are trained on. "
        f"steps_per_generation is gradient_accumulation_steps where it is not set. Add cases, or {remedy}."
    )
