"""Two gloo ranks against one process, with the same global batch."""

import pytest
import torch

from tests.processes import Script


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from peft import LoraConfig
from hp_edit_trl import FlowGRPOEditTrainer
from hp_edit_trl.miniature import tiny
from tests.helpers import make_cases, make_config, redness

output, pipeline, per_device, accumulation = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4])
seen = []

def reward(completions, id, log_metric, **kwargs):
    seen.extend(id)
    log_metric("num_local", len(id))
    return redness(completions)

# Groups of four lie across both ranks when a rank holds six samples; sizes differ, so ranks run unequal numbers of
# backward passes.
trainer = FlowGRPOEditTrainer(
    model=getattr(tiny, pipeline)(), reward_funcs=reward,
    train_dataset=make_cases(9, sizes=((64, 64), (128, 64), (64, 64))),
    eval_dataset=make_cases(3),
    args=make_config(output, per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation,
                     max_steps=3, save_strategy="steps", save_steps=2, beta=0.01, per_device_eval_batch_size=2,
                     eval_strategy="steps", eval_steps=3,
                     # Adam turns rounding into whole steps where a gradient is nearly zero; SGD does not
                     optim="sgd", learning_rate=20.0, max_grad_norm=0.0,
                     # The weights of the transformer are then not on the device.
                     offload_transformer=len(sys.argv) > 5, gradient_checkpointing=len(sys.argv) > 5),
    peft_config=LoraConfig(r=4, lora_alpha=8),
)
assert trainer.args.generation_batch_size == 12
trainer.train(resume_from_checkpoint=sys.argv[5] if len(sys.argv) > 5 else None)
rank = trainer.accelerator.process_index
torch.save({
    "weights": {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad},
    "history": trainer.state.log_history, "seen": seen,
}, f"{output}/result_{rank}.pt")
"""


def run(tmp_path, pipeline, name, processes, per_device, accumulation, *arguments):
    script, output = tmp_path / "script.py", tmp_path / name
    script.write_text(SCRIPT)
    output.mkdir()
    environment = {"ACCELERATE_USE_CPU": "true"} if processes == 1 else {}  # by the option `use_cpu` too
    arguments = (output, pipeline, per_device, accumulation, *arguments)
    done = Script(script, *arguments, environment=environment, processes=processes).wait()
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(output / f"result_{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["tiny_pipeline", "tiny_qwen_image_21_pipeline"])
def test_two_ranks_give_the_update_of_one_process(pipeline, tmp_path):
    (one,) = run(tmp_path, pipeline, "one", 1, 6, 2)
    two = run(tmp_path, pipeline, "two", 2, 3, 2)
    assert len(two[0]["seen"]) < len(one["seen"])  # the work was shared
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two[0]["weights"][name], weight, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name]), name
    for alone, shared in zip(one["history"], two[0]["history"], strict=True):
        for key in ("reward", "reward_std", "loss", "kl", "eval_reward", "eval_reward/add", "clip_ratio/region_mean"):
            assert (key in alone) == (key in shared)
            if key in alone:
                assert shared[key] == pytest.approx(alone[key], rel=1e-3, abs=2e-5), key
    # and two ranks resume exactly, with the transformer's blocks in CPU memory too
    again = run(tmp_path, pipeline, "again", 2, 3, 2, tmp_path / "two" / "checkpoint-2")
    for name, weight in two[0]["weights"].items():
        assert torch.equal(again[0]["weights"][name], weight), name
