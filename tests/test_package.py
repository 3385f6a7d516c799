"""The package as it is installed: lazy names, what the wheel holds, what the repository promises."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hp_edit_trl


ROOT = Path(__file__).parents[1]


def test_importing_is_quick_and_pulls_in_nothing_heavy():
    code = (
        "import sys, time; start = time.perf_counter(); import hp_edit_trl; seconds = time.perf_counter() - start; "
        "assert not {'torch', 'transformers', 'diffusers', 'trl'} & set(sys.modules), sys.modules.keys(); "
        "assert {'DPOEditTrainer', 'FlowGRPOEditTrainer'} <= set(dir(hp_edit_trl)); print(seconds)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2


def test_every_public_name_is_there():
    for name in hp_edit_trl.__all__:
        assert getattr(hp_edit_trl, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        hp_edit_trl.Nothing  # noqa: B018


def test_floors():
    """A module imports only from floors below its own (docs/design.md)."""
    floors = {
        "flow": 1,
        "seeding": 1,
        "cases": 1,
        "jsonl": 1,
        "processes": 1,
        "ratings": 1,
        "lora": 1,
        "cli": 4,
        "policies": 2,
        "rewards": 2,
        "trainer": 3,
        "data": 3,
        "evaluation": 3,
        "annotation": 3,
        "miniature": 4,
    }
    for path in (ROOT / "hp_edit_trl").rglob("*.py"):
        parts = path.relative_to(ROOT / "hp_edit_trl").with_suffix("").parts
        if parts[0] not in floors:
            continue
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) > 2 and words[0] == "from" and words[1].startswith("..") and words[1] != "..":
                other = words[1].lstrip(".").split(".")[0]
                assert floors[other] < floors[parts[0]] or other == parts[0], (path, line)


@pytest.mark.slow
def test_the_wheel_holds_the_prompts_and_the_miniature(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("hp_edit_trl-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    prompts = {path.relative_to(ROOT / "prompts").as_posix() for path in (ROOT / "prompts").rglob("*.md")}
    assert {f"hp_edit_trl/prompts/{name}" for name in prompts} <= set(names)
    assert "hp_edit_trl/py.typed" in names and "hp_edit_trl/trainer/model_card.md" in names
    assert {"hp_edit_trl/data/pairs_card.md", "hp_edit_trl/data/builder/dataset_card.md"} <= set(names)
    assert "hp_edit_trl/prompts/instructions/bokeh.md" in names
    assert {"hp_edit_trl/bench/gallery.html", "hp_edit_trl/prompts/gedit/quality.md"} <= set(names)
    assert {
        f"hp_edit_trl/metrics/{name}/{name}.py" for name in ("realpref_bench", "gedit_bench", "dreambench_plus")
    } <= set(names)
    assert not any(name.startswith(("tests/", "benchmarks/", "examples/")) for name in names)
    weights = [info for info in zipfile.ZipFile(wheel).infolist() if "/miniature/weights/" in info.filename]
    assert weights and sum(info.compress_size for info in weights) < 15e6
    # Unpacked elsewhere, away from the repository, both load.
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        "import hp_edit_trl; from hp_edit_trl.miniature import load_pipeline; load_pipeline();"
        "print(hp_edit_trl.__file__, len(hp_edit_trl.load_scorer_prompts()))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(target), "PATH": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout and done.stdout.split()[-1] == "9"
