"""Instructions by scripted writers: what is taken, what is rejected and why, templates, a server."""

import io
import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from hp_edit_trl import ServerJudge
from hp_edit_trl.data.builder.instructions import (
    InstructionTemplate,
    WriteInstructions,
    load_instruction_templates,
)
from hp_edit_trl.data.builder.plan import Plan
from hp_edit_trl.data.builder.styles import LANGUAGES, STYLES
from hp_edit_trl.judges import CachedJudge, Judgement
from hp_edit_trl.rewards import load_scorer_prompts
from hp_edit_trl.tasks import TASKS
from tests.data.builder.toy_build import encoded
from tests.helpers import photo
from tests.judges.test_judges import completion, serve  # noqa: F401  (a fixture)


YES = '{"feasible": true, "reason": ""}'

# One good answer for each task and language
GOOD = {
    ("add", "en"): {"instruction": "Add a small red kite above the brown dog.", "object": "a small red kite",
        "place": "above the brown dog"},
    ("add", "zh"): {"instruction": "在棕色的狗上方添加一只红色的小风筝。", "object": "红色的小风筝",
        "place": "棕色的狗上方"},
    ("remove", "en"): {"instruction": "Remove the blue bucket on the left.", "object": "The blue bucket"},
    ("remove", "zh"): {"instruction": "移除左边的蓝色水桶。", "object": "蓝色水桶"},
    ("swap", "en"): {"instruction": "Replace the brown dog with an orange cat.", "object": "brown dog",
        "replacement": "orange cat"},
    ("swap", "zh"): {"instruction": "把棕色的狗换成一只橘猫。", "object": "棕色的狗", "replacement": "橘猫"},
    ("background", "en"): {"instruction": "Keep the dog and change the background to a snowy forest.",
        "background": "snowy forest"},
    ("background", "zh"): {"instruction": "保留狗，把背景换成白雪覆盖的森林。", "background": "白雪覆盖的森林"},
    ("color", "en"): {"instruction": "Change the colour of the car to dark green.", "object": "the car",
        "color": "dark green"},
    ("color", "zh"): {"instruction": "将汽车的颜色改为深绿色。", "object": "汽车", "color": "深绿色"},
    ("bokeh", "en"): {"instruction": "Strongly blur all but the brown dog.", "subject": "the brown dog"},
    ("bokeh", "zh"): {"instruction": "保持棕色的狗清晰，强烈虚化背景。", "subject": "棕色的狗"},
    ("relight", "en"): {"instruction": "Light the scene from the left with soft, warm light.",
        "direction": "from the left", "quality": "soft warm light"},
    ("relight", "zh"): {"instruction": "用3000K的柔和暖光从左侧照亮场景。", "direction": "从左侧",
        "quality": "柔和暖光"},
    ("style", "en"): {"instruction": "Turn the picture into pixel art and keep the dog where it is."},
    ("style", "zh"): {"instruction": "把画面变成像素画，保持狗的位置不变。"},
}  # fmt: skip
REQUIREMENTS = {
    "add": "new object: a small red kite; its place: above the brown dog",
    "remove": "must be gone: The blue bucket",
    "swap": "must be gone: brown dog; must take its place: orange cat",
    "background": "new background: snowy forest",
    "color": "recolour only: the car; new colour: dark green",
    "bokeh": "keep sharp: the brown dog",
    "relight": "direction of the light: from the left; quality of the light: soft warm light",
    "style": "style: pixel art. Large square pixels in a small palette, as in an early video game.",
}


class Writer:
    """Answers from a list, and says yes to whatever is asked of feasibility unless told otherwise."""

    def __init__(self, answers, feasible=YES):
        self.answers, self.feasible = answers, feasible
        self.calls, self.loaded = [], 0

    @property
    def identity(self):
        return {"judge": "Writer", "name": "w", "revision": "r1", "score_mode": "integer", "max_new_tokens": 256}

    def load(self, num_images=2):
        self.loaded += 1

    def __call__(self, conversations):
        self.calls.append(conversations)
        second = "You check instructions" in conversations[0][0]["content"][0]["text"]
        texts = [self.feasible] * len(conversations) if second else self.answers[: len(conversations)]
        return [text if isinstance(text, Judgement) else Judgement(None, text) for text in texts]


def batch_of(*cases, image=None):
    """Cases of (task, language)."""
    return {
        "image": [image or encoded(photo(48, 32, i)) for i in range(len(cases))],
        "image_id": [f"{i:016x}" for i in range(len(cases))],
        "task": [task for task, _ in cases],
        "category": ["dog"] * len(cases),
        "language": [language for _, language in cases],
        "style": ["pixel art" if task == "style" else None for task, _ in cases],
    }


def write(answers, *cases, feasible=YES, **options):
    stage = WriteInstructions(Writer(answers, feasible), **options)
    done = stage(batch_of(*cases))
    assert done.keys() == {*stage.features, "reason", "unanswered"}
    assert {len(values) for values in done.values()} == {len(cases)}
    stage.features.encode_batch({name: done[name] for name in stage.features})
    json.dumps(done, ensure_ascii=False).encode()  # whatever comes out can be written to a file
    return done


def reason(answer, task="bokeh", language="en", **options):
    return write([answer], (task, language), **options)["reason"][0]


def good(**changes):
    return json.dumps(GOOD["bokeh", "en"] | changes, ensure_ascii=False)


def test_good_answers_of_every_task_and_language():
    cases = list(GOOD)
    assert {task for task, _ in cases} == set(TASKS)
    done = write([json.dumps(answer, ensure_ascii=False) for answer in GOOD.values()], *cases)
    assert done["reason"] == [None] * len(cases)
    assert done["prompt"] == [answer["instruction"] for answer in GOOD.values()]
    english = [i for i, (_, language) in enumerate(cases) if language == "en"]
    assert {cases[i][0]: done["requirement"][i] for i in english} == REQUIREMENTS
    assert done["requirement"][cases.index(("bokeh", "zh"))] == "keep sharp: 棕色的狗"
    assert len(set(done["id"])) == len(cases) and all(len(id_) == 16 and int(id_, 16) >= 0 for id_ in done["id"])
    assert done["writer"] == ["judge Writer, name w, revision r1, score_mode integer, max_new_tokens 256"] * len(cases)
    assert done["writer_prompt"] == [f"hp-edit-trl:instructions/{task}:1" for task, _ in cases]


def test_what_the_writer_is_told():
    stage = WriteInstructions(writer := Writer([json.dumps(GOOD["style", "zh"])]))
    stage(batch := batch_of(("style", "zh")))
    (first,), (second,) = writer.calls
    assert [message["role"] for message in first] == ["system", "user"] == [message["role"] for message in second]
    for conversation in (first, second):
        (picture,) = [part["image"] for part in conversation[1]["content"] if part["type"] == "image"]
        assert picture.tobytes() == Image.open(io.BytesIO(batch["image"][0]["bytes"])).convert("RGB").tobytes()
    text = first[0]["content"][0]["text"]
    assert "has to do with: dog" in text and "Write in Simplified Chinese" in text
    assert "another style: 像素画." in text and "Large square pixels" in text
    assert '{"instruction": "..."}' in text
    text = second[0]["content"][0]["text"]
    assert "kind of edit is: style" in text and f'Instruction: "{GOOD["style", "zh"]["instruction"]}"\n' in text


@pytest.mark.parametrize(
    "answer",
    [
        good(), f"  {good()}\n", f"```json\n{good()}\n```", f"```\n{good()}```", f"Here you are: {good()} Have fun!",
        f"Sure.\n```json\n{good()}\n```\nAnything else?",
        f"<think>A {{dog}}? Or {good(subject='the cat')}?</think>\n\n{good()}",
        json.dumps(GOOD["bokeh", "en"] | {"why": [1, {"a": None}]}, indent=4), good(subject="THE Brown dog."),
        good(instruction="  Strongly  blur\u00a0all but\tthe brown dog. "), good(subject="the  brown\ndog"),
        f"{{I think}} the answer is {good()}",
        good(subject="the  brown dog").replace("  ", "\n"),
    ],
)  # fmt: skip
def test_answers_that_are_taken(answer):
    done = write([answer], ("bokeh", "en"))
    assert done["reason"] == [None] and done["prompt"] == ["Strongly blur all but the brown dog."]
    assert done["requirement"][0].casefold().rstrip(".") == "keep sharp: the brown dog"


PROSE = "I am sorry, but as a language model I cannot look at pictures."
RUBBISH = [
    # nothing, prose, broken JSON
    ("", "no answer: it is empty"), (" \n\t", "no answer: it is empty"), (PROSE, "not an object: I am sorry"),
    ("4", "not an object: 4"), ("null", "not an object: null"), ("true", "not an object"),
    ('"a string"', "not an object"),
    (good()[:-20], "not an object"), (good()[:-1], "not an object"), (good().replace('"', "'"), "not an object"),
    (f"[{good()}]", "not an object"), ("[]", "not an object"), ("{}", "field missing: 'instruction' is not there"),
    (good() + good(), "not an object: several"),
    (f"{good()}\nor rather\n{good(subject='all')}", "not an object: several"),
    (f"<think>{good()}", "not an object: the reasoning is not closed"), ("<think></think>", "not an object"),
    ("{" * 10_000, "not an object"), ('{"a":' * 3_000, "not an object"), ("[" * 15_000, "not an object"),
    ("x" * 1_000_000, "not an object: 20000 characters"), ("9" * 10_000, "not an object"),
    ('{"a":' + "9" * 9_000 + "}", "not an object"),
    ("\ufffd\ufffd", "not an object"), ("NaN", "not an object"), ("\x00\x01", "no answer"),
    ("{{{}}}", "field missing"),
    # an object that is another one
    ('{"Instruction": "Blur all but the dog", "subject": "the dog"}', "field missing: 'instruction' is not there"),
    ('{"prompt": "Blur all but the dog"}', "field missing: 'instruction'"),
    (good(subject=None), "field missing: 'subject' is not there"),
    (good(subject=3), "field missing: 'subject' is int"),
    (good(instruction=["Blur", "it"]), "field missing: 'instruction' is list"),
    (good(instruction={"en": "Blur all but the dog"}), "field missing: 'instruction' is dict"),
    (good(instruction=True), "field missing: 'instruction' is bool"),
    (good(subject=""), "field missing: 'subject' is ''"), (good(subject="..."), "placeholder"),
    (good(subject="?!"), "field missing"),
    (good(subject="None"), "field missing: 'subject' is 'None'"), (good(subject="the subject"), "field missing"),
    (good(instruction=""), "field missing"),
    ('{"instruction": {"instruction": ' * 300 + '""' + "}}" * 300, "field missing: 'instruction' is dict"),
    # a text that is none
    (good(instruction="<instruction>"), "placeholder or markup"),
    (good(instruction="Blur all but the <object> there"), "placeholder or markup"),
    (good(instruction="Blur all but [subject] please"), "placeholder"),
    (good(instruction="Blur all but {subject} please"), "placeholder"),
    (good(instruction="Blur it all … the brown dog"), "placeholder"),
    (good(instruction="**Blur** all but the brown dog"), "placeholder or markup"),
    (good(instruction="Blur all but ____ and the brown dog"), "placeholder"),
    (good(instruction="Blur.\nKeep the brown dog."), "several lines"),
    (good(instruction="Blur all.\u2028Keep the brown dog."), "several lines"),
    (good(instruction="Blur all but the\x07 brown dog"), "unreadable characters: U+0007"),
    (good(instruction="Blur all but the \x00brown dog"), "unreadable characters: U+0000"),
    (good(subject="the brown dog\u200b"), "unreadable characters: U+200B"),
    ('{"instruction": "Blur all but the \\ud83d brown dog", "subject": "the brown dog"}',
        "unreadable characters: U+D83D"),
    ('{"instruction": "Blur all but the brown dog", "subject": "\\udc00"}', "unreadable characters: U+DC00"),
    (good(instruction="Blur all but the \ufffdbrown dog"), "unreadable characters: U+FFFD"),
    (good(instruction="\u202eBlur all but the brown dog"), "unreadable characters: U+202E"),
    # length, language, repetition
    (good(instruction="Blur"), "length: 1 words, at least 3 and at most 60"),
    (good(instruction="the brown dog " * 1_000), "bad prompt: has a prompt of 13999 characters"),
    (good(instruction=" ".join(f"word{i}" for i in range(58)) + " the brown dog"), "length: 61 words"),
    (good(instruction="x" * 10_000), "bad prompt: has a prompt of 10000 characters"),
    (good(instruction="保持棕色的狗清晰，虚化 the brown dog 背景"), "language: it should be English"),
    (good(instruction="Размой фон за собакой"), "language"),
    (good(instruction="背景を ぼかして ください"), "language"), (good(instruction="12 345 6789"), "language"),
    (good(instruction="🐕 🐕‍🦺 🐩"), "unreadable"),
    (good(instruction="blur blur blur the brown dog"), "repetition"),
    (good(instruction="Blur it, blur it, blur it: the brown dog"), "repetition"),
    (good(instruction="Blur the brown dog and the brown dog and the big tree and the brown dog"), "repetition"),
    # a text that is not what its fields say
    (good(subject="the brown cat"), "not named: subject 'the brown cat' is not in 'Strongly blur"),
    (good(subject="brown do"), "not named"),
    (good(subject="dog brown"), "not named"), (good(subject="x" * 9_000), "not named: subject 'xxx"),
    (good(instruction="Apart from what is new, speak only of what can be seen in this picture"), "echo"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), RUBBISH, ids=range(len(RUBBISH)))
def test_rubbish_is_a_rejected_row_with_its_reason(answer, expected):
    # Between two good ones, which it does nothing to
    done = write([good(), answer, good()], *[("bokeh", "en")] * 3)
    assert done["reason"][0] is done["reason"][2] is None
    assert done["reason"][1].startswith(expected), done["reason"][1]
    assert len(done["reason"][1]) < 400 and done["reason"][1].isprintable()
    assert done["id"][1] is done["prompt"][1] is done["requirement"][1] is None
    assert done["writer"][1] == done["writer"][0] and done["writer_prompt"][1] == done["writer_prompt"][0]


@pytest.mark.parametrize(
    ("task", "language", "changes", "expected"),
    [
        ("bokeh", "zh", {"instruction": "Keep the brown dog sharp and blur the rest"},
            "language: it should be Simplified Chinese"),
        ("bokeh", "zh", {"instruction": "茶色の犬だけをはっきりさせてください"}, "language"),
        ("bokeh", "zh", {"instruction": "虚化。"}, "length: 2 characters, at least 4 and at most 100"),
        ("bokeh", "zh", {"instruction": "保持棕色的狗清晰" * 20}, "length: 160 characters"),
        ("bokeh", "zh", {"instruction": "虚化虚化虚化棕色的狗"}, "repetition"),
        ("bokeh", "zh", {"subject": "白色的猫"}, "not named"),
        ("bokeh", "zh", {"subject": "无"}, "field missing"),
        ("bokeh", "zh", {"subject": "the brown dog"}, "not named"),
        ("swap", "en", {"replacement": "the brown dog"}, "fields alike: object and replacement are 'the brown dog'"),
        ("swap", "en", {"replacement": "a white cat"}, "not named: replacement 'a white cat'"),
        ("color", "en", {"color": "green car"}, "not named: color"),
        ("relight", "en", {"direction": ""}, "field missing: 'direction' is ''"),
        ("relight", "en", {"quality": None}, "field missing: 'quality'"),
        ("relight", "en", {"quality": "hard light"}, "not named: quality"),
        ("add", "en", {"place": "on the moon"}, "not named: place"),
        ("style", "en", {"instruction": "Turn the picture into an oil painting."},
            "style not named: 'pixel art' is not in 'Turn"),
        ("style", "zh", {"instruction": "把画面变成 pixel art，保持狗的位置不变。"}, "style not named: '像素画'"),
    ],
)  # fmt: skip
def test_rubbish_of_other_tasks_and_in_chinese(task, language, changes, expected):
    assert reason(json.dumps(GOOD[task, language] | changes), task, language).startswith(expected)


def test_the_prompt_sent_back_is_no_instruction():
    for task, template in load_instruction_templates().items():
        if task != "feasibility":
            assert reason(template.text, task).startswith("placeholder"), task


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_every_style_can_be_named(style):
    batch = batch_of(("style", "en"), ("style", "zh"))
    batch["style"] = [style.name] * 2
    answers = [
        f'{{"instruction": "Make it {style.name} please."}}',
        f'{{"instruction": "把整个画面变成{style.chinese}。"}}',
    ]
    done = WriteInstructions(Writer(answers))(batch)
    assert done["reason"] == [None, None] and all(style.description in text for text in done["requirement"])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (YES, None), (f"```json\n{YES}\n```", None), (f"<think>Is it {{}}?</think>{YES}", None),
        ('{"feasible": true}', None),
        ('{"feasible": false, "reason": "There is no\\n dog."}', "infeasible: There is no dog."),
        ('{"feasible": false, "reason": "No\n\tdog."}', "infeasible: No dog."),
        ('{"feasible": false}', "infeasible: no reason given"),
        ('{"feasible": false, "reason": 4}', "infeasible: no reason given"),
        ('{"feasible": false, "reason": "half \\ud83d"}', "infeasible: half"),
        ('{"feasible": "yes"}', 'feasibility unknown: {"feasible": "yes"}'),
        ('{"feasible": 1}', "feasibility unknown"), ("true", "feasibility unknown"),
        ("Yes, it is.", "feasibility unknown: not an object: Yes, it is."), (YES[:-3], "feasibility unknown"),
        (f"[{YES}]", "feasibility unknown"),
        (YES + '{"feasible": false}', "feasibility unknown"), (good(), "feasibility unknown"),
        ("", "no answer: it is empty"),
    ],
)  # fmt: skip
def test_feasibility(answer, expected):
    done = write([good()], ("bokeh", "en"), feasible=answer)
    (found,) = done["reason"]
    assert found == expected or (expected is not None and found.startswith(expected))
    assert found is None or found.isprintable()
    assert done["prompt"] == ["Strongly blur all but the brown dog."] and done["id"][0]  # kept, to see what was wrong


def test_only_what_is_left_is_asked_about_a_second_time():
    writer = Writer([good(), PROSE, good()])
    assert WriteInstructions(writer)(batch_of(*[("bokeh", "en")] * 3))["reason"][0] is None
    assert [len(call) for call in writer.calls] == [3, 2]
    writer = Writer([PROSE] * 2)
    WriteInstructions(writer)(batch_of(*[("bokeh", "en")] * 2))
    assert [len(call) for call in writer.calls] == [2]
    writer = Writer([good()])
    assert WriteInstructions(writer, check_feasibility=False)(batch_of(("bokeh", "en")))["reason"] == [None]
    assert [len(call) for call in writer.calls] == [1]
    writer = Writer([])
    assert WriteInstructions(writer)(batch_of())["reason"] == [] and writer.calls == []


class Pictures:
    """A style's picture, named by its file."""

    def read(self, file):
        return encoded(photo(20, 10, int(file)))["bytes"]


def test_the_writer_sees_the_target_and_the_picture_of_the_style():
    batch = batch_of(("bokeh", "en"), ("style", "en"), ("bokeh", "en"), ("style", "en"))
    target = encoded(photo(48, 32, 50))
    batch |= {"target": [target, None, None, None], "style_file": [None, "7", None, None]}
    texts = [json.dumps(GOOD[task, "en"]) for task in batch["task"]]
    writer = Writer(texts)
    stage = WriteInstructions(writer, style_images=Pictures(), with_targets=True)
    assert {"target", "style_file"} < set(stage.inputs) and not {"target", "style_file"} & {*WriteInstructions.inputs}
    done = stage(batch)
    assert done["reason"] == [None] * 4 and done["style_image"] == [None, encoded(photo(20, 10, 7)), None, None]
    questions, second = writer.calls
    shown = [one[-1]["content"] for one in questions]
    assert [len(parts) for parts in shown] == [4, 4, 2, 2] and all(len(one[-1]["content"]) == 2 for one in second)
    templates = load_instruction_templates()
    assert shown[0][2]["text"] == templates["bokeh"].target and "sharp" in shown[0][2]["text"]
    assert shown[1][2]["text"] == templates["style"].style_image
    assert shown[0][3]["image"].tobytes() == photo(48, 32, 50).tobytes() and shown[1][3]["image"].size == (20, 10)
    # A template without a text for it does not show it.
    plain = {**templates, "bokeh": InstructionTemplate("bokeh", "1", templates["bokeh"].text, ("subject",))}
    assert plain["bokeh"].digest != templates["bokeh"].digest
    WriteInstructions(writer := Writer(texts), plain, style_images=Pictures(), with_targets=True)(batch)
    assert [len(one[-1]["content"]) for one in writer.calls[0]] == [2, 4, 2, 2]


def test_ids_go_by_image_task_and_prompt():
    batch = batch_of(*[("bokeh", "en")] * 2)
    first = WriteInstructions(Writer([good()] * 2))(batch)["id"]
    batch["image_id"].reverse()
    batch["image"].reverse()
    assert WriteInstructions(Writer([good()] * 2))(batch)["id"] == first[::-1] and first[0] != first[1]
    other = good(instruction="Slightly blur all but the brown dog.")
    assert WriteInstructions(Writer([other] * 2))(batch)["id"][0] not in first


def test_an_image_that_cannot_be_read():
    batch = batch_of(*[("bokeh", "en")] * 2)
    batch["image"][0] = {"bytes": b"no image", "path": None}
    writer = Writer([good()])
    done = WriteInstructions(writer)(batch)
    assert done["reason"][0].startswith("unreadable image: The image '0000000000000000' cannot be decoded")
    assert done["reason"][1] is None and len(writer.calls[0]) == 1


FAILED = Judgement(None, "APITimeoutError: Request timed out.", answered=False)


def test_single_rows_without_an_answer_are_rejected():
    done = write([good(), FAILED, good()], *[("bokeh", "en")] * 3)
    assert done["reason"] == [None, "no answer: APITimeoutError: Request timed out.", None]
    assert done["unanswered"] == [False, True, False]


def test_a_batch_without_any_answer_is_an_error_and_no_rows():
    batch = batch_of(*[("bokeh", "en")] * 2)
    last = Judgement(None, "refused \x00", answered=False)
    with pytest.raises(
        ConnectionError,
        match=r"writer \(judge Writer, name w, .* no answer to 2 questions in a row; the last error: refused",
    ):
        WriteInstructions(Writer([FAILED, last]))(batch)
    with pytest.raises(ConnectionError, match="the last error: APITimeoutError"):  # in the second question
        WriteInstructions(Writer([good()] * 2, feasible=FAILED))(batch)


def test_a_single_picture_without_an_answer_does_not_stop_a_build_forever():
    class Gone(Writer):
        def load(self, num_images=2):
            raise ConnectionError("nobody there")

    batch = batch_of(("bokeh", "en"))
    writer = Writer([FAILED])
    assert WriteInstructions(writer)(batch)["reason"] == ["no answer: APITimeoutError: Request timed out."]
    assert writer.loaded == 1
    with pytest.raises(ConnectionError, match="nobody there"):
        WriteInstructions(Gone([FAILED]))(batch)


def test_a_server(serve):  # noqa: F811
    """Both languages over HTTP: what is sent, what comes back, what a broken request does."""

    def reply(body, count):
        text = body["messages"][0]["content"][0]["text"]
        if "You check instructions" in text:
            return 200, completion('{"feasible": false, "reason": "No kite."}' if "风筝" in text else YES)
        if "replaces one object" in text:
            return 400, {"error": {"message": "this picture is refused"}}
        task = next(task for task in TASKS if f'"{TASK_WORD[task]}"' in text or task == "style")
        return 200, completion(f"```json\n{json.dumps(GOOD[task, 'zh' if 'Chinese' in text else 'en'])}\n```")

    server = serve(reply)
    cases = [("bokeh", "en"), ("bokeh", "zh"), ("add", "zh"), ("swap", "en"), ("style", "zh")]
    stage = WriteInstructions(ServerJudge("vlm", server.url, max_new_tokens=256, max_retries=0, revision="r7"))
    stage.load()
    done = stage(batch_of(*cases))
    assert done["reason"][:3] == [None, None, "infeasible: No kite."] and done["reason"][4] is None
    assert done["reason"][3].startswith("no answer: http 400: ") and "this picture is refused" in done["reason"][3]
    assert done["prompt"] == [None if case[0] == "swap" else GOOD[case]["instruction"] for case in cases]
    assert done["writer"][0].startswith("judge ServerJudge, name vlm, revision r7, ")
    asked = server.requests[1:]  # after the trial
    assert len(asked) == 5 + 4 and {request["max_tokens"] for request in asked} == {256}
    assert all(request["messages"][1]["content"][1]["type"] == "image_url" for request in asked)

    broken = serve(lambda body, count: (500, {"error": {"message": "out of order"}}))
    stage = WriteInstructions(ServerJudge("vlm", broken.url, max_new_tokens=256, max_retries=0))
    with pytest.raises(ConnectionError, match="out of order"):
        stage(batch_of(*cases))
    with pytest.raises(ConnectionError, match="gives no judgements of 2 images: .*out of order"):
        stage.load()


TASK_WORD = {
    "bokeh": "subject",
    "add": "place",
    "swap": "replacement",
    "color": "color",
    "relight": "direction",
    "background": "background",
    "remove": "object",
    "style": "",
}


def test_a_plan_is_written():
    """The columns of the plan are those that the instructions read."""
    images = {"image_id": [f"{i:016x}" for i in range(20)], "category": ["dog"] * 20}
    images["tasks"] = [",".join(TASKS)] * 20
    plan = Plan(tasks_per_image=2, languages={"en": 1, "zh": 1})(images)
    rows = range(len(plan["task"]))
    batch = {name: plan[name] for name in ("task", "language", "style")}
    batch |= {
        "image": [encoded(photo(48, 32))] * len(rows),
        "image_id": [images["image_id"][i] for i in plan["parent"]],
        "category": ["dog"] * len(rows),
    }
    by_name = {style.name: style for style in STYLES}
    answers = []
    for i in rows:
        answer = dict(GOOD[plan["task"][i], plan["language"][i]])
        if plan["task"][i] == "style":
            style = by_name[plan["style"][i]]
            answer["instruction"] = (
                answer["instruction"].replace("pixel art", style.name).replace("像素画", style.chinese)
            )
        answers.append(json.dumps(answer))
    done = WriteInstructions(Writer(answers))(batch)
    assert done["reason"] == [None] * len(rows) and len(set(done["id"])) == len(rows)


def test_settings_change_with_what_decides_and_an_unloaded_stage_can_be_sent_away():
    stage = WriteInstructions(Writer([]))
    first = json.dumps(stage.settings)
    assert json.dumps(pickle.loads(pickle.dumps(stage)).settings) == first
    templates = load_instruction_templates()
    changed = templates | {"add": InstructionTemplate("add", templates["add"].revision, templates["add"].text + " ")}
    for other in (
        WriteInstructions(Writer([]), changed), WriteInstructions(Writer([]), styles=STYLES[:31]),
        WriteInstructions(Writer([]), min_length={"en": 4, "zh": 4}),
        WriteInstructions(Writer([]), check_feasibility=False),
    ):  # fmt: skip
        assert json.dumps(other.settings) != first
    assert json.dumps(WriteInstructions(Writer([]), batch_size=3).settings) == first


def test_writers_and_options_that_are_not_usable(tmp_path):
    url = "http://127.0.0.1:9/v1"
    with pytest.raises(
        ValueError, match=r"writer \(judge ServerJudge, name m, .*\) would be cut off: use max_new_tokens=256"
    ):
        WriteInstructions(ServerJudge("m", url))
    with pytest.raises(ValueError, match="would be cut off"):
        WriteInstructions(CachedJudge(ServerJudge("m", url), tmp_path / "cache"))
    for options in ({"score_mode": "expected"}, {"num_answers": 3}):
        with pytest.raises(ValueError, match="use score_mode='integer' and num_answers=1"):
            WriteInstructions(ServerJudge("m", url, max_new_tokens=256, **options))
    with pytest.raises(ValueError, match="batch_size=0 must be an integer of at least 1"):
        WriteInstructions(Writer([]), batch_size=0)
    for lengths in (
        {"min_length": {"en": 3}},
        {"min_length": {"en": 70, "zh": 4}},
        {"max_length": {"en": 0, "zh": 9}},
    ):
        with pytest.raises(ValueError, match="must each have a number of at least 1"):
            WriteInstructions(Writer([]), **lengths)
    templates = load_instruction_templates()
    without = {task: one for task, one in templates.items() if task != "feasibility"}
    with pytest.raises(
        ValueError, match="no instruction template for the task 'feasibility'.* check_feasibility=False"
    ):
        WriteInstructions(Writer([]), without)
    writer = Writer([good()])
    batch = batch_of(("bokeh", "en"))
    for column, value, message in [
        ("task", "crop", "no instruction template for the task 'crop'; there are"),
        ("language", "de", "language 'de' is not known"),
    ]:
        with pytest.raises(ValueError, match=message):
            WriteInstructions(writer)(batch | {column: [value]})
    with pytest.raises(ValueError, match="style 'mine' is not among the styles: pass the same ones to Plan"):
        WriteInstructions(writer)(batch_of(("style", "en")) | {"style": ["mine"]})
    assert writer.calls == []


def test_the_templates_of_the_package():
    templates = load_instruction_templates()
    assert set(templates) == {*TASKS, "feasibility"} and set(load_scorer_prompts()) == {*TASKS, "base"}
    for task in TASKS:
        template = templates[task]
        assert all(f'"{name}": "..."' in template.text for name in ("instruction", *template.fields)), task
        assert all(f"{{{name}}}" in template.text for name in ("category", "language"))
        assert template.requirement is not None and all(
            f"{{{name}}}" in template.requirement for name in template.fields
        )
    assert "{style}" in templates["style"].text and "{style_description}" in templates["style"].text
    assert "{prompt}" in templates["feasibility"].text
    assert {task: templates[task].fields for task in ("bokeh", "relight", "swap", "style")} == {
        "bokeh": ("subject",), "relight": ("direction", "quality"), "swap": ("object", "replacement"), "style": (),
    }  # fmt: skip
    assert set(LANGUAGES) == {"en", "zh"}


@pytest.mark.parametrize("folder", [".", "instructions"])
def test_a_folder_of_templates(tmp_path, folder):
    (tmp_path / "add.md").write_text(
        "---\ntask: add\nrevision: 9\n---\nA scorer prompt {prompt}"
    ) if folder != "." else 0
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "README.md").write_text("no template")
    text = (
        "---\ntask: crop\nrevision: b2\nfields: [part]\nrequirement: 'keep {part}'\n---\nIn {language}, crop {this}.\n"
    )
    (tmp_path / folder / "crop.md").write_text(text)
    templates = load_instruction_templates(str(tmp_path))
    name = f"{tmp_path}:instructions/crop:b2"
    assert templates == {
        "crop": InstructionTemplate("crop", name, "In {language}, crop {this}.", ("part",), "keep {part}")
    }
    stage = WriteInstructions(
        writer := Writer(['{"instruction": "Crop to the left half.", "part": "left half"}']),
        templates,
        check_feasibility=False,
    )
    assert stage(batch_of(("crop", "en")))["requirement"] == ["keep left half"]
    assert writer.calls[0][0][0]["content"][0]["text"] == "In English, crop {this}."
    with pytest.raises(ValueError, match="revision='main' pins a Hub repository"):
        load_instruction_templates(str(tmp_path), "main")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no header", "does not begin with a header that names `task` and `revision`"),
        ("---\n- a\n---\n{language}", "does not begin with a header"),
        ("---\ntask: [\n---\n{language}", "header of the prompt .*x.md is no YAML"),
        ("---\ntask: x\nrevision: a b\n---\n{language}", "has the revision 'a b'"),
        ("---\ntask: x\nrevision: 1\n---\nnothing", r"x.md has no \{language\}"),
        ("---\ntask: feasibility\nrevision: 1\n---\n{language}", r"x.md has no \{prompt\}"),
        ("---\ntask: x\nrevision: 1\nfields: part\n---\n{language}", "x.md has the fields 'part': give a list"),
        ("---\ntask: x\nrevision: 1\nfields: [a b]\n---\n{language}", "give a list of plain names"),
        ("---\ntask: x\nrevision: 1\nfields: [1]\n---\n{language}", "give a list"),
        ("---\ntask: x\nrevision: 1\nfields: [instruction]\n---\n{language}", "names the field 'instruction'"),
        ("---\ntask: x\nrevision: 1\nrequirement: {a: 1}\n---\n{language}",
            "has the requirement .*: put it in quotes"),
        ("---\ntask: x\nrevision: 1\nfields: [a]\nrequirement: 'keep {b}'\n---\n{language}",
            r"x.md uses \['b'\]; its fields are \['a'\]"),
        (None, "no instruction templates"),
    ],
)  # fmt: skip
def test_templates_that_are_not_usable(tmp_path, text, message):
    if text is not None:
        (tmp_path / "x.md").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_instruction_templates(str(tmp_path))


def test_two_templates_for_a_task(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.md").write_text("---\ntask: x\nrevision: 1\n---\n{language}")
    with pytest.raises(ValueError, match="b.md is a second one for the task 'x'"):
        load_instruction_templates(str(tmp_path))


def test_the_templates_are_where_the_wheel_takes_them_from():
    folder = Path(__file__).parents[3] / "prompts" / "instructions"
    assert {path.stem for path in folder.glob("*.md")} == {*TASKS, "feasibility"}
