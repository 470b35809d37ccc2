"""Markdown has one line width: what can be wrapped is at most 120 characters wide."""

import re
import subprocess
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
WIDTH = 120
# The texts of the demo's dump are data: what users and models have said stays as it is.
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))


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
