"""The stage that makes edits, as a function of batches."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hp_edit_trl.data.builder.edits import MakeEdits
from hp_edit_trl.editors import Editor
from tests.data.builder.toy_build import encoded
from tests.helpers import photo


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

    def __call__(self, references, prompts, ids, seeds):
        colors = [np.random.default_rng(seed).integers(0, 255, 3) for seed in seeds]
        return [Image.new("RGB", case[0].size, tuple(map(int, c))) for case, c in zip(references, colors, strict=True)]


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
        == ["no edit: the editor returned a ndarray, but must return PIL images"] * 2
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
    with pytest.raises(ValueError, match="returned 0 edits of 1 cases"):
        MakeEdits(short)(batch())
    with pytest.raises(torch.OutOfMemoryError):
        MakeEdits(full)(batch())
