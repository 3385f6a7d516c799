"""The loop of stage 1, with simulated people and judge, from the outside."""

import json

import pytest

from hp_edit_trl import load_scorer_prompts
from hp_edit_trl.miniature.raters import KEPT
from tests.examples.test_train_qwen_edit import run, run_here


@pytest.mark.slow
def test_agreement_is_what_the_raters_noise_makes_it_and_refinement_finds_the_question(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--cases_per_task", "36", "--num_resamples", "200"]
    done = run(*arguments, cwd=str(tmp_path), script="calibrate_scorer.py")
    assert done.returncode == 0, done.stderr[-4000:]
    out = done.stdout
    measured = {line.split(":")[0]: line for line in out.splitlines() if "Pearson" in line and "noise" in line}
    for name in ("base", "refined"):
        pearson = json.loads((tmp_path / f"agreement-{name}" / "agreement.json").read_text())["agreement"]["overall"][
            "pearson"
        ]
        expected = float(measured[name].split("noise ")[1].split(";")[0])
        assert pearson["low"] - 0.002 <= expected <= pearson["high"] + 0.002
        assert (tmp_path / f"agreement-{name}" / "worst.html").exists()
    assert pearson["value"] > 0.95
    prompts = load_scorer_prompts(str(tmp_path / "prompts"))
    assert len(prompts) == 9 and sum(KEPT in prompt.text for prompt in prompts.values()) >= 6
    again = run_here(*arguments, cwd=tmp_path, script="calibrate_scorer.py")  # goes on, and finds the same
    assert [line for line in again.splitlines() if "Pearson" in line] == [
        line for line in out.splitlines() if "Pearson" in line
    ]
