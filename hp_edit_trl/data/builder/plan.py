"""Stage `plan`: decides which image gets which tasks, in which language and style."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from datasets import Features, Value

from ...tasks import TASKS
from ...utils.config import check_positive
from ...utils.seeding import seeded_generator
from .engine import Batch, Stage
from .styles import LANGUAGES, STYLES, Style, styles_by_name


TASK_WEIGHTS: dict[str, float] = {task.name: task.realpref_50k for task in TASKS.values()}


class Plan(Stage):
    """
    Decides the cases: for which tasks, in which language and style, prompts are written for each image. An image
    becomes one case or several.

    The number of cases of a task follows its weight exactly (largest remainder), unless an image would get a task
    twice. Tasks are spread evenly over the categories, languages over the tasks, and styles over the cases of the task
    `style`.

    Args:
        num_cases (`int`, *optional*):
            Number of cases. By default `tasks_per_image` per image.
        tasks_per_image (`int`, *optional*, defaults to `1`):
            Number of different tasks per image. If `num_cases` is smaller than that would give, images have fewer, and
            their numbers differ by at most one.
        task_weights (`Mapping[str, float]`, *optional*):
            Shares of the tasks. Defaults to the counts of RealPref-50K (HP-Edit, table S6).
        languages (`Mapping[str, float]`, *optional*, defaults to `{"en": 1.0}`):
            Shares of the languages `"en"` and `"zh"`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        styles (`Sequence[Style]`, *optional*):
            The styles to draw from. Defaults to `STYLES`.

    Raises:
        `ValueError`: If a task or language is unknown, a weight is not valid, or there are fewer tasks than an image
            should get.
    """

    name = "plan"
    inputs = ("image_id", "category")
    features = Features({"task": Value("string"), "language": Value("string"), "style": Value("string")})

    def __init__(
        self,
        num_cases: int | None = None,
        tasks_per_image: int = 1,
        task_weights: Mapping[str, float] = TASK_WEIGHTS,
        languages: Mapping[str, float] = MappingProxyType({"en": 1.0}),
        seed: int = 0,
        styles: Sequence[Style] = STYLES,
    ):
        self.num_cases = num_cases
        self.tasks_per_image = tasks_per_image
        self.task_weights = _checked_weights("task_weights", task_weights, TASKS)
        self.languages = _checked_weights("languages", languages, LANGUAGES)
        self.seed = seed
        self.styles = styles_by_name(styles)
        check_positive(num_cases=num_cases)
        if not 1 <= tasks_per_image <= len(self.task_weights):
            raise ValueError(
                f"tasks_per_image={tasks_per_image} must be at least 1, and at most {len(self.task_weights)}, the "
                f"number of tasks with a weight: {list(self.task_weights)}."
            )

    @property
    def settings(self) -> dict[str, Any]:
        names = ("num_cases", "tasks_per_image", "task_weights", "languages", "seed")
        return {**{name: getattr(self, name) for name in names}, "styles": list(self.styles)}

    def __call__(self, batch: Batch) -> Batch:
        ids, categories = batch["image_id"], [str(category) for category in batch["category"]]
        if repeated := [image for image, count in Counter(ids).items() if count > 1]:
            raise ValueError(
                f"The image {repeated[0]!r} occurs more than once, but cases are identified by their image: run the "
                "stage 'duplicates' first."
            )
        available = len(ids) * self.tasks_per_image
        count = available if self.num_cases is None else self.num_cases
        if count > available:
            raise ValueError(
                f"num_cases={count} was requested, but {len(ids)} images with tasks_per_image={self.tasks_per_image} "
                f"give only {available}: lower num_cases, raise tasks_per_image, or add images."
            )

        def draw(purpose: str, *key: str) -> int:
            return seeded_generator(self.seed, purpose, *key).initial_seed()

        # Images are arranged in a circle, each category spread evenly over it. Each task takes the next images of the
        # circle, as many as it has cases. No image comes twice, because no task has more cases than there are images.
        by_category: dict[str, list[int]] = {}
        for image in sorted(range(len(ids)), key=lambda image: draw("plan image", ids[image])):
            by_category.setdefault(categories[image], []).append(image)
        circle = _interleaved(by_category, {name: draw("plan category", name) / 2**63 for name in by_category})
        counts = _shares(count, self.task_weights, len(ids))
        tasks = [task for task in counts for _ in range(counts[task])]
        cases = [(circle[i % len(circle)], task) for i, task in enumerate(tasks)]

        # Styles take turns over the cases of the task `style`, sorted by category.
        names = sorted(self.styles, key=lambda name: draw("plan style", name))
        painted = [image for image, task in cases if task == "style"]
        painted.sort(key=lambda i: (draw("plan style category", categories[i]), draw("plan style image", ids[i])))
        style = {(image, "style"): names[i % len(names)] for i, image in enumerate(painted)}

        # Languages take turns within each task and style.
        shares = _shares(count, self.languages, count)
        dealt = _interleaved({name: [name] * number for name, number in shares.items()}, dict.fromkeys(shares, 0.5))
        order = sorted(
            cases,
            key=lambda case: (case[1], style.get(case, ""), categories[case[0]], draw("plan language", ids[case[0]])),
        )
        language = dict(zip(order, dealt, strict=True))

        cases.sort(key=lambda case: draw("plan order", ids[case[0]], case[1]))
        return {
            "parent": [image for image, _ in cases],
            "task": [task for _, task in cases],
            "language": [language[case] for case in cases],
            "style": [style.get(case) for case in cases],
            "reason": [None] * len(cases),
        }


def _checked_weights(option: str, weights: Mapping[str, float], known: Mapping[str, Any]) -> dict:
    """The weights above zero, in the order of `known`."""
    if unknown := [name for name in weights if name not in known]:
        raise ValueError(f"{option} names {unknown}, which are not known; known are {list(known)}.")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(f"{option}: the weight of {name!r} is {weight!r}, but must be a number of at least 0.")
    if not any(weights.values()):
        raise ValueError(
            f"{option}={dict(weights)} selects nothing: give at least one of {list(known)} a weight above 0."
        )
    return {name: weights[name] for name in known if weights.get(name)}


def _shares(total: int, weights: Mapping[str, float], most: int) -> dict[str, int]:
    """
    Divides an integer by weights with the largest remainder (Hamilton's method), at most `most` for each. The excess
    is divided among the others in the same way.
    """
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}  # exactly 0.1, not the nearest float
    unit = total / sum(exact.values())
    shares = {name: math.floor(weight * unit) for name, weight in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name] * unit)
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    full = [name for name in shares if shares[name] > most]
    if not full:
        return shares
    rest = {name: weight for name, weight in weights.items() if name not in full}
    others = _shares(total - most * len(full), rest, most) if rest else {}
    return {name: others.get(name, most) for name in weights}


def _interleaved(groups: Mapping[str, list], offsets: Mapping[str, float]) -> list:
    """Merges lists, each spread evenly over the result: the i-th of n members has the position (i + offset) / n."""
    places = sorted(
        ((i + offsets[name]) / len(members), name, i) for name, members in groups.items() for i in range(len(members))
    )
    return [groups[name][i] for _, name, i in places]
