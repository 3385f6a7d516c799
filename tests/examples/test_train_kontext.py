import pytest
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

from tests.examples.test_train_qwen_edit import EXAMPLES, run_here


@pytest.mark.slow
def test_embedded_default(tmp_path):
    few = ("--per_device_train_batch_size", "8", "--num_sample_edits", "2")
    run_here("--max_steps", "2", *few, cwd=tmp_path, script="train_kontext.py")
    output = tmp_path / "outputs" / "kontext-embedded"
    state = FluxLoraLoaderMixin.lora_state_dict(str(output))
    assert any(
        "single_transformer_blocks.1.proj_mlp.lora_B" in key and value.abs().max() > 0 for key, value in state.items()
    )
    assert (output / "README.md").exists()


def test_short_and_documented():
    assert len((EXAMPLES / "train_kontext.py").read_text().splitlines()) < 100
