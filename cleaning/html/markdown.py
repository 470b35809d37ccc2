"""Convert the HTML of a ChatGPT page to the markdown that the model wrote.

    html_to_markdown('<div class="markdown prose"><p>Run <code>make</code>.</p></div>')  ->  "Run `make`."

The conversion has two steps. `tidy` reduces the page's tree to plain HTML: it removes buttons and icons, turns the five
shapes that code blocks had between 2022 and 2024 into `pre > code`, and replaces a formula, which the page states up to
three times (as MathML, TeX and glyphs), by its TeX. The tree then holds only what was said, and is written as markdown:
by `cleaning.html.fast_markdown` where that knows every tag of the tree, and otherwise by `PageConverter`, a markdownify
converter, which is the reference and takes eight times as long.

Nothing is cleaned after the conversion: by then code and the page's controls look alike, and every pattern that removes
one damages the other. Code is copied and never rewritten; only its line ends become "\\n", as in any HTML parser.

Some of the original markdown is lost, because the page does not show it:

- whether emphasis was written with `*` or `_`, bullets with `-` or `*`, and formulas with `$` or `\\(`;
- whether there was a blank line between a paragraph and the list nested below it (none is written: 77 of 86 such places
  in real answers had none);
- the number at which a list continued after a code block, where an early page showed "1." again (then "1." is written;
  later pages say `<ol start="2">`).
"""

import re
from collections.abc import Iterator

from bs4 import BeautifulSoup
from bs4.element import PageElement, Tag
from lxml import etree
from markdownify import ATX, MarkdownConverter

from cleaning.html import fast_markdown, syntax

# One parser serves all answers, because creating one takes 2 of the 20 µs that an answer takes. Of what it has read, it
# keeps only 100 lines of error log (a process still had 19 MB after 50 MB of text). lxml.html's parser is slower: it looks
# up a class for every element.
_PARSER = etree.HTMLParser(encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True)

# This element is added after the text. If the tree lacks it, the parser stopped early, as libxml2 silently does at a depth
# of 2,048.
_END = "end-of-answer"

_CONTROLS = ("svg", "button", "script", "style", "noscript")  # elements that the page adds to an answer
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
_COPY_LABELS = ("Copy code", "CopyEdit")  # the text of a button, which stays where a sanitiser removed only its tag
_NO_LANGUAGE = "plaintext"  # the label that later pages give to a block for which the model named no language
# The line that another browser extension wrote under each answer. It stays where a control character precedes it, because
# lxml refuses to assign a text with such a character, and so the line could not be removed.
_FOOTER = re.compile(r"([^\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]*)Copy\d+ chars / \d+ words\s*$")


class UnreadableHtml(Exception):  # noqa: N818  a property of the input, which rejects one record and not the run
    """The HTML cannot be read as a whole: it is nested too deeply, or it ends inside a tag or comment."""


def html_to_markdown(html: str, *, reference: bool = False) -> str:
    """Return the markdown of one answer, without leading or trailing blank lines.

    `html` must hold no lone surrogates (see `fastft.common.records.repair_text`). With `reference`, the fast converter is
    not used. Raises UnreadableHtml.
    """
    root = parse(html)
    tidy(root)
    if "chars /" in html:
        _remove_footer(root)
    markdown = None if reference else fast_markdown.to_markdown(root)
    if markdown is None:
        markdown = PageConverter().convert_soup(_soup(root, html))
    return markdown.strip(" \t\r\n")


def parse(html: str) -> etree._Element:
    """Parse `html` into a tree whose root is a `body`. Raises UnreadableHtml if the parser did not reach the end."""
    tree = etree.fromstring(f"<html><body>{html}<{_END}></{_END}></body></html>".encode(), _PARSER)
    body, *ends = tree.iter("body", _END)
    if not ends:
        raise UnreadableHtml("the HTML is nested deeper than the parser follows, or ends inside a tag or comment")
    ends[-1].getparent().remove(ends[-1])
    return body


def tidy(root: etree._Element) -> None:
    """Turn the page's tree into plain HTML, in place.

    Elements are renamed, moved, or removed by lxml's strip functions, but text is never assigned: lxml refuses to assign
    the control characters (terminal colours, for example) that code may hold.
    """
    etree.strip_elements(root, *_CONTROLS, with_tail=False)
    found = list(root.iter("annotation", "pre"))  # in one pass, because a pass takes 2 to 4 µs for each answer
    for element in found:
        if element.get("encoding") == "application/x-tex":
            _collapse_formula(element)
    etree.strip_tags(root, *_WRAPPERS)
    for element in found:
        if element.tag == "pre":
            _collapse_code_block(element)


def _collapse_formula(source: etree._Element) -> None:
    """Replace the outermost formula around `source`, its TeX, by a `<tex>` or `<tex display>` that holds only `source`."""
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
    """Turn `pre > header + div > code` into `pre > code`, with the language as an attribute of the `pre`."""
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
        return  # the text beside the <code> is not a header of the page and belongs to the block
    pre.text = None
    for child in list(pre):
        pre.remove(child)
    pre.append(code)
    code.tail = None
    pre.set("language", "" if language == _NO_LANGUAGE else language)


def _text_outside(pre: etree._Element, code: etree._Element) -> Iterator[str]:
    """Yield the texts inside `pre` that are not inside `code`."""
    inside = set(code.iter())
    for element in pre.iter():
        if element not in inside and element.text:
            yield element.text
        if element is not pre and (element is code or element not in inside) and element.tail:
            yield element.tail


def _remove_footer(root: etree._Element) -> None:
    """Remove the extension's line (_FOOTER) from the end of every text outside code."""
    for element in root.iter():
        if (found := _FOOTER.match(element.text or "")) and not _in_code(element):
            element.text = found[1]
        if (found := _FOOTER.match(element.tail or "")) and not _in_code(element.getparent()):
            element.tail = found[1]


def _in_code(element: etree._Element) -> bool:
    return element.tag in ("pre", "code") or any(True for _ in element.iterancestors("pre", "code"))


def _soup(root: etree._Element, html: str) -> BeautifulSoup:
    """Build the Beautiful Soup tree that markdownify needs from lxml's, without parsing a second time.

    Unknown tags become text again, spelled as in `html`, because they come from pages that did not escape the angle
    brackets of an answer (`List<String>`). Raises UnreadableHtml for a tree that is deeper than MAX_DEPTH.
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
            if depth > fast_markdown.MAX_DEPTH:
                raise UnreadableHtml(f"the HTML is nested more than {fast_markdown.MAX_DEPTH} levels deep")
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
    """Tell whether the element is copied into the soup. The root is not, nor is a `div` that is the only content of its
    parent `div`: otherwise 1,000 nested `div`s would count as 1,000 levels of nesting.
    """
    parent = element.getparent()
    if parent is None or element.tag == "body":
        return False
    if element.tag != "div" or parent.tag not in ("div", "body"):
        return True
    alone = element.getprevious() is None and element.getnext() is None
    return not (alone and not (parent.text or "").strip() and not (element.tail or "").strip())


def _literal_tag(element: etree._Element, html: str, start: bool) -> str:
    """Return the tag as text, in upper or lower case as in `html`; "" for an end tag that `html` does not have."""
    opening = "<" if start else "</"
    written = re.search(re.escape(opening + element.tag), html, re.IGNORECASE)
    if written is None:
        return "" if not start else f"<{element.tag}>"
    attributes = "".join(f' {name}="{value}"' if value else f" {name}" for name, value in element.attrib.items())
    return f"{written.group()}{attributes if start else ''}>"


def _attributes(element: etree._Element, numbers: dict) -> dict[str, str]:
    """Return the element's attributes; an item of an ordered list gets its number as `value`.

    `numbers` holds the next number of each ordered list so far, and is updated.
    """
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
    """A markdownify converter for trees from `tidy`: it escapes nothing, copies code, and writes GitHub's tables and lists.

    Each `convert_<tag>(element, text, parent_tags)` gets the markdown of the element's children and returns that of the
    element. This is the reference: `cleaning.html.fast_markdown` must write the same, and leaves unknown tags to this class.
    """

    class Options(MarkdownConverter.DefaultOptions):
        heading_style = ATX
        bullets = "-"

    def process_text(self, el: PageElement, parent_tags: set[str] | None = None) -> str:
        """Return a text node unchanged in code; elsewhere without the spaces around its line ends."""
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
            # Without the blank line, text after a nested list would be read as part of the list's last item.
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


def _delimited(start: str, end: str):
    """Return a converter that writes the element's text between two delimiters."""

    def convert(self: PageConverter, el: Tag, text: str, parent_tags: set[str]) -> str:
        return text if "_noformat" in parent_tags else syntax.enclose(text, start, end)

    return convert


PageConverter.convert_b = PageConverter.convert_strong = _delimited("**", "**")
PageConverter.convert_i = PageConverter.convert_em = _delimited("*", "*")
PageConverter.convert_del = PageConverter.convert_s = PageConverter.convert_strike = _delimited("~~", "~~")
PageConverter.convert_sub, PageConverter.convert_sup = _delimited("<sub>", "</sub>"), _delimited("<sup>", "</sup>")


def _is_block(node: PageElement | None) -> bool:
    return isinstance(node, Tag) and node.name in _BLOCKS


def _next_content(el: Tag) -> PageElement | None:
    """Return the next sibling that is not white space."""
    sibling = el.next_sibling
    while sibling is not None and not isinstance(sibling, Tag) and not str(sibling).strip():
        sibling = sibling.next_sibling
    return sibling


def _close_to_nested_list(el: Tag, text: str) -> str:
    """Remove one line end after `text`, the markdown of `el`, if `el` is in a list item and a nested list follows it."""
    nested = el.parent.name == "li" and getattr(_next_content(el), "name", None) in ("ul", "ol")
    return text.removesuffix("\n") if nested else text
