"""The training commands as users run them, on a tiny pipeline and with a judge behind a server on this machine."""

import base64
import io

import pytest
from datasets import load_dataset
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
from PIL import Image

from hp_edit_trl.cli import main
from hp_edit_trl.miniature.tiny import tiny_pipeline
from tests.helpers import make_cases
from tests.judges.test_judges import completion, serve  # noqa: F401
from tests.processes import ROOT, Script


def any_score(body, count):
    """An answer of a judge: a score that depends on the pixels of the edit, and is different for most."""
    part = body["messages"][1]["content"][-1]
    picture = Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))
    return 200, completion(str(sum(picture.tobytes()) % 6))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a pipeline and cases."""
    folder = tmp_path_factory.mktemp("scripts")
    tiny_pipeline().save_pretrained(folder / "editor")
    make_cases(6, sizes=((64, 64),)).save_to_disk(folder / "cases")
    return folder


def options(folder, cases=None):
    return ["--model_name_or_path", str(folder / "editor"), "--dataset_name", str(cases or folder / "cases")]


SMALL = ["--resolution", "64", "--num_inference_steps", "2", "--true_cfg_scale", "1.0"]
TRAINING = [
    "--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--max_steps", "1",
    "--report_to", "none", "--gradient_accumulation_steps", "1", "--per_device_train_batch_size", "4",
    "--lora_r", "4", "--lora_alpha", "8",
]  # fmt: skip
MINING = ["--num_generations", "4", "--min_chosen_score", "1", "--dtype", "float32"]


def trained(folder):
    state = QwenImageLoraLoaderMixin.lora_state_dict(str(folder))
    return any(key.endswith("to_q.lora_B.weight") and value.abs().max() > 0 for key, value in state.items())


@pytest.mark.parametrize(
    ("command", "words", "name"),
    [
        ("grpo", ["--true_cfg_scale", "1.0", "--sde_window_size", "1"], "Flow-GRPO"),
        ("nft", ["--num_train_sigmas", "1", "--dataset_streaming", "true"], "DiffusionNFT"),
    ],
)
def test_online_training(folder, tmp_path, serve, capsys, command, words, name):  # noqa: F811
    server = serve(any_score)
    judge = ["--judge", "m", "--judge_base_url", server.url]
    few = ["--num_generations", "4", "--num_inference_steps", "2", "--output_dir", str(tmp_path)]
    main([command, *options(folder), *judge, *words, *TRAINING, *few, "--resolution", "64"])
    assert trained(tmp_path) and len(server.requests) >= 4
    assert f"pictures are in {tmp_path}" in capsys.readouterr().out
    assert name in (tmp_path / "README.md").read_text()


def test_pairs_are_mined_and_trained_on(folder, tmp_path, serve, capsys):  # noqa: F811
    server = serve(any_score)
    judge = ["--judge", "m", "--judge_base_url", server.url]
    mining = ["mine-pairs", *options(folder), *judge, *SMALL, *MINING, "--output_dir", str(tmp_path / "mined")]
    main(mining)
    pairs = load_dataset(str(tmp_path / "mined" / "dataset"), split="train")
    assert f"{len(pairs)} pairs of 6 cases are in " in capsys.readouterr().out
    assert all(pair["score_chosen"] >= pair["score_rejected"] + 1 for pair in pairs)
    training = ["dpo", *options(folder, tmp_path / "mined" / "dataset"), *TRAINING, "--resolution", "64"]
    main([*training, "--output_dir", str(tmp_path / "run")])
    assert trained(tmp_path / "run") and "Diffusion-DPO" in (tmp_path / "run" / "README.md").read_text()
    # Edits that a LoRA made are not mixed with those before.
    with pytest.raises(SystemExit, match="holds edits made with other settings"):
        main([*mining, "--lora", str(tmp_path / "run")])
    # A failure during training keeps its stack trace.
    with pytest.raises(RuntimeError, match="Training failed after step 0"):
        main([*training, "--output_dir", str(tmp_path / "x"), "--resume_from_checkpoint", "nowhere"])


def test_a_dataset_that_does_not_fit(folder, tmp_path):
    make_cases(2).remove_columns("prompt").save_to_disk(tmp_path / "no-prompt")
    words = [*options(folder, tmp_path / "no-prompt"), *TRAINING, "--output_dir", str(tmp_path / "x")]
    for command, judge in (
        ("grpo", ["--judge_base_url", "http://127.0.0.1:9/v1", "--num_generations", "4"]),
        ("nft", ["--judge_base_url", "http://127.0.0.1:9/v1", "--num_generations", "4"]),
        ("dpo", []),
    ):
        with pytest.raises(SystemExit, match="hp-edit: .* has no column 'prompt'"):
            main([command, *words, *judge])


@pytest.mark.slow
def test_two_processes_share_the_cases(folder, tmp_path, serve):  # noqa: F811
    server = serve(any_score)
    words = [*options(folder), "--judge", "m", "--judge_base_url", server.url, *SMALL, *MINING]
    launch = ["--num_processes", "2", "--multi_gpu", "--output_dir", str(tmp_path)]
    environment = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = Script("-m", "hp_edit_trl.cli", "mine-pairs", *words, *launch, environment=environment).wait()
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("pairs of 6 cases are in ") == 1
    assert {file.name for file in tmp_path.glob("scores-*.jsonl")} == {"scores-0.jsonl", "scores-1.jsonl"}
