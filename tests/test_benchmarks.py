"""The benchmarks run; what they measure is asserted nowhere."""

from pathlib import Path

import pytest

from tests.processes import Script


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "cells"),
    [
        (["full_size.py", "--tiny", "--repeats", "1"], "| 64 | 4 | 4 |"),
        (
            ["building.py", "--rows", "32", "--latency", "0.02", "--engines", "local", "--tiny"],
            "| local | scores | 32 |",
        ),
        (["judging.py", "--cases", "1", "--edits", "2", "--size", "64"], "| expected | shared |"),
        (["kills.py", "--kills", "2", "--trainers", "DPO", "--processes", "1"], "| DPO | 1 |"),
        (["waiting.py", "--faster", "100"], "| 3 s per request"),
        (["rollout_and_training.py", "--repeats", "1", "--quick"], "| 64 px, CFG 4, batch 4 |"),
    ],
)
def test_benchmark(command, cells):
    done = Script(ROOT / "benchmarks" / command[0], *command[1:]).wait()
    assert done.returncode == 0, done.stderr[-4000:]
    assert cells in done.stdout
