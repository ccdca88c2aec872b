"""The documentation: the README's length, the lines' length, and that links, files and keys that a page names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sppo.recipe.config import keys

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
CURRENT = [page for page in PAGES if page.name not in ("log.md", "CHANGELOG.md")]
"""Pages that say what is; the others say what was."""
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site's generator make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_readme_is_500_to_800_words():
    assert 500 <= len((ROOT / "README.md").read_text().split()) <= 800


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_at_most_120_characters(page):
    long = [i for i, line in enumerate(page.read_text().splitlines(), 1) if len(line) > 120]
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    rooms = "|".join(folder.name for folder in (ROOT / "src/sppo").iterdir() if folder.is_dir())
    for name in re.findall(
        rf"\b(?:(?:{rooms}|recipes|benchmarks|tests|src)/[\w./-]+\.(?:py|c|h|toml))\b", page.read_text()
    ):
        assert (ROOT / name).exists() or (ROOT / "src/sppo" / name).exists(), name


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_that_a_page_names_are_keys_of_the_recipe(page):
    known = {name for name, *_ in keys()}
    assert set(re.findall(r"--([a-z]+\.[a-z_0-9]+)", page.read_text())) - {"section.key"} <= known
