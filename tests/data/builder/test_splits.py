"""Which cases become the benchmark, and which are hard enough."""

import random
from collections import Counter

import pytest

from hp_edit_trl import tasks
from hp_edit_trl.data.builder.splits import Filter, Split


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
    assert done.keys() == {"split", "reason"} and set(done["split"]) == {"train", "test"}
    chosen = [i for i, split in enumerate(done["split"]) if split == "test"]
    assert Counter(batch["task"][i] for i in chosen) == {"add": 12, "remove": 8}
    assert all(done["reason"][i] is None for i in chosen)
    for task, count in (("add", 3), ("remove", 2)):
        assert set(Counter(batch["category"][i] for i in chosen if batch["task"][i] == task).values()) == {count}
    assert sum(BENCHMARK_COUNTS.values()) == 1638  # the paper's


def test_training_sees_no_image_of_the_benchmark_nor_one_that_looks_like_it():
    batch = rows()
    done = Split({"add": 12, "remove": 8}, max_distance=8)(batch)
    test = [i for i, split in enumerate(done["split"]) if split == "test"]
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
    done = Split({"add": 1}, max_distance=max_distance)(batch)
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
    with pytest.raises(ValueError, match="benchmark_counts=.* must be whole numbers"):
        Split({"add": -1})
    with pytest.raises(ValueError, match="max_distance=65"):
        Split({}, max_distance=65)


def graded(scores, split=None, task=None):
    count = len(scores)
    return {
        "id": [str(i) for i in range(count)],
        "task": task or ["add"] * count,
        "split": split or ["train"] * count,
        "score": scores,
    }


def test_scores_of_five_are_not_trained_on_and_missing_ones_neither():
    done = Filter()(graded([5.0, 4.99, None, 0.0, 5.0, None], ["train"] * 4 + ["test"] * 2))
    assert done["split"] == ["filtered", "train", "train", "train", "test", "test"]
    assert done["reason"] == [None, None, "no score", None, None, None]
    assert Filter(threshold=4)(graded([5, 4, 3]))["split"] == ["filtered", "filtered", "train"]


def test_the_hardest_share_of_each_task():
    scores = [5.0, 1.0, 2.0, 3.0, 4.0, 4.0, None, 3.0]
    done = Filter("hardest", 0.5)(graded(scores, task=["add"] * 4 + ["swap"] * 4))
    assert done["split"][:4] == ["filtered", "train", "train", "filtered"]
    # Three of swap have a score; half of them, rounded up, are two: 3 and, of equal scores, the first by id.
    assert done["split"][4:] == ["train", "filtered", "train", "train"] and done["reason"][6] == "no score"


@pytest.mark.parametrize(
    ("rule", "threshold", "message"),
    [
        ("above", 5, "filter_rule='above'"),
        ("below", 5.5, "at most 5"),
        ("hardest", 2, "at most 1"),
        ("below", 0, "above 0"),
    ],
)
def test_rules_that_are_not_there(rule, threshold, message):
    with pytest.raises(ValueError, match=message):
        Filter(rule, threshold)
