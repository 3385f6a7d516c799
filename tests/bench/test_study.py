"""The user study: runs are rated as they are, and compared with people without scoring anything again."""

import dataclasses
import json

import numpy as np
import pytest

from hp_edit_trl import calibration
from hp_edit_trl.bench import edits_of_runs, run_benchmark, scores_of_runs
from hp_edit_trl.calibration import load_rubric, page, sample_cases
from hp_edit_trl.cases import edit_keys
from hp_edit_trl.cli import main
from hp_edit_trl.ratings import Rating, append_answer, ratings_file
from hp_edit_trl.utils.images import read_image
from tests.bench.test_run import Painter, bench


STRENGTHS = {"secret-strong": 1.0, "secret-weak": 0.5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secret-runs")
    return [run_benchmark(bench(), Painter(one), folder / name, name=name) for name, one in STRENGTHS.items()]


def test_edits_of_runs_are_shown_as_they_were_judged_and_without_their_editor(runs, tmp_path):
    edits = edits_of_runs(runs)
    assert edit_keys(edits) == [(f"case-{i}", name) for name in STRENGTHS for i in range(10)]
    assert edits["task"][:8] == [case["task"] for case in runs[0].cases[:8]]
    for row, case in zip(edits.select(range(10)), runs[0].cases, strict=True):
        assert read_image(row["edit"], "").tobytes() == read_image(str(runs[0].folder / case["edit"]), "").tobytes()
        assert read_image(row["images"][0], "").size in ((64, 64), (128, 64))
    campaign = page._Campaign(edits, tmp_path, load_rubric(), ["a", "b", "c", "d", "e"], None, 0)
    shown = "".join(campaign.show(campaign.session("a"), key) for key in campaign.session("a").queue)
    assert "secret" not in shown and str(runs[0].folder) not in shown
    editors = [key[1] for key in campaign.session("a").queue]
    assert editors != sorted(editors) and editors != [key[1] for key in campaign.session("b").queue]


def test_runs_that_do_not_belong_together_are_refused(runs):
    with pytest.raises(ValueError, match="Several runs have the name 'secret-strong'.*--name"):
        edits_of_runs([runs[0], runs[0]])
    other = dataclasses.replace(runs[1], settings={**runs[1].settings, "benchmark": {**runs[1].benchmark}})
    other.benchmark["cases_sha"] = "0"
    with pytest.raises(ValueError, match="of different cases"):
        edits_of_runs([runs[0], other])
    other.benchmark["metrics"] = {"sc": {"label": "SC", "maximum": 10}}
    with pytest.raises(ValueError, match="has no HP-scores.*hp_scorer=true"):
        scores_of_runs([other])
    none = [dataclasses.replace(run, cases=[{**case, "edit": None} for case in run.cases]) for run in runs]
    with pytest.raises(ValueError, match="There are no edits in"):
        edits_of_runs(none)


def test_cases_are_drawn_evenly_over_tasks_and_a_larger_draw_holds_a_smaller_one(runs):
    edits = edits_of_runs(runs)
    eight = sample_cases(edits, 8)
    assert len(eight) == 16 and len(set(eight["task"])) == 8  # each case with both of its edits
    assert set(eight["id"]) < set(sample_cases(edits, 9)["id"])
    assert len({tuple(sample_cases(edits, 8, seed=seed)["id"]) for seed in range(6)}) > 1
    incomplete = edits.select(range(1, 20))
    assert "case-0" not in sample_cases(incomplete, 9)["id"]
    for wrong in (0, 10):
        with pytest.raises(ValueError, match=f"num_cases={wrong}: there are 9 cases with an edit by each of 2"):
            sample_cases(incomplete, wrong)


def test_figures_from_runs_and_ratings(runs, tmp_path, capsys, monkeypatch):
    scores = {(line["id"], line["editor"]): line["score"] for line in scores_of_runs(runs)}
    lower = {key: max(0, int(score) - 1) for key, score in scores.items()}
    (tmp_path / "ratings").mkdir()
    for name, given in (("anna", scores), ("ben", {key: lower[key] for key in scores if key[0] < "case-5"})):
        for (case, editor), score in given.items():
            aspects = {"instruction adherence": int(score), "image quality": 5 - int(score)}
            rating = Rating(name, case, editor, int(score), "r:1", "2026-01-01T00:00:00+00:00", aspects=aspects)
            append_answer(ratings_file(tmp_path / "ratings", name), rating)
    (tmp_path / "runs").mkdir()
    for run in runs:
        (tmp_path / "runs" / run.folder.name).symlink_to(run.folder)
    (tmp_path / "runs" / "report").mkdir()
    folders = [str(folder) for folder in sorted((tmp_path / "runs").iterdir())]
    main(["measure-agreement", str(tmp_path / "ratings"), *folders, "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert "left out: " in printed.err and "report is not a results folder" in printed.err
    for figure in ("mean_per_model.png", "human_against_scorer.png", "worst.html"):
        assert (tmp_path / "out" / figure).exists()
    result = json.loads((tmp_path / "out" / "agreement.json").read_text())
    people = {key: (scores[key] + lower[key]) / 2 if key[0] < "case-5" else scores[key] for key in scores}
    assert result["agreement"]["overall"]["n"] == 20
    for name in STRENGTHS:
        keys = [key for key in scores if key[1] == name]
        assert result["editors"][name]["scorer"]["value"] == pytest.approx(np.mean([scores[key] for key in keys]))
        assert result["editors"][name]["human"]["value"] == pytest.approx(np.mean([people[key] for key in keys]))
        quality = result["aspects"]["image quality"]["editors"][name]["value"]
        assert quality == pytest.approx(np.mean([5 - people[key] for key in keys]))
    assert result["aspects"]["image quality"]["pearson"]["value"] == pytest.approx(
        -result["agreement"]["overall"]["pearson"]["value"]
    )
    assert "| image quality         | 20" in printed.out and "mean, secret-weak" in printed.out

    shown = []
    monkeypatch.setattr(calibration, "annotate", lambda dataset, *args, **options: shown.append((dataset, options)))
    study = ["--num_cases", "8", "--annotators", "a,b,c,d,e", "--aspects", "instruction adherence, image quality"]
    main(["annotate", *folders, *study])
    assert len(shown[0][0]) == 16 and shown[0][1]["aspects"] == ["instruction adherence", "image quality"]
    for command, message in (
        (["annotate", str(tmp_path), str(tmp_path / "ratings")], "are no results folders.*or one dataset"),
        (["measure-agreement", "r", *folders, "--dataset", "d", "--output_dir", "o"], "--dataset is for"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(command)
