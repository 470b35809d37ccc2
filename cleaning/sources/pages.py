"""Readers of pages saved as HTML files: a conversation on sharegpt.com, and a ChatGPT page saved from the browser.

A page of sharegpt.com carries its conversation as JSON in `script#__NEXT_DATA__`. A ChatGPT page has its conversation in the
elements that it shows: an assistant turn is a `.markdown` element, which is kept as HTML for the converter, and a user turn
is the text of a `.whitespace-pre-wrap` element. Since mid-2023 `data-message-author-role` says whose turn an element is; on
older pages only those two classes tell. A page shared under chat.openai.com/share also carries the tree of the official
export.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import lxml.html
from lxml import etree

from cleaning.sources.lists import read_sharegpt
from cleaning.sources.trees import read_chatgpt_export
from cleaning.sources.turns import ROLES_IN_DUMPS, RawConversation, Rejection, Turn, label, shown, text_of
from fastft.common.records import parse_json, repair_text

_NEXT_DATA = re.compile(r"<script\b[^<>]*\bid=[\"']?__NEXT_DATA__\b[^<>]*>(.*?)</script>", re.DOTALL)


def read_sharegpt_page(page: Any) -> RawConversation:
    """Read a page of sharegpt.com. The values stay as sharegpt.com stored them.

    Raises Rejection for a page without the conversation's JSON.
    """
    properties = _page_properties(_as_page(page))
    content = properties.get("content")
    if isinstance(content, str):
        content = _parsed(content)
    if not isinstance(content, dict):
        raise Rejection("not_a_conversation", "the page has no __NEXT_DATA__ with props.pageProps.content")
    conversation = read_sharegpt(content)
    conversation.id = text_of(properties.get("id")) or conversation.id
    return conversation


def read_chatgpt_page(page: Any, every_branch: bool = False) -> list[RawConversation]:
    """Read a ChatGPT page: the tree that it carries, or else the conversation that it shows. Raises Rejection."""
    page = _as_page(page)
    tree = _shared_tree(_page_properties(page))
    return read_chatgpt_export(tree, every_branch) if tree is not None else [_read_shown(page)]


def is_sharegpt_page(page: str) -> bool:
    """Tell whether a page comes from sharegpt.com."""
    return "content" in _page_properties(page)


def _as_page(page: Any) -> str:
    if not isinstance(page, str):
        raise Rejection("not_a_conversation", f"expected a page, found {shown(page)}")
    return page


def _page_properties(page: str) -> dict:
    """Return `props.pageProps` of the page's JSON, or {}."""
    found = _NEXT_DATA.search(page)
    value = _parsed(found[1]) if found else None
    for key in ("props", "pageProps"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _shared_tree(properties: dict) -> dict | None:
    """Return the tree of messages that a shared ChatGPT page carries."""
    response = properties.get("serverResponse")
    data = response.get("data") if isinstance(response, dict) else None
    return data if isinstance(data, dict) and isinstance(data.get("mapping"), dict) else None


def _parsed(text: str) -> Any:
    """Return the value of JSON, or None for text that is not JSON."""
    try:
        return parse_json(repair_text(text).encode())
    except (ValueError, RecursionError):
        return None


def _read_shown(page: str) -> RawConversation:
    """Read the conversation that a ChatGPT page shows."""
    root = _parse(page)
    conversation = RawConversation(_address_id(root), "", [])
    named = list(_outermost(root, lambda element: "data-message-author-role" in element.attrib))
    for element in named:
        _add_named_turn(element, conversation)
    if not named:  # a page from before mid-2023
        shown = _outermost(root, lambda element: _is_answer(element) or _is_question(element))
        conversation.turns = [_answer([e]) if _is_answer(e) else Turn("user", _text(e)) for e in shown]
    if not conversation.turns:
        raise Rejection("not_a_conversation", "the page shows no turns of a conversation that this reader knows")
    return conversation


def _outermost(root: etree._Element, wanted: Callable[[etree._Element], bool]) -> Iterator[etree._Element]:
    """Yield the wanted elements that are not inside another one, in the page's order."""
    walk = etree.iterwalk(root, events=("start",))
    for _, element in walk:
        if wanted(element):
            yield element
            walk.skip_subtree()


def _parse(page: str) -> etree._Element:
    parser = lxml.html.HTMLParser(encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True)
    try:
        return lxml.html.document_fromstring(repair_text(page).encode(), parser=parser)
    except etree.LxmlError as error:
        raise Rejection("not_a_conversation", f"the page is not readable HTML: {error}") from None


def _add_named_turn(element: etree._Element, conversation: RawConversation) -> None:
    """Add the turn of an element that names its author."""
    name = element.get("data-message-author-role", "")
    role = ROLES_IN_DUMPS.get(name.lower())
    if role not in ("user", "assistant"):
        conversation.notes[f"dropped {label(name)}"] += 1
        return
    conversation.model = text_of(element.get("data-message-model-slug")) or conversation.model
    if role == "assistant":
        answers = list(_outermost(element, _is_answer))
        conversation.turns.append(_answer(answers or [element]))
        return
    shown = [e for e in element.iter() if _has_class(e, "whitespace-pre-wrap")][:1]
    conversation.turns.append(Turn("user", _text(*shown or [element])))


def _is_answer(element: etree._Element) -> bool:
    return _has_class(element, "markdown")


def _is_question(element: etree._Element) -> bool:
    """Tell whether an element is a question and not, with the same class, a wrapper around an answer."""
    return _has_class(element, "whitespace-pre-wrap") and not any(map(_is_answer, element.iter()))


def _answer(elements: list[etree._Element]) -> Turn:
    # method="html" writes <br>, and never a self-closed <div/>, as a browser's outerHTML does.
    pieces = [etree.tostring(e, encoding="unicode", method="html", with_tail=False) for e in elements]
    return Turn("assistant", "".join(pieces), html=True)


def _text(element: etree._Element) -> str:
    for line_end in element.iter("br"):
        line_end.text = "\n"
    return "".join(element.itertext())


def _has_class(element: etree._Element, name: str) -> bool:
    return name in element.get("class", "").split()


def _address_id(root: etree._Element) -> str:
    """Return the conversation's id from the page's own address, where the browser saved that; else ""."""
    for address in root.xpath("//link[@rel='canonical']/@href | //meta[@property='og:url']/@content"):
        found = re.search(r"/(?:c|share|chat)/(?:e/)?([\w-]{8,})", address)
        if found:
            return found[1]
    return ""
