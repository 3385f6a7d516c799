"""Processes of a machine share converted weights."""

import os
import platform
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.utils import loading
from hp_edit_trl.utils.loading import converted_bytes, remove_left_folders, write_converted
from tests.processes import Script


SCRIPT = """
import os, shutil, sys, tempfile
import torch
from collections import namedtuple
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from hp_edit_trl.utils import loading

torch.set_num_threads(1)
folder, temporary = sys.argv[1:]
tempfile.tempdir = temporary
loading.SHARED_FROM = 10 * 2**20
state = PartialState(cpu=True)
loads = []
load = DiffusionPipeline.from_pretrained
DiffusionPipeline.from_pretrained = lambda *args, **kwargs: loads.append(sorted(kwargs)) or load(*args, **kwargs)

def own():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous"))

def measured(dtype):
    before = own()
    pipeline = loading.load_shared_pipeline(folder, {"dtype": dtype})
    state.wait_for_everyone()
    assert not os.listdir(temporary)
    return pipeline, own() - before

def same(a, b):
    names = ("transformer", "vae", "text_encoder")
    a, b = ({f"{n}.{k}": v for n in names for k, v in getattr(p, n).state_dict().items()} for p in (a, b))
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)

measured(torch.float32)  # imports what it needs
stored, of_stored = measured(torch.float32)
shared, of_shared = measured(torch.bfloat16)
shutil.disk_usage = lambda path: namedtuple("Usage", "free")(3)
alone, of_alone = measured(torch.bfloat16)
size = sum(p.numel() for p in shared.transformer.parameters()) * 2
assert same(shared, alone) and not shared.transformer.training and not shared.text_encoder.training
told = gather_object([(of_stored / size, of_shared / size, of_alone / size)])
assert loads == [["dtype"]] * 2 + [["dtype", "transformer"], ["dtype"]], loads
for one in told:
    assert max(one[:2]) < 0.5 and one[2] > 0.9, told
if state.is_main_process:
    print("told", told)
"""


def test_two_processes_convert_weights_once_and_share_them(tmp_path):
    # About 25M parameters
    tiny_pipeline(num_layers=1, num_attention_heads=6, attention_head_dim=128).save_pretrained(tmp_path / "model")
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "temporary" / f"hp-edit-trl-{platform.node()}-{gone.pid}-abc").mkdir(parents=True)  # of a killed start
    done = Script("-c", SCRIPT, tmp_path / "model", tmp_path / "temporary", processes=2).wait()
    assert done.returncode == 0 and "told" in done.stdout, done.stderr[-4000:]
    assert "could not be shared" in done.stderr and "Set TMPDIR to another disk" in done.stderr


def test_which_weights_are_converted(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.vae.to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path)
    sizes = {name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in ("transformer", "vae")}
    to_half = converted_bytes(tmp_path, torch.bfloat16)
    assert to_half.keys() == {"transformer", "text_encoder"} and to_half["transformer"] == 2 * sizes["transformer"]
    assert converted_bytes(tmp_path, torch.float32) == {"vae": 4 * sizes["vae"]}


def test_components_that_are_given_are_not_converted(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SHARED_FROM", 1)
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "converted").mkdir()
    options = {"dtype": torch.bfloat16, "text_encoder": None, "vae": pipeline.vae}
    assert write_converted(str(tmp_path / "model"), options, str(tmp_path / "converted")).keys() == {"transformer"}


@pytest.mark.parametrize(("variant", "size"), [(None, 1 + 2 + 4), ("fp32", 8 + 16), ("fp", 0), ("ema", 32)], ids=str)
def test_files_of_another_variant_do_not_count(tmp_path, variant, size):
    names = ["diffusion_pytorch_model", "model-00001-of-00002", "model-00002-of-00002"]
    names += ["model.fp32", "model.fp32-00001-of-00002", "model-00001-of-00002.ema"]
    (tmp_path / "vae").mkdir()
    for place, name in enumerate(names):
        save_file({"a": torch.zeros(2**place)}, tmp_path / "vae" / f"{name}.safetensors")
    assert converted_bytes(tmp_path, torch.bfloat16, variant).get("vae", 0) == 2 * size


def test_what_killed_starts_have_left_is_removed(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    node = platform.node()
    left = f"hp-edit-trl-{node}-{gone.pid}-abc"
    kept = [f"hp-edit-trl-{node}-{os.getpid()}-abc", f"hp-edit-trl-{node}-{os.getppid()}-abc", f"other-{gone.pid}-abc"]
    kept += [f"hp-edit-trl-another{node}-{gone.pid}-abc", "hp-edit-trl-abc"]
    for name in (left, *kept):
        (tmp_path / name / "transformer").mkdir(parents=True)
    remove_left_folders(str(tmp_path / kept[0]))
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
