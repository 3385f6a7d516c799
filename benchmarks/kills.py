"""
Kills runs at random moments, resumes them with `resume_from_checkpoint=True` until they are done, and compares the
LoRA with that of a run that nobody disturbed, bit for bit. A finished run is started once more, which must leave every
file as it is. Prints a table and ends with an error if something differs.

    python benchmarks/kills.py --kills 100

Both trainers, on one process and on two (gloo); a tiny random pipeline on one CPU thread, a checkpoint after every
update. Two thirds of the kills wait until a checkpoint is being written. The processes of a run are forks of this one,
which has loaded everything, and have the environment that `torchrun` gives; SIGKILL goes to all of them.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path


os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open

from hp_edit_trl import DPOEditConfig, DPOEditTrainer, FlowGRPOEditConfig, FlowGRPOEditTrainer
from hp_edit_trl.miniature.tiny import tiny_pipeline


torch.set_num_threads(1)

UPDATES = 6
LORAS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def redness(completions, **columns) -> list[float]:
    """How red the edits are."""
    return [float(np.asarray(image, dtype=float)[..., 0].mean() / 255) for image in completions]


def photo(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((64, 64))


def train(method: str, output: str, per_process: int) -> None:
    """One start of a run: it resumes if there is a checkpoint."""
    rows = [{"id": i, "prompt": f"Make it red, number {i}", "image": photo(i)} for i in range(4)]
    options = dict(
        output_dir=output, bf16=False, use_cpu=True, gradient_checkpointing=False, resolution=64, max_steps=UPDATES,
        num_inference_steps=2, learning_rate=1e-2, report_to="none", disable_tqdm=True, save_strategy="steps",
        save_steps=1, save_total_limit=2, per_device_train_batch_size=per_process,
    )  # fmt: skip
    if method == "Flow-GRPO":
        # Two microbatches of a generation batch, each an update: every other checkpoint lies inside a batch.
        args = FlowGRPOEditConfig(
            **options, num_generations=2, gradient_accumulation_steps=1, steps_per_generation=2, sde_window_size=1
        )
        trainer = FlowGRPOEditTrainer(
            PIPELINE, redness, args, Dataset.from_list(rows), peft_config=LoraConfig(r=2, lora_alpha=4)
        )
    else:
        pairs = [row | {"chosen": photo(10 + i), "rejected": photo(20 + i)} for i, row in enumerate(rows)]
        args = DPOEditConfig(**options, gradient_accumulation_steps=1)
        trainer = DPOEditTrainer(PIPELINE, args, Dataset.from_list(pairs), peft_config=LoraConfig(r=2, lora_alpha=4))
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()


def start(method: str, processes: int, output: Path, log: Path) -> list[int]:
    """Forks the processes of a run. Returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            with open(log, "a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {
                    "LOCAL_WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            train(method, str(output), 2 // processes)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return children


def wait(children: list[int], until: float | None = None, saving: Path | None = None) -> list[int] | None:
    """
    Waits for the end of all processes and returns their exit codes. `None` if the time `until` came first, or a
    checkpoint was being written in the folder `saving`.
    """
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in children:
            if child in codes:
                continue
            try:
                done, status = os.waitpid(child, os.WNOHANG)
            except ChildProcessError:  # it ended in an earlier call, and well: otherwise that would have returned it
                done, status = child, 0
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:  # as a launcher does
                    kill([other for other in children if other not in codes])
                    return [codes[child]]
        if (until is not None and time.monotonic() > until) or (saving is not None and saving.exists()):
            break
        time.sleep(0.0005)
    return [codes[child] for child in children] if len(codes) == len(children) else None


def kill(children: list[int]) -> None:
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def lora(folder: Path) -> list[tuple[dict, dict]]:
    """Tensors and metadata of both files. Their bytes differ from run to run: safetensors does not order metadata."""
    loaded = []
    for name in LORAS:
        with safe_open(folder / name, "np") as file:
            loaded.append(({key: file.get_tensor(key).tobytes() for key in file.keys()}, file.metadata()))  # noqa: SIM118
    return loaded


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def main(kills: int, seed: int, settings: list[tuple[str, int]]) -> bool:
    rng = random.Random(seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number, (method, processes) in enumerate(settings):
            name = f"{method}-{processes}"
            log, reference = root / f"{name}.log", root / f"{name}-reference"
            begin = time.monotonic()
            if codes := wait(start(method, processes, reference, log)):
                assert not any(codes), log.read_text()[-4000:]
            seconds = time.monotonic() - begin
            count = {"runs": 0, "kills": 0, "saving": 0, "failed": 0, "equal": 0}
            share = kills // len(settings) + (number < kills % len(settings))
            while count["kills"] < share:
                output = root / f"{name}-run"
                count["runs"] += 1
                planned = min(rng.randint(3, 8), share - count["kills"])
                while True:
                    children = start(method, processes, output, log)
                    if planned <= 0:
                        codes = wait(children)
                    elif rng.random() < 2 / 3:  # while a checkpoint is being written, at once or some saves later
                        codes = wait(children, time.monotonic() + rng.uniform(0, 0.5 * seconds))
                        codes = codes or wait(children, time.monotonic() + 2 * seconds, output / "_unfinished")
                        codes = codes or wait(children, time.monotonic() + rng.uniform(0, 0.06))
                    else:
                        codes = wait(children, time.monotonic() + rng.uniform(0, 0.8 * seconds))
                    if codes is not None:
                        break
                    kill(children)
                    planned -= 1
                    count["kills"] += 1
                    count["saving"] += (output / "_unfinished").exists()
                if any(codes):
                    count["failed"] += 1
                    print(f"{name}: a start failed.\n{log.read_text()[-4000:]}", file=sys.stderr)
                else:
                    count["equal"] += lora(output) == lora(reference)
                    before = content(output)  # started once more, it is left as it is
                    again = wait(start(method, processes, output, log))
                    count["failed"] += any(again or [1]) or content(output) != before
                shutil.rmtree(output)
            rows.append((method, processes, *count.values()))
            print(f"{name}: {count}, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    print("| Trainer | Processes | Runs | Kills | of them while saving | Starts that failed | Equal to the bit |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    return all(equal == runs and failed == 0 for _, _, runs, _, _, failed, equal in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trainers", nargs="+", choices=["Flow-GRPO", "DPO"], default=["Flow-GRPO", "DPO"])
    parser.add_argument("--processes", nargs="+", type=int, choices=[1, 2], default=[1, 2])
    options = parser.parse_args()
    PIPELINE = tiny_pipeline()
    chosen = [(method, processes) for method in options.trainers for processes in options.processes]
    sys.exit(0 if main(options.kills, options.seed, chosen) else "A resumed run differs, or a start failed.")
