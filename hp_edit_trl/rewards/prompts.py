"""The scorer prompts: loaded from the package, from a folder, or from a Hub repository pinned by revision."""

import ast
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download

from ..utils.files import shipped_folder, write_text
from ..utils.hub import check_reachable
from ..utils.texts import quoted


@dataclass(frozen=True)
class ScorerPrompt:
    """
    The text that a judge is given for one task.

    Args:
        task (`str`):
            Task that the prompt is for, or `"base"` for the one prompt without task-specific questions.
        revision (`str`):
            Where the text came from and which revision it is, e.g. `"hp-edit-trl:add:1"`. It is recorded with every
            score.
        text (`str`):
            The prompt, with `{prompt}` and `{requirement}` standing for the case's instruction and requirement.
    """

    task: str
    revision: str
    text: str

    @property
    def name(self) -> str:
        """The revision alone, as the header of its file has it."""
        return self.revision.rpartition(":")[2]

    @property
    def digest(self) -> str:
        """
        Twelve hexadecimal digits of a hash of the text: it changes with the text, also where the revision does not.
        """
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    def save(self, path: str | Path) -> None:
        """Writes the prompt as a file that [`read_scorer_prompt`] reads."""
        header = yaml.safe_dump({"task": self.task, "revision": self.name}, sort_keys=False)
        write_text(path, f"---\n{header}---\n{self.text}\n")

    def fill(self, prompt: str, requirement: str | None = None, quote: bool = True) -> str:
        """
        The text for one case. Braces inside `prompt` and `requirement` mean nothing.

        Args:
            prompt (`str`):
                The instruction.
            requirement (`str`, *optional*):
                Further requirements. Without any the text says `none`.
            quote (`bool`, *optional*, defaults to `True`):
                Write both as JSON strings, which they cannot end. `False` is for prompts of benchmarks, whose words
                are kept.
        """
        write = quoted if quote else str
        values = {"prompt": write(prompt), "requirement": write(requirement) if requirement else "none"}
        return re.sub(r"\{(prompt|requirement)\}", lambda match: values[match[1]], self.text)


def read_header(path: Path) -> tuple[dict[str, Any], str]:
    """
    Reads a prompt's file: its header and its text.

    Args:
        path (`Path`):
            A Markdown file with a YAML header.

    Raises:
        `FileNotFoundError`: If there is no file.
        `ValueError`: If it has no header that names a `task` and a valid `revision`.
    """
    parts = re.match(r"---\n(.*?)\n---\n(.*)", path.read_text(encoding="utf-8"), re.DOTALL)
    try:
        header = yaml.safe_load(parts[1]) if parts else None
    except yaml.YAMLError as error:
        raise ValueError(f"The header of the prompt {path} is no YAML: {error}") from error
    if parts is None or not isinstance(header, dict) or not {"task", "revision"} <= header.keys():
        raise ValueError(f"The prompt {path} does not begin with a header that names `task` and `revision`.")
    if not isinstance(header["task"], str) or not header["task"]:
        raise ValueError(f"The prompt {path} has the task {header['task']!r}: write a text, in quotes if necessary.")
    if not re.fullmatch(r"[\w.-]+", str(header["revision"])):
        raise ValueError(
            f"The prompt {path} has the revision {header['revision']!r}: use letters, digits, '.', '-', '_'."
        )
    return header, parts[2].strip()


def read_scorer_prompt(path: str | Path, origin: str | None = None) -> ScorerPrompt:
    """
    Reads one scorer prompt: Markdown with a header that names its `task` and `revision`.

    Args:
        path (`str` or `Path`):
            The file.
        origin (`str`, *optional*):
            Beginning of the prompt's revision. Defaults to the file's folder.

    Raises:
        `FileNotFoundError`: If there is no file.
        `ValueError`: If it has no valid header, or no place for the instruction.
    """
    path = Path(path)
    header, text = read_header(path)
    if "{prompt}" not in text:
        raise ValueError(f"The scorer prompt {path} has no {{prompt}}, so the judge would not see the instruction.")
    origin = str(path.parent) if origin is None else origin
    return ScorerPrompt(header["task"], f"{origin}:{header['task']}:{header['revision']}", text)


def read_texts(file: Path, names: Sequence[str]) -> dict[str, str]:
    """
    Reads the texts that are assigned to names in a Python file of others, e.g. scorer prompts. It is not executed.

    Args:
        file (`Path`):
            The file.
        names (`Sequence[str]`):
            The names.

    Returns:
        `dict[str, str]`: the texts by name. Variables in an f-string stay in braces.

    Raises:
        `FileNotFoundError`: If there is no file.
        `ValueError`: If it cannot be parsed, or lacks a text.
    """
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no Python file: {error}") from error
    texts = {}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = _text_of(node.value)
            if text is not None:
                texts[node.targets[0].id] = text
    if missing := sorted(set(names) - texts.keys()):
        raise ValueError(f"{file} has no text {', '.join(missing)}: name the file of the authors' own code.")
    return {name: texts[name] for name in names}


def _text_of(node: ast.expr | ast.AST) -> str | None:
    """The text that an expression stands for: literals, f-strings of plain variables, and sums of them."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    parts: list[ast.expr | ast.AST] = []
    if isinstance(node, ast.JoinedStr):
        parts = list(node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [node.left, node.right]
    elif isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return f"{{{node.value.id}}}"
    texts = [_text_of(part) for part in parts]
    return None if not texts or None in texts else "".join(text for text in texts if text is not None)


def find_prompts(source: str | None, revision: str | None) -> tuple[Path, str]:
    """
    Finds the folder of prompts, and what their revisions begin with.

    Args:
        source (`str`, *optional*):
            A local folder or a Hub repository, see [`load_scorer_prompts`]. By default this package's prompts.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.

    Raises:
        `FileNotFoundError`: If there is neither a folder nor a repository.
        `ValueError`: If there is a revision of a local folder.
    """
    if source is None:
        folder, origin = shipped_folder("prompts", "prompts"), "hp-edit-trl"
    elif os.path.isdir(source):
        folder, origin = Path(source), source
    else:
        repo_type, repo_id = ("dataset", source[9:]) if source.startswith("datasets/") else ("model", source)
        check_reachable(repo_id, repo_type, revision=revision)
        try:
            folder = Path(
                snapshot_download(
                    repo_id, repo_type=repo_type, revision=revision, allow_patterns=["*.md", "*.txt", "vie_prompts.py"]
                )
            )
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{source!r} is neither a local folder nor a Hub repository that can be read: {error}"
            ) from error
        origin = f"{source}@{folder.name}"
    if revision is not None and origin == source:
        raise ValueError(f"revision={revision!r} pins a Hub repository, but {source!r} is a local folder.")
    return folder, origin


def prompt_files(folder: Path) -> list[Path]:
    """The prompts in a folder, which a README may go with."""
    return [path for path in sorted(folder.glob("*.md")) if path.name != "README.md"]


def load_scorer_prompts(source: str | None = None, revision: str | None = None) -> dict[str, ScorerPrompt]:
    """
    Loads scorer prompts. Each is a Markdown file with a header that names its `task` and `revision`, followed by the
    text. Further tasks are added by further files.

    Args:
        source (`str`, *optional*):
            A local folder, or a Hub repository (`"user/name"`, or `"datasets/user/name"` for a dataset repository).
            By default the prompts of this package.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.

    Returns:
        `dict[str, ScorerPrompt]`: the prompts by task.

    Raises:
        `ValueError`: If a prompt has no valid header or no place for the instruction, or a task has two prompts.
        `FileNotFoundError`: If there are no prompts.
    """
    folder, origin = find_prompts(source, revision)
    prompts: dict[str, ScorerPrompt] = {}
    for path in prompt_files(folder):
        prompt = read_scorer_prompt(path, origin)
        if prompt.task in prompts:
            raise ValueError(f"The scorer prompt {path} is a second one for the task {prompt.task!r}.")
        prompts[prompt.task] = prompt
    if not prompts:
        raise FileNotFoundError(f"No scorer prompts (*.md) in {source or folder}.")
    return prompts


def load_benchmark_prompts(
    benchmark: str,
    names: Sequence[str],
    source: str | None = None,
    revision: str | None = None,
    filled: str | None = None,
    read_originals: Callable[[Path], dict[str, str]] | None = None,
) -> dict[str, ScorerPrompt]:
    """
    Loads the scorer prompts of a benchmark. Those of this package are in our own words; pass `source` to use the
    originals.

    Args:
        benchmark (`str`):
            Name of the benchmark, e.g. `"gedit"`.
        names (`Sequence[str]`):
            Names of the prompts that it needs.
        source (`str`, *optional*):
            A local folder or a Hub repository with a file `<name>.md` or `<name>.txt` for each. A file without a
            header is used as it is. The authors' own files do as well, see `read_originals`. By default the prompts of
            this package.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        filled (`str`, *optional*):
            Name of a prompt that must have a place for the prompt of the case.
        read_originals (`Callable[[Path], dict[str, str]]`, *optional*):
            Reads the prompts from the files of the benchmark's authors in a folder, under the names and in the form
            that the authors gave them; empty if there are none.

    Returns:
        `dict[str, ScorerPrompt]`: the scorer prompts by name. `{prompt}`, `{instruction}` and `<instruction>` in their
        files stand for the prompt of the case.

    Raises:
        `FileNotFoundError`: If there is neither a folder nor a repository, or a file is missing.
        `ValueError`: If there is a revision of a local folder, or the prompt `filled` has no place for the prompt.
    """
    folder, origin = find_prompts(source, revision)
    if source is None:
        folder, origin = folder / benchmark, f"{origin}:{benchmark}"
    originals = {} if source is None or read_originals is None else read_originals(folder)
    prompts = {}
    for name in names:
        files = [path for suffix in ("md", "txt") if (path := folder / f"{name}.{suffix}").is_file()]
        if not files and name not in originals:
            raise FileNotFoundError(
                f"{source or folder} has no prompt {name}.md or {name}.txt, which {benchmark} needs, nor the files of "
                "its authors."
            )
        text = files[0].read_text(encoding="utf-8") if files else originals[name]
        if files and text.startswith("---\n"):
            header, text = read_header(files[0])
            number = header["revision"]
        else:
            number = f"sha-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        text = re.sub(r"\{instruction\}|<instruction>", "{prompt}", text.strip() if files else text)
        if name == filled and "{prompt}" not in text:
            raise ValueError(
                f"The prompt {name} in {source or folder} has no {{instruction}}, so the judge would not see the "
                "prompt of the case: write it where that belongs."
            )
        prompts[name] = ScorerPrompt(name, f"{origin}:{name}:{number}", text)
    return prompts
