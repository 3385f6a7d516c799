"""Stage `edits`: makes an edit of each case."""

from collections.abc import Callable
from typing import Any

from datasets import Features, Value
from datasets import Image as ImageFeature

from ...cases import case_images
from ...editors import Editor, as_editor, edit_cases, edit_seed
from ...utils.config import check_positive
from ...utils.images import png_bytes
from .engine import Batch, Stage


class MakeEdits(Stage):
    """
    Makes an edit of each case.

    Args:
        editor ([`Editor`] or `Callable`):
            A [`PipelineEditor`], a [`PolicyEditor`], a [`FolderEditor`], or a function, see [`FunctionEditor`].
        batch_size (`int`, *optional*, defaults to `4`):
            Number of cases that the editor is given together.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the noise of the edits, which depends on it and on the case.
    """

    name = "edits"
    inputs = ("id", "image", "prompt")
    features = Features(
        {
            "edit": ImageFeature(),
            "editor": Value("string"),
            "editor_revision": Value("string"),
            "edit_seed": Value("int64"),
        }
    )

    def __init__(self, editor: Editor | Callable[..., Any], batch_size: int = 4, seed: int = 0):
        check_positive(batch_size=batch_size)
        self.editor = as_editor(editor)
        self.batch_size = batch_size
        self.seed = seed

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.editor.identity, "seed": self.seed}

    def load(self) -> None:
        self.editor.load()

    def __call__(self, batch: Batch) -> Batch:
        ids = batch["id"]
        references = [case_images({"image": image}, id_) for id_, image in zip(ids, batch["image"], strict=True)]
        seeds = [edit_seed(self.seed, case_id) for case_id in ids]
        edits, reasons = edit_cases(self.editor, references, batch["prompt"], ids, seeds)
        failed = [reason for reason in reasons if reason is not None and reason.startswith("editor failed")]
        if len(ids) > 1 and len(failed) == len(ids):
            raise ValueError(
                f"The editor failed with every case of a batch, {ids[0]!r} to {ids[-1]!r}: "
                f"{failed[-1].removeprefix('editor failed: ')}"
            )
        settings = self.settings
        return {
            "edit": [None if edit is None else {"bytes": png_bytes(edit), "path": None} for edit in edits],
            "editor": [settings["editor"]] * len(ids),
            "editor_revision": [settings["revision"]] * len(ids),
            "edit_seed": seeds,
            "reason": reasons,
        }
