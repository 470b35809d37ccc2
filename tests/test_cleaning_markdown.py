"""HTML of the ChatGPT page to markdown: one golden case per construct; code must come through byte for byte."""

import html
import json
import re
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from cleaning.html.markdown import html_to_markdown
from cleaning.sources import looks_like_html, read_conversation
from fastft.errors import UserError

BUTTON = '<button class="flex ml-auto gap-2"><svg class="h-4 w-4"><path d="M16 4h2"></path></svg>Copy code</button>'
CODE_BLOCKS = {  # the page's five shapes and what a sanitiser left of one: (HTML with %s for the code, language)
    "A": (
        '<pre><div class="bg-black mb-4 rounded-md"><div class="flex items-center">' + BUTTON + "</div>"
        '<div class="p-4"><code class="!whitespace-pre hljs">%s</code></div></div></pre>',
        "",
    ),
    "B": (
        '<pre><div class="bg-black mb-4 rounded-md"><div class="flex"><span class="">bash</span>' + BUTTON + "</div>"
        '<div class="p-4"><code class="!whitespace-pre hljs language-bash">%s</code></div></div></pre>',
        "bash",
    ),
    "B'": ('<pre><div class="bg-black"><div class="p-4"><code>%s</code></div></div></pre>', ""),
    "C": (
        '<pre><div class="bg-black rounded-md mb-4"><div class="flex justify-between"><span>c++</span>'
        + BUTTON
        + "</div>"
        '<div class="p-4"><code class="!whitespace-pre hljs">%s</code></div></div></pre>',
        "c++",
    ),
    "D": (
        '<pre><div class="dark bg-gray-950 rounded-md"><div><span>powershell</span><span data-state="closed">'
        + BUTTON
        + '</span></div><div class="p-4"><code class="hljs language-powershell">%s</code></div></div></pre>',
        "powershell",
    ),
    "without a language, later pages": (
        '<pre><div class="bg-black rounded-md mb-4"><div class="flex"><span>plaintext</span>' + BUTTON + "</div>"
        '<div class="p-4"><code class="!whitespace-pre hljs language-plaintext">%s</code></div></div></pre>',
        "",
    ),
    "sanitised": ("<pre><div><div>pythonCopy code</div><div><code>%s</code></div></div></pre>", "python"),
    "plain": ("<pre><code>%s</code></pre>", ""),
}


def page(inner: str) -> str:
    return f'<div class="markdown prose w-full break-words dark:prose-invert light">{inner}</div>'


def tex(source: str) -> str:
    return (
        '<span class="katex"><span class="katex-mathml"><math><semantics><mi>x</mi>'
        f'<annotation encoding="application/x-tex">{html.escape(source)}</annotation></semantics></math></span>'
        '<span class="katex-html" aria-hidden="true"><span class="mord">x</span></span></span>'
    )


GOLDEN = {
    "paragraphs": ("<p>One.</p><p>Two.</p>", "One.\n\nTwo."),
    "nothing is escaped": (
        "<p>snake_case, 5 * 3, __init__, 1. a # b [c] &lt;div&gt;</p>",
        "snake_case, 5 * 3, __init__, 1. a # b [c] <div>",
    ),
    "line break in a paragraph": ("<p>one\n  two</p>", "one\ntwo"),
    "br": ("<p>one<br>two</p>", "one  \ntwo"),
    "br and line end": ("<p>one<br>\ntwo</p>", "one  \ntwo"),
    "inline": (
        "<p><strong>b</strong> <em>i</em> <del>d</del> <code>c</code></p>",
        "**b** *i* ~~d~~ `c`",
    ),
    "spaces move out of emphasis": ("<p>a<strong> b </strong>c</p>", "a **b** c"),
    "sub and sup": ("<p>H<sub>2</sub>O m<sup>2</sup></p>", "H<sub>2</sub>O m<sup>2</sup>"),
    "code span with backticks": ("<p><code>x`y``z</code> <code>`x</code></p>", "```x`y``z``` `` `x ``"),
    "code span with spaces": ("<p><code>a  b</code></p>", "`a  b`"),
    "line break in a code span": ("<p><code>a<br>b</code></p>", "`a b`"),
    "space between marks": ("<p>a<sub> </sub>b</p>", "a b"),
    "headings": ("<h1>T</h1><h2>U <code>v</code></h2><p>x</p>", "# T\n\n## U `v`\n\nx"),
    "link": ('<p><a href="https://a.b/c_d?x=1&amp;y=2" target="_new">see</a></p>', "[see](https://a.b/c_d?x=1&y=2)"),
    "bare address": ('<p>at <a href="https://a.b/c_d">https://a.b/c_d</a>.</p>', "at https://a.b/c_d."),
    "image": ('<p><img src="a.png" alt="A" title="T"></p>', '![A](a.png "T")'),
    "rule": ("<p>a</p><hr><p>b</p>", "a\n\n---\n\nb"),
    "quote": (
        "<blockquote><p>a</p><p>b</p></blockquote><p>c</p>",
        "> a\n>\n> b\n\nc",
    ),
    "tight list": ("<ul><li>a</li><li>b</li></ul>", "- a\n- b"),
    "loose list": ("<ol><li><p>a</p></li><li><p>b</p></li></ol>", "1. a\n\n2. b"),
    "two paragraphs in an item": ("<ol><li><p>a</p><p>b</p></li></ol>", "1. a\n\n   b"),
    "nested lists": (
        "<ol><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ol>",
        "1. a\n   - b\n     - c\n2. d",
    ),
    "paragraph, then nested list": ("<ol><li><p>a</p><ul><li>b</li></ul></li></ol>", "1. a\n   - b"),
    "text after a nested list": ("<ul><li>a<ul><li>b</li></ul>c</li></ul>", "- a\n  - b\n\n  c"),
    "list start": ('<ol start="9"><li>a</li><li>b</li></ol>', "9. a\n10. b"),
    "interrupted list": (
        '<ol><li>a</li></ol><pre><code>x\n</code></pre><ol start="2"><li>b</li></ol>',
        "1. a\n\n```\nx\n```\n\n2. b",
    ),
    # Early pages lost the number and showed "1." again; whether it was "2." or a new list, they do not say.
    "interrupted list without its number": (
        "<ol><li>a</li></ol><pre><code>x\n</code></pre><ol><li>b</li></ol>",
        "1. a\n\n```\nx\n```\n\n1. b",
    ),
    "item in a wrapper": ("<ol><span><li>a</li></span><x-y><li>b</li></x-y></ol>", "1. a\n<x-y>\n2. b\n</x-y>"),
    "wide numbers indent": ('<ol start="10"><li><p>a</p><p>b</p></li></ol>', "10. a\n\n    b"),
    "task list": (
        '<ul><li><input type="checkbox" checked> a</li><li><input type="checkbox"> b</li></ul>',
        "- [x] a\n- [ ] b",
    ),
    "list between text": ("<p>a</p><ul><li>b</li></ul><p>c</p>", "a\n\n- b\n\nc"),
    "pretty-printed HTML": (
        "\n<ol>\n<li>\n<p>a</p>\n</li>\n<li>\n<p>b</p>\n</li>\n</ol>\n<p>c</p>\n",
        "1. a\n\n2. b\n\nc",
    ),
    "code in an item": (
        "<ol><li><p>a</p><pre><code>x\n\n  y\n</code></pre></li><li><p>b</p></li></ol>",
        "1. a\n\n   ```\n   x\n\n     y\n   ```\n\n2. b",
    ),
    "code block holding a fence": ("<pre><code>```py\nx\n```\n</code></pre>", "````\n```py\nx\n```\n````"),
    "empty code block": ("<pre><code></code></pre>", "```\n```"),
    "code keeps blank lines": ("<pre><code>\n\n  a\n\n\nb\n\n</code></pre>", "```\n\n\n  a\n\n\nb\n\n```"),
    "pre with text beside its code": ("<pre>$ <code>ls</code>\nfile\n</pre>", "```\n$ ls\nfile\n```"),
    "pre in pre": ("<pre>a\n<ol><li><pre>b\n</pre></li><li>c</li></ol></pre>", "```\na\nb\nc\n```"),
    "prompt beside code": ("<pre>$ <code>ls</code></pre>", "```\n$ ls\n```"),
    "table": (
        '<table><thead><tr><th>a</th><th style="text-align: right">b</th></tr></thead>'
        "<tbody><tr><td>1|2</td><td><code>x|y</code></td></tr><tr><td>p<br>q</td><td></td></tr></tbody></table>",
        "| a | b |\n| --- | ---: |\n| 1\\|2 | `x\\|y` |\n| p<br>q |  |",
    ),
    "table without header": (
        "<table><tbody><tr><td>a</td></tr><tr><td>b</td></tr></tbody></table>",
        "|  |\n| --- |\n| a |\n| b |",
    ),
    "code block in a cell": (
        "<table><tr><th>a</th></tr><tr><td><pre><code>x\ny\n</code></pre></td></tr></table>",
        "| a |\n| --- |\n| `x`<br>`y` |",
    ),
    "pipes in a cell": (
        f'<table><tr><th>{tex("|x|")}</th><th><a href="a|b">c</a></th></tr></table>',
        "| $\\|x\\|$ | [c](a\\|b) |\n| --- | --- |",
    ),
    "code with backticks in a cell": (
        "<table><tr><th><pre><code>a`b\n</code></pre></th></tr></table>",
        "| ``a`b`` |\n| --- |",
    ),
    "inline formula": (f'<p>so <span class="math math-inline">{tex("a_i < b*c")}</span>.</p>', "so $a_i < b*c$."),
    "display formula": (
        '<p>so</p><div class="math math-display"><span class="katex-display">'
        + tex("\\frac{a}{b}")
        + "</span></div><p>x</p>",
        "so\n\n$$\n\\frac{a}{b}\n$$\n\nx",
    ),
    "display formula without its wrapper": (f'<span class="katex-display">{tex("x")}</span>', "$$\nx\n$$"),
    "unescaped angle brackets": ("<p>a List<String> of <Item>x</Item></p>", "a List<String> of <Item>x</Item>"),
    "footer of an extension": ("<p>The end.</p>Copy123 chars / 20 words", "The end."),
    "footer in a span": ("<p>The end.</p><div><span>Copy1 chars / 2 words</span></div>", "The end."),
    "footer after a control character": ("<p>a</p>\x1bCopy1 chars / 2 words", "a\n\n\x1bCopy1 chars / 2 words"),
    "control character beside code": ("<pre><div>\x1b<code>x</code></div></pre>", "```\n\x1bx\n```"),
    "control character in a language": ('<pre><code class="language-\x1b">x</code></pre>', "```\nx\n```"),
    "text without a wrapper": ("plain a < b &amp; c", "plain a < b & c"),
    "comment and script": ("<p>a<!-- b --></p><script>c</script>", "a"),
    "no-break and ideographic spaces": ("<p>a\xa0b</p><p>\u3000c</p>", "a\xa0b\n\n\u3000c"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_construct(name):
    source, expected = GOLDEN[name]
    assert html_to_markdown(page(source)) == expected


@pytest.mark.parametrize("shape", CODE_BLOCKS)
def test_code_block_shape(shape):
    block, language = CODE_BLOCKS[shape]
    code = '<span class="hljs-keyword">def</span> f(a_b):\n\n\n    <span>return</span> a_b &lt; 3\n'
    expected = f"a\n\n```{language}\ndef f(a_b):\n\n\n    return a_b < 3\n```\n\nb"
    assert html_to_markdown(page("<p>a</p>" + block % code + "<p>b</p>")) == expected


# What a CommonMark parser reads back unchanged: it replaces NUL itself, and line ends are one "\n".
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


# All tags that pages have, and some that they never had.
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


UNREADABLE = (
    "<div>" * 3000 + "x",
    "<div>" * 2500 + "x" + "</div>" * 2500,
    "<ul><li>" * 3000,
    "<b>" * 400 + "x" + "</b>" * 400,
    "<p>a</p><!-- b",
    "<p>a</p><p",
    "<p>a</p><![foo",
)


@pytest.mark.parametrize("source", UNREADABLE)
def test_html_that_cannot_be_read_whole_is_refused(source):
    with pytest.raises(UserError, match="nested"):
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
    return read_conversation({"id": "a", key: [{"from": role, "value": text} for role, text in pairs]}).turns


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


def test_a_wrapper_somewhere_in_an_answer_is_mentioned():
    behind = f"Sure. {page('<pre><code>x</code></pre>')}"
    assert not turns(("human", "q"), ("gpt", behind))[1].html and looks_like_html(behind)
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
    """Every expectation above can stand in conversations.jsonl."""
    assert all(json.loads(json.dumps(e)) == e and not re.search("Copy code|katex|hljs", e) for _, e in GOLDEN.values())


def test_angle_brackets_that_a_page_did_not_escape_stay_in_code():
    html = '<div class="markdown prose"><pre><code>#include <iostream>\nstd::vector<T> v;</code></pre></div>'
    assert "#include <iostream>\nstd::vector<T> v;" in html_to_markdown(html)
