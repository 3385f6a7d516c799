import base64
import io
import json
import math
import re

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from hp_edit_trl import HPScorerReward, ServerJudge
from hp_edit_trl.bench import GEditBench, parse_pair, run_benchmark
from hp_edit_trl.bench.gedit import SCORER_TASKS, as_judged
from hp_edit_trl.judges import CachedJudge, Judgement
from tests.helpers import RuleJudge, photo
from tests.judges.test_judges import completion, serve  # noqa: F401


TASKS = ("color_alter", "subject-add", "text_change")


def gedit(count=12, **columns) -> Dataset:
    rows = [
        {
            "task_type": TASKS[i % 3],
            "key": f"key{i}",
            "instruction": f"Instruction {i}" if i % 2 == 0 else f"指令 {i}",
            "instruction_language": ("en", "cn")[i % 2],
            "input_image": photo(32, 32, i),
            "input_image_raw": photo(64, 48, i),
            "Intersection_exist": i % 4 < 2,
        }
        for i in range(count)
    ]
    images = {"input_image": ImageFeature(), "input_image_raw": ImageFeature()}
    texts = {name: Value("string") for name in ("task_type", "key", "instruction", "instruction_language")}
    return Dataset.from_list(rows, features=Features({**texts, **images, "Intersection_exist": Value("bool")}))


class PairJudge:
    """Its first pair goes by how red the last picture is and how many there are, its second one is above it."""

    def __init__(self, wrong=()):
        self.identity = {"judge": "PairJudge", "parse": "parse_pair"}
        self.texts, self.wrong = [], wrong

    def load(self, num_images=2):
        pass

    def __call__(self, conversations):
        judgements = []
        for (question,) in conversations:
            first, *rest = question["content"]
            assert question["role"] == "user" and {part["type"] for part in rest} == {"image"}
            text, pictures = first["text"], [part["image"] for part in rest]
            self.texts.append((text, [picture.size for picture in pictures]))
            red = np.asarray(pictures[-1])[..., 0].mean() / 255
            score = round(10 * red) if len(pictures) == 2 else 9 - round(4 * red)
            answer = json.dumps({"score": [score, min(score + 1, 10)], "reasoning": "because"})
            answer = "I cannot say" if any(word in text for word in self.wrong) else answer
            judgements.append(Judgement(parse_pair(answer), answer))
        return judgements


def redder(images, prompts, seeds):
    return [Image.new("RGB", (20, 10), (seed % 256, 0, 0)) for seed in seeds]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"score": [7, 8], "reasoning": "fine"}', 7), ('{"reasoning": "a {b}", "score": [10, 0]}', 0), ("[6, 5]", 5),
        ('```json\n{"score": [7.5, 8]}\n```', 7.5), ('Here it is: {"score": [1, 2]} as asked.', 1),
        ('<think>{"score": [1, 1]}</think>{"score": [9, 8]}', 8), ("[0, 0]", 0),
        ("7 8", None), ('{"score": [7]}', None), ('{"score": [7, 8, 9]}', None), ('{"score": [7, 11]}', None),
        ('{"score": [7, -1]}', None), ('{"score": [7, "8"]}', None), ('{"score": [true, 8]}', None),
        ('{"score": 7}', None), ('{"score": [7, 8]} or {"score": [2, 3]}', None),
        ("", None), ('{"score": [7, 8', None),
        ('{"rating": [7, 8]}', None), ('{"score": [7, NaN]}', None), ('<think>{"score": [7, 8]} or rather', None),
        ("[" * 3000, None), ('{"a": ' * 3000, None),
    ],
)  # fmt: skip
def test_two_scores_or_none(answer, score):
    assert parse_pair(answer) == score


def test_a_run_is_summed_up_as_the_benchmark_does(tmp_path):
    gedit().save_to_disk(tmp_path / "data")
    judge = PairJudge()
    run = run_benchmark(GEditBench(judge, tmp_path / "data"), redder, tmp_path / "run")
    for row in run.cases:
        with Image.open(run.folder / row["edit"]) as edit:
            red = edit.getpixel((0, 0))[0] / 255
        sc, pq = round(10 * red), 9 - round(4 * red)
        assert (row["sc"], row["pq"], row["o"]) == (sc, pq, pytest.approx(math.sqrt(sc * pq)))
    assert run.settings["benchmark"]["average"] == "overall"
    assert run.settings["benchmark"]["title"] == "GEdit-Bench"
    assert run.settings["benchmark"]["metrics"] == {
        name: {"label": name.upper(), "maximum": 10} for name in ("o", "sc", "pq")
    }
    # The judge sees the raw image and the edit, each with an area of 512 x 512.
    assert {tuple(sizes) for _, sizes in judge.texts} == {((591, 443), (591, 443)), ((591, 443),)}
    assert [text for text, _ in judge.texts if "指令 1\n" in text]
    for section, wanted in {
        "en": lambda row: row["language"] == "en",
        "cn": lambda row: row["language"] == "cn",
        "en, intersection": lambda row: row["language"] == "en" and row["intersection"],
        "cn, intersection": lambda row: row["language"] == "cn" and row["intersection"],
    }.items():
        of_tasks = {}
        for row in filter(wanted, run.cases):
            of_tasks.setdefault(row["task_type"], []).append(row["o"])
        (overall,) = [
            row
            for row in run.results["summary"]
            if (row["section"], row["metric"], row["kind"]) == (section, "o", "overall")
        ]
        assert overall["value"] == pytest.approx(np.mean([np.mean(values) for values in of_tasks.values()]))
        assert overall["n"] == sum(map(len, of_tasks.values())) == (6 if section in ("en", "cn") else 3)
    benchmark = run.settings["benchmark"]
    assert benchmark["scorer_prompts"]["quality"][0] == "hp-edit-trl:gedit:quality:2"
    assert benchmark["judge"] == "judge PairJudge, parse parse_pair"


def shown(part) -> np.ndarray:
    """A picture as the server was sent it."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1]))), float)


def test_a_judge_on_a_server_that_goes_by_what_it_is_shown(serve, tmp_path):  # noqa: F811
    def reply(body, count):
        content = body["messages"][-1]["content"]
        text = content[0]["text"]
        pictures = [shown(part) for part in content if part["type"] == "image_url"]
        if "Instruction 4\n" in text:
            return 200, completion('perhaps {"score": [9, 9')  # cut off
        if "Instruction 6\n" in text:
            return 400, {"error": {"message": "refused"}}
        red = pictures[-1][..., 0].mean() / 25.5
        if len(pictures) == 1:
            return 200, completion(json.dumps([8 - red / 2, 9]))
        scores = [red, pictures[0][..., 1].mean() / 25.5]  # of the edit and of the source
        return 200, completion(json.dumps({"score": [score / 2 for score in scores] if "指令" in text else scores}))

    judge = ServerJudge("m", serve(reply).url, parse=parse_pair, max_new_tokens=128, max_retries=0)
    data = gedit()
    run = run_benchmark(GEditBench(CachedJudge(judge, tmp_path / "cache"), data), redder, tmp_path / "run")
    smaller = set()
    for source, row in zip(data, run.cases, strict=True):
        with Image.open(run.folder / row["edit"]) as edit:
            red = edit.getpixel((0, 0))[0] / 25.5
        green = np.asarray(source["input_image_raw"], float)[..., 1].mean() / 25.5
        sc, pq = min(red, green) / (2 if source["instruction_language"] == "cn" else 1), 8 - red / 2
        assert row["pq"] == pytest.approx(pq)
        if row["id"] in ("key4", "key6"):
            assert row["sc"] is row["o"] is None
        else:
            # The mean of a picture changes a little with its size.
            assert (row["sc"], row["o"]) == (pytest.approx(sc, abs=0.02), pytest.approx(math.sqrt(sc * pq), abs=0.02))
            smaller.add(red < green)
    assert smaller == {True, False}  # each of the two scores was the smaller one somewhere
    counts = run.results["counts"]
    assert (counts["parse_failures"], counts["unanswered"], counts["no_score"]) == (1, 1, 2)
    assert set(run.results["reasons"]) == {"no score in the answer", "the judge gave no answer"}
    assert "parse parse_pair" in run.settings["benchmark"]["judge"]


def test_sections_are_those_of_the_data(tmp_path):
    # Each language has its own part only if that is some of its cases.
    english = gedit().map(lambda row: {"Intersection_exist": row["key"] in ("key0", "key4")})
    assert list(GEditBench(PairJudge(), english).sections) == ["en", "cn", "en, intersection"]
    every = gedit().map(lambda row: {"Intersection_exist": True})
    assert list(GEditBench(PairJudge(), every).sections) == ["en", "cn"]
    unknown = gedit().map(lambda row, i: {"instruction_language": None if i == 2 else "en"}, with_indices=True)
    with pytest.raises(ValueError, match="Row 2 of GEdit-Bench has no instruction_language"):
        run_benchmark(GEditBench(PairJudge(), unknown), redder, tmp_path)


def test_an_answer_without_scores_is_missing_and_counted(tmp_path):
    run = run_benchmark(GEditBench(PairJudge(wrong=("Instruction 4",)), gedit()), redder, tmp_path)
    row = run.cases[4]
    assert (row["sc"], row["o"]) == (None, None) and row["pq"] is not None  # quality is asked without the instruction
    assert row["reason"] == "no score in the answer: I cannot say"
    counts = run.results["counts"]
    assert (counts["parse_failures"], counts["judgements"], counts["no_score"]) == (1, 24, 1)
    english = [row for row in run.results["summary"] if (row["section"], row["kind"]) == ("en", "cases")]
    missing = {row["metric"]: row["missing"] for row in english}
    assert missing == {"o": 1, "sc": 1, "pq": 0}


def test_one_key_for_both_languages_and_data_that_are_no_gedit(tmp_path):
    twice = gedit().map(lambda row, i: {"key": f"key{i // 2}"}, with_indices=True)
    assert GEditBench(PairJudge(), twice).dataset["id"][:3] == ["key0-en", "key0-cn", "key1-en"]
    small = gedit().remove_columns("input_image_raw")
    stored = small.cast_column("input_image", ImageFeature(decode=False))[0]["input_image"]
    assert GEditBench(PairJudge(), small).dataset[0]["image"]["bytes"] == stored["bytes"]
    with pytest.raises(ValueError, match="no column 'Intersection_exist', 'key'; its columns are"):
        run_benchmark(GEditBench(PairJudge(), gedit().remove_columns(["key", "Intersection_exist"])), redder, tmp_path)
    assert not list(tmp_path.iterdir())


class DigitJudge(RuleJudge):
    """Answers with the number in the instruction, modulo 7: a 6 is no score."""

    def __init__(self):
        super().__init__(rule=self.answer)
        self.texts = []

    def answer(self, text, pictures):
        self.texts.append(text)
        return int(re.search(r'^Instruction: "\D*(\d+)"$', text, re.MULTILINE)[1]) % 7


def test_hp_scorer_scores_the_edits_too(tmp_path):
    judge, data = DigitJudge(), gedit()
    prompts = HPScorerReward(judge).scorer_prompts
    bench = GEditBench(PairJudge(), data, hp_scorer=HPScorerReward(judge))
    run = run_benchmark(bench, redder, tmp_path, name="one")
    assert [row["hp_score"] for row in run.cases] == [None if i % 7 == 6 else i % 7 for i in range(12)]
    assert all(row["o"] is not None for row in run.cases) and run.results["counts"]["no_score"] == 1
    assert run.cases[6]["reason"] == "no score in the answer: 6"
    # Each task has the prompt of its own, and those that HP-Edit does not know the base prompt.
    tasks = {"color_alter": "color", "subject-add": "add", "text_change": "base"}
    wanted = [prompts[tasks[row["task_type"]]].fill(row["instruction"]) for row in data]
    assert judge.texts == wanted
    benchmark = run.settings["benchmark"]
    assert benchmark["scorer_tasks"] == tasks and set(benchmark["scorer_prompts"]) == {
        "consistency", "quality", "add", "base", "color",
    }  # fmt: skip
    assert benchmark["metrics"]["hp_score"] == {"label": "HP-score", "maximum": 5}
    means = {task: [i % 7 for i in range(12) if TASKS[i % 3] == task and i % 2 == 0 and i % 7 < 6] for task in TASKS}
    (overall,) = [
        row
        for row in run.results["summary"]
        if (row["section"], row["metric"], row["kind"]) == ("en", "hp_score", "overall")
    ]
    assert overall["value"] == pytest.approx(np.mean([np.mean(values) for values in means.values()]))
    line = run.hp_scores[4]
    assert line == {
        "id": "key4", "editor": "one", "task": "subject-add", "score": 4, "answer": "4", "judge":
        "judge RuleJudge, name rule, score_mode integer", "score_mode": "integer", "scorer_prompt":
        prompts["add"].revision, "scorer_prompt_sha": prompts["add"].digest,
    }  # fmt: skip
    assert {name for name in SCORER_TASKS.values() if name != "base"} <= set(prompts) and len(SCORER_TASKS) == 11


def test_what_hp_scorer_cannot_score_and_one_language(tmp_path):
    bench = GEditBench(PairJudge(), gedit(), language="cn")
    assert set(bench.dataset["language"]) == {"cn"} and len(bench.dataset) == 6
    assert list(bench.sections) == ["cn", "cn, intersection"] and bench.settings["language"] == "cn"
    english = gedit().filter(lambda row: row["instruction_language"] == "en")
    with pytest.raises(ValueError, match="GEdit-Bench has no case in the language 'cn'"):
        GEditBench(PairJudge(), english, language="cn").dataset  # noqa: B018
    with pytest.raises(ValueError, match="language='fr' must be 'en' or 'cn'"):
        GEditBench(PairJudge(), gedit(), language="fr")
    with pytest.raises(TypeError, match="hp_scorer='yes' must be true, false or an HPScorerReward"):
        GEditBench(PairJudge(), gedit(), hp_scorer="yes")
    with pytest.raises(TypeError, match="A PairJudge cannot be made to read its answers with parse_score"):
        GEditBench(PairJudge(), gedit(), hp_scorer=True)
    other = gedit().map(lambda row, i: {"task_type": "crop" if i == 3 else row["task_type"]}, with_indices=True)
    with pytest.raises(
        ValueError, match="HP-Scorer has no prompt for the task 'crop'; those of GEdit-Bench are backgr"
    ):
        run_benchmark(GEditBench(PairJudge(), other, hp_scorer=HPScorerReward(DigitJudge())), redder, tmp_path)
    assert not list(tmp_path.iterdir())


def test_prompts_of_ones_own(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "consistency.txt").write_text("Theirs, word for word. Editing instruction: <instruction>")
    with pytest.raises(FileNotFoundError, match="no prompt quality.md or quality.txt, which gedit needs"):
        GEditBench(PairJudge(), gedit(), scorer_prompts=str(folder))
    (folder / "quality.md").write_text("Theirs too.")
    judge = PairJudge()
    bench = GEditBench(judge, gedit(2), scorer_prompts=str(folder))
    run_benchmark(bench, redder, tmp_path / "run")
    assert {text for text, _ in judge.texts} == {
        "Theirs, word for word. Editing instruction: Instruction 0",
        "Theirs, word for word. Editing instruction: 指令 1",
        "Theirs too.",
    }
    assert bench.settings["scorer_prompts"]["consistency"][0].startswith(f"{folder}:consistency:sha-")
    (folder / "consistency.txt").write_text("Theirs, but the instruction is nowhere.")
    with pytest.raises(ValueError, match="prompt consistency in .* has no {instruction}"):
        GEditBench(PairJudge(), gedit(), scorer_prompts=str(folder))


# Stands for the authors' file: the names are theirs, the texts are not.
ORIGINAL = '''
import os
_context_no_delimit = """An artist answers:
{
"score" : [...],
"reasoning" : "..."
}"""
_context = "Not this one."
_prompts_0shot_two_image_edit_rule = """RULES:
Two images.
"""
_prompts_0shot_tie_rule_SC = """
Editing instruction: <instruction>
"""
_prompts_0shot_rule_PQ = "RULES: one image."
raise SystemExit("This file is read, not executed.")
'''


def test_the_authors_own_file_of_prompts(tmp_path):
    (tmp_path / "vie_prompts.py").write_text(ORIGINAL)
    judge = PairJudge()
    run_benchmark(GEditBench(judge, gedit(1), scorer_prompts=str(tmp_path)), redder, tmp_path / "run")
    context = 'An artist answers:\n{\n"score" : [...],\n"reasoning" : "..."\n}\n'
    assert [text for text, _ in judge.texts] == [
        context + "RULES:\nTwo images.\n\n\nEditing instruction: Instruction 0\n",
        context + "RULES: one image.",
    ]
    (tmp_path / "quality.txt").write_text("Mine.")  # a prompt of one's own comes first
    assert GEditBench(PairJudge(), gedit(1), scorer_prompts=str(tmp_path)).scorer_prompts["quality"].text == "Mine."
    for text, message in (
        (ORIGINAL.replace("_tie_rule_SC", ""), "has no text _prompts_0shot_tie_rule_SC"),
        ("_context_no_delimit = (", "is no Python file"),
        ("\0", "is no Python file"),
    ):
        (tmp_path / "vie_prompts.py").write_text(text)
        with pytest.raises(ValueError, match=message):
            GEditBench(PairJudge(), gedit(1), scorer_prompts=str(tmp_path))


@pytest.mark.parametrize(
    ("size", "shown"),
    [((512, 512), (512, 512)), ((64, 48), (591, 443)), ((4000, 1000), (1024, 256)), ((1000, 3), (9347, 28))],
)
def test_images_are_shown_at_one_area_in_their_own_aspect_ratio(size, shown):
    assert as_judged(Image.new("RGB", size)).size == shown


def test_the_prompts_ask_for_scores_first():
    for prompt in GEditBench(PairJudge(), gedit(1)).scorer_prompts.values():
        assert 0 < prompt.text.rindex('{"score": [') < prompt.text.rindex('"reasoning"')


def test_a_judge_that_reads_other_answers(tmp_path):
    judge = ServerJudge("m", "http://127.0.0.1:9/v1", max_new_tokens=512)
    with pytest.raises(ValueError, match="with parse_score, but this benchmark needs parse=parse_pair"):
        GEditBench(CachedJudge(judge, tmp_path / "cache.sqlite"), gedit())
    short = ServerJudge("m", "http://127.0.0.1:9/v1", parse=parse_pair)
    with pytest.raises(ValueError, match="max_new_tokens=16, .*allow 128 or more"):
        GEditBench(short, gedit())
    with pytest.raises(ValueError, match="cannot use parse=parse_pair"):
        ServerJudge("m", "http://127.0.0.1:9/v1", "expected", parse=parse_pair)
