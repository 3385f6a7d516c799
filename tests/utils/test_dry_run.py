import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hp_edit_trl.utils.dry_run import CARD, FLOAT32_RESULT, HOST, IN_FLOAT32, DryRun, Meter


def test_memory_of_a_training_step_is_that_of_real_tensors():
    def work(meter: Meter, device: torch.device) -> tuple[int, dict, dict]:
        with meter, torch.random.fork_rng(devices=[]):
            model = nn.Sequential(nn.Linear(300, 400), nn.GELU(), nn.Linear(400, 300)).to(device)
            meter.hold("weights", list(model.parameters()))
            inputs = torch.randn(500, 300).to(device)
            with meter.measured("training") as phase:
                model(inputs).square().mean().backward()
        return phase.peak, phase.parts, dict(phase.counts)

    real, dry = work(Meter(), HOST), work(DryRun(), CARD)
    assert dry[2] == real[2]
    assert dry[2] == {"forward": 2 * 500 * 2 * 300 * 400, "backward": 3 * 500 * 2 * 300 * 400}  # no gradient of inputs
    assert dry[1]["weights"] == real[1]["weights"] == 2 * 480_256 + 2048 + 1536  # in blocks of 512
    assert abs(real[0] - dry[0]) <= 4 * 500 * 300  # the real inputs have a copy on their own device only here


def test_memory_is_given_back():
    dry = DryRun()
    with dry:
        tensor = torch.empty(1000, 1000, device=CARD)
        view = tensor[:10]
        assert dry.total == 4_000_256
        del tensor
        assert dry.total == 4_000_256  # the view holds it
        del view
        assert dry.total == 0
        assert dry.phase.peak == 4_000_256


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.ones(3, 3, device=CARD) + torch.ones(3, 3),
        lambda: F.linear(torch.ones(3, 3), torch.ones(3, 3, device=CARD)),
        lambda: torch.cat([torch.ones(3, device=CARD), torch.ones(3)]),
        lambda: nn.Linear(3, 3).to(CARD)(torch.ones(2, 3)),
    ],
)
def test_devices_do_not_mix(call):
    with DryRun(), pytest.raises(RuntimeError, match="device"):
        call()


@pytest.mark.parametrize("device", [HOST, CARD])
def test_dtypes_do_not_mix(device):
    with DryRun(), pytest.raises(RuntimeError, match="dtype"):
        nn.Linear(3, 3, device=device)(torch.ones(2, 3, dtype=torch.bfloat16, device=device))


def test_numbers_on_the_host_may_meet_tensors_on_the_card():
    with DryRun():
        assert (torch.ones(3, 3, device=CARD) * torch.tensor(2.0)).device == CARD


def test_small_tensors_have_values_and_large_ones_shapes():
    with DryRun():
        lengths = torch.tensor([3, 5])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        assert not mask.all() and mask.sum().item() == 8
        hidden = torch.randn(2, 5, 70_000, device=CARD)
        assert hidden[mask.to(CARD)].shape == (8, 70_000)
        assert torch.tensor([1, 2, 2], device=CARD).unique().tolist() == [1, 2]
        assert torch.full((2,), 7, device=CARD).new_tensor(3).device == CARD
        large = torch.randn(300, 300, device=CARD)
        assert large.isfinite().all() and large.sum().item() == 1
        assert large.cpu().numpy().shape == (300, 300)


def test_autocast_follows_the_list_of_cuda():
    with DryRun(), torch.autocast("cpu", torch.bfloat16):
        hidden = nn.Linear(8, 8, device=CARD)(torch.randn(4, 8, device=CARD))
        assert hidden.dtype == torch.bfloat16
        for change in (lambda x: F.layer_norm(x, (8,)), torch.exp, lambda x: x.pow(2), lambda x: x**2, torch.rsqrt):
            assert change(hidden).dtype == torch.float32
        for change in (lambda x: x.softmax(-1), torch.sum, lambda x: x.norm(dim=-1)):
            assert change(hidden).dtype == torch.float32
        for change in (F.gelu, F.silu, lambda x: x.mean(), lambda x: x * 2, torch.sqrt):
            assert change(hidden).dtype == torch.bfloat16
    with DryRun():
        assert torch.exp(torch.ones(3, dtype=torch.bfloat16, device=CARD)).dtype == torch.bfloat16


def test_the_list_of_operations_is_that_of_torch():
    """Every operation of the lists has a rule of its own on CUDA, and none on the CPU."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]

    def ruled(key: str) -> set[str]:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        return {name.removeprefix("aten::").partition(".")[0] for name in names if has(name, key)}

    only_cuda = ruled("AutocastCUDA") - ruled("AutocastCPU")
    python_names = {"__pow__", "__rpow__", "vector_norm", "interpolate"}
    assert IN_FLOAT32 - python_names <= only_cuda
    assert FLOAT32_RESULT - {"prod"} <= only_cuda  # `prod` has one on both


def test_checkpointed_passes_are_repeated_under_the_same_autocast():
    dry = DryRun()
    with dry:
        layer = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()).to(CARD)
        inputs = torch.randn(4, 8, device=CARD, requires_grad=True)
        with dry.measured("training") as phase, torch.autocast("cpu", torch.bfloat16):
            hidden = torch.utils.checkpoint.checkpoint(layer, inputs, use_reentrant=False)
            hidden.float().sum().backward()
    assert phase.counts["recompute"] == phase.counts["forward"] == 2 * 4 * 8 * 8
    assert phase.counts["backward"] == 2 * phase.counts["forward"]


def test_what_ran_once_is_counted_again():
    dry, calls = DryRun(), []

    def work() -> torch.Tensor:
        calls.append(None)
        inputs = torch.randn(100, 100, device=CARD)
        return (inputs @ inputs) + torch.randn(100, 100, device=CARD)

    with dry:
        with dry.measured("first") as first:
            result = dry.once("work", work)
        held = torch.empty(10_000, device=CARD)
        with dry.measured("second") as second:
            again = dry.once("work", work)
        assert again.shape == result.shape and again.device == CARD
    assert len(calls) == 1
    assert first.counts == second.counts == {"forward": 2 * 100**3}
    assert second.peak - first.peak == 2 * dry.hold("held", held)  # `result` and `held` were there before
