"""
What MkDocs does beside its plugins while the site is built: files outside of docs/ that a page links to become pages
of the site, the options of the commands are filled in, and formulas are drawn.
"""

import os
import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from commands import reference
from github import with_deeper_lists
from maths import draw_formulas
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[2]
# Pages of the project that GitHub wants at the top of the repository
TOP = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
HOME = {"README.md": "index.md"}  # GitHub's front page, and the site's
SOURCES = "source"  # where the site has the files of the repository that pages link to
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^()\s#]+)(#[^()\s]*)?(?=\))")
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
COMMANDS = "<!-- the options of all commands -->"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The repository's address is that of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.repo_url = project.get("urls", {}).get("Repository")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages at the top of the repository, and the files that pages link to."""
    pages = {Path("docs", file.src_uri): Path(str(file.abs_src_path)) for file in files.documentation_pages()}
    pages |= {Path(name): ROOT / name for name in TOP}
    named = set()
    for path, file in pages.items():
        for target, _ in LINK.findall(FENCE.sub("", file.read_text(encoding="utf-8"))):
            target = posixpath.normpath(posixpath.join(path.parent.as_posix(), target))
            if not target.startswith("docs/") and target not in TOP | HOME:
                named.add(target)
    for name, uri in TOP.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text(encoding="utf-8")))
    for name in sorted(named):
        files.append(File.generated(config, f"{SOURCES}/{name}.md", content=_source(name)))
    return files


def _source(name: str) -> str:
    """A file of the repository, or the list of a folder's, as a page."""
    path = ROOT / name
    head = f"---\nsearch:\n  exclude: true\n---\n\n# `{name}`\n\n"
    if path.is_dir():
        return head + "\n".join(f"- `{child.name}`" for child in sorted(path.iterdir()) if child.name[0] not in "._")
    if not path.is_file():
        raise PluginError(f"A page links to {name}, which is not a file of the repository.")
    return f"{head}````{path.suffix[1:]}\n{path.read_text(encoding='utf-8')}````\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links to their pages of the site, and fills in the options of the commands."""
    uri = page.file.src_uri
    origin = {page_uri: name for name, page_uri in TOP.items()}.get(uri, f"docs/{uri}")

    def lead(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), found[1]))
        if target.startswith("docs/"):
            target = target.removeprefix("docs/")
        else:
            target = (TOP | HOME).get(target, f"{SOURCES}/{target}.md")
        return os.path.relpath(target, posixpath.dirname(uri) or ".") + (found[2] or "")

    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    if not uri.startswith(f"{SOURCES}/"):
        parts = FENCE.split(markdown)
        markdown = "".join(part if FENCE.match(part) else LINK.sub(lead, part) for part in parts)
        markdown = with_deeper_lists(markdown)
    return markdown.replace(COMMANDS, reference()) if COMMANDS in markdown else markdown


def on_page_content(html: str, **kwargs: Any) -> str:
    """Draws a page's formulas, and keeps a number and its error on one line."""
    return re.sub(r"(?<=\d) ± (?=\d)", "\u00a0±\u00a0", draw_formulas(html))
