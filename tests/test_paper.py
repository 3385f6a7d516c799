"""
Every command of docs/paper.md runs as it stands there, in their order: with a tiny pipeline as the editors, scripted
judges and a scripted writer behind a server, and scripted people.
"""

import base64
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import concatenate_datasets
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image, ImageFilter

from hp_edit_trl import miniature
from hp_edit_trl.calibration import page
from hp_edit_trl.cli import main
from hp_edit_trl.data import load_realpref
from hp_edit_trl.miniature.tiny import tiny_clip, tiny_pipeline
from hp_edit_trl.tasks import TASKS
from tests.bench.test_dreambench import data as dreambench_data  # noqa: F401
from tests.bench.test_dreambench import models  # noqa: F401
from tests.bench.test_gedit import gedit
from tests.judges.test_judges import FakeServer, completion


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
BLOCKS = [block.replace("\\\n", " ").strip() for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)]
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
LAUNCH = "accelerate launch --num_processes 8 -m hp_edit_trl.cli "
NUM_SCENES = 32
# What makes a recipe small: its other options stay
SMALL = {
    "resolution": 32, "num_inference_steps": 2, "sde_window_size": 1, "sde_window_range": None, "num_finish_steps": 1,
    "true_cfg_scale": 1.0, "num_generations": 4, "num_trained_generations": 2, "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2, "rollout_batch_size": 4, "max_steps": 1, "bf16": False, "use_cpu": True,
    "report_to": "none", "gradient_checkpointing": False,
}  # fmt: skip
FOR_ALL = ("use_cpu", "report_to", "max_steps")  # also of recipes that do not set them


def answer(writer):
    """The replies of a server that is writer and judge at once."""

    def reply(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        conversation, pictures = [], []
        for message in body["messages"]:
            parts = message["content"] if isinstance(message["content"], list) else [text(message["content"])]
            conversation.append({"role": message["role"], "content": [shown(part) for part in parts]})
            pictures += [part["image"] for part in conversation[-1]["content"] if part["type"] == "image"]
        asked = " ".join(p["text"] for message in conversation for p in message["content"] if p["type"] == "text")
        value = sum(pictures[-1].tobytes()) % 6 if pictures else 0
        if "JSON list of strings" in asked:
            return 200, completion('["Is it gone? It should be."]')
        if "JSON" not in asked:
            return 200, completion(f"Score: {min(value, 4)}" if "Score:" in asked else str(value))
        if '"score"' in asked:
            return 200, completion(json.dumps({"score": [value, value + 1], "reasoning": "It is."}))
        return 200, completion(writer([conversation])[0].answer)

    return reply


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def shown(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    content = base64.b64decode(part["image_url"]["url"].split(",")[1])
    return {"type": "image", "image": Image.open(io.BytesIO(content)).convert("RGB")}


def people(dataset, output_dir, *, verify, rubric, annotators, overlap, seed, aspects, **served):
    """Those who use the page: each edit has the same score from all of them, and each case is accepted."""
    kind = page._Review if verify else page._Campaign
    extra = {} if verify else {"aspects": aspects}
    campaign = kind(dataset, Path(output_dir), rubric, annotators, overlap, seed, **extra)
    for name in annotators or ("anna", "ben"):
        session = campaign.session(name)
        while (key := session.next()) is not None:
            if verify:
                session.review(session.token(key), "accept", "", "", *session.texts(key))
            else:
                score = sum(repr(key).encode()) % 6
                session.rate(session.token(key), score, "", dict.fromkeys(aspects, score))


@pytest.fixture(scope="module")
def world(tmp_path_factory, dreambench_data, models):  # noqa: F811
    """A folder with the configurations, made small, and everything that they name."""
    folder = tmp_path_factory.mktemp("paper")
    writer = miniature.SimulatedWriter(NUM_SCENES)
    server = FakeServer(answer(writer))
    for seed, name in enumerate(("editor", "another-editor")):
        tiny_pipeline(seed=seed).save_pretrained(folder / name)
    miniature.save_pictures(folder / "pictures", NUM_SCENES)
    for scene in sorted((folder / "pictures" / "scenes").glob("*.png"))[-4:]:  # the pairs
        with Image.open(scene) as sharp:
            for name, picture in (("sharp", sharp), ("blurred", sharp.filter(ImageFilter.BoxBlur(2)))):
                (folder / "pictures" / name).mkdir(exist_ok=True)
                picture.save(folder / "pictures" / name / scene.name)
        scene.unlink()
    cases = miniature.load_dataset("train", 240).remove_columns("target")
    cases.filter(lambda case: case["task"] == "remove").save_to_disk(folder / "cases")
    tiny_clip(str(folder / "clip"))
    gedit().save_to_disk(folder / "gedit")
    stands_for = {
        "/data/photos": "pictures/scenes",
        "/data/bokeh/sharp": "pictures/sharp",
        "/data/bokeh/blurred": "pictures/blurred",
        "http://localhost:8000/v1": server.url,
        "https://api.openai.com/v1": server.url,
        "someone/RealPref-50K": "outputs/realpref/dataset",
        "someone/RealPref-Bench": "outputs/realpref/dataset",
        "someone/RealPref-subset": "subset",
        "someone/cases": "cases",
        "someone/qwen-image-edit-2509-hp": "outputs/qwen-image-edit-2509-hp",
        "black-forest-labs/FLUX.1-Kontext-dev": "another-editor",
        "openai/clip-vit-large-patch14": "clip",
    }

    def small(words: str) -> str:
        for name, stand_in in stands_for.items():
            words = words.replace(name, stand_in)
        return re.sub(r"Qwen/Qwen-Image-Edit(-2509)?", "editor", words)

    for file in (ROOT / "examples" / "configs").rglob("*.yaml"):
        config = yaml.safe_load(small(file.read_text(encoding="utf-8")))
        if "benchmark" in config:
            config["resolution"] = 32
            config["runs"] = config["runs"][-4:] if len(config["runs"]) < 9 else [config["runs"][i] for i in (0, 6, 8)]
            if config["benchmark"] == "gedit":
                config["dataset"] = "gedit"
            if config["benchmark"] == "dreambench":
                for kind in ("images", "captions"):  # of one subject
                    of_animals = Path("data", kind, "live_subject", "animal")
                    shutil.copytree(
                        dreambench_data / of_animals, folder / "dreambench" / of_animals, dirs_exist_ok=True
                    )
                config |= {"dataset": "dreambench", "benchmark_options": models}
            for one in (config, *config["runs"]):
                if "editor_options" in one:
                    one["editor_options"] |= {"num_inference_steps": 2, "true_cfg_scale": 1.0}
        elif "sources" in config:
            config |= {
                "resolution": 64, "min_side": 32, "task_counts": dict.fromkeys(TASKS, 1), "sample_size": 2,
                "benchmark_counts": dict.fromkeys(TASKS, 1),
                "editor_options": {"num_inference_steps": 2, "resolution": 32},
            }  # fmt: skip
        else:
            config |= {name: value for name, value in SMALL.items() if name in config or name in FOR_ALL}
        copy = folder / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(yaml.safe_dump(config), encoding="utf-8")
    yield folder, small
    server.shutdown()
    server.server_close()


def prepare(command: str) -> None:
    """What is there before a command and comes from elsewhere."""
    if "table_1.yaml" in command or "table_3.yaml" in command:
        config = yaml.safe_load(Path(shlex.split(command)[-1]).read_text())
        cases = load_realpref("outputs/realpref/dataset", split="test") if "table_1" in command else gedit()
        for one in config["runs"]:
            if one["editor"].startswith("edits/"):
                Path(one["editor"]).mkdir(parents=True, exist_ok=True)
                for case in cases:
                    image = case.get("image") or case["input_image_raw"]
                    image.resize((32, 32)).save(f"{one['editor']}/{case.get('id') or case['key']}.png")
    if "RealPref-subset" in command and not Path("subset").exists():
        parts = [load_realpref("outputs/realpref/dataset", split=split) for split in ("train", "filtered")]
        concatenate_datasets(parts).select(range(8)).save_to_disk("subset")


@pytest.mark.slow
def test_every_command_of_the_page(world, monkeypatch):
    folder, small = world
    monkeypatch.chdir(folder)
    monkeypatch.setattr(page, "annotate", people)
    monkeypatch.setenv("OPENAI_API_KEY", "not a secret")
    for size in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"):  # the pipeline itself reads references at a megapixel
        monkeypatch.setattr(pipeline_qwenimage_edit_plus, size, 32 * 32)
    for command in COMMANDS:
        if command.startswith(("vllm serve", "python examples/")):
            continue  # the server of this test, and scripts with tests of their own
        prepare(command)
        words = small(command.replace(LAUNCH, "hp-edit ").replace(" --num_processes 8", ""))
        words = re.sub(r"--num_cases \d+", "--num_cases 4", words)
        program, *words = shlex.split(words)
        assert program == "hp-edit", command
        found = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in words]
        words = [name for names in found for name in names]
        if words[:2] == ["bench", "realpref"]:
            words += ["--resolution", "32", "--editor_options", "num_inference_steps=2"]
        if words[0] == "mine-pairs":
            words += ["--resolution", "32", "--true_cfg_scale", "1.0", "--dtype", "float32"]
            words += ["--num_inference_steps", "2"]
        try:
            main(words)
        except SystemExit as end:
            raise AssertionError(f"{command}: {end}") from end
    # Table 1 has its column of people, and the figures are drawn
    table = Path("outputs/table_1/report/table.md").read_text()
    assert "people" in table.lower() and "HP-Edit" in table
    table = Path("outputs/table_s5/report/table.md").read_text()
    assert all(arm in table for arm in ("base", "DPO", "GRPO, HP-Scorer", "HP-Edit"))
    agreement = ("figure_6/mean_per_model.png", "figure_s1_agreement/human_against_scorer.png")
    for figure in (*agreement, "table_2_report/curves.png"):
        assert (Path("outputs") / figure).stat().st_size > 1000


def test_every_script_of_the_page_has_a_test():
    scripts = [shlex.split(command)[1] for command in COMMANDS if command.startswith("python ")]
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests" / "examples").rglob("test_*.py"))
    assert len(scripts) >= 8
    assert [script for script in scripts if Path(script).name not in tests and Path(script).stem not in tests] == []
