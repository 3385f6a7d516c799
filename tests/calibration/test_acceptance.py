import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hp_edit_trl.calibration import acceptance_power, swap_test
from hp_edit_trl.calibration.acceptance import GAINS, one_sided_level


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def simulation():
    """`benchmarks/acceptance.py`, whose tables are in the documentation."""
    spec = importlib.util.spec_from_file_location("acceptance_benchmark", ROOT / "benchmarks" / "acceptance.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def at_most(level, runs):
    """Four standard errors of a simulation above a level."""
    return level + 4 * np.sqrt(level * (1 - level) / runs)


def test_a_true_gain_is_accepted_and_chance_is_not(simulation):
    world, runs = simulation.World(), 300  # 100 cases with three edits each
    passed, accepted = simulation.rates(world, runs)
    assert 0.025 / 4 < passed < at_most(0.025, runs) and accepted <= passed
    # What the calibration cases taught whoever wrote the candidate does not count
    passed, accepted = simulation.rates(world, runs, overfit=True)
    assert accepted == passed < at_most(0.025, runs)
    assert simulation.rates(world, 100, overfit=True, on_all=True)[1] > 2 * at_most(0.025, 100)
    assert simulation.rates(replace(world, after=0.85), 100)[1] > 0.95
    few = [
        simulation.rates(simulation.World(50, 1, after=0.85, validation_fraction=part), runs)[1] for part in (0.5, 0.8)
    ]
    assert few[0] < few[1] < 0.6  # one edit of each of 50 cases is too little


def test_the_plan_is_close_to_the_simulation_and_below_it(simulation):
    for cases, edits in ((100, 1), (100, 3)):
        world = simulation.World(cases, edits)
        human = world.draw(np.random.default_rng(0), cases, world.sizes)[0].ravel()
        planned = acceptance_power(human, np.repeat(np.arange(cases), edits), before=0.7)
        found = simulation.rates(replace(world, after=0.85), 200)[1]
        assert found - 0.25 < planned[2]["power"] < found + 0.05
    assert [one["gain"] for one in planned] == list(GAINS)
    assert planned[0]["power"] < planned[1]["power"] < planned[2]["power"]
    assert planned[0]["cases"] > 300 and planned[2]["cases"] < 100


def test_the_plan_of_other_statistics_and_of_what_cannot_be():
    rng = np.random.default_rng(0)
    human = rng.integers(0, 6, 120) * 1.0
    cases = np.repeat(np.arange(40), 3)
    for statistic, before in (("spearman", 0.6), ("kendall", 0.5), ("mae", 1.0)):
        found = acceptance_power(human, cases, statistic, before, num_simulations=50)
        assert 0 < found[0]["power"] < found[2]["power"] <= 1
    # A correlation above 1, and one that people who always say the same cannot have
    assert [one["power"] for one in acceptance_power(human, cases, before=0.95)][1:] == [None, None]
    assert all(one["power"] is None and one["cases"] is None for one in acceptance_power(human * 0 + 3, cases))
    # Eight tasks with 1/8 of the edits tell about as much as one with all of them
    groups = np.arange(120) // 15
    pooled, one = (acceptance_power(human, cases, groups=of)[2]["power"] for of in (groups, None))
    assert pooled == pytest.approx(one, abs=0.2)


def test_levels_of_all_looks_add_up():
    assert sum(one_sided_level(look) for look in range(1, 5000)) == pytest.approx(0.05, abs=1e-4)
    assert one_sided_level(1) == pytest.approx(0.025)


def test_another_part_of_the_scale_is_no_gain_and_no_loss():
    rng = np.random.default_rng(1)
    human = rng.normal(size=90)
    before, after = human + 1.5 * rng.normal(size=90), human + 0.8 * rng.normal(size=90)
    p = swap_test(human, before, after, np.arange(90))
    assert p < 0.2
    assert swap_test(human, before, 0.1 * after + 4, np.arange(90)) == p
    assert swap_test(human, before, before, np.arange(90)) == 1
    assert swap_test(human, before, human * 0, np.arange(90)) == 1  # undefined


def test_the_gains_of_tasks_are_pooled():
    rng = np.random.default_rng(2)
    human = rng.normal(size=240)
    before, after = human + 1.5 * rng.normal(size=240), human + rng.normal(size=240)
    groups = np.arange(240) % 8
    each = [swap_test(*(x[groups == g] for x in (human, before, after)), np.arange(30)) for g in range(8)]
    assert swap_test(human, before, after, np.arange(240), groups=groups) < 0.01 < np.median(each)
    # A task in which a gain is undefined is left out
    human[groups == 0] = 3
    assert swap_test(human, before, after, np.arange(240), groups=groups) < 0.05
