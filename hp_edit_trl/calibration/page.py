"""The rating page: a Gradio app that shows edits beside their sources and asks for a score."""

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

from ..cases import case_images, check_edits, edit_keys, without_decoding
from ..utils.images import UnreadableImageError, read_image
from .display import data_url
from .guard import Guard, is_loopback
from .rubric import Rubric, load_rubric
from .session import EditKey, RatingSession, StaleError, annotator_name, assign_cases, check_rubric, ratings_file


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
try:
    import gradio as gr
    from starlette.middleware import Middleware
except ImportError as error:
    raise ImportError('The rating page needs Gradio: pip install "hp-edit-trl[annotate]"') from error

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
KEYS = (
    "Keys: **0** to **5** rate, **s** skips, **←** or **Backspace** goes back, **→** forward, **Esc** leaves the comment. "
    "Click a picture to enlarge it."
)


def _shown_text(value: Any) -> str:
    """Text for the page. Braces and dollars would mean something to Gradio's template."""
    text = html.escape(str(value))
    return text.replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")


class _Campaign:
    """What is rated, by whom, and where it goes; makes the session of an annotator when it is first asked for."""

    def __init__(
        self,
        dataset: Dataset,
        ratings_dir: str | Path,
        rubric: Rubric,
        annotators: Sequence[str] | None,
        overlap: int | None,
        seed: int,
    ):
        check_edits(dataset, "dataset")
        self.dataset = without_decoding(dataset)
        self.ratings_dir = Path(ratings_dir)
        self.rubric = rubric
        self.seed = seed
        try:
            self.annotators = None if annotators is None else [annotator_name(name) for name in annotators]
        except ValueError as error:
            raise ValueError(f"annotators={list(annotators or ())} has one that is no name: {error}") from error
        if self.annotators is not None and len(set(self.annotators)) < max(1, len(self.annotators)):
            raise ValueError(f"annotators={self.annotators} must be names that differ from each other.")
        keys = edit_keys(self.dataset)
        self.rows = {key: row for row, key in enumerate(keys)}
        self.given: dict[str, list[EditKey]] | None = None
        if overlap is not None:
            if self.annotators is None:
                raise ValueError(f"overlap={overlap} deals the cases out to annotators: name them with annotators=.")
            # Before broken images are left out, so that a file that is mended gives nobody other cases.
            self.given = assign_cases(keys, self.annotators, overlap, seed)

        self.ratings_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(self.ratings_dir, os.W_OK):
            raise ValueError(f"The folder for ratings {self.ratings_dir} cannot be written to: choose another one.")
        for file in sorted(self.ratings_dir.glob("ratings-*.jsonl")):
            check_rubric(file, rubric.revision, self.dataset)
        self._leave_out_unreadable()
        self.sessions: dict[str, RatingSession] = {}
        self.lock = threading.Lock()

    def _leave_out_unreadable(self) -> None:
        for key, row in tqdm(list(self.rows.items()), desc="Reading images", disable=None):
            try:
                self._images(row)
            except UnreadableImageError as error:
                logger.warning("Not shown: %s", error)
                del self.rows[key]
        broken = len(self.dataset) - len(self.rows)
        if not self.rows:
            raise ValueError(f"Not one of the {broken} edits can be shown, because their images cannot be decoded.")
        if broken:
            logger.warning(
                "%d of %d edits are not shown, because an image cannot be decoded.", broken, len(self.dataset)
            )

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
                file = ratings_file(self.ratings_dir, name)
                self.sessions[name] = RatingSession(name, keys, file, self.rubric.revision, self.seed)
            return self.sessions[name]

    def show(self, session: RatingSession, key: EditKey) -> str:
        """
        An edit as HTML, images included. The editor's name is nowhere in it.

        Raises:
            [`UnreadableImageError`]: If an image has gone since the start.
        """
        row = self.dataset[self.rows[key]]
        *sources, edited = [data_url(image) for image in self._images(self.rows[key])]
        names = ["Source"] if len(sources) == 1 else [f"Source {i}" for i in range(1, len(sources) + 1)]
        figures = [
            f'<figure><figcaption>{name}</figcaption><img src="{url}" alt="{name}"></figure>'
            for url, name in zip([*sources, edited], [*names, "Edit"], strict=True)
        ]
        task, requirement = row.get("task"), row.get("requirement")
        counts = session.counts()
        answer = session.answers.get(key)
        score = "" if answer is None else "skipped" if answer.score is None else answer.score
        skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
        done = 100 * (counts["rated"] + counts["skipped"]) / len(session.queue)
        return (
            f'<div class="hp-edit" data-token="{session.token(key)}" data-annotator="{_shown_text(session.annotator)}" data-score="{score}">'
            f'<div class="hp-head"><span><b>{counts["rated"]} of {len(session.queue)}</b> rated{skipped}</span>'
            f'<span class="hp-bar"><i style="width: {done:.1f}%"></i></span><span>{_shown_text(session.annotator)}</span></div>'
            f'<div class="hp-asked">{f"""<span class="hp-task">{_shown_text(task)}</span>""" if task else ""}'
            f"{_shown_text(row['prompt'])}"
            f"{f'<br><small>Required: {_shown_text(requirement)}</small>' if requirement else ''}</div>"
            f'<div class="hp-images"><div class="hp-sources{" several" if len(sources) > 1 else ""}">{"".join(figures[:-1])}</div>'
            f"{figures[-1]}</div></div>"
        )

    def thanks(self, session: RatingSession) -> str:
        counts = session.counts()
        lines = [
            f"<tr><td>{score} {_shown_text(label)}</td><td>{counts[score]}</td></tr>"
            for score, label in enumerate(self.rubric.labels)
        ]
        return (
            f'<div class="hp-done" data-token="done" data-annotator="{_shown_text(session.annotator)}"><h1>Thank you, '
            f"{_shown_text(session.annotator)}!</h1><p><b>{counts['rated']} of {len(session.queue)}</b> rated, "
            f"{counts['skipped']} skipped. Everything is saved; you can close this page.</p><table>{''.join(lines)}</table></div>"
        )


def build_app(
    dataset: Dataset,
    ratings_dir: str | Path = "ratings",
    *,
    rubric: Rubric | None = None,
    annotators: Sequence[str] | None = None,
    overlap: int | None = None,
    seed: int = 0,
) -> gr.Blocks:
    """
    Builds the rating page. [`annotate`] also starts it, with the guards that a page needs that others can reach.

    Args:
        dataset ([`~datasets.Dataset`]):
            The edits: `id`, `image` or `images`, `edit`, `prompt`, and optionally `editor`, `task` and `requirement`. Edits with
            an image that cannot be decoded are left out and reported.
        ratings_dir (`str` or `Path`, *optional*, defaults to `"ratings"`):
            Folder for the ratings, one file for each annotator.
        rubric ([`Rubric`], *optional*):
            What a score means; by default the rubric of this package.
        annotators (`Sequence[str]`, *optional*):
            Who may rate; by default anyone who enters a name.
        overlap (`int`, *optional*):
            How many of the annotators rate each case; by default everyone rates everything.
        seed (`int`, *optional*, defaults to `0`):
            Decides who rates what, and in which order.

    Returns:
        `gradio.Blocks`: the page.

    Raises:
        `ValueError`: If `dataset` is no dataset of edits, none of them can be shown, the folder has ratings made with another
            rubric, or the options do not fit together.
    """
    rubric = rubric or load_rubric()
    campaign = _Campaign(dataset, ratings_dir, rubric, annotators, overlap, seed)

    with gr.Blocks(title="Rate edits", analytics_enabled=False, fill_width=True) as app:
        who = gr.Textbox(visible=False)
        token = gr.Textbox(visible=False)
        with gr.Column(elem_id="start") as start:
            gr.Markdown("# Rate edited pictures")
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
                    comment = gr.Textbox(
                        show_label=False, placeholder="Comment (optional)", lines=1, max_lines=4, scale=1,
                        elem_id="comment", container=False,
                    )  # fmt: skip
                    again = gr.Button("Show what was skipped", elem_id="again", scale=0, visible=False)
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
                    raise gr.Error(
                        f"This was not saved, please try again: {error.strerror}.", print_exception=False
                    ) from error
                except ValueError as error:
                    raise gr.Error(str(error), print_exception=False) from error

            return run

        def rate(score: int | None) -> Callable[[RatingSession, str, str], EditKey | None]:
            return lambda session, token, note: session.rate(token, score, note)

        # Everything in a click comes from the page that was clicked; the server keeps nothing about a tab.
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
    ratings_dir: str | Path = "ratings",
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
    Starts the rating page and serves it until it is stopped.

    Only this machine reaches it, unless `host` says otherwise. Nothing is sent anywhere, and of all files only the images of the
    dataset are shown, encoded anew within the page.

    Args:
        dataset, ratings_dir, rubric, annotators, overlap, seed:
            See [`build_app`].
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen at, e.g. `"0.0.0.0"` for the whole network. It then needs a password.
        port (`int`, *optional*, defaults to `7860`):
            Port to listen at.
        password (`str`, *optional*):
            What annotators enter, together with their name, before they see anything.

    Raises:
        `ValueError`: As of [`build_app`]; if others could reach the page without a password; if the port is taken.
    """
    if not password and not is_loopback(host):
        raise ValueError(
            f"host={host!r} can be reached from other machines: set a password (HP_EDIT_PASSWORD or --password), or leave "
            "the host at 127.0.0.1."
        )
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # it would copy answers into the browser's storage
    app = build_app(dataset, ratings_dir, rubric=rubric, annotators=annotators, overlap=overlap, seed=seed)
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
            auth_message="Your name as an annotator, and the password of this page" if password else None,
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
    print(f"Rate edits at {url} (ratings go to {ratings_dir}; stop with Ctrl-C)", flush=True)
    app.block_thread()
