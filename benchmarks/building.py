"""
Measures what building a dataset costs besides the calls of the models, and how much memory it takes. Prints tables.

    python benchmarks/building.py                      # rows per second and overhead of each stage, local and with Ray
    python benchmarks/building.py --memory 50000       # peak memory of building from 50,000 small pictures

Setting of the first: one CPU thread, pictures of 256 x 256; CLIP ViT-B/32 with random weights; writer and judge behind
servers on loopback that answer after --latency seconds, 16 requests at once; an editor that takes --latency seconds
per picture. "Model calls" is the time in the calls of the model (processor and forward pass of CLIP, answers of the
servers, the editor). "Whole stage" is the time since the stage was ready. The overhead is the time beyond the calls:
reading, decoding, checking, encoding and writing. "Start" is the time before: loading the model, and with Ray the
process of the worker and its imports.

Setting of the second: pictures of 64 x 64, each stage with its default batch size, models that answer at once. It
measures the peak of the resident memory of the process.
"""

import argparse
import json
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from hp_edit_trl import HPScorerReward
from hp_edit_trl.data.builder import (
    BuildConfig,
    ClipCategories,
    Duplicates,
    ImageCheck,
    MakeEdits,
    Plan,
    ScoreEdits,
    Sources,
    Stage,
    WorkFolder,
    WriteInstructions,
    build_dataset,
    run_stage,
)
from hp_edit_trl.judges import Judgement, ServerJudge
from hp_edit_trl.miniature.tiny import tiny_clip


torch.set_num_threads(1)

INSTRUCTION = {
    "instruction": "Make the cup on the table dark green and leave the rest",
    **{"object": "the cup", "color": "dark green"},
}


def pictures(folder: Path, count: int, size: int) -> None:
    """Smooth random pictures, no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.png")


class Handler(BaseHTTPRequestHandler):
    """A chat server that answers after a delay: with a score if it is asked for one, otherwise with a prompt."""

    latency = 0.0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.latency)
        text = body[:20_000].decode(errors="replace")
        answer = '{"feasible": true, "reason": ""}' if "is feasible only if" in text else json.dumps(INSTRUCTION)
        answer = "4" if "grade" in text[:3000] else answer
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
        payload = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        data = json.dumps(payload).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64


class Timed:
    """A judge that writes down how long its calls take."""

    def __init__(self, judge: Any, file: Path):
        self.judge, self.file, self.identity = judge, file, judge.identity

    def load(self, num_images: int = 2) -> None:
        self.judge.load(num_images)

    def __call__(self, conversations: list) -> list[Judgement]:
        start = time.perf_counter()
        judgements = self.judge(conversations)
        note(self.file, time.perf_counter() - start)
        return judgements


def note(file: Path, seconds: float) -> None:
    with open(file, "a") as lines:
        lines.write(f"{seconds}\n")


class TimedClip(ClipCategories):
    """Writes down how long its processor and its model take."""

    def __init__(self, file: Path, model: str):
        super().__init__(model)
        self.file = file

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            note(self.file, time.perf_counter() - start)
            return result

        return timed_call

    def load(self) -> None:
        super().load()
        self.file.unlink(missing_ok=True)
        self.__dict__["processor"] = self.timed(self.processor)
        self.model.get_image_features = self.timed(self.model.get_image_features)


class Started:
    """A stage that writes down when it was ready."""

    def __init__(self, stage: Stage, file: Path):
        self.stage, self.file = stage, file
        self.name, self.inputs, self.features = stage.name, stage.inputs, stage.features
        self.batch_size, self.settings = stage.batch_size, stage.settings

    def load(self) -> None:
        self.stage.load()
        self.file.write_text(repr(time.time()))

    def check(self, again: bool) -> None:
        self.stage.check(again)

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        return self.stage(batch)


class SlowEditor:
    """An editor that waits and returns the picture."""

    def __init__(self, file: Path, latency: float):
        self.file, self.latency, self.identity = file, latency, {"editor": "slow", "revision": None}

    def load(self) -> None:
        pass

    def unload(self) -> None:
        pass

    def __call__(self, references: list, prompts: list, ids: list, seeds: list) -> list[Image.Image]:
        start = time.perf_counter()
        time.sleep(self.latency * len(references))
        note(self.file, time.perf_counter() - start)
        return [images[0] for images in references]


class Instant:
    """A writer and judge that answers at once."""

    identity = {"judge": "Instant"}

    def load(self) -> None:
        pass

    def __call__(self, conversations: list) -> list[Judgement]:
        answers = []
        for conversation in conversations:
            text = conversation[0]["content"][0]["text"]
            if "is feasible only if" in text:
                answers.append(Judgement(None, '{"feasible": true, "reason": ""}'))
            elif "grade" in text:
                answers.append(Judgement(float(len(answers) % 6), str(len(answers) % 6)))
            else:
                values = {
                    **INSTRUCTION,
                    "instruction": f"Make the cup dark green, as number {hash(text) % 10**6} has it",
                }
                answers.append(Judgement(None, json.dumps(values)))
        return answers


def overhead(count: int, latency: float, engines: list[str], tiny: bool) -> None:
    with tempfile.TemporaryDirectory() as home:
        root = Path(home)
        pictures(root / "pictures", count, 256)
        Handler.latency = latency
        server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        clip = tiny_clip(str(root / "clip"))
        if not tiny:
            tokenizer = CLIPProcessor.from_pretrained(clip).tokenizer
            config = CLIPConfig()  # ViT-B/32
            config.text_config.vocab_size = len(tokenizer)
            torch.manual_seed(0)
            CLIPModel(config).save_pretrained(clip)
            CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(clip)
        print(
            "| engine | stage | rows | start, s | rows/s | model calls, s | whole stage, s | overhead |\n"
            "|---|---|---|---|---|---|---|---|"
        )
        for engine in engines:
            calls = {name: root / f"{engine}-{name}.txt" for name in ("category", "instructions", "edits", "scores")}
            judge = ServerJudge("m", url, max_concurrency=16, max_new_tokens=384)
            stages = [
                ImageCheck(min_side=64),
                Duplicates(0),
                TimedClip(calls["category"], clip),
                Plan({"color": 10**9}),
                WriteInstructions(Timed(judge, calls["instructions"])),
                MakeEdits(SlowEditor(calls["edits"], latency)),
                ScoreEdits(HPScorerReward(Timed(judge, calls["scores"]))),
            ]
            folder = WorkFolder(root / engine, Sources([{"folder": str(root / "pictures"), "license": "cc0-1.0"}]))
            for stage in stages:
                rows, loaded = len(folder.live), root / f"{engine}-{stage.name}-loaded.txt"
                start = time.time()
                run_stage(folder, Started(stage, loaded), Accelerator(), engine)
                begun = float(loaded.read_text())
                seconds = time.time() - begun
                if stage.name in calls:
                    model = sum(map(float, calls[stage.name].read_text().split()))
                    bare = f"{model:.2f} | {seconds:.2f} | {seconds / model - 1:.1%}"
                else:
                    bare = f"– | {seconds:.2f} | –"
                print(
                    f"| {engine} | {stage.name} | {rows} | {begun - start:.1f} | {rows / seconds:.1f} | {bare} |",
                    flush=True,
                )


def memory(count: int, folder: Path) -> None:
    if not (folder / "pictures").exists():
        pictures(folder / "pictures.part", count, 64)
        (folder / "pictures.part").rename(folder / "pictures")
    config = BuildConfig(
        sources=[{"folder": str(folder / "pictures"), "license": "cc0-1.0"}],
        output_dir=str(folder / "build"),
        min_side=32,
        clip_model=tiny_clip(str(folder / "clip")),
        task_counts={"color": count},
        sample_size=0,
        benchmark_counts={},
        max_repeats=count,
        duplicate_distance=0,
    )

    def edit(images: list, prompts: list) -> list[Image.Image]:
        return images

    start = time.perf_counter()
    build_dataset(config, writer=Instant(), editor=edit, scorer=HPScorerReward(Instant()))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(
        f"| pictures | time | peak of resident memory |\n|---|---|---|\n| {count} | {seconds:.0f} s | {peak:.2f} GiB |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--latency", type=float, default=1.0, help="seconds of a server's answer and of an edit")
    parser.add_argument("--engines", nargs="+", default=["local", "ray"])
    parser.add_argument("--tiny", action="store_true", help="a tiny CLIP in place of ViT-B/32")
    parser.add_argument("--memory", type=int, help="measure memory instead, with this number of pictures")
    args = parser.parse_args()
    if args.memory is None:
        overhead(args.rows, args.latency, args.engines, args.tiny)
    else:
        with tempfile.TemporaryDirectory() as home:
            memory(args.memory, Path(home))
