"""The rating page: a Gradio app that shows edits beside their reference images and asks for a score."""

import hmac
import html
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm import tqdm

from ..cases import EditKey, case_images, check_edits, edit_keys, without_decoding
from ..ratings import ratings_file
from ..utils.images import UnreadableImageError, read_image
from ..utils.secrets import remember_secrets
from .display import data_url
from .guard import Guard, is_loopback
from .rubric import Rubric, load_rubric
from .session import RatingSession, StaleError, annotator_name, assign_cases, check_rubric


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
try:
    import gradio as gr
    from starlette.middleware import Middleware
except ImportError as error:
    raise ImportError('The rating page needs Gradio: pip install "hp-edit-trl[annotate]"') from error

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
KEYS = (
    "Keys: **0** to **5** rate, **s** skips, **←** or **Backspace** goes back, **→** goes forward, **Esc** leaves the "
    "comment. Click an image to enlarge it."
)


def _shown_text(value: Any) -> str:
    """Escapes text for HTML and for Gradio's templates, in which braces, dollars and backticks have a meaning."""
    text = html.escape(str(value))
    return text.replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")


class _Campaign:
    """The edits, annotators and files of a rating page. Sessions are created when they are first needed."""

    def __init__(
        self,
        dataset: Dataset,
        output_dir: str | Path,
        rubric: Rubric,
        annotators: Sequence[str] | None,
        overlap: int | None,
        seed: int,
    ):
        self.bad = check_edits(dataset, "dataset", on_bad_case="skip")
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
        keys = edit_keys(self.dataset)
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
        for file in sorted(self.output_dir.glob("ratings-*.jsonl")):
            check_rubric(file, rubric.revision, self.dataset)
        self._leave_out_unreadable()
        self.sessions: dict[str, RatingSession] = {}
        self.lock = threading.Lock()

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
            raise ValueError(f"None of the {broken} edits can be shown, because they are bad cases.")
        if broken:
            count = len(self.dataset)
            logger.warning("%d of %d edits are not shown, because they are bad cases.", broken, count)

    def _images(self, row: int) -> list:
        values = self.dataset[row]
        of = "" if values.get("editor") is None else f" by {values['editor']!r}"
        edit = read_image(values["edit"], f"The edit of case {values['id']!r}{of}")
        return [*case_images(values, values["id"]), edit]

    def session(self, name: str) -> RatingSession:
        name = annotator_name(name)
        if self.annotators is not None and name not in self.annotators:
            raise ValueError(f"{name} is not one of the annotators of this page.")
        with self.lock:
            if name not in self.sessions:
                keys = self.rows if self.given is None else [key for key in self.given[name] if key in self.rows]
                file = ratings_file(self.output_dir, name)
                self.sessions[name] = RatingSession(name, keys, file, self.rubric.revision, self.seed)
            return self.sessions[name]

    def show(self, session: RatingSession, key: EditKey) -> str:
        """
        Returns an edit as HTML with its images. The name of its editor is not in it.

        Raises:
            [`UnreadableImageError`]: If an image has become unreadable since the start.
        """
        row = self.dataset[self.rows[key]]
        *references, edit = [data_url(image) for image in self._images(self.rows[key])]
        # The rubric calls the reference images "source".
        names = ["Source"] if len(references) == 1 else [f"Source {i}" for i in range(1, len(references) + 1)]
        figures = [
            f'<figure><figcaption>{name}</figcaption><img src="{url}" alt="{name}"></figure>'
            for url, name in zip([*references, edit], [*names, "Edit"], strict=True)
        ]
        annotator, counts, answer = _shown_text(session.annotator), session.counts(), session.answers.get(key)
        score = "" if answer is None else "skipped" if answer.score is None else answer.score
        skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
        done = 100 * (counts["rated"] + counts["skipped"]) / len(session.queue)
        task = f'<span class="hp-task">{_shown_text(row["task"])}</span>' if row.get("task") else ""
        requirement = row.get("requirement")
        required = f"<br><small>Required: {_shown_text(requirement)}</small>" if requirement else ""
        several = " several" if len(references) > 1 else ""
        return (
            f'<div class="hp-edit" data-token="{session.token(key)}" data-annotator="{annotator}" '
            f'data-score="{score}">'
            f'<div class="hp-head"><span><b>{counts["rated"]} of {len(session.queue)}</b> rated{skipped}</span>'
            f'<span class="hp-bar"><i style="width: {done:.1f}%"></i></span><span>{annotator}</span></div>'
            f'<div class="hp-asked">{task}{_shown_text(row["prompt"])}{required}</div>'
            f'<div class="hp-images"><div class="hp-references{several}">{"".join(figures[:-1])}</div>'
            f"{figures[-1]}</div></div>"
        )

    def thanks(self, session: RatingSession) -> str:
        annotator, counts = _shown_text(session.annotator), session.counts()
        lines = [
            f"<tr><td>{score} {_shown_text(label)}</td><td>{counts[score]}</td></tr>"
            for score, label in enumerate(self.rubric.labels)
        ]
        return (
            f'<div class="hp-done" data-token="done" data-annotator="{annotator}"><h1>Thank you, {annotator}!</h1>'
            f"<p><b>{counts['rated']} of {len(session.queue)}</b> rated, {counts['skipped']} skipped. Everything is "
            f"saved; you can close this page.</p><table>{''.join(lines)}</table></div>"
        )


def build_app(
    dataset: Dataset,
    output_dir: str | Path = "ratings",
    *,
    rubric: Rubric | None = None,
    annotators: Sequence[str] | None = None,
    overlap: int | None = None,
    seed: int = 0,
) -> gr.Blocks:
    """
    Builds the rating page. [`annotate`] also serves it, with access control.

    Args:
        dataset ([`~datasets.Dataset`]):
            The edits: `id`, `image` or `images`, `edit`, `prompt`, and optionally `editor`, `task` and `requirement`.
            Edits with an image that cannot be decoded are left out and reported.
        output_dir (`str` or `Path`, *optional*, defaults to `"ratings"`):
            Folder of the ratings, one file per annotator.
        rubric ([`Rubric`], *optional*):
            The meaning of the scores. Defaults to the rubric of this package.
        annotators (`Sequence[str]`, *optional*):
            Names of the annotators. By default, anyone who enters a name can rate.
        overlap (`int`, *optional*):
            Number of annotators who rate each case. By default, all of them rate all cases.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the assignment of cases and of the order of edits.

    Returns:
        `gradio.Blocks`: the page.

    Raises:
        `ValueError`: If `dataset` is not a dataset of edits, none of them can be shown, the folder holds ratings made
            with another rubric, or the options contradict each other.
    """
    rubric = rubric or load_rubric()
    campaign = _Campaign(dataset, output_dir, rubric, annotators, overlap, seed)

    with gr.Blocks(title="Rate edits", analytics_enabled=False, fill_width=True) as app:
        who = gr.Textbox(visible=False)
        token = gr.Textbox(visible=False)
        with gr.Column(elem_id="start") as start:
            gr.Markdown("# Rate edited images")
            message = gr.HTML(visible=False)
            if campaign.annotators is None:
                name: Any = gr.Textbox(label="Your name", max_lines=1, autofocus=True, elem_id="name")
            else:
                name = gr.Radio(campaign.annotators, label="Who are you?", elem_id="name")
            enter = gr.Button("Start", variant="primary", elem_id="enter")
            gr.Markdown(rubric.text)
        with gr.Row(visible=False) as rating:
            with gr.Column(scale=5, min_width=600):
                shown = gr.HTML(elem_id="shown")
                with gr.Row(elem_id="scores") as scores:
                    buttons = [
                        gr.Button(f"{score}\n{label}", elem_id=f"score-{score}", elem_classes=["score", "answer"])
                        for score, label in enumerate(rubric.labels)
                    ]
                with gr.Row(elem_id="bottom"):
                    back = gr.Button("← Back", elem_id="back", scale=0)
                    options: dict[str, Any] = {"show_label": False, "container": False, "lines": 1, "max_lines": 4}
                    comment = gr.Textbox(placeholder="Comment (optional)", scale=1, elem_id="comment", **options)
                    again = gr.Button("Show skipped edits", elem_id="again", scale=0, visible=False)
                    skip = gr.Button("Skip", elem_id="skip", elem_classes=["answer"], scale=0)
                    forward = gr.Button("Forward →", elem_id="forward", scale=0)
            with gr.Column(scale=1, min_width=280, elem_id="rubric"):
                gr.Markdown(rubric.text)
                gr.Markdown(KEYS)
        outputs = [start, rating, message, who, token, comment, shown, scores, skip, forward, again]

        def view(session: RatingSession, key: EditKey | None) -> list:
            if key is None:
                token, note, page = "", "", campaign.thanks(session)
            else:
                try:
                    token, note, page = session.token(key), session.comment(key), campaign.show(session, key)
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
                page,
                gr.update(visible=key is not None),
                gr.update(visible=key is not None),
                gr.update(visible=key in session.answers),
                gr.update(visible=key is None and session.next_skipped() is not None),
            ]

        def log_in(entered: str | None, request: gr.Request) -> list:
            try:
                session = campaign.session(request.username or entered or "")
                return view(session, session.next())
            except ValueError as error:
                note = f'<div class="hp-error">{_shown_text(error)}</div>'
                message = gr.update(value=note, visible=True)
                return [gr.update(visible=True), gr.update(visible=False), message, "", "", *[gr.skip()] * 6]

        def load(request: gr.Request) -> list:
            named = request.username or request.query_params.get("annotator")
            return log_in(named, request) if named else [gr.skip()] * len(outputs)

        def step(action: Callable[[RatingSession, str, str], EditKey | None]) -> Callable[..., list]:
            def run(annotator: str, token: str, comment: str, request: gr.Request) -> list:
                try:
                    session = campaign.session(request.username or annotator)
                    return view(session, action(session, token, comment or ""))
                except StaleError as error:
                    gr.Info(f"{error} Go back to see or change it.")
                    return view(session, session.next())
                except OSError as error:
                    message = f"This was not saved, please try again: {error.strerror}."
                    raise gr.Error(message, print_exception=False) from error
                except ValueError as error:
                    raise gr.Error(str(error), print_exception=False) from error

            return run

        def rate(score: int | None) -> Callable[[RatingSession, str, str], EditKey | None]:
            return lambda session, token, note: session.rate(token, score, note)

        # A click carries all its inputs; the server keeps no state per tab.
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": 8}
        inputs = [who, token, comment]
        app.load(load, None, outputs, **hidden)
        enter.click(log_in, [name], outputs, **hidden)
        if campaign.annotators is None:
            name.submit(log_in, [name], outputs, **hidden)
        for score, button in [*enumerate(buttons), (None, skip)]:
            button.click(step(rate(score)), inputs, outputs, **hidden)
        back.click(step(lambda session, token, note: session.back(token or None, note)), inputs, outputs, **hidden)
        forward.click(step(RatingSession.forward), inputs, outputs, **hidden)
        again.click(step(lambda session, *_: session.next_skipped()), inputs, outputs, **hidden)
    return app


def annotate(
    dataset: Dataset,
    output_dir: str | Path = "ratings",
    *,
    rubric: Rubric | None = None,
    annotators: Sequence[str] | None = None,
    overlap: int | None = None,
    seed: int = 0,
    host: str = "127.0.0.1",
    port: int = 7860,
    password: str | None = None,
) -> None:
    """
    Serves the rating page until it is stopped.

    By default, it can only be reached from this machine. It sends no data to other services, and serves no files; the
    images of the dataset are embedded in the page.

    Args:
        dataset, output_dir, rubric, annotators, overlap, seed:
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
    app = build_app(dataset, output_dir, rubric=rubric, annotators=annotators, overlap=overlap, seed=seed)
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
    print(f"Rate edits at {url} (ratings are saved in {output_dir}; stop with Ctrl-C)", flush=True)
    app.block_thread()
