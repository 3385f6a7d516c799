"""FSDP2 on gloo ranks against one process, with the same global batch."""

import json

import pytest
import torch

from tests.processes import Script


FSDP = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

# Sizes differ, so that ranks have unequal numbers of passes; in the first update all groups of rank 0 are without
# spread, so that it has nothing to train on; and a case of the evaluation cannot be read, so that rank 1 has nothing to
# edit.
SCRIPT = """
import io, json, os, signal, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from hp_edit_trl import DPOEditTrainer, FlowGRPOEditTrainer
from hp_edit_trl.miniature.tiny import tiny_pipeline
from tests.helpers import make_cases, make_config, redness
from tests.trainer import test_dpo_edit_trainer as dpo

output, processes = Path(sys.argv[1]), int(sys.argv[2])
rank = int(os.environ.get("RANK", 0))
SIZES = ((64, 64), (128, 64), (64, 64), (64, 128), (64, 64))

def reward(completions, id, **kwargs):
    return [0.5 if case in ("case-4", "case-5", "case-6") else value for case, value in zip(id, redness(completions))]

def with_a_bad_case():
    content = io.BytesIO()
    make_cases(1)[0]["image"].save(content, "PNG")
    rows = [dict(row) for row in make_cases(4)]
    for i, row in enumerate(rows):
        content = io.BytesIO()
        row["image"].save(content, "PNG")
        row["image"] = {"path": None, "bytes": content.getvalue()[: 200 if i == 1 else None]}
    return Dataset.from_list(rows, features=make_cases(4).features)

def grpo(name, reward=reward, train_dataset=make_cases(8, sizes=SIZES), **options):
    return FlowGRPOEditTrainer(
        model=tiny_pipeline(), reward_funcs=reward, train_dataset=train_dataset,
        eval_dataset=with_a_bad_case(), peft_config=LoraConfig(r=4, lora_alpha=8),
        args=make_config(output / name, per_device_train_batch_size=4 // processes, per_device_eval_batch_size=1,
                         num_generations=2, max_steps=3, save_strategy="steps", save_steps=2, beta=0.01, gradient_checkpointing=True,
                         eval_strategy="steps", eval_steps=3, eval_on_start=True, on_bad_case="skip",
                         num_sample_edits=2, true_cfg_scale=2.0, rollout_batch_size=2,
                         # Adam turns rounding into whole steps where a gradient is nearly zero; SGD does not
                         **{"optim": "sgd", "learning_rate": 20.0, "max_grad_norm": 0.05, **options}),
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

def resumed(results):
    trainer = grpo("again")
    trainer.train(resume_from_checkpoint=str(output / "grpo" / "checkpoint-2"))
    results["again"] = result(trainer)

def offline(results):
    pairs = dpo.make_pairs(8, sizes=SIZES)
    trainer = DPOEditTrainer(
        model=dpo.edit_pipeline(), train_dataset=pairs, eval_dataset=pairs.select(range(3)),
        peft_config=LoraConfig(r=4, lora_alpha=8),
        args=dpo.make_config(output / "dpo", per_device_train_batch_size=4 // processes, max_steps=3, beta=100.0,
                             gradient_checkpointing=True, eval_strategy="steps", eval_steps=3, optim="sgd",
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

def killed(results):
    def fatal(completions, **kwargs):
        if rank == 1 and trainer.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return redness(completions)
    trainer = grpo("killed", reward=fatal)
    try:
        trainer.train()
    except RuntimeError as error:
        print("rank", rank, "says", error)

def main():
    results = {}
    for part in (online, resumed, offline) + ((different,) if processes > 1 else ()):
        part(results)
    torch.save(results, output / f"result_{rank}.pt")
    if processes > 1:
        killed(results)

if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
"""


def run(folder, processes):
    script, output = folder / "script.py", folder / str(processes)
    script.write_text(SCRIPT)
    output.mkdir()
    environment = FSDP if processes > 1 else {"ACCELERATE_USE_CPU": "true"}
    done = Script(script, output, processes, environment=environment, processes=processes).wait(120)
    results = [torch.load(output / f"result_{rank}.pt", weights_only=False) for rank in range(processes)]
    return output, results, done
