"""Fuzz the HTML converter with coverage guidance: `make fuzz` runs this for FUZZ_SECONDS (60).

    python tests/fuzz/converter.py CORPUS_DIR -max_total_time=60     with any options of libFuzzer
    python tests/fuzz/converter.py crash-…                           runs one input again

Needs atheris, lxml, beautifulsoup4 and markdownify, and nothing else of the project's dependencies. Each byte of an input
stands for a piece of HTML, so that a mutation gives another tag or text and never half of one. tests/cleaning/test_fuzz.py
runs the same `check` on the same pieces with hypothesis.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# How many times longer than the HTML the markdown may be: a line end in code inside 75 nested lists costs 75 indents, and
# one cell may span 1,000 columns.
MOST_TIMES = 1_000

_CONTAINERS = """
    p div span b em s code sub a pre ul ol li blockquote h1 h3 table thead tbody tr td th section kbd dl dd figure details
    x-y svg button math annotation template option select form label center
""".split()
_OPENINGS = """
    <br>|<br/>|<hr>|<img src="a b" alt="]" title='"'>|<input type=checkbox checked>|<a href="u)" title="t">|<a href="x">
    <ol start="99999999">|<ol start=-1>|<li value=3>|<td colspan=1000>|<th align=right>|<td style="text-align: center">
    <div class="markdown prose">|<pre language=c>|<code class="language-py hljs">|<span class="katex-display">
    <span class=katex>|<annotation encoding="application/x-tex">|<div class="math math-display">|<p hidden onclick=1>
    <!--|-->|<![CDATA[|]]>|<![foo|<?php|?>|<!DOCTYPE html>|</|<|>|"|<end-of-answer>|</body>|</html>|<body>|<List<String>>
""".replace("\n", "|").split("|")
_TEXTS = [
    *"ab|`*_~$\\#-+1.)]![:&;='/",
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\x0c", "\x0b", "\x00", "\x1b"),
    *("\xa0", "\u3000", "\u200b", "\ufeff", "\ufffe", "é", "漢"),
    *("```", "~~~", "&lt;", "&amp;", "&nbsp;", "&#0;", "&#xD800;", "&#x1F600;", "&bogus;", "Copy code", "CopyEdit"),
    *("css", "plaintext", "Copy12 chars / 3 words", "https://a.b/c", "1. ", "- ", "$$", "word " * 20),
]  # fmt: skip
PIECES = (
    [f"<{tag}>" for tag in _CONTAINERS]
    + [f"</{tag}>" for tag in _CONTAINERS]
    + [each.strip() for each in _OPENINGS if each.strip()]
    + _TEXTS
)
assert len(PIECES) <= 256


def soup(data: bytes) -> str:
    """Return the HTML that `data` stands for."""
    return "".join(PIECES[byte % len(PIECES)] for byte in data)


def check(html: str) -> None:
    """Assert that both converters give the same markdown for `html`, of bounded size, or refuse it with the same reason."""
    fast, reference = _converted(html, reference=False), _converted(html, reference=True)
    assert fast == reference, f"the fast path and the reference differ on {html!r}:\n{fast!r}\n{reference!r}"
    assert len(fast) <= MOST_TIMES * (len(html) + 1), f"{len(fast):,} characters from {len(html):,}: {html!r}"
    fast.encode()


def _converted(html: str, reference: bool) -> str:
    from cleaning.html.markdown import UnreadableHtml, html_to_markdown  # late, so that `main` can instrument it

    try:
        return html_to_markdown(html, reference=reference)
    except UnreadableHtml as error:
        return f"refused: {error}"
    except BaseException:
        print(f"\nraised by {html!r}", file=sys.stderr)
        raise


def main() -> None:
    import atheris

    sys.path.insert(0, str(ROOT))
    with atheris.instrument_imports(include=["cleaning", "markdownify"]):
        import cleaning.html.markdown  # noqa: F401
    atheris.Setup(sys.argv, lambda data: check(soup(data)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
