import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from hp_edit_trl import (
    DPOEditConfig,
    DPOEditTrainer,
    FlowGRPOEditConfig,
    FlowGRPOEditTrainer,
    FlowNFTEditConfig,
    FlowNFTEditTrainer,
)
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.trainer import streaming
from hp_edit_trl.trainer.streaming import BlockStream
from hp_edit_trl.utils.dry_run import CARD, DryRun
from tests.helpers import make_cases, make_config, redness
from tests.trainer.test_dpo_edit_trainer import make_pairs


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, values):
        return values + self.norm(self.linear(values)).relu()


class Stack(nn.Module):
    _no_split_modules = ["Block"]

    def __init__(self, depth, width=8):
        super().__init__()
        self.head, self.blocks = nn.Linear(width, width), nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, values):
        values = self.head(values)
        for block in self.blocks:
            values = checkpoint(block, values, use_reentrant=False) if torch.is_grad_enabled() else block(values)
        return values


def stack(depth=5, width=8):
    torch.manual_seed(0)
    return get_peft_model(
        Stack(depth, width), LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
    ).eval()


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("piece", [64, 2**20])  # smaller than a weight, and larger than all of them
def test_passes_and_gradients_are_those_of_a_resident_model(depth, piece, monkeypatch):
    monkeypatch.setattr(streaming, "PIECE", piece)
    values = torch.randn(3, 8)
    results = []
    for streamed in (False, True):
        model = stack(depth)
        stream = BlockStream(model, torch.device("cpu")) if streamed else None
        if stream is not None:
            stream.place(model, torch.device("cpu"))
        with torch.no_grad():
            first = model(values)
        loss = model(values).square().sum()
        loss.backward()
        with torch.no_grad(), model.disable_adapter():
            plain = model(values)
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([first, loss, plain, *gradients, *model.state_dict().values()])
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


def test_blocks_come_in_time_and_no_more_than_two_are_there(monkeypatch):
    model = stack()
    stream = BlockStream(model, torch.device("cpu"))
    stream.place(model, torch.device("cpu"))
    hosts = [weights[0][2].data_ptr() for weights in stream._weights]
    loads, late = [], []
    load = stream.load

    def watched(index):
        if index not in stream._arrivals:
            loads.append(index)
            late.append(index == stream._last)  # wanted at once
        load(index)
        there = {i for i, b in enumerate(model.base_model.model.blocks) if weight(b).data_ptr() != hosts[i]}
        assert there == set(stream._arrivals) and len(there) <= 2

    def weight(block):
        return block.linear.base_layer.weight

    monkeypatch.setattr(stream, "load", watched)
    with torch.no_grad():
        model(torch.ones(1, 8))
        model(torch.ones(1, 8))
    assert loads == [2, 3, 4, 0, 1, 2, 3, 4, 0] and not any(late)
    loads.clear()
    model(torch.ones(1, 8)).sum().backward()
    # The last two are still there when the backward pass begins.
    assert loads == [1, 2, 3, 4, 2, 1, 0] and not any(late)
    with torch.no_grad():
        model(torch.ones(1, 8))
    assert loads[7:] == [2, 3, 4, 0] and not any(late)
    model.base_model.model.blocks[3](torch.ones(1, 8))  # out of order: late, but right
    assert loads[-2:] == [3, 2] and late[-2:] == [True, False]


def test_memory_of_the_device_holds_two_blocks():
    with DryRun() as dry:
        model = stack(6, 256)
        block = sum(p.nbytes for p in model.base_model.model.blocks[0].parameters() if not p.requires_grad)
        stream = BlockStream(model, CARD)
        with dry.measured("place"):
            stream.place(model, CARD)
        resident = dry.total - 2 * block
        assert 0 < resident < block * 1.3  # the head, and all of the LoRA
        with dry.measured("rollout") as rollout, torch.no_grad():
            model(torch.ones(1, 256, device=CARD))
        with dry.measured("training") as training:
            model(torch.ones(1, 256, device=CARD)).sum().backward()
    for phase in (rollout, training):
        assert phase.peak < resident + 2.6 * block  # with activations, and a weight that a graph still holds


def test_transformers_that_cannot_be_streamed_are_refused(tmp_path):
    model = stack()
    model.base_model.model.blocks[1].linear.base_layer.weight = nn.Parameter(
        torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"offload_transformer is not possible with a quantized .*blocks\.1\.linear"):
        BlockStream(model, torch.device("cpu"))
    model.get_base_model()._no_split_modules = None
    with pytest.raises(ValueError, match="offload_transformer needs a transformer that names its blocks"):
        BlockStream(model, torch.device("cpu"))
    for config in (FlowGRPOEditConfig, DPOEditConfig):
        with pytest.raises(ValueError, match="offload_transformer needs gradient_checkpointing=True"):
            config(str(tmp_path), bf16=False, use_cpu=True, offload_transformer=True, gradient_checkpointing=False)


def train(kind, folder, offloaded):
    options = dict(offload_transformer=offloaded, gradient_checkpointing=True, max_steps=2, learning_rate=1e-2)
    if kind == "grpo":
        args = make_config(str(folder), **options)
        trainer = FlowGRPOEditTrainer(tiny_pipeline(num_layers=3), redness, args, make_cases(4))
    elif kind == "nft":
        args = make_config(str(folder), FlowNFTEditConfig, ema_decay=0.5, **options)
        trainer = FlowNFTEditTrainer(tiny_pipeline(num_layers=3), redness, args, make_cases(4))
    else:
        args = DPOEditConfig(
            str(folder), use_cpu=True, bf16=False, report_to="none", resolution=64, logging_steps=1, **options
        )
        trainer = DPOEditTrainer(tiny_pipeline(num_layers=3), args=args, train_dataset=make_pairs(4))
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.mark.parametrize("kind", ["grpo", "nft", "dpo"])
def test_training_is_the_same_to_the_bit(kind, tmp_path):
    plain, offloaded = (train(kind, tmp_path / name, name == "offloaded") for name in ("plain", "offloaded"))
    assert plain._stream is None and len(offloaded._stream._arrivals) == 2
    for (name, one), other in zip(plain.model.named_parameters(), offloaded.model.parameters(), strict=True):
        assert one.equal(other), name
    with pytest.raises(ValueError, match="trained with offload_transformer, .*load it anew"):
        FlowGRPOEditTrainer(offloaded.policy.pipeline, redness, make_config(str(tmp_path)), make_cases(4))
    saved = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("plain", "offloaded")]
    assert saved[0] == saved[1]
