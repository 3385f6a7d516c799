"""What the documentation names exists."""

import re
from pathlib import Path

import pytest
import yaml

from hp_edit_trl.utils.hub import CITATION


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
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
