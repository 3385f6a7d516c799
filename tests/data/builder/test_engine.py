"""The engine: whatever stops a build, it goes on where it was and ends with the same bytes."""

import hashlib
import os
import re
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator
from datasets import Features, Value

from hp_edit_trl.data.builder.engine import WorkFolder, run_stage
from tests.data.builder.toy_build import Numbers, Pictures, Slow, Twice, build
from tests.processes import ROOT, Script


def contents(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "build"
    return build(folder), contents(folder)


def test_rows_columns_and_rejected_rows(whole):
    folder, _ = whole
    kept = [i for i in range(100) if i % 10 != 3]
    files = [f"file-{i}" for i in kept for _ in range(2)][::-1]
    assert folder.live.tolist() == list(range(0, 180, 2))
    batch = folder.read(folder.live, ["text", "image", "file", "k"])
    assert list(batch) == ["text", "image", "file", "k"]
    assert batch["file"] == files[::2]
    assert batch["text"] == [f"text {files[k]} {k}" for k in range(0, 180, 2)]
    assert [value["bytes"] for value in batch["image"]] == [name.encode() * 100 for name in batch["file"]]
    # In any order, and twice
    some = np.array([150, 4, 150, 90])
    assert folder.read(some, ["file"])["file"] == [files[k] for k in some]
    assert folder.read(some[:0], ["file", "text"]) == {"file": [], "text": []}
    with pytest.raises(ValueError, match="no column 'nothing' yet; there are .*'text'"):
        folder.read(some, ["nothing"])
    rejected = list(folder.rejected())
    assert len(rejected) == 10 + 90
    assert rejected[0] == {"stage": "sources", "row": 3, "reason": "broken: file-3", "source": "toy", "file": "file-3"}
    assert rejected[-1] == {"stage": "slow", "row": 179, "reason": "odd", "source": "toy", "file": files[179]}


def test_an_image_is_written_once_and_read_alone(whole):
    folder, _ = whole
    assert [name for name in contents(folder.path) if "parquet" in name and "sources" in name] == [
        f"sources/{i:08d}.parquet" for i in range(13)
    ]
    for file in (folder.path / "sources").glob("*.parquet"):
        assert pq.ParquetFile(file).metadata.num_row_groups == pq.ParquetFile(file).metadata.num_rows
    for name in ("plan", "slow"):
        for file in (folder.path / name).glob("*.parquet"):
            assert "image" not in pq.read_schema(file).names


def test_a_finished_build_does_nothing(whole):
    folder, before = whole
    calls = Path(f"{folder.path}.calls")
    count = len(calls.read_text().split())
    build(folder.path)
    assert contents(folder.path) == before and len(calls.read_text().split()) == count == 26


def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path, whole):
    folder, signals = tmp_path / "build", (signal.SIGKILL, signal.SIGINT)
    done = 0
    for number, kill in enumerate(signals):
        run = Script(ROOT / "tests/data/builder/toy_build.py", folder, "local", 0.1)
        while done < 5 * (number + 1):
            time.sleep(0.02)
            assert run.ranks[0].is_alive(), run.printed("stderr")
            done = len(list((folder / "slow").glob("*.parquet")))
        run.kill(kill)
        run.wait()
    (folder / "slow" / "00000025.parquet.77.part").write_bytes(b"half a file")
    build(folder)
    assert contents(folder) == whole[1]
    calls = Path(f"{folder}.calls").read_text().split()
    assert len(set(calls)) == 26 and len(calls) <= 26 + len(signals)


def test_two_builders_in_one_folder_are_refused(tmp_path):
    folder = tmp_path / "build"
    message = re.escape(f"Another builder is running in {folder} (process {os.getpid()} on ")
    with WorkFolder.locked(folder):
        with pytest.raises(ValueError, match=message), WorkFolder.locked(folder):
            build(folder)
        assert not list(folder.glob("*/*"))
    with WorkFolder.locked(folder):  # free again
        pass


def test_a_full_disk_loses_nothing(tmp_path, whole):
    folder = tmp_path / "build"
    # A file may not be larger than the first eleven of the images' are; a limit of the system stands for the disk's.
    limit = (whole[0].path / "sources" / "00000000.parquet").stat().st_size + 20
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="cannot be written .*free space, run again"):
            build(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    written = contents(folder)
    assert 0 < len(written) < len(whole[1]) and not any(name.endswith(".part") for name in written)
    assert all(whole[1][name] == digest for name, digest in written.items() if name.endswith(".parquet"))
    build(folder)
    assert contents(folder) == whole[1]


def test_a_damaged_file_is_named_and_made_anew(tmp_path, whole):
    build(tmp_path / "build")
    file = tmp_path / "build" / "sources" / "00000002.parquet"
    good = file.read_bytes()
    place = good.index(b"file-16") if b"file-16" in good else 200
    file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    for old in (tmp_path / "build" / "slow").glob("*.parquet"):
        old.unlink()
    with pytest.raises(ValueError, match="00000002.parquet is .*damaged.*remove it and run again"):
        build(tmp_path / "build")
    file.unlink()
    build(tmp_path / "build")
    assert contents(tmp_path / "build") == whole[1]


def test_rows_made_otherwise_are_refused(tmp_path):
    folder = tmp_path / "build"
    build(folder)
    with pytest.raises(
        ValueError, match=r"stage 'slow' made with other settings \(word: 'text' -> 'other'\): remove the folder"
    ):
        build(folder, word="other")
    accelerator = Accelerator()
    with pytest.raises(ValueError, match="batch_size: 8 -> 9"):
        run_stage(WorkFolder(folder, Numbers()), Pictures(9), accelerator)
    # Without an earlier stage, or after another one, the later rows mean something else.
    changed = WorkFolder(folder, Numbers())
    run_stage(changed, Pictures(), accelerator)
    with pytest.raises(ValueError, match="the stages before it were made anew"):
        run_stage(changed, Slow(tmp_path / "calls"), accelerator)
    (folder / "plan" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="files without a readable manifest.json"):
        run_stage(changed, Twice(), accelerator)


class Asking(Pictures):
    """Asks a model about each file, which does not answer for some."""

    name = "asking"
    inputs = ("file",)
    features = Features({"answer": Value("string")})

    def __init__(self, silent=(), batch_size=8):
        super().__init__(batch_size)
        self.silent, self.asked, self.checked = silent, [], []

    def __call__(self, batch):
        self.asked += batch["file"]
        silent = [name in self.silent for name in batch["file"]]
        answers = [None if none else f"about {name}" for name, none in zip(batch["file"], silent, strict=True)]
        return {"answer": answers, "unanswered": silent, "reason": ["no answer" if none else None for none in silent]}

    def check(self, again):
        self.checked.append(again)


class Choice(Twice):
    name = "choice"
    inputs = ("answer",)
    features = Features({"number": Value("int64")})

    def __call__(self, batch):
        return {"number": [len(batch["answer"])] * len(batch["answer"]), "reason": [None] * len(batch["answer"])}


def test_rows_without_an_answer_are_asked_again_and_later_choices_are_made_again(tmp_path):
    accelerator = Accelerator()

    def run(silent=(), *later):
        folder, stage = WorkFolder(tmp_path / "build", Numbers()), Asking(silent)
        for one in (Pictures(), stage, *later):
            run_stage(folder, one, accelerator)
        return folder, stage

    own = tmp_path / "build" / "checkpoint-9" / "manifest.json"  # of something else
    own.parent.mkdir(parents=True)
    own.write_text('{"files": {}}')
    folder, first = run(("file-2", "file-50"), Choice())
    assert len(first.asked) == 90 and set(first.checked) == {False}
    assert folder.read(folder.live, ["number"])["number"] == [88] * 88
    folder, second = run(("file-50",), Choice())
    assert second.asked == ["file-2", "file-50"] and second.checked == [True, True]
    assert folder.read(folder.live, ["number"])["number"] == [89] * 89
    folder, third = run((), Choice())
    assert third.asked == ["file-50"] and own.exists()
    batch = folder.read(folder.live, ["answer", "file", "number"])
    assert batch["answer"] == [f"about {name}" for name in batch["file"]] and batch["number"] == [90] * 90
    before = contents(tmp_path / "build")
    assert run((), Choice())[1].asked == [] and contents(tmp_path / "build") == before
    # Not when a later stage has made something of the rows that is expensive
    for file in (tmp_path / "build").glob("[ac][sh]*/*"):
        file.unlink(missing_ok=True) if file != own else None
    run(("file-2",), Pictures2())
    assert run((), Pictures2())[1].asked == []


class Pictures2(Pictures):
    name = "second"

    def __call__(self, batch):
        return {**super().__call__(batch), "reason": [None] * len(batch["file"])}


class Wrong(Pictures):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def __call__(self, batch):
        return self.change(super().__call__(batch))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda done: {**done, "more": done["file"]}, "'sources' returned the columns .*'more'.*; expected are"),
        (lambda done: {k: v for k, v in done.items() if k != "reason"}, "expected are .*'reason'"),
        (lambda done: {**done, "file": done["file"][1:]}, r"was given 8 rows and returned \{'file': 7\}"),
    ],
)
def test_a_stage_that_returns_something_else(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run_stage(WorkFolder(tmp_path / "build", Numbers()), Wrong(change), Accelerator())
    assert not list((tmp_path / "build").glob("*/*.parquet"))
