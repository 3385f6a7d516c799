"""Loading against the schema: what fits is cast, what does not is named by row and column."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, concatenate_datasets
from PIL import Image

from hp_edit_trl import FlowGRPOEditTrainer, HPScorerReward
from hp_edit_trl.calibration import score_dataset
from hp_edit_trl.cases import check_cases, check_edits
from hp_edit_trl.data import (
    CASE_FEATURES,
    EDIT_FEATURES,
    SCHEMA_VERSION,
    SCORE_FEATURES,
    check_realpref,
    load_realpref,
)
from hp_edit_trl.data.builder import export_dataset
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.rewards import load_scorer_prompts
from tests.data.builder.toy_build import encoded
from tests.fake_hub import fake_hub
from tests.helpers import RuleJudge, make_config, photo
from tests.processes import Script


ROOT = Path(__file__).parents[2]
FEATURES = Features({**CASE_FEATURES, **EDIT_FEATURES, **SCORE_FEATURES})


def make_rows(count: int = 5) -> dict[str, list]:
    texts = {name: ["text"] * count for name, feature in FEATURES.items() if feature == Value("string")}
    return {
        **texts,
        "schema_version": [SCHEMA_VERSION] * count,
        "id": [f"case-{i}" for i in range(count)],
        "image": [encoded(photo(64, 48, i)) for i in range(count)],
        "edit": [encoded(photo(64, 48, 100 + i)) for i in range(count)],
        "prompt": [f"Make it red, number {i}" for i in range(count)],
        "task": ["color"] * count,
        "requirement": [None] * count,
        "width": [64] * count,
        "height": [48] * count,
        "edit_seed": list(range(count)),
        "score": [float(i % 6) for i in range(count)],
    }


def make(**changes) -> Dataset:
    rows = {**make_rows(), **changes}
    features = Features({name: FEATURES[name] for name in rows if name not in changes or changes[name] is not None})
    return Dataset.from_dict({name: rows[name] for name in features}, features=features)


def save(dataset: Dataset, folder: Path) -> str:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return str(folder)


def test_what_fits_comes_back_as_it_is_and_can_be_used(tmp_path):
    folder = save(make(), tmp_path / "one")
    dataset = load_realpref(folder)
    assert dataset.features == FEATURES and dataset["id"] == make()["id"]
    # Nothing was copied: a cast would have made a file `cache-….arrow`.
    assert not any("cache-" in Path(file["filename"]).name for file in dataset.cache_files)
    assert np.array_equal(np.asarray(dataset[3]["image"]), np.asarray(photo(64, 48, 3)))
    check_cases(dataset, "cases")
    check_edits(dataset, "edits")
    scorer = HPScorerReward(RuleJudge())
    assert score_dataset(scorer, dataset, tmp_path / "scores.jsonl").judgements[0].score is not None
    config = make_config(tmp_path / "run", max_steps=1)
    trainer = FlowGRPOEditTrainer(tiny_pipeline(), scorer, args=config, train_dataset=dataset)
    assert trainer.train().global_step == 1


def test_a_stream_is_checked_as_it_passes(tmp_path):
    folder = save(make(), tmp_path / "good")
    stream = load_realpref(folder, streaming=True)
    assert isinstance(stream, IterableDataset) and stream.features == FEATURES
    rows = list(stream)
    assert [row["id"] for row in rows] == make()["id"] and isinstance(rows[0]["image"], Image.Image)
    assert list(stream)[2]["score"] == 2  # a second time
    bad = save(make(score=[1.0, 2.0, 5.5, 1.0, 7.0]), tmp_path / "bad")
    passing = iter(load_realpref(bad, streaming=True))
    assert next(passing)["id"] == "case-0" and next(passing)["id"] == "case-1"
    with pytest.raises(ValueError, match="Row 2 of .*bad, column 'score': 5.5 is not between 0 and 5"):
        next(passing)
    twice = save(make(id=["a", "b", "a", "c", "d"], editor=None), tmp_path / "twice")
    with pytest.raises(ValueError, match="Row 2 of .*column 'id': row 0 has 'a', too"):
        list(load_realpref(twice, streaming=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": [1.0, None, 5.1, 1.0, 1.0]}, "Row 2 of .*, column 'score': 5.1 is not between 0 and 5"),
        ({"score": [1.0, float("nan"), 1.0, 1.0, 1.0]}, "Row 1 of .*, column 'score': nan is not"),
        ({"score": [-1.0] * 5}, "Row 0 of .*, column 'score': -1 is not"),
        ({"prompt": ["a", "b", None, "d", "e"]}, "1 of 5 cases of .*Case 'case-2' has no prompt"),
        ({"prompt": ["a", "b", "c", "", "e"]}, "1 of 5 cases of .*Case 'case-3' has an empty prompt"),
        ({"task": [None] * 5}, "Row 0 of .*, column 'task': is empty"),
        ({"id": ["a", "b", "c", "", "d"]}, "Row 3 of .*, column 'id': is empty"),
        ({"id": ["a", "b", "c", "a", "d"]}, "Row 3 of .*, column 'id': row 0 has 'a', too, and the same editor"),
        ({"image": [None] * 5}, "No case of .*Case 'case-0' has no image"),
        ({"edit": [*make_rows()["edit"][:4], None]}, "1 of 5 cases of .*Case 'case-4' has no edit"),
        ({"prompt": ["a", " \n", "c", "d", "e"]}, "1 of 5 cases of .*Case 'case-1' has a blank prompt"),
        ({"width": [64, 0, 64, 64, 64]}, "Row 1 of .*, column 'width': 0 is not a number of pixels"),
        ({"schema_version": [1, 1, 2, 1, 1]},
            "Row 2 of .*'schema_version': 2 was written by a newer hp-edit-trl.*upgrade"),
        ({"schema_version": [1, None, 1, 1, 1]}, "Row 1 of .*'schema_version': None is not a version"),
        ({"schema_version": [0] * 5}, "Row 0 of .*'schema_version': 0 is not a version"),
        ({"image": None}, "has no column 'image'; its columns are"),
        ({"task": None, "id": None}, "has no column 'id', 'task'; its columns are"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_realpref(save(make(**changes), tmp_path / "bad"))


def test_one_case_by_several_editors(tmp_path):
    dataset = load_realpref(save(make(id=["a"] * 5, editor=list("vwxyz")), tmp_path / "five"))
    assert dataset["editor"] == list("vwxyz")


def test_columns_of_another_type_are_cast_or_named(tmp_path):
    path = tmp_path / "picture.png"
    photo(64, 48, 7).save(path)
    dataset = make(image=None, score=None).add_column("image", [str(path)] * 5).add_column("score", [3] * 5)
    dataset = dataset.cast_column("prompt", Value("large_string")).add_column("mine", list("abcde"))
    loaded = load_realpref(save(dataset, tmp_path / "cast"), image_root=str(tmp_path))
    assert {name: loaded.features[name] for name in FEATURES} == dict(FEATURES) and loaded["mine"] == list("abcde")
    assert loaded["score"] == [3.0] * 5 and loaded[4]["image"].size == (64, 48)
    wrong = make(score=None).add_column("score", ["three"] * 5)
    with pytest.raises(ValueError, match="column 'score' of .* must hold float32, but is .*string"):
        load_realpref(save(wrong, tmp_path / "wrong"))
    wrong = make(image=None).add_column("image", [1] * 5)
    with pytest.raises(ValueError, match="column 'image' of .* must hold images or their paths, but is .*int64"):
        load_realpref(save(wrong, tmp_path / "other"))
    wrong = make(prompt=None).add_column("prompt", [["several"]] * 5)
    with pytest.raises(ValueError, match="column 'prompt' of .* must hold string, but is"):
        load_realpref(save(wrong, tmp_path / "third"), streaming=True)


def test_nothing_is_copied_that_need_not_be(tmp_path):
    def copied(dataset):
        return [Path(entry["filename"]).name for entry in dataset.cache_files if "cache-" in entry["filename"]]

    assert not copied(load_realpref(save(make(), tmp_path / "fits")))
    assert not copied(load_realpref(save(make().select_columns(["id", "image", "prompt", "task"]), tmp_path / "old")))
    light = load_realpref(save(make(score=None).add_column("score", [3] * 5), tmp_path / "cast"))
    assert light.features == load_realpref(save(make(), tmp_path / "again")).features
    sizes = [Path(entry["filename"]).stat().st_size for entry in light.cache_files if "cache-" in entry["filename"]]
    assert sum(sizes) < 5000 < sum(len(image["bytes"]) for image in make_rows()["image"])
    assert light[4]["image"].size == (64, 48) and light["score"] == [3.0] * 5 and light.split == "train"


@pytest.mark.parametrize("streaming", [False, True])
def test_numbers_that_do_not_fit_are_named_by_row(tmp_path, streaming):
    wide = make(width=None).add_column("width", [64, 64, 2**40, 64, 64])
    with pytest.raises(ValueError, match=f"Row 2 of .*, column 'width': {2**40} is not a number of pixels"):
        list(load_realpref(save(wide, tmp_path / "wide"), streaming=streaming))
    seeds = make(edit_seed=None).add_column("edit_seed", np.array([0, 1, 2, 3, 2**63], np.uint64))
    with pytest.raises(ValueError, match=f"Row 4 of .*, column 'edit_seed': {2**63} does not fit"):
        list(load_realpref(save(seeds, tmp_path / "seeds"), streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("lacking", ["task", "score"])
def test_a_newer_schema_is_told_from_a_wrong_one(tmp_path, streaming, lacking):
    newer = make(schema_version=[SCHEMA_VERSION + 1] * 5, **{lacking: None})
    if lacking == "score":
        newer = newer.add_column("score", [["of", "another", "kind"]] * 5)
    with pytest.raises(ValueError, match="'schema_version': 2 was written by a newer hp-edit-trl.*upgrade"):
        load_realpref(save(newer, tmp_path / "newer"), streaming=streaming)


def test_broken_files_are_named(tmp_path):
    folder = Path(save(make(), tmp_path / "broken"))
    whole = folder / "data" / "train-00000-of-00001.parquet"
    (folder / "data" / "train-00001-of-00002.parquet").write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match="broken cannot be read: .*A file is broken or cut off"):
        load_realpref(str(folder))


@pytest.mark.parametrize("streaming", [False, True])
def test_targets_and_pictures_of_styles_are_images_where_there_are_some(tmp_path, streaming):
    pictures = [encoded(photo(64, 48, 7)), *[None] * 4]
    rows = make_rows(5) | {"target": pictures, "style_image": pictures[::-1]}
    export_dataset({"train": [rows]}, tmp_path / "set", wanted={"color": 5, "add": 2})
    loaded = load_realpref(str(tmp_path / "set"), streaming=streaming)
    found = [(row["target"] is not None, row["style_image"] is not None) for row in loaded]
    assert found == [(True, False), *[(False, False)] * 3, (False, True)]
    card = (tmp_path / "set" / "README.md").read_text()
    assert "| color | 5 | 5 |\n| add | 2 | 0 |\n| all | 7 | 5 |\n" in card


def test_a_stream_can_be_sent_to_another_process(tmp_path):
    stream = pickle.loads(pickle.dumps(load_realpref(save(make(), tmp_path / "set"), streaming=True)))
    assert [row["id"] for row in stream] == make()["id"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_from_before_the_schema_gets_what_it_lacks(tmp_path, caplog, streaming):
    old = make().select_columns(["id", "image", "prompt", "task", "edit"])
    loaded = load_realpref(save(old, tmp_path / "old"), streaming=streaming)
    assert "was written before there was a schema" in caplog.text or "has no column 'schema_version'" in caplog.text
    row = next(iter(loaded))
    assert set(row) == {*CASE_FEATURES, *EDIT_FEATURES} and row["schema_version"] == SCHEMA_VERSION
    assert row["license"] is None and row["id"] == "case-0"
    if not streaming:
        check_realpref(loaded, "migrated")
        new = load_realpref(save(make(**dict.fromkeys(SCORE_FEATURES)), tmp_path / "new"))
        both = concatenate_datasets([loaded.select([0]), new.select([1])])
        check_realpref(both, "both")


def test_saved_to_disk_and_splits(tmp_path):
    make().save_to_disk(tmp_path / "disk")
    assert len(load_realpref(str(tmp_path / "disk"))) == 5
    DatasetDict({"train": make(), "test": make().select([0])}).save_to_disk(tmp_path / "splits")
    assert len(load_realpref(str(tmp_path / "splits"), "test")) == 1
    assert len(list(load_realpref(str(tmp_path / "splits"), "test", streaming=True))) == 1
    for path in (str(tmp_path / "disk"), str(tmp_path / "splits"), save(make(), tmp_path / "parquet")):
        with pytest.raises(ValueError, match="validation"):
            load_realpref(path, "validation")
    with pytest.raises(FileNotFoundError, match="There is no file or folder .*nowhere"):
        load_realpref(str(tmp_path / "nowhere"))


PUSH = """
import sys
from huggingface_hub import HfApi
from hp_edit_trl.data.builder import push_dataset
for folder in sys.argv[1:3]:
    print(push_dataset(folder, "someone/realpref").rpartition("/")[2])
api = HfApi()
api.create_repo("prompts", repo_type="dataset")
print(api.upload_folder(folder_path=sys.argv[3], repo_id="someone/prompts", repo_type="dataset").oid)
"""
LOAD = """
import sys
import numpy as np
from hp_edit_trl.data import load_realpref
from hp_edit_trl.data.builder import load_instruction_templates
from hp_edit_trl.rewards import load_scorer_prompts
first, prompts, token, what = sys.argv[1:]
if what == "all":
    newest = load_realpref("someone/realpref", token=token or None)
    print("newest", len(newest), newest["prompt"][0])
    stream = load_realpref("someone/realpref", "test", first, streaming=True, token=token or None)
    print("stream", [row["id"] for row in stream])
    try:
        load_realpref("someone/realpref", revision="0" * 40, token=token or None)
    except FileNotFoundError as error:
        print("missing", error)
pinned = load_realpref("someone/realpref", revision=first, token=token or None)
print("pinned", len(pinned), pinned["prompt"][0], *(np.asarray(pinned[0][name]).sum() for name in ("image", "edit")))
scorer = load_scorer_prompts("datasets/someone/prompts", prompts)
writer = load_instruction_templates("datasets/someone/prompts", prompts)
print("prompts", len(scorer), scorer["add"].digest, scorer["add"].revision, len(writer), writer["bokeh"].revision)
"""


@pytest.mark.slow
def test_to_the_hub_and_back_private_pinned_streamed_and_offline(tmp_path):
    def batch(*rows, prefix=""):
        chosen = {name: [values[i] for i in rows] for name, values in make_rows().items()}
        return [{**chosen, "prompt": [prefix + prompt for prompt in chosen["prompt"]]}]

    export_dataset({"train": batch(0, 1, 2), "test": batch(3, 4)}, tmp_path / "first")
    export_dataset({"train": batch(0, 1, prefix="Now: "), "test": batch(3)}, tmp_path / "second")
    with fake_hub() as hub:

        def run(code, *args, **env):
            return Script("-c", code, *args, environment={**hub.env, **env}).wait()

        pushed = run(PUSH, tmp_path / "first", tmp_path / "second", ROOT / "prompts")
        assert pushed.returncode == 0, pushed.stderr
        first, _, prompts = pushed.stdout.split()
        assert hub.private == {"datasets/someone/realpref"}
        files = hub.files("someone/realpref", "dataset")
        names = {"data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"}
        assert {name for name in files if name.startswith("data/")} == names
        assert {"README.md", "figures/tasks_and_categories.png", "figures/scores.png"} <= files.keys()

        loaded = run(LOAD, first, prompts, "", "all")
        assert loaded.returncode == 0, loaded.stderr
        newest, stream, missing, *rest = loaded.stdout.splitlines()
        assert newest == "newest 2 Now: Make it red, number 0"
        assert stream == "stream ['case-3', 'case-4']"
        assert missing.startswith("missing There is no dataset 'someone/realpref' at revision '0000")
        pixels = [np.asarray(photo(64, 48, seed)).sum() for seed in (0, 100)]
        assert rest[0] == f"pinned 3 Make it red, number 0 {pixels[0]} {pixels[1]}"
        origin = f"datasets/someone/prompts@{prompts}"
        assert rest[1] == (
            f"prompts 9 {load_scorer_prompts()['add'].digest} {origin}:add:3 9 {origin}:instructions/bokeh:1"
        )
        # What is meant to be private does not go where everybody reads.
        hub.private.clear()
        exposed = run(PUSH, tmp_path / "first")
        assert "ValueError: someone/realpref is a public repository already" in exposed.stderr
        assert len(hub.commits("someone/realpref", "dataset")) == 3
        hub.private.add("datasets/someone/realpref")
        # Private: nothing without a token, all with one that is handed over
        nobody = {"HF_TOKEN": "", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HOME": str(tmp_path / "nobody")}
        refused = run(LOAD, first, prompts, "", "pinned", **nobody)
        last = refused.stderr.strip().splitlines()[-1]
        assert refused.returncode != 0 and last.startswith("FileNotFoundError: There is no dataset 'someone/realpref'")
        handed = run(LOAD, first, prompts, hub.env["HF_TOKEN"], "pinned", **nobody)
        assert handed.stdout.splitlines() == rest, handed.stderr
        # What was loaded once is there without the network.
        asked = len(hub.requests)
        offline = run(LOAD, first, prompts, "", "pinned", HF_HUB_OFFLINE="1")
        assert offline.stdout.splitlines() == rest, offline.stderr
        assert len(hub.requests) == asked
