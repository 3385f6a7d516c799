"""
The CPU memory that processes of a machine take to load a pipeline: weights in the type that they are stored in, some
that are converted, and a transformer that is sharded afterwards (FSDP2). Writes the table of docs/distributed.md.

    python benchmarks/loading.py --write

The pipeline is random. What counts is anonymous memory, which each process has for itself, in contrast to pages of
files, which it shares. "After" is when all processes have loaded the model; with a GPU it ends when the weights move
there.
"""

import argparse
import gc
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch


DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- written by benchmarks/loading.py -->\n", "<!-- end -->\n"
CASES = {  # stored in, loaded in, how, sharded afterwards
    "bfloat16, as stored": ("bfloat16", "bfloat16", "pipeline", False),
    "float32 to bfloat16, each by itself": ("float32", "bfloat16", "pipeline", False),
    "float32 to bfloat16": ("float32", "bfloat16", "library", False),
    "bfloat16, as stored, then sharded": ("bfloat16", "bfloat16", "library", True),
    "float32 to bfloat16, then sharded": ("float32", "bfloat16", "library", True),
}


def memory() -> tuple[float, float]:
    """Anonymous memory of this process, and all of it with its share of common pages, in MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    sizes = {name: int(value.split()[0]) / 1024 for name, _, value in (line.partition(":") for line in lines[1:])}
    return sizes["Anonymous"], sizes["Pss"]


@contextmanager
def measured(result: dict[str, float]):
    """Measures the memory that a block of code adds: at its peak and at its end."""
    gc.collect()
    before, peak, done = memory(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], memory()[0])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    gc.collect()
    now = memory()
    result |= {"peak": max(peak[0], now[0]) - before[0], "after": now[0] - before[0], "pss": now[1] - before[1]}


def load(rank: int, processes: int, port: int, folder: str, case: tuple, queue) -> None:
    """One of the processes."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    from accelerate import PartialState
    from diffusers import DiffusionPipeline
    from peft import LoraConfig, get_peft_model

    from hp_edit_trl.trainer.sharding import shard
    from hp_edit_trl.utils import loading

    state = PartialState(cpu=True)
    loading.SHARED_FROM = 2**20
    stored, dtype, how, sharded = case
    options = {"dtype": getattr(torch, dtype)}
    result: dict[str, float] = {}
    with measured(result):
        if how == "library":
            pipeline = loading.load_shared_pipeline(f"{folder}/{stored}", options)
        else:
            pipeline = DiffusionPipeline.from_pretrained(f"{folder}/{stored}", **options)
        if sharded:
            model = get_peft_model(pipeline.transformer.requires_grad_(False), LoraConfig(target_modules=["to_q"]))
            shard(model, torch.device("cpu"))
        state.wait_for_everyone()
    weights = (p for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae) for p in part.parameters())
    result["weights"] = sum(p.numel() * p.element_size() for p in weights) / 2**20
    queue.put(result)
    state.destroy_process_group()


def write_pipelines(folder: str, layers: int) -> None:
    from hp_edit_trl.miniature.tiny import tiny_pipeline

    heads = 8 if layers > 1 else 2
    pipeline = tiny_pipeline(num_layers=layers, num_attention_heads=heads, attention_head_dim=128)
    pipeline.save_pretrained(f"{folder}/float32")
    pipeline.to(torch.bfloat16).save_pretrained(f"{folder}/bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8, help="blocks of the transformer, of 75 MB in bfloat16 each")
    parser.add_argument("--write", action="store_true", help="write the table into docs/distributed.md")
    options = parser.parse_args()
    from hp_edit_trl.utils.files import write_text
    from hp_edit_trl.utils.tables import markdown_table

    context = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=write_pipelines, args=(folder, options.layers))
        process.start()
        process.join()
        for name, case in CASES.items():
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            queue = context.Queue()
            arguments = [(rank, options.processes, port, folder, case, queue) for rank in range(options.processes)]
            processes = [context.Process(target=load, args=one, daemon=True) for one in arguments]
            for process in processes:
                process.start()
            results = [queue.get(timeout=900) for _ in processes]
            for process in processes:
                process.join()
            cells = [" / ".join(f"{max(one[key], 0):.0f}" for one in results) for key in ("peak", "after", "pss")]
            rows.append([name, f"{max(one['weights'] for one in results):.0f}", *cells])
            print(rows[-1], flush=True)
    head = ["weights", "MiB of them", "own, peak", "own, after", "with its share of files"]
    words = f"--processes {options.processes} --layers {options.layers}"
    table = (
        f"`python benchmarks/loading.py {words}`, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores, torch "
        f"{torch.__version__}, diffusers {version('diffusers')}, transformers {version('transformers')}; MiB of each "
        f"process:\n\n{markdown_table(head, rows)}\n"
    )
    print(table)
    if options.write:
        page = DOCS / "distributed.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        write_text(page, f"{before}{BEGIN}{table}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
