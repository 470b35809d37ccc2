"""The HTML of a ChatGPT page to the markdown that the model wrote.

    html_to_markdown('<div class="markdown prose"><p>Run <code>make</code>.</p></div>')  ->  "Run `make`."

Two steps. `tidy` brings the page's tree to plain HTML first: buttons and icons go, the five shapes that code blocks
had between 2022 and 2024 become `pre > code`, a formula that the page states up to three times (MathML, TeX, glyphs)
becomes its TeX. `PageConverter`, a markdownify converter, then writes markdown from a tree that holds only what was
said; where it holds no tag that is new to it, `cleaning.html.fast_markdown` writes the same in an eighth of the time. Nothing is
cleaned after the conversion: by then code and chrome look alike, and every pattern that removes one damages the other.
Code is copied, never rewritten (its line ends become "\\n", as in any HTML parser).

What the page does not say cannot come back: `*` or `_` for emphasis, `-` or `*` for bullets, `$` or `\\(` for
formulas, whether a blank line stood between a paragraph and the list nested below it (none is written: 77 of 86 such
places in real answers had none), nor the number at which a list went on behind a code block where an early page showed
"1." again (then that is written; later pages say `<ol start="2">`).
"""

import re
from collections.abc import Iterator

from bs4 import BeautifulSoup
from bs4.element import PageElement, Tag
from lxml import etree
from markdownify import ATX, MarkdownConverter

from cleaning.html import fast_markdown as walker
from cleaning.html import syntax

# One for all answers: a new one costs 2 µs of an answer's 20, and it keeps no more than 100 lines of its error log of
# what it read (a process had the same 19 MB after 50 MB of text). Not lxml.html's: that one looks up a class per element.
_PARSER = etree.HTMLParser(encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True)

# If the parser gave up before the end (libxml2 does so silently at depth 2,048), this element is missing from the tree.
_END = "end-of-answer"

_CHROME = ("svg", "button", "script", "style", "noscript")  # what the page shows around an answer
_WRAPPERS = ("span", "font", "main", "center", "nobr", "label", "tbody", "thead", "tfoot", "colgroup")
_TAGS = """
    a abbr acronym address annotation article aside audio b bdi bdo big blockquote br caption cite code col colgroup dd
    del details dfn div dl dt em fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 header hr i iframe img input
    ins kbd label legend li mark math nav ol optgroup option p picture pre q s samp section select semantics small
    source span strike strong sub summary sup table tbody td template textarea tex tfoot th thead time tr tt u ul var
    video wbr
"""
_KNOWN_TAGS = frozenset(_TAGS.split())
_BLOCK_TAGS = """
    [document] address article aside blockquote caption dd details div dl dt figcaption figure footer h1 h2 h3 h4 h5 h6
    header hr li ol p pre section summary table td th tr ul
"""
_BLOCKS = frozenset(_BLOCK_TAGS.split())
_FORMULA_CLASSES = frozenset(("katex", "katex-display", "math-inline", "math-display"))
_COPY_LABELS = ("Copy code", "CopyEdit")  # a button's text, left behind where a sanitiser took the button's tag
_NO_LANGUAGE = "plaintext"  # how later pages label a block that the model gave no language
# What another browser extension wrote under each answer. Not after a control character: lxml would not take the rest.
_FOOTER = re.compile(r"([^\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]*)Copy\d+ chars / \d+ words\s*$")


def html_to_markdown(html: str, *, reference: bool = False) -> str:
    """Markdown of one answer, without leading or trailing blank lines.

    `html` holds no lone surrogates (`fastft.common.records.repair_text`). `reference` keeps the fast path out. Raises
    ValueError for HTML that is nested too deeply or that ends inside a tag or comment.
    """
    root = parse(html)
    tidy(root)
    if "chars /" in html:
        _remove_footer(root)
    markdown = None if reference else walker.to_markdown(root)
    if markdown is None:
        markdown = PageConverter().convert_soup(_soup(root, html))
    return markdown.strip(" \t\r\n")


def parse(html: str) -> etree._Element:
    """The tree of `html`, its root a `body`. Raises ValueError when the parser did not reach the end."""
    tree = etree.fromstring(f"<html><body>{html}<{_END}></{_END}></body></html>".encode(), _PARSER)
    body, *ends = tree.iter("body", _END)
    if not ends:
        raise ValueError("the HTML is nested deeper than the parser follows, or ends inside a tag or comment")
    ends[-1].getparent().remove(ends[-1])
    return body


def tidy(root: etree._Element) -> None:
    """Turn the page's tree into plain HTML, in place.

    Works by renaming, moving and lxml's own strip functions: assigning text would refuse the control characters
    (terminal colours, for example) that code may hold.
    """
    etree.strip_elements(root, *_CHROME, with_tail=False)
    found = list(root.iter("annotation", "pre"))  # a pass over the tree costs 2 to 4 µs an answer
    for element in found:
        if element.get("encoding") == "application/x-tex":
            _collapse_formula(element)
    etree.strip_tags(root, *_WRAPPERS)
    for element in found:
        if element.tag == "pre":
            _collapse_code_block(element)


def _collapse_formula(source: etree._Element) -> None:
    """Put `<tex>` or `<tex display>`, which holds only `source`, in the place of the outermost formula around it."""
    formula, display = None, False
    for ancestor in source.iterancestors():
        classes = _FORMULA_CLASSES.intersection(ancestor.get("class", "").split())
        if classes and ancestor.tag != "body":
            formula, display = ancestor, display or bool(classes & {"katex-display", "math-display"})
    if formula is None:
        return
    formula.clear(keep_tail=True)
    formula.append(source)
    formula.tag, source.tag, source.tail = "tex", "span", None
    if display:
        formula.set("display", "")


def _collapse_code_block(pre: etree._Element) -> None:
    """`pre > header + div > code` -> `pre > code`, the language noted on the `pre`."""
    codes = list(pre.iter("code"))
    if len(codes) != 1:
        return
    code = codes[0]
    header = "".join(_text_outside(pre, code)).strip()
    is_label = code.getparent() is not pre or header.endswith(_COPY_LABELS) or not header
    for label in _COPY_LABELS:
        header = header.removesuffix(label).rstrip()
    names = code.get("class", "").replace("`", "").split()
    named = [name.removeprefix("language-") for name in names if name.startswith("language-")]
    language = named[0] if named else header
    if not is_label or "`" in header or len(header) > 40 or not (header + language).isprintable():
        return  # no header of the page: the block's own text stands beside its <code>
    pre.text = None
    for child in list(pre):
        pre.remove(child)
    pre.append(code)
    code.tail = None
    pre.set("language", "" if language == _NO_LANGUAGE else language)


def _text_outside(pre: etree._Element, code: etree._Element) -> Iterator[str]:
    inside = set(code.iter())
    for element in pre.iter():
        if element not in inside and element.text:
            yield element.text
        if element is not pre and (element is code or element not in inside) and element.tail:
            yield element.tail


def _remove_footer(root: etree._Element) -> None:
    for element in root.iter():
        if (found := _FOOTER.match(element.text or "")) and not _in_code(element):
            element.text = found[1]
        if (found := _FOOTER.match(element.tail or "")) and not _in_code(element.getparent()):
            element.tail = found[1]


def _in_code(element: etree._Element) -> bool:
    return element.tag in ("pre", "code") or any(True for _ in element.iterancestors("pre", "code"))


def _soup(root: etree._Element, html: str) -> BeautifulSoup:
    """The tree as markdownify needs it, without a second parse.

    Unknown tags (`List<String>`, where a page did not escape an answer's angle brackets) stay as the text they are in
    `html`. Raises ValueError beyond MAX_DEPTH.
    """
    soup = BeautifulSoup("", "html.parser")
    soup.reset()
    depth, code_block, numbers = 0, None, {}
    for event, element in etree.iterwalk(root, events=("start", "end")):
        tag, start = element.tag, event == "start"
        if code_block is not None and element is not code_block:
            if tag == "br" and start:
                soup.handle_data("\n")
            elif tag not in _KNOWN_TAGS:
                soup.handle_data(_literal_tag(element, html, start))
        elif tag not in _KNOWN_TAGS and element is not root:
            soup.handle_data(_literal_tag(element, html, start))
        elif _is_kept(element):
            if tag == "pre":
                code_block = element if start else None
            depth += 1 if start else -1
            if depth > walker.MAX_DEPTH:
                raise ValueError(f"the HTML is nested more than {walker.MAX_DEPTH} levels deep")
            if start:
                soup.handle_starttag(tag, None, None, _attributes(element, numbers))
            else:
                soup.handle_endtag(tag)
        text = element.text if start else element.tail
        if text and (start or element is not root):
            soup.handle_data(text)
    soup.endData()
    return soup


def _is_kept(element: etree._Element) -> bool:
    """False for the root and for a `div` that is all its parent `div` holds (1,000 of them are one)."""
    parent = element.getparent()
    if parent is None or element.tag == "body":
        return False
    if element.tag != "div" or parent.tag not in ("div", "body"):
        return True
    alone = element.getprevious() is None and element.getnext() is None
    return not (alone and not (parent.text or "").strip() and not (element.tail or "").strip())


def _literal_tag(element: etree._Element, html: str, start: bool) -> str:
    """The tag as text, in the capitals that `html` has; no end tag where `html` has none."""
    opening = "<" if start else "</"
    written = re.search(re.escape(opening + element.tag), html, re.IGNORECASE)
    if written is None:
        return "" if not start else f"<{element.tag}>"
    attributes = "".join(f' {name}="{value}"' if value else f" {name}" for name, value in element.attrib.items())
    return f"{written.group()}{attributes if start else ''}>"


def _attributes(element: etree._Element, numbers: dict) -> dict[str, str]:
    """The element's attributes; an item of an ordered list gets its number as `value`."""
    attributes = {str(name): value for name, value in element.attrib.items()}
    if element.tag == "ol":
        numbers[element] = syntax.first_number(element)
    if element.tag == "li":
        parent = next((a for a in element.iterancestors() if a.tag in _KNOWN_TAGS), None)
        if parent in numbers:
            attributes["value"] = str(numbers[parent])
            numbers[parent] += 1
    return attributes


class PageConverter(MarkdownConverter):
    """markdownify for trees from `tidy`: nothing is escaped, code is verbatim, tables and lists are GitHub's.

    Each `convert_<tag>(element, text, parent_tags)` gets the markdown of the children and returns the element's. This
    is the reference: `cleaning.html.fast_markdown` writes the same, and what is not in the walker's table comes here.
    """

    class Options(MarkdownConverter.DefaultOptions):
        heading_style = ATX
        bullets = "-"

    def process_text(self, el: PageElement, parent_tags: set[str] | None = None) -> str:
        """A text node: as it is in code; elsewhere line ends lose the spaces around them."""
        text = str(el)
        if "pre" in (parent_tags or ()):
            return text
        text = syntax.fold_lines(text)
        if _is_block(el.previous_sibling) or (el.previous_sibling is None and _is_block(el.parent)):
            text = text.lstrip(" \t\n")
        if _is_block(el.next_sibling) or (el.next_sibling is None and _is_block(el.parent)):
            text = text.rstrip(" \t\n")
        return text

    def convert_a(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return text if "_noformat" in parent_tags else syntax.link(el, text)

    def convert_br(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        if "_noformat" in parent_tags:
            return " "
        if parent_tags & {"td", "th"}:
            return "<br>"
        return " " if "_inline" in parent_tags else "  \n"

    def convert_code(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return text if "_noformat" in parent_tags or not text else syntax.code_span(text)

    convert_kbd = convert_samp = convert_tt = convert_code

    def convert_pre(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        code = el.get_text()
        if parent_tags & {"td", "th"}:
            return syntax.code_block_in_cell(code)
        return _close_to_nested_list(el, syntax.code_block(code, el.get("language", "")))

    def convert_tex(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return syntax.formula(el.get_text(), display=el.get("display") is not None and "_inline" not in parent_tags)

    def convert_div(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        text = text.strip(" \t\r\n")
        if "_inline" in parent_tags:
            return f" {text} "
        return f"\n\n{text}\n\n" if text else ""

    convert_article = convert_section = convert_dl = convert_figure = convert_div
    convert_address = convert_details = convert_summary = convert_header = convert_footer = convert_aside = convert_div

    def convert_p(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return _close_to_nested_list(el, self.convert_div(el, text, parent_tags))

    def convert_img(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return syntax.image(el)

    def convert_input(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return syntax.checkbox(el)

    def convert_list(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        text = text.strip("\n")
        if not text:
            return ""
        if el.parent.name == "li":
            # Text after a nested list would be read as part of its last item without a blank line.
            return f"\n{text}\n" if _next_content(el) is None else f"\n{text}\n\n"
        return f"\n\n{text}\n\n"

    convert_ul = convert_ol = convert_list

    def convert_li(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        bullet = f"{el['value']}. " if el.parent.name == "ol" else "- "
        is_loose = any(getattr(child, "name", None) == "p" for child in el.children)
        return syntax.list_item(bullet, text, is_loose)

    def convert_td(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return syntax.cell(el, text)

    convert_th = convert_td

    def convert_tr(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        table = el.find_parent("table")
        cells = el.find_all(["td", "th"], recursive=False)
        is_first = table is None or table.find("tr") is el
        return syntax.row(cells, text, is_first, is_header=all(cell.name == "th" for cell in cells))


def _mark(mark: str, end: str):
    """A converter for what stands between two marks."""

    def convert(self: PageConverter, el: Tag, text: str, parent_tags: set[str]) -> str:
        return text if "_noformat" in parent_tags else syntax.enclose(text, mark, end)

    return convert


PageConverter.convert_b = PageConverter.convert_strong = _mark("**", "**")
PageConverter.convert_i = PageConverter.convert_em = _mark("*", "*")
PageConverter.convert_del = PageConverter.convert_s = PageConverter.convert_strike = _mark("~~", "~~")
PageConverter.convert_sub, PageConverter.convert_sup = _mark("<sub>", "</sub>"), _mark("<sup>", "</sup>")


def _is_block(node: PageElement | None) -> bool:
    return isinstance(node, Tag) and node.name in _BLOCKS


def _next_content(el: Tag) -> PageElement | None:
    """The next sibling that is not white space."""
    sibling = el.next_sibling
    while sibling is not None and not isinstance(sibling, Tag) and not str(sibling).strip():
        sibling = sibling.next_sibling
    return sibling


def _close_to_nested_list(el: Tag, text: str) -> str:
    """One line end after a block of a list item when a nested list follows; two elsewhere."""
    nested = el.parent.name == "li" and getattr(_next_content(el), "name", None) in ("ul", "ol")
    return text.removesuffix("\n") if nested else text
