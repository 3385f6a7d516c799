"""A pipeline whose components are not those of its class is refused before anything is loaded or computed."""

import copy
import json

import pytest

from hp_edit_trl.miniature.tiny import (
    tiny_klein_pipeline,
    tiny_kontext_pipeline,
    tiny_pipeline,
    tiny_qwen_image_21_pipeline,
    tiny_qwen_image_edit_pipeline,
)
from hp_edit_trl.policies import policy_class


MAKERS = [
    tiny_pipeline, tiny_qwen_image_edit_pipeline, tiny_kontext_pipeline, tiny_klein_pipeline,
    tiny_qwen_image_21_pipeline,
]  # fmt: skip


@pytest.fixture(scope="module")
def made():
    return [make() for make in MAKERS]


@pytest.mark.parametrize("place", range(len(MAKERS)), ids=[make.__name__ for make in MAKERS])
def test_a_component_of_another_class_or_none(place, made, tmp_path):
    whole, other = made[place], made[(place + 2) % len(made)]
    name = type(whole).__name__
    policy_class(whole)
    for component in ("transformer", "vae", "text_encoder"):
        pipeline = copy.copy(whole)
        needed, found = (type(getattr(one, component)).__name__ for one in (whole, other))
        setattr(pipeline, component, getattr(other, component))
        with pytest.raises(
            ValueError, match=f"This {name} has a {found} as its {component}, but a {name} needs a {needed}"
        ):
            policy_class(pipeline)
    for component in {"transformer", "vae", "text_encoder", "scheduler", "tokenizer", "processor"} & set(
        whole.components
    ):
        pipeline = copy.copy(whole)
        setattr(pipeline, component, None)
        with pytest.raises(ValueError, match=f"This {name} has no {component}, but a {name} needs one"):
            policy_class(pipeline)

    # In a folder, of which only the index is read
    index = {k: list(v) if isinstance(v, tuple) else v for k, v in whole.config.items() if not k.startswith("_name")}
    index["_class_name"] = name

    def write(**changes):
        (tmp_path / "model_index.json").write_text(json.dumps(index | changes))
        return str(tmp_path)

    assert policy_class(write()) is policy_class(whole)
    with pytest.raises(ValueError, match=r"model='.*' has a UNet2DConditionModel as its transformer"):
        policy_class(write(transformer=["diffusers", "UNet2DConditionModel"]))
    with pytest.raises(ValueError, match="has no vae, but"):
        policy_class(write(vae=[None, None]))
    policy_class(write(transformer=["my_library", "MyTransformer"]))  # nothing is known of it
