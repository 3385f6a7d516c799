"""A whole build: from pictures to a dataset, from the configuration to the command."""

import json
import re
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import ImageFilter

from hp_edit_trl import HPScorerReward, miniature
from hp_edit_trl.cli import main
from hp_edit_trl.data import load_realpref
from hp_edit_trl.data.builder import BuildConfig, WorkFolder, build_dataset
from hp_edit_trl.data.builder.instructions import case_id
from hp_edit_trl.data.builder.run import _Build
from hp_edit_trl.editors import Editor
from hp_edit_trl.miniature.tiny import tiny_clip, tiny_judge
from hp_edit_trl.ratings import append_answer
from hp_edit_trl.reviews import Review
from hp_edit_trl.tasks import TASKS
from hp_edit_trl.utils.config import read_config
from hp_edit_trl.utils.images import read_image
from tests.data.builder.test_export import digests
from tests.helpers import photo
from tests.judges.test_judges import completion, serve  # noqa: F401
from tests.processes import Script


TASK_COUNTS = {task.name: task.realpref_50k for task in TASKS.values()}
BENCHMARK_COUNTS = {task.name: task.realpref_bench for task in TASKS.values()}


SCENES = 48
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    miniature.save_pictures(folder, SCENES)
    tiny_clip(str(folder / "clip"))
    return folder


def make_config(pictures, output_dir, **changes):
    options = dict(
        sources=[
            {"folder": str(pictures / "scenes"), "license": "cc0-1.0"},
            {"folder": str(pictures / "photographs"), "license": "cc0-1.0", "source": "scikit-image"},
        ],
        output_dir=str(output_dir),
        min_side=32,
        resolution=64,
        clip_model=str(pictures / "clip"),
        task_counts=dict.fromkeys(TASKS, 10),
        sample_size=2,
        benchmark_counts={"add": 1, "remove": 1},
        batch_sizes={"sources": 8, "instructions": 5, "edits": 3, "scores": 7},
    )
    return BuildConfig(**{**options, **changes})


class Writer(miniature.SimulatedWriter):
    """A simulated writer that draws each target once."""

    known: dict = {}

    def target(self, image, task, style=None):
        key = image.tobytes(), task, style
        if key not in self.known:
            self.known[key] = super().target(image, task, style)
        return self.known[key]


@cache
def simulated_writer() -> Writer:
    return Writer(SCENES)


class Moody(Editor):
    """An editor that follows the prompt in every third case, and otherwise removes color. It can be told to stop."""

    identity = {"editor": "moody", "revision": "1"}

    def __init__(self, stop_at=None):
        self.calls, self.stop_at, self.knows = 0, stop_at, simulated_writer()

    def __call__(self, references, prompts, ids, seeds):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return [self.edit(image, *case) for (image,), *case in zip(references, prompts, seeds, strict=True)]

    def edit(self, image, prompt, seed):
        asked = [(task, None) for task in TASKS if task != "style"]
        known = [found[1] for task in asked if (found := self.knows.target(image, *task)) and found[0] == prompt]
        return known[0] if known and seed % 3 == 0 else image.point(lambda value: value * (seed % 100) // 100)


def build(pictures, output_dir, editor=None, engine="local", stages=None, **changes):
    return build_dataset(
        make_config(pictures, output_dir, **changes),
        writer=simulated_writer(),
        editor=editor or Moody(),
        scorer=HPScorerReward(miniature.SceneJudge(simulated_writer())),
        styles=miniature.MINIATURE_STYLES,
        engine=engine,
        stages=stages,
    )


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    return build(pictures, tmp_path_factory.mktemp("whole") / "build")


def test_the_data_set_has_what_the_stages_made(whole):
    splits = {name: load_realpref(str(whole), name) for name in ("train", "test", "filtered")}
    train, test, filtered = splits.values()
    assert Counter(test["task"]) == {"add": 1, "remove": 1}
    assert max(train["score"]) < 5 and set(filtered["score"]) == {5.0}
    assert not set(test["image_id"]) & {*train["image_id"], *filtered["image_id"]}
    for rows in splits.values():
        assert set(rows["schema_version"]) == {1} and set(rows["license"]) == {"cc0-1.0"}
        for row in rows:
            assert row["image"].size == (row["width"], row["height"]) == row["edit"].size
            assert row["scorer_prompt"] == f"hp-edit-trl:{row['task']}:3"
            assert row["writer_prompt"] == f"hp-edit-trl:instructions/{row['task']}:1"
    ids = [case_id for rows in splits.values() for case_id in rows["id"]]
    assert len(set(ids)) == len(ids)
    # What was rejected is there with its reason, and nothing is lost.
    rejected = pq.read_table(whole.parent / "rejected.parquet").to_pylist()
    sources = json.loads((whole.parent / "sources" / "manifest.json").read_text())
    assert sources["rows"] == SCENES + 4 + 4 and len(ids) + len(rejected) == sources["rows"]
    reasons = {(row["stage"], row["reason"].partition(":")[0], row["file"]) for row in rejected}
    assert {("sources", "unreadable", "cut-off.png"), ("sources", "too small", "dot.png")} <= reasons
    assert ("duplicates", "duplicate", "the-same-cat.png") in reasons
    assert ("duplicates", "near duplicate", "smaller-coffee.jpg") in reasons
    card = (whole / "README.md").read_text()
    assert "| sources | too small | 1 |" in card and "| scikit-image | cc0-1.0 |" in card


def test_the_benchmark_has_what_people_accepted_and_its_reserve_replaces_the_rest(pictures, whole, tmp_path, caplog):
    shutil.copytree(whole.parent, tmp_path / "build")
    candidates = {name: load_realpref(str(tmp_path / "build" / "candidates"), name) for name in ("test", "reserve")}
    first = {row["task"]: row for row in candidates["test"]}
    second = {row["task"]: row for row in candidates["reserve"]}
    assert first.keys() == second.keys() == {"add", "remove"} and "edit" not in candidates["test"].features
    unverified = load_realpref(str(whole), "test")
    assert {row["task"]: row["id"] for row in unverified} == {task: row["id"] for task, row in first.items()}
    assert "No person has verified the cases of `test`." in (whole / "README.md").read_text()
    hidden = {row["image_id"] for row in candidates["reserve"]}
    assert not hidden & {id_ for name in ("train", "filtered") for id_ in load_realpref(str(whole), name)["image_id"]}

    def review(name, row, verdict, prompt=None, **more):
        one = Review(name, row["id"], prompt or row["prompt"], verdict, "g:1", "2026-01-01T00:00:00+00:00", **more)
        append_answer(tmp_path / "reviews" / f"reviews-{name}.jsonl", one)

    (tmp_path / "reviews").mkdir()
    review("anna", first["add"], "reject", reason="unclear")
    review("ben", first["add"], "accept")
    review("anna", first["remove"], "accept", prompt="Another instruction")  # which it had before
    options = {"verified": str(tmp_path / "reviews"), "editor": Moody()}
    with pytest.raises(ValueError, match="not verified yet: add lacks 1 cases.*remove lacks 1 cases.*--split reserve"):
        build(pictures, tmp_path / "build", **options)
    assert "1 of 3 reviews" in caplog.text and digests(tmp_path / "build" / "dataset") == digests(whole)
    assert options["editor"].calls == 0  # people can go on while edits are there

    wanted = {"corrected_prompt": "Remove the largest thing", "corrected_requirement": ""}
    review("ben", first["remove"], "correct", **wanted)
    review("anna", second["add"], "accept")
    folder = build(pictures, tmp_path / "build", **options)
    assert options["editor"].calls == 1  # of the corrected case alone
    test = {row["task"]: row for row in load_realpref(str(folder), "test")}
    assert test.keys() == {"add", "remove"} and test["add"]["id"] == second["add"]["id"]
    row = test["remove"]
    assert (row["prompt"], row["requirement"]) == ("Remove the largest thing", None)
    assert row["id"] == case_id(row["image_id"], "remove", row["prompt"]) != first["remove"]["id"]
    assert row["image_id"] == first["remove"]["image_id"] and row["writer"].endswith(", corrected by people")
    assert row["score"] is not None and row["edit"].size == row["image"].size
    for name in ("train", "filtered"):  # the rest is as it was
        assert load_realpref(str(folder), name)["id"] == load_realpref(str(whole), name)["id"]
    card = (folder / "README.md").read_text()
    assert "All 2 cases of `test` were verified by people" in card and "to 1 of 2 people" in card
    for line in (
        "| accepted as it was | 1 |", "| instruction or requirement corrected | 1 |", "| rejected | 1 |",
        "| rejected as: unclear | 1 |", "| export | rejected by people | 1 |", "| export | not verified | 1 |",
    ):  # fmt: skip
        assert line in card, line
    build(pictures, tmp_path / "build", **options)
    assert options["editor"].calls == 1

    # All candidates of a task are rejected: there is no more to do, and it is said.
    review("anna", second["add"], "reject", reason="other", comment="odd")
    folder = build(pictures, tmp_path / "build", **options)
    assert set(load_realpref(str(folder), "test")["task"]) == {"remove"}
    assert "has 0 of 1 cases of the task 'add', because its reserve is exhausted" in caplog.text


def test_stopped_and_run_again_it_ends_with_the_same_bytes(pictures, whole, tmp_path, caplog):
    for stop_at in (2, 10):  # in the first round, and in the second one
        with pytest.raises(KeyboardInterrupt):
            build(pictures, tmp_path / "build", Moody(stop_at))
    assert list((tmp_path / "build" / "round-2" / "edits").glob("*.parquet"))
    editor = Moody()
    folder = build(pictures, tmp_path / "build", editor)
    batches = len(list((tmp_path / "build").glob("**/edits/*.parquet")))
    assert editor.calls == batches - 1 - 9  # what was there before was not made again
    assert digests(tmp_path / "build") == digests(whole.parent)
    # The images are used up: it is said, in the log and on the card.
    got = Counter(load_realpref(str(folder), "train")["task"])
    assert 0 < got["add"] < 10 and f"fewer cases for training than task_counts asks for: add {got['add']} of 10, " in (
        caplog.text
    )
    assert "No images are left for the tasks ['add', " in caplog.text
    assert f"| add | 10 | {got['add']} |" in (folder / "README.md").read_text()
    # Stopped between the rounds, and the second one made in parts, as if on several machines
    for name in ("round-2", "dataset"):
        shutil.rmtree(tmp_path / "build" / name)
    for stages in ("edits,scores", "plan,instructions,split", "edits,scores", "filter,export"):
        build(pictures, tmp_path / "build", stages=stages.split(","))
        parts = {path.name for path in tmp_path.glob("build/round-2/*")}
        assert ("edits" in parts) == ("filter" in parts or stages == "edits,scores" and "plan" in parts)
    assert digests(tmp_path / "build") == digests(whole.parent)


def test_rounds_end_when_each_task_has_its_count_and_keep_what_earlier_ones_made(pictures, whole, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "build"
    shutil.copytree(whole.parent, folder, ignore=shutil.ignore_patterns("round-2", "dataset"))
    options = {"prices": {"edit": 0.5, "prompt": 0.25}}
    dataset = build(pictures, folder, task_counts=dict.fromkeys(TASKS, 1), **options)
    train = load_realpref(str(dataset), "train")
    assert Counter(train["task"]) == dict.fromkeys(TASKS, 1)
    assert "| color | 1 | 1 |" in (dataset / "README.md").read_text() and "fewer cases" not in caplog.text
    rejected = Counter(row["reason"] for row in pq.read_table(folder / "rejected.parquet").to_pylist())
    assert sum(count for reason, count in rejected.items() if reason.startswith("over the count: ")) > 0
    # With larger counts, more cases are made from the images that are left.
    before, made = digests(folder), {path.name for path in folder.iterdir() if (path / "manifest.json").exists()}
    build(pictures, folder, task_counts=dict.fromkeys(TASKS, 2), **options)
    more = load_realpref(str(dataset), "train")
    assert Counter(more["task"]) == dict.fromkeys(TASKS, 2) and set(train["id"]) < set(more["id"])
    after = digests(folder)
    assert made >= {"plan", "edits", "filter"}
    assert all(after[name] == digest for name, digest in before.items() if name.split("/")[0] in made)
    (table,) = [message for message in caplog.messages if message.startswith("Before round 2:")]
    assert re.search(r"color +\| 2 +\| \d +\| \d+.0% of \d+ +\| \d+ +\| 2", table), table
    edits, cases, cost = re.search(
        r": (\d+) edits.* prompts for (\d+) cases; .*per prompt: ([\d.]+)\.", table
    ).groups()
    assert int(edits) * 0.5 + int(cases) * 0.25 == float(cost)


def test_bokeh_from_pairs_and_styles_with_pictures(pictures, tmp_path):
    (tmp_path / "sharp").mkdir()
    (tmp_path / "blurred").mkdir()
    for file in sorted((pictures / "scenes").iterdir())[:4]:
        image = read_image(str(file), "A scene")
        image.save(tmp_path / "sharp" / file.name)
        image.filter(ImageFilter.GaussianBlur(1)).save(tmp_path / "blurred" / file.name)
    for style in ("sepia", "mosaic"):
        (tmp_path / "styles" / style).mkdir(parents=True)
        photo(40, 40).save(tmp_path / "styles" / style / "1.png")
    pairs = {"folder": str(tmp_path / "sharp"), "targets": str(tmp_path / "blurred"), "tasks": ["bokeh"]}
    options = {
        "sources": [pairs, {"folder": str(pictures / "scenes")}],
        "task_counts": {"bokeh": 9, "style": 6, "color": 1},
        "benchmark_counts": {"style": 1},
        "style_images": str(tmp_path / "styles"),
        "sample_size": 8,
    }
    folder = build(pictures, tmp_path / "build", Blank(), **options)
    rows = [row for name in ("train", "test") for row in load_realpref(str(folder), name)]
    bokeh = [row for row in rows if row["task"] == "bokeh"]
    assert 0 < len(bokeh) <= 4 and {row["source"] for row in bokeh} == {"sharp"}
    assert all(row["target"].size == row["image"].size and row["target"] != row["image"] for row in bokeh)
    assert all(row["target"] is None for row in rows if row["task"] != "bokeh")
    named = {row["style_image"] is not None for row in rows if re.search("sepia|mosaic", row["prompt"])}
    assert named == {True} and {row["style_image"] is None for row in rows if "negative" in row["prompt"]} <= {True}
    assert all(row["style_image"] is None for row in rows if row["task"] != "style")
    # Said before anything is read
    for changes, message in (
        ({"sources": [pairs]}, r"No source is for the tasks \['color', 'style'\]"),
        ({"style_images": str(pictures / "scenes")}, "is in no folder of a style"),
        (
            {"benchmark_counts": {"add": 1}},
            r"benchmark_counts asks for cases of \['add'\], which task_counts does not",
        ),
        ({"task_counts": {"bokeh": 3}, "benchmark_counts": {}}, "style_images=.* but task_counts has no 'style'"),
        ({"task_counts": {}}, "task_counts asks for no case"),
        ({"task_counts": {"bokhe": 3}}, "task_counts names 'bokhe', which is no task"),
        ({"sample_size": -1}, "sample_size=-1 must be an integer of at least 0"),
        ({"prices": [1]}, r"prices=\[1\] must be a mapping"),
        ({"task_counts": None}, "task_counts=None must be a mapping"),
        ({"prices": {"image": 1}}, "prices names 'image'; there are prices of"),
        ({"prices": {"edit": -1}}, "the price of 'edit' is -1, but must be a number of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            build(pictures, tmp_path / "other", Blank(), **{**options, **changes})
    assert not (tmp_path / "other" / "sources").exists()
    # All targets are of another shape
    for file in (tmp_path / "blurred").iterdir():
        photo(40, 90).save(file)
    with pytest.raises(ValueError, match=r"All images of the sources for the tasks \['bokeh'\] were rejected: read"):
        build(pictures, tmp_path / "other", Blank(), **options)


def build_code(pictures: Path, out: Path, **options) -> str:
    start = "from pathlib import Path\nfrom tests.data.builder.test_run import build\n"
    return start + f"build(Path({str(pictures)!r}), {str(out)!r}, **{options!r})\n"


@pytest.mark.slow
def test_ray_builds_the_same(pictures, whole, tmp_path):
    pytest.importorskip("ray")
    # Each stage on Ray starts processes of its own: all but the last two of the second round are taken over.
    out = tmp_path / "build"
    shutil.copytree(whole.parent, out)
    for name in ("round-2/scores", "round-2/filter", "dataset"):
        shutil.rmtree(out / name)
    code = build_code(pictures, out, engine="ray") + "import ray\nray.shutdown()"
    done = Script("-c", code, environment={"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}).wait()
    assert done.returncode == 0, done.stderr[-4000:]
    assert digests(out) == digests(whole.parent)


@pytest.mark.slow
def test_two_processes_build_the_same(pictures, whole, tmp_path):
    script, out = tmp_path / "ranks.py", tmp_path / "build"
    script.write_text(build_code(pictures, out))
    done = Script(script, environment={"ACCELERATE_USE_CPU": "true"}, processes=2).wait()
    assert done.returncode == 0, done.stderr[-4000:]
    assert digests(out) == digests(whole.parent)


def test_stages_alone_and_with_other_settings(pictures, whole, tmp_path):
    with pytest.raises(ValueError, match="stage 'sources' is not finished in .*: run it first"):
        build(pictures, tmp_path / "build", stages=["edits"])
    build(pictures, tmp_path / "build", stages=["sources", "duplicates"])
    assert sorted(path.name for path in (tmp_path / "build").iterdir() if path.is_dir()) == ["duplicates", "sources"]
    with pytest.raises(ValueError, match="stage 'category' is not finished"):
        build(pictures, tmp_path / "build", stages=["balance"])
    with pytest.raises(
        ValueError, match=r"stage 'sources' made with other settings \(min_side: 32 -> 33\): remove the folder"
    ):
        build(pictures, tmp_path / "build", min_side=33)
    with pytest.raises(ValueError, match=r"There are no stages \['edit'\]"):
        build(pictures, tmp_path / "build", stages=["edit"])
    # The filter can be changed without anything being edited or scored again.
    shutil.copytree(whole.parent, tmp_path / "copy")
    for name in ("filter", "round-2/filter"):
        shutil.rmtree(tmp_path / "copy" / name)
    editor = Moody()
    folder = build(pictures, tmp_path / "copy", editor, filter_rule="hardest", filter_threshold=0.3)
    assert editor.calls == 0
    assert len(load_realpref(str(folder))) < len(load_realpref(str(whole)))


def test_a_task_without_a_prompt_is_said_before_anything_is_read(pictures, tmp_path):
    shutil.copytree(ROOT / "prompts" / "instructions", tmp_path / "templates")
    (tmp_path / "templates" / "bokeh.md").unlink()
    with pytest.raises(ValueError, match="no instruction template for the task 'bokeh', which task_counts asks for"):
        build(pictures, tmp_path / "build", instruction_templates=str(tmp_path / "templates"))
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        build(pictures, tmp_path / "build", instruction_templates=str(tmp_path / "nowhere"))
    assert not (tmp_path / "build" / "sources").exists()


def test_a_second_builder_is_refused_before_it_reads_anything(pictures, tmp_path):
    with WorkFolder.locked(tmp_path / "build"):
        with pytest.raises(ValueError, match="Another builder is running"):
            build(pictures, tmp_path / "build")
    assert not (tmp_path / "build" / "sources").exists()


def test_everything_rejected_is_said(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"stage 'sources' rejected all of 56 rows \(\{'too small': 56\}\)"):
        build(pictures, tmp_path / "one", min_side=2000, resolution=None)
    with pytest.raises(ValueError, match="No case is left for training .*raise filter_threshold"):
        # Photographs that were left as they are: the stand-in for a judge finds nothing wrong with them.
        only = [{"folder": str(pictures / "photographs"), "license": "cc0-1.0"}]
        options = {"filter_threshold": 0.1, "benchmark_counts": {}, "sources": only, "task_counts": {"color": 3}}
        build(pictures, tmp_path / "two", Blank(), **options)


def test_prompts_of_a_later_round_that_have_all_been_there_are_no_fault(tmp_path):
    rejected = SimpleNamespace(
        path=tmp_path, has_begun=lambda name: False, live=[], stages=[SimpleNamespace(rows=range(50))]
    )
    work = _Build(None, {}, ["split", "instructions"], SimpleNamespace(is_main_process=True))
    work.run = lambda folder, stage: Counter({"rejected": 50})
    assert work._take(rejected, {"split": object}, is_first=False)
    with pytest.raises(ValueError, match="stage 'instructions' rejected all of 50 rows"):
        work._take(rejected, {"instructions": object}, is_first=False)


class Blank(Editor):
    identity = {"editor": "as it was", "revision": "1"}

    def __call__(self, references, prompts, ids, seeds):
        return [image for (image,) in references]


def test_the_defaults_are_the_papers():
    config = BuildConfig(sources=[], output_dir="x")
    assert config.task_counts == TASK_COUNTS and sum(TASK_COUNTS.values()) == 55795
    assert config.benchmark_counts == BENCHMARK_COUNTS and sum(BENCHMARK_COUNTS.values()) == 1638
    assert config.filter_threshold == 5 and config.filter_rule == "below"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("{edit: 3}", r"batch_sizes has unknown stages \['edit'\]"),
        ("{edits: 0}", "edits=0 must be an integer of at least 1"),
        ("{edits: 1.5}", r"batch_sizes must be of type dict\[str, int\], but is {'edits': 1.5}"),
    ],
)
def test_batch_sizes_that_are_not_valid(tmp_path, sizes, message):
    (tmp_path / "build.yaml").write_text(f"sources: []\noutput_dir: x\nbatch_sizes: {sizes}")
    with pytest.raises(ValueError, match=message):
        read_config(BuildConfig, tmp_path / "build.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"editor": "nobody/nothing"}, "neither a local file or folder nor in the cache"),
        ({"editor": "json:nothing"}, "nothing"),
        ({"editor": "json:dumps", "editor_options": {"lora": "x"}}, "lora: for pipelines only"),
        ({"editor": "json:dumps", "editor_options": {"policy": True}}, "policy: for pipelines only"),
        ({"editor_options": {"policy": True}}, "A policy needs a resolution above 0"),
        ({"editor_options": {"policy": True, "resolution": 64, "steps": 2}}, "takes only these editor_options: num_"),
        ({"editor": "json:dumps", "judge_base_url": "localhost"}, "judge_base_url='localhost' is not an address"),
        ({"editor": "json:dumps", "judge_base_url": "http://127.0.0.1:9", "score_mode": "x"}, "score_mode='x'"),
        ({"push_to_hub": "a/b/c"}, "push_to_hub='a/b/c' is no name of a repository"),
    ],
)
def test_editor_and_judge_are_checked_before_the_first_request(pictures, tmp_path, changes, message):
    with pytest.raises((ValueError, ConnectionError), match=message):
        build_dataset(make_config(pictures, tmp_path / "build", **changes), writer=simulated_writer())
    assert not (tmp_path / "build").exists()


def test_the_example_configuration_is_one():
    config = read_config(BuildConfig, ROOT / "examples" / "configs" / "build_realpref.yaml")
    assert config.editor == "Qwen/Qwen-Image-Edit-2509" and config.benchmark_counts == BENCHMARK_COUNTS


def test_the_command_with_models_behind_a_server_and_a_folder_of_edits(pictures, tmp_path, serve, capsys):  # noqa: F811
    def reply(body, number):
        text = body["messages"][0]["content"][0]["text"]
        if "is feasible only if" in text:
            return 200, completion('{"feasible": true, "reason": ""}')
        if "grade" in text:
            return 200, completion("4")
        return 200, completion(
            'Here: ```json\n{"instruction": "把杯子变成绿色", "object": "杯子", "color": "绿色"}\n```'
        )

    server = serve(reply)
    config = make_config(pictures, tmp_path / "build")
    options = {
        **{name: getattr(config, name) for name in ("output_dir", "min_side", "clip_model", "sources")},
        **{"writer_base_url": server.url, "judge_base_url": [server.url, serve(reply).url]},
        **{"languages": {"zh": 1}, "max_repeats": 8},
        **{"task_counts": {"color": 12}, "benchmark_counts": {}, "editor": str(tmp_path / "edits"), "max_images": 12},
    }
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(options))
    command = ["build-dataset", "--config", str(tmp_path / "build.yaml")]
    main([*command, "--stages", "sources,duplicates,category,balance,plan,instructions,split"])
    rows = [
        row
        for file in (tmp_path / "build" / "instructions").glob("*.parquet")
        for row in pq.read_table(file).to_pylist()
    ]
    (tmp_path / "edits").mkdir()
    for row in rows[:7]:
        photo(32, 32).save(tmp_path / "edits" / f"{row['id']}.png")
    main(command)
    dataset = load_realpref(str(tmp_path / "build" / "dataset"))
    assert 0 < len(dataset) <= 7 and set(dataset["score"]) == {4.0} and set(dataset["language"]) == {"zh"}
    assert set(dataset["prompt"]) == {"把杯子变成绿色"} and set(dataset["editor"]) == {"edits"}
    asked = len(server.requests)
    main(command)  # nothing is left to do but the servers' trials
    assert len(server.requests) == asked
    capsys.readouterr()
    main(["check-dataset", str(tmp_path / "build" / "dataset")])
    assert f"{len(dataset)} rows in order" in capsys.readouterr().out
    rejected = Counter(row["reason"] for row in pq.read_table(tmp_path / "build" / "rejected.parquet").to_pylist())
    assert rejected["no edit"] == 8 - len(dataset)


def test_a_model_that_writes_rubbish_is_said_in_one_line(pictures, tmp_path):
    config = make_config(pictures, tmp_path / "build")
    options = {
        name: getattr(config, name) for name in ("output_dir", "min_side", "clip_model", "sources", "resolution")
    }
    writer = tiny_judge(str(tmp_path / "writer"))
    (tmp_path / "edits").mkdir()
    photo(32, 32).save(tmp_path / "edits" / "one.png")
    options |= {"writer": writer, "judge": writer, "editor": str(tmp_path / "edits")}
    options |= {"benchmark_counts": {}, "max_images": 4}
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(options))
    with pytest.raises(SystemExit, match=r"hp-edit: The stage 'instructions' rejected all of 4 rows \(\{'"):
        main(["build-dataset", "--config", str(tmp_path / "build.yaml")])
