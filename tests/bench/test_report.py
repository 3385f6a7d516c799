import csv
import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from hp_edit_trl.bench import compare, read_rewards, read_run, run_benchmark, write_bench_report
from hp_edit_trl.cli import main
from hp_edit_trl.ratings import Rating
from tests.bench.test_dreambench import GradeJudge, data, redder  # noqa: F401
from tests.bench.test_gedit import PairJudge, gedit
from tests.bench.test_run import bench
from tests.calibration.test_page import browser, chromium  # noqa: F401
from tests.fake_hub import fake_hub
from tests.helpers import RuleJudge, make_cases
from tests.processes import Script


NASTY = "Make it </script><b>bold</b> & 变红 <!--"
NAMES = ("base_model", "tuned & better 50%", "第三")


def cases(count: int) -> Dataset:
    rows = make_cases(count, sizes=((32, 32), (48, 32)))
    return rows.map(lambda row, i: {"prompt": f"{NASTY} {i}" if i % 7 == 0 else row["prompt"]}, with_indices=True)


def painter(strength: float):
    """An editor whose edits are as red as a seed and its strength say, and which gives up now and then."""

    def paint(images, prompts, ids, seeds):
        reds = [min(255, int(strength * (seed % 256))) for seed in seeds]
        edits = [Image.new("RGB", image.size, (red, 0, 0)) for image, red in zip(images, reds, strict=True)]
        lost = [strength < 1 and seed % 50 == 0 for seed in seeds]
        return [None if gone else edit for gone, edit in zip(lost, edits, strict=True)]

    return paint


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    judge = RuleJudge(rule=lambda text, pictures: pictures[-1].getpixel((0, 0))[0] // 52)
    return [
        run_benchmark(bench(cases(300), judge), painter(strength), folder / str(place), name=name, batch_size=50)
        for place, (name, strength) in enumerate(zip(NAMES, (0.7, 0.9, 0.5), strict=True))
    ]


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    write_bench_report(runs, out)
    return out


def mean(run, task=None):
    scores = [row["hp_score"] for row in run.cases if task in (None, row["task"]) and row["hp_score"] is not None]
    return sum(scores) / len(scores)


def tables(text):
    """The cells of each table in Markdown."""
    found = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [rows for rows in found if rows]


def test_the_table_is_what_the_cases_say(runs, written):
    text = (written / "table.md").read_text()
    head, _, *rows = tables(text)[0]
    tasks = sorted({row["task"] for row in runs[0].cases})
    for run, cells in zip(runs, rows, strict=True):
        assert cells[0] == run.name
        for task in tasks:
            assert cells[head.index(task)].strip("*") == f"{mean(run, task):.3f}"
        overall = float(np.mean([mean(run, task) for task in tasks]))
        assert cells[head.index("HP-score, overall")].strip("*").startswith(f"{overall:.2f}")
        assert cells[head.index("HP-score, all cases")].strip("*") == f"{mean(run):.3f}"
    assert all(cell.startswith("**") and cell.endswith("**") for cell in rows[1][1:])  # it is the best in everything
    assert not any("*" in cell for cell in [*rows[0], *rows[2]])
    lost = sum(row["edit"] is None for row in runs[0].cases)
    assert lost > 0 and f"base_model lacks: {lost} cases without an edit (reasons: no edit {lost})." in text
    assert "Judge: judge RuleJudge, name rule" in text and "tuned & better 50%: editor paint" in text


def test_differences_are_paired(runs, written):
    with (written / "table.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["of"] == "difference" and row["kind"] == "overall"]
    assert [row["editor"] for row in rows] == list(NAMES[1:])
    expected = next(row for row in compare(runs[0], runs[1]) if row["kind"] == "overall")
    assert float(rows[0]["value"]) == pytest.approx(expected["value"])
    gains = {}
    for a, b in zip(runs[0].cases, runs[1].cases, strict=True):
        if None not in (a["hp_score"], b["hp_score"]):
            gains.setdefault(a["task"], []).append(b["hp_score"] - a["hp_score"])
    assert expected["value"] == pytest.approx(np.mean([np.mean(values) for values in gains.values()]))
    assert expected["low"] > 0 and int(rows[0]["n"]) == sum(map(len, gains.values()))


def test_latex_takes_any_name(written):
    text = (written / "table.tex").read_text()
    assert r"\begin{tabular}{lcccccccccc}" in text and r"base\_model & " in text
    assert r"tuned \& better 50\% & \textbf{" in text and "第三 & " in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in rows} == {10}


def test_any_name_is_written_and_drawn(runs, tmp_path):
    odd = [dataclasses.replace(run, name=name) for run, name in zip(runs, (r"a | $\x$", "_b_\nc", "$"), strict=True)]
    write_bench_report(odd, tmp_path, gallery=False)
    table = (tmp_path / "table.md").read_text()
    assert "| a \\| $\\x$ " in table and "| _b_ c " in table
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows[:4]} == {len(re.split(r"\|", rows[0]))}
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.size[0] > 300


def test_one_run_alone_has_nothing_to_be_better_than(runs, tmp_path):
    text = write_bench_report(runs[:1], tmp_path, gallery=False)
    assert "**" not in text and "Difference" not in text and not (tmp_path / "gallery.html").exists()


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    other = run_benchmark(
        bench(cases(300), RuleJudge("second")), painter(1), tmp_path / "other", name="x", batch_size=50
    )
    with pytest.raises(ValueError, match="cannot be compared: their judge differ"):
        write_bench_report([runs[0], other], tmp_path / "out")
    with pytest.raises(ValueError, match="Several runs have the name 'base_model'"):
        write_bench_report([runs[0], runs[0]], tmp_path / "out")
    with pytest.raises(ValueError, match="No run has the name 'nobody'; the names are base_model"):
        write_bench_report(runs, tmp_path / "out", baseline="nobody")
    (runs[0].folder.parent / "half").mkdir()
    shutil.copy(runs[0].folder / "run.json", runs[0].folder.parent / "half")
    with pytest.raises(SystemExit, match="did not finish: run `hp-edit bench`"):
        main(
            ["report", str(runs[0].folder), str(runs[0].folder.parent / "half"), "--output_dir", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()


def test_a_result_without_an_interval_says_why(tmp_path):
    seven = cases(7).map(lambda row, i: {"task": "add" if i < 2 else row["task"]}, with_indices=True)
    runs = [
        run_benchmark(bench(seven, RuleJudge()), painter(strength), tmp_path / name, name=name)
        for name, strength in (("one", 1), ("two", 2))
    ]
    text = write_bench_report(runs, tmp_path / "out", gallery=False)
    head, _, *rows = tables(text)[0]
    assert len(head) == 1 + 6 + 2 and "[" not in "".join(cell for row in rows for cell in row)
    others = ", ".join(task for task in head[1:7] if task != "add")
    assert f"one: HP-score: no interval, because only one case of each of {others} has a value." in text
    assert f"two: HP-score: no interval, because only one case of each of {others} has a value in both." in text


def test_people_have_a_column(tmp_path):
    ratings = [Rating("a", f"case-{i}", None, i % 6, "1", "2026-01-01T00:00:00+00:00") for i in range(16)]
    judge = RuleJudge(rule=lambda text, pictures: 3)
    run = run_benchmark(bench(cases(16), judge), painter(1), tmp_path / "run", name="one", ratings=ratings)
    by_task = {}
    for row in run.cases:
        by_task.setdefault(row["task"], []).append(row["human"])
    text = write_bench_report([run], tmp_path / "out", gallery=False)
    head, _, cells = tables(text)[0]
    assert head[-1] == "people"
    assert cells[-1].startswith(f"{np.mean([np.mean(values) for values in by_task.values()]):.2f}")


def test_a_gallery_shows_no_file_of_another_folder(tmp_path):
    from hp_edit_trl.bench.gallery import write_gallery

    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "private.png")
    run = run_benchmark(bench(cases(4)), painter(1.0), tmp_path / "run", name="one")
    named = ["../private.png", str(tmp_path / "private.png"), "edits/../../private.png", "/etc/passwd"]
    for row, file in zip(run.cases, named, strict=True):
        row["edit"], row["references"] = file, [file]
    write_gallery([run], tmp_path / "out")
    assert not list((tmp_path / "out" / "images").iterdir())


def test_gedit_has_a_table_for_each_section_and_dreambench_its_product(tmp_path, data):  # noqa: F811
    from hp_edit_trl.bench import DreamBenchPlus, GEditBench

    run = run_benchmark(GEditBench(PairJudge(), gedit()), redder, tmp_path / "gedit", name="one")
    text = write_bench_report([run], tmp_path / "a")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {name}" for name in ("en", "cn", "en, intersection", "cn, intersection")
    ]
    assert all(table[0][-4:] == ["O, overall", "O, all cases", "SC", "PQ"] for table in tables(text))
    run = run_benchmark(
        DreamBenchPlus(GradeJudge(), data, clip=None, dino=None), redder, tmp_path / "dream", name="one"
    )
    text = write_bench_report([run], tmp_path / "b")
    (head, _, cells), *others = tables(text)
    assert not others and head == [
        "editor", "CP, animal", "CP, human", "CP, style", "CP", "PF, photorealistic", "PF, style transfer",
        "PF, imaginative", "PF", "CP·PF", "CP/PF",
    ]  # fmt: skip

    def mean(metric, **only):
        rows = [row for row in run.cases if all(row[name] == value for name, value in only.items())]
        return float(np.mean([row[metric] for row in rows]))

    expected = {f"CP, {category}": mean("cp", category=category) for category in ("animal", "human", "style")}
    expected |= {f"PF, {kind}": mean("pf", kind=kind) for kind in ("photorealistic", "style transfer", "imaginative")}
    assert {name: cells[head.index(name)] for name in expected} == {
        name: f"{value:.3f}" for name, value in expected.items()
    }
    cp, pf = mean("cp"), mean("pf")
    for name, value in {"CP": cp, "PF": pf, "CP·PF": cp * pf, "CP/PF": cp / pf}.items():
        assert re.fullmatch(rf"{value:.3f} \[0\.\d{{3}}, \d\.\d{{3}}\]", cells[head.index(name)])
    assert (tmp_path / "b" / "bars.png").exists() and (tmp_path / "b" / "gallery.html").exists()


def test_the_page_of_gedit_sorts_by_any_score_of_a_section(tmp_path, browser):  # noqa: F811
    from hp_edit_trl.bench import GEditBench

    run = run_benchmark(GEditBench(PairJudge(), gedit()), redder, tmp_path / "gedit", name="one")
    write_bench_report([run], tmp_path / "out")
    page = browser.new_page()
    page.goto((tmp_path / "out" / "gallery.html").as_uri())
    assert page.locator("#metric option").all_text_contents() == ["O", "SC", "PQ"]
    page.select_option("#section", "cn, intersection")
    page.select_option("#metric", label="PQ")
    page.select_option("#sort", "lowest")
    rows = [row for row in run.cases if row["language"] == "cn" and row["intersection"]]
    wanted = [row["id"] for row in sorted(rows, key=lambda row: row["pq"])]
    assert len(wanted) == 3 and wanted != [row["id"] for row in rows]
    assert page.evaluate("[...document.querySelectorAll('article')].map(one => one.dataset.id)") == wanted
    caption = page.locator("article").first.locator("figcaption").nth(1).text_content()
    assert f"PQ {min(row['pq'] for row in rows):g}" in caption

    # The table has the means of the cases that are shown, also of those that a search finds.
    means = [row["pq"] for row in rows]
    last = "[...document.querySelectorAll('#scores tr:last-child > *')].map(one => one.textContent)"
    assert page.evaluate(last) == ["all", "3", f"{round(sum(means) / 3, 3):g}"]
    page.fill("#search", rows[0]["id"].upper())
    assert page.evaluate(last) == ["all", "1", f"{round(rows[0]['pq'], 3):g}"]
    page.fill("#search", "no such words")
    assert page.evaluate(last) == ["all", "0", "–"] and page.locator("article").count() == 0
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) != light
    page.close()


def log_of(folder, rewards):
    history = [{"step": 2 * i, "reward": reward, "loss": 0} for i, reward in enumerate(rewards)] + [
        {"step": 9, "eval_reward": 1}
    ]
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))


def test_chinese_text_is_drawn_with_a_font_that_has_it(monkeypatch, caplog):
    import matplotlib

    from hp_edit_trl.utils import fonts

    fonts.cjk_font.cache_clear()
    monkeypatch.setattr(fonts, "CJK_FONTS", ("No Such Font", "DejaVu Serif"))
    before = matplotlib.rcParams["font.family"]
    with fonts.readable_text("plain", "把车变红"):
        assert matplotlib.rcParams["font.family"][-1] == "DejaVu Serif"
        assert fonts.image_font("把车变红", 15).getname()[0] == "DejaVu Serif"
    with fonts.readable_text("plain", "ünïcödé"):
        assert matplotlib.rcParams["font.family"] == before
    assert matplotlib.rcParams["font.family"] == before
    fonts.cjk_font.cache_clear()
    monkeypatch.setattr(fonts, "CJK_FONTS", ("No Such Font",))
    with fonts.readable_text("한국어", "かな"):
        assert matplotlib.rcParams["font.family"] == before
    assert "install fonts-noto-cjk" in caplog.text
    fonts.cjk_font.cache_clear()


def test_rewards_of_trainings(runs, tmp_path):
    log_of(tmp_path / "grpo" / "checkpoint-2", [0.1])
    log_of(tmp_path / "grpo" / "checkpoint-10", [0.1, 0.2, 0.4])
    log_of(tmp_path / "other", [0.3, 0.2])
    assert read_rewards(tmp_path / "grpo") == ("grpo", [(0, 0.1), (2, 0.2), (4, 0.4)])
    assert read_rewards(tmp_path / "grpo" / "checkpoint-2")[0] == "grpo"
    write_bench_report(runs[:1], tmp_path / "out", [tmp_path / "grpo", tmp_path / "other"], gallery=False)
    assert (tmp_path / "out" / "curves.csv").read_text().splitlines()[3:5] == ["grpo,4,0.4", "other,0,0.3"]
    assert Image.open(tmp_path / "out" / "curves.png").size[0] > 500
    write_bench_report(runs[:1], tmp_path / "out", gallery=False)  # a report without logs leaves no old curves
    assert not (tmp_path / "out" / "curves.png").exists()
    for broken, message in (
        ("{}", "is not a log of a trainer"),
        ('{"log_history": []}', "with rewards: name the output"),
    ):
        (tmp_path / "other" / "trainer_state.json").write_text(broken)
        with pytest.raises(ValueError, match=message):
            read_rewards(tmp_path / "other")
    with pytest.raises(ValueError, match="has no trainer_state.json with rewards"):
        read_rewards(tmp_path / "nowhere")


def test_the_page_in_a_browser(runs, written, browser):  # noqa: F811
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url))
    page.on("request", lambda request: None if request.url.startswith("file:") else problems.append(request.url))
    page.goto((written / "gallery.html").as_uri())
    assert page.text_content("#shown") == "300 cases" and page.locator("article").count() == 60
    assert page.locator("article").first.locator("img").count() == 4
    assert page.locator("article").first.locator(".prompt").text_content() == f"{NASTY} 0"
    assert page.locator("article b", has_text="bold").count() == 0

    def more():
        # A browser of a busy machine may answer before it has drawn.
        before = page.locator("article").count()
        page.click("#more")
        page.wait_for_function("before => document.querySelectorAll('article').length > before", arg=before)

    more()
    assert page.locator("article").count() == 120

    def shown():
        while page.locator("#more").is_visible():
            more()
        return page.evaluate("[...document.querySelectorAll('article')].map(one => one.dataset.id)")

    def expected(key, sign, task=None):
        keyed = [
            (key(rows), place, rows[0]["id"])
            for place, rows in enumerate(zip(*(run.cases for run in runs), strict=True))
            if task in (None, rows[0]["task"])
        ]
        known = sorted((one for one in keyed if one[0] is not None), key=lambda one: (sign * one[0], one[1]))
        return [one[2] for one in [*known, *(one for one in keyed if one[0] is None)]]

    page.select_option("#run", label=NAMES[0])
    page.select_option("#sort", "lowest")
    assert shown() == expected(lambda rows: rows[0]["hp_score"], 1)
    page.select_option("#group", "bokeh")
    page.select_option("#sort", "highest")
    assert shown() == expected(lambda rows: rows[0]["hp_score"], -1, "bokeh")
    assert page.text_content("#shown") == f"{len(expected(lambda rows: 0, 1, 'bokeh'))} cases"
    page.select_option("#group", "")
    page.select_option("#run", label=NAMES[1])

    def gain(rows):
        scores = rows[1]["hp_score"], rows[0]["hp_score"]
        return None if None in scores else scores[0] - scores[1]

    page.select_option("#sort", "better")
    page.select_option("#other", label=NAMES[0])
    assert shown() == expected(gain, -1)
    page.select_option("#sort", "worse")
    assert shown() == expected(gain, 1)
    lost = page.locator("article").last  # a case without an edit comes last, and says why
    assert lost.locator(".missing").first.text_content() == "no edit"
    first = page.locator("article").first
    first.scroll_into_view_if_needed()
    assert "HP-score" in first.locator("figcaption").nth(1).text_content()
    first.locator("summary").first.click()
    assert first.locator("pre").first.text_content().startswith("HP-score: ")
    assert page.evaluate("document.querySelector('article img').complete") and not problems

    # One picture fills the window; the others of its case take its place, and those of the case after.
    page.select_option("#sort", "order")
    files = page.evaluate(
        "[...document.querySelectorAll('article')].map(a => [...a.querySelectorAll('.pictures a')].map(b => b.href))"
    )
    large, text = page.locator("#look img"), page.locator("#look span")
    page.locator("article").first.locator(".pictures img").nth(1).click()
    assert large.is_visible() and large.get_attribute("src") == files[0][1]
    assert text.text_content().startswith(NAMES[0]) and text.text_content().endswith(f"{NASTY} 0")
    page.keyboard.press("ArrowRight")
    assert large.get_attribute("src") == files[0][2]
    page.click("#last")
    page.click("#last")
    page.click("#last")
    assert large.get_attribute("src") == files[0][-1]
    page.keyboard.press("ArrowDown")
    assert large.get_attribute("src") in files[1]
    small = large.bounding_box()["width"]
    large.click()
    page.wait_for_function(
        "small => document.querySelector('#look img').getBoundingClientRect().width > 2 * small", arg=small
    )
    if os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{os.environ['SCREENSHOTS']}/gallery_look.png")
    page.keyboard.press("Escape")
    assert not large.is_visible()
    if os.environ.get("SCREENSHOTS"):
        page.select_option("#sort", "order")
        page.wait_for_timeout(500)
        page.screenshot(path=f"{os.environ['SCREENSHOTS']}/gallery.png")
    page.close()


CARD = """
import sys
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from hp_edit_trl.bench import push_results, run_benchmark
from tests.bench.test_run import Painter, bench
from tests.helpers import make_cases
HfApi().create_repo("someone/lora")
ModelCard("---\\nlicense: mit\\ntags: [lora]\\n---\\n# My LoRA\\n").push_to_hub("someone/lora")
make_cases(16).push_to_hub("someone/RealPref-Bench", split="test")
run = run_benchmark(bench("someone/RealPref-Bench"), Painter(), sys.argv[1])
value = next(row["value"] for row in run.results["summary"] if row["kind"] == "overall")
for _ in range(2):  # the second time replaces the first
    print(push_results(run, "someone/lora"))
card = ModelCard.load("someone/lora")
(result,) = card.data.eval_results
assert abs(result.metric_value - value) < 1e-4 and result.metric_type == "hp_score", result
assert result.dataset_type == "someone/RealPref-Bench" and result.dataset_split == "test"
assert len(result.dataset_revision) == 40 and result.dataset_name == "RealPref-Bench"
assert card.data.license == "mit" and card.data.tags == ["lora"] and "# My LoRA" in card.text
text, load = card.content, ModelCard.load
def unreachable(*args, **kwargs):
    raise LocalEntryNotFoundError("no network")
ModelCard.load = unreachable
try:  # a card that cannot be read is not replaced by an empty one
    push_results(run, "someone/lora")
except LocalEntryNotFoundError:
    ModelCard.load = load
    assert ModelCard.load("someone/lora").content == text
else:
    raise AssertionError
HfApi().create_repo("someone/bare")
push_results(run, "someone/bare")
assert len(ModelCard.load("someone/bare").data.eval_results) == 1
try:
    push_results(run_benchmark(bench(), Painter(), sys.argv[1] + "-local"), "someone/lora")
except ValueError as error:
    assert "not a dataset on the Hub" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.slow
def test_results_in_a_model_card(tmp_path):
    with fake_hub() as hub:
        done = Script("-c", CARD, tmp_path / "run", cwd=tmp_path, environment=hub.env).wait()
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_command(runs, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.jpg").write_text("somebody's")
    main(["report", *(str(run.folder) for run in runs[:2]), "--output_dir", str(tmp_path), "--baseline", NAMES[1]])
    assert (tmp_path / "images" / "mine.jpg").exists()
    assert f"Difference from {NAMES[1]}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="name one run"):
        main(
            [
                "report",
                *(str(run.folder) for run in runs),
                "--output_dir",
                str(tmp_path),
                "--push-to-hub",
                "someone/lora",
            ]
        )
    assert read_run(runs[0].folder).name == NAMES[0]
