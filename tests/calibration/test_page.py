"""
The rating page in a real browser: two people rate, tabs are reloaded, the server is killed; and what it does not
serve.
"""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from PIL import ImageEnhance, ImageFilter
from PIL.PngImagePlugin import PngInfo

from hp_edit_trl import cli
from hp_edit_trl.calibration import load_guidelines, load_rubric, page
from hp_edit_trl.calibration.display import MAX_SIDE, shown_jpeg
from hp_edit_trl.cases import edit_keys, load_edits, load_split
from hp_edit_trl.miniature.photographs import load_photographs
from hp_edit_trl.ratings import append_answer, ratings_file, read_ratings
from hp_edit_trl.reviews import read_reviews
from hp_edit_trl.utils.images import read_image
from tests.calibration.helpers import make_edits, make_rating, with_broken, with_references
from tests.helpers import photo


ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "docs" / "assets"
EDITORS = {
    "secret-editor-vivid": lambda image: ImageEnhance.Color(image).enhance(2.2),
    "secret-editor-soft": lambda image: image.filter(ImageFilter.GaussianBlur(3)),
}
NASTY = 'Make it <b>bold</b> ${1+1} {{1+1}} `x` & "warm"'


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = None if Path(own).exists() else shutil.which("chromium") or shutil.which("google-chrome")
        if found is None and not Path(own).exists():
            pytest.skip("no Chromium: `playwright install chromium`, or install the system's")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browser(chromium):
    yield chromium
    for context in chromium.contexts:  # their tabs would look for servers that are gone
        context.close()


@contextmanager
def serving(folder, *options, env=None):
    """The command in a process of its own, in a folder with a file that is nobody's business."""
    (folder / "private.txt").write_text("nobody's business")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    # Not forked: a tab that is open must see another server after a restart.
    command = [sys.executable, "-m", "hp_edit_trl.cli", "annotate", "edits", "--port", str(port), *options]
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("HP_EDIT", "GRADIO"))}
    log = (folder / "server.log").open("a")

    def start():
        server = subprocess.Popen(
            command, cwd=folder, env={**outside, "PYTHONPATH": str(ROOT), **(env or {})}, stdout=subprocess.PIPE,
            stderr=log, text=True,
        )  # fmt: skip
        assert " at http" in server.stdout.readline(), (folder / "server.log").read_text()
        return server

    servers = [start()]
    try:
        yield f"http://127.0.0.1:{port}", servers, start
    finally:
        servers[-1].kill()
        servers[-1].wait()
        log.close()


class Tab:
    """A tab of an annotator, and everything that came over the network for it."""

    def __init__(self, browser, url, width=1360, height=850):
        self.page = browser.new_context(viewport={"width": width, "height": height}).new_page()
        self.page.set_default_timeout(30_000)
        self.urls, self.bodies = [], []
        self.page.route("**/*", self.record)
        self.page.goto(url)

    def record(self, route):
        self.urls.append(route.request.url)
        try:
            answer = route.fetch()
        except Exception:  # the server was killed
            return route.abort()
        self.bodies.append(answer.body())
        route.fulfill(response=answer)

    def enter(self, name):
        self.page.locator("#name textarea, #name input").first.fill(name)
        self.page.click("#enter")
        self.settle()

    def token(self):
        return self.page.locator("#shown [data-token]").get_attribute("data-token")

    def settle(self):
        """Waits until an edit is there, and has been there for long enough to be answered."""
        self.page.wait_for_selector("#shown [data-token]")
        self.page.wait_for_timeout(450)

    def seen(self):
        """The picture that is shown as the edit."""
        url = self.page.locator("#shown .hp-images > figure img").get_attribute("src")
        assert url.startswith("data:image/jpeg;base64,")
        return base64.b64decode(url.partition(",")[2])

    def do(self, action, *args):
        """Does something that shows another edit."""
        before = self.token()
        action(*args)
        self.wait_for_another(before)
        self.settle()

    def wait_for_another(self, token, **options):
        changed = "token => document.querySelector('#shown [data-token]')?.dataset.token !== token"
        self.page.wait_for_function(changed, arg=token, **options)

    def key(self, key):
        self.do(self.page.keyboard.press, key)

    def key_until_answered(self, key):
        """Presses a key again if nothing happens, as a person does while the tab finds the server again."""
        from playwright.sync_api import TimeoutError

        before = self.token()
        for _ in range(4):
            self.page.keyboard.press(key)
            try:
                self.wait_for_another(before, timeout=8_000)
                return self.settle()
            except TimeoutError:
                pass
        raise AssertionError(f"the key {key!r} was never answered")

    def click(self, selector):
        self.do(self.page.click, selector)

    def progress(self):
        return self.page.locator(".hp-head").inner_text()


def make_photo_edits():
    """Six edits of photographs by two editors, whose names also stand in their files; one more cannot be decoded."""
    rows = []
    for case in load_photographs().select([3, 8, 10]):
        for editor, edit in EDITORS.items():
            rows.append({name: case[name] for name in ("id", "prompt", "task", "image")} | {"editor": editor})
            rows[-1] |= {"edit": edit(case["image"]), "requirement": "Keep everything else"}
    rows[0]["prompt"] = NASTY
    rows.append({**rows[-1], "id": "broken"})
    return with_broken(Dataset.from_list(rows), "edit", len(rows) - 1)


def save_with_names(dataset, folder):
    """Saves a dataset whose PNG files say which editor made them, as many programs write them."""
    encoded = dataset.cast_column("edit", Image(decode=False))
    values = []
    for value, editor in zip(encoded["edit"], encoded["editor"], strict=True):
        try:
            image, info = read_image(value, ""), PngInfo()
            info.add_text("parameters", f"model: {editor}")
            image.save(folder / "x.png", pnginfo=info)
            value = {"path": f"{editor}.png", "bytes": (folder / "x.png").read_bytes()}
        except ValueError:
            pass
        values.append(value)
    features = encoded.features
    named = Dataset.from_dict({**encoded.to_dict(), "edit": values}, features=Features(features))
    named.cast_column("edit", Image()).save_to_disk(folder / "edits")
    assert any(b"secret-editor" in path.read_bytes() for path in (folder / "edits").glob("*.arrow"))


def shot(tab, folder, name):
    """A screenshot; for the documentation if it is asked for."""
    tab.page.mouse.move(5, 5)
    tab.page.wait_for_timeout(200)
    tab.page.screenshot(path=folder / f"annotate-{name}.png")
    if os.environ.get("UPDATE_SCREENSHOTS"):
        with PILImage.open(folder / f"annotate-{name}.png") as image:
            image.resize((image.width * 3 // 4, image.height * 3 // 4), PILImage.Resampling.LANCZOS).save(
                ASSETS / f"annotate-{name}.png", optimize=True
            )


@pytest.mark.slow
def test_two_people_rate(browser, tmp_path):
    save_with_names(make_photo_edits(), tmp_path)
    edits = load_edits(str(tmp_path / "edits")).select(range(6))
    # Which edit a picture is, worked out from the dataset alone
    keys = {shown_jpeg(read_image(row["edit"], "")): key for row, key in zip(edits, edit_keys(edits), strict=True)}
    assert len(keys) == 6
    given = {"anna": {}, "bert": {}}
    orders = {"anna": [], "bert": []}
    written = {"anna": 0, "bert": 0}

    def note(tab, name, score):
        orders[name].append(keys[tab.seen()])
        given[name][keys[tab.seen()]] = score
        written[name] += 1

    with serving(tmp_path) as (url, servers, start):
        log = (tmp_path / "server.log").read_text()
        assert "The edit of case 'broken'" in log and "1 of 7 edits are not shown" in log

        anna, bert = Tab(browser, url), Tab(browser, url)
        anna.page.wait_for_selector("#enter")
        shot(anna, tmp_path, "start")
        anna.enter("anna")
        bert.enter(" bert")
        assert "0 of 6 rated" in anna.progress()

        # By key. Pressed again before the next edit is there, or as soon as it is there, it does not rate that one
        note(anna, "anna", 4)
        first = anna.token()
        anna.page.keyboard.press("4")
        anna.page.keyboard.press("4")
        anna.wait_for_another(first)
        anna.page.keyboard.press("5")
        anna.page.wait_for_timeout(500)
        assert "1 of 6 rated" in anna.progress()
        # A comment with digits in it rates nothing; then the mouse, clicked twice
        anna.page.click("#comment textarea")
        anna.page.keyboard.type("3 cats, 5 dogs s")
        anna.page.wait_for_timeout(300)
        note(anna, "anna", 1)
        anna.do(anna.page.dblclick, "#answer-1")
        assert "2 of 6 rated" in anna.progress()
        skipped = keys[anna.seen()]
        note(anna, "anna", None)
        anna.key("s")
        assert "1 skipped" in anna.progress()

        # Back, twice, to what was commented, which is changed; then on where she was
        fourth = keys[anna.seen()]
        anna.key("ArrowLeft")
        assert keys[anna.seen()] == skipped
        anna.key("Backspace")
        assert keys[anna.seen()] == orders["anna"][1]
        assert anna.page.locator("#comment textarea").input_value() == "3 cats, 5 dogs s"
        assert anna.page.locator("#shown [data-token]").get_attribute("data-answer") == "1"
        outlines = [
            anna.page.locator(f"#answer-{i}").evaluate("b => getComputedStyle(b).outlineStyle") for i in range(6)
        ]
        assert outlines == ["none", "solid", "none", "none", "none", "none"]
        given["anna"][keys[anna.seen()]] = 5
        written["anna"] += 1
        anna.key("5")
        assert keys[anna.seen()] == fourth and anna.page.locator("#comment textarea").input_value() == ""

        # Reloaded, she is where she was
        anna.page.reload()
        anna.settle()
        assert keys[anna.seen()] == fourth and "2 of 6 rated, 1 skipped" in anna.progress()

        # Enlarged; the arrows change between the pictures, a key still rates
        anna.page.click("#shown .hp-images > figure img")
        anna.page.wait_for_selector("#hp-zoom.open")
        assert "Edit" in anna.page.locator("#hp-zoom p").inner_text()
        shot(anna, tmp_path, "zoom")
        anna.page.keyboard.press("ArrowLeft")
        assert "Source" in anna.page.locator("#hp-zoom p").inner_text()
        note(anna, "anna", 0)
        anna.key("0")
        assert not anna.page.locator("#hp-zoom.open").count()

        # Bert, with the mouse; what is asked for is shown as it was written
        for score in (0, 3):
            if keys[bert.seen()] == edit_keys(edits)[0]:
                assert NASTY in bert.page.locator(".hp-asked").inner_text()
            note(bert, "bert", score)
            bert.click(f"#answer-{score}")
        bert.page.locator("#comment textarea").fill("The shadow is missing")
        shot(bert, tmp_path, "rating")
        # The server is killed in the middle of everything, and a line is cut off
        servers[-1].send_signal(signal.SIGKILL)
        servers[-1].wait()
        file = ratings_file(tmp_path / "ratings", "anna")
        with file.open("ab") as lines:
            lines.write(b'{"annotator": "anna", "id": "cof')
        before = anna.token()
        anna.page.keyboard.press("2")  # into the void
        anna.page.wait_for_timeout(500)
        assert anna.token() == before
        servers.append(start())
        assert "not a complete rating" in (tmp_path / "server.log").read_text()
        bert.page.reload()
        bert.settle()
        note(anna, "anna", 2)
        anna.key_until_answered("2")  # in the tab that was open all the time
        assert "4 of 6 rated, 1 skipped" in anna.progress()

        # A second tab of Anna's, which shows the same edit and is too late
        second = Tab(browser, f"{url}/?annotator=anna")
        second.settle()
        assert keys[second.seen()] == keys[anna.seen()]
        note(anna, "anna", 3)
        anna.key("3")
        assert "Thank you, anna!" in anna.page.locator(".hp-done").inner_text()
        second.key("0")
        assert "already answered" in second.page.locator("body").inner_text()
        assert "Thank you, anna!" in second.page.locator(".hp-done").inner_text()
        # What she skipped, again
        second.click("#again")
        assert keys[second.seen()] == skipped
        given["anna"][skipped] = 4
        written["anna"] += 1
        second.key("4")
        assert "6 of 6 rated, 0 skipped" in second.page.locator(".hp-done").inner_text()

        while not bert.page.locator(".hp-done").count():
            if keys[bert.seen()] == edit_keys(edits)[0]:
                assert NASTY in bert.page.locator(".hp-asked").inner_text()
            note(bert, "bert", 5)
            bert.click("#answer-5")
        shot(bert, tmp_path, "finished")
        bert.key("ArrowLeft")
        assert keys[bert.seen()] == orders["bert"][-1]

        # The editors' names are nowhere in what the browser got, nor is another host
        for tab in (anna, bert, second):
            encoded = re.findall(rb"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", b"".join(tab.bodies))
            assert len(encoded) >= 2 and any(b"Keep everything else" in body for body in tab.bodies)
            everything = [*tab.bodies, *map(base64.b64decode, encoded), tab.page.content().encode()]
            everything += [address.encode() for address in tab.urls]
            for word in (b"secret-editor", b"nobody's business", str(tmp_path).encode()):
                assert not any(word in part for part in everything), word
            elsewhere = [address for address in tab.urls if not address.startswith((url, "data:", "blob:"))]
            assert elsewhere == []
        assert not (tmp_path / ".gradio").exists()

    ratings, problems = read_ratings(tmp_path / "ratings", edits)
    found = {name: {(r.id, r.editor): r.score for r in ratings if r.annotator == name} for name in given}
    assert found == given
    assert len(problems) == 1 and "not a complete rating" in problems[0]
    comments = {(r.annotator, r.comment) for r in ratings if r.comment}
    assert ("anna", "3 cats, 5 dogs s") in comments and len(comments) == 1
    for name, count in written.items():
        lines = ratings_file(tmp_path / "ratings", name).read_text().splitlines()
        assert len(lines) == count + (name == "anna")
    assert set(orders["anna"]) == set(orders["bert"]) == set(keys.values())
    assert orders["anna"] != orders["bert"]


@pytest.mark.slow
def test_two_people_verify_cases(browser, tmp_path):
    columns = ["id", "image", "prompt", "task", "requirement", "editor"]
    make_photo_edits().select([0, 2, 4]).select_columns(columns).save_to_disk(tmp_path / "edits")
    prompts = dict(zip(*(load_split(str(tmp_path / "edits"))[name] for name in ("id", "prompt")), strict=True))
    with serving(tmp_path, "--verify", env={"HP_EDIT_PASSWORD": "open sesame"}) as (url, _, _):
        assert httpx.get(f"{url}/config").status_code == 401
        anna = Tab(browser, url)
        anna.page.locator("input").nth(0).fill("anna")
        anna.page.locator("input[type=password]").fill("open sesame")
        anna.page.get_by_role("button").last.click()
        anna.settle()
        assert "0 of 3 reviewed" in anna.progress()
        assert anna.page.locator("#shown img").count() == 1  # the source, and no edit
        shot(anna, tmp_path, "verify")
        keys = anna.page.locator("#rubric").get_by_text("Keys:").bounding_box()
        assert keys["x"] + keys["width"] <= 1360 and keys["y"] + keys["height"] <= 850

        def asked(tab):
            return next(
                name for name, prompt in prompts.items() if prompt in tab.page.locator(".hp-asked").inner_text()
            )

        queue = [asked(anna)]
        first = anna.page.locator("#prompt textarea")
        assert first.input_value() == prompts[queue[0]]
        # A change that was not saved is not accepted away, and a blank one is not saved.
        anna.page.keyboard.press("c")
        first.fill("Make it a little warmer 1 a r s")
        anna.page.keyboard.press("Escape")
        before = anna.token()
        anna.page.keyboard.press("a")
        anna.page.wait_for_selector("text=save the correction")
        assert anna.token() == before and not list((tmp_path / "reviews").glob("*.jsonl"))
        anna.page.keyboard.press("c")
        anna.key("Enter")
        # Rejected by a digit; then in another tab of hers, while this one shows it
        queue.append(asked(anna))
        context = anna.page.context
        anna.key("3")
        queue.append(asked(anna))
        other = context.new_page()
        other.goto(f"{url}/?annotator=anna")
        other.wait_for_selector("#shown [data-token]")
        other.wait_for_timeout(450)
        other.keyboard.press("r")  # which asks for a reason first
        other.keyboard.type("It is 5 pictures")
        other.keyboard.press("Enter")
        other.wait_for_selector(".hp-done")
        anna.key("a")
        assert "3 reviewed, 0 skipped" in anna.page.locator(".hp-done").inner_text().replace("of 3 ", "")
        # Back, to what was said
        anna.key("ArrowLeft")
        assert anna.page.locator("#comment textarea").input_value() == "It is 5 pictures"
        assert anna.page.locator("#shown [data-token]").get_attribute("data-answer") == "r"
        anna.key("ArrowLeft")
        anna.key("Backspace")
        assert first.input_value() == "Make it a little warmer 1 a r s"
        with httpx.Client(base_url=url) as client:
            client.post("/login", data={"username": "ben", "password": "open sesame"})
            assert client.get("/gradio_api/info").status_code == 404
        ben = Tab(browser, url, 390, 844)
        ben.page.locator("input").nth(0).fill("ben")
        ben.page.locator("input[type=password]").fill("open sesame")
        ben.page.get_by_role("button").last.click()
        ben.settle()
        check_phone(ben, tmp_path, "verify-phone")
        ben.do(ben.page.click, "#answer-a")
        assert "1 of 3 reviewed" in ben.progress()
    reviews, problems = read_reviews(tmp_path / "reviews")
    assert problems == [] and [(r.annotator, r.verdict) for r in reviews if r.annotator == "ben"] == [
        ("ben", "accept")
    ]
    reasons = load_guidelines().labels
    assert [(r.id, r.verdict, r.reason, r.comment) for r in reviews if r.annotator == "anna"] == [
        (queue[0], "correct", "", ""), (queue[1], "reject", reasons[2], ""),
        (queue[2], "reject", "other", "It is 5 pictures"),
    ]  # fmt: skip
    assert reviews[0].corrected_prompt == "Make it a little warmer 1 a r s" and reviews[0].prompt == prompts[queue[0]]
    assert reviews[0].corrected_requirement == "Keep everything else"


def check_phone(tab, folder, name):
    """Everything that is needed is there on a phone: nothing is cut off at the side, and pictures can be seen."""
    page = tab.page
    shot(tab, folder, name)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shown = "#answers button, #bottom button, #texts button, .aspect label, textarea"
    measure = "e => [e.id, e.getBoundingClientRect(), e.scrollWidth - e.clientWidth, !!e.offsetParent]"
    boxes = [box for box in page.evaluate(f"[...document.querySelectorAll('{shown}')].map({measure})") if box[3]]
    assert len(boxes) >= 8
    for element, box, hidden, _ in boxes:
        assert hidden <= 0, (element, hidden)
        assert box["left"] >= 0 and box["right"] <= 390 and box["height"] >= 30 and box["width"] >= 40, (
            element,
            box,
            hidden,
        )
    heights = page.evaluate("[...document.querySelectorAll('#shown .hp-images img')].map(i => i.clientHeight)")
    assert min(heights) >= 230, heights


CLOSED_FOR_FILES = (
    "/gradio_api/file=", "/gradio_api/file/", "/file=", "/static/", "/assets/", "/svelte/", "/static/../",
    "/assets/%2e%2e/", "/gradio_api/queue/../file=", "/",
)  # fmt: skip
CLOSED = (
    "upload", "info", "proxy=http://127.0.0.1:9/", "openapi.json", "runs", "call/load", "run/load", "component_server",
    "dev/reload", "stream/a/b/1/playlist-file", "vibe-edit/",
)  # fmt: skip


@pytest.mark.slow
def test_a_password_and_what_is_not_served(browser, tmp_path):
    make_edits(2).save_to_disk(tmp_path / "edits")
    (tmp_path / "ratings").mkdir()
    append_answer(ratings_file(tmp_path / "ratings", "anna"), make_rating(rubric="hp-edit-trl:rubric:2"))
    options = ("--annotators", "anna,bert", "--overlap", "1", "--host", "0.0.0.0")
    with serving(tmp_path, *options, env={"HP_EDIT_PASSWORD": "open sesame"}) as (url, _, _):
        with httpx.Client(base_url=url) as client:
            assert client.get("/config").status_code == 401
            assert client.post("/gradio_api/queue/join", json={"fn_index": 0, "data": []}).status_code == 401
            for name, password in (("anna", "wrong"), ("anna", ""), ("eve", "open sesame"), ("", "open sesame")):
                assert client.post("/login", data={"username": name, "password": password}).status_code >= 400
            assert client.get("/config").status_code == 401
            assert "case-" not in client.get("/").text
            assert client.post("/login", data={"username": "anna", "password": "open sesame"}).status_code == 200
            config = client.get("/config").json()
            assert not config["analytics_enabled"] and not config.get("run_history") and not config["footer_links"]
            files = [tmp_path / "private.txt", tmp_path / "ratings" / "ratings-anna.jsonl", Path("/etc/passwd")]
            files += [*(tmp_path / "edits").iterdir(), Path(page.__file__)]
            for file in files:
                relative = os.path.relpath(file, tmp_path)
                for path in (str(file), relative, f"../{tmp_path.name}/{relative}", f"./{relative}"):
                    for form in (path, path.replace("..", "%2e%2e").replace("/", "%2f")):
                        for route in (
                            "/gradio_api/file=",
                            "/gradio_api/file/",
                            "/file=",
                            "/static/",
                            "/assets/",
                            "/svelte/",
                            "/static/../",
                            "/assets/%2e%2e/",
                            "/gradio_api/queue/../file=",
                            "/",
                        ):
                            request = httpx.Request("GET", f"{url}{route}{form}", cookies=client.cookies)
                            # As it stands: a client would make ".." and "//" of it what they mean.
                            request.url = request.url.copy_with(raw_path=f"{route}{form}".encode())
                            answer = client.send(request)
                            assert answer.status_code in (403, 404), (route, form, answer.status_code)
                            assert file.read_bytes()[:40] not in answer.content
            for route in CLOSED:
                for method in ("GET", "POST"):
                    assert client.request(method, f"/gradio_api/{route}").status_code == 404, route
            for route in ("docs", "redoc", "openapi.json", "monitoring", "gradio_api/deep_link", "pwa_icon"):
                assert client.get(f"/{route}").status_code == 404

        # In the browser: the name that one logs in with is the annotator's.
        tab = Tab(browser, url)
        assert not tab.page.locator("#shown").count()
        tab.page.locator("input").nth(0).fill("bert")
        tab.page.locator("input[type=password]").fill("open sesame")
        tab.page.get_by_role("button").last.click()
        tab.settle()
        assert "bert" in tab.progress() and "0 of 2 rated" in tab.progress()  # one of two cases, with two edits
        tab.page.goto(f"{url}/?annotator=anna")  # nobody else's
        tab.settle()
        tab.key("3")
    lines = [json.loads(line) for line in (tmp_path / "ratings" / "ratings-bert.jsonl").read_text().splitlines()]
    assert [(line["annotator"], line["score"]) for line in lines] == [("bert", 3)]


@pytest.mark.slow
def test_the_host_and_the_allowed_names(browser, tmp_path):
    make_photo_edits().select([2, 4]).save_to_disk(tmp_path / "edits")
    with serving(tmp_path, "--annotators", "anna,bert", "--aspects", "adherence,image quality") as (url, _, _):
        # A page of another site, whose name was pointed to this machine
        answer = httpx.get(url, headers={"Host": "evil.example.org"})
        assert answer.status_code == 403
        assert "default-src 'self'" in httpx.get(url).headers["content-security-policy"]
        # On a phone, and with two aspects, which the digits score before they rate the edit
        tab = Tab(browser, f"{url}/?annotator=eve", 390, 844)
        tab.page.wait_for_selector(".hp-error")
        assert "eve is not one of the annotators" in tab.page.locator(".hp-error").inner_text()
        tab.page.get_by_label("bert", exact=True).check()
        tab.page.click("#enter")
        tab.settle()
        assert "bert" in tab.progress() and tab.page.url.endswith("?annotator=bert")
        # The ratings cannot be written: nothing is shown as saved, and the next attempt works.
        (tmp_path / "ratings" / "ratings-bert.jsonl").mkdir()
        before = tab.token()
        check_phone(tab, tmp_path, "rating-phone")
        tab.page.click("#answer-3")
        tab.page.wait_for_selector("text=Please score adherence and image quality first")
        tab.page.keyboard.press("4")
        tab.page.locator(".aspect").nth(1).locator("label").nth(2).click()
        tab.page.keyboard.press("3")
        tab.page.wait_for_selector("text=not saved")
        assert tab.token() == before
        (tmp_path / "ratings" / "ratings-bert.jsonl").rmdir()
        tab.key("3")
        assert not tab.page.locator(".aspect input:checked").count()  # those of the next edit
        tab.key("ArrowLeft")
        chosen = tab.page.locator(".aspect input:checked")
        assert [chosen.nth(i).get_attribute("value") for i in range(chosen.count())] == ["4", "2"]
    (rating,) = read_ratings(tmp_path / "ratings")[0]
    assert (rating.score, rating.aspects) == (3, {"adherence": 4, "image quality": 2})


def test_others_need_a_password(tmp_path, monkeypatch):
    make_edits(2).save_to_disk(tmp_path / "edits")
    monkeypatch.delenv("HP_EDIT_PASSWORD", raising=False)
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org", ""):
        with pytest.raises(SystemExit, match=r"hp-edit: host=.* can be reached from other machines: set a password"):
            cli.main(["annotate", str(tmp_path / "edits"), "--output_dir", str(tmp_path / "r"), "--host", host])
    assert not (tmp_path / "r").exists()
    assert all(page.is_loopback(host) for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]"))


def test_a_port_that_is_taken(tmp_path):
    make_edits(2).save_to_disk(tmp_path / "edits")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"port {port}.*another --port"):
            cli.main(["annotate", str(tmp_path / "edits"), "--output_dir", str(tmp_path / "r"), "--port", str(port)])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--overlap", "2"], "overlap=2 assigns the cases to annotators"),
        (["--overlap", "3", "--annotators", "a,b"], "overlap=3 with 2 annotators"),
        (["--annotators", "a, a"], "must be different names"),
        (["--annotators", "a,,b"], "has an invalid name"),
        (["--rubric", "nowhere.md"], "nowhere.md"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, reason):
    make_edits(2).save_to_disk(tmp_path / "edits")
    with pytest.raises(SystemExit, match=f"hp-edit: .*{reason}"):
        cli.main(["annotate", str(tmp_path / "edits"), "--output_dir", str(tmp_path / "r"), *options])


def campaign(dataset, folder, **options):
    options = {"rubric": load_rubric(), "annotators": None, "overlap": None, "seed": 0, **options}
    return page._Campaign(dataset, folder, **options)


def test_broken_images_are_reported_and_the_rest_is_shown(tmp_path, caplog):
    edits = with_broken(with_broken(make_edits(3), "edit", 1), "image", 4)
    found = campaign(edits, tmp_path)
    assert "The edit of case 'case-0' by 'model-two' cannot be decoded" in caplog.text
    assert "An image of case 'case-2' cannot be decoded" in caplog.text and "2 of 6 edits are not shown" in caplog.text
    assert set(found.session("anna").queue) == {edit_keys(edits)[i] for i in (0, 2, 3, 5)}
    with pytest.raises(ValueError, match="None of the 1 edits can be shown"):
        campaign(edits.select([1]), tmp_path)


def test_a_review_finds_its_case_by_its_id_and_shows_no_edit(tmp_path):
    options = {"rubric": load_guidelines(), "annotators": ["anna", "bert"], "overlap": 1, "seed": 0}
    cases = make_edits(4, editors=("one",)).remove_columns("edit")
    found = page._Review(cases, tmp_path, **options)
    session = found.session("anna")
    assert len(session.queue) == 2 and "Edit" not in found.show(session, session.queue[0])
    with pytest.raises(ValueError, match="no column 'id', by which reviews find their case"):
        page._Review(cases.remove_columns("id"), tmp_path, **options)
    with pytest.raises(ValueError, match="'case-0'"):  # two rows, which a review could not tell apart
        page._Review(make_edits(2), tmp_path, **options)


def test_another_rubric_is_refused_at_the_start(tmp_path):
    append_answer(tmp_path / "ratings-anna.jsonl", make_rating(rubric="ours.md:1"))
    with pytest.raises(
        ValueError, match="ratings-anna.jsonl were made with the rubric ours.md:1, but this is hp-edit-trl:rubric:2"
    ):
        campaign(make_edits(), tmp_path)


def test_ratings_of_another_dataset_are_reported(tmp_path, caplog):
    append_answer(tmp_path / "ratings-anna.jsonl", make_rating(id="case-9", rubric="hp-edit-trl:rubric:2"))
    found = campaign(make_edits(), tmp_path)
    assert "no edit of case 'case-9'" in caplog.text
    assert found.session("anna").counts()["answered"] == 0


def test_work_is_dealt_out(tmp_path):
    found = campaign(make_edits(6), tmp_path, annotators=["anna", "bert", "carl"], overlap=2)
    queues = [set(found.session(name).queue) for name in ("anna", "bert", "carl")]
    assert [len(queue) for queue in queues] == [8, 8, 8] and len(set.union(*queues)) == 12
    with pytest.raises(ValueError, match="eve is not one"):
        found.session("eve")
    assert found.session(" anna ") is found.session("anna")


def test_all_references_are_shown_and_large_pictures_scaled_down(tmp_path):
    edits = with_references(make_edits(1), 1, 3)
    found = campaign(edits, tmp_path)
    session = found.session("anna")
    shown = found.show(session, ("case-0", "model-two"))
    assert re.findall(r"<figcaption>(.*?)</figcaption>", shown) == ["Source 1", "Source 2", "Source 3", "Edit"]
    assert len(set(map(str, re.findall(r'src="(.*?)"', shown)))) == 4 and "model-two" not in shown
    large = photo(3000, 1500)
    small = read_image({"bytes": shown_jpeg(large), "path": None}, "")
    assert small.size == (MAX_SIDE, MAX_SIDE // 2) and large.size == (3000, 1500)
    error = np.abs(np.asarray(small, float) - np.asarray(large.resize(small.size), float)).mean()
    assert error < 2


def test_without_gradio_the_extra_is_named(tmp_path, monkeypatch):
    make_edits(2).save_to_disk(tmp_path / "edits")
    monkeypatch.delitem(sys.modules, page.__name__)
    monkeypatch.delattr(page.__name__)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as end:
        cli.main(["annotate", str(tmp_path / "edits")])
    assert end.value.code == 'hp-edit: The page for annotators needs Gradio: pip install "hp-edit-trl[annotate]"'
