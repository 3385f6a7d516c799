import json

import pytest
from PIL import Image

from hp_edit_trl.bench import ImgEditBench, parse_three, run_benchmark
from hp_edit_trl.bench.imgedit import TYPES
from hp_edit_trl.judges import Judgement
from tests.helpers import photo


class ThreeJudge:
    """Its scores go by how red the edit is; it is asked in one message."""

    identity = {"judge": "ThreeJudge", "parse": "parse_three"}

    def __init__(self, wrong=()):
        self.seen, self.wrong = [], wrong

    def load(self, num_images=2):
        pass

    def __call__(self, conversations):
        judgements = []
        for (question,) in conversations:
            text, reference, edit = question["content"]
            self.seen.append((question["role"], text["text"], reference["image"].size, edit["image"].size))
            first = 1 + edit["image"].getpixel((0, 0))[0] // 64
            answer = f"Brief reasoning: It is so.\nPrompt Compliance: {first}\nSeamlessness: 5\nPhysical Detail: 3"
            answer = "I cannot say" if any(word in text["text"] for word in self.wrong) else answer
            judgements.append(Judgement(parse_three(answer), answer))
        return judgements


@pytest.fixture
def folder(tmp_path):
    types = ["add", "add", "style"]
    cases = {f"{9 - i}": {"id": f"for_add/{i}.jpg", "prompt": f"Do {i}", "edit_type": t} for i, t in enumerate(types)}
    (tmp_path / "basic_edit.json").write_text(json.dumps(cases))
    names = ["adjust" if name == "alter" else name for name in TYPES]
    (tmp_path / "prompts.json").write_text(json.dumps({name: f"Grade {name}: <edit_prompt>." for name in names}))
    (tmp_path / "original_images" / "for_add").mkdir(parents=True)
    for i in range(3):
        photo(48, 32, i).save(tmp_path / "original_images" / "for_add" / f"{i}.jpg")
    return tmp_path


def reds(images, prompts):
    return [Image.new("RGB", (20, 10), (64 * int(prompt[-1]), 0, 0)) for prompt in prompts]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Brief reasoning: fine.\nPrompt Compliance: 4\nVisual Seamlessness: 3\nPhysical & Detail Fidelity: 5", 4.0),
        ("**Brief reasoning:** 2 faults: seams.\n**Style Fidelity:** 1\n- Content: 1/5\nRendering: 1.", 1.0),
        ("<think>A: 5\nB: 5\nC: 5</think>A: 1\nB: 1\nC: 4", 2.0),
        ("A: 4\nB: 3", None),
        ("A: 4\nB: 3\nC: 4\nD: 4", None),
        ("A: 4\nB: 3\nC: 6", None),
        ("A: 4\nB: 3\nC: 0", None),
        ("A: 4\nB: 3\nC: 4.5", None),
        ("4\n3\n5", None),
        ("", None),
    ],
)
def test_three_scores_or_none(answer, score):
    assert parse_three(answer) == score


def test_a_run_is_summed_up_as_the_benchmark_does(folder):
    judge = ThreeJudge()
    run = run_benchmark(ImgEditBench(judge, folder), reds, folder / "run")
    assert sorted((row["id"], row["score"]) for row in run.cases) == [
        ("7", pytest.approx(11 / 3)), ("8", pytest.approx(10 / 3)), ("9", 3.0),
    ]  # fmt: skip
    overall = [row for row in run.results["summary"] if row["kind"] == "overall"]
    assert [row["value"] for row in overall] == [pytest.approx(((3 + 10 / 3) / 2 + 11 / 3) / 2)]
    assert ("user", "Grade style: Do 2.", (48, 32), (20, 10)) in judge.seen
    assert run.settings["benchmark"]["scorer_prompts"].keys() == set(TYPES)


def test_an_answer_without_three_scores_is_missing(folder):
    run = run_benchmark(ImgEditBench(ThreeJudge(wrong=["Do 1"]), folder), reds, folder / "run")
    assert [row["score"] for row in run.cases if row["id"] == "8"] == [None]


def test_bad_input(folder):
    with pytest.raises(ValueError, match="reads scores from its answers with parse_pair"):
        judge = ThreeJudge()
        judge.identity = {"judge": "x", "parse": "parse_pair"}
        ImgEditBench(judge, folder)
    cases = json.loads((folder / "basic_edit.json").read_text())
    for change, error, message in (
        ({"edit_type": "paint"}, ValueError, "has the types paint, for which there is no prompt"),
        ({"id": "../../secret.jpg"}, FileNotFoundError, "unpack them into original_images"),
        ({"id": "none.jpg"}, FileNotFoundError, "unpack them into original_images"),
    ):
        (folder / "basic_edit.json").write_text(json.dumps({"1": cases["9"] | change}))
        with pytest.raises(error, match=message):
            ImgEditBench(ThreeJudge(), folder).dataset  # noqa: B018
    photo(8, 8).save(folder.parent / "secret.jpg")
    (folder / "basic_edit.json").write_text(json.dumps({"1": cases["9"] | {"id": "../../secret.jpg"}}))
    with pytest.raises(ValueError, match="secret.jpg"):
        ImgEditBench(ThreeJudge(), folder).dataset  # noqa: B018
    (folder / "basic_edit.json").write_text("[]")
    with pytest.raises(ValueError, match="basic_edit.json is not ImgEdit's"):
        ImgEditBench(ThreeJudge(), folder).dataset  # noqa: B018
    (folder / "prompts.json").write_text(json.dumps(dict.fromkeys(TYPES, "Grade it.")))
    with pytest.raises(ValueError, match="The prompt action has no <edit_prompt>"):
        ImgEditBench(ThreeJudge(), folder)
    (folder / "prompts.json").write_text(json.dumps({"add": "<edit_prompt>"}))
    with pytest.raises(FileNotFoundError, match="has no prompt action.md or action.txt, which imgedit needs"):
        ImgEditBench(ThreeJudge(), folder)
    (folder / "prompts.json").write_text("[1]")
    with pytest.raises(ValueError, match="prompts.json is no JSON object of prompts"):
        ImgEditBench(ThreeJudge(), folder)
