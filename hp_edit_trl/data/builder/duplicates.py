"""Stage `duplicates`: rejects images that equal or resemble an earlier one."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .engine import Batch, Stage


class Duplicates(Stage):
    """
    Rejects images with the same pixels as an earlier one, and near duplicates: images whose perceptual hash
    (`imagehash.phash`, the column `image_hash`) is close to that of an earlier one.

    Args:
        max_distance (`int`, *optional*, defaults to `4`):
            Two images are near duplicates if their hashes differ in at most this many of 64 bits.

    Raises:
        `ValueError`: If it is not between 0 and 64.
    """

    name = "duplicates"
    inputs = ("image_id", "image_hash")

    def __init__(self, max_distance: int = 4):
        if not 0 <= max_distance <= 64:
            raise ValueError(f"max_distance={max_distance} must be in 0..64.")
        self.max_distance = max_distance

    @property
    def settings(self) -> dict[str, Any]:
        return {"max_distance": self.max_distance}

    def __call__(self, batch: Batch) -> Batch:
        ids = batch["image_id"]
        reasons: list[str | None] = [f"duplicate: same pixels as {image_id}" for image_id in ids]
        first: dict[str, int] = {}
        for row, image_id in enumerate(ids):
            first.setdefault(image_id, row)
        rows = list(first.values())
        hashes = [int(batch["image_hash"][row], 16) for row in rows]
        for i, near in enumerate(find_near_duplicates(hashes, self.max_distance)):
            reasons[rows[i]] = None
            if near is not None:
                bits = (hashes[i] ^ hashes[near]).bit_count()
                reasons[rows[i]] = f"near duplicate: {bits} bits from {ids[rows[near]]}"
        return {"reason": reasons}


def find_near_duplicates(hashes: Sequence[int], max_distance: int) -> list[int | None]:
    """
    Finds hashes that are close to an earlier one that is kept. Later hashes are not compared with those that are not
    kept, so that a chain of similar images does not collapse into its first one.

    Cut two hashes into `max_distance + 1` parts: if they differ in at most `max_distance` bits, they agree in at least
    one part. So it is enough to compare hashes that share a part.

    Args:
        hashes (`Sequence[int]`):
            Hashes of 64 bits.
        max_distance (`int`):
            Two hashes are close if they differ in at most this many bits.

    Returns:
        `list[int | None]`: for each hash the position of the first kept one that is close to it, or `None` if it is
        kept.
    """
    values = np.array([int(value) for value in hashes], dtype=np.uint64)
    parts = max_distance + 1
    edges = [64 * part // parts for part in range(parts + 1)]
    # For each part: hashes that agree in it share a bucket, a run of places that fills up with those that are kept.
    buckets = []
    for low, high in zip(edges, edges[1:], strict=False):
        mask = np.uint64(2 ** (high - low) - 1)
        _, which, counts = np.unique(values >> np.uint64(low) & mask, return_inverse=True, return_counts=True)
        starts = np.cumsum(counts) - counts
        buckets.append((which.tolist(), starts.tolist(), starts.tolist(), np.empty(len(values), dtype=np.int64)))
    found: list[int | None] = []
    for i, value in enumerate(values):
        near = []
        for which, starts, ends, kept in buckets:
            candidates = kept[starts[which[i]] : ends[which[i]]]
            if len(candidates):
                close = np.flatnonzero(np.bitwise_count(values[candidates] ^ value) <= max_distance)
                near += [int(candidates[close[0]])] if len(close) else []
        found.append(min(near, default=None))
        if not near:
            for which, _, ends, kept in buckets:
                kept[ends[which[i]]] = i
                ends[which[i]] += 1
    return found
