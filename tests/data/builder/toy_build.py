"""
A build of three stages without any model, to be run as a script and killed:
`python -m tests.data.builder.toy_build FOLDER [ENGINE] [PAUSE]`.
"""

import sys
import time
from pathlib import Path

from accelerate import Accelerator
from datasets import Features, Image, Value
from PIL import Image as PILImage

from hp_edit_trl.data.builder.engine import Batch, WorkFolder, run_stage
from hp_edit_trl.utils.images import png_bytes


def encoded(image: PILImage.Image) -> dict:
    """An image as datasets encode it."""
    return {"bytes": png_bytes(image), "path": None}


class Numbers:
    """100 rows, named by their number."""

    settings = {"count": 100}

    def __len__(self) -> int:
        return 100

    def read(self, start: int, stop: int) -> Batch:
        return {"file": [f"file-{i}" for i in range(start, stop)], "source": ["toy"] * (stop - start)}


class Pictures:
    """Each row gets an "image"; every tenth is rejected."""

    name = "sources"
    inputs = ("file", "source")
    features = Features({"file": Value("string"), "source": Value("string"), "image": Image()})

    def __init__(self, batch_size: int = 8):
        self.batch_size = batch_size

    @property
    def settings(self):
        return {}

    def load(self):
        pass

    def __call__(self, batch: Batch) -> Batch:
        images = [{"bytes": name.encode() * 100, "path": None} for name in batch["file"]]
        reasons = [f"broken: {name}" if name.endswith("3") else None for name in batch["file"]]
        return {"file": batch["file"], "source": batch["source"], "image": images, "reason": reasons}


class Twice:
    """Two rows of each, in the opposite order."""

    name = "plan"
    inputs = ("file",)
    batch_size = None
    features = Features({"k": Value("int64")})
    settings: dict = {}

    def load(self):
        pass

    def __call__(self, batch: Batch) -> Batch:
        parents = [i for i in range(len(batch["file"])) for _ in range(2)][::-1]
        return {"k": list(range(len(parents))), "parent": parents, "reason": [None] * len(parents)}


class Slow:
    """Reads the image of its row's parent, writes down that it was called, and takes its time."""

    name = "slow"
    inputs = ("file", "k", "image")
    batch_size = 7
    features = Features({"text": Value("string")})

    def __init__(self, calls: Path, pause: float = 0.0, word: str = "text"):
        self.calls, self.pause, self.word = calls, pause, word

    @property
    def settings(self):
        return {"word": self.word}

    def load(self):
        pass

    def __call__(self, batch: Batch) -> Batch:
        with open(self.calls, "a") as calls:
            calls.write(f"{batch['k'][0]}\n")
        time.sleep(self.pause)
        assert [value["bytes"] for value in batch["image"]] == [name.encode() * 100 for name in batch["file"]]
        texts = [f"{self.word} {name} {k}" for name, k in zip(batch["file"], batch["k"], strict=True)]
        return {"text": texts, "reason": ["odd" if k % 2 else None for k in batch["k"]]}


def build(path: str | Path, engine: str = "local", pause: float = 0.0, **kwargs) -> WorkFolder:
    """Runs all three stages. The calls of the last one are counted beside the folder."""
    accelerator = Accelerator()
    folder = WorkFolder(path, Numbers())
    for stage in (Pictures(), Twice(), Slow(Path(f"{path}.calls"), pause, **kwargs)):
        run_stage(folder, stage, accelerator, engine, num_workers=2)
    return folder


if __name__ == "__main__":
    engine, pause = sys.argv[2:3] or ["local"], sys.argv[3:4] or ["0"]
    with WorkFolder.locked(sys.argv[1]):
        build(sys.argv[1], engine[0], float(pause[0]))
