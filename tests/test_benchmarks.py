"""The benchmarks run; what they measure is asserted nowhere."""

import json
import shutil
from pathlib import Path

import pytest

from tests.processes import Script


ROOT = Path(__file__).parents[1]
FEW = ["--edits", "2", "--num_inference_steps", "3", "--sde_window_size", "1", "--sde_window_range", "0", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "cells"),
    [
        (["full_size.py", "passes", "--tiny", "--repeats", "1"], "| eager | 64 | 4 | 2 |"),
        (
            ["full_size.py", "updates", "--tiny", "--config", "examples/configs/qwen_image_edit_2509.yaml", *FEW],
            "| training | 0.0 | 0.0 | 0.0 | 1.0 |",
        ),
        (
            ["building.py", "--rows", "32", "--latency", "0.02", "--engines", "local", "--tiny"],
            "| local | scores | 32 |",
        ),
        (["judging.py", "--cases", "1", "--edits", "2", "--size", "64"], "| expected | shared |"),
        (["kills.py", "--kills", "2", "--trainers", "DPO", "--processes", "1"], "| DPO | 1 |"),
        (["waiting.py", "--faster", "100"], "| 3 s per request"),
    ],
)
def test_benchmark(command, cells):
    done = Script(ROOT / "benchmarks" / command[0], *command[1:]).wait()
    assert done.returncode == 0, done.stderr[-4000:]
    assert cells in done.stdout


@pytest.mark.slow
def test_bench_writes_page_and_plot(tmp_path):
    page, results = tmp_path / "performance.md", tmp_path / "results"
    shutil.copy(ROOT / "docs" / "performance.md", page)
    results.mkdir()
    around = page.read_text().partition("## Waiting")[2]
    runs = [
        {
            "arm": "all passes", "training_passes": 4000, "difference": gain,
            "curve": [{"thousand_passes": 0.0, "score": 3.0}, {"thousand_passes": 10.0, "score": 3.0 + gain}],
        }
        for gain in (0.1, 0.2)
    ]  # fmt: skip
    (results / "fewer_passes.json").write_text(json.dumps({"runs": runs}))
    command = [ROOT / "benchmarks" / "bench.py", "--write", "--docs", tmp_path]
    done = Script(*command, "--quick").wait()
    assert done.returncode == 0, done.stderr[-4000:]
    tables = page.read_text()
    rows = {line.split("|")[1].strip(): line.split() for line in tables.splitlines() if line.startswith("|")}
    for row in ("0.2M", "edits per case 8"):
        assert row in rows
    # By hand: 8 processes with 2 cases of 2 edits, of which one is trained, and both passes of CFG
    assert [cell for cell in rows["all three"] if cell != "|"][2:4] == ["368", "128"]
    assert [cell for cell in rows["all passes"] if cell != "|"][2:] == [
        "2", "10.0", "4.0", "100%", "+0.150", "±", "0.050", "+0.0150", "±", "0.0050",
    ]  # fmt: skip
    assert tables.endswith(around)
    plot = tmp_path / "assets" / "performance.png"
    assert plot.read_bytes()[:4] == b"\x89PNG"

    # One part alone leaves the others as they are
    (results / "fewer_passes.json").unlink()
    plot.unlink()
    done = Script(*command, "learning").wait()
    assert done.returncode == 0, done.stderr[-4000:]
    assert "python examples/miniature/fewer_passes.py" in done.stdout and "0.2M" not in done.stdout
    before, after = "## Score gained", "## Fewer passes"
    assert page.read_text().partition(before)[0] == tables.partition(before)[0]
    assert page.read_text().partition(after)[2] == tables.partition(after)[2]
    assert plot.exists()
