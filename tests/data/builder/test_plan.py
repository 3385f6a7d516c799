"""The plan of cases: numbers against closed forms and brute force, whatever order the images come in."""

import itertools
import random
from collections import Counter, defaultdict

import pytest

from hp_edit_trl.data.builder.plan import Plan, _shares
from hp_edit_trl.data.builder.styles import STYLES, Style
from hp_edit_trl.tasks import TASKS


TASK_WEIGHTS = {task.name: task.realpref_50k for task in TASKS.values()}


def images(counts, seed=0):
    """Images of categories, in a random order."""
    rows = [(f"{name}{i:05d}", name) for name, count in counts.items() for i in range(count)]
    random.Random(seed).shuffle(rows)
    return {"image_id": [row[0] for row in rows], "category": [row[1] for row in rows]}


def cases(plan, batch):
    """What is planned: image, category, task, language, style of each case."""
    done = plan(batch)
    assert done.keys() == {*plan.features, "parent", "reason"}
    assert set(done["reason"]) <= {None}
    found = zip(done["parent"], done["task"], done["language"], done["style"], strict=True)
    return [(batch["image_id"][row], batch["category"][row], *rest) for row, *rest in found]


def test_the_papers_numbers():
    assert sum(TASK_WEIGHTS.values()) == 55_795 and set(TASK_WEIGHTS) == set(TASKS)
    batch = images({f"category {i}": 55_795 // 80 + (i < 55_795 % 80) for i in range(80)})
    assert Counter(case[2] for case in cases(Plan(), batch)) == TASK_WEIGHTS


def test_every_image_has_its_tasks_and_the_weights_are_met():
    batch = images({"dog": 500, "cat": 301, "kite": 40, "toaster": 3})
    planned = cases(Plan(tasks_per_image=3, seed=4), batch)
    assert len(planned) == 3 * 844
    by_image = defaultdict(list)
    for image, _, task, *_ in planned:
        by_image[image].append(task)
    assert {len(tasks) for tasks in by_image.values()} == {3} == {len(set(tasks)) for tasks in by_image.values()}
    total = sum(TASK_WEIGHTS.values())
    for task, count in Counter(case[2] for case in planned).items():
        assert abs(count - 3 * 844 * TASK_WEIGHTS[task] / total) < 1


@pytest.mark.parametrize("tasks_per_image", [1, 2])
def test_tasks_are_spread_evenly_over_categories(tasks_per_image):
    sizes = {f"c{i}": size for i, size in enumerate([400, 400, 399, 120, 121, 60, 33, 10, 10, 5])}
    batch = images(sizes)
    for seed in range(5):
        planned = cases(Plan(tasks_per_image=tasks_per_image, seed=seed), batch)
        cells, tasks = Counter((case[1], case[2]) for case in planned), Counter(case[2] for case in planned)
        for category, task in itertools.product(sizes, TASKS):
            ideal = sizes[category] * tasks[task] / sum(sizes.values())
            assert abs(cells[category, task] - ideal) < 2, (category, task)


def test_rare_categories_do_not_all_get_the_same_task():
    planned = cases(Plan(), images({f"c{i}": 1 for i in range(80)} | {"dog": 400}))
    rare = Counter(case[2] for case in planned if case[1] != "dog")
    assert len(rare) == 8 and max(rare.values()) < 25  # ten of each if it were exact


def test_num_cases_is_met_exactly():
    batch = images({"dog": 30, "cat": 12})
    for wanted in (1, 7, 41, 42, 43, 83, 84):
        planned = cases(Plan(num_cases=wanted, tasks_per_image=2), batch)
        assert len(planned) == wanted
        per_image = Counter(case[0] for case in planned)
        numbers = [per_image[image] for image in batch["image_id"]]
        assert max(numbers) - min(numbers) <= 1
        assert len({case[:3] for case in planned}) == wanted  # no image has a task twice
        dogs = sum(case[1] == "dog" for case in planned)
        assert abs(dogs - wanted * 30 / 42) <= 2
    with pytest.raises(ValueError, match="num_cases=85 .* 42 images with tasks_per_image=2 give only 84"):
        Plan(num_cases=85, tasks_per_image=2)(batch)


def test_the_order_of_rows_does_not_matter_and_the_seed_does():
    counts = {"dog": 40, "cat": 20, "kite": 1}
    settings = dict(tasks_per_image=2, languages={"en": 2, "zh": 1})
    first = cases(Plan(**settings), images(counts, seed=0))
    assert cases(Plan(**settings), images(counts, seed=0)) == first
    assert cases(Plan(**settings), images(counts, seed=1)) == first
    other = cases(Plan(**settings, seed=1), images(counts, seed=0))
    assert sorted(case[:3] for case in other) != sorted(case[:3] for case in first)
    # Well mixed: the tasks do not come one after the other
    tasks = [case[2] for case in first]
    assert sum(a == b for a, b in itertools.pairwise(tasks)) < len(tasks) / 3


def test_languages_and_styles():
    batch = images({"dog": 300, "cat": 200, "kite": 58})
    plan = Plan(tasks_per_image=2, languages={"en": 0.75, "zh": 0.25})
    planned = cases(plan, batch)
    assert Counter(case[3] for case in planned) == {"en": 837, "zh": 279}
    assert all((case[4] is not None) == (case[2] == "style") for case in planned)
    for task, count in Counter(case[2] for case in planned).items():
        assert abs(sum(case[2:4] == (task, "zh") for case in planned) - count / 4) <= 1
    used = Counter(case[4] for case in planned if case[2] == "style")
    assert set(used) == {style.name for style in STYLES} and max(used.values()) - min(used.values()) <= 1
    few = (Style("one", "一", "x"), Style("two", "二", "y"))
    planned = cases(
        Plan(task_weights={"style": 1}, languages={"en": 1, "zh": 1}, styles=few), images({"dog": 40, "cat": 40})
    )
    assert Counter(case[3:] for case in planned) == {(a, b): 20 for a in ("en", "zh") for b in ("one", "two")}
    by_category = Counter((case[1], case[4]) for case in planned)
    assert set(by_category.values()) == {20}


def test_a_task_that_all_images_have_leaves_the_rest_to_the_others():
    # Half of 2 x 100 cases would be more than one for each image.
    weights = {"add": 8, "remove": 1, "swap": 1}
    planned = cases(Plan(tasks_per_image=2, task_weights=weights), images({"dog": 100}))
    assert Counter(case[2] for case in planned) == {"add": 100, "remove": 50, "swap": 50}


def test_shares_against_brute_force():
    """The largest remainder minimises the distance to the exact shares, among all whole numbers that add up."""
    for total, weights, most in [(7, (3, 2, 1), 7), (5, (1, 1, 1), 5), (9, (0.1, 0.2, 0.7), 9), (10, (8, 1, 1), 5)]:
        exact = [total * weight / sum(weights) for weight in weights]
        wholes = [w for w in itertools.product(range(most + 1), repeat=3) if sum(w) == total]
        least = min(sum((a - b) ** 2 for a, b in zip(whole, exact, strict=True)) for whole in wholes)
        found = _shares(total, dict(zip("abc", weights, strict=True)), most)
        assert sum(found.values()) == total and max(found.values()) <= most
        distance = sum((a - b) ** 2 for a, b in zip(found.values(), exact, strict=True))
        assert distance == pytest.approx(least)


def test_zero_weights_and_missing_categories():
    batch = {"image_id": ["a", "b", "c"], "category": [None, "dog", None]}
    planned = cases(Plan(task_weights={"add": 0, "bokeh": 1.5}), batch)
    assert {case[2] for case in planned} == {"bokeh"}
    assert cases(Plan(), {"image_id": [], "category": []}) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_weights": {"crop": 1}}, r"task_weights names \['crop'\], which are not known; known are"),
        ({"languages": {"en": 1, "de": 1}}, r"languages names \['de'\], .* known are \['en', 'zh'\]"),
        ({"task_weights": {"add": -1}}, "weight of 'add' is -1, but must be a number of at least 0"),
        ({"task_weights": {"add": float("nan")}}, "weight of 'add' is nan"),
        ({"task_weights": {"add": float("inf")}}, "weight of 'add' is inf"),
        ({"task_weights": {"add": "many"}}, "weight of 'add' is 'many'"),
        ({"task_weights": {"add": 0}}, "selects nothing"),
        ({"languages": {}}, "selects nothing"),
        ({"num_cases": 0}, "num_cases=0 must be an integer of at least 1"),
        ({"tasks_per_image": 0}, "tasks_per_image=0 must be at least 1, and at most 8"),
        ({"tasks_per_image": 2, "task_weights": {"add": 1, "swap": 0}},
            r"at most 1, the number of tasks with a weight: \['add'\]"),
        ({"styles": ()}, "styles must not be empty"),
        ({"styles": (STYLES[0], STYLES[0])}, "have distinct names"),
    ],
)  # fmt: skip
def test_options_that_are_not_usable(options, message):
    with pytest.raises(ValueError, match=message):
        Plan(**options)


def test_an_image_that_is_there_twice():
    with pytest.raises(ValueError, match="The image 'a' occurs more than once, .* run the stage 'duplicates' first"):
        Plan()({"image_id": ["a", "b", "a"], "category": ["dog"] * 3})


def test_the_styles():
    assert len(STYLES) > 30
    assert len({style.name.lower() for style in STYLES}) == len(STYLES) == len({style.chinese for style in STYLES})
    for style in STYLES:
        assert style.name.isascii() and style.description.endswith(".") and len(style.description.split()) >= 6
        assert any("\u4e00" <= letter <= "\u9fff" for letter in style.chinese)
