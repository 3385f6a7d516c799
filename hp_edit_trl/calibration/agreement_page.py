"""Files of a comparison with people: tables, figures, and a page of the worst disagreements."""

import hashlib
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..cases import case_images, edit_keys, without_decoding
from ..utils.files import write_json, write_text
from ..utils.images import UnreadableImageError, read_image
from ..utils.tables import format_estimate, markdown_table
from .agreement import CORRELATIONS, STATISTICS


NAMES = {
    "pearson": "Pearson",
    "spearman": "Spearman",
    "kendall": "Kendall",
    "mae": "MAE",
    "exact": "exact",
    "within_one": "within one",
    "bias": "bias",
    "ties_human": "ties, people",
    "ties_scorer": "ties, scorer",
}
REASONS = {
    "no_score": "rated, but the scorer gave no score",
    "not_scored": "rated, but not in the scores",
    "not_rated": "scored, but not rated",
    "skipped": "skipped by all who saw them",
    "unknown": "not in the dataset",
}
MAX_SIDE = 1280  # pixels of an image of the page


def write_agreement(
    result: dict[str, Any], output_dir: str | Path, dataset: Dataset | None = None, worst: int = 30
) -> None:
    """
    Writes `agreement.json` (everything), `agreement.md` (the tables), `human_against_scorer.png` (the paper's figure
    S1), `mean_per_model.png` (its figure 6, if the edits have editors) and, with a dataset, `worst.html` with
    `images/`. Existing files of these names are replaced.

    Args:
        result (`dict`):
            Result of [`compare_with_people`].
        output_dir (`str` or `Path`):
            The folder. It is created if it does not exist.
        dataset ([`~datasets.Dataset`], *optional*):
            The rated edits, for the page of the worst disagreements.
        worst (`int`, *optional*, defaults to `30`):
            Number of disagreements on that page.

    Raises:
        `ValueError`: If `worst` is below 1, or the dataset does not contain an edit of the page.
    """
    if worst < 1:
        raise ValueError(f"worst={worst} must be at least 1.")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("mean_per_model.png", "worst.html"):  # these are not always written
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "agreement.json", result)
    draw_human_against_scorer(result, folder / "human_against_scorer.png")
    figures = ["human_against_scorer"]
    if result["editors"]:
        draw_mean_per_model(result, folder / "mean_per_model.png")
        figures.append("mean_per_model")
    shown = "\n".join(f"![{name.replace('_', ' ')}]({name}.png)\n" for name in figures)
    write_text(folder / "agreement.md", f"# Agreement\n\n{agreement_tables(result)}\n{shown}")
    if dataset is not None:
        write_worst_page(result, folder, dataset, worst)


def agreement_tables(result: dict[str, Any]) -> str:
    """Returns the tables of a comparison ([`compare_with_people`]) in Markdown, followed by what was left out."""
    agreed, alpha = result["agreement"], result["alpha"]
    rows = [(name, values, alpha["groups"][name]) for name, values in agreed["groups"].items()]
    rows.append(("all edits", agreed["overall"], alpha["overall"]))

    correlations = [
        [name, values["n"], values["missing"], *(format_estimate(values[one]) for one in CORRELATIONS)]
        + [format_estimate(between)]
        for name, values, between in rows
    ]
    if agreed["mean_of_groups"] is not None:
        correlations.insert(-1, ["mean of the tasks", "", "", format_estimate(agreed["mean_of_groups"]), "", "", ""])
    distances = [
        [name, *(format_estimate(values[one]) for one in ("mae", "exact", "within_one"))]
        + [format_estimate(values["bias"], signed=True)]
        + [format_estimate(values[one], interval=False) for one in ("ties_human", "ties_scorer")]
        for name, values, _ in rows
    ]
    annotators = [
        [name, one["n"], one["skipped"], format_estimate(one["pearson"]), format_estimate(one["bias"], signed=True)]
        for name, one in result["annotators"].items()
    ]
    editors = [
        [name, values["n"], format_estimate(values["human"]), format_estimate(values["scorer"])]
        for name, values in result["editors"].items()
    ]
    tables = [
        markdown_table(
            ["task", "edits", "no score", "Pearson", "Spearman", "Kendall", "alpha of people"], correlations
        ),
        markdown_table(["task", "MAE", "exact", "within one", "bias", "ties, people", "ties, scorer"], distances),
        markdown_table(["annotator", "edits", "skipped", "Pearson with the others", "bias"], annotators),
    ]
    if editors:
        tables.append(markdown_table(["model", "edits", "mean, people", "mean, scorer"], editors))
    if aspects := result["aspects"]:
        names = sorted({editor for one in aspects.values() for editor in one["editors"]})
        parts = [
            [name, one["n"], format_estimate(one["pearson"]), format_estimate(one["human"])]
            + [format_estimate(one["editors"][editor]) if editor in one["editors"] else "–" for editor in names]
            for name, one in aspects.items()
        ]
        head = ["aspect, by people", "edits", "Pearson with the scorer", "mean", *(f"mean, {name}" for name in names)]
        tables.append(markdown_table(head, parts))
    return "\n".join([*tables, "\n".join(f"- {note}" for note in _notes(result)), ""])


def _made_with(result: dict[str, Any]) -> str:
    return f"Judge {result['judge']}, score_mode {result['score_mode']}; rubric {result['rubric']}"


def _notes(result: dict[str, Any]) -> list[str]:
    agreed = result["agreement"]
    prompts = ", ".join(dict.fromkeys(result["scorer_prompts"].values()))
    notes = [
        f"{_made_with(result)}; scorer prompts {prompts}.",
        f"In brackets: {agreed['confidence']:.0%} bootstrap intervals from {agreed['num_resamples']} resamples of "
        f"cases within their tasks, seed {agreed['seed']}.",
    ]
    for reason, keys in result["left_out"].items():
        if keys:
            named = ", ".join(case if editor is None else f"{case} by {editor}" for case, editor in keys[:5])
            more = ", ..." if len(keys) > 5 else ""
            notes.append(f"{len(keys)} {'edit' if len(keys) == 1 else 'edits'} {REASONS[reason]}: {named}{more}.")
    if agreed["mean_of_groups"] is not None and agreed["mean_of_groups"]["left_out"]:
        notes.append(f"The mean of the tasks excludes {', '.join(agreed['mean_of_groups']['left_out'])}.")
    annotators = result["annotators"].items()
    places = [
        *((f"{name}, {NAMES[one]}", values[one]) for name, values in agreed["groups"].items() for one in STATISTICS),
        *((f"all edits, {NAMES[one]}", agreed["overall"][one]) for one in STATISTICS),
        *((f"{name}, alpha", values) for name, values in result["alpha"]["groups"].items()),
        ("all edits, alpha", result["alpha"]["overall"]),
        *((f"{name}, {NAMES[one]}", values[one]) for name, values in annotators for one in ("pearson", "bias")),
    ]
    reasons: dict[str, list[str]] = {}
    for place, estimate in places:
        if estimate["reason"] is not None:
            reasons.setdefault(estimate["reason"], []).append(place)
        elif estimate["undefined_resamples"]:
            count = f"{estimate['undefined_resamples']} resamples have no value and were left out of the interval"
            reasons.setdefault(count, []).append(place)
    return notes + [f"{reason[0].upper()}{reason[1:]}: {'; '.join(where)}." for reason, where in reasons.items()]


def draw_human_against_scorer(result: dict[str, Any], path: str | Path) -> None:
    """
    Draws how often people and scorer gave each pair of scores, for all edits and each task, as in the paper's figure
    S1.

    Args:
        result (`dict`):
            Result of [`compare_with_people`].
        path (`str` or `Path`):
            The PNG file.
    """
    from matplotlib.figure import Figure

    agreed = result["agreement"]
    groups = agreed["groups"]
    columns = min(4, -(-len(groups) // 2))  # of tasks, to the right of all edits, which take two
    rows = max(2, -(-len(groups) // max(columns, 1)))
    figure = Figure(figsize=(2.45 * (2 + columns), 2.8 * rows + 0.2), dpi=120, layout="constrained")
    grid = figure.add_gridspec(rows, 2 + columns)
    axes = figure.add_subplot(grid[:, :2])
    _heat_map(axes, "all edits", agreed["overall"], fontsize=9)
    axes.set_xlabel("people: mean over the annotators, rounded", fontsize=10)
    axes.set_ylabel("scorer", fontsize=10)
    for place, (name, values) in enumerate(groups.items()):
        _heat_map(figure.add_subplot(grid[place // columns, 2 + place % columns]), name, values, fontsize=6.5)
    figure.savefig(path)


def _heat_map(axes: Any, name: str, values: dict[str, Any], fontsize: float) -> None:
    from matplotlib.patches import Rectangle

    counts = np.array(values["confusion"]).T  # the scorer on the vertical axis
    axes.imshow(counts, origin="lower", cmap="Blues", vmin=0, vmax=max(1, counts.max() * 1.15))
    for score in range(6):  # people and scorer agree
        axes.add_patch(Rectangle((score - 0.5, score - 0.5), 1, 1, fill=False, edgecolor="C1", linewidth=1.2))
    for (scorer, human), count in np.ndenumerate(counts):
        if count:
            color = "white" if count > 0.6 * counts.max() else "black"
            axes.text(human, scorer, count, ha="center", va="center", fontsize=fontsize, color=color)
    axes.set(xticks=range(6), yticks=range(6), xlim=(-0.53, 5.53), ylim=(-0.53, 5.53))
    axes.tick_params(labelsize=fontsize + 0.5, length=2)
    pearson = format_estimate(values["pearson"]) if values["pearson"]["value"] is not None else "undefined"
    line = f"r = {pearson}, {values['n']} edits" if fontsize > 8 else f"r = {pearson}"
    axes.set_title(f"{name}\n{line}", fontsize=fontsize + 1.5)


def draw_mean_per_model(result: dict[str, Any], path: str | Path) -> None:
    """
    Draws the mean scores of each model's edits by people and by the scorer, as in the paper's figure 6.

    Args:
        result (`dict`):
            Result of [`compare_with_people`], for edits with editors.
        path (`str` or `Path`):
            The PNG file.
    """
    from matplotlib.figure import Figure

    editors = sorted(result["editors"].items(), key=lambda item: -(item[1]["human"]["value"] or 0))
    figure = Figure(figsize=(7, 1.4 + 0.6 * len(editors)), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="mean score, 0 to 5", xlim=(0, 5))
    for offset, key, label, color in ((-0.19, "human", "people", "C0"), (0.19, "scorer", "scorer", "C1")):
        for row, (_, values) in enumerate(editors):
            estimate = values[key]
            if estimate["value"] is None:
                continue
            axes.barh(row + offset, estimate["value"], 0.36, color=color, label=label if row == 0 else None)
            end = estimate["value"]
            if estimate["low"] is not None:
                sides = [[estimate["value"] - estimate["low"]], [estimate["high"] - estimate["value"]]]
                axes.errorbar(estimate["value"], row + offset, xerr=sides, color="black", capsize=3, linewidth=1)
                end = estimate["high"]
            style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(f"{estimate['value']:.2f}", (end, row + offset), (4, 0), **style)
    axes.set_yticks(range(len(editors)), [f"{name} ({values['n']} edits)" for name, values in editors])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    figure.savefig(path)


def worst_disagreements(result: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Returns the edits on which people and scorer differ most; ties are ordered by id."""
    both = [edit for edit in result["edits"] if edit["human"] is not None and edit["score"] is not None]
    both.sort(key=lambda edit: (-round(abs(edit["score"] - edit["human"]), 9), edit["id"], edit["editor"] or ""))
    return both[:count]


def write_worst_page(result: dict[str, Any], output_dir: str | Path, dataset: Dataset, count: int = 30) -> None:
    """
    Writes `worst.html`, a page of the worst disagreements that works without a server, and its images into `images/`.

    Args:
        result (`dict`):
            Result of [`compare_with_people`].
        output_dir (`str` or `Path`):
            The folder.
        dataset ([`~datasets.Dataset`]):
            The edits.
        count (`int`, *optional*, defaults to `30`):
            Number of disagreements.

    Raises:
        `ValueError`: If the dataset does not contain one of the edits.
    """
    folder = Path(output_dir)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    dataset = without_decoding(dataset)
    row_of = {key: row for row, key in enumerate(edit_keys(dataset))}
    edits = worst_disagreements(result, count)
    cards = []
    for rank, edit in enumerate(edits, start=1):
        key = edit["id"], edit["editor"]
        if key not in row_of:
            raise ValueError(f"The dataset has no edit {key}: pass the dataset that was compared.")
        cards.append(_card(rank, edit, dataset[row_of[key]], folder))
    tasks = sorted({edit["task"] for edit in edits if edit["task"] is not None})
    options = "".join(f'<option value="{escape(task)}">{escape(task)}</option>' for task in tasks)
    texts = {
        "about": escape(_made_with(result)),
        "count": escape(f"{len(edits)} of {result['agreement']['overall']['n']} edits"),
        "options": options,
        "cards": "\n".join(cards),  # last, so that nothing in the texts of the dataset is replaced
    }
    page = Path(__file__).with_name("worst.html").read_text(encoding="utf-8")
    for name, text in texts.items():
        page = page.replace(f"%{name}%", text)
    write_text(folder / "worst.html", page)


def _card(rank: int, edit: dict[str, Any], row: dict[str, Any], folder: Path) -> str:
    name = hashlib.sha256(repr((edit["id"], edit["editor"])).encode()).hexdigest()[:12]
    pictures = []
    try:
        references = case_images(row, edit["id"])
        for number, image in enumerate(references, start=1):
            label = "reference" if len(references) == 1 else f"reference {number}"
            pictures.append(_picture(image, label, f"{name}-reference-{number}.jpg", folder))
    except UnreadableImageError as error:
        pictures.append(_broken("reference", error))
    try:
        if row["edit"] is None:
            raise UnreadableImageError(f"Case {edit['id']!r} has no edit.")
        image = read_image(row["edit"], f"The edit of case {edit['id']!r}")
        pictures.append(_picture(image, "edit", f"{name}-edit.jpg", folder))
    except UnreadableImageError as error:
        pictures.append(_broken("edit", error))

    ratings = "".join(
        f"<tr><td>{escape(one['annotator'])}</td><td class=score>"
        f"{'skipped' if one['score'] is None else one['score']}</td><td>{escape(one['comment'])}</td></tr>"
        for one in edit["ratings"]
    )
    about = [edit["task"] or "", f"case {edit['id']}", *([] if edit["editor"] is None else [f"by {edit['editor']}"])]
    people, score, requirement = _short(edit["human"]), _short(edit["score"]), row.get("requirement")
    return f"""<article data-task="{escape(edit["task"] or "")}">
<h2>{rank}. people {people}, scorer {score} <small>{edit["score"] - edit["human"]:+.2f}</small></h2>
<p class=about>{escape(" · ".join(part for part in about if part))}</p>
<p class=prompt>{escape(row["prompt"])}</p>
{f"<p class=requirement>{escape(requirement)}</p>" if requirement else ""}
<div class=pictures>{"".join(pictures)}</div>
<div class=words><table><tr><th>annotator</th><th>score</th><th>comment</th></tr>{ratings}</table>
<div class=answer><b>scorer: {score}</b><pre>{escape(edit["answer"] or "")}</pre></div></div>
</article>"""


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _picture(image: Any, label: str, name: str, folder: Path) -> str:
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    image.save(folder / "images" / name, quality=92)
    return (
        f'<figure><a href="images/{name}"><img loading=lazy src="images/{name}" width={image.width} '
        f'height={image.height} alt="{label}"></a><figcaption>{label}</figcaption></figure>'
    )


def _broken(label: str, error: Exception) -> str:
    return f"<figure><p class=broken>{escape(str(error))}</p><figcaption>{label}</figcaption></figure>"
