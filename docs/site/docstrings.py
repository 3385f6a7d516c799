"""
Docstrings in Hugging Face's style as Markdown, an extension of griffe: blocks of arguments become definition lists,
and names in brackets links to their own documentation.
"""

import inspect
import re
import textwrap
from typing import Any

import griffe


logger = griffe.get_logger("griffe.docstrings")

TITLES = {
    "Args": "Arguments",
    "Parameters": "Arguments",
    "Attributes": "Attributes",
    "Class attributes": "Class attributes",
    "Returns": "Returns",
    "Yields": "Yields",
    "Raises": "Raises",
    "Example": "Example",
}
BLOCK = re.compile(rf"({'|'.join(TITLES)}):")
# `name (`type`, *optional*, defaults to `x`):` and, of errors and results, `` `type`: ``
ARGUMENT = re.compile(r"(?P<name>\*{0,2}[A-Za-z_][\w, *]*?)(?: \((?P<type>.*)\))?:(?P<text>.*)")
RAISED = re.compile(r"(?P<name>`[\w.]+`|\[`[\w.~]+`\])(?: \((?P<type>.*)\))?:(?P<text>.*)")
REFERENCE = re.compile(r"\[`(~?)([A-Za-z_][\w.]*)`\](?![(\[])")
MATHS = re.compile(r"\\\\\((.*?)\\\\\)", re.DOTALL)


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites all docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        documented = list(_objects(pkg))
        # No two public functions or classes have the same name, as tests/test_package.py checks.
        homes = {
            item.name: item.path for item in documented if item.is_class or item.is_function and item.parent.is_module
        }
        for item in documented:
            if item.docstring is not None:
                item.docstring.value = to_markdown(item.docstring.value, item, homes)


def _objects(parent: Any) -> Any:
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from _objects(member)


def to_markdown(text: str, item: Any, homes: dict[str, str]) -> str:
    """
    A docstring in Hugging Face's style as Markdown.

    Args:
        text (`str`):
            The docstring.
        item (`griffe.Object`):
            What it documents. Warnings name it, and a name is looked for among its members and its neighbours first.
        homes (`dict[str, str]`):
            Where each public name is defined.
    """
    made: list[str] = []
    lines = inspect.cleandoc(text).splitlines()
    while lines:
        line = lines.pop(0)
        if not (title := BLOCK.fullmatch(line)):
            made.append(line)
            continue
        block = []
        while lines and (not lines[0].strip() or lines[0].startswith(" ")):
            block.append(lines.pop(0))
        made += ["", f"**{TITLES[title[1]]}**", "", *_block(title[1], textwrap.dedent("\n".join(block)), item), ""]
    return MATHS.sub(r"\\(\1\\)", _link_names("\n".join(made), item, homes))


def _block(title: str, text: str, item: Any) -> list[str]:
    """The lines of a block: items with their descriptions, headings (`> …`), or, for results, text."""
    pattern = {"Raises": RAISED, "Returns": None, "Yields": None, "Example": None}.get(title, ARGUMENT)
    if pattern is None:
        return text.replace("```python\n>>>", "```pycon\n>>>").splitlines()
    made: list[str] = []
    for line in re.sub(r",\n(?=defaults to )", ", ", text).splitlines():  # a type may take two lines
        if line.startswith("> "):
            made += ["", f"*{line[2:]}*", "{ .parameters }", ""]
        elif not line.strip() or line.startswith(" "):
            made.append(line)  # a description is indented by four, as a definition is
        elif found := pattern.fullmatch(line):
            kind = f" ({found['type']})" if found["type"] else ""
            name = found["name"] if pattern is RAISED else ", ".join(f"`{n}`" for n in found["name"].split(", "))
            made += ["", f"{name}{kind}", f":   {found['text'].strip()}"]
        else:
            logger.warning(f"{item.path}: a line of its block '{title}' is not `name (type):`: {line}")
            made.append(line)
    return made


def _link_names(text: str, item: Any, homes: dict[str, str]) -> str:
    """Replaces names in brackets by links to what the API reference documents, and by code where it does not."""

    def link(found: re.Match[str]) -> str:
        is_short, name = found[1] == "~", found[2]
        shown = f"`{name.rpartition('.')[2] if is_short else name}`"
        first, _, rest = name.partition(".")
        if first == "hp_edit_trl":
            path: str | None = name
        elif (path := _near(name, item)) is not None:
            pass
        elif first in homes:
            path = homes[first] + (f".{rest}" if rest else "")
        elif rest and first.islower():  # of another library
            return shown
        else:
            logger.warning(f"{item.path}: there is no {name}, which it names")
            return shown
        return f'<autoref identifier="{path}" optional>{shown}</autoref>'

    return REFERENCE.sub(link, text)


def _near(name: str, item: Any) -> str | None:
    """The path of a name among the members of an object, of its parents, or of what they have inherited."""
    while item is not None:
        found = None if item.is_function else item.all_members.get(name)
        if found is not None and not (item.is_module and (found.is_alias or found.is_module)):  # what is defined there
            return str(found.canonical_path)
        item = item.parent
    return None
