import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hp_edit_trl import DPOEditTrainer
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.trainer.adapter_copy import AdapterCopy, average_decay
from tests.trainer.test_dpo_edit_trainer import LORA, make_config, make_pairs


def test_a_copy_follows_and_takes_the_place_of_the_weights():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    weight, optimizer = model.weight, torch.optim.SGD([model.weight], lr=1.0)
    weight.data.fill_(1.0)
    adapter = AdapterCopy(model)
    assert list(adapter.weights) == ["weight"]
    weight.data.fill_(3.0)
    adapter.update(0.75)
    assert adapter.weights["weight"].tolist() == [[1.5, 1.5]]
    inputs = torch.ones(1, 2)
    with adapter.applied(), torch.no_grad():
        old = model(inputs).item() - model.bias.item()
    assert old == pytest.approx(3.0) and weight.tolist() == [[3.0, 3.0]] and model.weight is weight
    with pytest.raises(KeyError), adapter.applied():
        raise KeyError
    model(inputs).sum().backward()
    optimizer.step()
    assert weight.tolist() == [[2.0, 2.0]] and adapter.weights["weight"].tolist() == [[1.5, 1.5]]
    adapter.reset()
    assert adapter.weights["weight"].equal(weight) and adapter.weights["weight"].data_ptr() != weight.data_ptr()


def test_an_average_follows_faster_at_first():
    assert [average_decay(0.99, n) for n in (1, 2, 10**4)] == [2 / 11, 3 / 12, 0.99]
    assert average_decay(0.1, 1) == 0.1


def test_the_best_average_is_loaded_at_the_end_and_found_again(tmp_path):
    options = dict(
        ema_decay=0.9, max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="rewards/margins", num_sample_edits=0,
    )  # fmt: skip

    def make():
        pairs, lora = make_pairs(2, sizes=((64, 64),)), copy.deepcopy(LORA)
        return DPOEditTrainer(tiny_pipeline(), make_config(tmp_path, **options), pairs, pairs, peft_config=lora)

    trainer = make()
    trainer.train()
    margins = {log["step"]: log["eval_rewards/margins"] for log in trainer.state.log_history if "eval_loss" in log}
    best = max(margins, key=margins.__getitem__)
    assert len(set(margins.values())) == 3 and trainer.state.best_global_step == best
    saved = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    trained = torch.load(tmp_path / f"checkpoint-{best}" / "adapter_copies.pt", weights_only=True)["trained"]

    def check(one):
        weights = {name: p.detach() for name, p in one.model.named_parameters() if p.requires_grad}
        assert len(saved) == len(weights)
        for name, weight in weights.items():
            assert weight.equal(saved[name.replace(".default", "")]) and weight.equal(one._copies["ema"].weights[name])
        assert any(not weight.equal(trained[name]) for name, weight in weights.items())
        assert one.evaluate()["eval_rewards/margins"] == margins[best]  # the average was evaluated

    check(trainer)
    again = make()
    again.train(resume_from_checkpoint=True)  # the run is finished
    check(again)
