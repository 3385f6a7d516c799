"""The choice of images against filling up categories one image at a time."""

import random
from collections import Counter

import pytest

from hp_edit_trl.data.builder.balance import Balance


def images(counts: dict[str, int], seed: int = 0) -> dict[str, list]:
    draw = random.Random(seed)
    rows = [(category, draw.choice([0.1, 0.2, 0.3])) for category, count in counts.items() for _ in range(count)]
    draw.shuffle(rows)
    return {
        "image_id": [f"{draw.getrandbits(64):016x}" for _ in rows],
        "category": [category for category, _ in rows],
        "category_score": [score for _, score in rows],
        "tasks": ["add"] * len(rows),
    }


def kept(batch: dict[str, list], **options) -> list[int]:
    done = Balance(**options)(batch)
    assert done.keys() == {"reason"} and len(done["reason"]) == len(batch["image_id"])
    assert all(reason is None or reason.startswith("over quota: ") for reason in done["reason"])
    return [row for row, reason in enumerate(done["reason"]) if reason is None]


def filled_one_by_one(counts: dict[str, int], total: int | None, quota: int | None) -> list[int]:
    """One image at a time into a category that has the fewest and has more: how many each has, sorted."""
    room = {name: min(count, quota or count) for name, count in counts.items()}
    have = dict.fromkeys(counts, 0)
    while sum(have.values()) < min(sum(room.values()), total or sum(room.values())):
        name = min((name for name in counts if have[name] < room[name]), key=lambda name: have[name])
        have[name] += 1
    return sorted(have.values())


@pytest.mark.parametrize("seed", range(30))
def test_the_choice_against_filling_up_one_by_one(seed):
    draw = random.Random(seed)
    counts = {f"c{i}": draw.choice([1, 2, 5, 20, 60]) for i in range(draw.randrange(1, 9))}
    total = draw.choice([None, 1, 7, sum(counts.values()) // 2 + 1, sum(counts.values()) + 5])
    quota = draw.choice([None, 1, 4, 30])
    batch = images(counts, seed)
    rows = kept(batch, total=total, quota=quota, seed=seed)
    chosen = Counter(batch["category"][row] for row in rows)
    assert sorted(chosen[name] for name in counts) == filled_one_by_one(counts, total, quota)
    assert all(chosen[name] <= min(count, quota or count) for name, count in counts.items())
    # Of each category those with the highest score, of equal ones the first by id
    for name in counts:
        members = [row for row, category in enumerate(batch["category"]) if category == name]
        members.sort(key=lambda row: batch["image_id"][row])
        members.sort(key=lambda row: batch["category_score"][row], reverse=True)
        assert {row for row in rows if batch["category"][row] == name} == set(members[: chosen[name]])


def test_closed_forms():
    counts = {"cat": 100, "dog": 100, "cup": 3, "car": 100}
    batch = images(counts)
    for total, expected in (
        (63, [3, 20, 20, 20]),
        (8, [2, 2, 2, 2]),
        (303, [3, 100, 100, 100]),
        (64, [3, 20, 20, 21]),
    ):
        chosen = Counter(batch["category"][row] for row in kept(batch, total=total))
        assert sorted(chosen.values()) == expected
    assert len(kept(batch)) == 303 and len(kept(batch, total=1000)) == 303
    assert len(kept(batch, quota=10)) == 33 and len(kept(batch, quota=10, total=1000)) == 33
    assert Balance(5)({"image_id": [], "category": [], "category_score": [], "tasks": []}) == {"reason": []}
    # The few images of pairs are not displaced by the many others of their category.
    batch["tasks"] = ["bokeh" if row % 20 == 0 else "add,remove" for row in range(303)]
    assert Counter(batch["tasks"][row] for row in kept(batch, total=63))["bokeh"] == 16
    reasons = Balance(quota=2)(images({"cup": 3}))["reason"]
    assert sorted(filter(None, reasons)) == ["over quota: number 3 of 3 of cup, 2 are kept"]


def test_the_order_of_rows_does_not_matter():
    batch = images({"cat": 30, "dog": 50, "cup": 4, "car": 50, "bus": 50})
    order = list(range(len(batch["image_id"])))
    random.Random(1).shuffle(order)
    shuffled = {name: [values[i] for i in order] for name, values in batch.items()}
    for options in ({"total": 70}, {"total": 71, "quota": 20}, {"quota": 3}):
        ids = {batch["image_id"][row] for row in kept(batch, **options)}
        assert ids == {shuffled["image_id"][row] for row in kept(shuffled, **options)}


def test_who_gets_one_more_is_drawn():
    batch = images({"cat": 30, "dog": 31, "cup": 32})
    favoured = Counter()
    for seed in range(60):
        counts = Counter(batch["category"][row] for row in kept(batch, total=10, seed=seed))
        assert sorted(counts.values()) == [3, 3, 4]
        favoured[counts.most_common(1)[0][0]] += 1
    assert min(favoured[name] for name in ("cat", "dog", "cup")) > 8


@pytest.mark.parametrize("option", ["total", "quota"])
def test_a_choice_of_nothing(option):
    with pytest.raises(ValueError, match=f"{option}=0 must be an integer of at least 1"):
        Balance(**{option: 0})
