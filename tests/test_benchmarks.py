"""The benchmarks run; what they measure is asserted nowhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "cells"),
    [
        (["full_size.py", "--tiny", "--repeats", "1"], "| 128 | 4 | 4 |"),
        (["building.py", "--rows", "32", "--latency", "0.02", "--engines", "local"], "| local | scores | 32 |"),
        (["judging.py", "--cases", "1", "--edits", "2", "--size", "64"], "| expected | shared |"),
        (["kills.py", "--kills", "2", "--trainers", "DPO", "--processes", "1"], "| DPO | 1 |"),
        (["rollout_and_training.py", "--repeats", "1", "--quick"], "| 64 px, CFG 4, batch 4 |"),
    ],
)
def test_benchmark(command, cells):
    command = [sys.executable, str(ROOT / "benchmarks" / command[0]), *command[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert cells in done.stdout
