"""The cleaner as a whole: sources, filters, repairs, duplicates, the ledger, the command line and bad input."""

import json
from pathlib import Path

import orjson
import pytest
from helpers.cleaning_runs import clean_command
from helpers.dumps import LONG, PAGE, RECORD, REJECTED, share
from hypothesis import given
from hypothesis import strategies as st

import cleaning.first_pass
import cleaning.pipeline
import cleaning.run.workdir
import cleaning.run.workers
import cleaning.second_pass
from cleaning.filters.apply import apply_steps
from cleaning.pipeline import OUTPUTS, clean
from cleaning.settings import FilterSettings
from fastft.common.records import parse_json
from fastft.data.conversation import Conversation, Message, read_conversations


def run(tmp_path: Path, records, **options):
    """(report, conversations, rejected) of cleaning `records`, or of a dump given as bytes."""
    dump = tmp_path / "dump.json"
    dump.write_bytes(records if isinstance(records, bytes) else json.dumps(records).encode())
    report = clean([dump], tmp_path / "out", **options)
    report.check()
    kept = tmp_path / "out/conversations.jsonl"
    rejected = [parse_json(line) for line in (tmp_path / "out/rejected.jsonl").open("rb")]
    assert orjson.loads((tmp_path / "out/report.json").read_bytes())["input"] == report.input
    assert not (tmp_path / "out/.partial").exists()
    return report, list(read_conversations(kept)) if kept.exists() else [], rejected


def texts(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.messages]


def test_a_dump_becomes_conversations(tmp_path):
    human = "fix: vector<int> v;\n\tfor (…) a_b * c  \n<p>1 / 2</p>&lt;"
    records = [
        share(human, PAGE % "<p>Run <code>make</code>.</p>", model="Model: GPT-4"),
        {"id": "b", "items": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "<div><p>x</p></div>"}]},
        {"messages": [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "q"), ("assistant", "*a*"))]},
    ]
    report, conversations, rejected = run(tmp_path, records)
    assert [(c.id, c.model, texts(c)) for c in conversations] == [
        ("a", "Model: GPT-4", [human, "Run `make`."]),
        ("b", "", ["q", "x"]),
        ("dump.json-2", "", ["s", "q", "*a*"]),
    ]
    assert [m.train for m in conversations[2].messages] == [False, False, True]
    assert {(c.source, c.part, c.parts) for c in conversations} == {("dump.json", 0, 1)}
    assert (report.input, report.kept, report.parts, rejected) == (3, 3, 3, [])
    assert report.answers == {"html": 2, "as_is": 1}
    assert report.rounds == {"in": 3, "kept": 3, "rejected": 0, "shortened": 0}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_with_its_reason_and_its_record(tmp_path, name):
    record, reason, detail = REJECTED[name]
    report, conversations, rejected = run(
        tmp_path, [share("q", "a", id="good"), record], blocked_phrases=["acme Pills", "假药"]
    )
    assert [c.id for c in conversations] == ["good"]
    assert report.rejected == {reason: 1}
    assert [r["record"] for r in rejected] == [record]
    assert rejected[0]["reason"] == reason and detail in rejected[0]["detail"]
    assert rejected[0]["where"] == "dump.json: record 2" and rejected[0]["round"] is None


KEPT = [
    share("What does “network error” mean?", "network error means that the line is down"),
    share("An error occurred. Something went wrong", "Where?"),
    share("pacme pills", "acmepills"),
    share("I use ChatGPT by OpenAI", "10 / 2 = 5"),
    share("2+2?", "4"),
]


@pytest.mark.parametrize("record", KEPT)
def test_filters_do_not_overreach(tmp_path, record):
    report, conversations, _ = run(tmp_path, [record], blocked_phrases=["acme pills", " "])
    assert report.kept == 1 and texts(conversations[0]) == [t["value"] for t in record["conversations"]]


def talk(roles: str) -> Conversation:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return Conversation("x", [Message(names[r], f"{r}{i}", r == "a") for i, r in enumerate(roles)])


@pytest.mark.parametrize(
    "shared, repaired, counts",
    [
        ("ua", "u0 a1", {}),
        ("saua", "s0 u2 a3", {"dropped_leading_assistant": 1}),
        ("aaua", "u2 a3", {"dropped_leading_assistant": 2}),
        ("uaaua", "u0 a1\n\na2 u3 a4", {"merged_assistant_turns": 1}),
        ("uau", "u0 a1", {"trimmed_last_question": 1}),
        ("uauu", "u0 a1", {"trimmed_last_question": 2}),
        (
            "aaauaau",
            "u3 a4\n\na5",
            {"dropped_leading_assistant": 3, "merged_assistant_turns": 1, "trimmed_last_question": 1},
        ),
        ("aaa", "", {"dropped_leading_assistant": 3}),
        ("u", "u0", {}),
    ],
)
def test_repairs_are_counted(shared, repaired, counts):
    conversation = talk(shared)
    changed = apply_steps(conversation, FilterSettings()).repairs
    assert " ".join(texts(conversation)) == repaired
    assert changed == counts


@given(st.text("suat", max_size=9))
def test_what_passes_the_filters_alternates(roles):
    conversation = talk(roles)
    if not apply_steps(conversation, FilterSettings()).reason:
        found = "".join(m.role[0] for m in conversation.messages).removeprefix("s")
        assert found == "ua" * (len(found) // 2) and found
    assert [m.train for m in conversation.messages] == [m.role == "assistant" for m in conversation.messages]


def test_duplicates_name_their_keeper(tmp_path):
    records = [
        share(LONG, "Yes.", id="short"),
        share(LONG, "Yes.", "and then?", "No.", id="long"),
        share(LONG.upper() + " \n", " Yes.", "and  then?", "no.", id="folded"),
        share(LONG, "Another answer.", id="other"),
        share(LONG, "Yes.", "and then?", "Maybe.", id="branch"),
        share("hi", "Hello!", "one", "1", id="greeting 1"),
        share("hi", "Hello!", "two", "2", id="greeting 2"),
        share("hi", "Hello!", "two", "2", id="greeting 3"),
    ]
    _, conversations, rejected = run(tmp_path, records)
    assert [c.id for c in conversations] == ["long", "other", "branch", "greeting 1", "greeting 2"]
    assert [(r["id"], r["reason"], r["detail"]) for r in rejected] == [
        ("short", "duplicate_beginning", "kept as branch"),
        ("folded", "duplicate", "kept as long"),
        ("greeting 3", "duplicate", "kept as greeting 2"),
    ]


def test_same_id_with_other_content_gets_an_id_of_its_own(tmp_path):
    records = [share(f"question {i}", "a", id=id) for i, id in enumerate(["a", "a", "a-2", "a", 5, None])]
    _, conversations, _ = run(tmp_path, records)
    ids = [c.id for c in conversations]
    assert ids[0] == "a" and ids[2] == "a-2" and ids[4:] == ["5", "dump.json-5"] and len(set(ids)) == 6
    assert [texts(c)[0] for c in conversations] == [f"question {i}" for i in range(6)]


def words(messages: list[Message]) -> int:
    return 5 + sum(len(m.content.split()) + 3 for m in messages)


def test_rounds_over_the_limit_are_rejected_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning.second_pass, "token_counter", lambda *_: (words, lambda part: None, lambda part: None))
    records = [share("q1", "a1", "q2 " * 90, "a2", "q3", "a3"), share("q4 " * 90, "a4", id="b")]
    report, conversations, rejected = run(tmp_path, records, max_tokens=40, model="m", overlong="reject")
    assert [(c.id, c.part, c.parts, texts(c)) for c in conversations] == [
        ("a", 0, 2, ["q1", "a1"]),
        ("a", 1, 2, ["q3", "a3"]),
    ]
    assert (report.kept, report.parts, report.rejected) == (1, 2, {"over_window": 1})
    assert report.rounds == {"in": 4, "kept": 2, "rejected": 2, "shortened": 0}
    assert [(r["id"], r["round"], r["detail"]) for r in rejected] == [
        ("a", 2, "round 2 of 3 has 102 tokens, more than 40"),
        ("b", None, "round 1 of 1 has 102 tokens, more than 40"),
    ]
    assert rejected[0]["record"]["messages"][1] == {"role": "assistant", "content": "a2"}
    assert rejected[1]["record"] == records[1]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_lone_surrogates_and_nan(tmp_path):
    answer = json.dumps(PAGE % "<p>x</p>").encode()
    dump = (
        rb'[{"id": "a", "score": NaN, "conversations": [{"from": "human", "value": "\ud83d cut"}, '
        rb'{"from": "gpt", "value": ' + answer + rb"}]}, "
        rb'{"id": "\ud83d", "n": -Infinity, "m": ' + b"9" * 30 + b"}]"
    )
    report, conversations, rejected = run(tmp_path, dump)
    assert texts(conversations[0])[0] == "\ufffd cut"
    assert report.rejected == {"not_a_conversation": 1}
    assert (
        b'"n": null' in (tmp_path / "out/rejected.jsonl").read_bytes() and rejected[0]["where"] == "dump.json: record 2"
    )


def test_a_cut_file_is_processed_as_far_as_it_goes(tmp_path, capsys):
    whole = json.dumps([share(f"q{i}", "a", id=str(i)) for i in range(5)])
    (tmp_path / "d.json").write_text(whole[:-30])
    assert clean_command([str(tmp_path / "d.json"), "-o", str(tmp_path / "out")]) == 0
    report = orjson.loads((tmp_path / "out/report.json").read_bytes())
    assert (report["input"], report["kept"], report["rejected"]) == (5, 4, {"broken_record": 1})
    rejected = orjson.loads((tmp_path / "out/rejected.jsonl").read_bytes())
    assert rejected["record"] == whole[:-30][whole.index('{"id": "4"') :]
    assert "warning: d.json: record 5" in capsys.readouterr().err


def test_a_file_cut_between_records_is_mentioned(tmp_path):
    report, conversations, _ = run(tmp_path, json.dumps([share("q", "a")])[:-1].encode())
    assert (report.input, len(conversations)) == (1, 1)
    assert "cut short" in report.warnings[0]


def test_broken_lines_are_rejected_records(tmp_path):
    lines = [
        json.dumps(share("q", "a")),
        "{broken",
        '{"id": "\xff"}'.encode("latin-1").decode("latin-1"),
        "[" * 100_000,
    ]
    dump = "\n".join(lines).encode("latin-1")
    report, conversations, rejected = run(tmp_path, dump)
    assert len(conversations) == 1 and report.rejected["broken_record"] == 3
    assert rejected[0]["record"] == "{broken" and rejected[0]["where"] == "dump.json: line 2"


@pytest.mark.parametrize("depth", [200, 300, 900, 990, 5_000])
def test_a_deeply_nested_record(tmp_path, depth):
    nested = "[" * depth + "]" * depth
    dump = f'{nested}\n{{"id": {nested}, "conversations": {nested}}}\n{json.dumps(share("q", "a"))}'
    report, conversations, _ = run(tmp_path, b"{}\n" + dump.encode())
    assert (report.input, [c.id for c in conversations]) == (4, ["a"])


def test_ten_thousand_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning.second_pass, "token_counter", lambda *_: (words, lambda part: None, lambda part: None))
    report, conversations, _ = run(tmp_path, [share(*["word"] * 10_000)], max_tokens=500, model="m")
    assert report.rounds["kept"] == 5_000 and report.parts == len(conversations) == -(-5_000 // 61)


@given(records=st.lists(RECORD, min_size=1, max_size=12), tail=st.sampled_from([b"]", b"", b', {"a": ', b"\xff"]))
def test_the_books_balance_on_any_input(tmp_path_factory, records, tail):
    dump = json.dumps(records).encode()[:-1] + tail
    report, conversations, rejected = run(tmp_path_factory.mktemp("law"), dump)
    assert report.input - len(records) in (0, 1)
    assert report.kept == len(conversations) == len({c.id for c in conversations})
    rounds = [r["reason"] for r in rejected if r["round"] is not None]
    assert sum(report.rejected.values()) == len(rejected) - len(rounds) == report.input - report.kept
    dropped = {name: count for name, count in report.repairs.items() if name.startswith("dropped_rounds:")}
    assert dropped == {f"dropped_rounds:{reason}": rounds.count(reason) for reason in rounds}


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=4))
def test_human_text_is_untouched(tmp_path_factory, questions):
    turns = [text for i, q in enumerate(questions) for text in (f"{i}{q}", PAGE % f"<p>{i}</p>")]
    _, conversations, _ = run(tmp_path_factory.mktemp("law"), [share(*turns)])
    assert texts(conversations[0])[::2] == turns[::2]


def test_workers_do_not_change_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning.run.workers, "POOL_FROM", 0)
    monkeypatch.setattr(cleaning.first_pass, "SHARD_BYTES", 2_000)
    records = [share(f"question {i % 70}", PAGE % f"<p>{'x' * (i % 50)}</p>", id=str(i % 40)) for i in range(200)]
    (tmp_path / "d.json").write_text(json.dumps([*records, 3, share("q")]))
    for workers in (1, 2):
        clean([tmp_path / "d.json"], tmp_path / str(workers), workers=workers)
    for name in {*OUTPUTS} - {"conversations.holdout.jsonl"}:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
