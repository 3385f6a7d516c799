"""
A server that scores edits with EditReward, for `hp_edit_trl.rewards.HTTPReward`. It runs in EditReward's own
environment, whose pins (transformers 4.56, trl 0.8) do not go together with this package, and needs nothing beside:

    python editreward_server.py --config_path EditReward/config/EditReward-MiMo-VL-7B-SFT-2508.yaml \\
        --checkpoint_path EditReward-MiMo-VL-7B-SFT-2508 --port 8000

in a checkout of https://github.com/TIGER-AI-Lab/EditReward. Then, beside the trainer:

    reward = HTTPReward("http://localhost:8000/score", lambda score: 1 / (1 + math.exp(-score)))
"""

import argparse
import base64
import json
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


LOCK = threading.Lock()  # the model takes one request at a time


def score(inferencer: Any, body: str | bytes) -> tuple[int, dict[str, Any]]:
    """The status and the reply to a request. EditReward takes one source: of several references the first."""
    try:
        request = json.loads(body)
        prompt = request["prompt"]
        urls = {"source": request["images"][0], "edit": request["edit"]}
        images = {name: base64.b64decode(url.partition("base64,")[2]) for name, url in urls.items()}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        return 400, {"error": f"the request is not as HTTPReward sends it: {type(error).__name__}: {error}"}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.png" for name in images}
        for name, path in paths.items():
            path.write_bytes(images[name])
        try:
            with LOCK:
                rewards = inferencer.reward(
                    prompts=[prompt], image_src=[str(paths["source"])], image_paths=[str(paths["edit"])]
                )
        except Exception as error:  # of one edit; the server stays
            return 500, {"error": f"{type(error).__name__}: {error}"}
    return 200, {"score": float(rewards[0][0])}


def handler(inferencer: Any) -> type[BaseHTTPRequestHandler]:
    """The class that answers requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, reply = score(inferencer, self.rfile.read(int(self.headers["Content-Length"])))
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


def main() -> None:
    import torch
    from EditReward import EditRewardInferencer

    parser = argparse.ArgumentParser()
    parser.add_argument("--config_path", required=True)
    parser.add_argument("--checkpoint_path", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    inferencer = EditRewardInferencer(
        config_path=args.config_path,
        checkpoint_path=args.checkpoint_path,
        device="cuda",
        reward_dim="overall_detail",
        rm_head_type="ranknet_multi_head",
    )
    inferencer.reward = torch.no_grad()(inferencer.reward)  # in the thread of each request
    ThreadingHTTPServer((args.host, args.port), handler(inferencer)).serve_forever()


if __name__ == "__main__":
    main()
