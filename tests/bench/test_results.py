import json

import numpy as np
import pytest

from hp_edit_trl.bench import compare, read_run, summarize
from hp_edit_trl.bench.results import Run


def cases(seed=0, count=60):
    rng = np.random.default_rng(seed)
    return [
        {
            "id": f"case-{i}",
            "task": ("add", "remove", "style")[i % 3 if i < 30 else 0],
            "language": ("en", "cn")[i % 2],
            "score": None if i % 9 == 4 else float(rng.integers(0, 6)),
            "other": float(rng.uniform()),
            "human": None,
        }
        for i in range(count)
    ]


def row(rows, metric, kind, group=None, section=""):
    (found,) = [
        one
        for one in rows
        if (one["metric"], one["kind"], one["group"], one["section"]) == (metric, kind, group, section)
    ]
    return found


def test_means_of_groups_and_cases():
    data = cases()
    names = "score", "other"
    rows = summarize(data, names, "task", products={"both": names}, ratios={"over": names})
    of = {
        task: [case["score"] for case in data if case["task"] == task and case["score"] is not None]
        for task in ("add", "remove", "style")
    }
    for task, values in of.items():
        found = row(rows, "score", "group", task)
        assert found["value"] == pytest.approx(sum(values) / len(values)) and found["n"] == len(values)
        assert found["low"] < found["value"] < found["high"]
    overall, over_cases = row(rows, "score", "overall"), row(rows, "score", "cases")
    assert overall["value"] == pytest.approx(sum(sum(v) / len(v) for v in of.values()) / 3)
    every = [value for values in of.values() for value in values]
    assert over_cases["value"] == pytest.approx(sum(every) / len(every))
    assert overall["value"] != pytest.approx(over_cases["value"])
    assert (overall["n"], overall["missing"]) == (len(every), len(data) - len(every))
    product, both = (
        row(rows, "both", "cases"),
        [case for case in data if None not in (case["score"], case["other"])],
    )
    factors = [np.mean([case[name] for case in both]) for name in ("score", "other")]
    assert product["value"] == pytest.approx(factors[0] * factors[1]) and product["n"] == len(both) < len(data)
    ratio = row(rows, "over", "cases")
    assert ratio["value"] == pytest.approx(factors[0] / factors[1]) and ratio["n"] == len(both)
    assert ratio["low"] < ratio["value"] < ratio["high"]
    zero = summarize([case | {"other": 0.0} for case in data], names, "task", ratios={"over": names})
    by_zero = row(zero, "over", "cases")
    assert (by_zero["value"], by_zero["reason"]) == (None, "the mean to divide by is 0")


def test_intervals_are_those_of_resampling_within_groups():
    data = cases()
    rng = np.random.default_rng(1)
    resampled = []
    for _ in range(4000):
        means = []
        for task in ("add", "remove", "style"):
            members = [case for case in data if case["task"] == task]
            drawn = [members[i]["other"] for i in rng.integers(0, len(members), len(members))]
            means.append(np.mean(drawn))
        resampled.append(np.mean(means))
    found = row(summarize(data, ["other"], "task", num_resamples=4000), "other", "overall")
    expected = np.quantile(resampled, [0.025, 0.975])
    assert [found["low"], found["high"]] == pytest.approx(expected.tolist(), abs=0.006)


@pytest.mark.parametrize(
    ("tasks", "missing", "alone"),
    [
        ("aabcdef", (), "b, c, d, e, f"),  # seven cases in six tasks
        ("aabbbbb", (), None),
        ("ab", (), "a, b"),
        ("aaab", (), "b"),
        ("aaabb", (4,), "b"),  # only one of its cases has a score
    ],
)
def test_an_interval_needs_two_cases_of_every_task(tasks, missing, alone):
    data = [
        {"id": str(i), "task": task, "score": None if i in missing else 1.0 + i % 2, "human": None}
        for i, task in enumerate(tasks)
    ]
    rows = summarize(data, ["score"], "task")
    worse = [case | {"score": None if case["score"] is None else case["score"] - 1} for case in data]
    differences = compare(make_run("a", data), make_run("b", worse))
    for kind in ("overall", "cases"):
        found, difference = row(rows, "score", kind), row(differences, "score", kind)
        if alone is None:
            assert found["low"] < found["value"] < found["high"] and found["reason"] is None
            assert difference["low"] == pytest.approx(-1) and difference["value"] == pytest.approx(-1)
            continue
        assert found["value"] is not None and found["low"] is found["high"] is None
        assert found["reason"] == f"no interval from only one case with a value of {alone}"
        assert difference["value"] == pytest.approx(-1) and difference["low"] is None
        assert difference["reason"] == f"no interval from only one case with a value in both of {alone}"
    if tasks == "aabcdef":
        assert row(rows, "score", "group", "a")["low"] is not None  # two cases of its own
        assert row(rows, "score", "group", "b")["reason"] == "no interval from one case"


def test_sections_are_summed_up_by_themselves():
    data = cases()
    sections = {"en": {"language": "en"}, "cn, added": {"language": "cn", "task": "add"}}
    rows = summarize(data, ["other"], "task", sections)
    added = [case["other"] for case in data if (case["language"], case["task"]) == ("cn", "add")]
    assert row(rows, "other", "cases", section="cn, added")["value"] == pytest.approx(np.mean(added))
    assert row(rows, "other", "cases", section="en")["n"] == 30


def test_a_group_without_any_value_leaves_no_overall():
    data = [case | {"score": None} if case["task"] == "style" else case for case in cases()]
    rows = summarize(data, ["score"], "task")
    assert row(rows, "score", "group", "style")["value"] is None
    overall = row(rows, "score", "overall")
    assert overall["value"] is None and overall["reason"] == "a group has no value"
    assert row(rows, "score", "cases")["value"] is not None
    assert summarize([], ["score"], "task")[0]["reason"] == "no case has a value"
    with pytest.raises(ValueError, match="score of case 'a' is inf"):
        summarize([{"id": "a", "task": "x", "score": float("inf")}], ["score"], "task")


def make_run(folder, data, **benchmark):
    settings = {
        "metrics": {"score": {"label": "S", "maximum": 5.0}},
        "products": {},
        "ratios": {},
        "group": "task",
        "sections": {"": {}},
        "judge": "j",
    }
    return Run(folder, str(folder), {"benchmark": settings | benchmark}, data, {})


def test_two_runs_are_compared_on_the_cases_of_both():
    data = cases()
    better = [case | {"score": None if case["score"] is None else case["score"] + 0.5} for case in data]
    better[0]["score"] = None
    rows = compare(make_run("a", data), make_run("b", better))
    overall = row(rows, "score", "overall")
    # Every shared case is better by the same, so that nothing is left to chance.
    assert [overall[name] for name in ("value", "low", "high")] == pytest.approx([0.5] * 3)
    assert overall["missing"] == 1 + sum(case["score"] is None for case in data)
    back = row(compare(make_run("b", better), make_run("a", data)), "score", "overall")
    assert back["value"] == pytest.approx(-0.5)
    with pytest.raises(ValueError, match="their judge differ, the first being 'j' and 'k'"):
        compare(make_run("a", data), make_run("b", better, judge="k"))


def test_folders_that_are_no_finished_runs_of_this_format(tmp_path):
    with pytest.raises(ValueError, match="no readable file run.json"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format": 3, "editor": {"name": "e"}})[:-3])
    with pytest.raises(ValueError, match="no readable file run.json"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format": 3, "editor": {"name": "e"}}))
    with pytest.raises(ValueError, match="did not finish: run `hp-edit bench`"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format": 7, "versions": {"hp-edit-trl": "9.1"}}))
    with pytest.raises(ValueError, match=r"in format 7, written by hp-edit-trl 9.1; this version reads format 3"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format": 3, "editor": {"name": "e"}}))
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "cases.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(ValueError, match="cases.parquet cannot be read"):
        read_run(tmp_path)
