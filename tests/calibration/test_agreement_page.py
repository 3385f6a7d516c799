"""Tables, figures and the page of the worst disagreements, and the command that makes them."""

import json
import logging
import shutil

import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from hp_edit_trl.calibration import agreement_tables, compare_with_people, worst_disagreements, write_agreement
from hp_edit_trl.cli import main
from hp_edit_trl.ratings import append_answer, read_ratings
from tests.calibration.test_comparison import line, rate
from tests.helpers import photo


NASTY = '<script>document.title = "owned"</script> & "%cards%" %count%'
TASKS = ("add", "bokeh")
EDITORS = ("x", "y|z")


def score_of(i, editor):
    return (i * 2 + EDITORS.index(editor)) % 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A dataset, ratings and scores of 2 tasks, 4 cases each, 2 models; one edit is broken, one was given no score."""
    folder = tmp_path_factory.mktemp("files")
    png = folder / "photo.png"
    photo(64, 48).save(png)
    rows, lines = [], []
    (folder / "ratings").mkdir()
    for i in range(8):
        for editor in EDITORS:
            edit = {"path": None, "bytes": png.read_bytes()}
            if (i, editor) == (0, "x"):
                edit["bytes"] = edit["bytes"][:60]
            source = {"path": None, "bytes": png.read_bytes()}
            rows.append(
                {
                    "id": f"c{i}",
                    "editor": editor,
                    "task": TASKS[i % 2],
                    "prompt": f"{NASTY} {i}",
                    "image": source,
                    "edit": edit,
                    "requirement": "keep <b>it</b>" if i else None,
                }
            )
            score = None if i == 7 and editor == "x" else score_of(i, editor)
            lines.append(line(f"c{i}", score, editor, TASKS[i % 2], answer=f"{NASTY} answer"))
            for name, shift in (("ada", 0), ("ben", 1)):
                given = None if (i, name) == (1, "ben") else min(5, (i + shift + 3) % 6)
                rating = rate(name, f"c{i}", given, editor, comment=NASTY if name == "ben" else "")
                append_answer(folder / "ratings" / f"ratings-{name}.jsonl", rating)
    text = {name: Value("string") for name in ("id", "editor", "task", "prompt", "requirement")}
    images = {name: Image(decode=False) for name in ("image", "edit")}
    Dataset.from_list(rows, features=Features({**text, **images})).save_to_disk(folder / "data")
    (folder / "scores.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


@pytest.fixture(scope="module")
def result(files):
    ratings, _ = read_ratings(files / "ratings")
    lines = [json.loads(text) for text in (files / "scores.jsonl").read_text().splitlines()]
    return compare_with_people(ratings, lines, num_resamples=50)


def cells(text, row):
    (found,) = (one for one in text.splitlines() if one.startswith(f"| {row} "))
    return [cell.strip() for cell in found.strip("|").replace("\\|", "/").split("|")]


def command(files, out, *options):
    main(["measure-agreement", str(files / "ratings"), str(files), "--output_dir", str(out), *options])


def test_the_command_writes_everything(files, result, tmp_path, capsys):
    command(files, tmp_path, "--dataset", str(files / "data"), "--worst", "5", "--confidence", "0.9", "--seed", "4")
    printed = capsys.readouterr().out
    kept = json.loads((tmp_path / "agreement.json").read_text())
    assert (kept["agreement"]["seed"], kept["agreement"]["confidence"]) == (4, 0.9)
    assert kept["agreement"]["overall"]["pearson"]["value"] == result["agreement"]["overall"]["pearson"]["value"]
    assert kept["scorer_prompts"] == {"add": "hp-edit-trl:add:1", "bokeh": "hp-edit-trl:bokeh:1"}
    assert len(kept["edits"]) == 16 and kept["edits"][0]["ratings"][1]["comment"] == NASTY
    page = (tmp_path / "agreement.md").read_text()
    assert agreement_tables(kept) in printed and agreement_tables(kept) in page
    for name in ("human_against_scorer.png", "mean_per_model.png"):
        assert f"({name})" in page
        with PILImage.open(tmp_path / name) as picture:
            assert picture.width > 400 and len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 10
    assert (tmp_path / "worst.html").read_text().count("<article") == 5
    # Without the dataset there are no pictures, and none of an earlier comparison stay.
    command(files, tmp_path)
    assert not (tmp_path / "worst.html").exists() and (tmp_path / "mean_per_model.png").exists()


def test_the_tables_say_what_the_result_says(result):
    text = agreement_tables(result)
    overall, pearson = result["agreement"]["overall"], result["agreement"]["overall"]["pearson"]
    first, second = text.split("\n\n")[:2]
    assert cells(first, "all edits")[1:4] == [
        "15", "1", f"{pearson['value']:.2f} [{pearson['low']:.2f}, {pearson['high']:.2f}]"
    ]  # fmt: skip
    assert cells(first, "mean of the tasks")[3].startswith(f"{result['agreement']['mean_of_groups']['value']:.2f} [")
    assert cells(second, "all edits")[4].startswith(f"{overall['bias']['value']:+.2f} [")
    assert cells(text, "ben")[1:3] == ["14", "2"]
    assert cells(text, "y\\|z")[1] == "8"
    assert (
        "- Judge judge-a, score_mode integer; rubric r1; scorer prompts hp-edit-trl:add:1, hp-edit-trl:bokeh:1."
        in text
    )
    assert "- 1 edit rated, but the scorer gave no score: c7 by x." in text
    rows = [one for one in first.splitlines() if one.startswith("|")]
    assert len({len(row) for row in rows}) == 1


def test_what_is_undefined_is_a_dash_with_its_reason():
    ratings = [rate("ada", f"c{i}", i) for i in range(4)]
    flat = compare_with_people(ratings, [line(f"c{i}", 3) for i in range(4)], num_resamples=20)
    text = agreement_tables(flat)
    assert cells(text.split("\n\n")[0], "add")[3:7] == ["–"] * 4
    assert (
        "- The scorer gave all edits the same score: add, Pearson; add, Spearman; add, Kendall; all edits, Pearson"
        in text
    )
    assert "- There is only one annotator: add, alpha; all edits, alpha." in text
    assert "- The mean of the tasks excludes add." in text


def test_a_result_without_models_tasks_or_correlations_can_be_written(tmp_path):
    (tmp_path / "mean_per_model.png").write_bytes(b"of an earlier comparison")
    ratings = [rate("ada", f"c{i}", 2, None) for i in range(2)]
    scores = [line(f"c{i}", 3, None, None) for i in range(2)]
    write_agreement(compare_with_people(ratings, scores, num_resamples=5), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"agreement.json", "agreement.md", "human_against_scorer.png"}


def test_the_worst_are_the_furthest_apart_and_then_by_id(result):
    worst = worst_disagreements(result, 100)
    assert len(worst) == 15  # not the one without a score
    expected = sorted(
        (-abs(score_of(i, e) - edit["human"]), f"c{i}", e)
        for edit in result["edits"]
        for i, e in [(int(edit["id"][1:]), edit["editor"])]
        if (i, e) != (7, "x")
    )
    assert [(edit["id"], edit["editor"]) for edit in worst] == [key[1:] for key in expected]
    assert worst_disagreements(result, 3) == worst[:3]


def test_the_page_escapes_what_it_shows_and_names_broken_images(files, result, tmp_path):
    dataset = Dataset.load_from_disk(files / "data")
    write_agreement(result, tmp_path, dataset, worst=100)
    page = (tmp_path / "worst.html").read_text()
    assert page.count("<script>") == 1 and page.count("<article") == 15
    assert (
        "&lt;script&gt;document.title = &quot;owned&quot;&lt;/script&gt; &amp; &quot;%cards%&quot; %count% 3" in page
    )
    assert "keep &lt;b&gt;it&lt;/b&gt;" in page and "<b>it" not in page
    assert page.count("<p class=broken>The edit of case &#x27;c0&#x27; cannot be decoded") == 1
    assert len(list((tmp_path / "images").iterdir())) == 15 * 2 - 1
    assert "http" not in page.split("<main>")[0]  # nothing from elsewhere
    with pytest.raises(ValueError, match="worst=0"):
        write_agreement(result, tmp_path, dataset, worst=0)
    with pytest.raises(ValueError, match="The dataset has no edit"):
        write_agreement(result, tmp_path, dataset.select([15]), worst=100)


def test_the_page_works_in_a_browser(files, result, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium")
    write_agreement(result, tmp_path, Dataset.load_from_disk(files / "data"), worst=100)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        failed = []
        page.on("pageerror", lambda error: failed.append(error))
        page.on("requestfailed", lambda request: failed.append(request))
        page.goto((tmp_path / "worst.html").as_uri())
        assert page.title() == "Worst disagreements"  # the script in the texts did not run
        assert page.locator("article:visible").count() == 15 and page.inner_text("#shown") == "15 shown"
        page.select_option("#task", "add")
        shown = page.locator("article:visible")
        assert shown.count() == 8 and page.inner_text("#shown") == "8 shown"
        assert all("add · case" in text for text in shown.locator(".about").all_inner_texts())
        assert "<script>" in shown.first.locator(".prompt").inner_text()
        page.select_option("#task", "")
        for image in page.locator("img").all():
            image.scroll_into_view_if_needed()
        page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth == 64)")
        assert not failed
        browser.close()


def test_bad_files_are_named_in_a_line(files, tmp_path, caplog):
    def message(ratings, scores, *options):
        with pytest.raises(SystemExit) as stopped:
            main(["measure-agreement", str(ratings), str(scores), "--output_dir", str(tmp_path / "out"), *options])
        return str(stopped.value)

    ratings, scores = files / "ratings", files / "scores.jsonl"
    assert message(tmp_path / "none", scores).startswith("hp-edit: No ratings at")
    assert "none.jsonl" in message(ratings, tmp_path / "none.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "there are no ratings" in message(empty, scores)
    assert "the 0 scored ones" in message(ratings, empty)
    assert "confidence=95.0" in message(ratings, scores, "--confidence", "95")
    assert "there are no ratings" in message(ratings, scores, "--rubric", "r9")
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(scores.read_text() + json.dumps(line("c9", 1, judge="judge-b")) + "\n")
    assert "judge-a, judge-b" in message(ratings, mixed)
    assert not (tmp_path / "out").exists()  # nothing half-made

    cut = tmp_path / "cut.jsonl"
    whole = (ratings / "ratings-ada.jsonl").read_text()
    cut.write_text(whole + whole[:50])
    with caplog.at_level(logging.WARNING):
        main(["measure-agreement", str(cut), str(scores), "--output_dir", str(tmp_path / "out")])
    assert "cut.jsonl, line 17: not a complete rating" in caplog.text
    assert json.loads((tmp_path / "out" / "agreement.json").read_text())["agreement"]["overall"]["n"] == 15
