"""The fast converter writes what the reference writes: on the corpora, the demo's dump and random trees of hypothesis."""

import html
import json

import pytest
from helpers.corpora import benchmark
from helpers.markdown_cases import CODE_BLOCKS, GOLDEN, UNREADABLE, page, tex
from hypothesis import given, settings
from hypothesis import strategies as st

from cleaning.html import fast_markdown
from cleaning.html.markdown import UnreadableHtml, html_to_markdown, parse, tidy
from cleaning.sources.formats import conversations_in
from cleaning.sources.turns import Rejection
from fastft.demo.make_dump import DUMP


def both(source: str) -> tuple[str, str]:
    """Return what the fast converter and the reference make of `source`; for a refusal, its message."""
    results = []
    for reference in (False, True):
        try:
            results.append(html_to_markdown(source, reference=reference))
        except UnreadableHtml as error:
            assert "nested" in str(error)
            results.append(str(error))
    return results[0], results[1]


def is_fast(source: str) -> bool:
    """Tell whether the fast converter knows everything in `source`."""
    root = parse(source)
    tidy(root)
    return fast_markdown.to_markdown(root) is not None


@pytest.mark.parametrize("name", GOLDEN)
def test_each_construct_is_converted_as_by_the_reference(name):
    fast, reference = both(page(GOLDEN[name][0]))
    assert fast == reference


def test_constructs_of_the_page_do_not_need_the_reference():
    foreign = {"unescaped angle brackets", "item in a wrapper"}
    assert {name for name, (source, _) in GOLDEN.items() if not is_fast(page(source))} == foreign
    assert all(is_fast(page(block % "x")) for block, _ in CODE_BLOCKS.values())


@pytest.mark.parametrize("corpus", ["generated", "rendered"])
def test_corpora_are_converted_as_by_the_reference(corpus):
    path = benchmark.DATA / f"{corpus}_html_with_truth.jsonl"
    if not path.is_file():
        pytest.skip(f"no corpora at {benchmark.DATA}: set FASTFT_DATA to the directory of chats/")
    answers = [turn.text for turn, _ in benchmark.turns(path) if turn.html]
    assert [fast for fast, reference in map(both, answers) if fast != reference] == []
    assert sum(map(is_fast, answers)) >= 0.99 * len(answers)


def test_the_demos_answers_are_fast_and_equal_the_reference():
    answers = []
    for record in json.loads(DUMP.read_text(encoding="utf-8")):
        try:
            answers += [turn.text for turn in conversations_in(record)[0].turns if turn.html]
        except Rejection:
            continue  # a faulty record that the demo puts into its dump on purpose
    assert len(answers) > 100 and all(map(is_fast, answers))
    assert [fast for fast, reference in map(both, answers) if fast != reference] == []


# Text between tags: all kinds of white space, characters that mean something in markdown, literal angle brackets.
TEXT = st.text(st.sampled_from("ab|`*_ \n\t\r\f\xa0\u3000\x1b<&#-1.\\$"), max_size=6).map(html.escape)
SPACE = st.sampled_from(["", "", "", " ", "\n", "\n\n", " \n ", "\t", "\xa0", "\r\n", "\x0c", "&nbsp; "])
FORMULA = st.tuples(
    st.sampled_from(["%s", '<div class="math math-display"><span class="katex-display">%s</span></div>']),
    st.text(st.sampled_from("a|\\$ ^{}<\n"), max_size=5).map(tex),
).map(lambda pair: pair[0] % pair[1])
CODE_BLOCK = st.tuples(st.sampled_from([block for block, _ in CODE_BLOCKS.values()]), TEXT).map(lambda p: p[0] % p[1])
EMPTY = st.sampled_from(
    ["<br>", "<br>\n", "<hr>", '<img src="a|b" alt="c" title="&quot;">', "<input type=checkbox checked>", "<input>"]
)
LEAF = st.one_of(TEXT, TEXT, EMPTY, FORMULA, CODE_BLOCK)

INLINE = [
    *"b strong em i del s strike code sub sup span a".split(),
    *('a href="https://a.b/c"', 'a href="x" title="&quot;t"', 'a href=""'),
]
BLOCKS = ["p", "p", "p", "div", "div", "blockquote", "h1", "h3", "pre", "section", "li"]
GROUPS = ["ul", "ul", "ol", 'ol start="9"', 'ol start="x"', "table", "table", "thead", "tr"]
CELLS = ["td", "th", 'td colspan="2"', 'th align="right"', 'td style="text-align: center"', 'td colspan="x"']
MEMBERS = {"ul": ["li"], "ol": ["li"], "table": ["tr"], "thead": ["tr"], "tr": CELLS}
FOREIGN = "x-y kbd tt q dl dt dd u figure caption video template details".split()


@st.composite
def pages(draw, foreign: bool = False, depth: int = 4) -> str:
    """Draw the HTML of an answer: lists hold items and tables hold rows, but now and then any element is anywhere."""
    tags = st.sampled_from([*INLINE, *BLOCKS, *GROUPS, *(FOREIGN if foreign else [])])

    def element(opening: str, left: int) -> str:
        name = opening.split()[0]
        members = MEMBERS.get(name)
        children = []
        for _ in range(draw(st.integers(0, 3 if left else 0))):
            if members and draw(st.integers(0, 9)):
                child = element(draw(st.sampled_from(members)), left)
            elif left == 1 or draw(st.booleans()):
                child = draw(LEAF)
            else:
                child = element(draw(tags), left - 1)
            children.append(draw(SPACE) + child + draw(SPACE))
        return f"<{opening}>{''.join(children)}</{name}>"

    return element('div class="markdown prose"', depth)


@given(pages())
def test_any_page_is_converted_as_by_the_reference(source):
    fast, reference = both(source)
    assert fast == reference


@given(pages(foreign=True))
def test_foreign_tags_are_converted_as_by_the_reference(source):
    fast, reference = both(source)
    assert fast == reference


@given(st.integers(0, 400), st.sampled_from(["b", "blockquote", "li", "div", "span", "table><tr><td", "x-y"]))
@settings(max_examples=30, deadline=None)
def test_nesting_of_any_depth_is_converted_as_by_the_reference(depth, tag):
    ends = "".join(f"</{name}>" for name in reversed(tag.split("><")))
    fast, reference = both(page(f"<{tag}>" * depth + "x" + ends * depth))
    assert fast == reference


@pytest.mark.parametrize("source", UNREADABLE)
def test_what_the_reference_refuses_is_refused(source):
    fast, reference = both(source)
    assert fast == reference and "nested" in fast


def test_what_an_attribute_must_hold():
    assert both(page('<pre language="x"><code>y</code></pre>')) == ("```\ny\n```",) * 2
    assert both(page('<ol start="-1"><li>a</li></ol>')) == ("1. a",) * 2
    assert both(page('<li value="7">a</li>')) == ("- a",) * 2
