"""The fast converter: from a tidied page to markdown in one walk over lxml's tree, without building a second tree.

    to_markdown(root)  ->  what `cleaning.html.markdown.PageConverter` writes for the same tree, or None

None means that the tree is left to the reference, because it holds a tag that answers of the ChatGPT page do not have, or
is nested too deeply. The reference converts 2 MB/s: building Beautiful Soup's tree takes 60 % of its time and markdownify's
walk over that tree most of the rest, whatever the parser. This converter does 17 MB/s, with 30 % of the time for parsing.
Its rules are the reference's own; tests/cleaning/test_fast_markdown.py compares the two.

Each function in _CONVERTERS takes (element, its parent's tag, context) and returns the element's markdown; that of a block
includes the line ends that set it apart. `context` is passed down every call, and is therefore a single integer: its low
bits are flags of what surrounds the element, and the bits above them count how deeply the element is nested.
"""

from collections.abc import Callable

from lxml import etree

from cleaning.html import syntax

# HTML that is nested deeper is refused: markdownify recurses with three Python frames a level, and Python stops at 1,000.
MAX_DEPTH = 150

_ONE_LINE, _IN_CELL, _IN_CODE, _LEVEL = 1, 2, 4, 8

# What an element does to the text next to it, outside and at its own inner edges. _INLINE leaves it alone, _SEPARATOR (a
# horizontal rule, or the edge of the answer) strips it, _BLOCK strips it and drops it where it is blank. The last two
# differ in no-break spaces: between paragraphs they are dropped, beside a rule they stay.
_INLINE, _SEPARATOR, _BLOCK = 0, 1, 2
_DEEPEST = MAX_DEPTH * _LEVEL


class _Unsupported(Exception):
    """The tree holds something that only the reference can convert."""


def to_markdown(root: etree._Element) -> str | None:
    """Return the markdown of `root`, a `body` after `cleaning.html.markdown.tidy`, or None to leave it to the reference."""
    try:
        return _contents(root, "body", 0, _SEPARATOR).strip("\n")
    except _Unsupported:
        return None


def _contents(element: etree._Element, tag: str, context: int, edge: int) -> str:
    """Return the markdown of everything inside `element`; `edge` is what the element itself does to text at its edges."""
    text, last_text = element.text, None
    if not len(element):
        return _text(text, edge, edge) if text else ""
    if tag == "div" or tag == "body":
        element, text, last_text = _innermost_div(element, text)
    if context >= _DEEPEST and len(element):
        raise _Unsupported
    context += _LEVEL
    pieces, left = [], edge
    for child in element:
        try:
            convert, right = _CONVERTERS[child.tag]
        except KeyError:
            raise _Unsupported from None
        if text:
            if left or right or "\n" in text or text.isspace():  # otherwise `_text` would change nothing
                text = _text(text, left, right)
            if text:
                pieces.append(text)
        if piece := convert(child, tag, context):
            pieces.append(piece)
        text, left = child.tail, right
    if last_text:
        text = (text or "") + last_text
    if text and (text := _text(text, left, edge)):
        pieces.append(text)
    return _join(pieces)


def _innermost_div(element: etree._Element, text: str | None) -> tuple[etree._Element, str, str]:
    """Follow `div`s that are the only content of their parent; return the innermost, its text, and the text after them.

    So 1,000 nested `div`s do not count as 1,000 levels of nesting.
    """
    text, last_text = text or "", ""
    while len(element) == 1 and element[0].tag == "div":
        child = element[0]
        tail = child.tail or ""
        if (element.text or "").strip() or tail.strip():
            break
        element, text, last_text = child, text + (child.text or ""), tail + last_text
    return element, text, last_text


def _text(text: str, left: int, right: int) -> str:
    """Return the markdown of a text node between two edges."""
    if text.isspace():
        if left == _BLOCK or right == _BLOCK:
            return ""
        if not text.strip(" \t\n\f\r"):
            text = "\n" if "\n" in text else " "
    if "\n" in text:
        text = syntax.fold_lines(text)
    if left:
        text = text.lstrip(" \t\n")
    return text.rstrip(" \t\n") if right else text


def _join(pieces: list[str]) -> str:
    """Join the pieces. Where two runs of line ends meet, the longer one is kept, but at most two line ends."""
    if len(pieces) < 2:
        return pieces[0] if pieces else ""
    joined, trailing = [], 0
    for piece in pieces:
        if trailing and piece[0] == "\n":
            text = piece.lstrip("\n")
            wanted = min(2, max(trailing, len(piece) - len(text)))
            if wanted < trailing:
                joined[-1] = joined[-1][: wanted - trailing]
            joined.append("\n" * (wanted - trailing))
            piece = text
        joined.append(piece)
        trailing = 0
        if piece and piece[-1] == "\n":
            stripped = piece.rstrip("\n")  # a piece of only line ends has no trailing line ends
            trailing = len(piece) - len(stripped) if stripped else 0
    return "".join(joined)


# --- blocks -----------------------------------------------------------------------------------------------------------


def _paragraph(element: etree._Element, parent: str, context: int) -> str:
    text = _contents(element, "p", context, _BLOCK).strip(" \t\r\n")
    if context & _ONE_LINE:
        return f" {text} "
    if not text:
        return ""
    return f"\n\n{text}\n" if parent == "li" and _list_follows(element) else f"\n\n{text}\n\n"


def _div(element: etree._Element, parent: str, context: int) -> str:
    text = _contents(element, element.tag, context, _BLOCK).strip(" \t\r\n")
    if context & _ONE_LINE:
        return f" {text} "
    return f"\n\n{text}\n\n" if text else ""


def _code_block(element: etree._Element, parent: str, context: int) -> str:
    code = _code(element)
    if context & _IN_CELL:
        return syntax.code_block_in_cell(code)
    text = syntax.code_block(code, element.get("language", ""))
    return text[:-1] if parent == "li" and _list_follows(element) else text


def _code(pre: etree._Element) -> str:
    """Return the text of a `pre`, in which `br` is a line end."""
    if len(pre) == 1 and pre[0].tag == "code" and not len(pre[0]):
        return (pre.text or "") + (pre[0].text or "") + (pre[0].tail or "")
    parts = []
    for event, element in etree.iterwalk(pre, events=("start", "end")):
        if element.tag not in _CONVERTERS:
            raise _Unsupported  # for example `#include <iostream>` from a page that did not escape it
        if event == "start" and element.tag == "br":
            parts.append("\n")
        if event == "start":
            parts.append(element.text or "")
        elif element is not pre:
            parts.append(element.tail or "")
    return "".join(parts)


def _list_follows(element: etree._Element) -> bool:
    """Tell whether the next thing after the element, white space aside, is a list."""
    if (element.tail or "").strip():
        return False
    following = element.getnext()
    return following is not None and following.tag in ("ul", "ol")


def _list(element: etree._Element, parent: str, context: int) -> str:
    tag = element.tag
    if tag == "ol":
        for number, item in enumerate(element.iterchildren("li"), start=syntax.first_number(element)):
            item.set("value", str(number))
    text = _contents(element, tag, context, _BLOCK).strip("\n")
    if not text:
        return ""
    if parent != "li":
        return f"\n\n{text}\n\n"
    # Without the blank line, text after a nested list would be read as part of the list's last item.
    is_last = element.getnext() is None and not (element.tail or "").strip()
    return f"\n{text}\n" if is_last else f"\n{text}\n\n"


def _item(element: etree._Element, parent: str, context: int) -> str:
    text = _contents(element, "li", context, _BLOCK)
    bullet = f"{element.get('value')}. " if parent == "ol" else "- "
    is_loose = next(element.iterchildren("p"), None) is not None
    return syntax.list_item(bullet, text, is_loose)


def _heading(level: int) -> Callable:
    """Return a converter for headings of a level."""

    def convert(element: etree._Element, parent: str, context: int) -> str:
        text = _contents(element, element.tag, context | _ONE_LINE, _BLOCK)
        return text if context & _ONE_LINE else syntax.heading(level, text)

    return convert


def _blockquote(element: etree._Element, parent: str, context: int) -> str:
    text = _contents(element, "blockquote", context, _BLOCK).strip(" \t\r\n")
    if context & _ONE_LINE:
        return f" {text} "
    return syntax.quotation(text) if text else "\n"


def _horizontal_rule(element: etree._Element, parent: str, context: int) -> str:
    return "\n\n---\n\n"


def _table(element: etree._Element, parent: str, context: int) -> str:
    if any(child.tag != "tr" for child in element):
        raise _Unsupported
    return "\n\n" + _contents(element, "table", context, _BLOCK).strip() + "\n\n"


def _row(element: etree._Element, parent: str, context: int) -> str:
    if parent != "table":
        raise _Unsupported
    text = _contents(element, "tr", context, _BLOCK)
    cells = list(element.iterchildren("td", "th"))
    is_header = all(cell.tag == "th" for cell in cells)
    return syntax.row(cells, text, is_first=element.getprevious() is None, is_header=is_header)


def _cell(element: etree._Element, parent: str, context: int) -> str:
    return syntax.cell(element, _contents(element, element.tag, context | _ONE_LINE | _IN_CELL, _BLOCK))


# --- inline elements ------------------------------------------------------------------------------------------------


def _delimited(start: str, end: str) -> Callable:
    """Return a converter that writes the element's contents between two delimiters."""

    def convert(element: etree._Element, parent: str, context: int) -> str:
        text = _contents(element, element.tag, context, _INLINE)
        return text if context & _IN_CODE else syntax.enclose(text, start, end)

    return convert


def _code_span(element: etree._Element, parent: str, context: int) -> str:
    text = _contents(element, "code", context | _IN_CODE, _INLINE)
    return text if context & _IN_CODE or not text else syntax.code_span(text)


def _link(element: etree._Element, parent: str, context: int) -> str:
    text = _contents(element, "a", context, _INLINE)
    return text if context & _IN_CODE else syntax.link(element, text)


def _line_break(element: etree._Element, parent: str, context: int) -> str:
    if context & _IN_CODE:
        return " "
    if context & _IN_CELL:
        return "<br>"
    return " " if context & _ONE_LINE else "  \n"


def _image(element: etree._Element, parent: str, context: int) -> str:
    return syntax.image(element)


def _checkbox(element: etree._Element, parent: str, context: int) -> str:
    return syntax.checkbox(element)


def _formula(element: etree._Element, parent: str, context: int) -> str:
    if len(element):
        raise _Unsupported
    display = element.get("display") is not None and not context & _ONE_LINE
    return syntax.formula(element.text or "", display)


_BOLD, _ITALIC, _DELETED = _delimited("**", "**"), _delimited("*", "*"), _delimited("~~", "~~")
_CONVERTERS = {
    "p": (_paragraph, _BLOCK),
    "li": (_item, _BLOCK),
    "ul": (_list, _BLOCK),
    "ol": (_list, _BLOCK),
    "pre": (_code_block, _BLOCK),
    "div": (_div, _BLOCK),
    "section": (_div, _BLOCK),
    "article": (_div, _BLOCK),
    "blockquote": (_blockquote, _BLOCK),
    "table": (_table, _BLOCK),
    "tr": (_row, _BLOCK),
    "td": (_cell, _BLOCK),
    "th": (_cell, _BLOCK),
    "hr": (_horizontal_rule, _SEPARATOR),
    **{f"h{level}": (_heading(level), _BLOCK) for level in range(1, 7)},
    "code": (_code_span, _INLINE),
    "strong": (_BOLD, _INLINE),
    "b": (_BOLD, _INLINE),
    "em": (_ITALIC, _INLINE),
    "i": (_ITALIC, _INLINE),
    "del": (_DELETED, _INLINE),
    "s": (_DELETED, _INLINE),
    "strike": (_DELETED, _INLINE),
    "sub": (_delimited("<sub>", "</sub>"), _INLINE),
    "sup": (_delimited("<sup>", "</sup>"), _INLINE),
    "a": (_link, _INLINE),
    "br": (_line_break, _INLINE),
    "img": (_image, _INLINE),
    "input": (_checkbox, _INLINE),
    "tex": (_formula, _INLINE),
}
