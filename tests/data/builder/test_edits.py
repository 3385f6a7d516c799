"""The stages that edit and score, as functions of batches; the engine is tested elsewhere."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hp_edit_trl import HPScorerReward
from hp_edit_trl.data.builder.edits import MakeEdits, ScoreEdits
from hp_edit_trl.editors import Editor
from hp_edit_trl.judges import Judgement
from tests.helpers import RuleJudge, photo


def encoded(image: Image.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def decoded(value: dict) -> Image.Image:
    return Image.open(io.BytesIO(value["bytes"]))


def batch(count: int = 3) -> dict[str, list]:
    return {
        "id": [f"case-{i}" for i in range(count)],
        "image": [encoded(photo(64, 48, i)) for i in range(count)],
        "prompt": [f"Instruction {i}" for i in range(count)],
    }


def red(images, prompts):
    return [Image.new("RGB", image.size, (200, 0, 0)) for image in images]


class Seeded(Editor):
    """An editor whose edit is a color drawn by the case's seed."""

    identity = {"editor": "seeded", "revision": "1", "strength": 3}

    def __call__(self, images, prompts, ids, seeds):
        colors = [np.random.default_rng(seed).integers(0, 255, 3) for seed in seeds]
        return [Image.new("RGB", image.size, tuple(map(int, c))) for image, c in zip(images, colors, strict=True)]


def test_a_function_edits_and_the_edit_is_kept_without_loss():
    stage = MakeEdits(red)
    done = stage(batch())
    assert done.keys() == {*stage.features, "reason"} and done["reason"] == [None] * 3
    assert {decoded(value).getpixel((3, 3)) for value in done["edit"]} == {(200, 0, 0)}
    assert done["editor"] == ["red"] * 3 and stage.settings.pop("revision").startswith("source ")


def test_an_edit_depends_on_seed_and_case_alone():
    whole = MakeEdits(Seeded())(batch())
    part = MakeEdits(Seeded())({name: values[1:2] for name, values in batch().items()})
    assert part["edit"] == whole["edit"][1:2] and part["edit_seed"] == whole["edit_seed"][1:2]
    assert len(set(whole["edit_seed"])) == 3
    other = MakeEdits(Seeded(), seed=1)
    assert other(batch())["edit_seed"] != whole["edit_seed"]
    assert other.settings == {"editor": "seeded", "revision": "1", "strength": 3, "seed": 1}


def test_an_editor_that_fails_with_some_cases():
    def fussy(images, prompts):
        if "Instruction 1" in prompts:
            raise RuntimeError("too many fingers")
        return [None if prompt == "Instruction 2" else image for image, prompt in zip(images, prompts, strict=True)]

    done = MakeEdits(fussy)(batch(4))
    assert done["reason"] == [None, "editor failed: RuntimeError: too many fingers", "no edit", None]
    assert [value is None for value in done["edit"]] == [False, True, True, False]
    assert (
        MakeEdits(lambda images, prompts: [np.zeros(3)] * len(images))(batch(2))["reason"]
        == ["no edit: the editor returned a ndarray"] * 2
    )


def test_an_editor_that_fails_with_all_of_them_stops_the_build():
    def broken(images, prompts):
        raise KeyError("weights")

    def short(images, prompts):
        return images[1:]

    def full(images, prompts):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(
        ValueError, match="failed with every case of a batch, 'case-0' to 'case-2': KeyError: 'weights'"
    ):
        MakeEdits(broken)(batch())
    with pytest.raises(ValueError, match="returned 0 edits of 1 images"):
        MakeEdits(short)(batch())
    with pytest.raises(torch.OutOfMemoryError):
        MakeEdits(full)(batch())


def scored(rule=None, **changes):
    rows = {**batch(), "edit": [encoded(Image.new("RGB", (64, 48), (shade, 0, 0))) for shade in (0, 102, 255)]}
    rows |= {"task": ["add", "style", "bokeh"], "requirement": [None, None, "keep sharp: the cup"], **changes}
    stage = ScoreEdits(HPScorerReward(RuleJudge(rule=rule)))
    done = stage(rows)
    assert done.keys() == {*stage.features, "reason"}
    return stage, done


def test_scores_carry_judge_and_prompt():
    stage, done = scored()
    assert done["score"] == [0, 2, 5] and done["answer"] == ["0", "2", "5"] and done["reason"] == [None] * 3
    assert done["scorer_prompt"] == ["hp-edit-trl:add:1", "hp-edit-trl:style:1", "hp-edit-trl:bokeh:1"]
    assert done["scorer_prompt_sha"] == [
        stage.scorer.scorer_prompts[task].digest for task in ("add", "style", "bokeh")
    ]
    assert done["judge"] == ["judge RuleJudge, name rule, score_mode integer"] * 3
    assert done["score_mode"] == ["integer"] * 3
    assert stage.settings["scorer_prompts"]["add"] == ["hp-edit-trl:add:1", stage.scorer.scorer_prompts["add"].digest]


def test_the_judge_sees_the_requirement_and_a_missing_score_is_missing():
    _, done = scored(lambda text, pictures: 4 if "keep sharp: the cup" in text else "rubbish")
    assert done["score"] == [None, None, 4] and done["answer"] == ["rubbish", "rubbish", "4"]
    assert done["reason"] == [None] * 3  # kept, with the answer


def test_an_unreadable_edit_is_rejected_and_the_others_are_scored():
    good = encoded(Image.new("RGB", (64, 48), (255, 0, 0)))
    _, done = scored(edited=[good, {"bytes": b"no picture", "path": None}, good])
    assert done["score"] == [5, None, 5] and done["reason"][1].startswith("unreadable: The edit of 'case-1' cannot")


def test_a_judge_that_does_not_answer_stops_the_build():
    class Silent(RuleJudge):
        def __call__(self, conversations):
            return [Judgement(None, "TimeoutError: 120 s", answered=False) for _ in conversations]

    rows = {**batch(), "edit": batch()["image"], "task": ["add"] * 3, "requirement": [None] * 3}
    with pytest.raises(ConnectionError, match="no answer to any of 3 edits; the last time: TimeoutError: 120 s"):
        ScoreEdits(HPScorerReward(Silent()))(rows)
