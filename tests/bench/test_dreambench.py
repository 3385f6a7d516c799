import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor, ViTConfig, ViTModel

from hp_edit_trl import ServerJudge
from hp_edit_trl.bench import DreamBenchPlus, parse_grade, run_benchmark
from hp_edit_trl.judges import Judgement
from hp_edit_trl.miniature.tiny import tiny_clip
from tests.helpers import photo
from tests.judges.test_judges import completion, serve  # noqa: F401


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three of the images, laid out as in the benchmark's archive."""
    folder = tmp_path_factory.mktemp("dreambench")
    for number, category in enumerate(("live_subject/animal", "live_subject/human", "style")):
        for kind in ("images", "captions"):
            (folder / "data" / kind / category).mkdir(parents=True)
        photo(70, 50, number).save(folder / "data" / "images" / category / "00.jpg")
        lines = [f"subject {number}", *(f"Description {i} of {number}" for i in range(9))]
        (folder / "data" / "captions" / category / "00.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    clip, dino = tmp_path_factory.mktemp("clip"), tmp_path_factory.mktemp("dino")
    tiny_clip(str(clip))
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=32)
    ViTModel(config, add_pooling_layer=False).save_pretrained(dino)
    return {"clip": str(clip), "dino": str(dino)}


class GradeJudge:
    """Grades by how red the last picture is; with two pictures one grade less."""

    identity = {"judge": "GradeJudge", "parse": "parse_grade"}

    def __init__(self, wrong=()):
        self.texts, self.wrong = [], wrong

    def load(self, num_images=2):
        pass

    def __call__(self, conversations):
        judgements = []
        for conversation in conversations:
            task, reply, shown = conversation
            assert [message["role"] for message in conversation] == ["user", "assistant", "user"]
            pictures = [part["image"] for part in shown["content"] if part["type"] == "image"]
            words = [part["text"] for part in shown["content"] if part["type"] == "text"]
            assert {picture.size for picture in pictures} == {(512, 512)}
            assert [part["type"] for part in shown["content"]] == ["image" if len(pictures) == 2 else "text", "image"]
            self.texts.append("\n".join([task["content"][0]["text"], reply["content"][0]["text"], *words]))
            grade = 1 + round(3 * np.asarray(pictures[-1])[..., 0].mean() / 255) - (len(pictures) == 2)
            answer = f"Score: {grade}" if len(pictures) == 2 else f"Analysis: It is red.\nScore: {grade}"
            answer = "perhaps" if any(word in self.texts[-1] for word in self.wrong) else answer
            judgements.append(Judgement(parse_grade(answer), answer))
        return judgements


def redder(images, prompts, seeds):
    reds = [Image.new("RGB", image.size, (seed % 256, 0, 0)) for image, seed in zip(images, seeds, strict=True)]
    return [Image.blend(image, red, 0.8) for image, red in zip(images, reds, strict=True)]


@pytest.mark.parametrize(
    ("answer", "grade"),
    [
        ("3", 3), ("3/4", 3), ("The ears differ.\nScore: 3", 3), ("**Score:** 2\n", 2), ("Final score: [4]", 4),
        ("4.0", 4), ("Score is 2.", 2), ("Scores are high.\n- Score: **3**/4", 3),
        ("<think>\nScore: 1\n</think>\nFine.\nScore: 0", 0), ("5", None), ("Score: 3\nScore: 4", None),
        ("Score: 5", None), ("perhaps 3", None), ("", None), ("Score: 12", None),
        ("4/5", None), ("Fine.\nScore: 4/5", None), ("Fine.\nScore: -1", None), ("Fine.\nScore: 3.5", None),
        ("<think>\nScore: 3\nbut", None), ("Analysis: fine. Score: 3", 3), ("Bad. Score: 1. Or so", None),
        ("<think>\nScore: 3\n</think>\nI cannot say", None), ("Score: 3\nScore: good", None),
        ("Score: Good 3", 3), ("Score: Very Poor (0)", 0), ("Score: 3 (Good)", 3), ("Analysis: 2 of 3.\nScore: 2", 2),
        ("Score: Terrible 3", None), ("Good", None),
    ],
)  # fmt: skip
def test_one_grade_or_none(answer, grade):
    assert parse_grade(answer) == grade


def test_cases_are_the_images_with_nine_descriptions_each(data):
    bench = DreamBenchPlus(GradeJudge(), data, clip=None, dino=None)
    assert len(bench.dataset) == 27 and bench.dataset["id"][8] == "animal-00-8"
    kinds = [row["kind"] for row in bench.dataset if row["category"] == "human"]
    assert kinds == ["photorealistic"] * 4 + ["style transfer"] * 3 + ["imaginative"] * 2
    assert bench.dataset[0]["prompt"] == "Description 0 of 0" and bench.dataset[0]["subject"] == "subject 0"
    assert list(bench.sections) == ["", "animal", "human", "style"]
    assert list(bench.metrics) == ["cp_pf", "cp_over_pf", "cp", "pf"]


def test_grades_and_cosines(data, models, tmp_path):
    judge = GradeJudge()
    run = run_benchmark(DreamBenchPlus(judge, data, **models), redder, tmp_path)
    clip, processor = CLIPModel.from_pretrained(models["clip"]), CLIPProcessor.from_pretrained(models["clip"])
    dino = ViTModel.from_pretrained(models["dino"], add_pooling_layer=False).eval()
    for row in (run.cases[0], run.cases[13]):
        with Image.open(run.folder / row["edit"]) as image:
            edit = image.convert("RGB")
        category = {"animal": "live_subject/animal", "human": "live_subject/human"}[row["category"]]
        source = Image.open(data / "data" / "images" / category / "00.jpg").convert("RGB")
        pf = 1 + round(3 * np.asarray(edit)[..., 0].mean() / 255)
        assert (row["cp"], row["pf"]) == ((pf - 1) / 4, pf / 4)
        with torch.no_grad():
            inputs = processor(text=[row["prompt"]], images=[source, edit], return_tensors="pt")
            outputs = clip(**inputs)
            a, b = outputs.image_embeds  # normalized by the model itself
            assert row["clip_i"] == pytest.approx(float(a @ b), abs=1e-5)
            assert row["clip_t"] == pytest.approx(float(outputs.text_embeds[0] @ b), abs=1e-5)
            seen = [dino(pixels(image)).last_hidden_state[0, 0].numpy() for image in (source, edit)]
        expected = seen[0] @ seen[1] / np.linalg.norm(seen[0]) / np.linalg.norm(seen[1])
        assert row["dino_i"] == pytest.approx(float(expected), abs=1e-5)
    over_all = [row for row in run.results["summary"] if (row["section"], row["kind"]) == ("", "cases")]
    mean = {row["metric"]: row["value"] for row in over_all}
    assert mean["cp"] == pytest.approx(np.mean([row["cp"] for row in run.cases]))
    assert mean["cp_pf"] == pytest.approx(mean["cp"] * mean["pf"])
    assert mean["cp_over_pf"] == pytest.approx(mean["cp"] / mean["pf"])
    assert run.settings["benchmark"]["clip"][0] == models["clip"]
    assert any("Description 3 of 1" in text for text in judge.texts)
    assert len(set(judge.texts)) == 29  # a subject or a style is asked for without the description
    asked = [sum(f"The first one shows a {what}" in text for text in judge.texts) for what in ("style", "subject")]
    assert asked == [9, 18]
    assert run.settings["benchmark"]["dino"][0] == models["dino"] and run.settings["benchmark"]["average"] == "cases"


def pixels(image: Image.Image) -> torch.Tensor:
    """The benchmark's preprocessing for DINO, in PIL and numpy."""
    scale = 256 / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
    values = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
    values = (values - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return torch.from_numpy(values.transpose(2, 0, 1)[None])


def test_an_answer_without_a_grade_is_missing(data, tmp_path):
    bench = DreamBenchPlus(GradeJudge(wrong=("Description 2 of 0",)), data, clip=None, dino=None)
    run = run_benchmark(bench, redder, tmp_path)
    row = run.cases[2]
    assert row["pf"] is None and row["cp"] is not None and row["reason"] == "no score in the answer: perhaps"
    product = [
        one for one in run.results["summary"] if (one["section"], one["kind"], one["metric"]) == ("", "cases", "cp_pf")
    ]
    assert product[0]["missing"] == 1 and run.results["counts"]["parse_failures"] == 1


def test_grades_of_a_server_are_the_mean_of_three(serve, data, tmp_path):  # noqa: F811
    def reply(body, count):
        shown = body["messages"][-1]["content"]
        pictures = sum(part["type"] == "image_url" for part in shown)
        texts = ["Score: 4", "3", "4/5"] if pictures == 2 else ["0", "Fine.\nScore: 1", "2"]
        if shown[0].get("text") == "Description 2 of 0":
            texts = ["0", "5", "none"]
        choices = [completion(text)["choices"][0] for text in texts[: body["n"]]]
        return 200, {**completion(""), "choices": choices}

    server = serve(reply)
    judge = ServerJudge("m", server.url, parse=parse_grade, num_answers=3)
    run = run_benchmark(DreamBenchPlus(judge, data, clip=None, dino=None), redder, tmp_path)
    assert {row["cp"] for row in run.cases} == {3.5 / 4}  # of two grades; the third is on another scale
    assert [row["pf"] for row in run.cases] == [0.25, 0.25, None, *[0.25] * 24]
    assert run.results["counts"]["parse_failures"] == 1
    assert run.results["counts"]["unparsed_samples"] == 27  # one of three for each concept
    assert {request["n"] for request in server.requests[1:]} == {3}


def test_the_authors_own_files_of_prompts(data, tmp_path):
    for task in ("subject", "style", "text"):
        (tmp_path / f"user_prompt_{task}_full.txt").write_text(f"Grade the {task}.\n")
        (tmp_path / f"user_prompt_{task}_wo_cot.txt").write_text("Not this one.")
        (tmp_path / f"gpt_prompt_{task}_full.txt").write_text(f"I will grade the {task}.\n")
    judge = GradeJudge()
    bench = DreamBenchPlus(judge, data, scorer_prompts=str(tmp_path), clip=None, dino=None)
    run_benchmark(bench, redder, tmp_path / "run")
    assert judge.texts[:2] == [
        "Grade the subject.\nI will grade the subject.",
        "Grade the text.\nI will grade the text.\nDescription 0 of 0",
    ]
    assert judge.texts[-2:] == [
        "Grade the style.\nI will grade the style.",
        "Grade the text.\nI will grade the text.\nDescription 8 of 2",
    ]
    (tmp_path / "gpt_prompt_text_full.txt").unlink()
    with pytest.raises(FileNotFoundError, match="has no prompt prompt_following_reply.md or prompt_following_reply.t"):
        DreamBenchPlus(GradeJudge(), data, scorer_prompts=str(tmp_path))


def test_a_model_that_is_no_clip(data, models):
    bench = DreamBenchPlus(GradeJudge(), data, clip=models["dino"], dino=None)
    with pytest.raises(ValueError, match="is a model of type vit: name a CLIP model"):
        bench.load()


def test_less_than_three_grades_are_warned_of(data, caplog):
    judge = ServerJudge("m", "http://127.0.0.1:9/v1", parse=parse_grade)
    DreamBenchPlus(judge, data, clip=None, dino=None)
    assert "num_answers=1 grades" in caplog.text


def test_an_archive_of_the_hub_is_unpacked(data, tmp_path, monkeypatch):
    asked: list = []
    snapshot = tmp_path / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    with zipfile.ZipFile(snapshot / "data.zip", "w") as archive:
        for file in data.rglob("*.*"):
            archive.write(file, file.relative_to(data))
        archive.writestr("__MACOSX/data/captions/style/._00.txt", b"\x00\x05\x16\x07\xff")
    monkeypatch.setattr("hp_edit_trl.bench.dreambench.check_reachable", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        "hp_edit_trl.bench.dreambench.snapshot_download",
        lambda *args, **kwargs: asked.append((args, kwargs)) or str(snapshot),
    )
    bench = DreamBenchPlus(GradeJudge(), revision="v1", clip=None, dino=None)
    assert len(bench.dataset) == 27 and bench.settings["revision"] == "0" * 40
    assert asked == [(("yuangpeng/dreambench_plus",), {"repo_type": "dataset", "revision": "v1"})]


def test_data_that_are_not_the_benchmark(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no folder captions/"):
        DreamBenchPlus(GradeJudge(), tmp_path).dataset  # noqa: B018
    (tmp_path / "captions" / "style").mkdir(parents=True)
    (tmp_path / "captions" / "style" / "00.txt").write_text("subject\none description\n")
    with pytest.raises(ValueError, match="must hold a subject and 9 descriptions.*2 lines and no image"):
        DreamBenchPlus(GradeJudge(), tmp_path).dataset  # noqa: B018
    with pytest.raises(ConnectionError, match="neither a local file or folder nor in the cache"):
        DreamBenchPlus(GradeJudge(), "no/such-data").dataset  # noqa: B018
