"""Processes of one launch that have different data or options are found before a model is loaded."""

import hashlib
from collections.abc import Mapping
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Value
from peft import LoraConfig

from ..utils.images import UnreadableImageError, image_digest
from ..utils.secrets import redacted


NUM_IMAGES = 8  # of a dataset that are compared byte by byte
# Options that may differ: where a process is, and what it prints and reports
OWN = {
    "local_rank", "_n_gpu", "logging_dir", "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name",
}  # fmt: skip


def _digest_of_images(value: Any) -> str:
    if isinstance(value, list):
        return repr([_digest_of_images(one) for one in value])
    try:
        return image_digest(value).hex()
    except (UnreadableImageError, OSError) as error:
        return type(error).__name__


def dataset_digest(dataset: Dataset) -> str:
    """
    A hash of a dataset's content: of all texts and numbers, and of the images of a few rows, spread over the dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset, with its images as they are stored.
    """
    digest = hashlib.sha256(repr((len(dataset), sorted(dataset.column_names))).encode())
    features = dataset.features
    light = sorted(name for name, kind in features.items() if isinstance(kind, Value) and "binary" not in kind.dtype)
    if light:
        for batch in dataset.select_columns(light).iter(1000):
            digest.update(repr([batch[name] for name in light]).encode())
    heavy = dataset.select_columns([name for name in sorted(features) if name not in light])
    for index in sorted(
        {i * (len(dataset) - 1) // (NUM_IMAGES - 1) for i in range(NUM_IMAGES)} if heavy.features else ()
    ):
        digest.update(repr([_digest_of_images(value) for value in heavy[index].values()]).encode())
    return digest.hexdigest()


def check_same_run(args: Any, datasets: Mapping[str, Dataset], peft_config: LoraConfig | None) -> None:
    """
    Checks that all processes have the same options and the same data. With one process nothing is compared.

    Args:
        args ([`FlowGRPOEditConfig`], [`FlowNFTEditConfig`] or [`DPOEditConfig`]):
            The trainer's configuration.
        datasets (`Mapping[str, Dataset]`):
            The datasets by name, without bad cases.
        peft_config ([`~peft.LoraConfig`], *optional*):
            The LoRA to train.

    Raises:
        `ValueError`: If they differ, on all processes.
    """
    if PartialState().num_processes == 1:
        return
    options = {name: str(value) for name, value in args.to_dict().items() if name not in OWN}
    lora = {} if peft_config is None else redacted(peft_config.to_dict())
    # A set has another order in every process.
    lora = {name: sorted(value) if isinstance(value, set) else value for name, value in lora.items()}
    options |= {f"peft_config.{name}": str(value) for name, value in lora.items()}
    first_options, *others = gather_object([options])
    for process, other_options in enumerate(others, 1):
        names = [
            name for name in {**first_options, **other_options} if first_options.get(name) != other_options.get(name)
        ]
        if names:
            told = ", ".join(f"{name}={first_options.get(name)} and {other_options.get(name)}" for name in names[:3])
            raise ValueError(
                f"Processes 0 and {process} have different options: {told}. All processes of a launch must have the "
                "same: give them the same config file and script, and no value that depends on time, host or process."
            )
    check_same_data({name: (len(dataset), dataset_digest(dataset)) for name, dataset in datasets.items()})


def check_same_data(data: Mapping[str, tuple[int, str]]) -> None:
    """
    Checks that all processes have the same data. With one process nothing is compared.

    Args:
        data (`Mapping[str, tuple[int, str]]`):
            Number of usable cases and [`dataset_digest`] of datasets, by name.

    Raises:
        `ValueError`: If they differ, on all processes.
    """
    if PartialState().num_processes == 1:
        return
    first_data, *others = gather_object([dict(data)])
    for process, other_data in enumerate(others, 1):
        for name in sorted({*first_data, *other_data}):
            mine, theirs = first_data.get(name, (0, "")), other_data.get(name, (0, ""))
            if mine != theirs:
                raise ValueError(
                    f"Processes 0 and {process} have different data: {name} has {mine[0]} usable cases and "
                    f"{theirs[0]}, or their content or order differs. Load the same revision of the dataset on all "
                    "nodes, shuffle it with a seed, and do not split it by process: the trainer does that."
                )
