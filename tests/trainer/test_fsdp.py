"""FSDP2 on gloo ranks against one process, with the same global batch."""

import signal

import pytest
import torch

from hp_edit_trl.editors import PolicyEditor
from hp_edit_trl.miniature.tiny import (
    tiny_klein_pipeline,
    tiny_kontext_pipeline,
    tiny_pipeline,
    tiny_qwen_image_21_pipeline,
)
from hp_edit_trl.policies import policy_class
from tests.helpers import make_cases
from tests.processes import Script


FSDP = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

# Sizes differ, so that ranks have unequal numbers of passes; in the first update all groups of rank 0 are without
# spread, so that it has nothing to train on; a case of the evaluation cannot be read, so that rank 1 has nothing to
# edit, before it has ever made a pass.
SCRIPT = """
import io, json, os, signal, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from hp_edit_trl import DPOEditTrainer, FlowGRPOEditTrainer, FlowNFTEditConfig, FlowNFTEditTrainer
from hp_edit_trl.miniature.tiny import tiny_pipeline
from tests.helpers import make_cases, make_config, redness
from tests.trainer import test_dpo_edit_trainer as dpo

output, processes = Path(sys.argv[1]), int(sys.argv[2])
rank = int(os.environ.get("RANK", 0))
SIZES = ((64, 64), (128, 64), (64, 64), (64, 128), (64, 64))

def reward(completions, id, **kwargs):
    return [0.5 if case in ("case-4", "case-5", "case-6") else value for case, value in zip(id, redness(completions))]

def with_a_bad_case():
    rows = [dict(row) for row in make_cases(2)]
    for i, row in enumerate(rows):
        content = io.BytesIO()
        row["image"].save(content, "PNG")
        row["image"] = {"path": None, "bytes": content.getvalue()[: 200 if i == 1 else None]}
    return Dataset.from_list(rows, features=make_cases(2).features)

def grpo(name, reward=reward, train_dataset=make_cases(8, sizes=SIZES), **options):
    return FlowGRPOEditTrainer(
        model=tiny_pipeline(), reward_funcs=reward, train_dataset=train_dataset,
        eval_dataset=with_a_bad_case(), peft_config=LoraConfig(r=4, lora_alpha=8),
        args=make_config(output / name, per_device_train_batch_size=4 // processes, per_device_eval_batch_size=1,
                         num_generations=2, max_steps=2, save_strategy="steps", save_steps=1, beta=0.01,
                         gradient_checkpointing=True, eval_strategy="steps", eval_steps=9,
                         on_bad_case="skip", num_sample_edits=1, true_cfg_scale=2.0, rollout_batch_size=2,
                         # Adam turns rounding into whole steps where a gradient is nearly zero; SGD does not
                         optim="sgd", max_grad_norm=5e-4,
                         **{"eval_on_start": True, "learning_rate": 20.0, **options}),
    )

def result(trainer):
    # copies, because the results are looked at when training goes on
    return {
        "weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad},
        "sharded": {n: p.numel() // p.to_local().numel() for n, p in trainer.model.named_parameters()
                    if isinstance(p, DTensor)},
        "history": trainer.state.log_history,
    }

def online(results):
    trainer = grpo("grpo")
    trainer.train()
    trainer.save_model()
    results["grpo"] = result(trainer)

def contrasted(results):
    options = dict(per_device_train_batch_size=4 // processes, num_generations=2, max_steps=2, beta=1e-4,
                   gradient_checkpointing=True, on_bad_case="skip", num_sample_edits=1, rollout_batch_size=2,
                   num_train_sigmas=2, ema_decay=0.5, optim="sgd", max_grad_norm=5e-4, learning_rate=20.0)
    trainer = FlowNFTEditTrainer(
        model=tiny_pipeline(), reward_funcs=reward, train_dataset=make_cases(8, sizes=SIZES),
        peft_config=LoraConfig(r=4, lora_alpha=8), args=make_config(output / "nft", FlowNFTEditConfig, **options),
    )
    trainer.train()
    trainer.save_model()
    results["nft"] = result(trainer)

def resumed(results):
    trainer = grpo("again")
    trainer.train(resume_from_checkpoint=str(output / "grpo" / "checkpoint-1"))
    results["again"] = result(trainer)

def offline(results):
    pairs = dpo.make_pairs(8, sizes=SIZES)
    trainer = DPOEditTrainer(
        model=dpo.edit_pipeline(), train_dataset=pairs, eval_dataset=pairs.select(range(3)),
        peft_config=LoraConfig(r=4, lora_alpha=8),
        args=dpo.make_config(output / "dpo", per_device_train_batch_size=4 // processes, max_steps=2, beta=100.0,
                             gradient_checkpointing=True, eval_strategy="steps", eval_steps=2, optim="sgd",
                             per_device_eval_batch_size=2, learning_rate=0.1, max_grad_norm=0.05),
    )
    trainer.train()
    results["dpo"] = result(trainer)

def different(results):
    cases = make_cases(8, sizes=SIZES)
    for options in (
        {"learning_rate": 0.1 + rank}, {"train_dataset": cases.select(range(8 - rank))},
        {"train_dataset": cases.select(range(8) if rank else reversed(range(8)))},
        {"train_dataset": make_cases(8, SIZES[rank:])},
    ):
        try:
            grpo("different", **options)
        except ValueError as error:
            results.setdefault("different", []).append(str(error))

def failing(results):
    trainer = grpo("failing", eval_on_start=False)
    def decode(*args):
        raise RuntimeError("the decoder broke")
    if rank == 1:  # after its first batch; the other still has passes to make
        trainer.policy.decode = decode
    try:
        trainer.train()
    except Exception as error:
        results["failing"] = f"{type(error).__name__}: {error}"

def killed(results):
    trainer = grpo("killed", eval_on_start=False)
    velocity, calls = trainer.policy.velocity, []
    def fatal(*args):  # within a rollout
        calls.append(args)
        if rank == 1 and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return velocity(*args)
    trainer.policy.velocity = fatal
    try:
        trainer.train()
    except RuntimeError as error:
        print("rank", rank, "says:", error)

def main():
    results = {}
    for part in (online, contrasted, resumed, offline) + ((different, failing) if processes > 1 else ()):
        part(results)
    torch.save(results, output / f"result_{rank}.pt")
    if processes > 1:
        killed(results)

if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Results of one process, those of two ranks, what the ranks printed, and the ranks' folder."""
    folder = tmp_path_factory.mktemp("fsdp")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    scripts, results = [], []
    for processes, environment in ((1, {"ACCELERATE_USE_CPU": "true"}), (2, FSDP)):
        (output := folder / str(processes)).mkdir()
        scripts.append(Script(script, output, processes, environment=environment, processes=processes))
    for processes, started in enumerate(scripts, 1):
        done = started.wait(120)
        files = [folder / f"{processes}/result_{rank}.pt" for rank in range(processes)]
        assert all(file.exists() for file in files), done.stderr[-4000:]
        results.append([torch.load(file, weights_only=False) for file in files])
    return results[0][0], results[1], done, output


@pytest.mark.parametrize("part", ["grpo", "nft", "dpo"])
def test_two_ranks_give_the_weights_of_one_process(ran, part):
    one, two, *_ = ran
    sharded = two[0][part]["sharded"]
    assert len(sharded) > 50 and set(sharded.values()) == {2} and not one[part]["sharded"]  # a half on each
    assert not sharded.keys() & one[part]["weights"].keys()
    for name, weight in one[part]["weights"].items():
        torch.testing.assert_close(two[0][part]["weights"][name], weight, rtol=1e-4, atol=1e-7, msg=name)
        assert torch.equal(two[0][part]["weights"][name], two[1][part]["weights"][name]), name
    moved = [weight.abs().max() for name, weight in one[part]["weights"].items() if "lora_B" in name]
    assert min(moved) > 0 and max(moved) > 5e-4
    for alone, shared in zip(one[part]["history"], two[0][part]["history"], strict=True):
        for key in alone.keys() & {"reward", "loss", "kl", "grad_norm", "eval_reward", "eval_loss", "eval_bad_cases"}:
            assert shared[key] == pytest.approx(alone[key], rel=1e-3, abs=2e-6), key
    updates = [log["frac_filled_passes"] for log in two[0][part]["history"] if "loss" in log]
    assert len(updates) == 2 and max(updates) > 0.05


def test_a_rank_without_an_edit_or_an_advantage_keeps_step(ran):
    one, two, *_ = ran
    log = next(log for log in two[0]["grpo"]["history"] if "loss" in log)
    assert log["frac_reward_zero_std"] == 0.5 and log["grad_norm"] > 0
    assert next(log for log in two[0]["grpo"]["history"] if "eval_reward" in log)["eval_bad_cases"] == 1


def test_two_ranks_resume_exactly_and_save_what_one_process_saves(ran):
    one, two, _, output = ran
    for name, weight in two[0]["grpo"]["weights"].items():
        assert torch.equal(two[0]["again"]["weights"][name], weight), name
    folder = output / "grpo"
    assert {file.name for file in (folder / "images").glob("*.png")} == {"0_before.png", "0_after.png"}
    files = {path: {file.name for file in (output.parent / path).iterdir()} for path in ("1/grpo", "2/grpo")}
    assert files["1/grpo"] == files["2/grpo"]
    names = {file.name for file in (folder / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "rollouts_0.pt", "rollouts_1.pt"} <= names
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(str(folder))
    loaded = {name: weight for name, weight in pipeline.transformer.named_parameters() if "lora_" in name}
    assert len(loaded) == len(two[0]["grpo"]["weights"])
    for name, weight in two[0]["grpo"]["weights"].items():
        name = name.removeprefix("base_model.model.").replace(".default.", ".default_0.")
        assert torch.equal(loaded[name], weight), name


def test_ranks_with_other_options_or_data_stop(ran):
    _, two, *_ = ran
    assert two[0]["different"] == two[1]["different"]
    options, fewer, order, pictures = two[0]["different"]
    assert "different options: learning_rate=0.1 and 1.1" in options
    assert "train_dataset has 8 usable cases and 7" in fewer
    for message in (order, pictures):  # the texts are in another order; only the pictures differ
        assert "train_dataset has 8 usable cases and 8, or their content or order differs" in message


def test_an_error_between_two_passes_stops_both_ranks(ran):
    _, two, *_ = ran
    assert two[1]["failing"] == "RuntimeError: the decoder broke"
    assert two[0]["failing"] == "ValueError: Process 1 failed: RuntimeError: the decoder broke"


def test_the_others_say_that_a_rank_was_killed(ran):
    done = ran[2]
    assert done.returncode == -signal.SIGKILL
    assert "rank 0 says: Another process of this run has stopped, and process 0 cannot go on" in done.stdout


@pytest.mark.parametrize(
    "make", [tiny_pipeline, tiny_kontext_pipeline, tiny_klein_pipeline, tiny_qwen_image_21_pipeline]
)
def test_blocks_are_used_in_the_order_in_which_empty_passes_gather_them(make):
    """An empty pass gathers the blocks in the order of `modules()`."""
    pipeline = make()
    blocks = [m for m in pipeline.transformer.modules() if type(m).__name__ in pipeline.transformer._no_split_modules]
    used = []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: used.append(module))
    editor = PolicyEditor(policy_class(pipeline)(pipeline), "tiny", resolution=64, num_inference_steps=2)
    editor([[make_cases(1)[0]["image"]]], ["Make it red"], ["case"], [0])
    assert used and used == blocks * (len(used) // len(blocks))
