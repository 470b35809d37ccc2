"""The fast path from a tidied page to markdown: one walk over lxml's tree, no second tree.

    to_markdown(root)  ->  what `cleaning.html.markdown.PageConverter` writes for the same tree, or None

None where the tree holds a tag that answers of the ChatGPT page do not have, or is nested too deeply: such a tree is
the reference's. The reference converts 2 MB/s, because Beautiful Soup's tree takes 60 % of the time and markdownify's
walk over it most of the rest, whatever the parser; with the walker it is 17 MB/s, 30 % of it parsing. The rules here are
the reference's own; tests/test_cleaning_walker.py holds both together.

Each function in _CONVERTERS gets (element, its parent's tag, where) and returns the element's markdown, blocks with
the line ends that set them apart. `where` is one integer, because it goes down every call: flags of what stands
around the element, and above them how deep it is nested.
"""

from collections.abc import Callable

from lxml import etree

from cleaning.html import syntax

# markdownify descends by recursion, three Python frames a level, and Python stops at 1,000 frames: what is nested
# deeper is refused.
MAX_DEPTH = 150

_ON_ONE_LINE, _IN_CELL, _IN_CODE, _LEVEL = 1, 2, 4, 8

# What an element does to text beside it and at its own borders: nothing; strip it; strip it, and drop it where it is
# blank (which differs for no-break spaces: between paragraphs they go, beside a rule they stay).
_INLINE, _RULE, _BLOCK = 0, 1, 2
_DEEPEST = MAX_DEPTH * _LEVEL


class _NotOurs(Exception):
    """The tree holds what only the reference knows."""


def to_markdown(root: etree._Element) -> str | None:
    """The markdown of `root`, a `body` that `cleaning.html.markdown.tidy` has seen, or None: ask the reference."""
    try:
        return _inside(root, "body", 0, _RULE).strip("\n")
    except _NotOurs:
        return None


def _inside(element: etree._Element, tag: str, where: int, border: int) -> str:
    """The markdown of all that `element` holds; `border` is its own kind."""
    text, last_text = element.text, None
    if not len(element):
        return _text(text, border, border) if text else ""
    if tag == "div" or tag == "body":
        element, text, last_text = _past_lone_divs(element, text)
    if where >= _DEEPEST and len(element):
        raise _NotOurs
    where += _LEVEL
    pieces, left = [], border
    for child in element:
        try:
            convert, right = _CONVERTERS[child.tag]
        except KeyError:
            raise _NotOurs from None
        if text:
            if left or right or "\n" in text or text.isspace():  # else the call would change nothing
                text = _text(text, left, right)
            if text:
                pieces.append(text)
        if piece := convert(child, tag, where):
            pieces.append(piece)
        text, left = child.tail, right
    if last_text:
        text = (text or "") + last_text
    if text and (text := _text(text, left, border)):
        pieces.append(text)
    return _join(pieces)


def _past_lone_divs(element: etree._Element, text: str | None) -> tuple[etree._Element, str, str]:
    """The innermost of the `div`s that are all their parent holds, its text, and what followed them (1,000 are one)."""
    text, last_text = text or "", ""
    while len(element) == 1 and element[0].tag == "div":
        child = element[0]
        tail = child.tail or ""
        if (element.text or "").strip() or tail.strip():
            break
        element, text, last_text = child, text + (child.text or ""), tail + last_text
    return element, text, last_text


def _text(text: str, left: int, right: int) -> str:
    """A text node between two borders."""
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
    """The pieces in one string; where line ends meet line ends, the larger number of both stays, two at most."""
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
            stripped = piece.rstrip("\n")  # nothing left: line ends alone are not looked at again
            trailing = len(piece) - len(stripped) if stripped else 0
    return "".join(joined)


# --- blocks -----------------------------------------------------------------------------------------------------------


def _paragraph(element: etree._Element, parent: str, where: int) -> str:
    text = _inside(element, "p", where, _BLOCK).strip(" \t\r\n")
    if where & _ON_ONE_LINE:
        return f" {text} "
    if not text:
        return ""
    return f"\n\n{text}\n" if parent == "li" and _a_list_follows(element) else f"\n\n{text}\n\n"


def _division(element: etree._Element, parent: str, where: int) -> str:
    text = _inside(element, element.tag, where, _BLOCK).strip(" \t\r\n")
    if where & _ON_ONE_LINE:
        return f" {text} "
    return f"\n\n{text}\n\n" if text else ""


def _code_block(element: etree._Element, parent: str, where: int) -> str:
    code = _code(element)
    if where & _IN_CELL:
        return syntax.code_block_in_cell(code)
    text = syntax.code_block(code, element.get("language", ""))
    return text[:-1] if parent == "li" and _a_list_follows(element) else text


def _code(pre: etree._Element) -> str:
    if len(pre) == 1 and pre[0].tag == "code" and not len(pre[0]):
        return (pre.text or "") + (pre[0].text or "") + (pre[0].tail or "")
    parts = []
    for event, element in etree.iterwalk(pre, events=("start", "end")):
        if element.tag not in _CONVERTERS:
            raise _NotOurs  # `#include <iostream>` where a page did not escape it
        if event == "start" and element.tag == "br":
            parts.append("\n")
        if event == "start":
            parts.append(element.text or "")
        elif element is not pre:
            parts.append(element.tail or "")
    return "".join(parts)


def _a_list_follows(element: etree._Element) -> bool:
    if (element.tail or "").strip():
        return False
    following = element.getnext()
    return following is not None and following.tag in ("ul", "ol")


def _list(element: etree._Element, parent: str, where: int) -> str:
    tag = element.tag
    if tag == "ol":
        for number, item in enumerate(element.iterchildren("li"), start=syntax.first_number(element)):
            item.set("value", str(number))
    text = _inside(element, tag, where, _BLOCK).strip("\n")
    if not text:
        return ""
    if parent != "li":
        return f"\n\n{text}\n\n"
    # Text after a nested list would be read as part of its last item without a blank line.
    is_last = element.getnext() is None and not (element.tail or "").strip()
    return f"\n{text}\n" if is_last else f"\n{text}\n\n"


def _item(element: etree._Element, parent: str, where: int) -> str:
    text = _inside(element, "li", where, _BLOCK)
    bullet = f"{element.get('value')}. " if parent == "ol" else "- "
    is_loose = next(element.iterchildren("p"), None) is not None
    return syntax.list_item(bullet, text, is_loose)


def _heading(level: int) -> Callable:
    def convert(element: etree._Element, parent: str, where: int) -> str:
        text = _inside(element, element.tag, where | _ON_ONE_LINE, _BLOCK)
        return text if where & _ON_ONE_LINE else syntax.heading(level, text)

    return convert


def _quotation(element: etree._Element, parent: str, where: int) -> str:
    text = _inside(element, "blockquote", where, _BLOCK).strip(" \t\r\n")
    if where & _ON_ONE_LINE:
        return f" {text} "
    return syntax.quotation(text) if text else "\n"


def _rule(element: etree._Element, parent: str, where: int) -> str:
    return "\n\n---\n\n"


def _table(element: etree._Element, parent: str, where: int) -> str:
    if any(child.tag != "tr" for child in element):
        raise _NotOurs
    return "\n\n" + _inside(element, "table", where, _BLOCK).strip() + "\n\n"


def _row(element: etree._Element, parent: str, where: int) -> str:
    if parent != "table":
        raise _NotOurs
    text = _inside(element, "tr", where, _BLOCK)
    cells = list(element.iterchildren("td", "th"))
    is_header = all(cell.tag == "th" for cell in cells)
    return syntax.row(cells, text, is_first=element.getprevious() is None, is_header=is_header)


def _cell(element: etree._Element, parent: str, where: int) -> str:
    return syntax.cell(element, _inside(element, element.tag, where | _ON_ONE_LINE | _IN_CELL, _BLOCK))


# --- what stands in a line --------------------------------------------------------------------------------------------


def _mark(mark: str, end: str) -> Callable:
    def convert(element: etree._Element, parent: str, where: int) -> str:
        text = _inside(element, element.tag, where, _INLINE)
        return text if where & _IN_CODE else syntax.enclose(text, mark, end)

    return convert


def _code_span(element: etree._Element, parent: str, where: int) -> str:
    text = _inside(element, "code", where | _IN_CODE, _INLINE)
    return text if where & _IN_CODE or not text else syntax.code_span(text)


def _link(element: etree._Element, parent: str, where: int) -> str:
    text = _inside(element, "a", where, _INLINE)
    return text if where & _IN_CODE else syntax.link(element, text)


def _line_break(element: etree._Element, parent: str, where: int) -> str:
    if where & _IN_CODE:
        return " "
    if where & _IN_CELL:
        return "<br>"
    return " " if where & _ON_ONE_LINE else "  \n"


def _image(element: etree._Element, parent: str, where: int) -> str:
    return syntax.image(element)


def _checkbox(element: etree._Element, parent: str, where: int) -> str:
    return syntax.checkbox(element)


def _formula(element: etree._Element, parent: str, where: int) -> str:
    if len(element):
        raise _NotOurs
    display = element.get("display") is not None and not where & _ON_ONE_LINE
    return syntax.formula(element.text or "", display)


_BOLD, _ITALIC, _DELETED = _mark("**", "**"), _mark("*", "*"), _mark("~~", "~~")
_CONVERTERS = {
    "p": (_paragraph, _BLOCK),
    "li": (_item, _BLOCK),
    "ul": (_list, _BLOCK),
    "ol": (_list, _BLOCK),
    "pre": (_code_block, _BLOCK),
    "div": (_division, _BLOCK),
    "section": (_division, _BLOCK),
    "article": (_division, _BLOCK),
    "blockquote": (_quotation, _BLOCK),
    "table": (_table, _BLOCK),
    "tr": (_row, _BLOCK),
    "td": (_cell, _BLOCK),
    "th": (_cell, _BLOCK),
    "hr": (_rule, _RULE),
    **{f"h{level}": (_heading(level), _BLOCK) for level in range(1, 7)},
    "code": (_code_span, _INLINE),
    "strong": (_BOLD, _INLINE),
    "b": (_BOLD, _INLINE),
    "em": (_ITALIC, _INLINE),
    "i": (_ITALIC, _INLINE),
    "del": (_DELETED, _INLINE),
    "s": (_DELETED, _INLINE),
    "strike": (_DELETED, _INLINE),
    "sub": (_mark("<sub>", "</sub>"), _INLINE),
    "sup": (_mark("<sup>", "</sup>"), _INLINE),
    "a": (_link, _INLINE),
    "br": (_line_break, _INLINE),
    "img": (_image, _INLINE),
    "input": (_checkbox, _INLINE),
    "tex": (_formula, _INLINE),
}
