"""Tables in Markdown, and numbers with their intervals in them."""

from typing import Any


def format_estimate(estimate: dict[str, Any], signed: bool = False, interval: bool = True, digits: int = 2) -> str:
    """
    The value of an estimate with its interval in brackets, e.g. `"0.89 [0.85, 0.92]"`; a dash if there is no value.
    """
    style = f"{'+' if signed else ''}.{digits}f"
    if estimate["value"] is None:
        return "–"
    value = format(estimate["value"], style)
    if not interval or estimate["low"] is None:
        return value
    return f"{value} [{format(estimate['low'], style)}, {format(estimate['high'], style)}]"


def markdown_table(head: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown, with aligned columns."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in [head, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:], ""])
