import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from hp_edit_trl import HPScorerReward, load_scorer_prompts
from hp_edit_trl.bench import GEditBench, parse_pair
from hp_edit_trl.calibration import add_questions
from hp_edit_trl.miniature import (
    RuleScorer,
    SimulatedJudge,
    SimulatedProposer,
    TargetJudge,
    flawed_edits,
    known_pearson,
    load_dataset,
    raters,
    simulate_ratings,
    true_scores,
)
from hp_edit_trl.miniature.raters import IDEAS, KEPT


@pytest.fixture(scope="module")
def cases():
    return load_dataset("train", 80)


@pytest.fixture(scope="module")
def edits(cases):
    return flawed_edits(cases, {"careful": 0.2, "careless": 0.8})


def test_careless_editors_make_worse_edits(edits):
    scores = np.array(true_scores(edits)).reshape(-1, 2)
    assert scores[:, 0].mean() > scores[:, 1].mean() + 0.5
    assert scores.max() == 5 and scores.min() < 2
    again = flawed_edits(load_dataset("train", 3), {"careless": 0.8})  # fewer cases, fewer editors: the same edits
    assert [row["edit"].tobytes() for row in again] == [row["edit"].tobytes() for row in edits.select([1, 3, 5])]


def test_the_known_correlation_is_what_many_raters_give(edits, monkeypatch):
    truths = true_scores(edits)
    monkeypatch.setattr(raters, "true_scores", lambda edits: truths)  # the same for every seed
    edits = edits.select_columns(["id", "editor"])
    noise = {"anna": 0.4, "ben": 0.9}
    scores = [round(truth) for truth in truths[:-1]] + [0]
    found = []
    for seed in range(30):
        ratings = simulate_ratings(edits, noise, seed)
        assert {rating.score for rating in ratings} <= set(range(6))
        human = np.array([rating.score for rating in ratings]).reshape(-1, 2).mean(1)
        found.append(np.corrcoef(scores, human)[0, 1])
    error = np.std(found, ddof=1) / np.sqrt(30)
    assert known_pearson(truths, scores, list(noise.values())) == pytest.approx(np.mean(found), abs=4 * error + 1e-3)
    # Without noise but for the rounding
    rounded = [np.floor(truth + 0.5) for truth in truths]
    assert known_pearson(truths, truths, [1e-6]) == pytest.approx(np.corrcoef(truths, rounded)[0, 1])


def test_the_judge_sees_what_its_prompt_asks_for(cases, edits):
    base = load_scorer_prompts()["base"]
    plain, asking = (
        HPScorerReward(SimulatedJudge(cases), task="base"),
        HPScorerReward(SimulatedJudge(cases), task="base"),
    )
    asking.scorer_prompts = {"base": type(base)("base", "mine:base:2", add_questions(base.text, [KEPT]))}
    scorer = RuleScorer()
    columns = [
        edits["prompt"],
        edits["edit"],
        [[image] for image in edits["image"]],
        edits["task"],
        [None] * len(edits),
    ]
    for row, rough, fine in zip(edits, plain.judge_edits(*columns), asking.judge_edits(*columns), strict=True):
        reached, kept = scorer.parts(row["edit"], row["image"], row["target"])
        assert abs(rough.score - 5 * reached) <= 0.5 and abs(fine.score - 5 * reached * kept) <= 0.5
    stranger = HPScorerReward(SimulatedJudge(cases.select([0])), task="base").judge_edits(*[c[2:4] for c in columns])
    assert [judgement.score for judgement in stranger] == [None, None]


def test_the_proposer_runs_out_of_ideas():
    def ask(text):
        return SimulatedProposer()([[{"content": [{"text": text}]}]])[0].answer

    assert IDEAS[0] in ask("nothing") and IDEAS[1] in ask(IDEAS[0]) and ask(" ".join(IDEAS)) == "[]"


def test_a_judge_that_knows_the_targets(cases):
    rows = list(cases.select(range(24)))
    sources, prompts, tasks, targets = ([row[name] for row in rows] for name in ("image", "prompt", "task", "target"))
    scorer = HPScorerReward(TargetJudge(cases))

    def scores(edits, sources=sources):
        columns = prompts, edits, [[image] for image in sources], tasks, [None] * 24
        return [judgement.score for judgement in scorer.judge_edits(*columns)]

    assert scores(targets) == [5] * 24 and scores(sources) == [0] * 24
    assert scores(targets, sources[1:] + sources[:1]) == [None] * 24  # not cases that it knows
    halves = [Image.blend(source, target, 0.6) for source, target in zip(sources, targets, strict=True)]
    rule = RuleScorer()
    parts = [rule.parts(*pictures) for pictures in zip(halves, sources, targets, strict=True)]
    assert scores(halves) == [np.floor(5 * reached * kept + 0.5) for reached, kept in parts]
    assert {reached > 0.3 for reached, _ in parts} == {True} and set(scores(halves)) & {1, 2, 3, 4}
    # GEdit-Bench asks for two scores from 0 to 10, of both pictures and of the edit alone.
    gedit = [
        {"key": row["id"], "input_image": row["image"], "instruction": row["prompt"], "task_type": row["task"]}
        | {"instruction_language": "en", "Intersection_exist": False}
        for row in rows
    ]
    bench = GEditBench(TargetJudge(cases, parse_pair), Dataset.from_list(gedit))
    as_cases, references = [dict(bench.dataset[i]) for i in range(24)], [[image] for image in sources]
    for edits, sc, pq in ((targets, 10, 10), (sources, 0, 10)):
        scored = bench.score(as_cases, references, edits)
        assert [(one.values["sc"], one.values["pq"]) for one in scored] == [(sc, pq)] * 24
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)) for i in range(24)]
    assert all(one.values["pq"] == 0 for one in bench.score(as_cases, references, noise))
