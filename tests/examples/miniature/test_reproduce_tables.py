"""Tables 1 and 3 in miniature, from LoRAs that exist already; the tests of the experiments train some."""

import csv
import shutil
from pathlib import Path

import pytest
from experiments import fingerprint

from tests.examples.test_train_qwen_edit import EXAMPLES, run, run_here


LORA = Path(__file__).parents[2] / "regression" / "lora" / "pytorch_lora_weights.safetensors"


def overall(file):
    """Of each editor, the main score over all tasks."""
    with file.open() as lines:
        return {
            row["editor"]: float(row["value"])
            for row in csv.DictReader(lines)
            if (row["of"], row["kind"]) == ("score", "overall") and row["metric"] in ("hp_score", "o")
        }


@pytest.mark.slow
def test_two_tables(tmp_path, capsys):
    key = fingerprint((EXAMPLES / "miniature" / "experiment.yaml").read_bytes())
    for name in ("grpo_base_scorer", "grpo_in_full"):
        (tmp_path / "out" / f"{name}_{key}").mkdir(parents=True)
        shutil.copy(LORA, tmp_path / "out" / f"{name}_{key}")
    arguments = ["--runs_dir", "out", "--output_dir", "results", "--num_cases", "16"]
    script = "miniature/reproduce_tables.py"
    done = run("table_1", "table_3", *arguments, cwd=str(tmp_path), script=script)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, best in (("table_1", 5), ("table_3", 10)):
        found = overall(tmp_path / "results" / name / "table.csv")
        assert found["untouched source"] == 0 and found["what was asked for"] == best
        assert 0 < found["pretrained"] < best and found["GRPO in full"] == found["GRPO, base scorer"] > 0
        assert (
            "python examples/miniature/reproduce_tables.py" in (tmp_path / "results" / name / "table.md").read_text()
        )
        assert list((tmp_path / "out").glob(f"{name}_*/report/gallery.html"))
        assert not (tmp_path / "results" / name / "gallery.html").exists()
    first = (tmp_path / "results" / "table_1" / "table.csv").read_bytes()
    run_here("table_1", *arguments, cwd=tmp_path, script=script)
    assert (tmp_path / "results" / "table_1" / "table.csv").read_bytes() == first
    with pytest.raises(SystemExit) as end:
        run_here("table_4", *arguments, cwd=tmp_path, script=script)
    assert end.value.code == 2 and "table_4: choose from table_1, table_3" in capsys.readouterr().err
