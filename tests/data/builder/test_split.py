"""Which cases become the benchmark, and which prompts occur too often."""

import random
from collections import Counter

import pytest

from hp_edit_trl import tasks
from hp_edit_trl.data.builder.rounds import Earlier
from hp_edit_trl.data.builder.split import Split, repeated_prompts


BENCHMARK_COUNTS = {task.name: task.realpref_bench for task in tasks.TASKS.values()}


TASKS = ("add", "remove", "style")


def rows(count: int = 240) -> dict[str, list]:
    """Two cases of each image, hashes far apart except for those of images 0 and 1, 6 bits from each other."""
    draw = random.Random(0)
    hashes = [draw.getrandbits(64) for _ in range(count // 2)]
    hashes[1] = hashes[0] ^ 0b111111
    return {
        "id": [f"{i:016x}" for i in range(count)],
        "task": [TASKS[i % 3] for i in range(count)],
        "category": [("cat", "dog", "cup", "car")[min(3, (i // 2) % 7)] for i in range(count)],
        "prompt": [f"Instruction number {i}" for i in range(count)],
        "image_id": [f"image-{i // 2}" for i in range(count)],
        "image_hash": [f"{hashes[i // 2]:016x}" for i in range(count)],
    }


def test_the_benchmark_has_what_was_asked_for_evenly_over_categories():
    batch = rows()
    done = Split({"add": 12, "remove": 8})(batch)
    assert done.keys() == {"split", "place", "reason"} and set(done["split"]) == {"train", "test", "reserve"}
    reserve = [i for i, split in enumerate(done["split"]) if split == "reserve"]
    assert Counter(batch["task"][i] for i in reserve) == {"add": 3, "remove": 2}
    assert sorted(done["place"][i] for i in reserve) == [8, 9, 12, 13, 14]
    # A larger reserve changes nothing in the benchmark; a task may have less than it asks for.
    more = Split({"add": 12, "remove": 8}, reserve=20)(batch)
    assert [one == "test" for one in more["split"]] == [one == "test" for one in done["split"]]
    assert Counter(batch["task"][i] for i, one in enumerate(more["split"]) if one == "reserve")["add"] == 68
    chosen = [i for i, split in enumerate(done["split"]) if split == "test"]
    assert Counter(batch["task"][i] for i in chosen) == {"add": 12, "remove": 8}
    assert all(done["reason"][i] is None for i in chosen)
    for task, count in (("add", 3), ("remove", 2)):
        assert set(Counter(batch["category"][i] for i in chosen if batch["task"][i] == task).values()) == {count}
    assert sum(BENCHMARK_COUNTS.values()) == 1638  # the paper's


def test_training_sees_no_image_of_the_benchmark_nor_one_that_looks_like_it():
    batch = rows()
    done = Split({"add": 12, "remove": 8}, max_distance=8)(batch)
    test = [i for i, split in enumerate(done["split"]) if split in ("test", "reserve")]
    train = [i for i, split in enumerate(done["split"]) if split == "train" and done["reason"][i] is None]
    assert not {batch["image_id"][i] for i in test} & {batch["image_id"][i] for i in train}
    for i in train:
        distances = [(int(batch["image_hash"][i], 16) ^ int(batch["image_hash"][j], 16)).bit_count() for j in test]
        assert min(distances) > 8
    dropped = [i for i in range(len(batch["id"])) if done["reason"][i] is not None]
    assert len(test) + len(train) + len(dropped) == len(batch["id"])
    assert {done["reason"][i].partition(":")[0] for i in dropped} <= {"in the benchmark", "near the benchmark"}


@pytest.mark.parametrize(("max_distance", "rejected"), [(5, False), (6, True)])
def test_the_distance_counts_bits(max_distance, rejected):
    batch = {name: values[:4] for name, values in rows().items()}
    batch["task"] = ["add", "remove", "remove", "remove"]  # the only "add" is of image 0
    done = Split({"add": 1}, max_distance=max_distance, reserve=0)(batch)
    assert done["split"][0] == "test" and done["reason"][1].startswith("in the benchmark: ")
    expected = "near the benchmark: 6 bits from its image image-0" if rejected else None
    assert done["reason"][2:] == [expected] * 2


def test_the_draw_depends_on_the_seed_and_not_on_the_order():
    batch = rows()
    order = list(range(len(batch["id"])))
    random.Random(1).shuffle(order)
    shuffled = {name: [values[i] for i in order] for name, values in batch.items()}
    done, other = Split({"add": 12})(batch), Split({"add": 12})(shuffled)
    assert [done["split"][i] for i in order] == other["split"]
    assert [done["reason"][i] for i in order] == other["reason"]
    assert Split({"add": 12}, seed=1)(batch)["split"] != done["split"]


class Before(Earlier):
    """An earlier round, told directly."""

    def __init__(self, batch, done):
        self.rounds = [None]
        self.prompts = list(zip(batch["task"], batch["prompt"], strict=True))
        chosen = [i for i, place in enumerate(done["place"]) if place is not None]
        self.benchmark = {batch["image_id"][i]: int(batch["image_hash"][i], 16) for i in chosen}


def test_later_rounds_draw_no_benchmark_and_stay_away_from_it():
    batch = rows()
    batch["prompt"] = ["Remove the cup" if i % 24 == 1 else prompt for i, prompt in enumerate(batch["prompt"])]
    first = {name: values[:60] for name, values in batch.items()}
    later = {name: values[60:] for name, values in batch.items()}
    done = Split({"add": 12, "remove": 8}, max_repeats=4)(first)
    near = int(first["image_hash"][done["place"].index(0)], 16) ^ 0b111
    later["image_hash"] = [f"{near:016x}", *later["image_hash"][1:]]
    later["image_id"] = [later["image_id"][0], first["image_id"][done["place"].index(1)], *later["image_id"][2:]]
    after = Split({"add": 12, "remove": 8}, max_repeats=4, earlier=Before(first, done))(later)
    assert set(after["split"]) == {"train"} and set(after["place"]) == {None}
    assert after["reason"][0].startswith("near the benchmark: 3 bits") and "in the benchmark" in after["reason"][1]
    # Three of the first rows have the prompt, so one more may have it.
    same = [i for i, prompt in enumerate(later["prompt"]) if prompt == "Remove the cup"]
    assert [after["reason"][i] is None for i in same] == [True] + [False] * (len(same) - 1) and len(same) == 7


def test_prompts_that_are_repeated_too_often_are_in_neither():
    batch = rows()
    batch["prompt"] = ["Remove the cup!" if i % 3 == 1 else prompt for i, prompt in enumerate(batch["prompt"])]
    done = Split({}, max_repeats=5)(batch)
    kept = [i for i in range(240) if i % 3 == 1 and done["reason"][i] is None]
    assert kept == [i for i in range(240) if i % 3 == 1][:5]
    assert all(done["reason"][i] is None for i in range(240) if i % 3 != 1)


def test_a_benchmark_larger_than_what_there_is():
    with pytest.raises(
        ValueError, match="asks for 81 cases of the task 'add', but there are 80: .*set benchmark_counts"
    ):
        Split({"add": 81})(rows())
    with pytest.raises(ValueError, match="asks for 232 cases|asks for 191 cases"):
        Split()(rows())
    with pytest.raises(ValueError, match="benchmark_counts=.* must be integers"):
        Split({"add": -1})
    for reserve in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="benchmark_reserve=.* must be a number of at least 0"):
            Split({}, reserve=reserve)
    with pytest.raises(ValueError, match="max_distance=65"):
        Split({}, max_distance=65)


def test_repeated_prompts():
    rows = [
        ("add", "Add a dog."), ("add", "add  a DOG"), ("remove", "Add a dog"), ("add", "Add a cat"),
        ("add", "Ａdd a dog!"),
        ("add", "添加一只狗。"), ("add", "添加 一只狗"), ("add", "添加一只狗！"),
    ]  # fmt: skip
    reasons = repeated_prompts([task for task, _ in rows], [prompt for _, prompt in rows], 2)
    assert [reason is not None for reason in reasons] == [False, False, False, False, True, False, False, True]
    assert {reason.partition(":")[0] for reason in reasons if reason} == {"repeated prompt"}
    assert repeated_prompts([], [], 1) == []
    ones = repeated_prompts(["add"] * 5, ["x", "y", "x", "x", "y"], 1)
    assert [reason is not None for reason in ones] == [False, False, True, True, True]
