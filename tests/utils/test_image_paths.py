import json
import zipfile

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image, List, load_dataset

from hp_edit_trl.bench import GEditBench
from hp_edit_trl.bench.gedit import parse_pair
from hp_edit_trl.cases import load_edits, load_split
from hp_edit_trl.cli import main
from hp_edit_trl.data import load_realpref
from hp_edit_trl.data.builder import Sources
from hp_edit_trl.scripts import DatasetArguments, load_cases
from hp_edit_trl.utils.image_paths import check_image_paths
from tests.fake_hub import fake_hub
from tests.helpers import RuleJudge, photo
from tests.processes import Script


REFUSED = "names .*, which is not a file of the dataset"


@pytest.fixture
def private(tmp_path):
    """A picture of the user that belongs to no dataset."""
    (tmp_path / "home").mkdir()
    file = tmp_path / "home" / "passport.png"
    photo(16, 16).save(file)
    return file


def write(folder, column, values, feature=None, **others):
    """A dataset as others publish it: a Parquet file with paths in it."""
    folder.mkdir(exist_ok=True)
    photo(16, 16, 1).save(folder / "own.png")
    dataset = Dataset.from_dict({"prompt": ["x"] * len(values), column: values, **others})
    dataset = dataset if feature is None else dataset.cast_column(column, feature)
    pq.write_table(dataset.data.table, folder / "data.parquet")
    return str(folder)


def attacks(private, folder):
    """What may be written in place of the picture."""
    (folder / "link").symlink_to(private.parent)
    return [
        str(private), f"{folder}/../home/passport.png", f"{folder}/link/passport.png",
        f"{folder}/./../home/passport.png",
        f"file://{private}", f"FILE://{private}", "http://127.0.0.1:9/a.png", "https://127.0.0.1:9/a.png",
        "hf://datasets/someone/else/a.png", "s3://bucket/a.png", f"zip://a.png::{private}",
        "zip://a.png::http://127.0.0.1:9/a.zip", "//127.0.0.1/share/a.png", "/etc/passwd", "/proc/self/environ",
        "../../../../etc/passwd", f"{folder}x/own.png", "data:image/png;base64,AAAA", f"{private}\0.png",
    ]  # fmt: skip


def test_only_files_of_the_dataset_are_named(tmp_path, private):
    folder = tmp_path / "set"
    own = f"{folder}/own.png"
    path = write(folder, "image", [own, own])
    assert load_split(path)["image"] == [own, own]
    for attack in attacks(private, folder):
        for feature in (None, Image()):
            if "\0" in attack and feature is not None:
                continue
            dataset = Dataset.from_dict({"prompt": ["x"] * 3, "image": [own, own, attack]})
            dataset = dataset if feature is None else dataset.cast_column("image", feature)
            with pytest.raises(ValueError, match=f"Row 2 of a/b: the column 'image' {REFUSED}"):
                check_image_paths(dataset, "a/b", [str(folder)], None)
    # Bytes are what is read; the path beside them is only a name.
    content = private.read_bytes()
    dataset = Dataset.from_dict({"image": [{"bytes": content, "path": str(private)}, None]}).cast_column(
        "image", Image()
    )
    assert check_image_paths(dataset, "a/b", [], None) is dataset


@pytest.mark.parametrize(
    ("column", "feature"),
    [("image", None), ("image", Image()), ("edit", None), ("chosen", Image()), ("rejected", None), ("target", Image()),
     ("images", None), ("images", List(Image())), ("mask", List(Image()))],
)  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_every_column_of_images_is_checked(tmp_path, private, column, feature, streaming):
    several = isinstance(feature, List) or column == "images"
    values = [[f"{tmp_path}/set/own.png"], [f"{tmp_path}/set/own.png", str(private)]] if several else None
    path = write(tmp_path / "set", column, values or [f"{tmp_path}/set/own.png", str(private)], feature)
    with pytest.raises(ValueError, match=f"Row 1 of .*set: the column '{column}' {REFUSED}"):
        list(load_split(path, streaming=streaming))
    assert len(list(load_split(path, image_root=str(private.parent), streaming=streaming))) == 2


def test_more_is_asked_for(tmp_path, private):
    path = write(tmp_path / "set", "image", [str(private)])
    for root in (str(private.parent), str(tmp_path), "/"):
        assert len(load_split(path, image_root=root)) == 1
    for root in (str(private.parent) + "x", str(tmp_path / "set"), "https://example.org"):
        with pytest.raises(ValueError, match=REFUSED):
            load_split(path, image_root=root)
    dataset = Dataset.from_dict({"image": ["https://example.org/photos/a.png"]})
    for root in ("https://example.org", "https://example.org/", "https://example.org/photos"):
        assert check_image_paths(dataset, "a/b", [], root) is dataset
    for root in (
        "https://example.or",
        "https://example.org/photo",
        "http://example.org",
        "/",
        "https://example.org.uk",
    ):
        with pytest.raises(ValueError, match=REFUSED):
            check_image_paths(dataset, "a/b", [], root)
    for address in ("https://example.org.evil.net/a.png", "https://example.org@evil.net/a.png",
                    "https://example.org/../a.png"):  # fmt: skip
        with pytest.raises(ValueError, match=REFUSED):
            check_image_paths(Dataset.from_dict({"image": [address]}), "a/b", [], "https://example.org")


def test_a_folder_of_images_is_a_dataset(tmp_path):
    (tmp_path / "set").mkdir()
    for i in range(2):
        photo(16, 16, i).save(tmp_path / "set" / f"{i}.png")
    lines = [{"file_name": f"{i}.png", "prompt": "x"} for i in range(2)]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for streaming in (False, True):
        rows = list(load_split(str(tmp_path / "set"), streaming=streaming))
        assert [row["image"].size for row in rows] == [(16, 16)] * 2
    dataset = load_dataset(str(tmp_path / "set"), split="train")  # what users load themselves is theirs
    assert len(dataset) == 2


def test_all_doors_refuse(tmp_path, private, capsys):
    columns = {"id": ["a"], "task": ["add"], "edit": [f"{tmp_path}/set/own.png"]}
    path = write(tmp_path / "set", "image", [str(private)], **columns)
    for load in (
        lambda: load_edits(path),
        lambda: load_realpref(path),
        lambda: load_cases(DatasetArguments(dataset_name=path), "train"),
        lambda: Sources([{"dataset": path, "image_column": "image"}]),
        lambda: Sources([{"parquet": f"{path}/*.parquet", "image_column": "image"}]),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            load()
    for command in (
        ["score", path], ["probe-judge", path], ["annotate", path], ["check-dataset", path],
        ["export-ratings", path, path, "--output_dir", f"{tmp_path}/out"],
        ["import-ratings", path, path, "--output_dir", f"{tmp_path}/out"],
        ["refine-prompt", path, "--ratings", path, "--output_dir", f"{tmp_path}/out"],
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=REFUSED):
            main(command)
    main(["check-dataset", path, "--image_root", str(private.parent)])
    assert "1 rows in order" in capsys.readouterr().out
    assert len(Sources([{"dataset": path, "image_column": "image", "image_root": str(private.parent)}])) == 1
    # A column of text that a build, or a benchmark, takes for images
    columns = {"key": ["a"], "task_type": ["b"], "instruction_language": ["en"], "Intersection_exist": [True]}
    path = write(tmp_path / "gedit", "input_image", [str(private)], instruction=["x"], **columns)
    with pytest.raises(ValueError, match=REFUSED):
        Sources([{"dataset": path, "image_column": "input_image"}])

    class Pairs(RuleJudge):
        identity = {"judge": "Pairs", "parse": "parse_pair"}

    assert parse_pair.__name__ == "parse_pair"
    with pytest.raises(ValueError, match=REFUSED):
        GEditBench(Pairs(), path).dataset  # noqa: B018
    assert len(GEditBench(Pairs(), path, image_root=str(private.parent)).dataset) == 1


ON_THE_HUB = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from hp_edit_trl.cases import load_split

for folder in ("pictures", "archive", "evil"):
    HfApi().create_repo(f"someone/{folder}", repo_type="dataset")
    HfApi().upload_folder(folder_path=Path(sys.argv[1], folder), repo_id=f"someone/{folder}", repo_type="dataset")
    for streaming in (False, True):
        try:
            print(folder, [row["image"].size for row in load_split(f"someone/{folder}", streaming=streaming)])
        except ValueError as error:
            print(folder, str(error)[:60])
"""


def test_files_of_a_repository_are_its_own(tmp_path, private):
    for folder in ("pictures", "archive", "evil"):
        (tmp_path / folder).mkdir()
    photo(16, 16).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "metadata.jsonl").write_text('{"file_name": "a.png", "prompt": "x"}\n')
    with zipfile.ZipFile(tmp_path / "archive" / "all.zip", "w") as archive:
        for file in (tmp_path / "pictures").iterdir():
            archive.write(file, file.name)
    (tmp_path / "evil" / "data.jsonl").write_text(json.dumps({"image": str(private), "prompt": "x"}))
    with fake_hub() as hub:
        done = Script("-c", ON_THE_HUB, tmp_path, environment=hub.env).wait()
    refused = f"Row 0 of someone/evil: the column 'image' names '{private}'"[:60]
    expected = ["pictures [(16, 16)]"] * 2 + ["archive [(16, 16)]"] * 2 + [f"evil {refused}"] * 2
    assert done.stdout.splitlines() == expected, done.stderr
