"""How many cases a build takes: the paper's numbers, closed forms, and simulated builds."""

import random
import re
from collections import Counter

import pytest

from hp_edit_trl.data.builder.estimate import TABLE_1, Estimate, assumed_shares, cases_to_plan, least_edits
from hp_edit_trl.data.builder.rounds import Outcome
from hp_edit_trl.tasks import TASKS


COUNTS = {task.name: task.realpref_50k for task in TASKS.values()}


def test_what_the_papers_dataset_takes():
    """Means of table 1 and counts of table S6, in hundredths of a percent, without floating point."""
    shares = {
        "add": 1900,
        "remove": 1500,
        "swap": 2190,
        "background": 4610,
        "color": 6420,
        "bokeh": 8350,
        "relight": 10000,
    }
    shares["style"] = 2660
    edits = least_edits(COUNTS, assumed_shares())
    assert edits == {task: -(-count * 10000 // shares[task]) for task, count in COUNTS.items()}
    assert sum(edits.values()) == 193_575 and set(TABLE_1) == set(TASKS)
    # Below 4, each edit lacks two points; the hardest ones are as many as they are said to be.
    assert assumed_shares(threshold=4)["remove"] == pytest.approx(0.075)
    assert assumed_shares(threshold=3.5)["remove"] == pytest.approx(0.075)
    assert set(assumed_shares("hardest", 0.3).values()) == {0.3}


def test_the_size_of_the_next_round():
    assert cases_to_plan(0, 5, 10) == cases_to_plan(-3, 5, 10) == 0
    # 50 of 100: Wilson's interval at 95 % ends at 0.596.
    assert cases_to_plan(100, 50, 100) == pytest.approx(120 / 0.596, abs=1)
    assert cases_to_plan(7732, 0, 100) == 1000  # nothing was hard: at most ten times what was made
    assert cases_to_plan(7732, 15, 100) == 1000 and cases_to_plan(1, 10, 10) == 3


@pytest.mark.parametrize("share", [0.05, 0.15, 0.9])
def test_rounds_end_soon_and_make_hardly_anything_in_vain(share):
    draw = random.Random(0)
    for _ in range(5):
        hard = planned = rounds = 0
        count = 100
        while count:
            hard += sum(draw.random() < share for _ in range(count))
            planned, rounds = planned + count, rounds + 1
            count = cases_to_plan(5000 - hard, hard, planned)
        assert 5000 <= hard < 1.05 * 5000 and rounds <= 7


def numbers(table):
    """The cells of each task in a table."""
    rows = [re.split(r" *\| *", line)[1:-1] for line in table.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_assumed_before_the_first_edit_and_measured_after_it():
    counts, assumed = {"add": 38, "remove": 30}, {"add": 0.19, "remove": 0.15}
    prices = {"edit": 0.5, "judgement": 0.25, "prompt": 0.1}
    estimate = Estimate(counts, assumed, Outcome(), {"add": 5}, prices)
    assert estimate.planned == {"add": 205, "remove": 200}
    assert estimate.next_round(100) == {"add": 110, "remove": 100}
    assert estimate.next_round(0) == {"add": 210, "remove": 200}
    text = estimate.describe({"add": 205, "remove": 100})  # there are too few images
    cells = numbers(text)
    assert cells["add"] == ["38", "0", "19.0% (assumed)", "205", "38"]
    assert cells["remove"] == ["30", "0", "15.0% (assumed)", "100", "15"] and cells["all"] == [
        "68",
        "0",
        "",
        "305",
        "53",
    ]
    assert "305 edits, as many judgements, and prompts for 305 cases; at 0.5 per edit" in text and ": 259.25." in text
    assert "there may be more to make" in text
    outcome = Outcome(
        planned=Counter(add=100, remove=100), edited=Counter(add=80, remove=100), hard=Counter(add=20),
        solved=Counter(add=60, remove=100),
    )  # fmt: skip
    estimate = Estimate(counts, assumed, outcome)
    assert estimate.planned == {"add": 90, "remove": 6000}
    text = estimate.describe({"add": 90, "remove": 6000})
    cells = numbers(text)
    assert cells["add"] == ["38", "20", "25.0% of 80", "72", "38"] and cells["remove"][:3] == [
        "30",
        "0",
        "0.5% of 100",
    ]
    assert "assumed" not in text.lower() and " at " not in text.splitlines()[-1]
