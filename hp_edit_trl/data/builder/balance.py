"""Stage `balance`: chooses images evenly over the categories."""

from bisect import bisect_right
from typing import Any

from ...utils.config import check_positive
from ...utils.seeding import seeded_generator
from .engine import Batch, Stage


class Balance(Stage):
    """
    Chooses images as evenly over the categories as possible. All images of rare categories are kept; of the others,
    those with the highest `category_score`. The choice does not depend on the order of the images. Images that are for
    other tasks count as another category, so that the images of one task do not displace those of another.

    Args:
        total (`int`, *optional*):
            Number of images to choose. By default all, up to `quota`.
        quota (`int`, *optional*):
            Largest number of images per category. By default there is no limit.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw of the categories that get one image more, if `total` does not divide evenly.

    Raises:
        `ValueError`: If `total` or `quota` is below 1.
    """

    name = "balance"
    inputs = ("image_id", "category", "category_score", "tasks")

    def __init__(self, total: int | None = None, quota: int | None = None, seed: int = 0):
        check_positive(total=total, quota=quota)
        self.total = total
        self.quota = quota
        self.seed = seed

    @property
    def settings(self) -> dict[str, Any]:
        return {"total": self.total, "quota": self.quota, "seed": self.seed}

    def __call__(self, batch: Batch) -> Batch:
        by_category: dict[tuple[str, str], list[int]] = {}
        for row, key in enumerate(zip(batch["category"], batch["tasks"], strict=True)):
            by_category.setdefault(key, []).append(row)
        room = self._room({category: len(rows) for category, rows in by_category.items()})
        reasons: list[str | None] = [None] * len(batch["category"])
        for category, rows in by_category.items():
            rows.sort(key=lambda row: (-batch["category_score"][row], batch["image_id"][row]))
            for place, row in enumerate(rows[room[category] :], start=room[category] + 1):
                reasons[row] = f"over quota: number {place} of {len(rows)} of {category[0]}, {room[category]} are kept"
        return {"reason": reasons}

    def _room(self, counts: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
        """How many images of each category to keep."""
        available = {name: min(count, self.quota or count) for name, count in counts.items()}
        total = min(self.total or sum(available.values()), sum(available.values()))

        def filled(cap: int) -> int:
            return sum(min(count, cap) for count in available.values())

        # The largest common cap that stays within the total
        cap = bisect_right(range(max(available.values(), default=0) + 1), total, key=filled) - 1
        larger = [name for name, count in available.items() if count > cap]
        larger.sort(key=lambda name: seeded_generator(self.seed, "balance", *name).initial_seed())
        one_more = larger[: total - filled(cap)]
        return {name: min(count, cap + (name in one_more)) for name, count in available.items()}
