"""The modules for `evaluate`, loaded with `evaluate.load` in a process of its own that has no network."""

import json

import pytest

from tests.processes import Script


CODE = """
import json, socket

def no_network(*args, **kwargs):
    raise OSError("no network")

socket.socket.connect = no_network
import evaluate
from hp_edit_trl.metrics import METRICS

scores = evaluate.load(str(METRICS / "score_agreement"))
alpha = evaluate.load(str(METRICS / "krippendorff_alpha"))
results = {"once": scores.compute(predictions=[1, 2, 3.5, 5], references=[1, 2, 3, 4])}
scores.add_batch(predictions=[1, 2], references=[1, 2])
scores.add(prediction=3.5, reference=3)
scores.add_batch(predictions=[5.0, None, float("nan")], references=[4, 2, 3])
results["batches"] = scores.compute()
results["constant"] = scores.compute(predictions=[2, 2, 2], references=[1, 2, 3])
try:
    scores.compute(predictions=[7.0], references=[1.0])
except ValueError as error:
    results["error"] = str(error)
columns = {"annotators": list("aabb"), "items": list("xyxy"), "values": [1, 3, 2, 3]}
for level in ("nominal", "ordinal", "interval"):
    results[level] = alpha.compute(**columns, level=level)
alpha.add_batch(annotators=["a", "a"], items=["x", "y"], values=[1, 3])
alpha.add_batch(annotators=["b", "b"], items=["x", "y"], values=[2, 3])
results["alpha in batches"] = alpha.compute()
results["one annotator"] = alpha.compute(annotators=["a"], items=["x"], values=[1])
nan = float("nan")
realpref = evaluate.load(str(METRICS / "realpref_bench"))
results["realpref"] = realpref.compute(predictions=[5, 4, nan, 1], tasks=["add", "add", "add", "style"])
try:
    realpref.compute(predictions=[6.0], tasks=["add"])
except ValueError as error:
    results["realpref error"] = str(error)
gedit = evaluate.load(str(METRICS / "gedit_bench"))
columns = {"semantic_consistency": [9, 4, nan], "perceptual_quality": [4, 9, 5], "tasks": ["a", "a", "b"]}
results["gedit"] = gedit.compute(**columns)
dreambench = evaluate.load(str(METRICS / "dreambench_plus"))
columns = {"concept_preservation": [4, 2, 0, nan], "prompt_following": [4, 1, 1, 2], "kinds": ["x", "x", "y", "y"]}
results["dreambench"] = dreambench.compute(**columns)
columns = {"concept_preservation": [4, nan, 2], "prompt_following": [nan, 2, nan], "kinds": ["x", "x", "y"]}
results["dreambench without both"] = dreambench.compute(**columns)
results["refused"] = []
for module, columns in (
    (realpref, {"predictions": [1.0], "tasks": ["overall"]}),
    (realpref, {"predictions": [1.0, 2.0], "tasks": ["add", None]}),
    (gedit, {"semantic_consistency": [1, 2], "perceptual_quality": [1, 2], "tasks": ["add", None]}),
    (dreambench, {"concept_preservation": [1], "prompt_following": [1], "kinds": ["pf"]}),
):
    try:
        module.compute(**columns)
    except ValueError as error:
        results["refused"].append(str(error))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    home = str(tmp_path_factory.mktemp("home"))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = Script("-c", CODE, cwd=elsewhere, environment={"HF_HUB_OFFLINE": "1", "HF_HOME": home}).wait()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_score_agreement(results):
    once = results["once"]
    assert once["pearson"] == pytest.approx(0.99591, abs=1e-5) and once["spearman"] == once["kendall"] == 1
    assert (once["mae"], once["bias"], once["exact"], once["within_one"]) == (0.375, 0.375, 0.5, 1)
    assert (once["n"], once["missing"]) == (4, 0)
    assert results["batches"] == {**once, "missing": 2}
    assert results["constant"]["pearson"] is None and results["constant"]["bias"] == 0
    assert results["error"] == "scores[0] is 7.0, but must be a number from 0 to 5."


def test_krippendorff_alpha(results):
    # Coincidences: 1 with 2 twice, 3 with 3 twice; of the four values, two are 3. By hand:
    found = {level: results[level]["krippendorff_alpha"] for level in ("nominal", "ordinal", "interval")}
    assert found["nominal"] == pytest.approx(1 - 3 * 2 / 10)
    assert found["interval"] == pytest.approx(1 - 3 * 2 / (2 * (1 + 2 * 4 + 2 * 1)))
    assert found["ordinal"] == pytest.approx(1 - 3 * 2 / (2 * (1 + 2 * 2.5**2 + 2 * 1.5**2)))
    assert results["alpha in batches"]["krippendorff_alpha"] == found["ordinal"]
    assert results["one annotator"]["krippendorff_alpha"] is None


def test_benchmarks(results):
    assert results["realpref"] == {
        "overall": 2.75,
        "mean": pytest.approx(10 / 3),
        "add": 4.5,
        "style": 1,
        "n": 3,
        "missing": 1,
    }
    assert results["realpref error"] == "predictions[0] is 6.0, but must be a number from 0 to 5."
    assert results["gedit"] == {
        "g_sc": None, "g_pq": (13 / 2 + 5) / 2, "g_o": None, "mean_o": 6, "o_a": 6, "o_b": None, "n": 2, "missing": 1
    }  # fmt: skip
    assert results["dreambench"] == {
        "cp": 0.5, "pf": 0.5, "cp_pf": 0.25, "cp_over_pf": 1, "cp_x": 0.75, "cp_y": 0, "pf_x": 0.625, "pf_y": 0.375,
        "n": 3, "missing": 1,
    }  # fmt: skip


def test_a_product_is_of_the_cases_with_both_grades(results):
    without = results["dreambench without both"]
    assert (without["cp_pf"], without["cp_over_pf"], without["n"], without["missing"]) == (None, None, 0, 3)
    assert without["cp"] == pytest.approx(0.75) and without["pf"] == pytest.approx(0.5)


def test_groups_that_would_hide_a_result(results):
    names = ("tasks[0] is 'overall'", "tasks[1] is None", "tasks[1] is None", "kinds[0] is 'pf'")
    assert len(results["refused"]) == 4
    for found, name in zip(results["refused"], names, strict=True):
        assert found.startswith(name), found
