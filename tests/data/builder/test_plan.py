"""The plan of cases: numbers against closed forms and brute force, whatever order the images come in."""

import itertools
import random
from collections import Counter, defaultdict

import pytest

from hp_edit_trl.data.builder.plan import Plan, _shares
from hp_edit_trl.data.builder.rounds import Earlier
from hp_edit_trl.data.builder.styles import STYLES, Style
from hp_edit_trl.tasks import TASKS


TASK_COUNTS = {task.name: task.realpref_50k for task in TASKS.values()}


ALL_TASKS = ",".join(TASKS)


def images(counts, seed=0, tasks=ALL_TASKS):
    """Images of categories, in a random order, all of which are for the same tasks."""
    rows = [(f"{name}{i:05d}", name) for name, count in counts.items() for i in range(count)]
    random.Random(seed).shuffle(rows)
    ids, categories = [row[0] for row in rows], [row[1] for row in rows]
    return {"image_id": ids, "category": categories, "tasks": [tasks] * len(rows)}


def cases(plan, batch):
    """What is planned: image, category, task, language, style of each case."""
    done = plan(batch)
    assert done.keys() == {*plan.features, "parent", "reason"}
    assert set(done["reason"]) <= {None}
    found = zip(done["parent"], done["task"], done["language"], done["style"], strict=True)
    return [(batch["image_id"][row], batch["category"][row], *rest) for row, *rest in found]


def test_the_papers_numbers():
    assert sum(TASK_COUNTS.values()) == 55_795 and set(TASK_COUNTS) == set(TASKS)
    batch = images({f"category {i}": 55_795 // 80 + (i < 55_795 % 80) for i in range(80)})
    assert Counter(case[2] for case in cases(Plan(), batch)) == TASK_COUNTS


def test_every_image_has_its_tasks_and_too_few_images_are_divided():
    batch = images({"dog": 500, "cat": 301, "kite": 40, "toaster": 3})
    planned = cases(Plan(tasks_per_image=3, seed=4), batch)
    assert len(planned) == 3 * 844
    by_image = defaultdict(list)
    for image, _, task, *_ in planned:
        by_image[image].append(task)
    assert {len(tasks) for tasks in by_image.values()} == {3} == {len(set(tasks)) for tasks in by_image.values()}
    total = sum(TASK_COUNTS.values())
    for task, count in Counter(case[2] for case in planned).items():
        assert abs(count - 3 * 844 * TASK_COUNTS[task] / total) < 1


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


def test_counts_are_met_exactly():
    batch = images({"dog": 30, "cat": 12})
    for wanted in (1, 7, 41, 42, 43, 83, 84):
        counts = {"add": wanted // 2, "swap": wanted - wanted // 2}
        planned = cases(Plan(counts, tasks_per_image=2), batch)
        assert Counter(case[2] for case in planned) == Counter(counts)
        per_image = Counter(case[0] for case in planned)
        numbers = [per_image[image] for image in batch["image_id"]]
        assert max(numbers) - min(numbers) <= 1
        assert len({case[:3] for case in planned}) == wanted  # no image has a task twice
        dogs = sum(case[1] == "dog" for case in planned)
        assert abs(dogs - wanted * 30 / 42) <= 2
    assert len(cases(Plan({"add": 50}, tasks_per_image=2), batch)) == 42


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
    planned = cases(Plan({"style": 80}, languages={"en": 1, "zh": 1}, styles=few), images({"dog": 40, "cat": 40}))
    assert Counter(case[3:] for case in planned) == {(a, b): 20 for a in ("en", "zh") for b in ("one", "two")}
    by_category = Counter((case[1], case[4]) for case in planned)
    assert set(by_category.values()) == {20}


def test_a_task_that_all_images_have_leaves_the_rest_to_the_others():
    # Half of 2 x 100 cases would be more than one for each image.
    counts = {"add": 800, "remove": 100, "swap": 100}
    planned = cases(Plan(counts, tasks_per_image=2), images({"dog": 100}))
    assert Counter(case[2] for case in planned) == {"add": 100, "remove": 50, "swap": 50}


def test_shares_against_brute_force():
    """The largest remainder minimises the distance to the exact shares, among all whole numbers that add up."""
    for total, weights, most in [(7, (3, 2, 1), 7), (5, (1, 1, 1), 5), (9, (0.1, 0.2, 0.7), 9), (10, (8, 1, 1), 5)]:
        exact = [total * weight / sum(weights) for weight in weights]
        wholes = [w for w in itertools.product(range(most + 1), repeat=3) if sum(w) == total]
        least = min(sum((a - b) ** 2 for a, b in zip(whole, exact, strict=True)) for whole in wholes)
        found = _shares(total, dict(zip("abc", weights, strict=True)), dict.fromkeys("abc", most))
        assert sum(found.values()) == total and max(found.values()) <= most
        distance = sum((a - b) ** 2 for a, b in zip(found.values(), exact, strict=True))
        assert distance == pytest.approx(least)


def test_zero_counts_and_missing_categories():
    batch = {"image_id": ["a", "b", "c"], "category": [None, "dog", None], "tasks": ["add,bokeh"] * 3}
    assert {case[2] for case in cases(Plan({"add": 0, "bokeh": 2}), batch)} == {"bokeh"}
    assert cases(Plan(), {"image_id": [], "category": [], "tasks": []}) == []
    assert cases(Plan({"swap": 2}), batch) == []


class Before(Earlier):
    """What earlier rounds used, told directly."""

    key = "before"

    def __init__(self, planned=()):
        self.tasks, self.styles = defaultdict(set), Counter()
        for image, _, task, _, style in planned:
            self.tasks[image].add(task)
            self.styles.update([style] if style else [])


def test_a_later_round_goes_on_where_the_earlier_ones_ended():
    batch = images({"dog": 30, "cat": 20})
    counts = {"add": 9, "style": 13}
    rounds, planned = [], []
    for _ in range(3):
        rounds.append(cases(Plan(counts, tasks_per_image=2, earlier=Before(planned)), batch))
        planned += rounds[-1]
    assert [len(each) for each in rounds] == [22, 22, 22]
    assert len({case[:3] for case in planned}) == len(planned) == 66  # no image has a task twice
    assert max(Counter(case[0] for case in planned).values()) == 2
    assert len({case[0] for case in rounds[0] + rounds[1]}) == 44  # none has a second one before all have one
    assert max(Counter(case[4] for case in planned if case[2] == "style").values()) == 1  # 39 of 58 styles
    assert Counter(case[1] for case in planned)["dog"] == pytest.approx(66 * 30 / 50, abs=3)
    # 34 places are left, but only 11 of images without a style.
    rest = cases(Plan({"add": 9, "style": 90}, tasks_per_image=2, earlier=Before(planned)), batch)
    assert len({case[:3] for case in planned + rest}) == 66 + len(rest)
    assert Counter(case[2] for case in rest)["style"] == 11
    with_key = Plan(counts, earlier=Before(planned)).settings
    assert with_key["earlier_rounds"] == "before" and Plan(counts).settings["earlier_rounds"] is None


@pytest.mark.parametrize("counts", [{"add": 5, "color": 1}, {"add": 5, "color": 5}, {"add": 1, "color": 5}])
def test_images_that_one_task_has_used_go_to_another(counts):
    # Else a round would be empty, and so would all rounds after it.
    before = Before([(f"dog{i:05d}", "dog", "add", "en", None) for i in range(3)])
    planned = cases(Plan(counts, tasks_per_image=2, earlier=before), images({"dog": 3}))
    assert Counter(case[2] for case in planned) == {"color": min(3, counts["color"])}


def test_images_get_the_tasks_that_their_source_is_for():
    parts = [images({"dog": 20}, tasks="bokeh"), images({"cat": 30}, tasks="relight,style"), images({"cup": 50})]
    batch = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    tasks = dict(zip(batch["image_id"], batch["tasks"], strict=True))
    counts = {"add": 30, "bokeh": 25, "relight": 12, "style": 20}
    planned = cases(Plan(counts), batch)
    assert all(case[2] in tasks[case[0]].split(",") for case in planned)
    assert Counter(case[2] for case in planned) == counts
    # Images that are for fewer tasks are used first; the others make up for what they lack.
    by_source = Counter((case[1], case[2]) for case in planned)
    assert by_source["dog", "bokeh"] == 20 and by_source["cup", "bokeh"] == 5
    assert by_source["cat", "style"] + by_source["cat", "relight"] == 30 and by_source["cup", "add"] == 30


class Pictures:
    files = {"LEGO bricks": ["LEGO bricks/a.png", "LEGO bricks/b.png"]}
    digest = "1"


def test_pictures_of_a_style_take_turns_also_over_rounds():
    two = [style for style in STYLES if style.name in ("LEGO bricks", "anime")]
    batch, planned, files = images({"dog": 12}), [], []
    for _ in range(2):
        done = Plan({"style": 6}, styles=two, style_images=Pictures(), earlier=Before(planned))(batch)
        files += [(style, file) for style, file in zip(done["style"], done["style_file"], strict=True)]
        names = [batch["image_id"][row] for row in done["parent"]]
        planned += [(name, None, "style", "en", style) for name, style in zip(names, done["style"], strict=True)]
    lego = [("LEGO bricks", f"LEGO bricks/{letter}.png") for letter in "ab"]
    assert Counter(files) == {lego[0]: 3, lego[1]: 3, ("anime", None): 6}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": {"crop": 1}}, r"counts names 'crop', which is no task; there are \['add'"),
        ({"languages": {"en": 1, "de": 1}}, r"languages names \['de'\], .* known are \['en', 'zh'\]"),
        ({"counts": {"add": -1}}, "count of 'add' is -1, but must be an integer of at least 0"),
        ({"counts": {"add": 1.5}}, "count of 'add' is 1.5"),
        ({"counts": {"add": True}}, "count of 'add' is True"),
        ({"counts": {"add": "many"}}, "count of 'add' is 'many'"),
        ({"languages": {"en": float("nan")}}, "weight of 'en' is nan, but must be a number of at least 0"),
        ({"languages": {"en": float("inf")}}, "weight of 'en' is inf"),
        ({"languages": {"zh": 0}}, "selects nothing"),
        ({"languages": {}}, "selects nothing"),
        ({"tasks_per_image": 0}, "tasks_per_image=0 must be an integer of at least 1"),
        ({"styles": ()}, "styles must not be empty"),
        ({"styles": (STYLES[0], STYLES[0])}, "have distinct names"),
    ],
)  # fmt: skip
def test_options_that_are_not_usable(options, message):
    with pytest.raises(ValueError, match=message):
        Plan(**options)


def test_an_image_that_is_there_twice():
    with pytest.raises(ValueError, match="The image 'a' occurs more than once, .* run the stage 'duplicates' first"):
        Plan()({"image_id": ["a", "b", "a"], "category": ["dog"] * 3, "tasks": ["add"] * 3})


def test_the_styles():
    assert len(STYLES) > 30
    assert len({style.name.lower() for style in STYLES}) == len(STYLES) == len({style.chinese for style in STYLES})
    for style in STYLES:
        assert style.name.isascii() and style.description.endswith(".") and len(style.description.split()) >= 6
        assert any("\u4e00" <= letter <= "\u9fff" for letter in style.chinese)
