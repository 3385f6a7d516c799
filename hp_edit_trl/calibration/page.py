"""
The page for annotators: a Gradio app that shows edits beside their reference images and asks for a score, or cases
alone and asks whether they belong into a benchmark.
"""

import hmac
import html
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL.Image import Image
from tqdm import tqdm

from ..cases import EditKey, case_images, check_cases, check_edits, edit_keys, without_decoding
from ..ratings import SCORES, answers_file
from ..utils.images import UnreadableImageError, read_image
from ..utils.secrets import remember_secrets
from .display import data_url
from .guard import Guard, is_loopback
from .rubric import Rubric, load_guidelines, load_rubric
from .session import (
    RatingSession,
    ReviewSession,
    Session,
    StaleError,
    annotator_name,
    assign_cases,
    check_guidelines,
    check_rubric,
)


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
try:
    import gradio as gr
    from starlette.middleware import Middleware
except ImportError as error:
    raise ImportError('The page for annotators needs Gradio: pip install "hp-edit-trl[annotate]"') from error

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
MOVING = (
    "**s** skips, **←** or **Backspace** goes back, **→** goes forward, **Esc** leaves a field. Click an image to "
    "enlarge it."
)


def _shown_text(value: Any) -> str:
    """Escapes text for HTML and for Gradio's templates, in which braces, dollars and backticks have a meaning."""
    text = html.escape(str(value))
    return text.replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")


class _Campaign:
    """The edits, annotators and files of a rating page. Sessions are created when they are first needed."""

    kind = "ratings"
    title = "Rate edits"
    about = "edits"
    done = "rated"
    keys = f"Keys: **0** to **5** rate, {MOVING}"

    def __init__(
        self,
        dataset: Dataset,
        output_dir: str | Path,
        rubric: Rubric,
        annotators: Sequence[str] | None,
        overlap: int | None,
        seed: int,
        aspects: Sequence[str] = (),
    ):
        self.aspects = tuple(aspects)
        if len(set(self.aspects)) < len(self.aspects) or not all(name.strip() for name in self.aspects):
            raise ValueError(f"aspects={list(aspects)} must be different names.")
        self.bad = self._check(dataset)
        self.dataset = without_decoding(dataset)
        self.output_dir = Path(output_dir)
        self.rubric = rubric
        self.seed = seed
        try:
            self.annotators = None if annotators is None else [annotator_name(name) for name in annotators]
        except ValueError as error:
            raise ValueError(f"annotators={list(annotators or ())} has an invalid name: {error}") from error
        if self.annotators is not None and len(set(self.annotators)) < max(1, len(self.annotators)):
            raise ValueError(f"annotators={self.annotators} must be different names.")
        keys = self._keys()
        self.rows = {key: row for row, key in enumerate(keys)}
        self.given: dict[str, list[EditKey]] | None = None
        if overlap is not None:
            if self.annotators is None:
                raise ValueError(f"overlap={overlap} assigns the cases to annotators: name them with annotators=.")
            # Before broken images are left out, so that a repaired file does not change the assignment.
            self.given = assign_cases(keys, self.annotators, overlap, seed)

        self.output_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(self.output_dir, os.W_OK):
            raise ValueError(f"The folder {self.output_dir} cannot be written to: choose another output_dir.")
        for file in sorted(self.output_dir.glob(f"{self.kind}-*.jsonl")):
            self._check_file(file)
        self._leave_out_unreadable()
        self.sessions: dict[str, Session] = {}
        self.lock = threading.Lock()

    def _check(self, dataset: Dataset) -> dict[int, str]:
        return check_edits(dataset, "dataset", on_bad_case="skip")

    def _keys(self) -> list[EditKey]:
        return edit_keys(self.dataset)

    def _check_file(self, file: Path) -> None:
        check_rubric(file, self.rubric.revision, self.dataset)

    def _open(self, name: str, keys: list[EditKey]) -> Session:
        file = answers_file(self.output_dir, name, self.kind)
        return RatingSession(name, keys, file, self.rubric.revision, self.seed, self.aspects)

    def _leave_out_unreadable(self) -> None:
        for key, row in tqdm(list(self.rows.items()), desc="Reading images", disable=None):
            if row in self.bad:
                del self.rows[key]
                continue
            try:
                self._images(row)
            except UnreadableImageError as error:
                logger.warning("Not shown: %s", error)
                del self.rows[key]
        broken = len(self.dataset) - len(self.rows)
        if not self.rows:
            raise ValueError(f"None of the {broken} {self.about} can be shown, because they are bad cases.")
        if broken:
            count = len(self.dataset)
            logger.warning("%d of %d %s are not shown, because they are bad cases.", broken, count, self.about)

    def _images(self, row: int) -> list[tuple[str, Image]]:
        """The images of a row with their names. The rubric calls the reference images "source"."""
        values = self.dataset[row]
        of = "" if values.get("editor") is None else f" by {values['editor']!r}"
        edit = read_image(values["edit"], f"The edit of case {values['id']!r}{of}")
        return [*_references(values), ("Edit", edit)]

    def session(self, name: str) -> Session:
        name = annotator_name(name)
        if self.annotators is not None and name not in self.annotators:
            raise ValueError(f"{name} is not one of the annotators of this page.")
        with self.lock:
            if name not in self.sessions:
                given = self.rows if self.given is None else [key for key in self.given[name] if key in self.rows]
                self.sessions[name] = self._open(name, list(given))
            return self.sessions[name]

    def texts(self, session: Any, key: EditKey) -> tuple[str, str]:
        """Instruction and requirement, where they can be corrected."""
        return "", ""

    def shown_aspects(self, session: Any, key: EditKey) -> list[int | None]:
        """The scores of an edit's aspects."""
        given = session.answers[key].aspects if self.aspects and key in session.answers else {}
        return [given.get(name) for name in self.aspects]

    def shown_answer(self, session: Any, key: EditKey) -> str:
        """What the answer to an edit is called in the names of the buttons."""
        answer = session.answers.get(key)
        return "" if answer is None else "skipped" if answer.score is None else str(answer.score)

    def summary(self, counts: Counter) -> list[tuple[str, int]]:
        """What is counted when all is done."""
        return [(f"{score} {label}", counts[score]) for score, label in enumerate(self.rubric.labels)]

    def show(self, session: Session, key: EditKey) -> str:
        """
        Returns an edit as HTML with its images. The name of its editor is not in it.

        Raises:
            [`UnreadableImageError`]: If an image has become unreadable since the start.
        """
        row = self.dataset[self.rows[key]]
        figures = [
            f'<figure class="{"hp-result" if name == "Edit" else ""}"><figcaption>{name}</figcaption>'
            f'<img src="{data_url(image)}" alt="{name}"></figure>'
            for name, image in self._images(self.rows[key])
        ]
        references = [figure for figure in figures if "hp-result" not in figure[:30]]
        annotator, counts = _shown_text(session.annotator), session.counts()
        skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
        done = 100 * (counts["answered"] + counts["skipped"]) / len(session.queue)
        task = f'<span class="hp-task">{_shown_text(row["task"])}</span>' if row.get("task") else ""
        requirement = row.get("requirement")
        required = f"<br><small>Required: {_shown_text(requirement)}</small>" if requirement else ""
        several = " several" if len(references) > 1 else ""
        scored = " scored" if self.aspects else ""
        alone = " alone" if len(references) == len(figures) else ""
        return (
            f'<div class="hp-edit{scored}" data-token="{session.token(key)}" data-annotator="{annotator}" '
            f'data-answer="{self.shown_answer(session, key)}">'
            f'<div class="hp-head"><span><b>{counts["answered"]} of {len(session.queue)}</b> {self.done}{skipped}'
            f'</span><span class="hp-bar"><i style="width: {done:.1f}%"></i></span><span>{annotator}</span></div>'
            f'<div class="hp-asked">{task}{_shown_text(row["prompt"])}{required}</div>'
            f'<div class="hp-images{alone}"><div class="hp-references{several}">{"".join(references)}</div>'
            f"{''.join(figures[len(references) :])}</div></div>"
        )

    def thanks(self, session: Session) -> str:
        annotator, counts = _shown_text(session.annotator), session.counts()
        lines = [f"<tr><td>{_shown_text(name)}</td><td>{count}</td></tr>" for name, count in self.summary(counts)]
        return (
            f'<div class="hp-done" data-token="done" data-annotator="{annotator}"><h1>Thank you, {annotator}!</h1>'
            f"<p><b>{counts['answered']} of {len(session.queue)}</b> {self.done}, {counts['skipped']} skipped. "
            f"Everything is saved; you can close this page.</p><table>{''.join(lines)}</table></div>"
        )


class _Review(_Campaign):
    """The cases, annotators and files of a page on which cases are reviewed."""

    kind = "reviews"
    title = "Verify cases"
    about = "cases"
    done = "reviewed"
    keys = (
        "Keys: **a** accepts, **c** goes to the instruction, which **Enter** saves as corrected, the digits reject "
        f"for a reason, **r** rejects for another one, which **Enter** in the comment saves, {MOVING}"
    )

    def _check(self, dataset: Dataset) -> dict[int, str]:
        bad = check_cases(dataset, "dataset", on_bad_case="skip")
        if "id" not in dataset.features:
            raise ValueError(
                "dataset has no column 'id', by which reviews find their case; its columns are "
                f"{list(dataset.features)}."
            )
        return bad

    def _keys(self) -> list[EditKey]:
        return [(str(case_id), None) for case_id in self.dataset["id"][:]]

    def _check_file(self, file: Path) -> None:
        check_guidelines(file, self.rubric.revision)

    def _open(self, name: str, keys: list[EditKey]) -> Session:
        prompts = self.dataset["prompt"][:]
        required = self.dataset["requirement"][:] if self.has_requirements else [None] * len(prompts)
        texts = {key[0]: (prompts[self.rows[key]], required[self.rows[key]]) for key in keys}
        file = answers_file(self.output_dir, name, self.kind)
        return ReviewSession(name, texts, file, self.rubric.revision, self.rubric.labels, self.seed)

    @property
    def has_requirements(self) -> bool:
        return "requirement" in self.dataset.column_names

    def _images(self, row: int) -> list[tuple[str, Image]]:
        return _references(self.dataset[row])

    def texts(self, session: Any, key: EditKey) -> tuple[str, str]:
        return session.texts(key)

    def shown_answer(self, session: Any, key: EditKey) -> str:
        answer = session.answers.get(key)
        if answer is None or answer.verdict is None:
            return "" if answer is None else "skipped"
        if answer.verdict != "reject":
            return answer.verdict[0]
        return str(1 + self.rubric.labels.index(answer.reason)) if answer.reason in self.rubric.labels else "r"

    def summary(self, counts: Counter) -> list[tuple[str, int]]:
        return [(name, counts[verdict]) for name, verdict in VERDICTS.items()]


VERDICTS = {"accepted": "accept", "corrected": "correct", "rejected": "reject"}


def _references(row: dict[str, Any]) -> list[tuple[str, Image]]:
    images = case_images(row, row["id"])
    names = ["Source"] if len(images) == 1 else [f"Source {i}" for i in range(1, len(images) + 1)]
    return list(zip(names, images, strict=True))


def build_app(
    dataset: Dataset,
    output_dir: str | Path | None = None,
    *,
    verify: bool = False,
    rubric: Rubric | None = None,
    annotators: Sequence[str] | None = None,
    overlap: int | None = None,
    seed: int = 0,
    aspects: Sequence[str] = (),
) -> gr.Blocks:
    """
    Builds the page for annotators. [`annotate`] also serves it, with access control.

    Args:
        dataset ([`~datasets.Dataset`]):
            The edits: `id`, `image` or `images`, `edit`, `prompt`, and optionally `editor`, `task` and `requirement`.
            With `verify`, cases, which need no `edit`. Rows with an image that cannot be decoded are left out and
            reported.
        output_dir (`str` or `Path`, *optional*):
            Folder of the answers, one file per annotator. Defaults to `"ratings"`, with `verify` to `"reviews"`.
        verify (`bool`, *optional*, defaults to `False`):
            Show cases without an edit, to be accepted, corrected or rejected.
        rubric ([`Rubric`], *optional*):
            The meaning of the scores; with `verify`, the guidelines, see [`load_guidelines`]. Defaults to those of
            this package.
        annotators (`Sequence[str]`, *optional*):
            Names of the annotators. By default, anyone who enters a name can take part.
        overlap (`int`, *optional*):
            Number of annotators who get each case. By default, all of them get all cases.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the assignment of cases and of the order of edits.
        aspects (`Sequence[str]`, *optional*):
            Aspects that are scored from 0 to 5 beside the edit as a whole, e.g. `"image quality"`.

    Returns:
        `gradio.Blocks`: the page.

    Raises:
        `ValueError`: If `dataset` is not a dataset of edits or cases, none of them can be shown, the folder holds
            answers made with another rubric, or the options contradict each other.
    """
    rubric = rubric or (load_guidelines() if verify else load_rubric())
    output_dir = output_dir or ("reviews" if verify else "ratings")
    if verify and aspects:
        raise ValueError(f"aspects={list(aspects)} are for ratings: cases that are verified have no edit to score.")
    campaign = (_Review if verify else _Campaign)(dataset, output_dir, rubric, annotators, overlap, seed, aspects)

    with gr.Blocks(title=campaign.title, analytics_enabled=False, fill_width=True) as app:
        who = gr.Textbox(visible=False)
        token = gr.Textbox(visible=False)
        with gr.Column(elem_id="start") as start:
            gr.Markdown(f"# {campaign.title}")
            message = gr.HTML(visible=False)
            if campaign.annotators is None:
                name: Any = gr.Textbox(label="Your name", max_lines=1, autofocus=True, elem_id="name")
            else:
                name = gr.Radio(campaign.annotators, label="Who are you?", elem_id="name")
            enter = gr.Button("Start", variant="primary", elem_id="enter")
            gr.Markdown(rubric.text)
        with gr.Row(visible=False) as page:
            with gr.Column(scale=5, min_width=320):
                shown = gr.HTML(elem_id="shown")
                field: dict[str, Any] = {"show_label": False, "container": False, "lines": 1, "max_lines": 4}
                with gr.Row(elem_id="texts", visible=False) as texts:
                    prompt = gr.Textbox(placeholder="Instruction", scale=3, elem_id="prompt", **field)
                    may_require = isinstance(campaign, _Review) and campaign.has_requirements
                    requirement = gr.Textbox(
                        placeholder="Required (optional)", scale=2, elem_id="requirement", visible=may_require, **field
                    )
                    correct = _answer_button("c", "Save correction", scale=0)
                with gr.Row(elem_id="aspects", visible=bool(aspects)) as parts:
                    radios = [gr.Radio(list(SCORES), label=name, elem_classes=["aspect"]) for name in aspects]
                with gr.Row(elem_id="answers", elem_classes=[] if verify or aspects else ["stay"]) as answers:
                    buttons = _answer_buttons(campaign)
                with gr.Row(elem_id="bottom"):
                    back = gr.Button("← Back", elem_id="back", scale=0)
                    comment = gr.Textbox(placeholder="Comment (optional)", scale=1, elem_id="comment", **field)
                    again = gr.Button(f"Show skipped {campaign.about}", elem_id="again", scale=0, visible=False)
                    skip = gr.Button("Skip", elem_id="skip", elem_classes=["answer"], scale=0)
                    forward = gr.Button("Forward →", elem_id="forward", scale=0)
            with gr.Column(scale=1, min_width=280, elem_id="rubric"):
                gr.Markdown(rubric.text)
                gr.Markdown(campaign.keys)
        outputs = [start, page, message, who, token, comment, prompt, requirement, shown]
        outputs += [texts, answers, skip, forward, again, parts, *radios]

        def view(session: Session, key: EditKey | None) -> list:
            if key is None:
                token, note, written, content = "", "", ("", ""), campaign.thanks(session)
                scored: list[int | None] = [None] * len(radios)
            else:
                try:
                    token, note, written = session.token(key), session.comment(key), campaign.texts(session, key)
                    content, scored = campaign.show(session, key), campaign.shown_aspects(session, key)
                except UnreadableImageError as error:
                    logger.warning("No longer shown: %s", error)
                    session.drop(key)
                    return view(session, session.next())
            return [
                gr.update(visible=False),
                gr.update(visible=True),
                gr.update(visible=False),
                session.annotator,
                token,
                gr.update(value=note, visible=key is not None),
                *written,
                content,
                gr.update(visible=verify and key is not None),
                gr.update(visible=key is not None),
                gr.update(visible=key is not None),
                gr.update(visible=key in session.answers),
                gr.update(visible=key is None and session.next_skipped() is not None),
                gr.update(visible=bool(radios) and key is not None),
                *[gr.update(value=score) for score in scored],
            ]

        def log_in(entered: str | None, request: gr.Request) -> list:
            try:
                session = campaign.session(request.username or entered or "")
                return view(session, session.next())
            except ValueError as error:
                note = f'<div class="hp-error">{_shown_text(error)}</div>'
                message = gr.update(value=note, visible=True)
                rest = [gr.skip()] * (len(outputs) - 5)
                return [gr.update(visible=True), gr.update(visible=False), message, "", "", *rest]

        def load(request: gr.Request) -> list:
            named = request.username or request.query_params.get("annotator")
            return log_in(named, request) if named else [gr.skip()] * len(outputs)

        def step(action: Callable[..., EditKey | None]) -> Callable[..., list]:
            def run(request: gr.Request, annotator: str, token: str, comment: str, *fields: Any) -> list:
                written = [text or "" for text in fields[:2]]
                try:
                    session = campaign.session(request.username or annotator)
                    return view(session, action(session, token, comment or "", written, fields[2:]))
                except StaleError as error:
                    gr.Info(f"{error} Go back to see or change it.")
                    return view(session, session.next())
                except OSError as error:
                    message = f"This was not saved, please try again: {error.strerror}."
                    raise gr.Error(message, print_exception=False) from error
                except ValueError as error:
                    raise gr.Error(str(error), print_exception=False) from error

            return run

        def answer(value: Any, reason: str = "") -> Callable[..., EditKey | None]:
            def run(session: Any, token: str, note: str, written: list[str], scores: Sequence) -> EditKey | None:
                if verify:
                    return session.review(token, value, note, reason, *written)
                return session.rate(token, value, note, dict(zip(campaign.aspects, scores, strict=True)))

            return run

        def go(direction: str) -> Callable[..., EditKey | None]:
            def run(session: Any, token: str, note: str, written: list[str], scores: Sequence) -> EditKey | None:
                if verify and token:
                    session.keep_texts(token, *written)
                return getattr(session, direction)(token or None, note)

            return run

        # A click carries all its inputs; the server keeps no state per tab.
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": 8}
        inputs = [who, token, comment, prompt, requirement, *radios]
        app.load(load, None, outputs, **hidden)
        enter.click(log_in, [name], outputs, **hidden)
        if campaign.annotators is None:
            name.submit(log_in, [name], outputs, **hidden)
        for button, *meaning in [*buttons, (correct, "correct"), (skip, None)]:
            button.click(step(answer(*meaning)), inputs, outputs, **hidden)
        back.click(step(go("back")), inputs, outputs, **hidden)
        forward.click(step(go("forward")), inputs, outputs, **hidden)
        again.click(step(lambda session, *_: session.next_skipped()), inputs, outputs, **hidden)
    return app


def _answer_button(key: str, label: str, **options: Any) -> gr.Button:
    """A button that the page's script presses for a key."""
    return gr.Button(label, elem_id=f"answer-{key}", elem_classes=["answer", "labelled"], **options)


def _answer_buttons(campaign: _Campaign) -> list[tuple]:
    """The buttons of a page, each with what [`RatingSession.rate`] or [`ReviewSession.review`] is told by it."""
    labels = campaign.rubric.labels
    if not isinstance(campaign, _Review):
        return [(_answer_button(str(score), f"{score}\n{label}"), score) for score, label in enumerate(labels)]
    buttons: list[tuple] = [(_answer_button("a", "a\naccept"), "accept")]
    for number, reason in enumerate(labels, start=1):
        buttons.append((_answer_button(str(number), f"{number}\n{reason}"), "reject", reason))
    return [*buttons, (_answer_button("r", "r\nother reason"), "reject", "other")]


def annotate(
    dataset: Dataset,
    output_dir: str | Path | None = None,
    *,
    verify: bool = False,
    rubric: Rubric | None = None,
    annotators: Sequence[str] | None = None,
    overlap: int | None = None,
    seed: int = 0,
    aspects: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 7860,
    password: str | None = None,
) -> None:
    """
    Serves the page for annotators until it is stopped.

    By default, it can only be reached from this machine. It sends no data to other services, and serves no files; the
    images of the dataset are embedded in the page.

    Args:
        dataset, output_dir, verify, rubric, annotators, overlap, seed, aspects:
            See [`build_app`].
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on, e.g. `"0.0.0.0"` for the whole network, which requires a password.
        port (`int`, *optional*, defaults to `7860`):
            Port to listen on.
        password (`str`, *optional*):
            Password of the page, which annotators enter together with their name.

    Raises:
        `ValueError`: As in [`build_app`], or if others could reach the page without a password, or the port is taken.
    """
    remember_secrets({"password": password})
    if not password and not is_loopback(host):
        raise ValueError(
            f"host={host!r} can be reached from other machines: set a password (HP_EDIT_PASSWORD or --password), or "
            "use the host 127.0.0.1."
        )
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # it would copy answers to the browser's storage
    options: dict[str, Any] = {"rubric": rubric, "annotators": annotators, "overlap": overlap, "seed": seed}
    options["aspects"] = aspects
    output_dir = output_dir or ("reviews" if verify else "ratings")
    app = build_app(dataset, output_dir, verify=verify, **options)
    allowed = None if annotators is None else {annotator_name(name) for name in annotators}

    def log_in(name: str, given: str) -> bool:
        try:
            known = allowed is None or annotator_name(name) in allowed
        except ValueError:
            known = False
        return hmac.compare_digest(given.encode(), (password or "").encode()) and known

    fonts = ["system-ui", "sans-serif"]
    try:
        _, url, _ = app.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            auth=log_in if password else None,
            auth_message="Your annotator name and the password of this page. After five failed attempts, wait."
            if password
            else None,
            footer_links=[],
            allowed_paths=[],
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            app_kwargs={"middleware": [Middleware(Guard, local_only=not password)]},
            theme=gr.themes.Default(font=fonts, font_mono=["monospace"]),
            css=(FOLDER / "page.css").read_text(encoding="utf-8"),
            head=f"<script>{(FOLDER / 'page.js').read_text(encoding='utf-8')}</script>",
        )
    except OSError as error:
        raise ValueError(
            f"The page cannot be served at {host}, port {port}: {error}. Choose another --port."
        ) from error
    kind = "reviews" if verify else "ratings"
    print(f"{app.title} at {url} ({kind} are saved in {output_dir}; stop with Ctrl-C)", flush=True)
    app.block_thread()
