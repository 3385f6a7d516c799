import json

import pytest
from PIL import Image

from hp_edit_trl.bench import RISEBench, parse_final_score, run_benchmark
from hp_edit_trl.bench.rise import ORIGINALS, rise_score
from hp_edit_trl.judges import Judgement
from tests.helpers import photo


# One case for each way in which the benchmark's own code asks
ROWS = [
    {"index": "temporal_reasoning_1", "category": "temporal_reasoning", "instruction": "Age it", "image": "t/1.png",
     "reference": "A {rotten} banana.", "subtask": "Life Progression", "reasoning_img": None},
    {"index": "causal_reasoning_1", "category": "causal_reasoning", "instruction": "Drop it", "image": "c/1.png",
     "reference": "Shards.", "reasoning_img": "True", "consistency_free": "True"},
    {"index": "spatial_reasoning_1", "category": "spatial_reasoning", "instruction": "Stack", "image": "s/1.png",
     "reference": "A tower."},
    {"index": "spatial_reasoning_2", "category": "spatial_reasoning", "instruction": "Turn", "image": "s/2.png",
     "reference_img": "s/2_ref.png"},
    {"index": "spatial_reasoning_3", "category": "spatial_reasoning", "instruction": "Look", "image": "s/3.png",
     "reference": "Its back.", "reasoning_img": "True"},
    {"index": "logical_reasoning_1", "category": "logical_reasoning", "instruction": "1+1=?", "image": "l/1.png",
     "reference_txt": "2"},
    {"index": "logical_reasoning_2", "category": "logical_reasoning", "instruction": "Solve", "image": "l/2.png",
     "reference_img": "l/2_ref.png"},
]  # fmt: skip


class FinalJudge:
    """It gives full marks, or what is wanted where a text is in the question."""

    identity = {"judge": "FinalJudge", "parse": "parse_final_score"}

    def __init__(self, **marks):
        self.seen, self.marks = [], marks

    def load(self, num_images=2):
        assert num_images == 2

    def __call__(self, conversations):
        judgements = []
        for (question,) in conversations:
            text, *images = question["content"]
            self.seen.append((text["text"], [image["image"].size for image in images]))
            mark = next((mark for part, mark in self.marks.items() if part in text["text"]), None)
            mark = mark or ("1" if "0 or 1" in text["text"] else "5")
            answer = f"It is so.\n**Final Score:** **{mark}**"
            judgements.append(Judgement(parse_final_score(answer), answer))
        return judgements


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "datav2_total_w_subtask.json").write_text(json.dumps(ROWS))
    for i, row in enumerate(ROWS):
        for name, size in (("image", (1000 + i, 500)), ("reference_img", (64, 32))):
            if name in row:
                file = tmp_path / "data" / row[name]
                file.parent.mkdir(parents=True, exist_ok=True)
                photo(*size, i).save(file)
    return tmp_path


def edits(images, prompts):
    return [Image.new("RGB", (20, 10)) for _ in prompts]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Because.\n\n**Final Score:** **4**", 4.0),
        ("Final Score: 5", 5.0),
        ("**Final Score**: **0**", 0.0),
        ("## Final Scores: 3.", 3.0),
        ("Final Score: <2>", 2.0),
        ("<think>Final Score: 1</think>Final Score: 3", 3.0),
        ("A final score: 4 it is.\nFinal Score: 4", 4.0),
        ("Final Score: 4\nFinal Score: 2", None),
        ("Final Score: 4.5", None),
        ("Final Score: 1,0", None),
        ("Final Score: 9", None),
        ("Final Score: -1", None),
        ("The score is 4", None),
        ("", None),
    ],
)
def test_the_score_at_the_end(answer, score):
    assert parse_final_score(answer) == score


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((False, 5, 5, 5), (5.0, True)),
        ((False, 4, 5, 3), (4.1, False)),
        ((False, 1, 5, 5), (1.5, False)),
        ((False, 1, 1, 1), (1.0, False)),
        ((False, 5, None, 5), (5.0, True)),
        ((False, 4, None, 2), (3.6, False)),
        ((True, 5, 5, None), (5.0, True)),
        ((True, 5, 1, None), (3.8, False)),
        ((True, 1, 5, None), (1.1, False)),
        ((True, 5, None, None), (5.0, True)),
    ],
)
def test_the_weights(arguments, expected):
    assert rise_score(*arguments) == (pytest.approx(expected[0]), expected[1])


def test_each_case_is_asked_as_the_benchmark_does(folder):
    judge = FinalJudge(**{"Look": "3", "A tower.": "1"})
    run = run_benchmark(RISEBench(judge, folder), edits, folder / "run", chunk_size=100)
    big, small, edit = (768, 384), (64, 32), (20, 10)
    shown = [sizes for _, sizes in judge.seen]
    assert [[size if size in (small, edit) else big for size in sizes] for sizes in shown] == [
        [edit], [big, edit], [edit],  # reasoning, consistency, plausibility of the first case
        [big, edit], [edit],  # consistency is not judged
        [edit], [big, edit], [edit],
        [small, edit], [small, edit], [edit],  # the right result in the place of the reference
        [big, edit], [big, edit], [edit],
        [edit], [big, edit],  # looks of logical cases are not judged
        [small, edit], [small, edit],
    ]  # fmt: skip
    assert max(shown[1][0]) == 768 and "A {rotten} banana." in judge.seen[0][0]
    assert "Expected" not in judge.seen[14][0] and "Right answer: 2" in judge.seen[14][0]
    found = {row["id"]: (row["accuracy"], row["score"], row["reasoning"]) for row in run.cases}
    assert found["temporal_reasoning_1"] == found["logical_reasoning_2"] == (100, 100, 100)
    # "Look" in the question about what must stay, and in that about the answer: 3 and 3, and 5 for the looks
    assert found["spatial_reasoning_3"] == (0, pytest.approx(25 * (0.8 * 3 + 0.2 * 5 - 1)), 50)
    assert found["spatial_reasoning_1"] == (0, pytest.approx(25 * ((0.5 + 0.3 * 5 + 0.2 * 5) / 2 - 1)), 0)
    (row,) = [row for row in run.results["summary"] if (row["kind"], row["metric"]) == ("cases", "accuracy")]
    assert row["value"] == pytest.approx(500 / 7)
    assert set(run.settings["benchmark"]["scorer_prompts"]) == set(ORIGINALS)


def test_answers_outside_the_scale_are_missing(folder):
    judge = FinalJudge(**{"1+1=?": "5", "Drop it": "0"})  # of 0 and 1; of 1 to 5
    run = run_benchmark(RISEBench(judge, folder), edits, folder / "run")
    missing = {row["id"]: row["reason"] for row in run.cases if row["score"] is None}
    assert missing == {
        "causal_reasoning_1": "no score in the answer: reasoning is 0, outside its scale",
        "logical_reasoning_1": "no score in the answer: consistency is 5, outside its scale",
    }


def test_the_authors_prompts_and_their_way_to_ask_without_the_problem(folder):
    rows = [*ROWS, ROWS[-1] | {"index": "logical_reasoning_3", "reasoning_wo_ins": None}]
    (folder / "datav2_total_w_subtask.json").write_text(json.dumps(rows))
    texts = [f'{name} = """Grade {name} of {{instruct}} by {{reference}}."""' for name in ORIGINALS.values()]
    (folder / "utils.py").write_text("\n".join(texts))
    bench = RISEBench(FinalJudge(), folder, scorer_prompts=str(folder))
    assert bench.dataset["reasoning"][-2:] == ["reasoning_logical_image_alone"] * 2
    assert bench.scorer_prompts["reasoning"].fill("a", "b", quote=False) == "Grade prompt_reasoning of a by b."
    (folder / "utils.py").write_text("\n".join(texts[1:]))
    with pytest.raises(ValueError, match="utils.py has no text prompt_consist"):
        RISEBench(FinalJudge(), folder, scorer_prompts=str(folder))


def test_bad_input(folder):
    judge = FinalJudge()
    judge.identity = {"judge": "x", "parse": "parse_pair"}
    with pytest.raises(ValueError, match="reads scores from its answers with parse_pair"):
        RISEBench(judge, folder)
    file = folder / "datav2_total_w_subtask.json"
    for rows, error, message in (
        ([ROWS[0] | {"category": "music"}], ValueError, "'temporal_reasoning_1' has the category 'music'"),
        ([ROWS[0] | {"reference": None}], ValueError, "'temporal_reasoning_1' has no answer, neither as text"),
        ([ROWS[5] | {"reference_txt": ""}], ValueError, "'logical_reasoning_1' has no answer"),
        ([ROWS[0] | {"image": "t/none.png"}], FileNotFoundError, "unpack data.zip, so that it has data/t/none.png"),
        ([ROWS[0] | {"instruction": 3}], ValueError, "is not RISEBench's: TypeError: instruction of the case"),
        ([{"index": "a"}], ValueError, "is not RISEBench's: KeyError"),
        ({"a": 1}, ValueError, "is not RISEBench's"),
        ([], ValueError, "has no cases"),
    ):
        file.write_text(json.dumps(rows))
        with pytest.raises(error, match=message):
            RISEBench(FinalJudge(), folder).dataset  # noqa: B018
    photo(8, 8).save(folder.parent / "secret.png")
    for name in ("image", "reference_img"):
        rows = [ROWS[0], ROWS[3] | {name: "../../secret.png"}]
        file.write_text(json.dumps(rows))
        with pytest.raises(ValueError, match="secret.png"):
            RISEBench(FinalJudge(), folder).dataset  # noqa: B018
    file.write_text("[")
    with pytest.raises(ValueError, match="is not RISEBench's"):
        RISEBench(FinalJudge(), folder).dataset  # noqa: B018
    file.unlink()
    with pytest.raises(FileNotFoundError, match="has no datav2_total_w_subtask.json or data_total.json"):
        RISEBench(FinalJudge(), folder).dataset  # noqa: B018
