from types import SimpleNamespace

import pytest

from hp_edit_trl import FlowGRPOEditConfig
from hp_edit_trl.trainer.batches import check_enough_cases, fitting_batch, smallest_steps


@pytest.mark.parametrize(("trained", "per_device"), [(None, 1), (4, 3), (1, 8)])
def test_the_suggestion_works_and_is_the_largest(tmp_path, trained, per_device):
    def config(steps, per_device):
        options = dict(use_cpu=True, num_generations=6, num_trained_generations=trained)
        return FlowGRPOEditConfig(
            str(tmp_path), gradient_accumulation_steps=steps, per_device_train_batch_size=per_device, **options
        )

    args = config(48, per_device)
    with pytest.raises(ValueError, match="train_dataset has 5 usable cases.*set .*gradient_accumulation_steps="):
        check_enough_cases(args, 5)
    options = fitting_batch(args, 5)
    steps, smaller = options["gradient_accumulation_steps"], options.get("per_device_train_batch_size", per_device)
    check_enough_cases(config(steps, smaller), 5)
    unit = smallest_steps(smaller, 1, 6, trained)
    assert steps % unit == 0
    with pytest.raises(ValueError, match="usable cases"):
        check_enough_cases(config(steps + unit, smaller), 5)


def test_more_processes_than_cases_allow():
    args = SimpleNamespace(
        per_device_train_batch_size=1, world_size=16, num_generations=4, num_trained_generations=None,
        generation_batch_size=64, steps_per_generation=4,
    )  # fmt: skip
    assert fitting_batch(args, 4) == {"gradient_accumulation_steps": 1} and fitting_batch(args, 3) is None
    with pytest.raises(ValueError, match="Add cases, or use fewer processes or raise num_generations"):
        check_enough_cases(args, 3)
