"""CLIP's category against the cosine computed by hand."""

import json
import pickle

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Image, Value
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

from hp_edit_trl.data.builder.balance import Balance
from hp_edit_trl.data.builder.category import COCO_CATEGORIES, TEMPLATES, ClipCategories
from hp_edit_trl.data.builder.engine import WorkFolder, run_stage
from hp_edit_trl.data.builder.sources import ImageCheck, Sources
from hp_edit_trl.miniature.tiny import tiny_clip, tiny_judge
from tests.data.builder.toy_build import encoded
from tests.helpers import photo


SIZES = [(40, 40), (64, 33), (32, 90), (48, 48), (50, 32)]
PHOTOS = [photo(*SIZES[i % 5], seed=i) for i in range(12)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return tiny_clip(str(tmp_path_factory.mktemp("clip")))


BATCH = {"image": [encoded(image) for image in PHOTOS]}


def test_the_categories_are_those_of_coco():
    assert len(COCO_CATEGORIES) == len(set(COCO_CATEGORIES)) == 80
    assert COCO_CATEGORIES[0] == "person" and COCO_CATEGORIES[79] == "toothbrush" and "teddy bear" in COCO_CATEGORIES


def test_one_template_against_the_logits_of_the_model(clip):
    stage = ClipCategories(clip, templates=("a photo of a {}",))
    done = stage(BATCH)
    assert done.keys() == {*stage.features, "reason"} and done["reason"] == [None] * 12
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    texts = [f"a photo of a {name}" for name in COCO_CATEGORIES]
    inputs = processor(text=texts, images=PHOTOS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    assert [COCO_CATEGORIES.index(name) for name in done["category"]] == logits.argmax(1).tolist()
    np.testing.assert_allclose(done["category_score"], logits.max(1).values, atol=1e-6)
    assert len(set(done["category"])) > 1


def test_templates_are_averaged(clip):
    """In float64, one text and one image at a time, with normalization written out."""
    done = ClipCategories(clip)(BATCH)
    model, processor = CLIPModel.from_pretrained(clip).double().eval(), CLIPProcessor.from_pretrained(clip)
    tokenizer = AutoTokenizer.from_pretrained(clip)

    def unit(vector):
        return vector / np.sqrt((vector**2).sum())

    def text(sentence):
        with torch.no_grad():
            ids = torch.tensor([tokenizer(sentence)["input_ids"]])
            return unit(model.get_text_features(input_ids=ids).pooler_output[0].numpy())

    names = COCO_CATEGORIES[:80:4]
    few = ClipCategories(clip, categories=names)(BATCH)
    means = np.stack([unit(sum(text(template.replace("{}", name)) for template in TEMPLATES)) for name in names])
    for i, image in enumerate(PHOTOS):
        with torch.no_grad():
            values = processor(images=image, return_tensors="pt")["pixel_values"].double()
            cosines = means @ unit(model.get_image_features(pixel_values=values).pooler_output[0].numpy())
        assert few["category"][i] == names[cosines.argmax()]
        assert few["category_score"][i] == pytest.approx(cosines.max(), abs=1e-6)
        assert done["category_score"][i] >= few["category_score"][i] - 1e-6


def test_a_planted_category_is_found(clip, tmp_path):
    """A model whose images all point where one category's text points."""
    stage = ClipCategories(clip)
    model = CLIPModel.from_pretrained(clip)
    for name in ("zebra", "hair drier"):
        target = stage.text_embeddings[COCO_CATEGORIES.index(name)]
        with torch.no_grad():
            norm = model.vision_model.post_layernorm
            norm.weight.zero_()
            norm.bias.zero_()
            norm.bias[0] = 1
            model.visual_projection.weight[:, 0] = 3 * target
        folder = str(tmp_path / name)
        model.save_pretrained(folder)
        CLIPProcessor.from_pretrained(clip).save_pretrained(folder)
        done = ClipCategories(folder)(BATCH)
        assert done["category"] == [name] * 12
        np.testing.assert_allclose(done["category_score"], 1, atol=1e-6)


def test_a_row_does_not_depend_on_its_batch(clip):
    stage = ClipCategories(clip)
    whole = stage(BATCH)
    for parts in (range(0, 12), [3], [11, 0, 5, 5]):
        done = stage({"image": [BATCH["image"][i] for i in parts]})
        assert done["category"] == [whole["category"][i] for i in parts]
        np.testing.assert_allclose(done["category_score"], [whole["category_score"][i] for i in parts], atol=1e-6)
    assert stage({"image": []}) == {"category": [], "category_score": [], "reason": []}


def test_images_of_no_category_are_rejected(clip):
    scores = ClipCategories(clip)(BATCH)["category_score"]
    limit = sorted(scores)[5]
    done = ClipCategories(clip, min_score=limit)(BATCH)
    assert [reason is None for reason in done["reason"]] == [score >= limit for score in scores]
    assert done["reason"].count(None) == 7 and done["category_score"] == scores
    (text,) = {reason.partition(":")[0] for reason in done["reason"] if reason}
    assert text == "no category"


def test_settings_are_what_decides_the_result(clip, tmp_path):
    def settings(*args, **kwargs):
        return json.dumps(ClipCategories(*args, **kwargs).settings)

    plain = settings(clip)
    assert plain == settings(clip, batch_size=3)
    others = [
        settings(tiny_clip(str(tmp_path / "other"), seed=1)),
        settings(clip, templates=TEMPLATES[:3]),
        settings(clip, categories=COCO_CATEGORIES[::-1]),
        settings(clip, min_score=0.1),
    ]
    assert len({plain, *others}) == 5
    # Other weights in the same folder are another model.
    tiny_clip(str(tmp_path / "other"), seed=2)
    assert settings(str(tmp_path / "other")) != others[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"categories": ()}, "categories=.* at least one"),
        ({"categories": ("cat", "cat")}, "must be distinct"),
        ({"templates": ("a photo",)}, "templates=.* must each have one {}"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"min_score": 20}, "min_score=20 must be a cosine similarity"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        ClipCategories(**options)


def test_models_that_cannot_be_used(clip, tmp_path):
    with pytest.raises(
        ValueError, match="clip_model='nowhere/nothing' cannot be used: .*It must be a local folder or"
    ):
        ClipCategories("nowhere/nothing").load()
    with pytest.raises(ValueError, match="cannot be used: it is a qwen3_vl model"):
        ClipCategories(tiny_judge(str(tmp_path / "judge"))).load()
    CLIPModel.from_pretrained(clip).save_pretrained(str(tmp_path / "half"))
    with pytest.raises(ValueError, match="half' cannot be used"):
        ClipCategories(str(tmp_path / "half")).load()
    with pytest.raises(ValueError, match="less than max_position_embeddings"):
        ClipCategories(clip, categories=("a" * 80,)).load()


def test_as_the_engine_and_datasets_call_it(clip, tmp_path):
    """After `sources` through the engine, sent to another process before it is loaded, and by `Dataset.map`."""
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(PHOTOS):
        image.save(tmp_path / "photos" / f"{i:02d}.png")
    stage = pickle.loads(pickle.dumps(ClipCategories(clip, batch_size=5)))
    work = WorkFolder(tmp_path / "work", Sources([{"folder": str(tmp_path / "photos"), "license": "cc0-1.0"}]))
    for each in (ImageCheck(min_side=32), stage, Balance(total=6)):
        run_stage(work, each, Accelerator())
    done = stage(BATCH)
    kept = work.read(work.live, ["category", "category_score", "file"])
    numbers = [int(file[:2]) for file in kept["file"]]
    assert len(numbers) == 6 and kept["category"] == [done["category"][i] for i in numbers]
    dataset = Dataset.from_dict(BATCH, features=Features({"image": Image()}))
    mapped = dataset.map(ClipCategories(clip), batched=True, batch_size=4)
    assert mapped["category"][:] == done["category"]
    assert mapped.features["category"] == Value("string")
