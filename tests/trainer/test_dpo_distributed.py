"""Two gloo ranks against one process, with the same global batch."""

import re
from pathlib import Path

import pytest
import torch

from tests.processes import Script
from tests.trainer.test_dpo_edit_trainer import RUN_KEYS


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from peft import LoraConfig
from hp_edit_trl import DPOEditTrainer
from hp_edit_trl.miniature.tiny import tiny_qwen_image_21_pipeline
from hp_edit_trl.policies import QwenImageEditPlusPolicy
from tests.trainer.test_dpo_edit_trainer import edit_pipeline, make_config, make_pairs, record_pairs

output, pipeline, per_device = sys.argv[1], sys.argv[2], int(sys.argv[3])
encoded, encode = [], QwenImageEditPlusPolicy.encode

def counted(self, images, prompt, *args):
    encoded.append(prompt)
    return encode(self, images, prompt, *args)

QwenImageEditPlusPolicy.encode = counted

# One rank has pairs of one size where the other has several, so ranks run unequal numbers of forward passes.
pairs = make_pairs(8, sizes=((64, 64), (64, 64), (128, 64), (64, 64), (64, 128)))
trainer = DPOEditTrainer(
    model=globals()[pipeline](), train_dataset=pairs,
    eval_dataset={"five": pairs.select(range(5)), "one": pairs.select([2]), "six": pairs.select(range(6))},
    args=make_config(output, per_device_train_batch_size=per_device, gradient_accumulation_steps=1,
                     num_train_epochs=3, max_steps=-1, save_strategy="steps", save_steps=3, eval_strategy="steps",
                     eval_steps=2, beta=100.0, gradient_checkpointing=True, safeguard=True,
                     # Adam turns rounding into whole steps where a gradient is nearly zero; SGD does not
                     optim="sgd", learning_rate=0.1, max_grad_norm=0.0),
    peft_config=LoraConfig(r=4, lora_alpha=8),
)
calls = record_pairs(trainer)
trainer.train(resume_from_checkpoint=sys.argv[4] if len(sys.argv) > 4 else None)
seen = [(p.id, p.chosen, p.rejected, p.conditions.tensors) for pairs in calls for p in pairs]
calls.clear()
metrics = trainer.evaluate()
evaluated = [p.id for pairs in calls for p in pairs]
rank = trainer.accelerator.process_index
torch.save({
    "weights": {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad},
    "history": trainer.state.log_history, "seen": seen, "evaluated": evaluated, "encoded": encoded, "metrics": metrics,
}, f"{output}/result_{rank}.pt")
"""


def run(folder, name, processes, per_device, *arguments, pipeline="edit_pipeline"):
    script, output = folder / "script.py", folder / name
    script.write_text(SCRIPT)
    output.mkdir()
    environment = {"ACCELERATE_USE_CPU": "true"}
    arguments = (output, pipeline, per_device, *arguments)
    done = Script(script, *arguments, environment=environment, processes=processes).wait()
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(output / f"result_{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def one(folder):
    return run(folder, "one", 1, 4)[0]


@pytest.fixture(scope="module")
def two(folder):
    return run(folder, "two", 2, 2)


def logs(result):
    return [{k: v for k, v in log.items() if not RUN_KEYS.match(k)} for log in result["history"]]


def assert_same_run(one, two):
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two[0]["weights"][name], weight, rtol=1e-3, atol=1e-5, msg=name)
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name]), name
    assert max(w.abs().max().item() for name, w in one["weights"].items() if "lora_B" in name) > 1e-3  # it has moved
    training = [(a, b) for a, b in zip(logs(one), logs(two[0]), strict=True) if "loss" in a]
    assert len(training) == 6
    for alone, shared in training:
        assert alone.keys() == shared.keys()
        for name, value in alone.items():
            assert shared[name] == pytest.approx(value, rel=2e-3, abs=1e-3), name


def test_two_ranks_give_the_update_of_one_process(one, two):
    assert_same_run(one, two)


def test_two_ranks_with_a_shared_prefix_give_the_update_of_one_process(folder):
    name = "tiny_qwen_image_21_pipeline"
    (one,) = run(folder, "prefix-one", 1, 4, pipeline=name)
    assert_same_run(one, run(folder, "prefix-two", 2, 2, pipeline=name))


def test_evaluation_knows_no_ranks(one, two):
    # 5, 1 and 6 pairs, in batches of two on two ranks: the last batch is filled up, and those are not counted.
    names = [name for name in one["metrics"] if not RUN_KEYS.match(name) and name != "epoch"]
    assert {"eval_five_loss", "eval_one_loss", "eval_six_rewards/margins", "eval_five_flow_loss/rejected"} <= set(
        names
    )
    for name in names:
        assert two[0]["metrics"][name] == two[1]["metrics"][name]
        tolerance = 1e-4 if "flow_loss" in name else 2e-3
        assert two[0]["metrics"][name] == pytest.approx(one["metrics"][name], rel=tolerance, abs=tolerance), name
    # It would be seen if a repeated pair were counted: pairs are not alike.
    errors = [one["metrics"][f"eval_{name}_flow_loss/chosen"] for name in ("five", "six", "one")]
    assert abs(errors[0] - errors[1]) > 2e-3 and abs(errors[0] - errors[2]) > 2e-3
    assert set(two[0]["evaluated"]) | set(two[1]["evaluated"]) == set(one["evaluated"])
    assert len(two[0]["evaluated"]) < len(one["evaluated"])  # the work was shared


def test_ranks_keep_pairs_together(one, two):
    alone = {case: tensors for case, *tensors in one["seen"]}
    assert len(alone) == 8
    for rank in (0, 1):
        assert len(one["seen"]) / 3 < len(two[rank]["seen"]) < len(one["seen"])
        for case, chosen, rejected, conditions in two[rank]["seen"]:
            torch.testing.assert_close(chosen, alone[case][0], rtol=0, atol=1e-5)
            torch.testing.assert_close(rejected, alone[case][1], rtol=0, atol=1e-5)
            for name, tensor in conditions.items():
                torch.testing.assert_close(tensor, alone[case][2][name], rtol=0, atol=1e-5)
    assert {case for rank in (0, 1) for case, *_ in two[rank]["seen"]} == alone.keys()


def test_each_pair_is_encoded_by_one_rank(one, two):
    # Those that are evaluated are among those trained on.
    assert len(one["encoded"]) == 8 and len(two[0]["encoded"]) == len(two[1]["encoded"]) == 4
    assert sorted(two[0]["encoded"] + two[1]["encoded"]) == sorted(one["encoded"])


def test_two_ranks_resume_exactly(folder, two):
    # From within the second epoch
    again = run(folder, "again", 2, 2, folder / "two" / "checkpoint-3")
    for name, weight in two[0]["weights"].items():
        assert torch.equal(again[0]["weights"][name], weight), name
    assert [log for log in logs(again[0]) if "train_loss" not in log] == [
        log for log in logs(two[0]) if "train_loss" not in log
    ]


FULL = """
import sys, torch
torch.set_num_threads(1)
from peft import LoraConfig
from hp_edit_trl import DPOEditTrainer
from hp_edit_trl.trainer import dpo_edit_trainer
from tests.trainer.test_dpo_edit_trainer import edit_pipeline, make_config, make_pairs

def write(file, save):
    if dpo_edit_trainer.PartialState().process_index == 1:
        raise OSError(28, "No space left on device")
    save(file)

from accelerate import PartialState
dpo_edit_trainer.PartialState, dpo_edit_trainer.write_atomically = PartialState, write
trainer = DPOEditTrainer(model=edit_pipeline(), train_dataset=make_pairs(4), args=make_config(sys.argv[1]),
                         peft_config=LoraConfig(r=4, lora_alpha=8))
try:
    trainer.train()
except OSError as error:
    print(f"rank {PartialState().process_index} stopped: {error}")
"""


def test_a_full_disk_of_one_process_stops_the_encoding_in_all(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FULL)
    done = Script(script, tmp_path / "out", environment={"ACCELERATE_USE_CPU": "true"}, processes=2).wait(60)
    assert done.returncode == 0, done.stderr[-3000:]
    # Another library, or the other process, may print on the same line.
    lines = sorted(re.findall(r"rank \d stopped(?:(?!rank \d stopped).)*", done.stdout))
    assert len(lines) == 2 and all("No space left on device" in line for line in lines)
