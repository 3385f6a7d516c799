"""Editors against what they stand for: the pipeline's own call, the policy's own rollout, the files of a folder."""

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image

from hp_edit_trl.editors import (
    FolderEditor,
    FunctionEditor,
    PipelineEditor,
    PolicyEditor,
    as_editor,
    edit_cases,
    load_editor,
)
from hp_edit_trl.miniature.tiny import tiny_kontext_pipeline, tiny_pipeline
from hp_edit_trl.policies import policy_class
from hp_edit_trl.utils.files import file_name
from tests.helpers import photo, write_model_index


IMAGES = [photo(64, 64, 1), photo(96, 64, 2), photo(64, 64, 3)]
PROMPTS = ["Make it red", "Make it blue", "Make it bright"]
REFERENCES = [[image] for image in IMAGES]  # one reference image per case
IDS, SEEDS = ["a", "b", "c"], [5, 6, 7]


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and np.array_equal(np.asarray(one), np.asarray(other))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kontext")
    tiny_kontext_pipeline().save_pretrained(folder)
    return str(folder)


def test_a_pipeline_edits_as_its_own_call_does(saved):
    editor = PipelineEditor(saved, resolution=64, dtype="float32", num_inference_steps=2, max_area=64 * 64)
    edits = editor(REFERENCES, PROMPTS, IDS, SEEDS)
    pipeline = FluxKontextPipeline.from_pretrained(saved)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        image=IMAGES[1],
        prompt=PROMPTS[1],
        height=48,
        width=80,
        max_area=64 * 64,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(6),
    ).images[0]
    assert same(edits[1], wanted)
    # An edit depends on its own case and seed alone.
    (alone,) = editor(REFERENCES[1:2], PROMPTS[1:2], ["b"], [6])
    (other,) = editor(REFERENCES[1:2], PROMPTS[1:2], ["b"], [8])
    assert same(alone, wanted) and not same(other, wanted)
    assert editor.identity["revision"].startswith("files ") and editor.identity["num_inference_steps"] == 2


def test_a_policy_edits_as_its_pipeline_does_whatever_the_batch(tmp_path):
    pipeline = tiny_pipeline()
    policy = policy_class(pipeline)(pipeline)
    editor = PolicyEditor(policy, "tiny", resolution=64, num_inference_steps=2, true_cfg_scale=1.0, batch_size=2)
    editor.load()
    edits = editor(REFERENCES, PROMPTS, IDS, SEEDS)
    assert [edit.size for edit in edits] == [(64, 64), (80, 48), (64, 64)]
    for i in range(3):
        (alone,) = editor(REFERENCES[i : i + 1], PROMPTS[i : i + 1], IDS[i : i + 1], SEEDS[i : i + 1])
        difference = np.abs(np.asarray(alone, dtype=int) - np.asarray(edits[i], dtype=int))
        assert alone.size == edits[i].size and difference.max() <= 1
    pipeline.save_pretrained(tmp_path)
    options = dict(resolution=64, dtype="float32", num_inference_steps=2, true_cfg_scale=1.0)
    named = load_editor(str(tmp_path), policy=True, batch_size=2, **options)
    named.check()
    named.load()
    assert all(same(one, two) for one, two in zip(named(REFERENCES, PROMPTS, IDS, SEEDS), edits, strict=True))
    assert named.identity != load_editor(str(tmp_path), **options).identity
    before = editor.identity
    with torch.no_grad():
        next(pipeline.transformer.parameters()).flatten()[0] += 1
    assert editor.identity != before


def test_a_folder_gives_what_is_in_it(tmp_path):
    IMAGES[0].save(tmp_path / "a.png")
    IMAGES[1].convert("RGBA").save(tmp_path / "c.webp", lossless=True)
    editor = FolderEditor(tmp_path, "someone")
    edits = editor(REFERENCES, PROMPTS, IDS, SEEDS)
    assert same(edits[0], IMAGES[0]) and edits[1] is None and same(edits[2], IMAGES[1])
    assert editor.identity["editor"] == "someone"
    (tmp_path / "nothing").mkdir()
    for folder in (tmp_path / "nothing", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="is not a folder of edits"):
            FolderEditor(folder)


def test_an_id_is_no_path_to_another_folder(tmp_path):
    folder = tmp_path / "edits"
    (folder / "sub").mkdir(parents=True)
    IMAGES[0].save(folder / "a.png")
    for file in (tmp_path / "secret.png", folder / "sub" / "secret.png", folder / "%2E.%2Fown.png"):
        IMAGES[1].save(file)
    ids = ["a", "../secret", str(tmp_path / "secret"), "sub/../../secret", "./a", "..", "a\0", "sub/secret", "../own"]
    edits = FolderEditor(folder)([REFERENCES[0]] * len(ids), ["x"] * len(ids), ids, [0] * len(ids))
    assert same(edits[0], IMAGES[0]) and same(edits[-1], IMAGES[1])  # %2E.%2Fown.png is a name in the folder
    assert edits[1:-1] == [None] * 7
    # Two ids never find one file: `a%2Fb` is not `a/b`, nor is `A` the other `a`.
    for name in ("a%2Fb", "A", file_name("Long" * 99)):
        IMAGES[1].save(folder / f"{name}.png")
    ids = ["a/b", "a%2Fb", "a%252Fb", "A", "Long" * 99, "long" * 99, file_name("Long" * 99)]
    edits = FolderEditor(folder)([REFERENCES[0]] * len(ids), ["x"] * len(ids), ids, [0] * len(ids))
    assert [edit is not None for edit in edits] == [True, False, False, True, True, False, False]


def test_a_pipeline_reads_control_tokens_as_text():
    options = {"num_inference_steps": 1, "max_area": 64 * 64, "_auto_resize": False}
    editor = PipelineEditor("none", resolution=64, **options)
    editor.pipeline = tiny_kontext_pipeline()
    prompts = ["red</s><|endoftext|>blue", "red< /s>< |endoftext|>blue", "red</sblue"]
    one, same_as_text, other = editor([REFERENCES[0]] * 3, prompts, IDS, [0] * 3)
    assert same(one, same_as_text) and not same(one, other)


def test_what_cannot_be_an_editor():
    with pytest.raises(ConnectionError, match="neither a local file or folder nor in the cache"):
        PipelineEditor("nobody/nothing").identity  # noqa: B018
    with pytest.raises(ValueError, match="dtype='float' is not a type|dtype='half-life'"):
        PipelineEditor("x", dtype="half-life")


def test_several_references_reach_the_policy_the_pipeline_and_a_function():
    pipeline = tiny_pipeline()
    policy = policy_class(pipeline)(pipeline)
    editor = PolicyEditor(policy, "tiny", resolution=64, num_inference_steps=2, true_cfg_scale=1.0, batch_size=4)
    editor.load()
    both = [IMAGES[0], IMAGES[1]]
    edits = editor([both, [IMAGES[1]], both], ["Join them"] * 3, ["a", "b", "a"], [5, 5, 6])
    (alone,) = editor([both], ["Join them"], ["a"], [5])
    assert same(edits[0], alone) and edits[0].size == (80, 48)  # of the shape of the last reference
    assert not same(edits[0], edits[1]) and not same(edits[0], edits[2])

    seen = []

    def function(images, prompts, seeds):
        seen.append((images, prompts, seeds))
        return [None] * len(prompts)

    assert FunctionEditor(function)([both, [IMAGES[2]]], ["x", "y"], ["a", "b"], [1, 2]) == [None, None]
    assert seen == [([both, IMAGES[2]], ["x", "y"], [1, 2])]


def test_edits_are_read_as_everywhere_and_editors_may_change_what_they_are_given():
    upright = photo(48, 32)
    turned = upright.rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    answers = {
        "turned": turned,
        "16 bits": Image.fromarray(np.full((4, 4), 65535, np.uint16)),
        "float": photo(4, 4).convert("F"),
    }

    def edit(images, prompts, ids):
        for image in images:
            image.paste("black", (0, 0, *image.size))
        if len(ids) > 1:
            raise RuntimeError("one at a time")
        return [answers.get(ids[0], np.zeros(3))]

    references = [[photo(16, 16, i)] for i in range(4)]
    before = [image.tobytes() for (image,) in references]
    ids = [*answers, "array"]
    edits, reasons = edit_cases(as_editor(edit), references, ["x"] * 4, ids, range(4))
    assert [image.tobytes() for (image,) in references] == before
    assert same(edits[0], upright) and edits[0].info == {} and edits[1].getcolors() == [(16, (255, 255, 255))]
    assert edits[2:] == [None, None] and reasons[:2] == [None, None]
    assert reasons[2].startswith(
        "no edit: the image that the editor returned cannot be decoded: floating-point values"
    )
    assert reasons[3] == "no edit: the editor returned a ndarray, but must return PIL images"


def test_a_pipeline_that_cannot_be_used_is_told_before_its_weights_are_read(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImageEditPlusPipeline"}')
    with pytest.raises(ValueError, match="editor='.*' has no scheduler, but a QwenImageEditPlusPipeline needs one"):
        load_editor(str(tmp_path)).check()
    write_model_index(tmp_path)
    load_editor(str(tmp_path), num_inference_steps=4, true_cfg_scale=1.0).check()
    with pytest.raises(ValueError, match="The call of QwenImageEditPlusPipeline has no num_steps: correct or remove"):
        load_editor(str(tmp_path), num_steps=4).check()

    def write_index_of(name):
        components = inspect.signature(getattr(diffusers, name).__init__).parameters.keys() - {"self"}
        index = {"_class_name": name} | dict.fromkeys(components, "of unknown class")
        (tmp_path / "model_index.json").write_text(json.dumps(index))

    write_index_of("LongCatImageEditPipeline")
    load_editor(str(tmp_path), guidance_scale=1.0).check()
    with pytest.raises(ValueError, match="resolution=512, but LongCatImageEditPipeline always edits at its own size"):
        load_editor(str(tmp_path), resolution=512).check()
    write_index_of("JoyImageEditPlusPipeline")
    with pytest.raises(ValueError, match="JoyImageEditPlusPipeline is not called with image: it needs a function"):
        load_editor(str(tmp_path)).check()
    with pytest.raises(ConnectionError, match="'nobody/nothing' is neither a local file or folder nor in the cache"):
        load_editor("nobody/nothing").check()


def test_a_case_with_more_references_than_a_pipeline_takes_has_no_edit(saved):
    # A pipeline of one reference would leave the others out, or make an edit of each.
    pipeline = tiny_kontext_pipeline()
    policy = PolicyEditor(policy_class(pipeline)(pipeline), "tiny", 64, num_inference_steps=1)
    plain = PipelineEditor(saved, dtype="float32", resolution=64, num_inference_steps=1, max_area=64 * 64)
    for editor in (policy, plain):
        editor.load()
        edits, reasons = edit_cases(editor, [IMAGES[:1], IMAGES[:2]], PROMPTS[:2], IDS[:2], SEEDS[:2])
        assert [edit is None for edit in edits] == [False, True] and reasons[0] is None
        assert "Case 'b' has 2 reference images, but the pipeline takes at most 1" in reasons[1]
