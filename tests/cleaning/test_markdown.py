"""HTML of the ChatGPT page becomes markdown: one golden case per construct, and code that is copied byte for byte."""

import html
import json
import re
import time

import pytest
from helpers.markdown_cases import CODE_BLOCKS, GOLDEN, UNREADABLE, page
from hypothesis import assume, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from cleaning.html.markdown import UnreadableHtml, html_to_markdown
from cleaning.sources.eras import looks_like_html
from cleaning.sources.formats import conversations_in


@pytest.mark.parametrize("name", GOLDEN)
def test_each_construct_becomes_its_markdown(name):
    source, expected = GOLDEN[name]
    assert html_to_markdown(page(source)) == expected


@pytest.mark.parametrize("shape", CODE_BLOCKS)
def test_a_code_block_of_any_shape_keeps_its_code(shape):
    block, language = CODE_BLOCKS[shape]
    code = '<span class="hljs-keyword">def</span> f(a_b):\n\n\n    <span>return</span> a_b &lt; 3\n'
    expected = f"a\n\n```{language}\ndef f(a_b):\n\n\n    return a_b < 3\n```\n\nb"
    assert html_to_markdown(page("<p>a</p>" + block % code + "<p>b</p>")) == expected


# Characters that a CommonMark parser reads back unchanged: it replaces NUL, and turns all line ends into "\n".
CODE = st.text(
    st.one_of(
        st.sampled_from("`~ \n\t<>&|*_#-\\$'\"x"),
        st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]),
    ),
    max_size=60,
)  # fmt: skip


@given(code=CODE, shape=st.sampled_from(sorted(CODE_BLOCKS)), where=st.sampled_from(["top", "item", "quote"]))
def test_code_is_verbatim(code, shape, where):
    block = CODE_BLOCKS[shape][0] % html.escape(code)
    wrapped = {
        "top": f"<p>a</p>{block}<p>b</p>",
        "item": f'<ol start="9"><li><p>a</p></li><li><p>b</p>{block}<p>c</p></li></ol>',
        "quote": f"<blockquote><p>a</p>{block}</blockquote>",
    }[where]
    fences = [t for t in MarkdownIt().parse(html_to_markdown(page(wrapped))) if t.type == "fence"]
    assert [t.content.removesuffix("\n") for t in fences] == [code.removesuffix("\n")]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), min_size=1, max_size=40))
def test_text_is_not_rewritten(text):
    assume(text.strip())
    expected = text.strip(" \t")
    assert html_to_markdown(page(f"<p>{html.escape(text)}</p>")).strip(" \t") == expected


# Tags that pages have, and some that they never had.
TREE_TAGS = "p div span ul ol li table tr td th pre code b em a blockquote h2 br hr del sup dl dt img input q tex x-y"
TREES = st.recursive(
    st.text("ab|`*_ \n<&", max_size=6).map(html.escape),
    lambda inner: st.tuples(
        st.sampled_from(TREE_TAGS.split()),
        st.lists(inner, max_size=3),
    ).map(lambda t: f"<{t[0]}>{''.join(t[1])}</{t[0]}>"),
    max_leaves=12,
)


@given(TREES)
def test_no_tree_crashes(tree):
    markdown = html_to_markdown(page(tree))
    assert markdown == markdown.strip(" \t\r\n")


@pytest.mark.parametrize("source", UNREADABLE)
def test_html_that_cannot_be_read_whole_is_refused(source):
    with pytest.raises(UnreadableHtml, match="nested"):
        html_to_markdown(source)


def test_wrappers_do_not_count_as_depth():
    assert html_to_markdown("<div>" * 1000 + "<p>x</p>" + "</div>" * 1000) == "x"
    assert html_to_markdown("<p>" + "<span>" * 1000 + "x" + "</span>" * 1000 + "</p>") == "x"


def test_long_inputs_take_linear_time():
    begin = time.process_time()
    assert html_to_markdown(page("<ol>" + "<li>x</li>" * 10_000 + "</ol>")).endswith("10000. x")
    assert html_to_markdown(page("<div>x</div>" * 5_000)).count("x") == 5_000
    assert len(html_to_markdown(page("<p>" + "word " * 400_000 + "</p>"))) == 2_000_000 - 1
    assert len(html_to_markdown(page("<p>x" + " " * 1_000_000 + "x\n</p>"))) == 1_000_002
    assert time.process_time() - begin < 20  # 2 s here


def turns(*pairs, key="conversations"):
    return conversations_in({"id": "a", key: [{"from": role, "value": text} for role, text in pairs]})[0].turns


def test_html_is_recognised_by_role_and_by_the_pages_wrapper():
    bare = "<div><p>x</p></div>"
    assert [t.html for t in turns(("human", page("<p>x</p>")), ("gpt", page("<p>x</p>")))] == [False, True]
    assert [t.html for t in turns(("human", "q"), ("chatgpt", bare), key="items")] == [False, True]
    old = '<div class="request-:r0:-3 markdown prose dark:prose-invert break-words dark"><p>x</p></div>'
    assert turns(("human", "q"), ("gpt", old))[1].html


def test_the_boxes_around_the_pages_wrapper():
    boxes = '<div class="flex flex-col"><div class="min-h-[20px] whitespace-pre-wrap">\n%s</div></div>'
    answer = turns(("human", "q"), ("gpt", boxes % page("<p>x <b>y</b></p>")))[1]
    assert answer.html and html_to_markdown(answer.text) == "x **y**"


def test_a_wrapper_somewhere_in_an_answer_is_counted():
    after_text = f"Sure. {page('<pre><code>x</code></pre>')}"
    assert not turns(("human", "q"), ("gpt", after_text))[1].html and looks_like_html(after_text)
    assert not looks_like_html(f"The page writes:\n```html\n{page('x')}\n```\nfor each answer.")


DOUBTFUL = (
    "**x** <b>y</b>",
    "<div class='a'>\n  <p>Hello</p>\n</div>",
    "<div>\n<p>x</p></div>",
    "<p>x</p>",
    "<div>x</div>",
    '<div class="markdown-body">x</div>',
    "<!DOCTYPE html><html></html>",
    "",
)


@pytest.mark.parametrize("answer", DOUBTFUL)
def test_in_doubt_an_answer_is_left_as_it_is(answer):
    assert not turns(("human", "q"), ("gpt", answer))[1].html


def test_a_bare_wrapper_counts_only_if_all_answers_have_one():
    bare = "<div><p>x</p></div>"
    assert not turns(("human", "q"), ("gpt", bare), ("human", "q"), ("gpt", "Use **this**:"))[1].html
    assert turns(("human", "q"), ("gpt", bare), ("human", "q"), ("gpt", bare))[3].html


def test_golden_cases_read_back_as_json():
    """Every expectation above can be written to conversations.jsonl."""
    assert all(json.loads(json.dumps(e)) == e and not re.search("Copy code|katex|hljs", e) for _, e in GOLDEN.values())


def test_angle_brackets_that_a_page_did_not_escape_stay_in_code():
    html = '<div class="markdown prose"><pre><code>#include <iostream>\nstd::vector<T> v;</code></pre></div>'
    assert "#include <iostream>\nstd::vector<T> v;" in html_to_markdown(html)
