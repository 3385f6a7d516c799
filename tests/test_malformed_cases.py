"""
Malformed cases: what becomes of each kind, in each column and place. `docs/reliability.md` promises it in a
table, which is read here.
"""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from hp_edit_trl import DPOEditConfig, DPOEditTrainer, FlowGRPOEditTrainer, HPScorerReward
from hp_edit_trl.calibration.scoring import read_scores, score_dataset
from hp_edit_trl.cases import (
    MAX_ASPECT_RATIO,
    MAX_PROMPT_CHARACTERS,
    BadCaseError,
    case_images,
    check_cases,
    check_edits,
    check_pairs,
    check_references,
    decoded,
    leave_out,
    pair_images,
    without_decoding,
)
from hp_edit_trl.data import build_preference_dataset, sample_and_score
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.utils.images import UnreadableImageError, png_bytes
from tests.helpers import RuleJudge, make_config, photo, redness


DOCS = Path(__file__).parents[1] / "docs" / "reliability.md"
TEXT = Value("string")
PICTURE = ImageFeature()


def encoded(image: Image.Image, format: str = "PNG", **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def of_bytes(content: bytes) -> dict:
    return {"bytes": content, "path": None}


PHOTO = encoded(photo(64, 64))
JPEG = encoded(photo(64, 64), "JPEG")
WHOLE = PHOTO["bytes"]

# Row of the table in the docs: prompts
PROMPTS = {
    "An empty or blank prompt, or one of control characters or other invisible characters only": [
        None, "", " ", "\t", "\n\n", "\r\n", "\x00", "\x07\x1b", "\u00a0", "\u3000", "\u200b", "\u200b \ufeff",
        "\u2028", "\u200d", "\u202e", "\ue000", "\x7f", "\x85",
    ],
    f"A prompt of more than {MAX_PROMPT_CHARACTERS:,} characters": [
        "a" * 4001, "make it red " * 834, "改" * 5000, "\U0001f600" * 4001, "a\n" * 2001,
    ],
    "Control tokens of chat templates, markup or foreign scripts in a prompt": [
        "<|image_pad|>", "red <|vision_start|> sky", "<|im_end|>\n<|im_start|>assistant\n5", "</s>",
        "[INST] red [/INST]",
        "{{ prompt }}", "%s", "<b>red</b>", "把天空变成红色", "اجعله أحمر", "🌅", "a", "a\x00b", "...", "a" * 4000,
        "'; DROP TABLE cases; --", "\u202ered", "1",
    ],
}  # fmt: skip

PICTURES = {
    "An image that is missing": [None],
    "An image file that is not there, empty, or not an image": [
        {"bytes": None, "path": "/nowhere/x.png"}, {"bytes": None, "path": "."}, of_bytes(b""), of_bytes(b"no image"),
        of_bytes(b"\x00" * 100), of_bytes(b"<html>404</html>"), of_bytes(WHOLE[:8]), of_bytes(WHOLE[:20]),
        of_bytes(JPEG["bytes"][:3]), of_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50), of_bytes(WHOLE[4:]),
    ],
    f"An image with sides of more than {MAX_ASPECT_RATIO}:1": [
        encoded(Image.new("L", size)) for size in [(1, 5000), (5000, 1), (512, 1), (1, 512), (101, 1), (2048, 4)]
    ],
    "An image with more pixels than Pillow decodes": [
        encoded(Image.new("1", (10000, 9000)), compress_level=1),
    ],
    "An image of floating-point values": [encoded(photo(8, 8).convert("F"), "TIFF")],
    "An image of any other size, format or mode that Pillow reads": [
        encoded(Image.new("RGB", (1, 1))), encoded(Image.new("RGB", (100, 1))), JPEG, encoded(photo(64, 64), "WEBP"),
        encoded(photo(64, 64), "GIF"), encoded(photo(64, 64), "BMP"), encoded(photo(64, 64).convert("RGBA")),
        encoded(photo(64, 64).convert("P")), encoded(photo(64, 64).convert("CMYK"), "JPEG"),
    ],
}  # fmt: skip

CUT_OFF = "An image whose header is whole, but whose pixels cannot be decoded"
BROKEN_LATER = [
    of_bytes(WHOLE[:-40]), of_bytes(WHOLE[: len(WHOLE) // 2]), of_bytes(WHOLE[:60]),
    of_bytes(WHOLE[:60] + b"\xff" * 40 + WHOLE[100:]),
    of_bytes(JPEG["bytes"][: len(JPEG["bytes"]) * 3 // 4]),
]  # fmt: skip

ACCEPTED = {
    "Control tokens of chat templates, markup or foreign scripts in a prompt",
    "An image of any other size, format or mode that Pillow reads",
}


def table() -> dict[str, str]:
    section = DOCS.read_text(encoding="utf-8").partition("## Cases")[2].partition("\n## ")[0]
    rows = [re.findall(r"\| (.+?) (?=\|)", line) for line in section.splitlines() if line.startswith("| ")]
    return {fault: happens for fault, happens in rows if fault != "Fault"}


def rows_with(column: str, value, place: int = 1, kind: str = "case") -> Dataset:
    """Three cases, edits or pairs, of which one has a value in a column."""
    rows, features = [], {"id": TEXT, "prompt": TEXT, "image": PICTURE}
    for i in range(3):
        row = {"id": f"case-{i}", "prompt": f"Make it red, {i}", "image": PHOTO}
        if kind == "edit":
            row |= {"edit": PHOTO, "editor": "one"}
        if kind == "pair":
            row |= {"chosen": PHOTO, "rejected": PHOTO}
        row |= {"images": [PHOTO, PHOTO]} if column == "images" else {}
        row |= {"target": PHOTO} if column == "target" else {}
        row |= {"masks": [[PHOTO], [PHOTO]]} if column == "masks" else {}
        if i == place:
            row[column] = value
        rows.append(row)
    features |= dict.fromkeys(rows[0].keys() - features.keys(), PICTURE)
    features |= {"editor": TEXT} if kind == "edit" else {}
    features |= {"images": List(PICTURE)} if column == "images" else {}
    features |= {"masks": List(List(PICTURE))} if column == "masks" else {}
    return Dataset.from_list(rows, features=Features({name: features[name] for name in rows[0]}))


CHECKS = {"case": check_cases, "edit": check_edits, "pair": check_pairs}


def malformed():
    for fault, prompts in PROMPTS.items():
        yield from ((fault, "prompt", prompt, "case") for prompt in prompts)
    for fault, pictures in PICTURES.items():
        for column, kind in (("image", "case"), ("edit", "edit"), ("chosen", "pair"), ("rejected", "pair")):
            for picture in pictures if column == "image" else pictures[:2]:
                # Of other sizes, a pair would be bad for another reason.
                if kind != "pair" or fault not in ACCEPTED:
                    yield fault, column, picture, kind
        for picture in pictures[:3]:
            yield fault, "images", [PHOTO, picture], "case"
        if fault not in ("An image that is missing", "An image of floating-point values"):
            yield fault, "target", pictures[0], "case"
            yield fault, "masks", [[PHOTO], [pictures[0]]], "case"
    yield "An empty list of images", "images", [], "case"
    yield "Edits of a pair with different sizes", "rejected", encoded(photo(64, 32)), "pair"


CASES = list(malformed())


def test_there_are_enough():
    later = len(BROKEN_LATER) * 4
    assert len(CASES) + later + len(STRUCTURE) >= 120
    faults = {fault for fault, *_ in CASES} | {CUT_OFF} | {fault for fault, _ in STRUCTURE}
    documented = table()
    assert faults <= documented.keys()
    for fault in {fault for fault, *_ in CASES}:
        assert documented[fault].startswith("Accepted" if fault in ACCEPTED else "Refused"), fault


@pytest.mark.parametrize("fault", sorted({fault for fault, *_ in CASES}))
def test_rows(fault, caplog):
    for number, (_, column, value, kind) in enumerate(case for case in CASES if case[0] == fault):
        place = number % 3
        dataset, check = rows_with(column, value, place, kind), CHECKS[kind]
        caplog.clear()
        if fault in ACCEPTED:
            assert check(dataset, "dataset") == {}, (column, value)
            continue
        with pytest.raises(BadCaseError, match=f"1 of 3 cases of dataset .*Case 'case-{place}' .*on_bad_case='skip'"):
            check(dataset, "dataset")
        bad = check(dataset, "dataset", "skip")
        assert list(bad) == [place] and f"'case-{place}'" in caplog.text and "left out" in caplog.text
        assert leave_out(dataset, bad)["id"][:] == [f"case-{i}" for i in range(3) if i != place]


def test_images_that_break_when_they_are_decoded():
    for value in BROKEN_LATER:
        # What a header tells is all in order.
        cases = without_decoding(rows_with("image", value))
        check_cases(cases, "dataset")
        with pytest.raises(UnreadableImageError, match="'case-1' cannot be decoded"):
            case_images(cases[1], "case-1")
        pairs = without_decoding(rows_with("rejected", value, kind="pair"))
        check_pairs(pairs, "dataset")
        with pytest.raises(UnreadableImageError, match="rejected image of pair 'case-1' cannot be decoded"):
            pair_images(pairs[1], "case-1")
        for column, own in (("target", value), ("masks", [[PHOTO], [value, PHOTO]])):
            dataset = without_decoding(rows_with(column, own))
            check_cases(dataset, "dataset")
            with pytest.raises(
                BadCaseError, match=f"An image in '{column}' of case 'case-1' cannot be decoded"
            ) as told:
                decoded(dataset[1], dataset.features, "case-1")
            assert told.value.case_id == "case-1"
            whole = decoded(dataset[0], dataset.features, "case-0")
            assert whole["image"] == PHOTO | {"path": None}  # references are read elsewhere
    assert whole["masks"][1][0].tobytes() == photo(64, 64).tobytes()


def test_own_images_keep_their_mode():
    mask = encoded(photo(64, 64).convert("L"))
    dataset = without_decoding(rows_with("target", mask))
    assert decoded(dataset[1], dataset.features, "x")["target"].mode == "L"


def plain(**columns) -> Dataset:
    rows = {"id": ["a", "b", "c"], "prompt": ["red"] * 3, "image": [PHOTO] * 3} | columns
    features = {name: PICTURE if name == "image" else None for name in rows}
    dataset = Dataset.from_dict({name: values for name, values in rows.items() if name != "image"})
    return dataset.add_column("image", [PHOTO] * 3, feature=PICTURE) if "image" in features else dataset


IDS = "An id that is missing, blank, not printable, or equal to another as text"
TYPES = "A column of a wrong type"
STRUCTURE = [
    *[(IDS, ids) for ids in (["a", "a", "b"], ["a", None, "b"], ["a", "", "b"], ["a", " ", "b"], ["a", "b\n", "c"],
                             ["a", "b\x00", "c"], [1, None, 2], [1, 2, 1], [1.0, float("nan"), 2.0])],
    *[(TYPES, ids) for ids in ([True, False, True], [b"a", b"b", b"c"], [["a"], ["b"], ["c"]], [{"a": 1}] * 3)],
]  # fmt: skip


def test_ids_and_types():
    for fault, ids in STRUCTURE:
        message = "Ids must be there and unique" if fault == IDS else "The column 'id' of dataset must hold"
        with pytest.raises(ValueError, match=message):
            check_cases(plain(id=ids), "dataset", "skip")  # which of two rows is right is not for an option to say
    for ids in ([1, 2, 3], ["ä", "b/c", "../d"], [1.5, 2.5, 3.5]):
        assert check_cases(plain(id=ids), "dataset") == {}
    for column, values in (
        ("prompt", [1, 2, 3]),
        ("prompt", [["a"]] * 3),
        ("task", [1, 2, 3]),
        ("requirement", [[1]] * 3),
    ):
        with pytest.raises(ValueError, match=f"The column '{column}' of dataset must hold strings"):
            check_cases(plain(**{column: values}), "dataset")
    assert check_cases(plain(task=[None] * 3), "dataset") == {}
    rows = rows_with("image", PHOTO).remove_columns("image").add_column("image", [1, 2, 3])
    with pytest.raises(ValueError, match="The column 'image' of dataset must hold images or their paths"):
        check_cases(rows, "dataset")


def test_all_bad_cases_are_told_at_once():
    dataset = Dataset.from_dict({"prompt": ["", " ", "ok", "\n", "\t", "\r", "\x00", "ok"], "image": ["x"] * 8})
    dataset = dataset.remove_columns("image").add_column("image", [PHOTO] * 8, feature=PICTURE)
    message = r"6 of 8 cases of dataset cannot be used. Row 0 has an empty.*Row 1 has a blank.*Row 5.*And 1 more\."
    with pytest.raises(BadCaseError, match=message):
        check_cases(dataset, "dataset")
    bad = check_cases(dataset, "dataset", "skip")
    assert leave_out(dataset, bad)["id"][:] == [2, 7]  # their own row numbers still name them
    with pytest.raises(BadCaseError, match="No case of dataset can be used"):
        check_cases(dataset.select([0, 1]), "dataset", "skip")
    shuffled = dataset.add_column("id", list("abcdefgh")).select([7, 3, 2])
    assert list(check_cases(shuffled, "dataset", "skip")) == [1]
    assert check_cases(dataset, "dataset", on_bad_case=None) == {}


def test_too_many_references():
    dataset = rows_with("images", [PHOTO] * 3)
    with pytest.raises(BadCaseError, match="Case 'case-1' has 3 reference images, but the pipeline takes at most 2"):
        check_references(dataset, "dataset", 2)
    assert list(check_references(dataset.select([2, 1]), "dataset", 2, "skip")) == [1]
    assert check_references(dataset, "dataset", None) == {}


def test_encoding_costs_nothing(tmp_path):
    # Lists of images are not copied to a file, and the dataset that was given keeps its images.
    dataset = rows_with("images", [PHOTO])
    undecoded = without_decoding(dataset)
    assert undecoded.cache_files == dataset.cache_files
    assert undecoded[0]["images"][0]["bytes"] == WHOLE and isinstance(dataset[0]["images"][0], Image.Image)
    assert without_decoding(undecoded) is undecoded
    undecoded.save_to_disk(tmp_path / "saved")
    assert Dataset.load_from_disk(tmp_path / "saved").features == undecoded.features


# The rest of the library


def mixed(kind: str = "case") -> Dataset:
    """
    Cases, edits or pairs: blank prompt, whole, header not readable, whole, target that breaks later, whole, reference
    that breaks later, whole.
    """
    rows = []
    for i in range(8):
        row = {"id": f"case-{i}", "prompt": f"Make it red, {i}", "image": encoded(photo(64, 64, i)), "target": PHOTO}
        row |= {"edit": PHOTO} if kind == "edit" else {}
        row |= {"chosen": PHOTO, "rejected": encoded(photo(64, 64, 9))} if kind == "pair" else {}
        rows.append(row)
    rows[0]["prompt"] = " "
    rows[2]["image"] = of_bytes(b"no image")
    rows[4]["target" if kind == "case" else "image"] = BROKEN_LATER[0]
    rows[6]["image"] = BROKEN_LATER[1]
    features = {name: TEXT if name in ("id", "prompt") else PICTURE for name in rows[0]}
    return Dataset.from_list(rows, features=Features(features))


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def grpo(pipeline, folder, dataset, reward=redness, **options):
    pipeline.transformer.requires_grad_(True)
    config = make_config(folder, num_generations=2, per_device_train_batch_size=4, max_steps=2, seed=1, **options)
    return FlowGRPOEditTrainer(tiny_pipeline(), reward, args=config, train_dataset=dataset)


def test_flow_grpo(pipeline, tmp_path):
    message = r"2 of 8 cases of train_dataset cannot be used. Case 'case-0' .* Case 'case-2' .*on_bad_case='skip'"
    with pytest.raises(BadCaseError, match=message):
        FlowGRPOEditTrainer("no-such-model", redness, args=make_config(tmp_path), train_dataset=mixed())

    seen: list[tuple] = []

    def reward(completions, id, target, **kwargs):
        seen.extend((case_id, image.tobytes()) for case_id, image in zip(id, completions, strict=True))
        assert all(picture.size == (64, 64) for picture in target)
        return redness(completions)

    options = dict(on_bad_case="skip", shuffle_dataset=False, save_strategy="steps", save_steps=1)
    trainer = grpo(pipeline, tmp_path / "whole", mixed(), reward, eval_strategy="no", **options)
    assert trainer.num_train_cases == 6
    trainer.train()
    assert {case_id for case_id, _ in seen} <= {f"case-{i}" for i in (1, 3, 5, 7)}
    # Two were left out at the start. case-4 and case-6 are met in some update, and others take their places.
    counts = [entry["bad_cases"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(counts) > 2 and min(counts) >= 2
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    metrics = trainer.evaluate(mixed())
    assert metrics["eval_bad_cases"] == 4

    resumed = grpo(pipeline, tmp_path / "whole", mixed(), reward, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert all((weights[name] == p).all() for name, p in resumed.model.named_parameters() if p.requires_grad)


def test_what_a_policy_cannot_encode(pipeline, tmp_path, monkeypatch):
    trainer = grpo(pipeline, tmp_path, mixed().select([1, 3, 5, 7]), on_bad_case="skip", shuffle_dataset=False)
    encode = trainer.policy.encode

    def refuse(images, prompt, *args):
        if prompt.endswith("3"):
            raise IndexError("index 1 is out of bounds")
        return encode(images, prompt, *args)

    monkeypatch.setattr(trainer.policy, "encode", refuse)
    trainer.train()
    assert sum(entry.get("bad_cases", 0) for entry in trainer.state.log_history) >= 1
    assert trainer.evaluate(mixed().select([1, 3, 5]))["eval_bad_cases"] == 1
    trainer.args.on_bad_case = "error"
    message = "Case 'case-3' cannot be encoded by QwenImageEditPlusPipeline.*64 x 64.*IndexError.*on_bad_case='skip'"
    with pytest.raises(BadCaseError, match=message):
        trainer.evaluate(mixed().select([1, 3, 5]))


def test_dpo(tmp_path):
    def trainer(on_bad_case):
        args = DPOEditConfig(
            str(tmp_path), bf16=False, use_cpu=True, gradient_checkpointing=False, resolution=64, max_steps=1,
            num_inference_steps=2, gradient_accumulation_steps=1, report_to="none", save_strategy="no",
            disable_tqdm=True, on_bad_case=on_bad_case,
        )  # fmt: skip
        return DPOEditTrainer(tiny_pipeline(), args, mixed("pair"))

    with pytest.raises(BadCaseError, match="2 of 8 cases.*'case-0'.*'case-2'"):
        trainer("error")
    skipping = trainer("skip")
    skipping.train()
    assert skipping.num_train_cases == 4 and skipping.state.log_history[0]["bad_cases"] == 4
    # Those that show while pairs are encoded are told together, too.
    skipping.args.on_bad_case = "error"
    skipping._encoded.clear()
    with pytest.raises(BadCaseError, match="2 of 6 cases.*'case-4' cannot be decoded.*'case-6' cannot be decoded"):
        skipping.train()


def test_mining(pipeline, tmp_path):
    options = dict(num_generations=2, resolution=64, num_inference_steps=2, true_cfg_scale=1.0, score_name=None)

    def reward(completions, target, **columns):
        assert all(picture.size == (64, 64) for picture in target)
        return [float(np.asarray(image).std()) for image in completions]

    with pytest.raises(BadCaseError, match="2 of 8 cases of dataset .*'case-0'.*'case-2'"):
        sample_and_score(pipeline, reward, mixed(), tmp_path / "error", **options)
    assert not (tmp_path / "error").exists()
    sample_and_score(pipeline, reward, mixed(), tmp_path, on_bad_case="skip", **options)
    assert len(list((tmp_path / "samples").glob("*/*.png"))) == 8
    counts = build_preference_dataset(mixed(), tmp_path, min_gap=0.0, min_chosen_score=0.0)
    assert counts == {"pairs": 4, "bad case": 2, "fewer than two scores": 2}


def test_scoring(tmp_path):
    scorer = HPScorerReward(RuleJudge(), task="color")
    summary = score_dataset(scorer, mixed("edit"), tmp_path)
    scores = {line["id"]: line for line in read_scores(tmp_path)}
    assert [i for i in range(8) if scores[f"case-{i}"]["score"] is None] == [0, 2, 4, 6]
    assert "blank prompt" in scores["case-0"]["answer"] and "cannot be decoded" in scores["case-6"]["answer"]
    assert len(summary.unreadable) == 4 and re.search(r"\| bad cases +\| 4 ", summary.table())


def test_png_bytes_are_accepted():
    assert check_cases(rows_with("image", of_bytes(png_bytes(photo(8, 8)))), "dataset") == {}


def test_text_where_an_edited_image_belongs():
    said = {"prompt": "Make it red", "chosen": "Sure, here is how.", "rejected": "No. " * 100}
    answer = [{"role": "assistant", "content": "Sure"}]
    for rows, shown in (
        ([said], "text, e.g. 'Sure, here is how.'"),
        ([{**said, "chosen": answer, "rejected": answer}], "conversations"),
        ([{**said, "prompt": [{"role": "user", "content": "Hi"}], "chosen": answer, "rejected": answer}], "conversat"),
    ):
        with pytest.raises(ValueError, match=f"'chosen' of pairs holds {shown}.*edited image.*`image` the reference"):
            check_pairs(Dataset.from_list(rows), "pairs")
    paths = {"prompt": "Make it red", "image": "a.png", "chosen": "gone.PNG", "rejected": "https://example.org/x"}
    with pytest.raises(BadCaseError, match="does not exist: 'gone.PNG'"):
        check_pairs(Dataset.from_list([paths]), "pairs")
    with pytest.raises(ValueError, match="'prompt' of cases must hold strings, but is a conversation: write the"):
        check_cases(Dataset.from_list([{"prompt": [{"role": "user", "content": "Hi"}], "image": "a.png"}]), "cases")
