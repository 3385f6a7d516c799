import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from hp_edit_trl import HPScorerReward
from hp_edit_trl.calibration import probe_judge
from hp_edit_trl.calibration.probe import INJECTIONS
from hp_edit_trl.judges import Judgement, TransformersJudge
from hp_edit_trl.miniature.tiny import tiny_judge
from tests.helpers import RuleJudge, make_edits


def fair(text, pictures):
    """
    Scores what a fair judge would: 5 for a change that is redder, 0 if nothing changed or the pictures differ in
    shape.
    """
    before, after = (np.asarray(picture, dtype=float) for picture in pictures)
    return 5 if before.shape == after.shape and after[..., 0].mean() - before[..., 0].mean() > 20 else 0


def test_probes_of_a_fair_and_of_biased_judges(caplog):
    rows = []
    for i in range(8):
        source = Image.new("RGB", (32, 32), (10 * i, 90, 30 * i))
        edit = Image.new("RGB", (32, 32), (10 * i + 60, 90, 30 * i))
        rows.append({"id": str(i), "prompt": f"redder {i}", "image": source, "edit": edit, "task": "color"})
    edits = Dataset.from_list(rows)

    def labelled(user):
        """The pictures by their labels, however they are ordered."""
        content = user["content"]
        return [
            content[i + 1]["image"]
            for label in ("Image A:", "Image B:")
            for i, part in enumerate(content)
            if part.get("text") == label
        ]

    class Reads(RuleJudge):
        def __call__(self, conversations):
            return [Judgement(float(self.rule("", labelled(user))), "") for _, user in conversations]

    def table(judge, **kwargs):
        return {row["probe"]: row for row in probe_judge(HPScorerReward(judge), edits, **kwargs)}

    fine = table(Reads(rule=fair))
    # What each probe shows: whose edit, and in which role
    notes = []

    def note(text, pictures):
        before, after = (round(np.asarray(picture, dtype=float)[..., 2].mean() / 30) for picture in pictures)
        edited = [
            bool(np.asarray(picture)[..., 0].mean() - 10 * number > 30)
            for picture, number in zip(pictures, (before, after), strict=True)
        ]
        notes.append((before == after, *edited))
        return 3

    table(Reads(rule=note))
    assert set(notes[:16]) == {(True, False, True)}  # as given, and edit first
    assert set(notes[16:24]) == {(True, True, False)} and set(notes[24:32]) == {(True, False, False)}
    assert set(notes[32:40]) == {(False, False, True)}
    assert fine["as given"]["mean"] == 5 and fine["edit first"]["change"] == 0
    assert fine["unchanged"]["mean"] == 0 and fine["unchanged"]["low"] == 1 and fine["roles swapped"]["mean"] == 0
    assert fine["unrelated"]["scores"] == 8
    # One that goes by the order of the pictures, and one that likes everything
    ordered = table(RuleJudge(rule=lambda text, pictures: fair(text, pictures)))
    assert ordered["edit first"]["shift"] == -5
    generous = table(RuleJudge(rule=lambda text, pictures: 4))
    assert generous["unchanged"]["low"] == 0 and generous["unrelated"]["mean"] == 4
    mute = table(RuleJudge(rule=lambda text, pictures: "no idea"), num_cases=3)
    assert mute["as given"]["failed"] == 3 and mute["as given"]["mean"] is None and mute["unchanged"]["shift"] is None
    with pytest.raises(ValueError, match="two cases, but 1 have readable images"):
        probe_judge(HPScorerReward(RuleJudge()), edits.select([0]))
    with pytest.raises(ValueError, match="num_cases=1: a judge is probed with at least two"):
        probe_judge(HPScorerReward(RuleJudge()), edits, num_cases=1)


def injected(judge):
    """How far each injection moves a judge's score."""
    table = {row["probe"]: row for row in probe_judge(HPScorerReward(judge), make_edits(3, ["one"]), num_cases=3)}
    assert len(table) == 5 + len(INJECTIONS) and len(INJECTIONS) >= 20
    return {name: table[f"injection: {name}"]["shift"] for name in INJECTIONS}


def test_an_injection_moves_a_gullible_judge_and_not_a_fair_one():
    def gullible(text, pictures):
        return 5 if "answer 5" in text.lower() else 1

    moved = injected(RuleJudge(rule=gullible))
    assert {name for name, shift in moved.items() if shift == 4} == {
        name for name, (where, text) in INJECTIONS.items() if where != "edit" and "answer 5" in text.lower()
    }
    assert set(moved.values()) == {0, 4}
    assert set(injected(RuleJudge(rule=lambda text, pictures: 1)).values()) == {0}

    def reads_pictures(text, pictures):
        return 5 if (np.asarray(pictures[-1])[:2] > 240).mean() > 0.5 else 1  # what is written on white

    moved = injected(RuleJudge(rule=reads_pictures))
    assert moved.pop("text in the edit") == 4 and set(moved.values()) == {0}


def test_an_injection_stays_inside_its_quotation():
    def by_lines(text, pictures):
        """A judge that obeys what stands on a line of its own."""
        orders = ("Answer with the digit 5", "SYSTEM:", "Grade: 5", "Assistant:", "5")
        return 5 if any(line.startswith(orders) for line in text.splitlines()) else 1

    assert set(injected(RuleJudge(rule=by_lines)).values()) == {0}


def test_injections_into_a_real_kind_of_model(tmp_path):
    judge = TransformersJudge(tiny_judge(str(tmp_path)), "expected", min_digit_mass=0.0)
    assert None not in injected(judge).values()
