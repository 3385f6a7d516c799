"""Pairs mined with the miniature and a scorer that can be worked out by hand; kills at every point; bad input."""

import json
import math
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value, load_dataset
from peft import LoraConfig
from PIL import Image as PILImage

from hp_edit_trl import HPScorerReward
from hp_edit_trl.data import build_preference_dataset, mine_preference_pairs, preference_pairs, sample_and_score
from hp_edit_trl.judges import JudgeRefusedError
from hp_edit_trl.miniature import CoarseScorer, RuleScorer, load_pipeline
from hp_edit_trl.miniature import load_dataset as load_world
from hp_edit_trl.rewards import Gate, TournamentReward
from tests.processes import Script


ROOT = Path(__file__).parents[2]
OPTIONS = {
    "score_name": "score", "resolution": 32, "num_inference_steps": 2, "true_cfg_scale": 1.0, "batch_size": 8,
    "num_generations": 3,
}  # fmt: skip


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


@pytest.fixture(scope="module")
def cases():
    return load_world("train", 6)


def mine(pipeline, cases, folder, reward_func=None, **options):
    options = {"min_gap": 0.05, "min_chosen_score": 0.5, "cases_per_round": 2, **OPTIONS, **options}
    return mine_preference_pairs(pipeline, reward_func or RuleScorer(), cases, folder, **options)


@pytest.fixture(scope="module")
def mined(pipeline, cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mined")
    return mine(pipeline, cases, folder), folder


def test_a_key_that_is_refused_loses_no_score(pipeline, cases, tmp_path):
    def refused(scorer, count=4, **columns):
        rewards = scorer(**columns)
        raise JudgeRefusedError("the server answered 401.", [*rewards[:count], *[None] * (len(rewards) - count)])

    options = {**OPTIONS, "score_name": None, "cases_per_round": 2}
    with pytest.raises(JudgeRefusedError, match="^the server answered 401. Edits and scores are kept in"):
        sample_and_score(pipeline, partial(refused, RuleScorer()), cases, tmp_path, **options)
    scores = preference_pairs.read_mined_scores(tmp_path)
    assert len(scores) == 6 and sum(score is not None for score in scores.values()) == 4


def contents(dataset):
    return [
        {
            name: np.asarray(value).tobytes() if isinstance(value, PILImage.Image) else value
            for name, value in row.items()
        }
        for row in dataset
    ]


def test_a_pair_is_the_best_and_the_worst_edit_of_its_case(mined, cases):
    pairs, folder = mined
    samples = load_dataset(str(folder / "dataset"), "samples", split="train")
    scorer, by_id = RuleScorer(), {case["id"]: case for case in cases}
    assert len(samples) == 18 and 0 < len(pairs) <= 6
    assert set(pairs.column_names) == {*cases.column_names, "chosen", "rejected", "score_chosen", "score_rejected"}
    for row in samples:  # scores belong to the edits that they stand beside
        case = by_id[row["id"]]
        assert row["prompt"] == case["prompt"]
        assert scorer.score(row["edit"], case["image"], case["target"]) == pytest.approx(row["score"])
    for pair in pairs:
        case = by_id[pair["id"]]
        own = {s["sample"]: s for s in samples if s["id"] == pair["id"]}
        scores = [own[k]["score"] for k in range(3)]
        assert pair["score_chosen"] == pytest.approx(max(scores)) and pair["score_rejected"] == pytest.approx(
            min(scores)
        )
        for name, k in (("chosen", int(np.argmax(scores))), ("rejected", int(np.argmin(scores)))):
            assert pair[name].tobytes() == own[k]["edit"].tobytes()
            assert scorer.score(pair[name], case["image"], case["target"]) == pytest.approx(
                pair[f"score_{name}"], abs=1e-5
            )
        assert pair["image"].tobytes() == case["image"].tobytes() and pair["prompt"] == case["prompt"]


def test_cases_without_a_pair_are_named_with_the_reason(mined, cases):
    pairs, folder = mined
    dropped = [json.loads(line) for line in (folder / "dataset" / "dropped.jsonl").read_text().splitlines()]
    assert sorted([entry["id"] for entry in dropped] + list(pairs["id"])) == sorted(cases["id"])
    assert all(entry["reason"].partition(":")[0] in ("tie", "gap", "failed") for entry in dropped)
    card = (folder / "dataset" / "README.md").read_text()
    assert f"| with a pair | {len(pairs)} |" in card and "RuleScorer" in card and str(folder) not in card


def test_the_dataset_needs_none_of_the_files_beside_it(pipeline, cases, tmp_path):
    # Sources as paths, as of an image folder
    files = []
    for i, case in enumerate(cases.select(range(2))):
        files.append(str(tmp_path / f"{i}.png"))
        case["image"].save(files[-1])
    by_path = cases.select(range(2)).remove_columns("image").add_column("image", files)

    mine(pipeline, by_path, tmp_path / "out", min_gap=0.0001)
    (tmp_path / "out" / "dataset").rename(tmp_path / "alone")
    shutil.rmtree(tmp_path / "out")
    for file in files:
        Path(file).unlink()
    pairs = load_dataset(str(tmp_path / "alone"), split="train")
    assert len(pairs)
    for pair in pairs:
        assert {pair[name].size for name in ("image", "chosen", "rejected")} == {(32, 32)}
    assert load_dataset(str(tmp_path / "alone"), "samples", split="train")[0]["edit"].size == (32, 32)


def test_the_rule_of_choice(cases, tmp_path):
    scores = [[5, 1, 1], [4, 4, 4], [2, 1, 0], [4.5, 4, 4.2], [None, 3, None], [4, 4, None]]
    cases = cases.remove_columns("target")
    (tmp_path / "mining.json").write_text(
        json.dumps({"sampling": {"editor": "x"}, "scoring": {"reward_func": "y", "score_name": None}})
    )
    places = preference_pairs._sample_folders(preference_pairs.without_decoding(cases), tmp_path)
    with (tmp_path / "scores-0.jsonl").open("w") as file:
        for case, place, values in zip(cases, places, scores, strict=True):
            place.mkdir(parents=True)
            for k, score in enumerate(values):
                case["image"].save(place / f"{k}.png")
                file.write(json.dumps({"id": case["id"], "case": place.name, "sample": k, "score": score}) + "\n")
    counts = build_preference_dataset(cases, tmp_path, min_gap=1.0, min_chosen_score=3.0)
    assert counts == {"pairs": 1, "tie": 2, "failed": 1, "gap": 1, "fewer than two scores": 1}
    pairs = load_dataset(str(tmp_path / "dataset"), split="train")
    assert (pairs[0]["id"], pairs[0]["score_chosen"], pairs[0]["score_rejected"]) == (cases["id"][0], 5.0, 1.0)
    samples = load_dataset(str(tmp_path / "dataset"), "samples", split="train")
    assert samples["score"][12:15] == [None, 3.0, None]  # a missing score is missing
    with pytest.raises(ValueError, match=r"Not one of 6 cases gave a pair .* lower min_gap=9"):
        build_preference_dataset(cases, tmp_path, min_gap=9.0)


@pytest.mark.parametrize("kill", [1, 4, 7, 9, 14])
def test_a_killed_run_goes_on_and_gives_the_same(mined, pipeline, cases, tmp_path, monkeypatch, kill):
    # Killed when the n-th edit has been saved or the n-th round of scores is being given, whichever comes first
    events, save = [0], PILImage.Image.save

    def count():
        events[0] += 1
        if events[0] == kill:
            raise Killed

    def counted_save(self, *args, **kwargs):
        save(self, *args, **kwargs)
        count()

    class Scorer(RuleScorer):
        def __call__(self, **columns):
            count()
            return super().__call__(**columns)

    Scorer.__name__ = "RuleScorer"
    monkeypatch.setattr(PILImage.Image, "save", counted_save)
    with pytest.raises(Killed):
        mine(pipeline, cases, tmp_path, Scorer())
    monkeypatch.setattr(PILImage.Image, "save", save)
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    scored = len(preference_pairs.read_mined_scores(tmp_path))
    again = [0]

    class Counting(RuleScorer):
        def __call__(self, completions, **columns):
            again[0] += len(completions)
            return super().__call__(completions=completions, **columns)

    Counting.__name__ = "RuleScorer"
    pairs = mine(pipeline, cases, tmp_path, Counting())
    assert contents(pairs) == contents(mined[0])
    assert {path: path.stat().st_mtime_ns for path in done} == done  # nothing was sampled twice
    assert again[0] == 18 - scored  # or scored twice
    assert not list(tmp_path.rglob("*.part"))


def test_a_line_that_was_cut_off_is_scored_again(mined, pipeline, cases, tmp_path):
    mine(pipeline, cases, tmp_path)
    file = tmp_path / "scores-0.jsonl"
    file.write_text(file.read_text()[:-20])
    pairs = mine(pipeline, cases, tmp_path)
    assert contents(pairs) == contents(mined[0])
    assert len(preference_pairs.read_mined_scores(tmp_path)) == 18


def test_missing_scores_stay_missing_and_are_asked_for_again(pipeline, cases, tmp_path):
    class Failing(RuleScorer):
        fails = True

        def __call__(self, log_extra=None, **columns):
            def spoil(name, values):
                log_extra(
                    name,
                    [
                        None if self.fails and i % 3 == 1 else math.nan if self.fails and i % 3 == 2 else v
                        for i, v in enumerate(values)
                    ],
                )

            return super().__call__(log_extra=spoil, **columns)

    scorer = Failing()
    sample_and_score(pipeline, scorer, cases, tmp_path, **OPTIONS)
    scores = preference_pairs.read_mined_scores(tmp_path)
    assert list(scores.values()).count(None) == 12
    with pytest.raises(ValueError, match="fewer than two scores"):
        build_preference_dataset(cases, tmp_path)
    scorer.fails = False
    sample_and_score(pipeline, scorer, cases, tmp_path, **OPTIONS)
    assert None not in preference_pairs.read_mined_scores(tmp_path).values()


def test_other_pairs_in_a_folder_of_the_same_name_are_not_taken_for_these(pipeline, cases, tmp_path):
    for name, count in (("a", 6), ("b", 4)):
        pairs = mine(pipeline, cases.select(range(count)), tmp_path / name, min_gap=0.0001)
        loaded = load_dataset(str(tmp_path / name / "dataset"), split="train")
        assert contents(loaded) == contents(pairs)


def test_bad_input(pipeline, cases, tmp_path):
    for options, message in [
        ({"num_generations": 1}, "num_generations=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be an integer of at least 1"),
        ({"on_bad_case": "ignore"}, "on_bad_case='ignore' is not known"),
        ({"score_name": "beauty"}, r"does not log 'beauty'; it logs \['score'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            mine(pipeline, cases, tmp_path / "bad", **options)
    with pytest.raises(ValueError, match="no column 'prompt'"):
        mine(pipeline, cases.remove_columns("prompt"), tmp_path / "bad")
    with pytest.raises(ValueError, match=r"already has the columns \['chosen'\]"):
        mine(pipeline, cases.add_column("chosen", list(range(6))), tmp_path / "taken")
    assert not (tmp_path / "taken").exists()
    with pytest.raises(ValueError, match="guidance_scale=2.0, but the transformer of this"):
        mine(pipeline, cases, tmp_path / "bad", guidance_scale=2.0)
    sample_and_score(pipeline, RuleScorer(), cases.select([0]), tmp_path / "seed", **OPTIONS)
    with pytest.raises(ValueError, match=r"holds edits made with other settings \(seed: 0 -> 1\): choose another"):
        sample_and_score(pipeline, RuleScorer(), cases.select([0]), tmp_path / "seed", seed=1, **OPTIONS)


def test_edits_of_another_policy_or_scores_of_another_judge_are_not_mixed(cases, tmp_path):
    pipeline, cases = load_pipeline(), cases.select([0])
    sample_and_score(pipeline, RuleScorer(), cases, tmp_path, **OPTIONS)
    edits = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    with pytest.raises(
        ValueError, match=r"holds scores made with other settings .*'RuleScorer' -> 'CoarseScorer'.*delete its scores"
    ):
        sample_and_score(pipeline, CoarseScorer(), cases, tmp_path, **OPTIONS | {"score_name": "coarse_score"})
    (tmp_path / "scores-0.jsonl").unlink()
    sample_and_score(pipeline, CoarseScorer(), cases, tmp_path, **OPTIONS | {"score_name": "coarse_score"})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == edits
    pipeline.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="holds edits made with other settings .revision: "):
        sample_and_score(pipeline, CoarseScorer(), cases, tmp_path, **OPTIONS | {"score_name": "coarse_score"})


def test_the_scorer_of_a_task_is_asked_for_before_anything_is_sampled(pipeline, cases, tmp_path):
    class Judge:
        identity = {"judge": "Judge", "name": "a judge"}

        def load(self, num_images=2):
            pass

        def __call__(self, conversations):
            raise AssertionError

    cases = cases.remove_columns("task").add_column("task", ["ad"] * 6)
    with pytest.raises(ValueError, match="No scorer prompt for the task 'ad'"):
        mine(pipeline, cases, tmp_path / "tasks", HPScorerReward(Judge()), score_name="hp_score")
    with pytest.raises(ValueError, match="score_name='hp_score' names scores that have not passed the gate"):
        gate = Gate(HPScorerReward(Judge()), RuleScorer(), 0.5)
        mine(pipeline, cases, tmp_path / "tasks", gate, score_name="hp_score")
    with pytest.raises(ValueError, match="TournamentReward compares the edits of a case"):
        mine(pipeline, cases, tmp_path / "tasks", TournamentReward(Judge()), score_name=None)
    assert not (tmp_path / "tasks").exists()
    assert "a judge" in HPScorerReward(Judge()).description


def test_a_broken_image_stops_or_is_left_out(pipeline, cases, tmp_path):
    rows = [
        {"id": row["id"], "prompt": row["prompt"], "image": {"bytes": b"no image", "path": None}}
        for row in cases.select([0])
    ]
    features = Features({"id": Value("string"), "prompt": Value("string"), "image": Image()})
    rows += [{"id": row["id"], "prompt": row["prompt"], "image": row["image"]} for row in cases.select([1])]
    broken = Dataset.from_list(rows, features=features)

    def length(completions, **columns):
        return [float(np.asarray(image).std()) for image in completions]

    options = OPTIONS | {"score_name": None}
    with pytest.raises(
        ValueError, match="'miniature-train-0-0' has an image that cannot be decoded.*on_bad_case='skip'"
    ):
        sample_and_score(pipeline, length, broken, tmp_path / "stop", **options)
    sample_and_score(pipeline, length, broken, tmp_path / "skip", on_bad_case="skip", **options)
    counts = build_preference_dataset(broken, tmp_path / "skip", min_gap=0.0, min_chosen_score=0.0)
    assert counts == {"pairs": 1, "bad case": 1}


@pytest.mark.slow
def test_processes_that_are_shot(mined, tmp_path):
    # Twice, wherever it happens to be, and not only where Python can clean up
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(
        "from tests.data.test_preference_pairs import *\n"
        f"mine(load_pipeline(), load_world('train', 6), {str(out)!r}, Slow())"
    )
    for edits in (2, 9):
        run = Script(script)
        until = time.time() + 120
        while len(list(out.rglob("*.png"))) < edits and time.time() < until:
            time.sleep(0.02)
        run.kill()
        assert run.wait().returncode == -signal.SIGKILL
    done = Script(script).wait()
    assert done.returncode == 0, done.stderr
    pairs = load_dataset(str(out / "dataset"), split="train")
    assert contents(pairs) == contents(mined[0])


class Slow(RuleScorer):
    def __call__(self, **columns):
        time.sleep(0.5)
        return super().__call__(**columns)


Slow.__name__ = "RuleScorer"


@pytest.mark.slow
def test_two_processes_mine_the_same(mined, pipeline, cases, tmp_path):
    # They go on where one has stopped after its first round.
    sample_and_score(pipeline, RuleScorer(), cases.select([0, 3]), tmp_path / "out", **OPTIONS)
    script = tmp_path / "script.py"
    script.write_text(
        "from tests.data.test_preference_pairs import *\n"
        f"mine(load_pipeline(), load_world('train', 6), {str(tmp_path / 'out')!r})\n"
    )
    done = Script(script, environment={"ACCELERATE_USE_CPU": "true"}, processes=2).wait()
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("scores-*")) == ["scores-0.jsonl", "scores-1.jsonl"]
    lines = [line for path in (tmp_path / "out").glob("scores-*") for line in path.read_text().splitlines()]
    assert len(lines) == 18  # nothing twice
    pairs = load_dataset(str(tmp_path / "out" / "dataset"), split="train")
    assert contents(pairs) == contents(mined[0])


def test_what_fails_in_one_process_stops_mining_in_all(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from accelerate import PartialState\n"
        "from tests.data.test_preference_pairs import *\n"
        "class Broken(RuleScorer):\n"
        "    def __call__(self, **columns):\n"
        "        if PartialState().process_index == 1:\n"
        "            raise KeyError('target')\n"
        "        return super().__call__(**columns)\n"
        "try:\n"
        f"    mine(load_pipeline(), load_world('train', 2), {str(tmp_path / 'out')!r}, Broken())\n"
        "except (RuntimeError, ValueError) as error:\n"
        "    print(f'rank {PartialState().process_index} stopped: {error}')\n"
    )
    done = Script(script, environment={"ACCELERATE_USE_CPU": "true"}, processes=2).wait(60)
    assert done.returncode == 0, done.stderr[-3000:]
    # Another library, or the other process, may print on the same line.
    lines = sorted(re.findall(r"rank \d stopped(?:(?!rank \d stopped).)*", done.stdout))
    assert len(lines) == 2 and all("KeyError: 'target'" in line for line in lines)
    assert "Process 1 failed" in lines[0]
