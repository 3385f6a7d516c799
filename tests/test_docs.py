"""What the documentation names exists, and the parts that its site is built with. `make docs` builds it."""

import ast
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from docs.site.docstrings import to_markdown
from docs.site.github import with_deeper_lists
from docs.site.maths import draw_formulas, to_svg
from hp_edit_trl.utils.hub import CITATION


ROOT = Path(__file__).parents[1]
TOP = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]
FILE = re.compile(r"\b((?:tests|benchmarks|examples|hp_edit_trl|prompts|docs)/[\w./-]+\.(?:py|md|yaml|json|csv))\b")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page):
    named = FILE.findall(page.read_text(encoding="utf-8"))
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_the_paper_is_cited_everywhere_alike():
    assert CITATION in PAGES[0].read_text(encoding="utf-8")
    for card in ("trainer/model_card.md", "data/builder/dataset_card.md", "data/pairs_card.md"):
        assert "```bibtex" in (text := (ROOT / "hp_edit_trl" / card).read_text(encoding="utf-8"))
        assert "{{ citation }}" in text
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    names = " and ".join(f"{one['given-names']} {one['family-names']}" for one in paper["authors"])
    assert names in " ".join(CITATION.split()) and paper["title"] in CITATION


def test_the_installation_has_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "installation.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(extras)


def anchors(page: Path) -> list[str]:
    """What GitHub calls the headings of a page."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^ *```.*?^ *```$|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def messages() -> list[str]:
    """The texts in the package's code, with an ellipsis for each value that is filled in."""
    found = []
    for file in sorted((ROOT / "hp_edit_trl").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_errors_of_troubleshooting_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted, texts = re.findall(r"^> (.*)$", page, re.MULTILINE), "\n".join(" ".join(m.split()) for m in messages())
    assert len(quoted) > 40
    for message in quoted:  # beginning and end may be left out
        assert re.search(".*".join(map(re.escape, message.strip("…").split("…"))), texts), message


ROOMS = {
    "rewards": "rewards", "judges": "judges", "data": "data", "data.builder": "builder", "policies": "editors",
    "bench": "bench", "calibration": "calibration", "miniature": "miniature",
}  # fmt: skip


def public_names(room: str) -> set[str]:
    """The public classes and functions of a room."""
    file = ROOT / "hp_edit_trl" / room.replace(".", "/") / "__init__.py"
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return {name for name in ast.literal_eval(node.value) if not name.isupper()}
    raise AssertionError(f"{file} has no __all__")


def test_the_api_has_every_public_name():
    api = (ROOT / "docs" / "api").glob("*.md")
    pages = {page.stem: re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE) for page in api}
    documented = {name.rpartition(".")[2] for names in pages.values() for name in names}
    assert public_names("") <= documented
    for room, page in ROOMS.items():
        of_room = {name.rpartition(".")[2] for name in pages[page] if name.startswith(f"hp_edit_trl.{room}.")}
        assert public_names(room) <= of_room, page


def item(name="thing", members=(), is_function=True):
    named = {
        member: SimpleNamespace(is_alias=False, is_module=False, canonical_path=f"{name}.{member}")
        for member in members
    }
    return SimpleNamespace(
        path=name, is_function=is_function, is_alias=False, is_module=False, all_members=named, parent=None
    )


def test_docstrings_become_definitions_and_links(caplog):
    text = """
    Does it, with \\\\( \\sigma \\\\).

    Args:
        name (`str` or [`Judge`], *optional*,
        defaults to `"x"`):
            What it is, see [`~Judge.load`] and [`helper`].

            - a list
        **options:
            Others of [`~datasets.Dataset`].

        > Parameters that come later

        late, later (`int`):
            Both.

    Returns:
        `bool`: whether.

    Raises:
        `ValueError`: If it is wrong, which takes
            two lines.
        [`BadCaseError`]: If it is bad.
    """
    homes = {"Judge": "hp_edit_trl.judges.base.Judge", "BadCaseError": "hp_edit_trl.cases.BadCaseError"}
    made = to_markdown(text, item("thing", ["helper"], is_function=False), homes)
    assert made.startswith("Does it, with \\(\\sigma\\)".replace("(\\", "( \\").replace("a\\", "a \\"))
    judge = '<autoref identifier="hp_edit_trl.judges.base.Judge{}" optional>`{}`</autoref>'
    assert f'\n`name` (`str` or {judge.format("", "Judge")}, *optional*, defaults to `"x"`)\n:   ' in made
    assert f"    What it is, see {judge.format('.load', 'load')} and" in made
    assert '<autoref identifier="thing.helper" optional>`helper`</autoref>.\n\n    - a list\n' in made
    assert "\n`**options`\n:   \n    Others of `Dataset`." in made
    assert "\n*Parameters that come later*\n" in made and "\n`late`, `later` (`int`)\n:   \n    Both." in made
    assert "**Returns**\n\n`bool`: whether." in made
    assert "\n`ValueError`\n:   If it is wrong, which takes\n    two lines.\n" in made
    assert not caplog.records
    to_markdown("Does.\n\nArgs:\n    A line of text\n\nSee [`Nothing`].", item(), homes)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["thing", "thing"]  # strict builds fail


@pytest.mark.parametrize(
    ("github", "site"),
    [
        ("text\n- a\n  b\n- c", "text\n\n- a\n    b\n- c"),
        ("1. a\n\n   b\n2. c", "1. a\n\n    b\n\n2. c"),
        ("- a\n  - b\n    c\n\ntext", "- a\n    - b\n        c\n\ntext"),
        ("- a\n  ```\n  - x\n    y\n  ```\n- b", "- a\n    ```\n    - x\n      y\n    ```\n- b"),
        ("- a\nlazy\n\n```\n- x\n  y\n```", "- a\n    lazy\n\n```\n- x\n  y\n```"),
    ],
)
def test_lists_are_indented_as_the_site_reads_them(github, site):
    assert with_deeper_lists(github) == site


def test_formulas_are_drawn():
    drawn = draw_formulas(
        r'a <span class="arithmatex">\(x &lt; \tfrac12\)</span> <div class="arithmatex">\[\mathcal N\]</div>'
    )
    assert drawn.count("<path") == 2 and "\\(" not in drawn and 'aria-label="x &lt; \\tfrac12"' in drawn
    with pytest.raises(ValueError, match=r"The formula '\\\\nothing' cannot be set"):
        to_svg(r"\nothing")
