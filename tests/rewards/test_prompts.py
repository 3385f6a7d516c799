import re

import pytest

from hp_edit_trl.rewards import load_scorer_prompts
from hp_edit_trl.tasks import TASKS


# One word or phrase for each criterion of the paper's figures S2 to S9. A prompt that loses one has lost a criterion.
CRITERIA = {
    "remove": ["main object or subject", "made out clearly", "very thing", "really gone",
        "differ in a way that matters", "natural and realistic", "artifacts", "damaged areas",
        "place where the object used to be: no blur and no shadows that are not natural"],
    "add": ["usable picture: sharp, not distorted, of good quality", "is the object that was asked for now present",
        "differ in a way that matters", "natural and realistic", "place where the object was put", "artifacts",
        "damaged areas", "no blur and no shadows that are not natural", "category", "attributes", "place"],
    "swap": ["word for word", "which object is to disappear", "take its place", "clearly identified",
        "logically possible", "clearly and without ambiguity", "vanished", "no part missing", "misshapen",
        "category, attributes, pose, position", "additional objects", "background of image a fully kept",
        "does not speak of", "without support", "passing through", "compositing"],
    "background": ["foreground subject", "a person or a thing", "proper replacement",
        "another one than that of image a", "survive intact", "visible artifacts", "blended"],
    "color": ["strict", "composition", "identity and shape", "mirrored side", "accessories", "logos", "patterns",
        "hue, saturation and brightness", "gradients", "glossy", "metallic", "woven", "wooden", "grained",
        "highlights", "shadows", "reflections", "translucency", "flat coat of paint", "halo", "bleeding",
        "fringe", "banding", "posterised", "tint"],
    "bokeh": ["strict", "weigh the same", "crop, scale and rotation", "colour cast", "identity and pose",
        "facial features, edges and textures", "truly blurred", "strongly", "hair and fur", "halo", "double contour",
        "bleeding", "cut-out", "holes", "ringing", "grain and noise", "gradually with distance", "middle ground",
        "uniform", "with caps applied"],
    "relight": ["come from where it should", "every object", "soft or as hard", "warm or as cool",
        "shadows and highlights", "halos", "geometry of the scene", "textures", "composition", "physically plausible",
        "pleasing"],
    "style": ["word for word", "palette", "textures", "brushwork", "objects it contains", "sensible",
        "without ambiguity", "features of that style", "none added and none taken away", "background all there",
        "structure did not", "coherent or realistic", "without support", "passing through", "machine's hand"],
}  # fmt: skip

# The same for the levels 0 to 5. Section 4.1 of the paper and its figures differ in the levels 1 and 2.
WRONG = ["altogether wrong", "ignores the instruction", "or meets no requirement"]
GOOD = ["to a large extent", "good picture in quality and aesthetics"]
PERFECT = ["in full", "every requirement is met", "realistic and of high quality"]
SECTION = [
    WRONG,
    ["largely wrong", "right in part", "hardly carried out", "or image b does not look real"],
    ["right in the main", "departs from the instruction, or", "several important requirements are unmet"],
    ["by and large", "falls short in quality or aesthetics"],
    GOOD,
    PERFECT,
]
FIGURE = [
    WRONG,
    ["not wrong in everything", "carried out in part", "or image b does not look real"],
    ["right in the main", "not carried out in full, or", "most of the requirements are unmet"],
    ["most of the instruction", "falls short in quality and aesthetics"],
    GOOD,
    PERFECT,
]
LEVELS = {
    "base": SECTION, "remove": FIGURE, "add": FIGURE, "swap": FIGURE, "background": FIGURE, "color": FIGURE,
    "style": FIGURE,
    "bokeh": [["disqualified"], ["blur in the wrong place or the subject out of focus", "barely followed"],
        ["several", "artifacts are plain to see", "in part", "not to be relied on"],
        ["one or two checks", "noticeably", "a little retouching"],
        ["small flaws in a single check", "realistic", "true to the instruction"],
        ["every check", "natural blur as instructed", "clean outlines", "depth"]],
    "relight": [["invalid", "fails altogether, or has nothing to do with the instruction"],
        ["direction or tone", "mainly wrong", "unreal or of low quality"],
        ["several contradictions or visible artifacts", "in part", "unreal"],
        ["realism or in following the instruction", "stand out", "a little retouching"],
        ["small imperfections", "consistent, realistic and true to the instruction"],
        ["every point", "exactly as instructed", "fully realistic", "example to learn from"]],
}  # fmt: skip


def flat(text):
    return " ".join(text.lower().split())


def test_there_is_a_prompt_for_every_task_and_the_base_prompt():
    prompts = load_scorer_prompts()
    assert set(prompts) == {*TASKS, "base"}
    for task, prompt in prompts.items():
        assert prompt.revision == f"hp-edit-trl:{task}:3"
        text = flat(prompt.text)
        levels = re.findall(r"- (\d): (.*?)(?= - \d:| answer with)", text)
        assert [int(level) for level, _ in levels] == list(range(6)), task
        for (level, wording), said in zip(levels, LEVELS[task], strict=True):
            assert [one for one in said if one not in wording] == [], (task, level)
        assert "image a" in text and "image b" in text and "answer with the digit alone" in text


@pytest.mark.parametrize("task", sorted(CRITERIA))
def test_every_criterion_of_the_paper_is_kept(task):
    prompts = load_scorer_prompts()
    text = flat(prompts[task].text)
    assert [criterion for criterion in CRITERIA[task] if criterion not in text] == []
    # and the base prompt has none of the questions
    assert not re.search(r"^\d\.", prompts["base"].text, re.MULTILINE)


def test_filling_in():
    prompt = load_scorer_prompts()["add"]
    text = prompt.fill("Add {requirement} and {prompt} and {x}", "a {prompt}")
    assert 'Instruction: "Add {requirement} and {prompt} and {x}"\n' in text
    assert 'Requirements: "a {prompt}"\n' in text
    assert "Requirements: none\n" in prompt.fill("Add a cat")


def test_a_folder(tmp_path):
    (tmp_path / "README.md").write_text("not a prompt")
    (tmp_path / "crop.md").write_text("---\ntask: crop\nrevision: b2\n---\nWas {prompt} done? Keep {this}.\n")
    prompts = load_scorer_prompts(str(tmp_path))
    assert list(prompts) == ["crop"] and prompts["crop"].revision == f"{tmp_path}:crop:b2"
    assert prompts["crop"].fill("cropping") == 'Was "cropping" done? Keep {this}.'
    with pytest.raises(ValueError, match="pins a Hub repository, but .* is a local folder"):
        load_scorer_prompts(str(tmp_path), revision="main")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no header", "does not begin with a header"),
        ("---\ntask: x\n---\n{prompt}", "does not begin with a header"),
        ("---\ntask: x\nrevision: 1\n---\nno place", "has no {prompt}"),
        ("---\ntask: [a]\nrevision: 1\n---\n{prompt}", "has the task .*: write a text"),
        ("---\ntask: 5\nrevision: 1\n---\n{prompt}", "has the task 5: write a text"),
        (None, "No scorer prompts"),
    ],
)
def test_bad_folders(tmp_path, text, message):
    if text is not None:
        (tmp_path / "x.md").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_scorer_prompts(str(tmp_path))


def test_neither_folder_nor_repository():
    with pytest.raises(FileNotFoundError, match="There is no file or folder .*/missing: correct './missing'"):
        load_scorer_prompts("./missing")


def test_two_prompts_for_a_task(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.md").write_text("---\ntask: x\nrevision: 1\n---\n{prompt}")
    with pytest.raises(ValueError, match="b.md is a second one for the task 'x'"):
        load_scorer_prompts(str(tmp_path))
