"""The example builds a dataset and trains on it."""

import pytest

from hp_edit_trl.data import load_realpref
from tests.examples.test_train_qwen_edit import run


@pytest.mark.slow
def test_a_small_set_is_built_and_trained_on(tmp_path):
    arguments = ["--output_dir", str(tmp_path / "out"), "--num_scenes", "80"]
    done = run(*arguments, cwd=str(tmp_path), script="build_realpref.py")
    assert done.returncode == 0, done.stderr[-4000:]
    train = load_realpref(str(tmp_path / "out" / "build" / "dataset"))
    assert f"{len(train)} hard cases in " in done.stdout and "Two steps of training: mean reward" in done.stdout
    assert len(train) > 20 and max(train["score"]) < 5 and {"scenes", "scikit-image"} == set(train["source"])
    assert (tmp_path / "out" / "lora" / "pytorch_lora_weights.safetensors").exists() or list(
        (tmp_path / "out" / "lora").rglob("*.safetensors")
    )
