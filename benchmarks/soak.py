"""
Trains the miniature for hours with a judge that fails now and then and a process that is killed now and then, and
compares the result with a run that nothing disturbed. Writes the figures into docs/reliability.md.

    python benchmarks/soak.py                             # an hour on one process, beside it an hour on two
    python benchmarks/soak.py --minutes 10 --processes 1  # a short one

The judge is a server on loopback that answers as `miniature.TargetJudge`. One request in ten meets a fault: status
500, status 429, a connection that is cut, or silence for longer than the judge's timeout. Kills (SIGKILL to all
processes) come at exponential times, with a mean of --minutes_between_kills. Each start resumes with
`resume_from_checkpoint=True`. Then the undisturbed run makes as many updates in one go. Faults and kills follow from
--seed; at which update a kill falls depends on the machine.
"""

import argparse
import base64
import collections
import contextlib
import hashlib
import io
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import psutil
from PIL import Image
from safetensors.torch import load_file

from hp_edit_trl.miniature import TargetJudge, load_dataset
from hp_edit_trl.utils.files import read_json, write_text
from hp_edit_trl.utils.tables import markdown_table


PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- written by benchmarks/soak.py -->\n", "<!-- end -->\n"
CASES = 400
SAVE_STEPS = 10
TIMEOUT = 2.0  # of one attempt of the judge, in seconds
FAULTS = ("500", "429", "cut", "silent")  # those that are retried; an empty answer would be a lost judgement


def train(folder: str, url: str, max_steps: int) -> None:
    """The run itself: what a user's script would hold."""
    from peft import LoraConfig

    from hp_edit_trl import FlowGRPOEditConfig, FlowGRPOEditTrainer, HPScorerReward
    from hp_edit_trl.judges import ServerJudge
    from hp_edit_trl.miniature import load_pipeline

    args = FlowGRPOEditConfig(
        folder, bf16=False, use_cpu=True, gradient_checkpointing=False, resolution=32, num_inference_steps=5,
        true_cfg_scale=1.0, sde_window_size=2, num_generations=6, per_device_train_batch_size=6,
        generation_batch_size=24, steps_per_generation=None, gradient_accumulation_steps=1, learning_rate=1e-4,
        lr_scheduler_type="constant", max_steps=max_steps, save_steps=SAVE_STEPS, save_total_limit=3, logging_steps=10,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    judge = ServerJudge("soak", url, timeout=TIMEOUT, max_retries=8)
    peft_config = LoraConfig(r=8, lora_alpha=16, init_lora_weights="gaussian")
    trainer = FlowGRPOEditTrainer(
        load_pipeline(), HPScorerReward(judge), args, load_dataset("train", CASES), peft_config=peft_config
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    os._exit(0)  # a thread of gloo's may still hold a tensor, and would abort the process at its end


def serve(seed: int, counts: collections.Counter) -> tuple[ThreadingHTTPServer, str]:
    """Starts the judge's server. Below /calm it never fails, below /flaky one request in ten does."""
    judge = TargetJudge(load_dataset("train", CASES))
    attempts: collections.Counter = collections.Counter()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                key = hashlib.sha256(body).hexdigest()
                attempts[key] += 1
                rng = random.Random(f"{seed}-{key}-{attempts[key]}")
                fault = rng.choice(FAULTS) if self.path.startswith("/flaky") and rng.random() < 0.1 else None
                counts["requests"] += 1
                counts[fault] += 1
                answer = judge([[self._message(m) for m in json.loads(body)["messages"]]])[0].answer
            if fault == "silent":
                time.sleep(2 * TIMEOUT)
            if fault in ("cut", "silent"):
                self.close_connection = True
                return
            message = {"role": "assistant", "content": answer}
            reply = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "soak",
                                "choices": [{"index": 0, "finish_reason": "stop", "message": message}]})  # fmt: skip
            content = reply.encode()
            self.send_response({"500": 500, "429": 429}.get(fault or "", 200))
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if fault == "429":
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(content)

        @staticmethod
        def _message(message: dict[str, Any]) -> dict[str, Any]:
            def part(content: dict[str, Any]) -> dict[str, Any]:
                if content["type"] != "image_url":
                    return content
                data = base64.b64decode(content["image_url"]["url"].partition(",")[2])
                return {"type": "image", "image": Image.open(io.BytesIO(data)).convert("RGB")}

            return {"role": message["role"], "content": [part(content) for content in message["content"]]}

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that was killed

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def start(folder: Path, url: str, processes: int, max_steps: int) -> subprocess.Popen:
    """Starts the run."""
    script = [__file__, "--worker", str(folder), url, str(max_steps)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), *script]
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def finish(run: subprocess.Popen) -> None:
    if run.wait() != 0:
        raise RuntimeError(f"A run ended with an error: see the log beside its folder, {run.args}.")


def processes_of(run: subprocess.Popen) -> list[psutil.Process]:
    """The processes of a run: its launcher and its ranks. None if it has ended."""
    try:
        launcher = psutil.Process(run.pid)
        return [launcher, *launcher.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def usage(run: subprocess.Popen) -> tuple[float, int] | None:
    """Resident memory in MiB and open files of the largest process of the run; `None` while it starts or ends."""
    found = []
    for process in processes_of(run):
        with contextlib.suppress(psutil.Error):  # it has ended
            found.append((process.memory_info().rss / 2**20, process.num_fds()))
    return max(found, default=None)


def step_of(folder: Path) -> int:
    """The update of the newest checkpoint."""
    return max((int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")), default=0)


def same_lora(folder: Path, other: Path) -> bool:
    """Whether the LoRAs of two runs are equal, bit for bit. The order of the tensors in the files may differ."""
    one, two = (load_file(path / "adapter_model.safetensors") for path in (folder, other))
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def soak(folder: Path, processes: int, minutes: float, minutes_between_kills: float, seed: int) -> dict[str, Any]:
    """Runs both runs and returns the figures."""
    rng = random.Random(seed)
    counts: collections.Counter = collections.Counter()
    server, address = serve(seed, counts)
    disturbed, calm = folder / f"disturbed-{processes}", folder / f"calm-{processes}"
    begin = time.monotonic()
    kills = 0
    lives: list[list[tuple[float, int]]] = []
    while (left := begin + 60 * minutes - time.monotonic()) > 0:
        end = time.monotonic() + min(left, 30 + 60 * rng.expovariate(1 / minutes_between_kills))
        run = start(disturbed, f"{address}/flaky/v1", processes, 10**6)
        lives.append([])
        while time.monotonic() < end:
            time.sleep(1)
            if run.poll() is not None:
                raise RuntimeError(f"The run ended by itself: see {disturbed.with_suffix('.log')}.")
            if (now := usage(run)) is not None:
                lives[-1].append(now)
        for process in processes_of(run):
            process.kill()
        run.wait()
        kills += 1
        print(f"{processes} processes: kill {kills} at update {step_of(disturbed)}", flush=True)
    last = step_of(disturbed) + SAVE_STEPS
    finish(start(disturbed, f"{address}/flaky/v1", processes, last))
    flaky = counts.copy()
    finish(start(calm, f"{address}/calm/v1", processes, last))
    server.shutdown()
    history = (read_json(disturbed / f"checkpoint-{last}" / "trainer_state.json") or {})["log_history"]
    lost = sum(entry.get("frac_reward_missing", 0) > 0 for entry in history)
    longest = max(lives, key=len)
    tenth = max(1, len(longest) // 10)
    middle, final = longest[len(longest) // 2 : len(longest) // 2 + tenth], longest[-tenth:]
    return {
        "processes": processes,
        "minutes, disturbed run": minutes,
        "updates": last,
        "kills": kills,
        "requests": flaky["requests"],
        "requests that met a fault": sum(flaky[fault] for fault in FAULTS),
        "logs with a lost judgement": lost,
        "memory of a process, half-way and at the end of the longest life (MiB)": "{:.0f}, {:.0f}".format(
            *(sum(memory for memory, _ in part) / len(part) for part in (middle, final))
        ),
        "open files, half-way and at the end": "{}, {}".format(
            *(max(files for _, files in part) for part in (middle, final))
        ),
        "longest life (minutes)": round(len(longest) / 60, 1),
        "LoRA equal, bit for bit, to the undisturbed run's": "yes" if same_lora(disturbed, calm) else "NO",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="of disturbed training, for each of --processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of the runs; they go side by side")
    parser.add_argument("--minutes_between_kills", type=float, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/soak"))
    parser.add_argument("--write", action="store_true", help=f"write the figures into docs/{PAGE.name}")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        train(args.worker[0], args.worker[1], int(args.worker[2]))
        return
    shutil.rmtree(args.output_dir, ignore_errors=True)
    args.output_dir.mkdir(parents=True)
    with ThreadPoolExecutor(len(args.processes)) as pool:
        columns = list(
            pool.map(
                lambda processes: soak(
                    args.output_dir.resolve(), processes, args.minutes, args.minutes_between_kills, args.seed
                ),
                args.processes,
            )
        )
    names = [name for name in columns[0] if name != "processes"]
    table = markdown_table(
        ["", *(f"{column['processes']} process{'es' * (column['processes'] > 1)}" for column in columns)],
        [[name, *(column[name] for column in columns)] for name in names],
    )
    command = (
        f"python benchmarks/soak.py --minutes {args.minutes:g} --minutes_between_kills {args.minutes_between_kills:g}"
    )
    text = f"`{command}`, {os.cpu_count()} CPU cores, Python {platform.python_version()}:\n\n{table}\n"
    print(text)
    if args.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        write_text(PAGE, before + BEGIN + text + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
