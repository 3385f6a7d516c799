"""The commands, as a user runs them, with a judge behind a server on this machine."""

import base64
import inspect
import io
import json
import re
from pathlib import Path
from unittest import mock

import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as pipeline_module
import pytest
import yaml
from datasets import Dataset
from diffusers import FluxKontextPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline
from PIL import Image

from hp_edit_trl import cli, load_scorer_prompts
from hp_edit_trl.bench import read_run
from hp_edit_trl.calibration import read_scores
from hp_edit_trl.calibration.probe import INJECTIONS
from hp_edit_trl.cli import main
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.ratings import Rating, append_answer, ratings_file
from tests.bench.test_gedit import gedit
from tests.calibration.test_refine import ARTIFACTS, look, revision, world
from tests.helpers import make_cases, make_edits
from tests.judges.test_judges import completion, serve  # noqa: F401


def pictures(body):
    urls = [part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in urls]


@pytest.fixture
def server(serve):  # noqa: F811
    """A judge that follows the rule of `look`, and proposes a question when it is asked for a list."""

    def reply(body, count):
        text = body["messages"][0]["content"][0]["text"]
        if "JSON list" in text:
            return 200, completion(json.dumps([ARTIFACTS]))
        return 200, completion(str(look(text, pictures(body))))

    return serve(reply)


def options(server, tmp_path):
    return ["--judge", "m", "--judge_base_url", server.url, "--cache", str(tmp_path / "cache.sqlite")]


def squeezed(table):
    return re.sub(" +", " ", table)


def test_score_and_again(server, tmp_path, capsys):
    make_edits(3).save_to_disk(tmp_path / "edits")
    command = ["score", str(tmp_path / "edits"), "--output_dir", str(tmp_path / "s"), *options(server, tmp_path)]
    main([*command, "--input-price", "1", "--output-price", "2"])
    assert "| new scores | 6 |" in squeezed(capsys.readouterr().out)
    assert [line["score"] for line in read_scores(tmp_path / "s")] == [
        look("", [row["edit"]]) for row in make_edits(3)
    ]
    asked = len(server.requests)
    main(command)
    assert "| scores kept from before | 6 |" in squeezed(capsys.readouterr().out)
    # Another folder, the same judgements: only the trial at the start is asked for
    main(["score", str(tmp_path / "edits"), "--output_dir", str(tmp_path / "t"), *options(server, tmp_path)])
    assert "| judgements from the cache | 6 |" in squeezed(capsys.readouterr().out)
    assert len(server.requests) == asked + 2
    with pytest.raises(SystemExit, match="hp-edit: .* holds scores for the task .* made with other settings"):
        main([*command, "--task", "base"])


def test_probe(server, tmp_path, capsys):
    make_edits(4).save_to_disk(tmp_path / "edits")
    main(["probe-judge", str(tmp_path / "edits"), *options(server, tmp_path)])
    rows = squeezed(capsys.readouterr().out).strip().splitlines()
    assert len(rows) == 7 + len(INJECTIONS) and rows[0].startswith("| probe | what is shown |")
    assert rows[2].startswith("| as given | the edit as it is | 4 | 0 |")


def test_refine_with_a_candidate_and_with_proposals(server, tmp_path, capsys):
    dataset, ratings = world()
    dataset.save_to_disk(tmp_path / "edits")
    for rating in ratings:
        append_answer(tmp_path / f"ratings-{rating.annotator}.jsonl", rating)
    command = ["refine-prompt", str(tmp_path / "edits"), "--ratings", str(tmp_path), *options(server, tmp_path)]
    revision("4", ARTIFACTS).save(tmp_path / "candidate.md")
    candidate = ["--candidate", str(tmp_path / "candidate.md")]
    main([*command, "--output_dir", str(tmp_path / "a"), *candidate])
    assert "yes: better on the held-out cases" in capsys.readouterr().out
    assert load_scorer_prompts(str(tmp_path / "a"))["color"].name == "4"
    proposer = ["--proposer", "thinker", "--proposer_base_url", server.url]
    main([*command, "--output_dir", str(tmp_path / "b"), "--tasks", "color,remove", "--rounds", "1", *proposer])
    asked = [body for body in server.requests if body["model"] == "thinker"]
    assert len(asked) == 1 and "JSON list" in asked[0]["messages"][0]["content"][0]["text"]
    shown = capsys.readouterr()
    assert "left out: The task 'remove' has no rated edits; there are ratings for color." in shown.err
    assert "yes: better" in shown.out and "1 of 1 rounds are used" in shown.out and "gain of 0.15" in shown.out
    assert ARTIFACTS in load_scorer_prompts(str(tmp_path / "b"))["color"].text
    count = len(server.requests)
    main([*command, "--output_dir", str(tmp_path / "b"), "--plan"])  # nobody is asked
    assert "yes: better" in capsys.readouterr().out and len(server.requests) == count
    for wrong, message in [
        ([*candidate, "--from-base"], "begin the folder with --from_base --rounds 0"),
        ([*candidate, "--tasks", "remove"], "is a prompt for the task 'color', but --tasks names remove"),
        ([*candidate, "--target", "0.9"], "Nothing is proposed with --candidate, so --target has no effect"),
        (["--from-base"], "did not start from the base prompt: choose another output_dir"),
        (["--tasks", "remove"], "No task can be refined. The task 'remove' has no rated edits"),
        (["--rounds", "-1"], "rounds=-1 must not be negative"),
    ]:
        with pytest.raises(SystemExit, match=message):
            main([*command, "--output_dir", str(tmp_path / "b"), *wrong])
    (tmp_path / "other").mkdir()
    append_answer(tmp_path / "other" / "ratings-x.jsonl", Rating("x", "other", None, 3, "r:1", "2026-01-01T00:00:00Z"))
    command[3] = str(tmp_path / "other")
    with pytest.raises(SystemExit, match="None of the 1 ratings at .*other is of these edits"):
        main([*command, "--output_dir", str(tmp_path / "c")])
    assert len(server.requests) == count and not (tmp_path / "c").exists()


EDITORS = """
import numpy as np
from PIL import Image


def edits(images, prompts, seeds, shift):
    made = []
    for image, prompt, seed in zip(images, prompts, seeds):
        rng = np.random.default_rng([seed, shift])
        pixels = np.zeros((16, 16, 3), np.uint8)
        pixels[..., 0] = rng.integers(256)
        pixels[-1] = 255 if rng.integers(2) else pixels[0]
        made.append(Image.fromarray(pixels))
    return made


def first(images, prompts, seeds):
    return edits(images, prompts, seeds, 0)


def second(images, prompts, seeds):
    return edits(images, prompts, seeds, 1)
"""


def test_stage_1_from_cases_to_prompts(server, tmp_path, capsys):
    """The steps of docs/building_an_hp_scorer.md; `measure-agreement` of runs is in tests/bench/test_study.py."""
    cases = [
        {
            "id": f"case {i}",
            "prompt": f"Make it red, {i}",
            "image": Image.new("RGB", (16, 16), (0, 0, i)),
            "task": task,
        }
        for i, task in enumerate(["color", "style"] * 18)
    ]
    Dataset.from_list(cases).save_to_disk(tmp_path / "cases")
    (tmp_path / "editors.py").write_text(EDITORS)
    (tmp_path / "ratings").mkdir()
    judge = options(server, tmp_path)
    bench = ["bench", "realpref", "--dataset", str(tmp_path / "cases"), "--split", "train", *judge]
    runs = [str(tmp_path / "runs" / name) for name in ("first", "second")]
    for run in runs:
        name = Path(run).name
        main([*bench, "--editor", f"{tmp_path / 'editors.py'}:{name}", "--output_dir", run])
    for run in map(read_run, runs):
        for case in run.cases:
            score = look("blotches", [Image.open(run.folder / case["edit"])])
            for name in ("anna", "ben"):
                rating = Rating(name, case["id"], run.name, score, "r:1", "2026-01-01T00:00:00+00:00")
                append_answer(ratings_file(tmp_path / "ratings", name), rating)
    ratings, prompts = str(tmp_path / "ratings"), str(tmp_path / "prompts")
    split = ["--validation_fraction", "0.6"]
    refine = ["refine-prompt", *runs, "--ratings", ratings, "--output_dir", prompts, *split, *judge]
    count = len(server.requests)
    main([*refine, "--plan"])
    plan = squeezed(capsys.readouterr().out)
    assert (
        re.search(r"\| color \| 18 \| 2 \| 2 \| 0\.\d\d \| \d", plan) and "assumed" not in plan
    )  # known from the runs
    main([*refine, "--plan", "--from-base"])
    assert "| color | 18 | 2 | 2 | 0.70 assumed |" in squeezed(capsys.readouterr().out)
    assert len(server.requests) == count and not Path(prompts).exists()
    main([*refine, "--from-base", "--target", "0.95"])
    rows = [row for row in squeezed(capsys.readouterr().out).splitlines() if "the target is reached" in row]
    assert [row.split(" | ")[:4] for row in rows] == [["| color", "3", "1", "1"], ["| style", "3", "1", "1"]]
    assert sorted(load_scorer_prompts(prompts)) == ["base", "color", "style"]
    count = len(server.requests)
    main([*refine, "--from-base", "--target", "0.95"])
    assert "the target is reached" in capsys.readouterr().out and len(server.requests) <= count + 2  # a trial
    # The edits are scored again with the refined prompts, and agree with people
    again = str(tmp_path / "again")
    main(
        [*bench, "--editor", f"{runs[0]}/edits", "--name", "first", "--scorer_prompts", prompts, "--output_dir", again]
    )
    refined = read_run(again)
    assert [case["hp_score"] for case in refined.cases] == [
        look("blotches", [Image.open(refined.folder / case["edit"])]) for case in refined.cases
    ]


def test_what_goes_wrong_is_said_in_a_line(server, tmp_path):
    make_edits(2).save_to_disk(tmp_path / "edits")
    edits = str(tmp_path / "edits")
    for command, message in [
        (["score", str(tmp_path / "none")], "hp-edit: .*none"),
        (["score", edits, "--split", "test"], "hp-edit: "),
        (
            ["score", edits, "--judge_base_url", "http://127.0.0.1:9/v1"],
            "at http://127.0.0.1:9/v1 gives no judgements",
        ),
        (["score", edits, "--judge", str(tmp_path / "edits"), "--cache", "none"], "has no processor"),
        (["score", edits, "--judge_base_url", server.url, "--scorer_prompts", str(tmp_path)], "No scorer prompts"),
        (
            ["refine-prompt", edits, "--ratings", edits, "--output_dir", edits, "--judge_base_url", server.url],
            "No ratings at",
        ),
        (
            ["refine-prompt", edits, "--ratings", edits, "--output_dir", edits, "--target", "1.5"],
            "target=1.5 is no value of the statistic pearson: use one from -1 to 1",
        ),
    ]:
        with pytest.raises(SystemExit, match=message):
            main(command if "--cache" in command else [*command, "--cache", str(tmp_path / "cache")])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    with mock.patch.object(pipeline_module, "VAE_IMAGE_SIZE", 64 * 64):  # a megapixel takes its time
        yield str(folder)


def bench_command(server, tmp_path, editor, out):
    make_cases(3).save_to_disk(tmp_path / "cases")
    small = ["--resolution", "64", "--dtype", "float32"]
    where = ["--dataset", str(tmp_path / "cases"), "--split", "train", "--output_dir", str(tmp_path / out)]
    return ["bench", "realpref", "--editor", editor, *where, *small, *options(server, tmp_path)]


def test_bench_of_a_pipeline_a_policy_and_their_edits(server, tmp_path, pipeline, capsys):
    options = ["--editor_options", "num_inference_steps=2", "true_cfg_scale=1.0"]
    main([*bench_command(server, tmp_path, pipeline, "a"), *options])
    printed = capsys.readouterr().out
    assert str(tmp_path / "a") in printed and "HP-score, overall" in printed
    assert "all of the 3 cases have an edit and a score." in printed
    main([*bench_command(server, tmp_path, pipeline, "b"), *options, "--policy"])
    main([*bench_command(server, tmp_path, str(tmp_path / "a" / "edits"), "c"), "--name", "ready"])
    with pytest.raises(SystemExit, match="lora: for pipelines only, but editor=.*edits' is a folder"):
        main([*bench_command(server, tmp_path, str(tmp_path / "a" / "edits"), "d"), "--lora", "x"])
    runs = [read_run(tmp_path / name) for name in "abc"]
    assert [run.name for run in runs] == [pipeline, pipeline, "ready"]
    assert runs[0].settings["editor"]["num_inference_steps"] == 2 and runs[1].settings["editor"]["policy"]
    for one, two, three in zip(*(run.cases for run in runs), strict=True):
        images = [Image.open(run.folder / row["edit"]) for run, row in zip(runs, (one, two, three), strict=True)]
        assert images[0].tobytes() == images[2].tobytes() and images[0].size == images[1].size
        assert one["hp_score"] == three["hp_score"] is not None
    with pytest.raises(SystemExit, match="hp-edit: .* made with other settings .editor num_inference_steps: 2 -> 3"):
        main([*bench_command(server, tmp_path, pipeline, "a"), *options, "num_inference_steps=3"])


def test_bench_of_a_function(server, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def turned(images, prompts, seeds):\n    return [image.rotate(180) for image in images]\n")
    main(bench_command(server, tmp_path, f"{file}:turned", "out"))
    run = read_run(tmp_path / "out")
    assert run.name == "turned" and run.settings["editor"]["revision"].startswith("source ")
    case = make_cases(3)[0]
    assert Image.open(run.folder / run.cases[0]["edit"]).tobytes() == case["image"].rotate(180).tobytes()


@pytest.mark.parametrize(
    ("editor", "more", "message"),
    [
        ("nowhere.py:edit", [], "editor='nowhere.py:edit' cannot be imported .FileNotFoundError"),
        ("json:edit", [], "editor='json:edit' cannot be imported .KeyError: 'edit'"),
        ("json:dumps", ["--lora", "x"], "lora: for pipelines only, but editor='json:dumps' is a function"),
        ("json:dumps", ["--policy"], "policy: for pipelines only, but editor='json:dumps' is a function"),
        ("no/such-model", [], "neither a local file or folder nor in the cache"),
    ],
)
def test_bench_with_a_wrong_editor(server, tmp_path, editor, more, message):
    with pytest.raises(SystemExit, match=f"hp-edit: .*{message}"):
        main([*bench_command(server, tmp_path, editor, "out"), *more])
    assert not (tmp_path / "out").exists()


def test_bench_of_several_editors_from_one_file(server, tmp_path, pipeline, capsys):
    make_cases(3).save_to_disk(tmp_path / "cases")
    shared = {
        "benchmark": "realpref",
        "dataset": str(tmp_path / "cases"),
        "split": "train",
        "output_dir": str(tmp_path / "out"),
    }
    shared |= {"judge": "m", "judge_base_url": [server.url], "cache": "none", "resolution": 64, "dtype": "float32"}
    file, config = tmp_path / "mine.py", tmp_path / "bench.yaml"
    file.write_text("def same(images, prompts):\n    return images\n")
    few = {"num_inference_steps": 2, "true_cfg_scale": 1.0, "negative_prompt": " "}
    runs = [
        {"name": "someone/tiny", "editor": pipeline, "editor_options": few},
        {"name": "absent", "editor": str(tmp_path / "absent")},
        {"name": "as it was", "editor": f"{file}:same"},
    ]
    shared["ratings"] = str(tmp_path / "ratings")  # there are none yet
    config.write_text(yaml.safe_dump(shared | {"runs": runs}))
    with pytest.raises(SystemExit, match="1 of 3 runs did not finish: absent"):
        main(["bench", "--config", str(config)])
    printed = capsys.readouterr()
    assert printed.err.count("no ratings in") == 3 and "| people" not in printed.out
    assert "absent: There is no file or folder" in printed.err and "Difference from someone/tiny" in printed.out
    assert printed.out.count("all of the 3 cases have an edit and a score.") == 2  # each run prints its result
    assert (tmp_path / "out" / "report" / "gallery.html").exists()
    finished = [read_run(tmp_path / "out" / name) for name in ("someone-tiny", "as it was")]
    assert [run.name for run in finished] == ["someone/tiny", "as it was"]
    assert finished[0].settings["editor"]["negative_prompt"] == " "
    # People rate one of them; the same file adds their column, and scores nothing again.
    rating = Rating("a", "case-0", "as it was", 4, "r:1", "2026-01-01T00:00:00+00:00")
    (tmp_path / "ratings").mkdir()
    append_answer(tmp_path / "ratings" / "ratings-a.jsonl", rating)
    asked = len(server.requests)
    config.write_text(yaml.safe_dump(shared | {"runs": [runs[0], runs[2]]}))
    main(["bench", "--config", str(config)])
    printed = capsys.readouterr()
    assert "someone/tiny: no ratings in" in printed.err and printed.err.count("no ratings in") == 1
    table = (tmp_path / "out" / "report" / "table.md").read_text()
    assert "| people" in table and "4.00" in table and len(server.requests) == asked
    for broken, message in (
        (shared, "a list `runs`"),
        (shared | {"runs": [{"editor": "x"}]}, "each of the runs needs a name"),
        (shared | {"runs": [runs[0], runs[0]]}, "two of the runs have one name"),
        (shared | {"runs": [{"name": "", "editor": "x"}]}, "each of the runs needs a name"),
        (shared | {"runs": [{"name": "x"}]}, "A run needs --editor"),
    ):
        config.write_text(yaml.safe_dump(broken))
        with pytest.raises(SystemExit, match=f"hp-edit: .*{message}"):
            main(["bench", "--config", str(config)])
    config.write_text("runs: [}")
    with pytest.raises(SystemExit, match="hp-edit: .*bench.yaml is not valid YAML: "):
        main(["bench", "--config", str(config)])
    with pytest.raises(SystemExit, match="hp-edit: benchmark, --seed: with --config, all options belong in the file"):
        main(["bench", "gedit", "--config", str(config), "--seed", "3"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"edtior": "y"}, "has the unknown option 'edtior'; known are .*editor,"),
        ({"seed": "3"}, "seed must be a whole number, but is '3'"),
        ({"seed": True}, "seed must be a whole number, but is True"),
        ({"timeout": "long"}, "timeout must be a number, but is 'long'"),
        ({"policy": "yes"}, "policy must be true or false, but is 'yes'"),
        ({"judge_revision": 2024}, "judge_revision must be a text .in quotes if it looks like a number or a date."),
        ({"editor_options": ["num_inference_steps=2"]}, "editor_options must be a mapping of names to values"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, but is 'int8'"),
    ],
)
def test_bench_with_a_wrong_option_in_the_file(tmp_path, option, message):
    config = tmp_path / "bench.yaml"
    config.write_text(yaml.safe_dump({"output_dir": "out", "runs": [{"name": "x", **option}]}))
    with pytest.raises(SystemExit, match=f"hp-edit: .*bench.yaml.*{message}"):
        main(["bench", "--config", str(config)])


TOY = """
from hp_edit_trl.bench import Benchmark, CaseScore, Metric, conversation, why_no_score
from hp_edit_trl.judges import parse_score


class Toy(Benchmark):
    name = "toy"
    title = "Toy-Bench"
    metrics = {"size": Metric("Size", 100.0), "red": Metric("How red", 5.0)}
    group = "kind"
    judge_options = {"max_new_tokens": 3}

    def __init__(self, judge, dataset, split="train", text="How red?"):
        super().__init__(judge, dataset, split)
        self.text = text

    def to_cases(self, raw):
        sizes = ["small" if row["images"][0].width < 100 else "large" for row in raw]
        return raw.rename_column("instruction", "prompt").add_column("kind", sizes)

    def score(self, cases, references, edits):
        judged = self.judge([conversation(self.text, [("The image", edit)]) for edit in edits])
        return [
            CaseScore({"size": float(images[-1].width), "red": one.score}, {"red": one}, why_no_score(one))
            for images, one in zip(references, judged, strict=True)
        ]
"""


def test_a_benchmark_is_one_file(server, tmp_path, capsys):
    def several(row):
        return {"images": [row["image"], row["image"].resize((40, 30))]}

    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "mine.py").write_text(
        "def last(images, prompts):\n"
        "    return [None if '2' in prompt else two[-1] for two, prompt in zip(images, prompts)]\n"
    )
    cases = make_cases(4).map(several, remove_columns=["image", "task"]).rename_column("prompt", "instruction")
    cases.save_to_disk(tmp_path / "cases")
    where = ["--dataset", str(tmp_path / "cases"), *options(server, tmp_path)]
    command = ["bench", f"{tmp_path}/toy.py:Toy", "--editor", f"{tmp_path}/mine.py:last", *where]
    main([*command, "--output_dir", str(tmp_path / "run"), "--benchmark_options", "text=Red or not?"])
    printed = capsys.readouterr().out
    assert "| Size, overall" in printed and "How red" in printed
    assert "last lacks: 1 cases without an edit (reasons: no edit 1)." in printed
    run = read_run(tmp_path / "run")
    assert [row["kind"] for row in run.cases] == ["small", "large", "small", "large"]
    assert [row["size"] for row in run.cases] == [40, 40, None, 40] and len(run.cases[0]["references"]) == 2
    assert all((run.folder / file).exists() for row in run.cases for file in row["references"])
    assert {row["resized"] for row in run.cases} == {False}  # each edit has the shape of its last reference
    judged = [look("", [Image.open(run.folder / row["edit"])]) for row in run.cases if row["edit"]]
    assert [row["red"] for row in run.cases if row["edit"]] == judged
    assert {body["max_tokens"] for body in server.requests} == {3}
    assert "Red or not?" in server.requests[-1]["messages"][0]["content"][0]["text"]
    main(["report", str(tmp_path / "run"), "--output_dir", str(tmp_path / "report")])
    assert "# Toy-Bench" in (tmp_path / "report" / "table.md").read_text()
    page = (tmp_path / "report" / "gallery.html").read_text()
    assert "Toy-Bench" in page and "How red" in page and "0-reference-1.jpg" in page


ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "examples" / "configs" / "bench").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_papers_tables_are_runs_that_parse(recipe, monkeypatch):
    started = []

    def no_editor(args):
        started.append(args)
        raise ValueError("not here")

    monkeypatch.setattr(cli.bench, "_run", no_editor)
    with pytest.raises(SystemExit, match="runs did not finish|not here"):
        main(["bench", "--config", str(recipe)])
    names = [run["name"] for run in yaml.safe_load(recipe.read_text())["runs"]]
    assert [run.name for run in started] == names and len({run.output_dir for run in started}) == len(names)
    assert all(run.editor and run.benchmark and run.seed == 0 and run.resolution == 1024 for run in started)
    recipes = yaml.safe_load(recipe.read_text())
    calls = {
        "Qwen/Qwen-Image-Edit": QwenImageEditPipeline,
        "Qwen/Qwen-Image-Edit-2509": QwenImageEditPlusPipeline,
        "black-forest-labs/FLUX.1-Kontext-dev": FluxKontextPipeline,
    }
    for run, wanted in zip(started, recipes["runs"], strict=True):
        assert dict(run.editor_options) == wanted.get("editor_options", recipes.get("editor_options", {}))
        if not run.editor.startswith("edits/"):
            assert set(run.editor_options) <= set(inspect.signature(calls[run.editor].__call__).parameters)
    head = recipe.read_text().split("\n\n")[0]
    assert (
        head.startswith("#")
        and "80 GB" in head
        and "# Work" in head
        and f"--config {recipe.relative_to(ROOT)}" in head
    )


def test_bench_of_gedit_with_a_judge_that_gives_reasons(serve, tmp_path):  # noqa: F811
    def reply(body, count):
        asked.append((len(pictures(body)), body["max_tokens"]))
        return 200, completion('{"reasoning": "fine", "score": [9, 4]}' if len(pictures(body)) == 2 else "[6, 8]")

    asked: list = []
    gedit(4).save_to_disk(tmp_path / "gedit")
    (tmp_path / "mine.py").write_text("def same(images, prompts):\n    return images\n")
    where = ["--dataset", str(tmp_path / "gedit"), "--output_dir", str(tmp_path / "out")]
    main(["bench", "gedit", "--editor", f"{tmp_path}/mine.py:same", *where, *options(serve(reply), tmp_path)])
    run = read_run(tmp_path / "out")
    assert [(row["sc"], row["pq"]) for row in run.cases] == [(4, 6)] * 4
    assert sorted(set(asked)) == [(1, 1400), (2, 1400)]  # the trial shows two pictures
    assert "parse parse_pair" in run.settings["benchmark"]["judge"]


def test_gedit_with_hp_scores_and_what_people_say(serve, tmp_path, capsys):  # noqa: F811
    def reply(body, count):
        if len(body["messages"]) == 1:
            return 200, completion('{"score": [9, 4], "reasoning": "fine"}')
        asked = re.search(
            r'^Instruction: "Instruction (\d+)"$', body["messages"][0]["content"][0]["text"], re.MULTILINE
        )
        return 200, completion(str(int(asked[1]) // 2) if asked else "3")

    gedit(12).save_to_disk(tmp_path / "gedit")
    (tmp_path / "mine.py").write_text("def same(images, prompts):\n    return images\n")
    (tmp_path / "ratings").mkdir()
    people = {"key0": 0, "key2": 2, "key4": 1, "key6": 3, "key8": 5, "key10": 4}  # HP-scores: 0 to 5, in this order
    for annotator in ("ann", "bob"):
        for case, score in [*people.items(), ("key1", 5)]:  # a Chinese case
            editor = "mine" if annotator == "ann" else None
            rating = Rating(annotator, case, editor, score, "r:1", "2026-01-01T00:00:00+00:00")
            append_answer(ratings_file(tmp_path / "ratings", annotator), rating)
    command = ["bench", "gedit", "--editor", f"{tmp_path}/mine.py:same", "--dataset", str(tmp_path / "gedit")]
    command += ["--name", "mine", "--output_dir", str(tmp_path / "out"), *options(serve(reply), tmp_path)]
    command += ["--benchmark_options", "hp_scorer=true", "language=en", "--ratings", str(tmp_path / "ratings")]
    main(command)
    printed = capsys.readouterr().out
    run = read_run(tmp_path / "out")
    assert [row["hp_score"] for row in run.cases] == [0, 1, 2, 3, 4, 5]
    assert [(row["sc"], row["pq"]) for row in run.cases] == [(4, 4)] * 6
    result = json.loads((tmp_path / "out" / "agreement" / "agreement.json").read_text())
    pearson = result["agreement"]["overall"]["pearson"]
    assert pearson["value"] == pytest.approx(1 - 6 * 4 / (6 * 35)) and pearson["low"] < pearson["value"]
    assert result["agreement"]["overall"]["n"] == 6 and not result["left_out"]["not_scored"]
    assert set(result["agreement"]["groups"]) == {"color_alter", "subject-add", "text_change"}
    assert "| all edits " in printed and "0.89 [" in printed and "HP-score" in printed
    assert (tmp_path / "out" / "agreement" / "human_against_scorer.png").exists()  # figure S1


@pytest.mark.parametrize(
    ("benchmark", "more", "message"),
    [
        (
            "nothing",
            [],
            "There is no benchmark 'nothing': use dreambench, gedit, imgedit, realpref, rise, file.py:",
        ),
        ("report", [], "There is no benchmark 'report'"),
        ("json:dumps", [], "benchmark='json:dumps' is not a subclass of hp_edit_trl.bench.Benchmark"),
        ("nowhere.py:Toy", [], "benchmark='nowhere.py:Toy' cannot be imported"),
        ("realpref", [], "RealPref-Bench needs --dataset"),
        (
            "dreambench",
            ["--split", "test"],
            r"split: DreamBench\+\+ has no such option; its options are dataset, revision",
        ),
        ("gedit", ["--benchmark_options", "clip=null"], "clip: GEdit-Bench has no such option"),
    ],
)
def test_bench_with_a_wrong_benchmark(tmp_path, benchmark, more, message):
    with pytest.raises(SystemExit, match=f"hp-edit: {message}"):
        main(["bench", benchmark, "--editor", "json:dumps", "--output_dir", str(tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()


def test_a_pair_that_is_not_one(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "gedit", "--editor_options", "steps"])
    assert "'steps' must be NAME=VALUE, e.g. num_inference_steps=40" in capsys.readouterr().err
