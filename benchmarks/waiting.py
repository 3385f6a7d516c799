"""
How long the sampler waits for a judge on a server: 96 edits in 12 batches, judged while the next ones are sampled and
judged afterwards. Writes the table and the picture of docs/performance.md.

    python benchmarks/waiting.py --write

The trainer, the judge's client and HTTP are real. A batch is a tiny model's and takes 1.5 seconds more, as if a device
were busy; the server on loopback answers after a fixed time, or so many requests per second. The machine is idle
meanwhile, so the picture is about waiting alone, not about the work of encoding pictures.
"""

import argparse
import json
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

from hp_edit_trl import FlowGRPOEditConfig, FlowGRPOEditTrainer, HPScorerReward
from hp_edit_trl.judges import ServerJudge
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.utils.files import write_text
from hp_edit_trl.utils.tables import markdown_table


DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- written by benchmarks/waiting.py -->\n", "<!-- end -->\n"
CASES, GENERATIONS, BATCH = 6, 16, 8
BUSY = 1.5  # seconds that a batch takes
SERVERS = {"1 s per request": (1.0, 0.0), "3 s per request": (3.0, 0.0), "6 requests per second": (0.5, 1 / 6)}


class AfterwardsReward(HPScorerReward):
    """A scorer that is called once, when all edits are sampled."""

    is_remote = False  # type: ignore[assignment]


def serve(seconds: float, pause: float, requests: list[tuple[float, float]]) -> ThreadingHTTPServer:
    """A server that answers after so many seconds, and one request after the other with a pause between them."""
    turn = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            start = time.perf_counter()
            with turn:
                time.sleep(pause)
            time.sleep(seconds)
            reply = json.dumps({"choices": [{"message": {"content": "4"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)
            requests.append((start, time.perf_counter()))

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def measure(reward: type[HPScorerReward], seconds: float, pause: float, busy: float) -> dict[str, Any]:
    """Samples and scores one generation batch. Times are relative to its start."""
    requests: list[tuple[float, float]] = []
    server = serve(seconds, pause, requests)
    cases = Dataset.from_list([{"prompt": "x", "image": Image.new("RGB", (32, 32))}] * CASES)
    args = FlowGRPOEditConfig(
        tempfile.mkdtemp(), bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", resolution=32,
        num_inference_steps=2, sde_window_size=1, true_cfg_scale=1.0, num_generations=GENERATIONS,
        per_device_train_batch_size=CASES * GENERATIONS, gradient_accumulation_steps=1, rollout_batch_size=BATCH,
    )  # fmt: skip
    scorer = reward(ServerJudge("m", f"http://127.0.0.1:{server.server_port}/v1"))
    trainer = FlowGRPOEditTrainer(tiny_pipeline(), scorer, args, cases, peft_config=LoraConfig(r=4, lora_alpha=8))
    requests.clear()
    batches: list[tuple[float, float]] = []
    decode = trainer.policy.decode

    def slow_decode(latents, conditions):
        time.sleep(busy)
        images = decode(latents, conditions)
        batches.append((start if not batches else batches[-1][1], time.perf_counter()))
        return images

    trainer.policy.decode = slow_decode  # type: ignore[method-assign]
    start = time.perf_counter()
    trainer._generate_and_score([i for i in range(CASES) for _ in range(GENERATIONS)], 0)
    end = time.perf_counter()
    server.shutdown()
    return {
        "waits": end - batches[-1][1],
        "total": end - start,
        "batches": [(a - start, b - start) for a, b in batches],
        "requests": sorted((a - start, b - start) for a, b in requests),
    }


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws the batches of each run and the requests that were open."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.5 * len(runs) + 0.8), dpi=100, layout="constrained")
    for axes, (name, run) in zip(figure.subplots(len(runs), sharex=True), runs.items(), strict=True):
        axes.broken_barh([(a, b - a - 0.05) for a, b in run["batches"]], (1.1, 0.8), color="C0", label="sampling")
        end = run["batches"][-1][1]
        axes.broken_barh([(end, run["waits"])], (1.1, 0.8), color="C3", label="waiting")
        moments = sorted(moment for request in run["requests"] for moment in request)
        open_now = [sum(a <= moment < b for a, b in run["requests"]) / 16 for moment in moments]
        axes.fill_between(moments, open_now, step="post", color="C2", alpha=0.6, label="open requests (of 16)")
        axes.set(yticks=[], title=f"{name}: waits {run['waits']:.1f} s of {run['total']:.1f} s", ylim=(0, 2))
        axes.title.set_size("medium")
    figure.axes[-1].set(xlabel="seconds")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize="small")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faster", type=float, default=1.0, help="divide all times by it")
    parser.add_argument("--write", action="store_true", help="write table and picture into docs/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, shown = [], {}
    for name, (seconds, pause) in SERVERS.items():
        times = [x / args.faster for x in (seconds, pause, BUSY)]
        after, while_sampling = measure(AfterwardsReward, *times), measure(HPScorerReward, *times)
        sampling = while_sampling["total"] - while_sampling["waits"]
        rows.append([name, *(f"{x:.1f}" for x in (sampling, after["waits"], while_sampling["waits"]))])
        if name == "3 s per request":
            shown = {f"judged afterwards, {name}": after, f"judged while sampling, {name}": while_sampling}
    table = markdown_table(
        ["server", "sampling (s)", "waits, judged afterwards (s)", "waits, judged while sampling (s)"], rows
    )
    print(table)
    if args.write:
        page = DOCS / "performance.md"
        before, _, rest = page.read_text().partition(BEGIN)
        write_text(page, before + BEGIN + table + "\n" + END + rest.partition(END)[2])
        draw(shown, DOCS / "assets" / "waiting.png")


if __name__ == "__main__":
    main()
