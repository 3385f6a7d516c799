"""Dry runs of all models at their published sizes. What shows only there, e.g. a float32 transformer, fails here."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import LongCatImageTransformer2DModel

from hp_edit_trl import DPOEditConfig, DPOEditTrainer, FlowGRPOEditConfig, FlowGRPOEditTrainer
from hp_edit_trl.scripts.plan import choose_trainer, parse
from hp_edit_trl.trainer.plan import judged, parse_card
from hp_edit_trl.trainer.rehearsal import Rehearsal, alone
from tests.full_size import SHORT, full_size_folder, left_out_bytes


RECIPES = Path(__file__).parents[2] / "examples" / "configs"
OPTIONS = {"use_cpu": True, "bf16": True, "report_to": "none", "save_strategy": "no", "num_sample_edits": 0}
GRPO = {
    "num_generations": 2, "num_inference_steps": 3, "sde_window_size": 1, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2, "rollout_batch_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def make(name: str) -> str:
        if name not in made:
            made[name] = full_size_folder(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


# The text encoders have few layers here: their passes are not what differs. Their weights are added.
@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    sorted(file.stem for file in RECIPES.glob("*.yaml") if not file.stem.startswith(("embedded", "build_"))),
)
def test_every_recipe_fits_the_card_that_it_names(recipe, folder):
    file = RECIPES / f"{recipe}.yaml"
    head = " ".join(line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#"))
    processes, memory = re.search(r"on (one|\d+) GPUs? with (?:at least )?(\d+) GB", head).groups()
    processes = processes.replace("one", "1")
    name = re.sub("_(dpo|nft|24gb)$", "", recipe)
    words = ["--config", str(file), "--model_name_or_path", folder(name), "--num_processes", processes]
    method = recipe.rpartition("_")[2]
    assert choose_trainer(words)[0] == (method if method in ("dpo", "nft") else "grpo")
    # In Flow-GRPO and NFT the rollout samples as many edits at once, or more.
    arguments, _ = parse([*words, "--num_sample_edits", "4" if method == "dpo" else "0"])
    with alone(int(processes)):
        rehearsal = Rehearsal(*(arguments[key] for key in ("trainer_type", "model", "options", "peft_config")))
        figures = rehearsal.measure(arguments["args"], light=True)
    assert arguments["options"]["dtype"] == torch.bfloat16
    missing = left_out_bytes(name) * (4.5 / 16 if recipe.endswith("_24gb") else 1)  # 4 bits and scales
    for phase in figures["phases"].values():
        if phase["parts"].get("text_encoder", 0) > 0 or phase["parts"].get("text_encoder_2", 0) > 0:
            phase["peak"] += missing
    phases = judged(figures["phases"], parse_card("h100", float(memory) * (79.2 / 80)))
    assert all(phase["fits"] for phase in phases.values()), phases
    if recipe.endswith("_24gb"):
        assert figures["weights"]["transformer"] < 0.3 * rehearsal.file_bytes
        return
    # What the published models have, within what the configurations leave out
    billions = {
        "qwen_image_edit_2509": 20.4, "flux_kontext": 11.9, "flux2_klein_4b": 3.9, "qwen_image_21": 7.1,
        "longcat_image_edit": 6.3,
    }  # fmt: skip
    assert figures["weights"]["transformer"] / 2e9 == pytest.approx(billions[name], rel=0.02)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen_image_edit_2511", {"gradient_checkpointing": False, "beta": 0.1}),
        (
            "qwen_image_edit",
            {"offload_encoders": True, "offload_transformer": True, "true_cfg_scale": 1.0, "num_iterations": 2},
        ),
        ("flux2_klein_9b", {"normalize_ratio": True, "dynamics": "cps", "noise_level": 0.7, "fp32": True}),
    ],
)
def test_grpo_of_other_models(name, options, folder, tmp_path):
    options = dict(options)
    dtype = torch.float32 if options.pop("fp32", False) else torch.bfloat16
    with alone(2):
        args = FlowGRPOEditConfig(str(tmp_path), **{**OPTIONS, **GRPO, **options})
        rehearsal = Rehearsal(FlowGRPOEditTrainer, folder(name), {"dtype": dtype}, num_references=1)
        figures = rehearsal._run(args, dict.fromkeys(rehearsal.blocks, 1), light=True)
    training = figures["phases"]["training"]["counts"]
    assert training["passes"] == (1 if options.get("true_cfg_scale") == 1.0 or "klein" in name else 2) * (
        2 if "beta" in options else 1
    )
    assert ("recompute" in training) == options.get("gradient_checkpointing", True)
    assert training["backward"] > 0


def test_dpo_with_two_references_and_evaluation(folder, tmp_path):
    with alone(1):
        args = DPOEditConfig(
            str(tmp_path), **OPTIONS, eval_strategy="steps", per_device_eval_batch_size=1, loss_type=["sigmoid"]
        )
        rehearsal = Rehearsal(DPOEditTrainer, folder("flux2_klein_9b"), {"dtype": torch.bfloat16}, num_references=2)
        figures = rehearsal._run(args, dict.fromkeys(rehearsal.blocks, 1), light=True)
    assert figures["phases"]["training"]["counts"]["passes"] == 4  # two edits, and the reference
    assert figures["files"]["pair"] > 0


def test_the_published_configurations_are_whole():
    for name in SHORT:
        described = json.loads((Path(__file__).parents[1] / "full_size" / f"{name}.json").read_text())
        assert {"model_index.json", "transformer", "vae", "text_encoder"} <= set(described)


def test_longcats_transformer_is_as_large_as_its_file():
    described = json.loads((Path(__file__).parents[1] / "full_size" / "longcat_image_edit.json").read_text())
    with torch.device("meta"):
        transformer = LongCatImageTransformer2DModel(**described["transformer"])
    size = 2 * sum(parameter.numel() for parameter in transformer.parameters())
    assert size == pytest.approx(12_541_410_152, abs=100_000)  # the published file, with its header
