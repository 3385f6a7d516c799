import ast
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from hp_edit_trl.cases import check_cases
from hp_edit_trl.miniature import CoarseScorer, RuleScorer, load_dataset
from hp_edit_trl.miniature.policy import TRAINING_OPTIONS
from hp_edit_trl.miniature.world import (
    BACKGROUNDS,
    COLORS,
    LIGHTS,
    PATTERNS,
    PLACES,
    SHAPES,
    SPLITS,
    STYLES,
    TONES,
    draw,
    draw_case,
    relit,
    stream,
    stylized,
    to_image,
)
from hp_edit_trl.tasks import TASKS


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cases():
    return list(islice(stream("train", seed=3), 400))


def test_a_dataset_of_cases_in_the_projects_schema():
    dataset = load_dataset("test", 24)
    check_cases(dataset, "dataset")
    assert len(dataset) == 24 and set(dataset["task"]) == set(TASKS)
    assert {"id", "image", "prompt", "task", "category", "requirement", "source", "target"} == set(
        dataset.column_names
    )
    assert dataset[0]["image"].size == dataset[0]["target"].size == (32, 32)
    again, other = load_dataset("test", 24), load_dataset("test", 24, seed=1)
    assert [row["image"].tobytes() for row in again] == [row["image"].tobytes() for row in dataset]
    assert list(other["prompt"]) != list(dataset["prompt"])
    assert set(load_dataset("test", 6, tasks=("add", "style"))["task"]) == {"add", "style"}


def test_a_case_depends_on_its_address_alone(cases):
    for index in (0, 17, 399):
        again = draw_case(list(TASKS)[index % 8], "train", 3, index)
        assert again.prompt == cases[index].prompt and np.array_equal(again.target, cases[index].target)


def test_no_scene_is_in_two_splits():
    pictures = {}
    for split in SPLITS:
        for seed in range(2):
            for case in islice(stream(split, seed), 120):
                assert case.scene.split == split
                assert pictures.setdefault(draw(case.scene).tobytes(), split) == split
    assert set(pictures.values()) == set(SPLITS)


def test_every_instruction_can_be_followed_and_the_untouched_source_does_not_follow_it(cases):
    scorer = RuleScorer()
    for case in cases:
        reference, target = to_image(case.reference), to_image(case.target)
        assert scorer.score(target, reference, target) == 5.0, case.prompt
        assert scorer.score(reference, reference, target) == 0.0, case.prompt


def test_instructions_name_one_object_and_are_many(cases):
    assert len({case.prompt for case in cases}) > 250
    for case in cases:
        named = [thing for thing in case.scene.things if thing.name in case.prompt]
        if case.task in ("remove", "swap", "color", "bokeh"):
            assert len(named) == 1, case.prompt
        if case.task == "add":
            assert not named, case.prompt
        names = [thing.name for thing in case.scene.things]
        assert len(set(names)) == len(names)


def test_edits_change_what_they_name_and_nothing_else(cases):
    for case in cases:
        changed = np.abs(case.target - case.reference).max(-1) > 1e-9
        share = changed.mean()
        if case.task in ("add", "remove", "swap", "color"):
            assert 0.02 <= share < 0.25, case.prompt
        if case.task == "relight":
            assert share > 0.5, case.prompt


def test_scores_fall_with_every_kind_of_failure(cases):
    # Monotone on the way from reference to target, and with damage to what should have been kept.
    scorer = RuleScorer()
    rng = np.random.default_rng(0)
    for case in cases[:80]:
        reference, target = to_image(case.reference), to_image(case.target)
        way = [to_image(case.reference + (case.target - case.reference) * t) for t in np.linspace(0, 1, 9)]
        scores = [scorer.score(image, reference, target) for image in way]
        assert all(b >= a - 0.15 for a, b in zip(scores, scores[1:], strict=False)), (case.prompt, scores)
        assert scores[0] == 0 and scores[-1] == 5 and 0 < scores[4] < 5
        noise = rng.normal(size=case.target.shape)
        spoilt = [to_image(case.target + level * noise) for level in (0, 0.1, 0.2, 0.4)]
        damaged = [scorer.score(image, reference, target) for image in spoilt]
        assert all(b <= a + 1e-9 for a, b in zip(damaged, damaged[1:], strict=False)) and damaged[-1] < 2.5


def test_the_coarse_scorer_is_generous_and_noisy(cases):
    coarse, quiet = CoarseScorer(), CoarseScorer(noise=0.0)
    local = [case for case in cases if case.task in ("add", "remove", "color")]
    untouched, done = [], []
    for case in local:
        reference, target = to_image(case.reference), to_image(case.target)
        untouched.append(coarse.score(reference, reference, target))
        done.append(coarse.score(target, reference, target))
        assert coarse.score(reference, reference, target) == untouched[-1]  # the noise belongs to the picture
        assert quiet.score(target, reference, target) == 5.0
    assert np.mean(untouched) > 4 and np.mean(done) - np.mean(untouched) < 0.6
    assert np.std(done) > 0.2


def test_scorers_are_reward_functions():
    dataset = load_dataset("test", 8)
    logged = {}
    columns = {name: list(dataset[name]) for name in ("image", "target", "task", "id")}
    rewards = RuleScorer()(
        prompts=list(dataset["prompt"]), completions=list(dataset["target"]), **columns,
        log_extra=logged.__setitem__, log_metric=logged.__setitem__, trainer_state=None,
    )  # fmt: skip
    assert rewards == pytest.approx([1 / (1 + np.exp(-5))] * 8)
    assert logged["score"] == 5.0
    assert all(0 < reward < 1 for reward in CoarseScorer()(completions=columns["image"], **columns))


def test_styles_and_lights_can_be_told_apart(cases):
    picture = cases[0].reference
    variants = [stylized(picture, style) for style in STYLES]
    variants += [
        relit(picture, side, tone) for side in ("left", "right", "top", "bottom") for tone in ("warm", "cool")
    ]
    for i, one in enumerate(variants):
        for other in variants[i + 1 :]:
            assert np.abs(one - other).mean() > 0.02


def test_bad_arguments():
    with pytest.raises(ValueError, match="split='val' is not known: use one of train, validation, test"):
        load_dataset("val")
    with pytest.raises(ValueError, match=r"Unknown tasks \['crop'\]"):
        load_dataset("test", tasks=("crop",))


def test_the_page_has_the_prompts_and_words_of_the_world():
    section = (ROOT / "docs" / "miniature.md").read_text(encoding="utf-8").partition("### What prompts say")[2]
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section.partition("\n## ")[0], re.MULTILINE))
    for case in load_dataset("train", 8):
        assert rows.pop(case["task"]) == case["prompt"]
    words = {
        "shapes": SHAPES, "colors": COLORS, "places": PLACES, "backgrounds": BACKGROUNDS, "patterns": PATTERNS,
        "sides of light": LIGHTS, "tones of light": TONES, "styles": STYLES,
    }  # fmt: skip
    assert rows.keys() - {"Task", "What"} == words.keys()
    for name, known in words.items():
        assert re.sub(r" \(\w+\)", "", rows[name]).split(", ") == list(known)


def test_the_page_has_the_options_of_training():
    page = (ROOT / "docs" / "miniature.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(.+)` \|$", page, re.MULTILINE)
    assert {name: ast.literal_eval(value) for name, value in rows} == TRAINING_OPTIONS
