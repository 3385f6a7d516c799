"""A page with every case of a benchmark and what each editor made of it. Static: it opens from a disk, without a network."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image
from tqdm.auto import tqdm

from .results import BENCHMARKS, LABELS, Run


THUMBNAIL = 512  # longest side of a picture on the page


def write_gallery(runs: Sequence[Run], out: str | Path) -> Path:
    """
    Writes `gallery.html` and `images/`: source, edits, instruction, scores and the judge's answers of each case; to be filtered by group
    and section, and sorted by any score of a run or the difference of two.

    Args:
        runs (`Sequence[Run]`):
            Runs on the same cases, see [`write_bench_report`].
        out (`str` or `Path`):
            Folder to write to.

    Returns:
        `Path`: the page.
    """
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    benchmark = runs[0].settings["benchmark"]
    shown = [name for name in benchmark["metrics"] if name not in benchmark["products"]]
    shown += ["human"] if any(row["human"] is not None for run in runs for row in run.cases) else []
    sections = {name: wanted for name, wanted in benchmark["sections"].items() if wanted}
    cases = []
    for number, rows in enumerate(
        tqdm(zip(*(run.cases for run in runs), strict=True), "Gallery", len(runs[0].cases), unit="case")
    ):
        case = rows[0]
        source = None
        for run, row in zip(runs, rows, strict=True):  # a run whose editor was given the case has its source
            if source is None and row["source"] is not None:
                source = _picture(run.folder / row["source"], out, f"{number}-source")
        edits = []
        for place, (run, row) in enumerate(zip(runs, rows, strict=True)):
            values = [row[name] for name in shown]
            answers = json.loads(row["answers"]) if row["answers"] else {}
            edit = {
                "values": values,
                "reason": row["reason"],
                "answers": [(LABELS.get(name, name), text) for name, text in answers.items()],
                "file": None,
            }
            if row["edit"] is not None:
                edit["file"] = _picture(run.folder / row["edit"], out, f"{number}-{place}")
                if edit["file"] is None:
                    edit["reason"] = f"{row['edit']} cannot be read"
            edits.append(edit)
        belongs = [
            name for name, wanted in sections.items() if all(case[key] == value for key, value in wanted.items())
        ]
        cases.append(
            {
                "id": case["id"],
                "group": case[benchmark["group"]],
                "prompt": case["prompt"],
                "requirement": case["requirement"],
                "sections": belongs,
                "source": source,
                "edits": edits,
            }
        )
    data: dict[str, Any] = {
        "title": BENCHMARKS.get(benchmark["name"], benchmark["name"]),
        "runs": [run.name for run in runs],
        "metrics": [LABELS.get(name, name) for name in shown],
        "sections": list(sections),
        "groups": list(dict.fromkeys(case["group"] for case in cases)),
        "cases": cases,
    }
    # A tag inside a text must not end the script that holds it.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    page = (Path(__file__).parent / "gallery.html").read_text(encoding="utf-8").replace("%data%", text)
    (out / "gallery.html").write_text(page, encoding="utf-8")
    return out / "gallery.html"


def _picture(file: Path, out: Path, name: str) -> str | None:
    """Puts a small copy of a picture beside the page; `None` if it cannot be read."""
    try:
        with Image.open(file) as image:
            small = image.convert("RGB")
    except OSError:
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(out / "images" / f"{name}.jpg", quality=90)
    return f"images/{quote(name)}.jpg"
