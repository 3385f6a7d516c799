"""The stage that scores edits, as a function of batches."""

import pytest
from PIL import Image

from hp_edit_trl import HPScorerReward
from hp_edit_trl.data.builder.scores import ScoreEdits
from hp_edit_trl.judges import Judgement, JudgeRefusedError
from tests.data.builder.test_edits import batch
from tests.data.builder.toy_build import encoded
from tests.helpers import RuleJudge


def scored(rule=None, **changes):
    rows = {**batch(), "edit": [encoded(Image.new("RGB", (64, 48), (shade, 0, 0))) for shade in (0, 102, 255)]}
    rows |= {"task": ["add", "style", "bokeh"], "requirement": [None, None, "keep sharp: the cup"], **changes}
    stage = ScoreEdits(HPScorerReward(RuleJudge(rule=rule)))
    done = stage(rows)
    assert done.keys() == {*stage.features, "reason", "unanswered"}
    return stage, done


def test_scores_carry_judge_and_prompt():
    stage, done = scored()
    assert done["score"] == [0, 2, 5] and done["answer"] == ["0", "2", "5"] and done["reason"] == [None] * 3
    assert done["scorer_prompt"] == ["hp-edit-trl:add:3", "hp-edit-trl:style:3", "hp-edit-trl:bokeh:3"]
    assert done["scorer_prompt_sha"] == [
        stage.scorer.scorer_prompts[task].digest for task in ("add", "style", "bokeh")
    ]
    assert done["judge"] == ["judge RuleJudge, name rule, score_mode integer"] * 3
    assert done["score_mode"] == ["integer"] * 3
    assert stage.settings["scorer_prompts"]["add"] == ["hp-edit-trl:add:3", stage.scorer.scorer_prompts["add"].digest]


def test_the_judge_sees_the_requirement_and_a_missing_score_is_missing():
    _, done = scored(lambda text, pictures: 4 if "keep sharp: the cup" in text else "rubbish")
    assert done["score"] == [None, None, 4] and done["answer"] == ["rubbish", "rubbish", "4"]
    assert done["reason"] == [None] * 3 and not any(done["unanswered"])  # kept, with the answer


def test_an_unreadable_edit_is_rejected_and_the_others_are_scored():
    good = encoded(Image.new("RGB", (64, 48), (255, 0, 0)))
    _, done = scored(edit=[good, {"bytes": b"no picture", "path": None}, good])
    assert done["score"] == [5, None, 5] and done["reason"][1].startswith(
        "unreadable: The edit of case 'case-1' cannot"
    )


def test_what_the_judge_does_not_answer_is_asked_again_and_a_judge_that_is_gone_stops_the_build():
    class Silent(RuleJudge):
        def __call__(self, conversations):
            kinds = ("timeout", "refused", "image")
            return [Judgement(None, f"{kind}: x", answered=False, failure=kind) for kind in kinds]

    rows = {**batch(), "edit": batch()["image"], "task": ["add"] * 3, "requirement": [None] * 3}
    stage = ScoreEdits(HPScorerReward(Silent()))
    assert stage(rows)["unanswered"] == [True, True, False]
    with pytest.raises(JudgeRefusedError, match="^x Finished rows are kept"):
        stage.check(again=True)
    stage.judged = [Judgement(None, "TimeoutError: 120 s", answered=False)] * 8
    stage.check(again=True)
    with pytest.raises(ConnectionError, match="too many edits: 8 in a row.*TimeoutError: 120 s.* run again"):
        stage.check(again=False)
