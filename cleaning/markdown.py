"""The HTML of a ChatGPT page to the markdown that the model wrote.

    html_to_markdown('<div class="markdown prose"><p>Run <code>make</code>.</p></div>')  ->  "Run `make`."

Two steps. `tidy` brings the page's tree to plain HTML first: buttons and icons go, the five shapes that code blocks
had between 2022 and 2024 become `pre > code`, a formula that the page states up to three times (MathML, TeX, glyphs)
becomes its TeX. `PageConverter`, a markdownify converter, then writes markdown from a tree that holds only what was
said. Nothing is cleaned after the conversion: by then code and chrome look alike, and every pattern that removes one
damages the other. Code is copied, never rewritten (its line ends become "\\n", as in any HTML parser).

What the page does not say cannot come back: `*` or `_` for emphasis, `-` or `*` for bullets, `$` or `\\(` for
formulas, whether a blank line stood between a paragraph and the list nested below it (none is written: 77 of 86 such
places in real answers had none).
"""

import re
from collections.abc import Iterator

import lxml.html
from bs4 import BeautifulSoup
from bs4.element import PageElement, Tag
from lxml import etree
from markdownify import ATX, MarkdownConverter

# markdownify descends by recursion, three Python frames a level, and Python stops at 1,000 frames.
MAX_DEPTH = 150

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
_COPY_LABELS = ("Copy code", "CopyEdit")  # a button's text, left behind where a sanitiser took the button's tag
_FOOTER = re.compile(r"Copy\d+ chars / \d+ words\s*$")  # what another browser extension wrote under each answer
_LINE_END = re.compile(r"[ \t\r]*\n[ \t\r\n]*")
_BACKTICKS = re.compile(r"`+")
_ALIGNMENT = {"left": ":---", "right": "---:", "center": ":---:"}


def html_to_markdown(html: str) -> str:
    """Markdown of one answer, without leading or trailing blank lines.

    `html` holds no lone surrogates (`fastft.records.repair_text`). Raises ValueError for HTML that is nested too deeply
    or that ends inside a tag or comment.
    """
    root = parse(html)
    tidy(root)
    return PageConverter().convert_soup(_soup(root, html)).strip(" \t\r\n")


def parse(html: str) -> etree._Element:
    """The tree of `html`, its root a `body`. Raises ValueError when the parser did not reach the end."""
    # A parser of its own per answer: lxml's parsers keep the last error log and, with it, the memory of big documents.
    parser = lxml.html.HTMLParser(encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True)
    document = f"<html><body>{html}<{_END}></{_END}></body></html>"
    tree = lxml.html.document_fromstring(document.encode(), parser=parser)
    end = next(tree.iter(_END), None)
    if end is None:
        raise ValueError("the HTML is nested deeper than the parser follows, or ends inside a tag or comment")
    body = tree.find("body")
    assert body is not None
    etree.strip_elements(body, _END, with_tail=False)
    return body


def tidy(root: etree._Element) -> None:
    """Turn the page's tree into plain HTML, in place.

    Works by renaming, moving and lxml's own strip functions: assigning text would refuse the control characters
    (terminal colours, for example) that code may hold.
    """
    etree.strip_elements(root, *_CHROME, with_tail=False)
    for element in root.xpath(".//*[contains(@class, 'katex') or contains(@class, 'math')]"):
        _collapse_formula(element)
    for pre in list(root.iter("pre")):
        _collapse_code_block(pre)
    etree.strip_tags(root, *_WRAPPERS)
    _remove_footer(root)


def _collapse_formula(element: etree._Element) -> None:
    """Leave of a KaTeX or `math` element its TeX source, as `<tex>` or `<tex display>`."""
    classes = set(element.get("class", "").split())
    if not classes & {"katex", "katex-display", "math-inline", "math-display"}:
        return
    source = next((a for a in element.iter("annotation") if a.get("encoding") == "application/x-tex"), None)
    if source is None:  # inside a formula that is collapsed already, or a formula without its source
        return
    display = classes & {"katex-display", "math-display"} or source.xpath(
        "boolean(ancestor::*[contains(@class, 'katex-display')])"
    )
    element.clear(keep_tail=True)
    element.append(source)
    source.tag, source.tail = "span", None
    element.tag = "tex"
    if display:
        element.set("display", "")


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
    if not is_label or "\n" in header or "`" in header or len(header) > 40:
        return  # no header of the page: the block's own text stands beside its <code>
    names = code.get("class", "").replace("`", "").split()
    named = [name.removeprefix("language-") for name in names if name.startswith("language-")]
    pre.text = None
    for child in list(pre):
        pre.remove(child)
    pre.append(code)
    code.tail = None
    pre.set("language", named[0] if named else header)


def _text_outside(pre: etree._Element, code: etree._Element) -> Iterator[str]:
    inside = set(code.iter())
    for element in pre.iter():
        if element not in inside and element.text:
            yield element.text
        if element is not pre and (element is code or element not in inside) and element.tail:
            yield element.tail


def _remove_footer(root: etree._Element) -> None:
    for element in root.iter():
        if element.text and _FOOTER.search(element.text) and not _in_code(element):
            element.text = _FOOTER.sub("", element.text)
        if element.tail and _FOOTER.search(element.tail) and not _in_code(element.getparent()):
            element.tail = _FOOTER.sub("", element.tail)


def _in_code(element: etree._Element) -> bool:
    return element.tag in ("pre", "code") or any(True for _ in element.iterancestors("pre", "code"))


def _soup(root: etree._Element, html: str) -> BeautifulSoup:
    """The tree as markdownify needs it, without a second parse.

    Unknown tags (`List<String>`, where a page did not escape an answer's angle brackets) stay as the text they are in
    `html`. Raises ValueError beyond MAX_DEPTH.
    """
    soup = BeautifulSoup("", "html.parser")
    soup.reset()
    depth, in_code, numbers = 0, False, {}
    for event, element in etree.iterwalk(root, events=("start", "end")):
        tag, start = element.tag, event == "start"
        if in_code and tag != "pre":
            if tag == "br" and start:
                soup.handle_data("\n")
        elif tag not in _KNOWN_TAGS and element is not root:
            soup.handle_data(_literal_tag(element, html, start))
        elif _is_kept(element):
            in_code = tag == "pre" and start
            depth += 1 if start else -1
            if depth > MAX_DEPTH:
                raise ValueError(f"the HTML is nested more than {MAX_DEPTH} levels deep")
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
        start = attributes.get("start", "")
        numbers[element] = int(start) if re.fullmatch("[0-9]{1,8}", start) else 1
    if element.tag == "li":
        parent = next((a for a in element.iterancestors() if a.tag in _KNOWN_TAGS), None)
        if parent in numbers:
            attributes["value"] = str(numbers[parent])
            numbers[parent] += 1
    return attributes


class PageConverter(MarkdownConverter):
    """markdownify for trees from `tidy`: nothing is escaped, code is verbatim, tables and lists are GitHub's.

    Each `convert_<tag>(element, text, parent_tags)` gets the markdown of the children and returns the element's.
    """

    class Options(MarkdownConverter.DefaultOptions):
        heading_style = ATX
        bullets = "-"
        sub_symbol = "<sub>"
        sup_symbol = "<sup>"

    def process_text(self, el: PageElement, parent_tags: set[str] | None = None) -> str:
        """A text node: as it is in code; elsewhere line ends lose the spaces around them."""
        parent_tags = parent_tags or set()
        text = str(el)
        if "pre" in parent_tags:
            return text
        text = _LINE_END.sub("\n", text)
        if _is_block(el.previous_sibling) or (el.previous_sibling is None and _is_block(el.parent)):
            text = text.lstrip(" \t\n")
        if _is_block(el.next_sibling) or (el.next_sibling is None and _is_block(el.parent)):
            text = text.rstrip(" \t\n")
        if parent_tags & {"td", "th"}:
            text = text.replace("|", "\\|")
        return text

    def convert_a(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        if "_noformat" in parent_tags or not el.get("href") or not text.strip():
            return text
        before, text, after = _split_spaces(text)
        title = el.get("title")
        if text == el["href"] and not title:
            return f"{before}{text}{after}"  # the page makes links of bare addresses
        quoted = ' "' + title.replace('"', '\\"') + '"' if title else ""
        return f"{before}[{text}]({el['href']}{quoted}){after}"

    def convert_br(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        if parent_tags & {"td", "th"}:
            return "<br>"
        return " " if "_inline" in parent_tags else "  \n"

    def convert_code(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """A code span. Its delimiter is longer than any run of backticks inside; spaces only where they are needed."""
        if "_noformat" in parent_tags or not text:
            return text
        text = text.replace("\n", " ")
        delimiter = "`" * (_longest_run(text) + 1)
        padding = " " if text[0] == "`" or text[-1] == "`" or (text[0] == text[-1] == " " and text.strip()) else ""
        return f"{delimiter}{padding}{text}{padding}{delimiter}"

    convert_kbd = convert_samp = convert_tt = convert_code

    def convert_pre(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """A fenced block; in a table cell, where no block can stand, one code span a line."""
        code = el.get_text()
        if parent_tags & {"td", "th"}:
            lines = code.rstrip("\n").replace("|", "\\|").split("\n")
            return "<br>".join(f"`{line}`" if line else "" for line in lines)
        fence = "`" * max(3, _longest_run(code) + 1)
        line_end = "" if not code or code.endswith("\n") else "\n"
        return _close_to_nested_list(el, f"\n\n{fence}{el.get('language', '')}\n{code}{line_end}{fence}\n\n")

    def convert_tex(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        tex = el.get_text().strip()
        if el.get("display") is None or "_inline" in parent_tags:
            return f"${tex}$"
        return f"\n\n$$\n{tex}\n$$\n\n"

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
        title = el.get("title")
        quoted = ' "' + title.replace('"', '\\"') + '"' if title else ""
        return f"![{el.get('alt', '')}]({el.get('src', '')}{quoted})"

    def convert_input(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """The box of a task list."""
        if el.get("type") != "checkbox":
            return text
        return "[x]" if el.get("checked") is not None else "[ ]"

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
        text = text.strip(" \t\n")
        bullet = f"{el['value']}. " if el.parent.name == "ol" else "- "
        lines = text.split("\n")
        indent = " " * len(bullet)
        text = "\n".join([bullet + lines[0], *(indent + line if line else "" for line in lines[1:])]).rstrip(" ")
        loose = any(getattr(child, "name", None) == "p" for child in el.children)
        return f"\n\n{text}\n\n" if loose else f"\n{text}\n"

    def convert_td(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return " " + text.strip(" \t\n").replace("\n", " ") + " |" * _span(el)

    convert_th = convert_td

    def convert_tr(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """A row; under the first the rule that makes it a table (a table without header gets an empty one)."""
        row = f"|{text}\n"
        table = el.find_parent("table")
        if table is not None and table.find("tr") is not el:
            return row
        cells = el.find_all(["td", "th"], recursive=False)
        rules = [rule for cell in cells for rule in [_alignment(cell)] * _span(cell)]
        rule = "| " + " | ".join(rules) + " |\n"
        if all(cell.name == "th" for cell in cells):
            return row + rule
        return "|" + "  |" * len(rules) + "\n" + rule + row


def _emphasis(mark: str):
    """A converter for an inline mark; spaces and line ends at its borders move outside, where markdown wants them."""

    def convert(self: PageConverter, el: Tag, text: str, parent_tags: set[str]) -> str:
        if "_noformat" in parent_tags or not text.strip():
            return text
        before, text, after = _split_spaces(text)
        return f"{before}{mark}{text}{mark}{after}"

    return convert


PageConverter.convert_b = PageConverter.convert_strong = _emphasis("**")
PageConverter.convert_i = PageConverter.convert_em = _emphasis("*")
PageConverter.convert_del = PageConverter.convert_s = PageConverter.convert_strike = _emphasis("~~")


def _split_spaces(text: str) -> tuple[str, str, str]:
    """(leading white space, text, trailing white space)"""
    stripped = text.strip()
    start = text.index(stripped)
    return text[:start], stripped, text[start + len(stripped) :]


def _longest_run(text: str) -> int:
    return max((len(run) for run in _BACKTICKS.findall(text)), default=0)


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


def _span(cell: Tag) -> int:
    span = str(cell.get("colspan", ""))
    return min(1000, max(1, int(span))) if re.fullmatch("[0-9]{1,4}", span) else 1


def _alignment(cell: Tag) -> str:
    style = re.search(r"text-align:\s*(left|right|center)", str(cell.get("style", "")))
    return _ALIGNMENT.get(style.group(1) if style else str(cell.get("align", "")), "---")
