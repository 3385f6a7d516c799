import pytest
import torch

from hp_edit_trl import DPOEditConfig, FlowGRPOEditConfig, FlowGRPOEditTrainer
from hp_edit_trl.miniature.tiny import tiny_pipeline
from tests.helpers import make_cases, make_config, redness


def train(folder, **options):
    """Trains for an update; returns the model, and how often its blocks were computed in it."""
    args = make_config(str(folder), max_steps=1, learning_rate=1e-2, **options)
    trainer = FlowGRPOEditTrainer(tiny_pipeline(num_layers=3), redness, args, make_cases(4))
    calls = [0, 0, 0]
    for index, block in enumerate(trainer.policy.pipeline.transformer.transformer_blocks):

        def count(*_, index=index):
            calls[index] += torch.is_grad_enabled()

        block.register_forward_pre_hook(count)
    trainer.train()
    return trainer.model, calls


def test_only_the_first_blocks_are_computed_again(tmp_path):
    none, calls = train(tmp_path / "none", gradient_checkpointing=False)
    passes = calls[0]
    assert passes > 0 and calls == [passes] * 3
    for options, expected in (
        ({}, [2, 2, 2]),
        ({"num_checkpointed_blocks": 3}, [2, 2, 2]),
        ({"num_checkpointed_blocks": 1, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, [2, 1, 1]),
    ):
        model, calls = train(tmp_path / "some", gradient_checkpointing=True, **options)
        assert calls == [passes * times for times in expected]
        assert all(one.equal(other) for one, other in zip(none.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("config", [FlowGRPOEditConfig, DPOEditConfig])
def test_options_that_would_not_be_used_are_refused(config, tmp_path):
    for options, message in (
        ({"num_checkpointed_blocks": 0}, "num_checkpointed_blocks=0 must be at least 1"),
        ({"num_checkpointed_blocks": 2, "gradient_checkpointing": False}, "with gradient_checkpointing=True"),
        ({"num_checkpointed_blocks": 2, "offload_transformer": True}, "without num_checkpointed_blocks"),
        ({"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "every_n_layers.*is not used: leave it out"),
    ):
        with pytest.raises(ValueError, match=message):
            config(str(tmp_path), bf16=False, use_cpu=True, **options)


def test_more_blocks_than_there_are(tmp_path):
    args = make_config(str(tmp_path), gradient_checkpointing=True, num_checkpointed_blocks=4)
    with pytest.raises(ValueError, match="num_checkpointed_blocks=4, but QwenImageTransformer2DModel has 3 blocks"):
        FlowGRPOEditTrainer(tiny_pipeline(num_layers=3), redness, args, make_cases(4))
