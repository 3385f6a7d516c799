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
from .rounds import Earlier
from .styles import LANGUAGES, STYLES, Style, StyleImages, styles_by_name


TASK_COUNTS: dict[str, int] = {task.name: task.realpref_50k for task in TASKS.values()}


class Plan(Stage):
    """
    Decides the cases of a round: for which tasks, in which language and style, prompts are written for each image. An
    image becomes one case or several, in this round or a later one.

    An image gets only tasks that its source is for, and no task twice. Each task gets as many cases as it asks for; if
    there are too few images, they are divided in proportion (largest remainder). Images that are for fewer tasks are
    used first. Tasks are spread evenly over the categories, languages over the tasks, and styles and their pictures
    over the cases of the task `style`.

    Args:
        counts (`Mapping[str, int]`, *optional*):
            Number of cases per task. Defaults to the counts of RealPref-50K (HP-Edit, table S6).
        tasks_per_image (`int`, *optional*, defaults to `1`):
            Largest number of different tasks per image, in all rounds together. No image has a second one before all
            have one.
        languages (`Mapping[str, float]`, *optional*, defaults to `{"en": 1.0}`):
            Shares of the languages `"en"` and `"zh"`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        styles (`Sequence[Style]`, *optional*):
            The styles to draw from. Defaults to `STYLES`.
        style_images ([`StyleImages`], *optional*):
            Pictures of the styles, of which each case gets one.
        earlier ([`Earlier`], *optional*):
            The earlier rounds, if this is not the first one.

    Raises:
        `ValueError`: If a task or language is unknown, or a number is not valid.
    """

    name = "plan"
    inputs = ("image_id", "category", "tasks")
    features = Features({"task": Value("string"), "language": Value("string"), "style": Value("string")})

    def __init__(
        self,
        counts: Mapping[str, int] = TASK_COUNTS,
        tasks_per_image: int = 1,
        languages: Mapping[str, float] = MappingProxyType({"en": 1.0}),
        seed: int = 0,
        styles: Sequence[Style] = STYLES,
        style_images: StyleImages | None = None,
        earlier: Earlier | None = None,
    ):
        check_positive(tasks_per_image=tasks_per_image)
        self.counts = checked_counts("counts", counts)
        self.tasks_per_image = tasks_per_image
        self.languages = _checked_weights("languages", languages, LANGUAGES)
        self.seed = seed
        self.styles = styles_by_name(styles)
        self.style_images = style_images
        self.earlier = earlier or Earlier()
        if style_images is not None:
            self.features = Features({**self.features, "style_file": Value("string")})

    @property
    def settings(self) -> dict[str, Any]:
        names = ("counts", "tasks_per_image", "languages", "seed")
        settings = {name: getattr(self, name) for name in names} | {"styles": list(self.styles)}
        pictures = None if self.style_images is None else self.style_images.digest
        return {**settings, "style_images": pictures, "earlier_rounds": self.earlier.key}

    def assign(self, batch: Batch) -> list[tuple[int, str]]:
        """
        Gives images their tasks.

        Args:
            batch (`dict[str, list]`):
                The columns `image_id`, `category` and `tasks` of all images.

        Returns:
            `list[tuple[int, str]]`: the rows of the images, each with a task.
        """
        ids, categories = batch["image_id"], [str(category) for category in batch["category"]]
        used = {row: set(self.earlier.tasks.get(image, ())) for row, image in enumerate(ids)}
        missing = dict(self.counts)
        cases = []
        for served in sorted(set(batch["tasks"]), key=lambda served: (served.count(","), served)):
            # Images are arranged in a circle, each category spread evenly over it. Each task takes the next ones.
            by_category: dict[str, list[int]] = {}
            rows = [row for row, tasks in enumerate(batch["tasks"]) if tasks == served]
            for row in sorted(rows, key=lambda row: self._draw("plan image", ids[row])):
                by_category.setdefault(categories[row], []).append(row)
            offsets = {name: self._draw("plan category", name) / 2**63 for name in by_category}
            circle = _interleaved(by_category, offsets)
            places = [row for turn in range(self.tasks_per_image) for row in circle if len(used[row]) <= turn]
            wanted = {task: missing[task] for task in served.split(",") if missing.get(task)}
            if sum(wanted.values()) > len(places):
                # A task can only use the images that do not have it yet.
                free = {task: sum(task not in used[row] for row in set(places)) for task in wanted}
                most = {task: min(count, free[task]) for task, count in wanted.items()}
                wanted = _shares(len(places), wanted, most)
            for task, count in wanted.items():
                left = []
                for row in places:
                    if count and task not in used[row]:
                        used[row].add(task)
                        cases.append((row, task))
                        missing[task] -= 1
                        count -= 1
                    else:
                        left.append(row)
                places = left
        return cases

    def __call__(self, batch: Batch) -> Batch:
        ids, categories = batch["image_id"], [str(category) for category in batch["category"]]
        if repeated := [image for image, count in Counter(ids).items() if count > 1]:
            raise ValueError(
                f"The image {repeated[0]!r} occurs more than once, but cases are identified by their image: run the "
                "stage 'duplicates' first."
            )
        cases, draw = self.assign(batch), self._draw

        # Styles take turns over the cases of the task `style`, sorted by category, and so do the pictures of a style.
        names = sorted(self.styles, key=lambda name: draw("plan style", name))
        painted = [image for image, task in cases if task == "style"]
        painted.sort(key=lambda i: (draw("plan style category", categories[i]), draw("plan style image", ids[i])))
        turns = Counter(self.earlier.styles)
        style, file = {}, {}
        for i, image in enumerate(painted, start=turns.total()):
            style[image, "style"] = name = names[i % len(names)]
            if self.style_images is not None and (files := self.style_images.files.get(name)):
                file[image, "style"] = files[turns[name] % len(files)]
            turns[name] += 1

        # Languages take turns within each task and style.
        shares = _shares(len(cases), self.languages, dict.fromkeys(self.languages, len(cases)))
        dealt = _interleaved({name: [name] * number for name, number in shares.items()}, dict.fromkeys(shares, 0.5))
        order = sorted(
            cases,
            key=lambda case: (case[1], style.get(case, ""), categories[case[0]], draw("plan language", ids[case[0]])),
        )
        language = dict(zip(order, dealt, strict=True))

        cases.sort(key=lambda case: draw("plan order", ids[case[0]], case[1]))
        planned: Batch = {
            "parent": [image for image, _ in cases],
            "task": [task for _, task in cases],
            "language": [language[case] for case in cases],
            "style": [style.get(case) for case in cases],
            "reason": [None] * len(cases),
        }
        return planned if self.style_images is None else {**planned, "style_file": [file.get(case) for case in cases]}

    def _draw(self, purpose: str, *key: str) -> int:
        return seeded_generator(self.seed, purpose, *key).initial_seed()


def checked_counts(option: str, counts: Mapping[str, int]) -> dict[str, int]:
    """The counts above zero, in the order of the tasks. Raises `ValueError` if a task or a count is not one."""
    for task, count in counts.items():
        if task not in TASKS:
            raise ValueError(f"{option} names {task!r}, which is no task; there are {list(TASKS)}.")
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"{option}: the count of {task!r} is {count!r}, but must be an integer of at least 0.")
    return {task: counts[task] for task in TASKS if counts.get(task)}


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


def _shares(total: int, weights: Mapping[str, float], most: Mapping[str, int]) -> dict[str, int]:
    """
    Divides an integer by weights with the largest remainder (Hamilton's method), with at most `most` of each. The
    excess is divided among the others in the same way.
    """
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}  # exactly 0.1, not the nearest float
    unit = total / sum(exact.values())
    shares = {name: math.floor(weight * unit) for name, weight in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name] * unit)
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    full = [name for name in shares if shares[name] > most[name]]
    if not full:
        return shares
    rest = {name: weight for name, weight in weights.items() if name not in full}
    others = _shares(total - sum(most[name] for name in full), rest, most) if rest else {}
    return {name: others.get(name, most[name]) for name in weights}


def _interleaved(groups: Mapping[str, list], offsets: Mapping[str, float]) -> list:
    """Merges lists, each spread evenly over the result: the i-th of n members has the position (i + offset) / n."""
    places = sorted(
        ((i + offsets[name]) / len(members), name, i) for name, members in groups.items() for i in range(len(members))
    )
    return [groups[name][i] for _, name, i in places]
