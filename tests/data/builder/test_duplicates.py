"""Near duplicates against a brute-force search, and the stage that rejects them."""

import random

import pytest

from hp_edit_trl.data.builder.duplicates import Duplicates, find_near_duplicates


def brute_force(hashes: list[int], max_distance: int) -> list[int | None]:
    found: list[int | None] = []
    for i, value in enumerate(hashes):
        near = [j for j in range(i) if found[j] is None and (value ^ hashes[j]).bit_count() <= max_distance]
        found.append(near[0] if near else None)
    return found


@pytest.mark.parametrize("max_distance", [0, 1, 2, 4, 5, 8, 16, 31, 63, 64])
def test_near_duplicates_against_brute_force(max_distance):
    draw = random.Random(max_distance)
    hashes = [draw.getrandbits(64) for _ in range(100)] + [0, 2**64 - 1]
    for _ in range(300):
        flipped = draw.sample(range(64), draw.choice([0, 1, max_distance, min(64, max_distance + 1)]))
        hashes.append(draw.choice(hashes) ^ sum(1 << bit for bit in flipped))
    draw.shuffle(hashes)
    found = find_near_duplicates(hashes, max_distance)
    assert found == brute_force(hashes, max_distance)
    assert any(near is not None for near in found)
    assert find_near_duplicates([], max_distance) == [] and find_near_duplicates([5], max_distance) == [None]


def test_fifty_thousand_hashes():
    draw = random.Random(0)
    hashes = [draw.getrandbits(64) for _ in range(50_000)]
    planted = {49_000 + i: draw.randrange(40_000) for i in range(500)}
    for place, original in planted.items():
        hashes[place] = hashes[original] ^ sum(1 << bit for bit in draw.sample(range(64), 4))
    found = find_near_duplicates(hashes, 4)
    assert {place: near for place, near in enumerate(found) if near is not None} == planted


def test_duplicates():
    hashes = [0b0, 0b1, 0b11111, 0b0, 0b1111100000, 0b111]
    batch = {"image_id": ["a", "b", "c", "a", "d", "b"], "image_hash": [f"{value:016x}" for value in hashes]}
    # c is 5 bits from a and 4 from b, which is no longer there.
    assert Duplicates(4)(batch) == {
        "reason": [
            None,
            "near duplicate: 1 bits from a",
            None,
            "duplicate: same pixels as a",
            None,
            "duplicate: same pixels as b",
        ]
    }
    assert Duplicates(5)(batch)["reason"][2] == "near duplicate: 5 bits from a"
    assert Duplicates(4)({"image_id": [], "image_hash": []}) == {"reason": []}
    with pytest.raises(ValueError, match="max_distance=65 must be in 0..64"):
        Duplicates(65)
