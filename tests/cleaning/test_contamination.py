"""Contamination: planted benchmark questions are found, whatever their punctuation, and nothing else is."""

import json

import pytest
from helpers.cleaning_runs import clean_command
from hypothesis import given
from hypothesis import strategies as st

import fastft.data.dedup.shingles
from fastft.data.conversation import Conversation, Message
from fastft.data.dedup.contamination import COMMON, Account, Benchmarks, load_benchmarks
from fastft.errors import UserError

LONG = (
    "Imagine you are writing a blog post comparing two popular smartphone models; how would you go about it, and why?"
)
SHORT = "How can I improve my time management skills?"
TINY = "What is 2 + 2?"
CHINESE = "请为一家本地咖啡馆写一篇有趣的博客文章，介绍它的历史、菜单和氛围，并附上联系方式。"
ITEMS = [("b", "long", [LONG]), ("b", "short", [SHORT]), ("b", "tiny", [TINY]), ("c", "chinese", [CHINESE])]
BENCHMARKS = Benchmarks(ITEMS)


def talk(*texts: str) -> Conversation:
    return Conversation("x", [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)])


def found(*texts: str, benchmarks: Benchmarks = BENCHMARKS) -> list[tuple[str, str, int]]:
    return [(hit.item, hit.rule, hit.turn) for hit in benchmarks.hits(talk(*texts))]


@pytest.mark.parametrize(
    "texts, hits",
    [
        (("Hi", f"You could ask: {LONG.upper()}"), [("long", "characters", 2)]),
        (("x " + " ".join(LONG.split()[2:16]) + " x", "y"), [("long", "characters", 1)]),
        (("imagine you are writing a blog post comparing two popular smartphone", "Yes"), [("long", "characters", 1)]),
        (("Imagine you are writing a blog post", "comparing two popular smartphone models"), []),
        (("Imagine—you\nare  writing a **blog** post: comparing two popular", "y"), []),
        (("a", "b", "so… how can I improve my (time) management skills", "c"), [("short", "whole item", 3)]),
        (("How can I improve my time management?", "c"), []),
        (("what is 2+2", "4"), [("tiny", "whole item", 1)]),
        (("Tell me: what is 2 + 2?", "4"), []),
        (("what is 2", "2"), []),
        (("好的，" + CHINESE[1:22], "好"), [("chinese", "words", 1)]),
        (("写一篇有趣的博客文章，介绍它的历史", "好"), []),
        (("", ""), []),
    ],
)
def test_shared_words_and_characters_are_hits_by_the_rules(texts, hits):
    assert found(*texts) == hits


def test_thirteen_words_are_enough_and_twelve_are_not():
    words = "a an as at be by do go he if in is it me my no of on or so to up us we".split()
    benchmarks = Benchmarks([("b", "1", [" ".join(words)])])
    for count, hit in ((12, []), (13, [("1", "words", 1)])):
        assert found(f"oh {' '.join(words[5 : 5 + count])} oh", "y", benchmarks=benchmarks) == hit


def test_other_roles_are_not_looked_at():
    assert not BENCHMARKS.hits(Conversation("x", [Message("system", LONG), Message("tool", LONG)]))


def test_the_excerpt_is_of_that_turn_only():
    (hit,) = BENCHMARKS.hits(talk("hello there", f"well: {SHORT}", "other text"))
    assert (hit.benchmark, hit.role, hit.excerpt) == ("b", "assistant", SHORT.lower())


def test_a_prompt_template_is_no_evidence():
    shared = "Answer the following question as well as you can, and think step by step before you give an answer:"
    items = [("b", str(i), [f"{shared} why is number {i} the number {i} and not {i + 1}"]) for i in range(COMMON + 1)]
    benchmarks = Benchmarks([*items, ("b", "bare", [shared])])
    assert found(shared, "y", benchmarks=benchmarks) == []
    assert benchmarks.benchmarks["b"].items == COMMON + 2 and benchmarks.benchmarks["b"].common == 1
    hits = found(items[3][2][0], "y", benchmarks=benchmarks)
    assert [item for item, _, _ in hits] == ["3"]


texts = st.text(st.characters(exclude_categories=["Cs", "Co", "Cn"]), max_size=80)


@given(before=texts, after=texts, turns=st.lists(texts, max_size=4), item=st.sampled_from([LONG, SHORT, CHINESE]))
def test_a_planted_question_is_found(before, after, turns, item):
    name = {LONG: "long", SHORT: "short", CHINESE: "chinese"}[item]
    hits = found(*turns, f"{before} \n{item}\n {after}", *turns)
    assert (name, len(turns) + 1) in [(found_item, turn) for found_item, _, turn in hits]


@given(st.lists(texts, max_size=4), st.integers(6, 12))
def test_the_size_of_slices_changes_no_hit(turns, size):
    turns = [*turns, "word " * 300 + SHORT + " word" * 300, LONG]
    whole = [(h.item, h.turn) for h in BENCHMARKS.hits(talk(*turns))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastft.data.dedup.shingles, "SLICE", 1 << size)
        assert {(h.item, h.turn) for h in BENCHMARKS.hits(talk(*turns))} == set(whole)


def test_benchmarks_are_named_by_their_files_and_directories(tmp_path):
    for directory, records in {
        "a": [{"question_id": 81, "turns": [LONG, SHORT]}, {"answer": "x"}],
        "b": [{"instruction": "Fix", "input": LONG}, {"task_id": "T/1", "prompt": SHORT}],
    }.items():
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "question.jsonl").write_text("\n".join(map(json.dumps, records)))
    benchmarks = load_benchmarks((str(tmp_path / "a/question.jsonl"), str(tmp_path / "b/question.jsonl")))
    hits = benchmarks.hits(talk("hi", LONG + SHORT))
    assert {(h.benchmark, h.item) for h in hits} == {("a/question", "81"), ("b/question", "1"), ("b/question", "T/1")}
    account = Account(benchmarks.benchmarks)
    account.add("x", hits)
    account.add("y", hits[:1])
    report = account.to_report()
    assert {name: (each["items"], each["items_hit"], each["conversations"]) for name, each in report.items()} == {
        "a/question": (1, 1, 2),
        "b/question": (2, 2, 1),
    }
    assert report["a/question"]["examples"][0]["id"] == "x" and len(report["a/question"]["examples"]) == 1


def test_a_file_without_items_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"answer": "y"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl: no record has"):
        load_benchmarks((str(tmp_path / "x.jsonl"),))


def test_contaminated_conversations_are_rejected_or_flagged(tmp_path):
    (tmp_path / "bench.jsonl").write_text(json.dumps({"question_id": 7, "turns": [SHORT]}))
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": f"Ask: {SHORT}"}]
    records = [
        {"id": "bad", "conversations": turns},
        {"id": "good", "conversations": [turns[0], {**turns[1], "value": "x"}]},
    ]
    (tmp_path / "d.json").write_text(json.dumps(records))
    for choice, kept in (("reject", 1), ("flag", 2)):
        arguments = ["--against", str(tmp_path / "bench.jsonl"), "--contaminated", choice]
        assert clean_command([str(tmp_path / "d.json"), "-o", str(tmp_path / "out"), *arguments]) == 0
        report = json.loads((tmp_path / "out/report.json").read_text())
        assert report["kept"] == kept
        found = report["contamination"]["bench"]
        assert (found["items_hit"], found["conversations"], found["examples"][0]["id"]) == (1, 1, "bad")
        if choice == "reject":
            (line,) = map(json.loads, (tmp_path / "out/rejected.jsonl").open())
            assert line["reason"] == "contaminated"
            assert line["detail"] == f"turn 2 (assistant) holds whole item of bench 7: {SHORT.lower()!r}"
