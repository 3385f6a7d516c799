"""Checkpoints: whole or not there, verified before they are resumed from, and left alone by a run that is finished."""

import copy
import datetime
import json
import logging
import math
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file

from hp_edit_trl import DPOEditConfig, DPOEditTrainer, FlowGRPOEditTrainer
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.trainer.checkpoints import (
    MANIFEST,
    can_be_read,
    checkpoint_to_resume,
    clean_up,
    files_below,
    find_fault,
    move_into_place,
    newest_whole,
    save_errors,
    write_manifest,
)
from hp_edit_trl.utils.files import write_json
from tests.helpers import END, make_cases, make_config, photo, redness
from tests.processes import Script


NEEDED = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]


def make_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in NEEDED:
        torch.save({"values": torch.arange(50) * step}, checkpoint / name)
    save_file({"weight": torch.ones(20) * step}, checkpoint / "adapter_model.safetensors")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (checkpoint / "README.md").write_text("A card")
    (checkpoint / "empty").touch()
    write_manifest(checkpoint, files_below(checkpoint))
    return checkpoint


def test_every_truncation_deletion_and_flipped_bit_is_found_by_name(tmp_path):
    whole = make_checkpoint(tmp_path, 1)
    names = files_below(whole)
    assert len(names) == 8 and find_fault(whole) is None
    damages = 0
    for name in names:
        content = (whole / name).read_bytes()
        end = len(content.rstrip())  # the manifest's last line break says nothing
        lengths = sorted({0, 1, end // 3, end // 2, end - 2, end - 1} - {len(content)})
        damaged = [content[:length] for length in lengths if 0 <= length < len(content)]
        for place in np.linspace(0, end - 1, 40, dtype=int) if content else []:
            flipped = bytearray(content)
            flipped[place] ^= 4
            damaged.append(bytes(flipped))
        for other in (None, *damaged, content + b"x"):
            (whole / name).unlink(missing_ok=True)
            if other is not None:
                (whole / name).write_bytes(other)
            fault = find_fault(whole)
            if name == MANIFEST:  # what is wrong with it may show as another file that is wrong
                assert fault or json.loads(other) == json.loads(content)
            else:
                assert fault and fault.startswith(name), (name, other)
                damages += 1
        (whole / name).write_bytes(content)
    assert find_fault(whole) is None and damages > 200


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "[" * 100_000, "\x00", '{"files": []}', '{"files": {}}', '{"files": {"a": 1}}',
        '{"files": {"a": {"size": true, "sha256": ""}}}',
    ],
)  # fmt: skip
def test_a_manifest_that_is_none(tmp_path, text):
    whole = make_checkpoint(tmp_path, 1)
    (whole / MANIFEST).write_text(text)
    assert find_fault(whole) == "manifest.json is damaged"


def test_a_manifest_that_lists_other_files(tmp_path):
    whole = make_checkpoint(tmp_path, 1)
    listed = json.loads((whole / MANIFEST).read_text())["files"]
    for name in (*NEEDED, "adapter_model.safetensors", "trainer_state.json"):  # what is read must be listed
        write_json(whole / MANIFEST, {"files": {other: listed[other] for other in listed.keys() - {name}}})
        assert find_fault(whole) == f"{name} is not listed in manifest.json"
    for name in ("../checkpoint-1/optimizer.pt", "a/../../b", str(whole / "optimizer.pt"), ".."):
        write_json(whole / MANIFEST, {"files": listed | {name: listed["optimizer.pt"]}})
        assert find_fault(whole) == f"manifest.json lists {name!r}, which is not in the folder"
    write_json(whole / MANIFEST, {"files": {name: listed[name] for name in listed.keys() - {"README.md"}}})
    assert find_fault(whole) is None


@pytest.mark.parametrize("other", ["folder", "loop", "pipe"])
def test_what_is_no_file_is_missing(tmp_path, other):
    file = make_checkpoint(tmp_path, 1) / "optimizer.pt"
    file.unlink()
    {"folder": file.mkdir, "loop": lambda: file.symlink_to(file), "pipe": lambda: os.mkfifo(file)}[other]()
    assert find_fault(file.parent) in ("optimizer.pt is missing", f"a file cannot be read ({file})")


STATE = {"global_step": 2, "epoch": 0.5, "log_history": [{"loss": 1.0}], "stateful_callbacks": {"C": {"args": {}}}}


@pytest.mark.parametrize(
    "text",
    [
        "[]", "3", '"x"', "null", "{}", "[" * 100_000, json.dumps(STATE)[:-1], "\ufeff{}",
        *(json.dumps(STATE | changed) for changed in (
            {"global_step": "2"}, {"global_step": 2.0}, {"global_step": True}, {"global_step": -1}, {"epoch": "x"},
            {"epoch": math.nan}, {"epoch": -1}, {"log_history": {}}, {"log_history": [1]}, {"max_steps": None},
            {"best_metric": "x"}, {"best_model_checkpoint": 3}, {"stateful_callbacks": []}, {"unknown": 1},
            {"stateful_callbacks": {"C": 5}}, {"stateful_callbacks": {"C": [{"args": []}]}},
        )),
    ],
)  # fmt: skip
def test_a_state_of_a_wrong_form_is_a_fault(tmp_path, caplog, text):
    older, newer = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    (newer / "trainer_state.json").write_text(json.dumps(STATE))
    write_manifest(newer, sorted(set(files_below(newer)) - {MANIFEST}))
    assert find_fault(newer) is None
    (newer / "trainer_state.json").write_text(text)
    write_manifest(newer, sorted(set(files_below(newer)) - {MANIFEST}))
    assert find_fault(newer).startswith("trainer_state.json ")
    assert checkpoint_to_resume(True, tmp_path, NEEDED) == str(older)
    assert "checkpoint-2 is not whole: trainer_state.json " in caplog.text
    (newer / MANIFEST).unlink()
    with pytest.raises(ValueError, match="cannot be resumed from: trainer_state.json .*there is .*checkpoint-1"):
        checkpoint_to_resume(str(newer), tmp_path, NEEDED)


def test_the_newest_whole_checkpoint(tmp_path, caplog):
    for step in (2, 9, 10, 11):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path / "_unfinished", 12)
    for name in ("checkpoint-last", "checkpoint-13-old"):
        shutil.copytree(tmp_path / "checkpoint-11", tmp_path / name)
    (tmp_path / "checkpoint-99").touch()
    os.truncate(tmp_path / "checkpoint-11" / "optimizer.pt", 10)
    (tmp_path / "checkpoint-10" / "scheduler.pt").unlink()
    size = (tmp_path / "checkpoint-9" / "optimizer.pt").stat().st_size
    expected = [
        f"{tmp_path}/checkpoint-11 is not whole: optimizer.pt is truncated (10 of {size:,} bytes).",
        f"{tmp_path}/checkpoint-10 is not whole: scheduler.pt is missing.",
    ]
    assert newest_whole(tmp_path) == (str(tmp_path / "checkpoint-9"), expected)
    with caplog.at_level(logging.WARNING):
        assert checkpoint_to_resume("True", tmp_path, NEEDED) == str(tmp_path / "checkpoint-9")
    assert all(fault in caplog.text for fault in expected)
    for step in (2, 9):
        (tmp_path / f"checkpoint-{step}" / MANIFEST).unlink()
    assert checkpoint_to_resume(True, tmp_path, NEEDED) is None
    assert "the run starts over" in caplog.text
    assert checkpoint_to_resume(True, tmp_path / "nothing", NEEDED) is None
    for nothing in (None, False, "False", "false"):
        assert checkpoint_to_resume(nothing, tmp_path, NEEDED) is None


def test_a_named_checkpoint(tmp_path, caplog):
    good, bad = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    assert checkpoint_to_resume(str(good), "elsewhere", NEEDED) == str(good)
    assert caplog.text == ""
    (bad / "rng_state.pth").write_bytes(b"x" * (bad / "rng_state.pth").stat().st_size)
    with pytest.raises(ValueError, match="rng_state.pth has changed since .* newest whole checkpoint there is .*-1"):
        checkpoint_to_resume(str(bad), "elsewhere", NEEDED)
    with pytest.raises(ValueError, match="checkpoint-7.*there is no such folder.*checkpoint-1"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-7"), "elsewhere", NEEDED)


def test_a_checkpoint_without_a_list_of_its_files(tmp_path, caplog):
    other = make_checkpoint(tmp_path, 3)
    (other / MANIFEST).unlink()
    assert checkpoint_to_resume(str(other), tmp_path, NEEDED) == str(other)
    assert "is not known" in caplog.text and "not be exact" not in caplog.text
    (other / "optimizer.pt").unlink()
    assert checkpoint_to_resume(str(other), tmp_path, NEEDED) == str(other)
    assert "has no optimizer.pt: " in caplog.text and "will not be exact" in caplog.text
    os.truncate(other / "scheduler.pt", 700)
    with pytest.raises(ValueError, match="scheduler.pt is truncated or damaged. No checkpoint there is whole"):
        checkpoint_to_resume(str(other), tmp_path, NEEDED)
    (other / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors is missing"):
        checkpoint_to_resume(str(other), tmp_path, NEEDED)


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "trainer_state.json"])
def test_files_that_can_be_read(tmp_path, name):
    file = make_checkpoint(tmp_path, 1) / name
    content = file.read_bytes()
    assert can_be_read(file)
    for length in range(0, len(content), max(1, len(content) // 50)):
        file.write_bytes(content[:length])
        assert not can_be_read(file), length
    file.unlink()
    assert not can_be_read(file)
    if name == "optimizer.pt":
        place = content.index(torch.arange(50).numpy().tobytes()) + 9
        file.write_bytes(content[:place] + b"\1" + content[place + 1 :])
        assert torch.load(file, weights_only=True)["values"][1] != 1  # torch does not notice
        assert not can_be_read(file)


def test_what_a_kill_leaves_is_tidied_up(tmp_path):
    make_checkpoint(tmp_path, 1)
    unfinished = tmp_path / "_unfinished"
    make_checkpoint(unfinished, 2)  # only the renaming was missing
    clean_up(tmp_path)
    assert newest_whole(tmp_path)[0] == str(tmp_path / "checkpoint-2") and not unfinished.exists()
    (make_checkpoint(unfinished, 3) / MANIFEST).unlink()
    clean_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    # A checkpoint takes the place of a damaged one.
    os.truncate(tmp_path / "checkpoint-2" / "optimizer.pt", 1)
    move_into_place(make_checkpoint(unfinished, 2), tmp_path / "checkpoint-2")
    assert find_fault(tmp_path / "checkpoint-2") is None and not unfinished.exists()


def test_a_full_disk_is_one_kind_of_error(tmp_path):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    tensors = {"a": torch.ones(300_000)}
    for save in (torch.save, save_file, lambda _, file: file.write_bytes(bytes(1_200_000))):
        with pytest.raises(OSError, match="checkpoint-3 could not be saved: .*Earlier checkpoints are kept"):
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
                with save_errors("checkpoint-3"):
                    save(tensors, tmp_path / "file")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


LORA = LoraConfig(r=4, lora_alpha=8)
# Ids of types that torch does not load: dates and (in datasets) decimals
DATES = make_cases(4, sizes=((64, 64),)).remove_columns("id")
DATES = DATES.add_column("id", [datetime.date(2026, 1, 1 + i) for i in range(4)])


def make_trainer(output, rewards=redness, eval_dataset=None, **kwargs) -> FlowGRPOEditTrainer:
    # Two microbatches of a generation batch, each an update: every other checkpoint lies inside a batch.
    options = dict(
        max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=4, gradient_accumulation_steps=1,
        steps_per_generation=2, per_device_train_batch_size=2, num_inference_steps=2, sde_window_size=1,
    )  # fmt: skip
    args = make_config(output, **{**options, **kwargs})
    return FlowGRPOEditTrainer(tiny_pipeline(), rewards, args, DATES, eval_dataset, peft_config=copy.deepcopy(LORA))


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_equal(one, other):
    assert one.keys() == other.keys() and [name for name in one if not torch.equal(one[name], other[name])] == []


def content(folder):
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run and its weights."""
    output = tmp_path_factory.mktemp("run") / "out"
    trainer = make_trainer(output)
    trainer.train()
    trainer.save_model()
    return output, weights(trainer)


def test_checkpoints_of_a_run_are_whole(run):
    output, _ = run
    assert not (output / "_unfinished").exists()
    for step in range(1, 5):
        folder = output / f"checkpoint-{step}"
        listed = set(json.loads((folder / MANIFEST).read_text())["files"])
        assert find_fault(folder) is None and listed == set(files_below(folder)) - {MANIFEST}
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "rollouts_0.pt", "trainer_state.json"} < listed
    state = torch.load(output / "checkpoint-1" / "rollouts_0.pt", weights_only=True)
    assert state["samples"][0]["case_id"].startswith("2026-01-0")


def test_true_resumes_exactly_from_the_newest_whole_checkpoint(run, tmp_path, caplog):
    output, expected = run
    shutil.copytree(output, tmp_path / "out")
    os.truncate(tmp_path / "out" / "checkpoint-4" / "adapter_model.safetensors", 1000)
    (tmp_path / "out" / "checkpoint-3" / "rollouts_0.pt").unlink()
    (tmp_path / "out" / "_unfinished" / "checkpoint-5").mkdir(parents=True)
    resumed = make_trainer(tmp_path / "out", save_total_limit=2)
    resumed.train(resume_from_checkpoint="true")
    assert_equal(weights(resumed), expected)
    for text in ("adapter_model.safetensors is truncated", "rollouts_0.pt is missing", "Resuming from"):
        assert text in caplog.text
    left = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir() and path.name != "images")
    assert left == ["checkpoint-3", "checkpoint-4"]
    assert all(find_fault(tmp_path / "out" / name) is None for name in left)


def test_what_does_not_fit_the_run_is_refused(run, tmp_path):
    output, _ = run
    place = tmp_path / "checkpoint-1"
    shutil.copytree(output / "checkpoint-1", place)
    with pytest.raises(ValueError, match="optimizer, scheduler, .* does not fit this run: .* another kind of optim"):
        make_trainer(tmp_path, optim="sgd").train(resume_from_checkpoint=True)
    trainer = make_trainer(tmp_path)
    for name, load in (("rollouts_0.pt", trainer._load_rollouts), ("rng_state.pth", trainer._load_rng_state)):
        for value in ([], "x", {"step": 1.5, "samples": None}, {"step": 1, "samples": [{}]}):
            torch.save(value, place / name)
            with pytest.raises(ValueError, match="does not fit this run: .* Resume with the options of the check"):
                load(str(place))


def test_a_finished_run_started_again_changes_nothing(run, caplog):
    output, expected = run
    before = content(output)

    def no_reward(**kwargs):
        raise AssertionError("nothing is sampled")

    again = make_trainer(output, no_reward)
    assert again.train(resume_from_checkpoint=True).global_step == 4
    again.save_model()
    assert_equal(weights(again), expected)
    assert content(output) == before
    assert "nothing is left to train" in caplog.text and "left as it is" in caplog.text


def test_a_run_that_was_killed_while_its_result_was_saved_saves_it_again(run, tmp_path):
    output, expected = run
    shutil.copytree(output, tmp_path / "out")
    card = (output / "README.md").read_text().replace(str(output), str(tmp_path / "out"))  # its code names the folder
    for name in ("_saved.json", "README.md", "adapter_model.safetensors"):
        (tmp_path / "out" / name).unlink()
    again = make_trainer(tmp_path / "out")
    again.train(resume_from_checkpoint=True)
    again.save_model()
    assert (tmp_path / "out" / "README.md").read_text() == card
    adapter = "adapter_model.safetensors"
    assert (tmp_path / "out" / adapter).read_bytes() == (output / adapter).read_bytes()
    assert (tmp_path / "out" / "_saved.json").exists()


def fail_at(trainer, monkeypatch, step):
    def save(output_dir):
        if trainer.state.global_step == step:
            raise OSError(28, "No space left on device")
        type(trainer)._save_rng_state(trainer, output_dir)

    monkeypatch.setattr(trainer, "_save_rng_state", save)


def test_a_full_disk_stops_the_run_and_keeps_earlier_checkpoints(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, save_total_limit=1)
    fail_at(trainer, monkeypatch, 2)
    with pytest.raises(OSError, match="checkpoint-2 could not be saved: OSError: .*No space left on device"):
        trainer.train()
    assert newest_whole(tmp_path) == (str(tmp_path / "checkpoint-1"), [])
    assert not (tmp_path / "_unfinished").exists()


def test_a_run_goes_on_without_a_checkpoint(tmp_path, monkeypatch, caplog):
    scores = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.4}
    trainer = make_trainer(
        tmp_path, on_save_error="continue", eval_strategy="steps", eval_steps=1, metric_for_best_model="reward",
        greater_is_better=True, load_best_model_at_end=True, eval_dataset=DATES,
    )  # fmt: skip
    monkeypatch.setattr(trainer, "_evaluate", lambda *_: {"eval_reward": scores[trainer.state.global_step]})
    fail_at(trainer, monkeypatch, 2)
    trainer.train()
    assert "goes on without this checkpoint" in caplog.text
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    # The best model is the best one that was saved, and its place is written with it.
    assert trainer.state.best_metric == 0.5
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="the best checkpoint, cannot be loaded: adapter_model.safetensors is miss"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_finished_run_of_which_only_the_best_checkpoint_is_left(tmp_path, monkeypatch):
    def make():
        trainer = make_trainer(
            tmp_path, max_steps=2, save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="reward",
            greater_is_better=True, eval_strategy="steps", eval_steps=1, eval_dataset=DATES,
        )  # fmt: skip
        monkeypatch.setattr(trainer, "_evaluate", lambda *_: {"eval_reward": -trainer.state.global_step})
        return trainer

    first = make()
    first.train()
    first.save_model()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    before = content(tmp_path)
    again = make()
    again.train(resume_from_checkpoint=True)
    again.save_model()
    assert content(tmp_path) == before
    assert_equal(weights(again), weights(first))


def test_a_checkpoint_of_weights_only_says_that_it_is_not_exact(tmp_path, caplog):
    make_trainer(tmp_path, max_steps=1, save_only_model=True).train()
    make_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert "has no optimizer.pt, scheduler.pt, rng_state.pth, rollouts_0.pt" in caplog.text


def test_bad_options(tmp_path):
    with pytest.raises(ValueError, match="on_save_error='skip' is not known"):
        make_config(tmp_path, on_save_error="skip")
    with pytest.raises(ValueError, match="on_save_error='skip' is not known"):
        DPOEditConfig(str(tmp_path), use_cpu=True, on_save_error="skip")


def test_dpo_ends_with_its_epochs_and_goes_on_with_more(tmp_path):
    cases = make_cases(4, sizes=((64, 64),)).to_list()
    rows = [
        case | {"chosen": photo(64, 64, 10 + i), "rejected": photo(64, 64, 20 + i)} for i, case in enumerate(cases)
    ]

    def make(epochs):
        args = DPOEditConfig(
            str(tmp_path / "dpo"), resolution=64, num_inference_steps=2, per_device_train_batch_size=2,
            gradient_accumulation_steps=1, num_train_epochs=epochs, save_strategy="epoch", use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        return DPOEditTrainer(tiny_pipeline(), args, Dataset.from_list(rows), peft_config=copy.deepcopy(LORA))

    first = make(1)
    first.train()
    before = content(tmp_path / "dpo")
    again = make(1)
    again.train(resume_from_checkpoint=True)
    assert content(tmp_path / "dpo") == before and again.state.global_step == 2
    assert_equal(weights(again), weights(first))
    # A truncated file of an encoded pair is made again.
    (pair, *_) = sorted((tmp_path / "dpo" / "_latents").glob("*.pt"))
    whole = torch.load(pair, weights_only=True)
    os.truncate(pair, pair.stat().st_size // 2)
    more = make(2)
    more.train(resume_from_checkpoint=True)
    assert more.state.global_step == 4
    assert torch.equal(torch.load(pair, weights_only=True)["chosen"], whole["chosen"])


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from tests.trainer.test_checkpoints import make_trainer

def save(output_dir):
    if trainer.state.global_step == 1 and trainer.accelerator.process_index == 1:
        raise OSError(28, "No space left on device")
    type(trainer)._save_rng_state(trainer, output_dir)

trainer = make_trainer(sys.argv[1], max_steps=3, on_save_error="continue", per_device_train_batch_size=2)
trainer._save_rng_state = save
trainer.train()
"""


@pytest.mark.slow
def test_a_failure_of_one_rank_is_one_of_all(tmp_path):
    environment = {"ACCELERATE_USE_CPU": "true"}
    done = Script("-c", SCRIPT + END, tmp_path / "out", environment=environment, processes=2).wait()
    assert done.returncode == 0, done.stderr[-4000:]
    assert "checkpoint-1 could not be saved" in done.stderr or "Process 1 failed" in done.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert names == ["checkpoint-2", "checkpoint-3"]
    for name in names:
        assert find_fault(tmp_path / "out" / name) is None
        assert {"rng_state_0.pth", "rng_state_1.pth", "rollouts_0.pt", "rollouts_1.pt"} < set(
            files_below(tmp_path / "out" / name)
        )
