"""Every format that the cleaner reads: examples, trees, the two eras of sharegpt.com, and malformed records."""

import html
import json
import os
import time
from pathlib import Path

import pytest
from helpers.sources import (
    ANYTHING,
    CHATGPT_PAGE,
    CODE,
    EXAMPLES,
    EXPORT,
    LABEL,
    OASST,
    OBJECTS,
    PAGE,
    SHARED,
    SHAREGPT_PAGE,
    node,
    places,
    replaced,
    shared,
    spoken,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cleaning.sources.eras import after_pager, looks_like_html, never_sanitised
from cleaning.sources.formats import FORMATS, Reading, conversations_in, recognise, survey_dump
from cleaning.sources.turns import Rejection
from fastft.common.records import Record, read_records

DATA = Path(os.environ.get("FASTFT_DATA", "data")) / "chats"
BUTTON = CODE % "<button>Copy code</button>" + "<div><code>code .\n</code></div></div></pre>"
OLD_CHATGPT_PAGE = """<body><div class="group"><span>1 / 1</span><div class="flex whitespace-pre-wrap">two
 lines</div></div><div class="group"><div class="flex whitespace-pre-wrap">
<div class="markdown prose"><p>answer</p></div></div></div></body>"""


def test_there_is_an_example_of_every_format():
    assert EXAMPLES.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_format_is_recognised_and_read(name):
    record, expected = EXAMPLES[name]
    found = conversations_in(record)
    assert conversations_in(record, Reading(format=name)) == found and len(found) == 1
    (c,) = found
    assert (c.id, c.model, c.lang, [(t.role, t.text) for t in c.turns]) == expected
    assert c.format == recognise(record) == name
    assert [t.html for t in c.turns if t.role == "user"].count(True) == 0
    assert any(t.html for t in c.turns) == (name in ("sharegpt_page", "chatgpt_page"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_record_of_another_format_is_rejected(name):
    for other, (record, _) in EXAMPLES.items():
        try:
            conversations_in(record, Reading(format=name))
        except Rejection as rejection:
            assert rejection.reason in ("not_a_conversation", "unknown_role") and rejection.detail
        else:
            assert other == name or {other, name} <= {"chat_log", "sharegpt", "pairs", "sharegpt_page", "chatgpt_page"}


NOTES = {
    "messages": {"dropped part image_url": 1},
    "chatgpt_page": {"dropped tool": 1},
    "chatgpt_export": {"dropped system": 1, "dropped assistant to browser": 1, "dropped tool browser": 1},
    "claude_export": {"dropped attachments": 1, "dropped part tool_use": 1},
    "chat_log": {"flagged toxic": 1, "flagged by moderation": 1},
    "oasst": {"dropped deleted": 1},
    "sharegpt_page": {"unescaped questions": 1},
    "completion": {"answers that their record labels as bad, not to learn from": 1},
    "preference": {"rejected answers of preferences, left out": 1},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_left_out_is_counted(name):
    assert conversations_in(EXAMPLES[name][0])[0].notes == NOTES.get(name, {})


def test_roles_in_the_wild():
    names = "system user human gpt chatgpt bing bard assistant function_call observation tool Human".split()
    roles = "system user user assistant assistant assistant assistant assistant assistant tool tool user".split()
    record = {"conversations": [{"from": name, "value": "x"} for name in names]}
    assert [t.role for t in conversations_in(record)[0].turns] == roles


def test_a_chatgpt_page_before_it_named_authors():
    (c,) = conversations_in(OLD_CHATGPT_PAGE)
    assert [(t.role, t.text, t.html) for t in c.turns] == [
        ("user", "two\n lines", False),
        ("assistant", '<div class="markdown prose"><p>answer</p></div>', True),
    ]


def test_a_shared_chatgpt_page_holds_the_tree():
    data = {"props": {"pageProps": {"serverResponse": {"data": EXPORT}}}}
    assert len(conversations_in(SHAREGPT_PAGE % json.dumps(data), Reading(every_branch=True))) == 2


def test_every_branch_of_an_export():
    first, second = conversations_in(EXPORT, Reading(every_branch=True))
    assert spoken(first).endswith("And the ebb? | It falls.") and spoken(second).endswith("And the ebb? | Its fall.")
    assert (first.id, second.id) == ("tide", "tide-dead end")


def test_every_branch_of_an_oasst_tree():
    found = conversations_in(OASST, Reading(every_branch=True))
    assert [spoken(c) for c in found] == ["q | best | thanks", "q | worse", "q | unranked"]
    assert [c.id for c in found] == ["t", "t-w", "t-3"]


def test_branches_of_one_tree_know_it():
    first, second = conversations_in(EXPORT, Reading(every_branch=True))
    other, *_ = conversations_in({**EXPORT, "conversation_id": "other"}, Reading(every_branch=True))
    assert first.tree == second.tree != other.tree and first.tree and not conversations_in(EXPORT)[0].tree


def called(*functions: dict, **turn) -> dict:
    """A conversation in which an assistant's turn calls `functions` as OpenAI writes it."""
    calls = [{"id": "1", "type": "function", "function": each} for each in functions]
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": calls, **turn}]}


@pytest.mark.parametrize(
    "record, text",
    [
        (called({"name": "f", "arguments": '{"a": "é\\ud83d"}'}), '{"name": "f", "arguments": {"a": "é\ufffd"}}'),
        (called({"name": "f", "arguments": "no JSON"}), '{"name": "f", "arguments": "no JSON"}'),
        (
            called({"name": "f", "arguments": {}}, {"name": "g"}, content="Wait."),
            'Wait.\n{"name": "f", "arguments": {}}\n{"name": "g", "arguments": null}',
        ),
        (called(function_call={"name": "h", "arguments": "1"}), '{"name": "h", "arguments": 1}'),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"}]}, "{}"),
    ],
)
def test_calls_of_tools_are_answers(record, text):
    conversation = conversations_in(record)[0]
    assert (conversation.turns[1].role, conversation.turns[1].text) == ("assistant", text)
    assert conversation.sessions == {"tool_session": "turn 2 calls a tool"}


def test_what_is_not_a_call():
    for nothing in (called(content="a"), called({}, content="a"), called({"name": ""}, content="a")):
        conversation = conversations_in(nothing)[0]
        assert conversation.turns[1].text == "a" and not conversation.sessions
    (said,) = conversations_in({**called(content="a"), "tools": "[]"})
    assert not said.notes
    (said,) = conversations_in({**called(content="a"), "tools": "[{}]"})
    assert said.notes == {"dropped definitions of tools": 1}


def test_plugins_that_a_record_names():
    assert conversations_in({**shared("q", "a"), "plugins": ["x"]})[0].sessions.keys() == {"plugin_session"}
    for none in (None, [], ""):
        assert not conversations_in({**shared("q", "a"), "plugins": none})[0].sessions
    # An export names the plugins that were switched on; only messages of tools show that one took part.
    assert conversations_in({**EXPORT, "plugin_ids": ["x"]})[0].sessions.keys() == {"plugin_session"}
    silent = {id: each for id, each in EXPORT["mapping"].items() if id not in ("search", "tool")}
    silent["a"] = {**silent["a"], "parent": "q"}
    assert not conversations_in({**EXPORT, "mapping": silent, "plugin_ids": ["x"]})[0].sessions


@pytest.mark.parametrize(
    "value, seconds",
    [
        (1686324267.5, 1686324267.5),
        (1686324267500, 1686324267.5),  # milliseconds
        ("2023-06-09T15:24:27.5Z", 1686324267.5),
        ("2023-06-09T15:24:27.500000+00:00", 1686324267.5),
        ("2023-06-09 17:24:27.5+0200", 1686324267.5),
        ("2023-06-09 15:24:27.5 UTC", 1686324267.5),
        ("2023-06-09T15:24:27.5", 1686324267.5),
        ("2023-06-09", 1686268800.0),
        *(
            (wrong, 0.0)
            for wrong in ("2023-02-31", "0000-01-01", "soon", "", -1, 0, True, None, float("nan"), 10**400, [1])
        ),
        ("0001-01-01T00:00:00+23:59", 0.0),
        ("2023-06-09T15:24:27+99:99", 0.0),
    ],
)
def test_times_are_read_in_every_form(value, seconds):
    record = {**shared("q", "a"), "timestamp": value, "created_at": "nonsense"}
    assert conversations_in(record)[0].time == pytest.approx(seconds, abs=1e-3)


def test_every_dump_that_states_a_time_is_understood():
    when, seconds = "2023-06-09T15:24:27Z", 1686324267
    export = {**EXPORT, "create_time": 1.0, "update_time": seconds}
    claude = {**OBJECTS["claude_export"], "created_at": "2020-01-01T00:00:00Z", "updated_at": when}
    log = {**OBJECTS["chat_log"], "timestamp": when}
    tree = {"prompt": {**OASST["prompt"], "created_date": when}}
    assert {conversations_in(record)[0].time for record in (export, claude, log, tree)} == {seconds}
    assert conversations_in(SHARED)[0].time == 0


def mapping(**parents: str | None) -> dict:
    roles = {"q": "user", "a": "assistant", "b": "assistant"}
    return {id: node(id, parent, roles.get(id[0]), id) for id, parent in parents.items()}


@pytest.mark.parametrize(
    "nodes, current, expected",
    [
        (mapping(q="a", a="q"), "a", "q | a"),  # a cycle ends the walk
        (mapping(q="a", a="q"), None, ""),  # no leaf at all
        (mapping(q="q"), "q", "q"),
        (mapping(q="gone", a="q"), "a", "q | a"),
        (mapping(q=None, a="q"), "gone", "q | a"),
        (mapping(q=None, a="q", b="q"), ["a"], "q | a"),
        ({}, None, ""),
        ({"a": None, "b": 3}, "b", ""),
        ({"q": {"message": {"author": None, "content": None}}}, "q", ""),
    ],
)
def test_malformed_trees_give_what_can_be_read(nodes, current, expected):
    record = {"mapping": nodes, "current_node": current}
    for every in (False, True):
        assert spoken(conversations_in(record, Reading(every_branch=every))[0]) == expected


def test_trees_of_any_size_take_linear_time_and_memory():
    begin = time.process_time()
    chain = {str(i): node(str(i), str(i - 1), ("user", "assistant")[i % 2], "x") for i in range(50_000)}
    assert len(conversations_in({"mapping": chain}, Reading(every_branch=True))[0].turns) == 50_000
    for i in range(0, 50_000, 2):
        chain[f"leaf {i}"] = node(f"leaf {i}", str(i), "assistant", "y")
    with pytest.raises(Rejection, match="turns together"):
        conversations_in({"mapping": chain}, Reading(every_branch=True))
    prompt: dict = {"text": "x", "role": "assistant"}
    for i in range(5_000):
        prompt = {"text": "x", "role": ("prompter", "assistant")[i % 2], "replies": [prompt]}
    assert len(conversations_in({"prompt": prompt})[0].turns) == 5_001
    assert time.process_time() - begin < 5  # 0.6 s here


def read_dump(*records: dict, era: str = "auto"):
    decided = survey_dump((Record("x", record, 0) for record in records), Reading(), era)
    return [conversations_in(record, Reading(era=decided))[0] for record in records], decided


def questions(conversations) -> list[str]:
    return [turn.text for c in conversations for turn in c.turns if turn.role == "user"]


def test_a_mixed_dump_is_read_conversation_by_conversation():
    before = shared("is &lt; an entity?", PAGE % f"<p>yes</p>{BUTTON}", "vector<int>", PAGE % "<p>no</p>")
    escaped = shared("vector&lt;int&gt; &amp;lt;", f"<div><p>yes</p>{LABEL}</div>", "<b>bold</b>", "<p>no</p>")
    found, era = read_dump(before, escaped)
    assert questions(found) == ["is &lt; an entity?", "vector<int>", "vector<int> &lt;", "<b>bold</b>"]
    assert all(turn.html for c in found for turn in c.turns if turn.role == "assistant")
    assert [dict(c.notes) for c in found] == [{"questions with entities, left alone": 1}, {"unescaped questions": 1}]
    assert (era.evidence["wrapped"], era.evidence["labels"], era.evidence["confirmed"]) == (1, 1, 1)
    assert "1 of 2 conversations have the page's wrapper" in era.reasons[0]


BARE = shared("a &lt; b", "<div><p>yes</p></div>")


def test_a_bare_wrapper_needs_the_dumps_evidence():
    found, era = read_dump(BARE)
    assert questions(found) == ["a &lt; b"] and not era.bare_is_sanitised and found[0].turns[1].html
    found, era = read_dump(*[BARE] * 3)
    assert questions(found) == ["a < b"] * 3 and era.bare_is_sanitised
    # A tool other than sharegpt.com removed the classes: the questions are verbatim.
    verbatim = shared("a < b", "<div><p>yes</p></div>")
    found, era = read_dump(*[BARE] * 3, verbatim)
    assert questions(found) == ["a &lt; b"] * 3 + ["a < b"] and era.evidence["contradicted"] == 1


@pytest.mark.parametrize(
    "trace", ["<button>x</button>", "<br>", '<img src="x">', "a < b", "a & b", "<svg><path/></svg>"]
)
def test_what_the_sanitiser_removes_proves_that_it_was_not_applied(trace):
    assert never_sanitised(trace)
    found, _ = read_dump(*[shared("a &lt; b", f"<div><p>{trace}</p>{LABEL}</div>")] * 10)
    assert set(questions(found)) == {"a &lt; b"}


@pytest.mark.parametrize(
    "text", ["", "plain", "a &lt; b &amp;&gt;", "<p>x</p>", '<a href="x">y</a>', "<br />", "1 | 2"]
)
def test_what_the_sanitiser_lets_through(text):
    assert not never_sanitised(text)


def test_fragments_without_wrapper_are_html_where_the_dump_shows_the_sanitiser():
    fragment = shared("why?", "<p>because</p>")
    assert [c.turns[1].html for c in read_dump(*[BARE] * 9, fragment)[0]] == [True] * 9 + [False]
    assert [c.turns[1].html for c in read_dump(*[BARE] * 10, fragment)[0]] == [True] * 11
    assert read_dump(fragment, era="escaped")[0][0].turns[1].html


def bare(count: int, question: str = "q", answer: str = "<p>yes</p><ol><li>a</li></ol>") -> list[dict]:
    return [shared(f"{question} {i} &lt;", answer) for i in range(count)]


def test_blocks_without_wrapper_are_html_if_nearly_all_answers_are():
    conversations, era = read_dump(*bare(18), *[shared("q", "**yes**")] * 2)
    assert era.blocks_are_html and "converted" in era.reasons[-1]
    assert [c.turns[1].html for c in conversations] == [True] * 18 + [False] * 2
    assert questions(conversations)[0] == "q 0 &lt;"  # which says nothing about the questions
    assert conversations_in(shared("q", "<p>a</p>"), Reading(era=era))[0].turns[1].html


@pytest.mark.parametrize(
    "records",
    [
        bare(9),  # too few
        bare(17) + [shared("q", "**yes**")] * 3,  # too many others
        bare(20, "Write me a web page about trees"),
        bare(20, answer='<p>yes</p><form><input name="a"></form><p>x</p>'),
        bare(20, answer='<h1 style="color: red">Trees</h1>'),
        bare(20, answer="<div>yes</div>"),
        bare(20, answer="<p>yes</p> and more"),
        bare(20, answer="<!DOCTYPE html><p>yes</p>"),
    ],
)
def test_html_that_somebody_asked_for_is_left_alone(records):
    conversations, era = read_dump(*records)
    assert not era.blocks_are_html and "left alone" in era.reasons[-1]
    assert not any(c.turns[1].html for c in conversations)


def test_escaped_questions_beside_answers_in_markdown():
    escaped, neutral = shared("a &amp;&amp; b", "*yes* &amp;"), shared("hi", "`<div>` hello")
    assert questions(read_dump(*[escaped] * 9, neutral)[0]) == ["a &amp;&amp; b"] * 9 + ["hi"]
    found, era = read_dump(*[escaped] * 10, neutral)
    assert questions(found) == ["a && b"] * 10 + ["hi"] and era.all_escaped
    assert found[0].turns[1].text == "*yes* &amp;" and not found[0].turns[1].html
    assert questions(read_dump(*[escaped] * 10, shared("a & b", "yes"))[0]) == ["a &amp;&amp; b"] * 10 + ["a & b"]


def test_the_era_that_is_given_overrides_what_was_found():
    record = shared("1 / 1a &lt; b", PAGE % "<p>x</p>")
    expected = {"none": "1 / 1a &lt; b", "before": "a &lt; b", "escaped": "1 / 1a < b", "escaped_pager": "a < b"}
    for era, text in expected.items():
        found, decided = read_dump(record, era=era)
        assert questions(found) == [text] and f"--era {era}" in decided.reasons[0]
        assert found[0].turns[1].html


@given(st.lists(st.text(st.sampled_from("<>&;altgmp#39 \n\\'\"/b1éx")), min_size=1, max_size=4))
def test_escaping_then_reading_gives_the_question_back(texts):
    """Questions that the sanitiser escaped, and the same ones from the era before it, in one dump."""
    assume(None in map(after_pager, texts))
    label, wrapped = f"<div><p>x</p>{LABEL}</div>", PAGE % "<p>x</p>"
    escaped = shared(*(turn for text in texts for turn in (html.escape(text, quote=False), label)))
    verbatim = shared(*(turn for text in texts for turn in (text, wrapped)))
    found, _ = read_dump(verbatim, escaped, verbatim)
    assert questions(found) == texts * 3


@given(st.lists(st.lists(st.text(st.sampled_from("<>&;ltamp 1|9x\n")), min_size=2, max_size=6), min_size=1, max_size=4))
def test_a_dump_without_evidence_is_untouched(dialogues):
    records = [shared(*(f"{turn} &lt;" for turn in turns)) for turns in dialogues]
    found, era = read_dump(*records, shared("a < b", "c"))
    assert not (era.bare_is_sanitised or era.all_escaped or era.pager)
    assert [t.text for c in found[:-1] for t in c.turns] == [f"{turn} &lt;" for turns in dialogues for turn in turns]


@pytest.mark.parametrize(
    "text, rest",
    [
        ("1 / 1Hello", "Hello"),
        ("2 / 3 Hello", " Hello"),
        ("2 / 3\nHello", "\nHello"),
        ("1 / 15 apples", "5 apples"),
        ("2 / 12x", "x"),
        ("10 / 2 = ?", None),
        ("10 / 12x", "x"),
        ("1 / 2 cups", " cups"),
        ("1/1x", None),
        ("0 / 1x", None),
        ("1 / 1", ""),
        ("x 1 / 1", None),
    ],
)
def test_a_branch_counter_is_taken_off(text, rest):
    end = after_pager(text)
    assert (end if end is None else text[end:]) == rest


def test_branch_counters_are_removed_where_every_question_has_one():
    answer = PAGE % "<p>x</p>"
    several = shared("1 / 1Hello", answer, "2 / 2Bye", answer)
    mixed = shared("1 / 1Hello", answer, "Bye", answer)
    single = shared("1 / 1Hello", answer)
    found, era = read_dump(several, mixed, single)
    assert questions(found) == ["Hello", "Bye", "1 / 1Hello", "Bye", "1 / 1Hello"] and not era.pager
    assert found[2].notes == {"questions that begin like a branch counter, left alone": 1}
    found, era = read_dump(*[several] * 3, single, shared("1 / 2 cups?", answer))
    assert questions(found)[-2:] == ["Hello", "1 / 2 cups?"] and era.pager
    indented = shared("1 / 1Fix:", answer, "1 / 1    return", answer)
    assert questions(read_dump(indented)[0]) == ["Fix:", "    return"]
    cups = shared("1 / 2 cups?", answer, "3 / 4 cups?", answer)
    assert questions(read_dump(*[several] * 9, cups)[0])[-2:] == ["1 / 2 cups?", "3 / 4 cups?"]
    banner = shared("Too many requests in 1 hour. Try again later.", answer, *["1 / 1Hello", answer] * 2)
    assert questions(read_dump(banner)[0])[1:] == ["Hello", "Hello"]


def test_other_formats_have_no_eras():
    record = {"messages": [{"role": r, "content": "1 / 1a &lt; b"} for r in ("user", "assistant")] * 2}
    found, _ = read_dump(*[record] * 20, era="escaped_pager")
    assert questions(found) == ["1 / 1a &lt; b"] * 40


def readable(record) -> None:
    """Read the record in every way, and assert that it gives conversations of valid text or a Rejection."""
    for reading in (Reading(), Reading(every_branch=True), *(Reading(format=name) for name in FORMATS)):
        try:
            found = conversations_in(record, reading)
        except Rejection as rejection:
            assert rejection.detail.encode() and len(rejection.detail) < 1000
            continue
        assert found
        for conversation in found:
            f"{conversation.id}{conversation.model}{conversation.lang}{list(conversation.notes)}".encode()
            assert all(t.text.encode() is not None and t.role and isinstance(t.html, bool) for t in conversation.turns)
            assert all(isinstance(looks_like_html(t.text), bool) for t in conversation.turns)


@pytest.mark.parametrize("name", OBJECTS)
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_malformed_records_never_crash(name, data):
    record = OBJECTS[name]
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(record))))
        drop = path and data.draw(st.booleans())
        record = replaced(record, path, ... if drop else data.draw(ANYTHING))
        if not isinstance(record, (dict, list)) or not record:
            break
    readable(record)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(CHATGPT_PAGE.split("<") + OLD_CHATGPT_PAGE.split("<") + list("<>&\"'\x00\x1b\ud83d"))))
def test_malformed_pages_never_crash(pieces):
    readable("<".join(["", *pieces]))


@settings(deadline=None, max_examples=40)
@given(ANYTHING)
def test_pages_with_any_data_never_crash(value):
    readable(SHAREGPT_PAGE % json.dumps({"props": {"pageProps": {"content": value, "serverResponse": value}}}))


def test_deep_and_huge_records():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for name in (
        "conversations",
        "messages",
        "conversation",
        "chat_messages",
        "mapping",
        "prompt",
        "instruction",
        "id",
    ):
        readable({name: deep, "output": deep, "items": [{"from": "human", "value": deep, "role": deep}]})
    while deep:  # freed in steps, because freeing it at once recurses in C
        deep = deep[0]
    begin = time.process_time()
    readable("<html>" + "<div data-message-author-role='user'>" * 20_000)
    hostile = ["<a " * 50_000, "<a" + " a" * 50_000, "<pre><div" * 50_000, '<div class="' + "markdown " * 50_000]
    for text in (*hostile, "<div><p>" + "&lt;" * 50_000 + "</p></div>", "<|user|>: " * 50_000):
        readable(shared(text, text))
        readable({"text": text})
    assert time.process_time() - begin < 10  # 2 s here


# --- the samples ------------------------------------------------------------------------------------------------------

SAMPLES = {  # file -> (format, conversations)
    "schema_common_en_sample_230805.json": ("pairs", 5),
    "schema_common_zh_sample_230805.json": ("pairs", 5),
    "schema_gpt4_final_data_sample_230629.json": ("sharegpt", 1),
    "schema_multilang_sample_230914.json": ("marked_text", 6),
    "schema_sharegpt_toolcalls.json": ("sharegpt", 300),
    "schema_vicuna_sample_230629.json": ("sharegpt", 11),
    "chatgpt_export.json": ("chatgpt_export", 96),
    "chatgpt_pages_as_sharegpt.json": ("sharegpt", 5),
}


needs_samples = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no samples at {DATA}: set FASTFT_DATA to the directory of chats/"
)


@needs_samples
@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_is_read_in_its_format(name):
    format, count = SAMPLES[name]
    found = [c for record in read_records(DATA / name) for c in conversations_in(record.value)]
    assert len(found) == count and {c.format for c in found} == {format}
    assert all(c.turns for c in found)


@needs_samples
def test_the_official_export():
    records = [record.value for record in read_records(DATA / "chatgpt_export.json")]
    rendered = [record.value for record in read_records(DATA / "rendered_html_with_truth.jsonl")]
    truth = {record["id"]: [text for text in record["truth"] if text.strip()] for record in rendered}
    for record in records:
        (conversation,) = conversations_in(record)
        assert [t.text for t in conversation.turns if t.text.strip()] == truth[conversation.id]
    assert sum(len(conversations_in(record, Reading(every_branch=True))) for record in records) == 97


@needs_samples
@pytest.mark.parametrize(
    "name", ["rendered_html_with_truth.jsonl", "generated_html_with_truth.jsonl", "sharegpt_zh.jsonl"]
)
def test_no_question_of_a_verbatim_dump_is_changed(name):
    era = survey_dump(read_records(DATA / name), Reading())
    for record in read_records(DATA / name):
        shared = [turn["value"] for turn in record.value["conversations"] if turn["from"] == "human"]
        assert questions(conversations_in(record.value, Reading(era=era))) == shared
