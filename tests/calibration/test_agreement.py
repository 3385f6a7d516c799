"""
Statistics of agreement against scipy, brute force, exact enumeration and published numbers; where they are undefined.
"""

import itertools
import warnings

import numpy as np
import pytest
from scipy import stats

from hp_edit_trl.calibration import agreement, agreement_difference, krippendorff_alpha, krippendorff_interval
from hp_edit_trl.calibration.agreement import STATISTICS, rounded, statistic_of
from hp_edit_trl.utils.statistics import mean_with_interval


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def simulated(num_cases, seed, editors=3):
    """Ratings that are means of three, whole scores, and the case of each edit."""
    rng = np.random.default_rng(seed)
    cases = np.repeat(np.arange(num_cases), editors)
    human = rng.integers(0, 16, len(cases)) / 3
    return human, np.clip(rounded(human + rng.normal(0, 1, len(cases))), 0, 5).astype(float), cases


def by_hand(human, scores):
    """What the statistics are, from scipy and from loops over edits and pairs."""
    edits = list(zip(human, scores, strict=True))
    pairs = list(itertools.combinations(edits, 2))
    whole = [(int(h + 0.5), int(s + 0.5)) for h, s in edits]
    return {
        "pearson": stats.pearsonr(human, scores).statistic,
        "spearman": stats.spearmanr(human, scores).statistic,
        "kendall": stats.kendalltau(human, scores).statistic,
        "mae": sum(abs(s - h) for h, s in edits) / len(edits),
        "exact": sum(h == s for h, s in whole) / len(edits),
        "within_one": sum(abs(h - s) <= 1 for h, s in whole) / len(edits),
        "bias": sum(scores) / len(edits) - sum(human) / len(edits),
        "ties_human": sum(a[0] == b[0] for a, b in pairs) / len(pairs),
        "ties_scorer": sum(a[1] == b[1] for a, b in pairs) / len(pairs),
    }


@pytest.mark.parametrize("expected_score", [False, True])
def test_statistics_are_those_of_scipy_and_of_brute_force(expected_score):
    human, scores, _ = simulated(25, seed=1)
    if expected_score:
        scores = np.clip(human + np.random.default_rng(2).normal(size=len(human)), 0, 5)
    result = agreement(human, scores, num_resamples=0)["overall"]
    for name, value in by_hand(human, scores).items():
        assert result[name]["value"] == pytest.approx(value, abs=1e-12), name
        assert result[name]["low"] is None and result[name]["reason"] == "no resample has a value"
    confusion = np.zeros((6, 6), int)
    for h, s in zip(human, scores, strict=True):
        confusion[int(h + 0.5), int(s + 0.5)] += 1
    assert result["confusion"] == confusion.tolist()
    # A pair-by-pair tau-b, so that not only two libraries agree.
    signs = [
        (np.sign(human[i] - human[j]), np.sign(scores[i] - scores[j]))
        for i, j in itertools.combinations(range(len(human)), 2)
    ]
    untied = [sum(pair[side] != 0 for pair in signs) for side in (0, 1)]
    assert result["kendall"]["value"] == pytest.approx(sum(a * b for a, b in signs) / np.sqrt(np.prod(untied)))


def test_weights_are_copies():
    """A resample, given as how often each edit occurs, has the statistics of the edits written out that often."""
    human, scores, _ = simulated(12, seed=3)
    weights = np.random.default_rng(4).multinomial(len(human), np.full(len(human), 1 / len(human)), size=5)
    for times in weights:
        found = {name: statistic_of(name, human, scores, times) for name in STATISTICS}
        expected = by_hand(np.repeat(human, times), np.repeat(scores, times))
        for name in set(STATISTICS) - {"ties_human", "ties_scorer"}:
            assert found[name] == pytest.approx(expected[name], abs=1e-12), name
        # Copies of one edit are no tie between two.
        edit = np.repeat(np.arange(len(human)), times)
        ties = [human[i] == human[j] for i, j in itertools.combinations(edit, 2) if i != j]
        assert found["ties_human"] == pytest.approx(np.mean(ties))


def test_halves_are_rounded_up():
    assert rounded(np.array([0, 0.49, 0.5, 1.5, 2.5, 4.5, 5])).tolist() == [0, 0, 1, 2, 3, 5, 5]


def test_a_scorer_like_people_and_a_shifted_one():
    human, _, cases = simulated(20, seed=5)
    same = agreement(human, human, clusters=cases, num_resamples=50)["overall"]
    for name, value in dict(pearson=1, spearman=1, kendall=1, mae=0, exact=1, within_one=1, bias=0).items():
        assert [same[name][key] for key in ("value", "low", "high")] == pytest.approx([value] * 3), name
    low = human / 5 * 3
    shifted = agreement(low, low + 2, clusters=cases, num_resamples=50)["overall"]
    assert shifted["pearson"]["value"] == pytest.approx(1) and shifted["bias"]["value"] == pytest.approx(2)
    assert shifted["mae"]["value"] == pytest.approx(2) and shifted["within_one"]["value"] == 0
    assert agreement(human, 5 - human, num_resamples=0)["overall"]["kendall"]["value"] == pytest.approx(-1)


# A world whose agreement is known: a true quality from 1 to 4, to which people and the scorer add independent noise.
# Three models' edits of one case have one quality and the same noise of the scorer, and people's noise is each edit's
# own.
NOISE = {-1: 0.25, 0: 0.5, 1: 0.25}


def population():
    """The exact Pearson correlation and bias, by enumeration."""
    joint = [
        (quality + a, min(quality + b + 1, 5), 0.25 * p * q)
        for quality in range(1, 5)
        for a, p in NOISE.items()
        for b, q in NOISE.items()
    ]
    human, scores, weight = np.array(joint).T
    x, y = human - weight @ human, scores - weight @ scores
    return weight @ (x * y) / np.sqrt((weight @ x**2) * (weight @ y**2)), weight @ (scores - human)


def test_intervals_of_cases_cover_what_they_should_and_those_of_edits_do_not():
    truth = dict(zip(("pearson", "bias"), population(), strict=True))
    assert 0.6 < truth["pearson"] < 0.8
    covered = {"pearson": 0, "bias": 0}
    naive = {"pearson": 0, "bias": 0}
    runs = 200
    for seed in range(runs):
        rng = np.random.default_rng([7, seed])
        draw = lambda size: rng.choice(list(NOISE), p=list(NOISE.values()), size=size)  # noqa: B023, E731
        cases = np.repeat(np.arange(60), 3)
        quality = rng.integers(1, 5, 60)
        human, scores = quality[cases] + draw(180), np.minimum(quality + draw(60) + 1, 5)[cases]
        options = dict(statistics=("pearson", "bias"), confidence=0.9, num_resamples=100, seed=seed)
        for count, clusters in ((covered, cases), (naive, None)):
            result = agreement(human, scores, clusters=clusters, **options)["overall"]
            for name in count:
                count[name] += result[name]["low"] <= truth[name] <= result[name]["high"]
    for name in covered:  # 90 % nominal; three standard errors of 200 runs are 6.4 %
        assert 0.82 <= covered[name] / runs <= 0.965, (name, covered)
        assert naive[name] < covered[name] - 0.08 * runs, (name, naive, covered)


def test_paired_intervals_cover_and_are_narrower_than_the_difference_of_two_intervals():
    """Scorer b is a with half of its noise taken away; both share what they misjudge."""
    covered, widths = 0, []
    big = np.random.default_rng(0)

    def world(rng, cases):
        quality, shared = rng.uniform(1, 4, cases), rng.normal(0, 0.5, cases)
        human = quality + np.clip(rng.normal(0, 0.3, cases), -1, 1)
        judged = np.clip(quality + np.clip(shared, -1, 1), 0, 5)
        return (
            human,
            np.clip(judged + rng.normal(0, 0.6, cases), 0, 5),
            np.clip(judged + rng.normal(0, 0.3, cases), 0, 5),
        )

    human, a, b = world(big, 400_000)
    truth = stats.pearsonr(human, b).statistic - stats.pearsonr(human, a).statistic
    assert truth > 0.05
    for seed in range(150):
        human, a, b = world(np.random.default_rng([1, seed]), 60)
        result = agreement_difference(human, a, b, confidence=0.9, num_resamples=100, seed=seed)
        covered += result["low"] <= truth <= result["high"]
        options = dict(statistics=["pearson"], confidence=0.9, num_resamples=100, seed=seed)
        parts = [agreement(human, s, **options)["overall"]["pearson"] for s in (a, b)]
        widths.append((result["high"] - result["low"], np.hypot(*(p["high"] - p["low"] for p in parts))))
    assert 0.81 <= covered / 150 <= 0.975
    paired, unpaired = np.mean(widths, axis=0)
    assert paired < 0.95 * unpaired


def test_paired_difference_says_which_way_and_leaves_out_what_one_did_not_score():
    human, scores, cases = simulated(30, seed=8)
    better = (human + scores) / 2
    scores = scores.tolist()
    scores[4] = None
    better[7] = np.nan
    kept = [i for i in range(len(human)) if i not in (4, 7)]
    result = agreement_difference(human, scores, better, cases, "mae", num_resamples=100)
    a, b = (np.mean([abs(s[i] - human[i]) for i in kept]) for s in (scores, better))
    assert (result["n"], result["missing"], result["statistic"]) == (88, 2, "mae")
    assert [result["a"], result["b"], result["difference"]] == pytest.approx([a, b, b - a])
    assert result["low"] <= result["difference"] <= result["high"] < 0
    same = agreement_difference(human, scores, scores, cases)
    assert same["difference"] == same["low"] == same["high"] == 0
    constant = agreement_difference(human, scores, [3] * len(human), cases)
    assert constant["difference"] is None and constant["b"] is None and constant["a"] is not None
    assert constant["low"] is None and constant["reason"] == "the scorer gave all edits the same score"
    with pytest.raises(ValueError, match="no statistic 'r2'"):
        agreement_difference(human, scores, better, cases, "r2")
    with pytest.raises(ValueError, match="90 human values, 90 and 3 scores"):
        agreement_difference(human, scores, [1, 2, 3], cases)


def test_groups_are_what_they_are_alone_and_their_mean_is_unweighted():
    human, scores, cases = simulated(40, seed=9)
    groups = ["bokeh" if case < 30 else "add" for case in cases]
    both = agreement(human, scores, groups, cases, num_resamples=100)
    alone = [i for i, group in enumerate(groups) if group == "add"]
    add = agreement(human[alone], scores[alone], ["add"] * len(alone), cases[alone], num_resamples=100)["groups"][
        "add"
    ]
    assert list(both["groups"]) == ["add", "bokeh"] and both["groups"]["add"] == add
    assert (add["n"], add["clusters"], both["overall"]["n"], both["overall"]["clusters"]) == (30, 10, 120, 40)
    pearson = [both["groups"][name]["pearson"]["value"] for name in ("add", "bokeh")]
    assert both["mean_of_groups"]["value"] == pytest.approx(np.mean(pearson))
    assert both["mean_of_groups"]["low"] < both["mean_of_groups"]["value"] < both["mean_of_groups"]["high"]
    confusion = np.array([both["groups"][name]["confusion"] for name in ("add", "bokeh")]).sum(0)
    assert both["overall"]["confusion"] == confusion.tolist()


def test_the_seed_decides_the_resamples():
    human, scores, cases = simulated(20, seed=10)
    first, again, other = (agreement(human, scores, clusters=cases, num_resamples=50, seed=s) for s in (1, 1, 2))
    assert first == again and first["overall"]["pearson"]["value"] == other["overall"]["pearson"]["value"]
    assert first["overall"]["pearson"]["low"] != other["overall"]["pearson"]["low"]
    before = np.random.get_state()[1].tolist()
    agreement(human, scores, num_resamples=5)
    assert np.random.get_state()[1].tolist() == before  # no global generator


def test_only_the_statistics_that_were_asked_for_are_computed():
    human, scores, cases = simulated(12, seed=13)
    groups = ["a" if case < 6 else "b" for case in cases]
    whole = agreement(human, scores, groups, cases, num_resamples=20)
    some = agreement(human, scores, groups, cases, statistics=["mae", "pearson"], num_resamples=20)
    for name, values in whole["groups"].items():
        assert some["groups"][name] == {
            key: values[key] for key in values.keys() - set(STATISTICS) | {"mae", "pearson"}
        }
    assert some["mean_of_groups"] == whole["mean_of_groups"]
    assert agreement(human, scores, groups, cases, statistics=["mae"])["mean_of_groups"] is None
    with pytest.raises(ValueError, match="There is no statistic 'r2'"):
        agreement(human, scores, statistics=["mae", "r2"])


def test_missing_scores_are_counted_and_left_out():
    human, scores, _ = simulated(10, seed=11)
    gaps = scores.tolist()
    gaps[0], gaps[1] = None, float("nan")
    result = agreement(human, gaps, ["a"] * 15 + ["b"] * 15, num_resamples=20)
    assert (result["overall"]["n"], result["overall"]["missing"]) == (28, 2)
    assert [result["groups"][name]["missing"] for name in "ab"] == [2, 0]
    without = agreement(human[2:], scores[2:], num_resamples=0)["overall"]
    for name in STATISTICS:
        assert result["overall"][name]["value"] == pytest.approx(without[name]["value"])


def test_what_is_undefined_is_none_with_a_reason():
    nothing = agreement([1, 2, 3], [None] * 3, ["a"] * 3, num_resamples=10)
    assert nothing["overall"]["missing"] == nothing["groups"]["a"]["missing"] == 3
    assert all(nothing["overall"][name]["value"] is None for name in STATISTICS)
    assert nothing["overall"]["mae"]["reason"] == "no edit has a score"
    assert nothing["mean_of_groups"]["value"] is None and nothing["mean_of_groups"]["left_out"] == ["a"]

    flat = agreement([1, 2, 3, 4], [2, 2, 2, 2], num_resamples=20)["overall"]
    for name in ("pearson", "spearman", "kendall"):
        assert (flat[name]["value"], flat[name]["reason"]) == (None, "the scorer gave all edits the same score")
    assert flat["bias"]["value"] == -0.5 and flat["ties_scorer"]["value"] == 1 and flat["ties_human"]["value"] == 0
    assert agreement([2, 2, 2], [1, 2, 3])["overall"]["pearson"]["reason"] == "people gave all edits the same score"

    two = agreement([1, 2], [1, 3], num_resamples=20)["overall"]
    assert (two["pearson"]["value"], two["pearson"]["reason"]) == (None, "fewer than 3 edits")
    assert two["mae"]["value"] == 0.5 and two["mae"]["low"] is not None

    one_case = agreement([1, 2, 4], [1, 3, 4], clusters=["x"] * 3)["overall"]
    assert one_case["pearson"]["value"] is not None and one_case["pearson"]["low"] is None
    assert one_case["pearson"]["reason"] == "no interval from one case"

    # 4 edits: many resamples hold fewer than three of them, or are constant.
    few = agreement([1, 1, 1, 4], [1, 2, 1, 5], num_resamples=400)["overall"]
    assert 0 < few["pearson"]["undefined_resamples"] < 400 and few["mae"]["undefined_resamples"] == 0
    # A resample without the last edit is constant: (3/4)^4 of them, and more have fewer than 3 edits.
    assert few["pearson"]["undefined_resamples"] > 0.25 * 400


def test_groups_of_one_case_vary_together():
    """One case per task: each alone has no interval, all together have one."""
    human, scores, cases = simulated(6, seed=12)
    result = agreement(human, scores, [f"task {case}" for case in cases], cases, num_resamples=100)
    assert all(values["mae"]["low"] is None for values in result["groups"].values())
    assert result["overall"]["mae"]["low"] < result["overall"]["mae"]["high"]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(human=[1, 6, 2]), r"human\[1\] is 6"),
        (dict(human=[1, float("nan"), 2]), r"human\[1\] is nan"),
        (dict(human=[1, None, 2]), r"human\[1\] is None"),
        (dict(scores=[1, 2, float("inf")]), r"scores\[2\] is inf"),
        (dict(scores=[1, -0.1, 2]), r"scores\[1\] is -0.1"),
        (dict(scores=[1, "good", 2]), "scores must hold numbers"),
        (dict(scores=[1, 2]), "3 human values and 2 scores"),
        (dict(clusters=["a"]), "3 edits and 1 clusters"),
        (dict(groups=["a"]), "3 edits and 1 groups"),
        (dict(groups=["a", "b", "b"], clusters=["x", "x", "y"]), "'x' has edits in the groups 'a' and 'b'"),
        (dict(confidence=95), "confidence=95 must be between 0 and 1"),
        (dict(num_resamples=-1), "num_resamples=-1"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        agreement(**{"human": [1, 2, 3], "scores": [1, 2, 3], **kwargs})


def test_means_have_intervals():
    result = mean_with_interval([1, 2, 3, 4], clusters=["x", "x", "y", "y"], num_resamples=300)
    assert [result[key] for key in ("value", "low", "high")] == [2.5, 1.5, 3.5]  # the resamples are xx, xy and yy
    uneven = mean_with_interval([1, 5, 1, 1], clusters=["x", "y", "x", "x"], num_resamples=300)
    assert [uneven[key] for key in ("value", "low", "high")] == [2, 1, 5]
    assert mean_with_interval([])["value"] is None


# The ratings of 12 units by 4 observers that Krippendorff (2011) works through, with what he finds.
OBSERVERS = {
    "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    "C": [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
}
PUBLISHED = [(name, unit, v) for name, row in OBSERVERS.items() for unit, v in enumerate(row) if v is not None]


@pytest.mark.parametrize("level, alpha", [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_is_the_published_one(level, alpha):
    assert krippendorff_alpha(PUBLISHED, level) == pytest.approx(alpha, abs=5e-4)


def alpha_by_pairs(ratings, level):
    """From all pairs of ratings: of one item, and of all items. No coincidence matrix."""
    items = {}
    for _, item, value in ratings:
        items.setdefault(item, []).append(value)
    items = [given for given in items.values() if len(given) > 1]
    everything = [value for given in items for value in given]

    def distance(a, b):
        if level == "nominal":
            return float(a != b)
        if level == "interval":
            return float((a - b) ** 2)
        between = sum(min(a, b) <= value <= max(a, b) for value in everything)
        return (between - (everything.count(a) + everything.count(b)) / 2) ** 2 if a != b else 0.0

    observed = sum(sum(distance(a, b) for a, b in itertools.permutations(g, 2)) / (len(g) - 1) for g in items)
    expected = sum(distance(a, b) for a, b in itertools.permutations(everything, 2)) / (len(everything) - 1)
    return 1 - observed / expected


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_is_that_of_brute_force_with_ratings_missing(level):
    assert alpha_by_pairs(PUBLISHED, level) == pytest.approx(krippendorff_alpha(PUBLISHED, level))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        true = rng.integers(0, 6, 20)
        ratings = [
            (name, item, int(np.clip(true[item] + rng.integers(-1, 2), 0, 5)))
            for name in "abcd"
            for item in range(20)
            if rng.random() < 0.6
        ]
        assert krippendorff_alpha(ratings, level) == pytest.approx(alpha_by_pairs(ratings, level), abs=1e-12)


def test_alpha_of_agreement_of_chance_and_of_opposition():
    rng = np.random.default_rng(0)
    assert krippendorff_alpha([(name, item, item % 6) for name in "ab" for item in range(12)]) == pytest.approx(1)
    chance = [(name, item, int(rng.integers(0, 6))) for name in "ab" for item in range(3000)]
    assert abs(krippendorff_alpha(chance)) < 0.06
    assert krippendorff_alpha([("a", i, i % 2) for i in range(8)] + [("b", i, 1 - i % 2) for i in range(8)]) < -0.5


def test_alpha_has_an_interval_over_items_or_their_clusters():
    rng = np.random.default_rng(1)
    true = rng.integers(0, 6, 40)
    ratings = [(n, i, int(np.clip(true[i] + rng.integers(-1, 2), 0, 5))) for n in "abc" for i in range(40)]
    result = krippendorff_interval(ratings, num_resamples=200)
    assert result["low"] < result["value"] < result["high"] and result["items"] == 40
    assert result["value"] == krippendorff_alpha(ratings)
    one = krippendorff_interval(ratings, clusters=dict.fromkeys(range(40), "case"), num_resamples=20)
    assert one["low"] is None and one["reason"] == "no interval from one case"
    # Of two items, a resample holds each once or one of them twice, which can be written out.
    two = [rating for rating in ratings if rating[1] in (0, 1)]
    twice = [[(n, f"{i}{copy}", v) for n, i, v in two if i == kept for copy in "xy"] for kept in (0, 1)]
    expected = [value for value in map(krippendorff_alpha, [two, *twice]) if value is not None]
    bounds = krippendorff_interval(two, num_resamples=100, confidence=0.9999999)
    assert [bounds["low"], bounds["high"]] == pytest.approx([min(expected), max(expected)], abs=1e-6)
    assert bounds["undefined_resamples"] == 0 or len(expected) < 3


def test_alpha_is_none_where_it_is_undefined():
    assert krippendorff_interval([])["reason"] == "there is only one annotator"
    one = krippendorff_interval([("a", item, item) for item in range(4)])
    assert (one["value"], one["reason"], one["items"]) == (None, "there is only one annotator", 0)
    apart = krippendorff_interval([("a", 1, 1), ("b", 2, 2)])
    assert (apart["value"], apart["reason"]) == (None, "no edit was rated by two annotators")
    same = krippendorff_interval([("a", 1, 2), ("b", 1, 2), ("a", 2, 2), ("b", 2, 2)])
    assert (same["value"], same["reason"]) == (None, "all ratings are the same")
    with pytest.raises(ValueError, match="rated twice by 'a'"):
        krippendorff_alpha([("a", 1, 1), ("a", 1, 2)])
    with pytest.raises(ValueError, match="item 1 by 'a' is None"):
        krippendorff_alpha([("a", 1, None)])
    with pytest.raises(ValueError, match="no level 'ratio'"):
        krippendorff_alpha(PUBLISHED, "ratio")
