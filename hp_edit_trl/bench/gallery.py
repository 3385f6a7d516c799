"""A page with every case of a benchmark and all its edits. It is static: it opens from a disk, without a network."""

import json
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from ..utils.files import is_below, write_text
from ..utils.images import UnreadableImageError, read_image
from .results import Run


THUMBNAIL = 512  # longest side of an image on the page


def write_gallery(runs: Sequence[Run], output_dir: str | Path) -> Path:
    """
    Writes `gallery.html` and `images/`: references, edits, prompt, scores and the judge's answers of each case. The
    page filters by group, section and words, sorts by any score of a run or by the difference of two runs, and has a
    table with the mean scores of the cases that are shown.

    Args:
        runs (`Sequence[Run]`):
            Runs on the same cases, see [`write_bench_report`].
        output_dir (`str` or `Path`):
            Folder to write to.

    Returns:
        `Path`: the page.
    """
    output_dir = Path(output_dir)
    (output_dir / "images").mkdir(parents=True, exist_ok=True)
    benchmark, labels = runs[0].benchmark, runs[0].labels
    metrics = [name for name in benchmark["metrics"] if name not in benchmark["products"] | benchmark["ratios"]]
    metrics += ["human"] if any(row["human"] is not None for run in runs for row in run.cases) else []
    sections = {name: wanted for name, wanted in benchmark["sections"].items() if wanted}
    cases = []
    rows_of_cases = zip(*(run.cases for run in runs), strict=True)
    for number, rows in enumerate(tqdm(rows_of_cases, "Gallery", len(runs[0].cases), unit="case")):
        case = rows[0]
        # Any run whose editor was given the case has its references.
        folder, files = next(
            ((run.folder, row["references"]) for run, row in zip(runs, rows, strict=True) if row["references"]),
            ("", []),
        )
        references = [
            _thumbnail(folder, file, output_dir, f"{number}-reference-{place}") for place, file in enumerate(files)
        ]
        edits = []
        for place, (run, row) in enumerate(zip(runs, rows, strict=True)):
            answers = json.loads(row["answers"]) if row["answers"] else {}
            edit = {"values": [row[name] for name in metrics], "reason": row["reason"], "file": None}
            edit["answers"] = [(labels.get(name, name), text) for name, text in answers.items()]
            if row["edit"] is not None:
                edit["file"] = _thumbnail(run.folder, row["edit"], output_dir, f"{number}-{place}")
                if edit["file"] is None:
                    edit["reason"] = f"{row['edit']} cannot be read"
            edits.append(edit)
        shown = {name: case[name] for name in ("id", "prompt", "requirement")} | {"group": case[benchmark["group"]]}
        shown["sections"] = [
            name for name, wanted in sections.items() if all(case[key] == value for key, value in wanted.items())
        ]
        cases.append(shown | {"references": references, "edits": edits})
    data = {
        "title": benchmark["title"],
        "runs": [run.name for run in runs],
        "metrics": [labels[name] for name in metrics],
        "sections": list(sections),
        "groups": list(dict.fromkeys(case["group"] for case in cases)),
        "cases": cases,
    }
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text may end the script that holds it
    page = (Path(__file__).parent / "gallery.html").read_text(encoding="utf-8").replace("%data%", text)
    write_text(output_dir / "gallery.html", page)
    return output_dir / "gallery.html"


def _thumbnail(folder: str | Path, file: str, output_dir: Path, name: str) -> str | None:
    """Writes a small copy of a run's image beside the page; `None` if it cannot be read, or is not the run's own."""
    if not is_below(Path(folder) / file, folder):
        return None
    try:
        small = read_image(str(Path(folder) / file), file)
    except UnreadableImageError:
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(output_dir / "images" / f"{name}.jpg", quality=90)
    return f"images/{name}.jpg"
