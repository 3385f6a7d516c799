"""From the Hub to the Hub. The Hub is a local one; the clients are the real ones, in processes of their own."""

import json
import threading
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as pipeline_module
import numpy as np
import pytest
import torch
from datasets import load_dataset
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load
from transformers import TrainerCallback

from hp_edit_trl import FlowGRPOEditTrainer, load_scorer_prompts
from hp_edit_trl.editors import PipelineEditor
from hp_edit_trl.miniature.tiny import tiny_pipeline
from tests.fake_hub import FakeHub, HubCommit, fake_hub
from tests.helpers import make_cases, make_config, photo, redness
from tests.processes import Script


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LORA_FILE = "pytorch_lora_weights.safetensors"
BASE, CASES, TRAINED, EVERY_SAVE, PROMPTS = (
    f"someone/{name}" for name in ("tiny-edit", "RealPref-6", "tiny-edit-hp", "every-save", "prompts")
)


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with fake_hub() as hub:
        yield hub


def in_process(hub: FakeHub, function: Callable, *args: Any, **env: str) -> Any:
    """Calls a function of this file in a new process that knows the local Hub. What it returns comes back as JSON."""
    code = f"import json, tests.trainer.test_model_card as t; print(json.dumps(t.{function.__name__}(*{args!r})))"
    done = Script("-c", code, environment={**hub.env, **env}).wait()
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def edit(pipeline: DiffusionPipeline) -> np.ndarray:
    # The pipeline makes each reference a megapixel.
    with mock.patch.object(pipeline_module, "VAE_IMAGE_SIZE", 64 * 64):
        return pipeline(
            image=[photo(64, 64)],
            prompt="Make it red",
            negative_prompt=" ",
            height=64,
            width=64,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images


def train(folder: str) -> None:
    tiny_pipeline().save_pretrained(f"{folder}/base")
    HfApi().create_repo(BASE)
    HfApi().upload_folder(repo_id=BASE, folder_path=f"{folder}/base")
    make_cases().push_to_hub(CASES)
    train_as_in_the_readme(folder)
    train_with_slow_uploads(folder)


def train_as_in_the_readme(folder: str) -> None:
    trainer = FlowGRPOEditTrainer(
        model=BASE,
        reward_funcs=redness,
        args=make_config(f"{folder}/tiny-edit-hp", save_strategy="steps", save_steps=1, num_sample_edits=4),
        train_dataset=load_dataset(CASES, split="train"),
        peft_config=LoraConfig(r=4, lora_alpha=8),
    )
    trainer.train()
    trainer.push_to_hub()
    np.save(f"{folder}/trained.npy", edit(trainer.policy.pipeline))


def train_with_slow_uploads(folder: str) -> None:
    """Pushes at every save. The push of step 1 is still going on when step 2 is saved, and done before step 3 is."""
    saved_twice = threading.Event()
    upload_folder = HfApi.upload_folder

    def upload_late(api: HfApi, run_as_future: bool, **kwargs: Any) -> Any:
        def upload() -> Any:
            assert saved_twice.wait(60)
            return upload_folder(api, **kwargs)

        return api.run_as_future(upload)

    class Release(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                saved_twice.set()
                trainer.push_in_progress.wait_until_done()

    trainer = FlowGRPOEditTrainer(
        model=BASE,
        reward_funcs=redness,
        args=make_config(
            f"{folder}/every-save",
            max_steps=3,
            save_strategy="steps",
            save_steps=1,
            push_to_hub=True,
            hub_model_id=EVERY_SAVE,
            hub_strategy="every_save",
        ),
        train_dataset=make_cases(),
        callbacks=[Release()],
        peft_config=LoraConfig(r=4, lora_alpha=8),
    )
    with mock.patch.object(HfApi, "upload_folder", upload_late):
        trainer.train()


def load_from_hub(folder: str, every_save_commit: str) -> list[int]:
    pipeline = DiffusionPipeline.from_pretrained(BASE)
    pipeline.set_progress_bar_config(disable=True)
    np.save(f"{folder}/base.npy", edit(pipeline))
    pipeline.load_lora_weights(TRAINED, adapter_name="trained")
    np.save(f"{folder}/loaded.npy", edit(pipeline))
    pipeline.load_lora_weights(EVERY_SAVE, revision=every_save_commit, adapter_name="every_save")
    return [pipeline.transformer.peft_config[name].lora_alpha for name in ("trained", "every_save")]


def push_prompts() -> dict[str, Any]:
    HfApi().create_repo(PROMPTS)
    first = HfApi().upload_folder(repo_id=PROMPTS, folder_path=ROOT / "prompts").oid
    changed = (ROOT / "prompts" / "add.md").read_bytes() + b"\nBe strict.\n"
    second = HfApi().upload_file(repo_id=PROMPTS, path_in_repo="add.md", path_or_fileobj=changed).oid
    loaded = {}
    for name, revision in {"pinned": first, "main": "main", "default": None}.items():
        loaded[name] = {task: vars(prompt) for task, prompt in load_scorer_prompts(PROMPTS, revision).items()}
    return {"commits": [first, second], **loaded}


def edit_by_ids(folder: str) -> list[Any]:
    """
    Base and LoRA by their names alone. Returns how far the edit is from that of the trained pipeline, or what is
    wrong.
    """
    editor = PipelineEditor(BASE, None, TRAINED, 64, "float32", num_inference_steps=2, negative_prompt=" ")
    try:
        with mock.patch.object(pipeline_module, "VAE_IMAGE_SIZE", 64 * 64):
            (image,) = editor([[photo(64, 64)]], ["Make it red"], ["case"], [0])
    except ValueError as error:
        return ["error", str(error)]
    return [
        editor.identity["revision"],
        float(np.abs(np.asarray(image) / 255 - np.load(f"{folder}/trained.npy")[0]).max()),
    ]


@pytest.fixture(scope="module")
def trained(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    in_process(hub, train, str(folder))
    return folder


@pytest.fixture(scope="module")
def lora_alphas(hub: FakeHub, trained: Path) -> list[int]:
    # A cache of its own, so that everything comes from the Hub.
    commit = hub.commits(EVERY_SAVE)[-1].oid
    return in_process(hub, load_from_hub, str(trained), commit, HF_HOME=str(trained / "cache"))


def assert_lora_of(checkpoint: Path, commit: HubCommit) -> None:
    # Not byte for byte: the order of a file's metadata is left to chance.
    pushed, saved = load(commit.files[LORA_FILE].content), load((checkpoint / LORA_FILE).read_bytes())
    assert pushed.keys() == saved.keys()
    assert [name for name in saved if not torch.equal(pushed[name], saved[name])] == []


def test_the_pushed_lora_edits_as_the_trained_pipeline(trained, lora_alphas):
    edits = {name: np.load(trained / f"{name}.npy") for name in ("base", "trained", "loaded")}
    np.testing.assert_array_equal(edits["loaded"], edits["trained"])
    assert not np.array_equal(edits["loaded"], edits["base"])
    assert lora_alphas[0] == 8


def test_card_and_pictures(hub, trained):
    files = hub.files(TRAINED)
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == BASE
    assert card.data.base_model_relation == "adapter"
    assert card.data.library_name == "diffusers"
    assert f'load_lora_weights("{TRAINED}")' in card.text
    widget = [example["output"]["url"] for example in card.data.widget]
    assert len(widget) == 4
    pictures = [*widget, *(name.replace("after", "before") for name in widget), "reward_curve.png", "before_after.png"]
    for name in pictures:
        Image.open(BytesIO(files[name])).verify()
    assert files["images/0_before.png"] != files["images/0_after.png"]
    for name in ("reward_curve.png", "before_after.png"):
        assert f"({name})" in card.text
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert (trained / "tiny-edit-hp" / "checkpoint-2").is_dir()
    assert not [name for name in files if "checkpoint" in name]


def test_card_names_the_dataset(hub, trained):
    card = ModelCard(hub.files(TRAINED)["README.md"].decode())
    assert card.data.datasets == [CASES]
    assert f"`{CASES}` at revision `{hub.commits(CASES, 'dataset')[-1].oid}`" in card.text


def test_every_save_pushes_a_lora(hub, trained, lora_alphas):
    commit = hub.commits(EVERY_SAVE)[-1]
    assert commit.message == "Training in progress, step 3"
    assert_lora_of(trained / "every-save" / "checkpoint-3", commit)
    assert lora_alphas[1] == 8


def test_a_save_leaves_the_push_before_it_alone(hub, trained):
    _, first, *others = hub.commits(EVERY_SAVE)
    assert first.message == "Training in progress, step 1"
    assert [commit.message for commit in others] == ["Training in progress, step 3"]
    assert_lora_of(trained / "every-save" / "checkpoint-1", first)


def test_an_editor_by_ids_private_and_offline(hub, trained, lora_alphas):
    hub.private.add(f"models/{TRAINED}")
    commit = hub.commits(BASE)[-1].oid
    nobody = {"HF_HOME": str(trained / "nobody"), "HF_TOKEN": "", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    what, message = in_process(hub, edit_by_ids, str(trained), **nobody)
    assert what == "error" and message.startswith(f"lora={TRAINED!r} cannot be loaded onto {BASE!r}: ")
    with_token = in_process(hub, edit_by_ids, str(trained), HF_HOME=str(trained / "somebody"))
    assert with_token[0] == commit and with_token[1] <= 1 / 255
    asked = len(hub.requests)
    assert (
        in_process(hub, edit_by_ids, str(trained), HF_HOME=str(trained / "somebody"), HF_HUB_OFFLINE="1") == with_token
    )
    assert len(hub.requests) == asked


def test_scorer_prompts_are_pinned(hub):
    result = in_process(hub, push_prompts)
    first, second = result["commits"]
    assert result["pinned"].keys() == {path.stem for path in (ROOT / "prompts").glob("*.md")}
    assert {task: prompt["text"] for task, prompt in result["pinned"].items()} == {
        task: prompt.text for task, prompt in load_scorer_prompts().items()
    }
    assert result["main"] == result["default"]
    assert result["main"]["add"]["text"] == result["pinned"]["add"]["text"] + "\n\nBe strict."
    assert result["main"]["swap"]["text"] == result["pinned"]["swap"]["text"]
    assert result["pinned"]["add"]["revision"].startswith(f"{PROMPTS}@{first}:add:")
    assert result["main"]["add"]["revision"].startswith(f"{PROMPTS}@{second}:add:")
