import json
import os

import numpy as np
import pytest
from datasets import Image as ImageFeature
from datasets import List
from PIL import Image

from hp_edit_trl.bench import Metric, RealPrefBench, read_run, run_benchmark
from hp_edit_trl.editors import Editor, FolderEditor
from hp_edit_trl.judges import Judgement
from hp_edit_trl.ratings import Rating
from tests.fake_hub import fake_hub
from tests.helpers import RuleJudge, make_cases, photo
from tests.processes import Script


def bench(dataset=None, judge=None, **kwargs):
    return RealPrefBench(judge or RuleJudge(), make_cases(10) if dataset is None else dataset, **kwargs)


class Painter(Editor):
    """Paints each edit in a red drawn by the case's seed."""

    def __init__(self, strength=1.0, stop_at=None):
        self.strength, self.stop_at, self.painted = strength, stop_at, []

    @property
    def identity(self):
        return {"editor": "painter", "revision": "1", "strength": self.strength}

    def __call__(self, references, prompts, ids, seeds):
        edits = []
        for images, case_id, seed in zip(references, ids, seeds, strict=True):
            if len(self.painted) == self.stop_at:
                raise KeyboardInterrupt
            self.painted.append(case_id)
            red = np.random.default_rng(seed).integers(0, 256)
            edits.append(Image.new("RGB", images[0].size, (int(self.strength * red), 0, 0)))
        return edits


def score_of(row, folder):
    """What the rule gives to an edit as it lies in the folder."""
    with Image.open(folder / row["edit"]) as edit:
        return round(5 * np.asarray(edit)[..., 0].mean() / 255)


def test_a_run_from_cases_to_results(tmp_path):
    judge, painter = RuleJudge(), Painter()
    run = run_benchmark(bench(judge=judge), painter, tmp_path / "run")
    assert run.name == "painter" and [row["id"] for row in run.cases] == make_cases(10)["id"][:]
    scores = [score_of(row, run.folder) for row in run.cases]
    assert [row["hp_score"] for row in run.cases] == scores and len(set(scores)) > 2
    for row in run.cases:
        (reference,) = row["references"]
        assert Image.open(run.folder / reference).size[0] <= 1600
    assert json.loads(run.cases[0]["answers"]) == {"hp_score": str(scores[0])}
    overall = next(row for row in run.results["summary"] if row["kind"] == "overall")
    by_task = {}
    for row in run.cases:
        by_task.setdefault(row["task"], []).append(row["hp_score"])
    assert overall["value"] == pytest.approx(np.mean([np.mean(values) for values in by_task.values()]))
    assert run.results["counts"] == {
        "cases": 10, "edits": 10, "no_edit": 0, "resized": 0, "reshaped": 0, "no_score": 0, "judgements": 10,
        "parse_failures": 0, "unparsed_samples": 0, "unanswered": 0,
    }  # fmt: skip
    settings = run.settings
    assert settings["editor"]["strength"] == 1.0 and settings["seed"] == 0 and settings["versions"]["hp-edit-trl"]
    assert settings["benchmark"]["judge"].startswith("judge RuleJudge")
    assert set(settings["benchmark"]["scorer_prompts"]) == set(by_task)
    # Once more: nothing is left to do, and the results are the same bytes.
    before = (run.folder / "results.json").read_bytes(), (run.folder / "cases.parquet").read_bytes()
    run_benchmark(bench(judge=judge), painter, tmp_path / "run")
    assert (len(painter.painted), judge.asked) == (10, 10)
    assert before == ((run.folder / "results.json").read_bytes(), (run.folder / "cases.parquet").read_bytes())


def test_the_judge_reads_instruction_and_requirement(tmp_path):
    texts = []

    def rule(text, pictures):
        texts.append(text)
        return 3

    asked = make_cases(4).add_column("requirement", [None, "Keep the hat", None, "Leave the sky"])
    run_benchmark(bench(asked, RuleJudge(rule=rule)), Painter(), tmp_path)
    for place, row in enumerate(asked):
        (text,) = [text for text in texts if f"number {place}" in text]
        assert row["requirement"] is None or row["requirement"] in text


def test_seeds_do_not_depend_on_the_batch_or_the_order(tmp_path):
    one = run_benchmark(bench(), Painter(), tmp_path / "one", batch_size=3)
    turned = make_cases(10).select(range(9, -1, -1))
    other = run_benchmark(bench(turned), Painter(), tmp_path / "two", batch_size=1)
    key = lambda row: row["id"]  # noqa: E731
    assert sorted(one.cases, key=key) == sorted(other.cases, key=key)
    third = run_benchmark(bench(), Painter(), tmp_path / "three", seed=1)
    assert [row["hp_score"] for row in third.cases] != [row["hp_score"] for row in one.cases]


def test_stopped_halfway_it_goes_on(tmp_path):
    whole = run_benchmark(bench(), Painter(), tmp_path / "whole", batch_size=2)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(bench(), Painter(stop_at=5), folder, batch_size=2)
    with pytest.raises(ValueError, match="did not finish"):
        read_run(folder)
    # A kill also leaves half a line, half a picture, and a picture without its line.
    with open(folder / "edits-0.jsonl", "a") as file:
        file.write('{"id": "case-4", "sh')
    (folder / "edits" / "case-0.png").write_bytes((folder / "edits" / "case-0.png").read_bytes()[:50])
    Image.new("RGB", (64, 64)).save(folder / "edits" / "case-7.png")
    painter = Painter()
    run = run_benchmark(bench(), painter, folder, batch_size=2)
    assert sorted(painter.painted) == ["case-0", *(f"case-{i}" for i in range(4, 10))]
    assert run.cases == whole.cases and run.results == whole.results


def test_stopped_while_scoring_it_asks_only_for_the_rest(tmp_path):
    class Tired(RuleJudge):
        def __call__(self, conversations):
            if self.asked >= 4:
                raise KeyboardInterrupt
            return super().__call__(conversations)

    with pytest.raises(KeyboardInterrupt):
        run_benchmark(bench(judge=Tired()), Painter(), tmp_path, chunk_size=2)
    judge, painter = RuleJudge(), Painter()
    run = run_benchmark(bench(judge=judge), painter, tmp_path)
    assert judge.asked == 6 and not painter.painted
    assert [row["hp_score"] for row in run.cases] == [score_of(row, tmp_path) for row in run.cases]


def test_cases_that_go_wrong_are_missing_and_the_rest_goes_on(tmp_path):
    cases = make_cases(10).to_list()
    cases[5]["image"] = {"bytes": b"no picture", "path": None}
    dataset = make_cases(10).cast_column("image", __import__("datasets").Image(decode=False))
    dataset = dataset.from_list(cases, features=dataset.features)

    def fussy(images, prompts):
        edits = []
        for image, prompt in zip(images, prompts, strict=True):
            number = int(prompt.rpartition(" ")[2])
            if number == 1:
                raise RuntimeError("too many fingers")
            size = {3: (32, 32), 4: (50, 200)}.get(number, image.size)
            edit = Image.new("RGB", size, (200 if number != 6 else 7, 0, 0))
            edits.append(None if number == 2 else np.asarray(edit) if number == 7 else edit)
        return edits

    judge = RuleJudge(rule=lambda text, pictures: "hm" if pictures[-1].getpixel((0, 0))[0] == 7 else 4)
    run = run_benchmark(bench(dataset, judge), fussy, tmp_path)
    reasons = {row["id"]: row["reason"] for row in run.cases if row["reason"]}
    assert reasons.pop("case-5").startswith("bad case: Case 'case-5'")
    assert reasons == {
        "case-1": "editor failed: RuntimeError: too many fingers",
        "case-2": "no edit",
        "case-6": "no score in the answer: hm",
        "case-7": "no edit: the editor returned a ndarray, but must return PIL images",
    }
    rows = {row["id"]: row for row in run.cases}
    assert all(rows[case_id]["hp_score"] is None for case_id in (*reasons, "case-5"))
    assert rows["case-3"]["hp_score"] == rows["case-4"]["hp_score"] == 4
    assert (rows["case-3"]["width"], rows["case-3"]["resized"], rows["case-3"]["reshaped"]) == (32, True, True)
    assert run.results["counts"] == {
        "cases": 10, "edits": 6, "no_edit": 4, "resized": 2, "reshaped": 2, "no_score": 1, "judgements": 6,
        "parse_failures": 1, "unparsed_samples": 0, "unanswered": 0,
    }  # fmt: skip
    assert run.results["reasons"] == {
        "editor failed": 1, "no edit": 2, "bad case": 1, "no score in the answer": 1
    }  # fmt: skip
    overall = next(row for row in run.results["summary"] if row["kind"] == "overall")
    assert overall["value"] is None and overall["missing"] == 5  # two of the tasks have no score at all
    # What failed is tried again, and only that.
    judge.rule = lambda text, pictures: 4
    asked = judge.asked
    again = run_benchmark(bench(dataset, judge), fussy, tmp_path)
    assert judge.asked == asked + 1 and again.results["counts"]["no_score"] == 0


def test_the_judge_is_shown_edit_and_source_at_equal_areas(tmp_path):
    shown = []

    def rule(text, pictures):
        shown.append([picture.size for picture in pictures])
        return 3

    run_benchmark(
        bench(judge=RuleJudge(rule=rule)), lambda images, prompts: [Image.new("RGB", (30, 20))] * len(images), tmp_path
    )
    assert shown and all(edit == (30, 20) and 0.9 < w * h / (30 * 20) <= 1 for (w, h), edit in shown)


def test_an_editor_that_always_fails_and_a_judge_that_is_gone(tmp_path):
    def broken(images, prompts):
        raise KeyError("weights")

    with pytest.raises(ValueError, match="failed with all of the first 8 cases.*KeyError: 'weights'"):
        run_benchmark(bench(), broken, tmp_path / "a")

    class Gone(RuleJudge):
        def __call__(self, conversations):
            return [Judgement(None, "connection refused", answered=False)] * len(conversations)

    with pytest.raises(ConnectionError, match="too many questions: 1. in a row.*10 no answer .connection refused"):
        run_benchmark(bench(judge=Gone()), Painter(), tmp_path / "b")
    run = run_benchmark(bench(judge=RuleJudge()), Painter(), tmp_path / "b")
    assert run.results["counts"]["no_score"] == 0


def test_a_folder_of_another_run(tmp_path):
    run_benchmark(bench(), Painter(), tmp_path / "run")
    repainted = make_cases(10).map(
        lambda row, i: {"image": Image.new("RGB", (64, 64))} if i == 3 else {}, with_indices=True
    )
    for other, message in (
        (
            dict(editor=Painter(0.5)),
            "run that was made with other settings .editor strength: 1.0 -> 0.5.: choose another output_dir",
        ),
        (dict(benchmark=bench(judge=RuleJudge("other"))), "benchmark judge: .* -> "),
        (dict(benchmark=bench(make_cases(9))), "benchmark cases: 10 -> 9"),
        (dict(benchmark=bench(repainted)), "benchmark cases_sha: "),
        (dict(seed=3), "seed: 0 -> 3"),
    ):
        with pytest.raises(ValueError, match=message):
            run_benchmark(**{"benchmark": bench(), "editor": Painter(), "output_dir": tmp_path / "run", **other})
    make_cases(10).save_to_disk(tmp_path / "cases")  # the same cases from elsewhere are the same cases
    assert run_benchmark(bench(str(tmp_path / "cases"), split="train"), Painter(), tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(settings | {"format": 0}))
    with pytest.raises(ValueError, match="results in format 0"):
        run_benchmark(bench(), Painter(), tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty and holds no results"):
        run_benchmark(bench(), Painter(), tmp_path / "mine")


def test_cases_with_missing_columns(tmp_path):
    cases = make_cases(3)
    with pytest.raises(ValueError, match="no column 'id', 'task'"):
        run_benchmark(bench(cases.remove_columns(["id", "task"])), Painter(), tmp_path)
    with pytest.raises(ValueError, match="paint"):
        run_benchmark(bench(cases.map(lambda row: {"task": "paint"})), Painter(), tmp_path)
    with pytest.raises(ValueError, match="Row 1 of RealPref-Bench has the id 'case-0' of row 0"):
        run_benchmark(bench(cases.map(lambda row: {"id": "case-0"})), Painter(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_metric_named_like_a_column(tmp_path):
    benchmark = bench(make_cases(3))
    benchmark.metrics = {"task": Metric("Task", 1.0), "edit": Metric("Edit", 1.0)}
    with pytest.raises(ValueError, match="RealPref-Bench has metrics with names of other columns: rename edit, task"):
        run_benchmark(benchmark, Painter(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_cases_with_several_references(tmp_path):
    def several(row, i):
        return {"images": [row["image"], photo(32, 64, i)][: 1 + i % 2]}

    cases = make_cases(4).map(several, with_indices=True, remove_columns=["image"])
    cases = cases.cast_column("images", List(ImageFeature()))
    shown = []

    def rule(text, pictures):
        shown.append([picture.size for picture in pictures])
        return 3

    def tall(images, prompts):
        return [Image.new("RGB", (16, 32)) if isinstance(image, list) else image for image in images]

    run = run_benchmark(bench(cases, RuleJudge(rule=rule)), tall, tmp_path / "run")
    # An edit is compared with the reference of the nearest aspect ratio.
    wanted = [[(64, 64)] * 2, [(128, 64), (32, 64), (32, 64)]] * 2
    assert shown == [[(64, 64)] * 2, [(32, 16), (16, 32), (16, 32)]] * 2
    assert [len(row["references"]) for row in run.cases] == [1, 2, 1, 2]
    assert [Image.open(run.folder / file).size for file in run.cases[1]["references"]] == wanted[1][:2]
    assert [row["resized"] for row in run.cases] == [False, True] * 2 and run.results["counts"]["reshaped"] == 0
    other = cases.map(lambda row, i: {"images": row["images"][:1]} if i == 1 else {}, with_indices=True)
    with pytest.raises(ValueError, match="benchmark cases_sha: "):
        run_benchmark(bench(other, RuleJudge(rule=rule)), tall, tmp_path / "run")


def test_ready_edits_under_any_id(tmp_path):
    dataset = make_cases(3).map(lambda row: {"id": row["id"].replace("-", "/ü ")})
    run = run_benchmark(bench(dataset), Painter(), tmp_path / "run")
    assert [row["hp_score"] for row in run.cases] == [score_of(row, run.folder) for row in run.cases]
    # The edits of a run are a folder of edits, for another judge.
    other = run_benchmark(
        bench(dataset, RuleJudge("second")), FolderEditor(run.folder / "edits", "painter"), tmp_path / "other"
    )
    assert [row["hp_score"] for row in other.cases] == [row["hp_score"] for row in run.cases]


def test_people_beside_the_scorer(tmp_path):
    ratings = [
        Rating(annotator, f"case-{i}", editor, score, "1", "2026-01-01T00:00:00+00:00")
        for annotator, i, editor, score in [
            ("a", 0, "painter", 4), ("b", 0, "painter", 1), ("a", 1, "painter", None), ("a", 2, "other", 5),
            ("a", 3, "painter", 3),
        ]
    ]  # fmt: skip
    run = run_benchmark(bench(), Painter(), tmp_path, ratings=ratings)
    assert [row["human"] for row in run.cases[:5]] == [2.5, None, None, 3.0, None]
    human = [row for row in run.results["summary"] if row["metric"] == "human" and row["kind"] == "cases"]
    assert human[0]["value"] == 2.75 and human[0]["n"] == 2
    with pytest.raises(ValueError, match="None of the 5 ratings is of an edit by 'someone'.*by other, painter"):
        run_benchmark(bench(), Painter(), tmp_path / "x", name="someone", ratings=ratings)


@pytest.mark.slow
def test_two_processes_share_the_cases_and_end_with_the_same_results(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom tests.bench.test_run import Painter, bench\nfrom hp_edit_trl.bench import run_benchmark\n"
        "run_benchmark(bench(), Painter(), sys.argv[1], batch_size=2)\n"
    )
    alone = run_benchmark(bench(), Painter(), tmp_path / "alone")
    done = Script(script, tmp_path / "both", environment={"ACCELERATE_USE_CPU": "true"}, processes=2).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    both = read_run(tmp_path / "both")
    assert both.cases == alone.cases and both.results == alone.results
    assert all((both.folder / f"edits-{rank}.jsonl").read_text().count("\n") == 5 for rank in (0, 1))


class Painful(Painter):
    """Fails with whatever the second process gives it."""

    def __call__(self, references, prompts, ids, seeds):
        if os.environ["RANK"] == "1":
            raise RuntimeError("no paint")
        return super().__call__(references, prompts, ids, seeds)


@pytest.mark.slow
def test_what_fails_in_one_process_fails_in_both_and_the_next_run_is_made(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom tests.bench.test_run import Painful, Painter, bench, make_cases\n"
        "from hp_edit_trl.bench import run_benchmark\n"
        "for name, editor in (('bad', Painful()), ('good', Painter())):\n"
        "    try:\n        run_benchmark(bench(make_cases(20)), editor, f'{sys.argv[1]}/{name}', batch_size=2)\n"
        "    except ValueError as error:\n"
        "        open(sys.argv[1] + '/told-' + os.environ['RANK'], 'a').write(f'{name} {error}')\n"
    )
    done = Script(script, tmp_path, environment={"ACCELERATE_USE_CPU": "true"}, processes=2).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    told = [(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)]
    assert told[0].startswith("bad Process 1 failed: ValueError: The editor failed with all")
    assert told[1].startswith("bad The editor failed with all of the first 8 cases") and "no paint" in told[1]
    good = read_run(tmp_path / "good")
    assert good.cases == run_benchmark(bench(make_cases(20)), Painter(), tmp_path / "alone").cases
    # What the other process had made is kept.
    assert len((tmp_path / "bad" / "edits-0.jsonl").read_text().splitlines()) == 10


def test_a_picture_that_was_opened_but_cannot_be_read_is_no_edit(tmp_path):
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "torn.png").write_bytes(whole.read_bytes()[:1500])

    def edit(images, prompts, ids):
        return [
            Image.open(tmp_path / "torn.png") if case_id == "case-1"
            else Image.new("RGB", (0, 5)) if case_id == "case-2"
            else image
            for case_id, image in zip(ids, images, strict=True)
        ]  # fmt: skip

    run = run_benchmark(bench(), edit, tmp_path / "run")
    reasons = {row["id"]: row["reason"] for row in run.cases if row["reason"] is not None}
    assert list(reasons) == ["case-1", "case-2"] and reasons["case-2"].endswith("it is empty: 0 x 5 pixels")
    unread = "no edit: the image that the editor returned cannot be decoded: "
    assert all(reason.startswith(unread) for reason in reasons.values())
    assert run.results["counts"]["edits"] == 8 and run.results["reasons"] == {"no edit": 2}


def test_an_edit_that_was_lost_is_made_again_and_found(tmp_path):
    run = run_benchmark(bench(), Painter(), tmp_path / "run")
    # As if two processes had made the edits: the lines of one file are read after those of the other.
    (run.folder / "edits-0.jsonl").rename(run.folder / "edits-1.jsonl")
    (run.folder / run.cases[3]["edit"]).unlink()

    class Other(Painter):  # as one that draws otherwise each time
        def __call__(self, references, prompts, ids, seeds):
            return super().__call__(references, prompts, ids, [seed + 1 for seed in seeds])

    again, editor, judge = None, Other(), RuleJudge()
    for _ in range(2):
        again = run_benchmark(bench(judge=judge), editor, run.folder)
    assert editor.painted == [run.cases[3]["id"]] and judge.asked == 1
    assert again.cases[3]["hp_score"] == score_of(again.cases[3], run.folder)
    assert again.cases[:3] == run.cases[:3] and again.cases[4:] == run.cases[4:]


def test_results_are_those_of_the_rows(tmp_path, monkeypatch):
    run_benchmark(bench(), Painter(), tmp_path)

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hp_edit_trl.bench.run.summarize", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(bench(), Painter(), tmp_path)
    with pytest.raises(ValueError, match="did not finish"):
        read_run(tmp_path)


@pytest.mark.parametrize("case_id", ["../x", "..", "a/b", "第三 个?*", "x" * 230, "Third" * 99, "%2e"])
def test_any_id_is_a_file_in_the_folder(tmp_path, case_id):
    odd = make_cases(2).to_list()
    odd[0]["id"] = case_id
    cases = make_cases(2).from_list(odd, features=make_cases(2).features)
    run = run_benchmark(bench(cases), Painter(), tmp_path / "run")
    assert run.cases[0]["hp_score"] == score_of(run.cases[0], run.folder)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert len(list((run.folder / "edits").iterdir())) == 2
    again = run_benchmark(bench(cases), FolderEditor(run.folder / "edits"), tmp_path / "again")
    assert [row["hp_score"] for row in again.cases] == [row["hp_score"] for row in run.cases]


HUB = """
import sys
from huggingface_hub import HfApi
from hp_edit_trl.bench import run_benchmark
from tests.bench.test_run import Painter, bench
from tests.helpers import make_cases
first = make_cases(4).push_to_hub("someone/RealPref-Bench", split="test").oid
make_cases(5).push_to_hub("someone/RealPref-Bench", split="test")
pinned = [(bench("someone/RealPref-Bench", revision=revision), revision) for revision in (None, first)]
runs = [run_benchmark(benchmark, Painter(), f"{sys.argv[1]}/{revision}") for benchmark, revision in pinned]
newest = HfApi().dataset_info("someone/RealPref-Bench").sha
assert [len(run.cases) for run in runs] == [5, 4]
assert [run.settings["benchmark"]["revision"] for run in runs] == [newest, first], runs[0].settings
assert runs[0].settings["benchmark"]["dataset"] == "someone/RealPref-Bench"
"""


@pytest.mark.slow
def test_results_carry_the_commit_of_the_cases(tmp_path):
    with fake_hub() as hub:
        done = Script("-c", HUB, tmp_path, cwd=tmp_path, environment=hub.env).wait()
    assert done.returncode == 0, done.stderr[-3000:]
