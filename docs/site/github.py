"""GitHub's Markdown in the form that Python-Markdown reads: it wants lists indented by four, after an empty line."""

import re


ITEM = re.compile(r"( *)([-*]|\d+[.)])( +)(?=\S)")
FENCE = re.compile(r" *(```+|~~~+)")


def with_deeper_lists(markdown: str) -> str:
    """
    Indents what belongs to an item of a list by four, and puts an empty line before lists.

    Args:
        markdown (`str`):
            A page whose items are indented as GitHub takes them, by the width of their marks.
    """
    made: list[str] = []
    columns: list[int] = []  # where the text of each open item begins
    fence = ""
    is_loose = False  # whether an item of the list has several paragraphs
    for line in markdown.splitlines():
        width = len(line) - len(line.lstrip())
        is_empty = not line.strip()
        is_loose = bool(columns) and (is_loose or is_empty)
        if fence or is_empty:
            deep = sum(column <= width for column in columns)
            made.append(line if is_empty else _indented(line, columns[:deep], width))
            if fence and line.strip() == fence:
                fence = ""
            continue
        item = ITEM.match(line)
        before = made[-1] if made else ""
        is_lazy = not item and before.strip() and columns and width < columns[-1] and not line.startswith(("#", "|"))
        if is_lazy and not FENCE.match(line):  # a paragraph of an item goes on
            made.append(_indented(line.lstrip(), columns, 0))
            continue
        columns = [column for column in columns if column <= width]
        begins = not columns and not ITEM.match(before) and before[:1] != " "
        if item and before.strip() and (begins or is_loose):
            made.append("")
        made.append(_indented(line, columns, width))
        if item:
            columns.append(item.end())
        elif opened := FENCE.match(line):
            fence = opened[1]
    return "\n".join(made)


def _indented(line: str, columns: list[int], width: int) -> str:
    """A line within the items that begin at `columns`; what it is indented by beyond them stays."""
    beyond = width - columns[-1] if columns else width
    return " " * (4 * len(columns) + max(beyond, 0)) + line.lstrip()
