from importlib.metadata import version

import torch

from hp_edit_trl.cli import env, main
from hp_edit_trl.version import __version__


def test_what_a_bug_report_needs(capsys, monkeypatch):
    monkeypatch.setitem(env.EXTRAS, "annotate", ("no-such-package", "aiohttp"))
    main(["env"])
    lines = capsys.readouterr().out.splitlines()
    assert f"- hp-edit-trl: {__version__}" in lines
    assert any(line.startswith(f"- torch: {torch.__version__}, CUDA ") for line in lines)
    for package in ("transformers", "diffusers", "trl", "peft", "accelerate", "datasets", "huggingface_hub"):
        assert f"- {package}: {version(package)}" in lines
    assert "- Devices: CPU only" in lines
    assert f"- Extra `annotate`: no-such-package not installed, aiohttp {version('aiohttp')}" in lines
    assert f"- Extra `server`: aiohttp {version('aiohttp')}" in lines
