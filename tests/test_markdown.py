"""Markdown has one line width, and names only what there is: files, links, and functions in files."""

import re
import subprocess
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
WIDTH = 120
# The texts of the demo's dump are data: what users and models have said stays as it is.
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))

REFERENCES = [page for page in PAGES if page.parent.name != "log"]  # the log tells what was there on its days


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_is_at_most_120_characters_wide(page):
    """Code blocks and tables cannot be wrapped, and neither can one long word, such as a link or code within a sentence."""
    lines = page.read_text().splitlines()
    prose = {
        number
        for token in MarkdownIt("commonmark").enable("table").parse(page.read_text())
        if token.type in ("paragraph_open", "heading_open")
        for number in range(*token.map)
    }
    wide = [
        number
        for number in prose
        if len(lines[number]) > WIDTH and len(re.sub("`[^`]+`", "code", lines[number]).split()) > 1
    ]
    assert not wide, (
        f"{page.name}: lines {[n + 1 for n in sorted(wide)]}: mdformat --wrap 120 wraps them (CONTRIBUTING.md)"
    )


def test_every_page_of_the_repository_is_checked():
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    found = {ROOT / name for name in tracked.stdout.split() if not name.startswith("fastft/demo/sources/")}
    assert found <= set(PAGES)


PATH = r"`((?:fastft|cleaning|tests|benchmarks|docs|sky_yamls)/[\w./-]*)`"


@pytest.mark.parametrize("page", REFERENCES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_links_that_a_page_names_are_there(page):
    text = page.read_text()
    named = [ROOT / path for path in re.findall(PATH, text)]
    linked = [page.parent / path for path in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)]
    assert [
        str(path.relative_to(ROOT)) for path in [*named, *linked] if not path.exists() and "YYYY" not in path.name
    ] == []


@pytest.mark.parametrize("page", REFERENCES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_finds_in_a_file_is_defined_there(page):
    """As in "`pack` in `fastft/data/packing.py`", or "`Uploader._commit` in …"."""
    absent = []
    for names, path in re.findall(rf"((?:`[\w.]+`(?:, | and )?)+) in {PATH}", page.read_text()):
        source = (ROOT / path).read_text() if path.endswith(".py") else ""
        for name in re.findall(r"\w+", names.replace("` and `", " ")) if source else ():
            if not re.search(
                rf"^\s*(?:(?:async )?def|class) {name}\b|^\s*{name}\b.*=|^    {name}:", source, re.MULTILINE
            ):
                absent.append(f"{name} in {path}")
    assert absent == []
