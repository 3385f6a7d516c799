"""Streams: cut into buffers, shuffled by themselves, checked when they are read, resumed in the middle of one."""

import io
import json
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, Value, load_dataset
from peft import LoraConfig
from PIL import Image as PILImage
from trl.trainer.utils import RepeatSampler

from hp_edit_trl import FlowGRPOEditConfig, FlowGRPOEditTrainer, FlowNFTEditConfig, FlowNFTEditTrainer
from hp_edit_trl.cases import BadCaseError, check_cases, leave_out
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.trainer.base_edit_trainer import EpochRepeatSampler
from hp_edit_trl.trainer.streamed_cases import STREAM, StreamedCases, restore_stream
from hp_edit_trl.utils.seeding import seeded_generator
from tests.helpers import END, make_cases, make_config, photo, redness
from tests.processes import Script


ALONE = SimpleNamespace(num_processes=1)


def options(**changes):
    """Of a run with two cases in a generation batch."""
    given = dict(
        generation_batch_size=8, num_generations=4, steps_per_generation=2, gradient_accumulation_steps=2,
        num_iterations=1, max_steps=50, seed=0, shuffle_dataset=True, shuffle_buffer_size=4, on_bad_case="error",
        num_sample_edits=2,
    )  # fmt: skip
    return SimpleNamespace(**{**given, **changes})


def begin(stream, columns=None, **changes):
    args = options(**changes)

    def usable(rows, name):
        return leave_out(rows, check_cases(rows, name, args.on_bad_case))

    cases = StreamedCases(stream, args, columns)
    cases.start(usable(cases.rows, "train_dataset"), usable)
    return cases


def read(cases, batches):
    """Ids of the cases of generation batches."""
    ids = []
    for generation in batches:
        cases.reach(generation, ALONE)
        ids += [cases[number]["id"] for number in range(2 * generation, 2 * generation + 2)]
    return ids


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Ten cases in three Parquet files."""
    folder = tmp_path_factory.mktemp("stream")
    for shard, rows in enumerate((range(3), range(3, 6), range(6, 10))):
        make_cases(10, sizes=((16, 16),)).select(rows).to_parquet(folder / f"{shard}.parquet")
    return str(folder / "*.parquet")


def parquet(files):
    return load_dataset("parquet", data_files=files, split="train", streaming=True)


def rows_of(cases):
    def rows():
        yield from cases

    return IterableDataset.from_generator(rows)


# Each makes a stream of the same ten cases
SOURCES = {
    "parquet": parquet,
    "mapped": lambda files: parquet(files).map(lambda row: {"prompt": row["prompt"] + "!"}),
    "filtered": lambda files: parquet(files).filter(lambda row: True),
    "generator": lambda files: rows_of(make_cases(10, sizes=((16, 16),))),
    "as tensors": lambda files: make_cases(10, sizes=((16, 16),)).to_iterable_dataset().with_format("torch"),
    "shuffled": lambda files: rows_of(make_cases(10, sizes=((16, 16),))).shuffle(
        seed=1, buffer_size=5, max_buffer_input_shards=1
    ),
}


def test_the_order_is_that_of_permuted_buffers(files):
    ids = read(begin(parquet(files)), range(10))  # two epochs
    expected = []
    for epoch in range(2):
        for place, rows in enumerate(([0, 1, 2, 3], [4, 5, 6, 7], [8, 9])):
            order = torch.randperm(len(rows), generator=seeded_generator(0, "stream", epoch, place))
            expected += [f"case-{rows[i]}" for i in order]
    assert ids == expected and ids[:10] != ids[10:]
    assert read(begin(parquet(files), shuffle_dataset=False), range(10)) == 2 * make_cases(10)["id"][:]
    assert read(begin(parquet(files), seed=1), range(5)) != ids[:10]


def test_the_numbers_of_an_endless_run_are_not_listed():
    given = dict(mini_repeat_count=2, batch_size=3, repeat_count=2, shuffle=False)
    few, endless = (EpochRepeatSampler(range(n), epoch=int, **given) for n in (7, 10**15))
    assert list(few) == list(RepeatSampler(range(7), **given)) == list(islice(endless, len(few)))


@pytest.mark.parametrize("source", SOURCES)
def test_any_stream_resumes_where_it_was(files, source, caplog):
    through = begin(SOURCES[source](files))
    states, ids = [], []
    for generation in range(9):
        ids += read(through, [generation])
        states.append(json.loads(json.dumps(through.state_dict())))
        assert len(through._buffers) <= 2
        assert through.num_seen == min(2 * generation + 2, 10)
    assert sorted(ids[:10]) == make_cases(10)["id"][:] and len(set(ids[10:])) == 8
    for generation in (2, 3, 5):  # inside a buffer, between two, and in the second epoch
        resumed = begin(SOURCES[source](files))
        resumed.load_state_dict(states[generation])
        assert read(resumed, range(generation + 1, 9)) == ids[2 * generation + 2 :], generation
        assert resumed.num_seen == through.num_seen == 10
    # Only the buffer of a shuffle() is not part of a stream's state.
    assert ("does not find its place by its state" in caplog.text) == (source == "shuffled")


def test_a_resumed_stream_reads_nothing_again(files, monkeypatch):
    through = begin(parquet(files))
    read(through, range(4))
    state, resumed = through.state_dict(), begin(parquet(files))
    rows = []
    add = resumed._add
    monkeypatch.setattr(resumed, "_add", lambda *given: (rows.extend(given[0]["id"]), add(*given)))
    resumed.load_state_dict(state)
    read(resumed, [4])
    assert rows == [f"case-{i}" for i in range(4, 10)]


def test_another_stream_or_setting_is_refused(files, tmp_path):
    through = begin(parquet(files))
    read(through, range(3))
    state = through.state_dict()
    (tmp_path / STREAM).write_text(json.dumps(state))
    for name, value in {"seed": 1, "shuffle_dataset": False, "shuffle_buffer_size": 5}.items():
        with pytest.raises(ValueError, match=f"saved with {name}=.*but this run has {name}={value}"):
            restore_stream(begin(parquet(files), **{name: value}), str(tmp_path))
    others = make_cases(10, sizes=((24, 16),))  # other pictures for the same texts
    for other in (others.to_iterable_dataset(), parquet(files).skip(1), parquet(files).take(4)):
        with pytest.raises(
            ValueError, match="gives other rows than in the run of the checkpoint, from row 4 of epoch 1"
        ):
            restore_stream(begin(other), str(tmp_path))
    with pytest.raises(ValueError, match="saved by a run on a stream, but train_dataset is none"):
        restore_stream(make_cases(10), str(tmp_path))


def test_a_run_may_begin_again_and_batches_may_change(files):
    cases = begin(parquet(files))
    ids = read(cases, range(8))
    assert read(cases, range(8)) == ids
    state = cases.state_dict()
    cases.close()
    assert not cases._buffers and cases.num_seen == 10 and read(cases, range(8)) == ids
    larger = begin(parquet(files), generation_batch_size=16)
    larger.load_state_dict(state)
    larger.reach(2, ALONE)  # four cases each: those of batches 4 and 5
    assert [larger[number]["id"] for number in range(8, 12)] == ids[8:12]


def test_the_end_of_the_run(files):
    cases = begin(parquet(files), max_steps=4)
    assert len(cases) == 8
    ids = read(cases, range(4))
    # In place of a bad case at the very end, the next of the stream
    assert [cases[number % len(cases)]["id"] for number in (7, 8, 9)][0] == ids[7]
    assert {cases[0]["id"], cases[1]["id"], *ids} == set(make_cases(10)["id"][:])


def test_ids_columns_and_pictures(files):
    plain = make_cases(10, sizes=((16, 16),)).remove_columns("id")
    cases = begin(plain.to_iterable_dataset(), columns={"id", "prompt", "image"}, shuffle_dataset=False)
    assert read(cases, range(11)) == list(range(22))  # running numbers
    assert set(cases.features) == {"id", "prompt", "image"} and set(cases.first_cases[0]) == set(cases.features)
    assert cases.first_cases["id"][:] == [0, 1]
    assert len(begin(parquet(files), num_sample_edits=0).first_cases) == 0
    # Pictures that a stream has decoded are not compressed again.
    rough = PILImage.effect_noise((32, 32), 80).convert("RGB")
    content = io.BytesIO()
    rough.save(content, "JPEG")
    shown = PILImage.open(io.BytesIO(content.getvalue()))
    data = [{"id": str(i), "prompt": "Edit", "image": {"bytes": content.getvalue(), "path": None}} for i in range(4)]
    features = Features({"id": Value("string"), "prompt": Value("string"), "image": Image()})
    stream = Dataset.from_list(data, features=features).to_iterable_dataset()
    for given in (stream, stream.filter(lambda row: True), stream.map(lambda row: {"task": "add"})):
        cases = begin(given)
        cases.reach(0, ALONE)
        encoded = cases[0]["image"]["bytes"]
        assert PILImage.open(io.BytesIO(encoded)).tobytes() == shown.tobytes()
        assert (encoded == content.getvalue()) == (given is stream)


def spoiled(bad, count=10, size=(16, 16)):
    """A stream with cases that have no prompt."""
    return Dataset.from_list(
        [{**row, "prompt": "" if i in bad else row["prompt"]} for i, row in enumerate(make_cases(count, (size,)))]
    ).to_iterable_dataset()


def test_bad_cases_are_left_out_where_they_are_read(files, caplog):
    cases = begin(spoiled({1, 8, 9}), on_bad_case="skip", shuffle_dataset=False)
    usable = [f"case-{i}" for i in (0, 2, 3, 4, 5, 6, 7)]
    assert read(cases, range(7)) == 2 * usable  # without the last buffer, in which all are bad
    assert "No case of rows 8 to 9 of train_dataset can be used" in caplog.text
    assert (cases.num_left_out, cases.num_seen) == (3, 7)
    state, resumed = cases.state_dict(), begin(spoiled({1, 8, 9}), on_bad_case="skip", shuffle_dataset=False)
    resumed.load_state_dict(state)
    assert (resumed.num_left_out, resumed.num_seen) == (3, 7) and read(resumed, [7]) == usable[:2]

    cases, resumed = (begin(spoiled({1, 6}, 12), on_bad_case="skip") for _ in range(2))
    read(cases, range(2))  # the second batch lies in two buffers
    resumed.load_state_dict(cases.state_dict())
    assert resumed.num_left_out == cases.num_left_out == 2
    cases = begin(spoiled({5}))
    cases.reach(0, ALONE)
    with pytest.raises(
        BadCaseError, match="1 of 4 cases of rows 4 to 7 of train_dataset .*'case-5' has an empty prompt"
    ):
        read(cases, range(1, 4))
    twice = make_cases(8, ((16, 16),)).remove_columns("id").add_column("id", list("abcdeffg"))
    with pytest.raises(ValueError, match="Row 2 of rows 4 to 7 of train_dataset has the id 'f' of row 1"):
        read(begin(twice.to_iterable_dataset()), range(4))

    def none(rows, name):
        raise BadCaseError(f"No case of {name} can be used.")

    cases = StreamedCases(parquet(files), options(on_bad_case="skip"))
    cases.start(cases.rows, none)
    with pytest.raises(BadCaseError, match="No case of train_dataset can be used"):
        read(cases, range(3))


def test_streams_that_cannot_be_read(caplog):
    with pytest.raises(ValueError, match="train_dataset is a stream, whose length is not known: set max_steps"):
        begin(make_cases(3).to_iterable_dataset(), max_steps=-1)
    with pytest.raises(ValueError, match="shuffle_buffer_size=1 is too small for a stream: .*has 2 cases"):
        begin(make_cases(3).to_iterable_dataset(), shuffle_buffer_size=1)

    def empty():
        return
        yield

    def breaks():
        yield from make_cases(6)
        raise error

    def changes():
        yield from [{**row, "task": None} for row in make_cases(4)]
        yield {**make_cases(1)[0], "task": {"name": "add"}}

    with pytest.raises(ValueError, match="train_dataset is empty"):
        begin(IterableDataset.from_generator(empty))
    with pytest.raises(ValueError, match="has no column 'prompt'"):
        begin(IterableDataset.from_generator(lambda: iter([{"text": "a"}])))
    for error in (ConnectionError("gone"), KeyError("x")):
        kind = OSError if isinstance(error, OSError) else ValueError
        with pytest.raises(kind, match=f"Row 6 of train_dataset cannot be read: {type(error).__name__}.*resume_from_"):
            read(begin(IterableDataset.from_generator(breaks)), range(4))
        with pytest.raises(kind, match="The first rows of train_dataset .from 6 on. cannot be read"):
            begin(IterableDataset.from_generator(breaks), shuffle_buffer_size=8)
    with pytest.raises(ValueError, match=r"train_dataset cannot be read: .*stream.cast\(features\)"):
        read(begin(IterableDataset.from_generator(changes)), range(4))


def test_a_state_that_json_cannot_hold(files, caplog):
    through = begin(parquet(files))
    ids = read(through, range(4))
    through._buffers[0].state["here"] = object()
    state = through.state_dict()
    assert state["stream"] is None
    resumed = begin(parquet(files))
    resumed.load_state_dict(state)
    assert "the 4 rows before are read again" in caplog.text
    assert read(resumed, [3]) == ids[6:8]


def make_trainer(folder, stream, kind=FlowGRPOEditTrainer, eval_dataset=None, **changes):
    """Of 5 updates, two for a generation batch of two cases."""
    online = {"sde_window_size": 1, "true_cfg_scale": 1.0} if kind is FlowGRPOEditTrainer else {"num_train_sigmas": 1}
    config = FlowGRPOEditConfig if kind is FlowGRPOEditTrainer else FlowNFTEditConfig
    given = dict(
        kind=config, gradient_accumulation_steps=1, steps_per_generation=2, num_generations=4,
        num_inference_steps=2, shuffle_buffer_size=4, num_sample_edits=1, max_steps=5,
    )  # fmt: skip
    args = make_config(folder, **{**given, **online, **changes})
    return kind(tiny_pipeline(), redness, args, stream, eval_dataset, peft_config=LoraConfig(r=4, lora_alpha=8))


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def test_a_resumed_run_has_the_same_bits(tmp_path):
    def stream():  # two bad cases of six; without ids
        return spoiled({1, 5}, 6, (64, 64)).remove_columns("id")

    trainers = [make_trainer(tmp_path, stream(), on_bad_case="skip", save_strategy="steps", save_steps=3)]
    trainers += [make_trainer(tmp_path / "again", stream(), on_bad_case="skip")]
    trainers[0].train()
    # In the middle of the second generation batch, which lies in the buffers of rows 0 to 3 and 4 to 5
    trainers[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(*map(weights, trainers))
    last, again = (trainer.state.log_history[-2] for trainer in trainers)
    assert all(last[name] == again[name] for name in ("step", "epoch", "loss", "bad_cases")) and last["bad_cases"] == 2
    trainers[1].save_model()
    card = (tmp_path / "again" / "README.md").read_text()
    assert "Trained on 4 cases." in card and "Make it red, number 0" in card  # the first case
    with pytest.raises(ValueError, match="saved by a run on a stream, but train_dataset is none"):
        make_trainer(tmp_path, make_cases(4)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    # A finished run is not read further.
    again = make_trainer(tmp_path, stream(), on_bad_case="skip")
    assert again.train(resume_from_checkpoint=True).global_step == 5 and again.num_train_cases == 4


def test_a_picture_that_cannot_be_decoded(tmp_path, caplog):
    whole = io.BytesIO()
    photo(64, 64).save(whole, "PNG")
    rows = [{"id": str(i), "prompt": "Edit", "image": {"bytes": whole.getvalue(), "path": None}} for i in range(4)]
    rows[3]["image"]["bytes"] = whole.getvalue()[:-40]  # its header is whole
    features = Features({"id": Value("string"), "prompt": Value("string"), "image": Image()})
    stream = Dataset.from_list(rows, features=features).to_iterable_dataset()
    few = dict(kind=FlowNFTEditTrainer, max_steps=3, shuffle_dataset=False, remove_unused_columns=True)
    trainer = make_trainer(tmp_path, stream, on_bad_case="skip", **few)
    trainer.train()
    assert "An image of case '3' cannot be decoded" in caplog.text
    assert {sample.case_id for sample in trainer._buffered_samples} == {"2", "0"}  # the next of the stream
    with pytest.raises(ValueError, match="An image of case '3' cannot be decoded.*on_bad_case='skip'"):
        make_trainer(tmp_path, stream, **few).train()


def test_bad_arguments_of_a_trainer(tmp_path):
    cases = make_cases(4)
    with pytest.raises(ValueError, match="train_dataset is a stream.*set max_steps"):
        make_trainer(tmp_path, cases.to_iterable_dataset(), max_steps=-1)
    with pytest.raises(ValueError, match="shuffle_buffer_size=0 must be at least 1"):
        make_trainer(tmp_path, cases, shuffle_buffer_size=0)
    with pytest.raises(ValueError, match="train_dataset has 1 usable cases, but one generation batch takes 2"):
        make_trainer(tmp_path, cases.to_iterable_dataset().take(1))
    with pytest.raises(TypeError, match="eval_dataset must be a datasets.Dataset, .*but is a IterableDataset"):
        make_trainer(tmp_path, cases, eval_dataset=cases.to_iterable_dataset())
    with pytest.raises(BadCaseError, match="1 of 3 cases of train_dataset cannot be used. Case 1 has an empty prompt"):
        make_trainer(tmp_path, spoiled({1}, 3).remove_columns("id"))


SCRIPT = """
import json, os, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from tests.helpers import make_cases
from tests.trainer.test_streamed_cases import make_trainer, rows_of

output, rank, cases = Path(sys.argv[1]), int(os.environ["RANK"]), make_cases(6, sizes=((64, 64),))
trainer = make_trainer(output, rows_of(cases), per_device_train_batch_size=2)
seen = []
generate = trainer._generate_and_score
trainer._generate_and_score = lambda *given: seen.append(generate(*given)) or seen[-1]
trainer.train()
try:
    make_trainer(output, rows_of(cases.select([0, 1, 2, 3, 4 + rank])), per_device_train_batch_size=2).train()
except ValueError as error:
    told = str(error)
ids = [sorted({sample.case_id for sample in batch}) for batch in seen]
(output / f"{rank}.json").write_text(json.dumps([ids, told]))
"""


def test_two_processes_share_one_numbering(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT + END)
    done = Script(tmp_path / "script.py", tmp_path, processes=2).wait()
    assert done.returncode == 0, done.stderr[-4000:]
    order = read(begin(make_cases(6).to_iterable_dataset(), seed=42), range(3))
    for rank in range(2):
        ids, told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert ids == [[order[2 * batch + rank]] for batch in range(3)]
        assert "have different data: rows 4 to 4 of train_dataset has 1 usable cases and 1" in told
