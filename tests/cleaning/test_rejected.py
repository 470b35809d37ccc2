"""rejected.jsonl as an input: what was rejected comes back as it would have been, whatever its format and its reason."""

import json
from pathlib import Path

import pytest
from helpers.dumps import LONG, PAGE, RECORD, REJECTED, share
from helpers.sources import EXAMPLES, EXPORT, OASST
from hypothesis import given, settings
from hypothesis import strategies as st

from cleaning.pipeline import clean
from cleaning.settings import FilterSettings
from cleaning.sources.rejected import read_row
from fastft.common.records import parse_json
from fastft.data.conversation import read_conversations
from fastft.errors import UserError


def kept(directory: Path) -> list[tuple]:
    path = directory / "conversations.jsonl"
    found = read_conversations(path) if path.exists() else []
    return [(c.id, c.model, c.lang, [(m.role, m.content) for m in c.messages]) for c in found]


def rejected(directory: Path) -> list[dict]:
    return [parse_json(line) for line in (directory / "rejected.jsonl").open("rb")]


def write(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def nothing(tmp_path) -> FilterSettings:
    """A filter that lets nothing through."""
    (tmp_path / "own.py").write_text("def nothing(conversation):\n    return 'no'\n")
    return FilterSettings(own_filters=(f"{tmp_path / 'own.py'}:nothing",))


@pytest.mark.parametrize("format", [None, "named"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_format_comes_back(tmp_path, nothing, name, format):
    record = EXAMPLES[name][0]
    if isinstance(record, str):
        dump = tmp_path / "page.html"
        dump.write_text(record)
    else:
        dump = write(tmp_path / "dump.jsonl", record)
    format = format and name
    clean([dump], tmp_path / "whole", format=format)
    report = clean([dump], tmp_path / "out", settings=nothing, format=format)
    assert (report.kept, report.rejected) == (0, {"nothing": 1})
    report = clean([tmp_path / "out/rejected.jsonl"], tmp_path / "again", format=format)
    assert kept(tmp_path / "again") == kept(tmp_path / "whole") != []
    assert report.formats == {name: 1}
    # Rejected twice, it is wrapped twice.
    clean([tmp_path / "out/rejected.jsonl"], tmp_path / "twice", settings=nothing, format=format)
    clean([tmp_path / "twice/rejected.jsonl"], tmp_path / "third", format=format)
    assert kept(tmp_path / "third") == kept(tmp_path / "whole")


@pytest.mark.parametrize("format", [None, "chatgpt_export"])
def test_branches_come_back_one_by_one(tmp_path, nothing, format):
    dump = write(tmp_path / "dump.jsonl", EXPORT, *([] if format else [OASST]))
    clean([dump], tmp_path / "whole", every_branch=True, format=format)
    clean([dump], tmp_path / "out", settings=nothing, every_branch=True, format=format)
    report = clean([tmp_path / "out/rejected.jsonl"], tmp_path / "again", every_branch=True, format=format)
    assert kept(tmp_path / "again") == kept(tmp_path / "whole")
    assert report.input == len(kept(tmp_path / "whole")) == (2 if format else 5)


@pytest.mark.parametrize("name", REJECTED)
def test_every_reason_stands_when_nothing_has_changed(tmp_path, name):
    record, reason, detail = REJECTED[name]
    options = {"blocked_phrases": ["acme Pills", "假药"]}
    clean([write(tmp_path / "dump.jsonl", record)], tmp_path / "out", **options)
    report = clean([tmp_path / "out/rejected.jsonl"], tmp_path / "again", **options)
    (row,) = rejected(tmp_path / "again")
    assert report.rejected == {reason: 1} and detail in row["detail"]
    assert row["record"]["record"] == record
    assert row["id"] == rejected(tmp_path / "out")[0]["id"]


def test_without_the_filter_that_rejected_it_stays(tmp_path):
    refusal = "I'm sorry, but I cannot browse the internet or open links."
    records = [
        share("Read this link", refusal, id="whole"),
        share("Hi", "Hello.", "Read this link for me", refusal, "And 2 + 2?", "4", id="round"),
        share("network", "network error", id="banner"),
    ]
    report = clean([write(tmp_path / "dump.jsonl", *records)], tmp_path / "out")
    assert report.rejected == {"error_banner": 1, "refusal": 1}
    report = clean(
        [tmp_path / "out/rejected.jsonl"], tmp_path / "again", settings=FilterSettings(without_filters=("refusal",))
    )
    assert [(id, [text for _, text in turns]) for id, _, _, turns in kept(tmp_path / "again")] == [
        ("whole", ["Read this link", refusal]),
        ("round-round-2", ["Read this link for me", refusal]),
    ]
    assert report.rejected == {"error_banner": 1} and report.notes == {"single rounds of rejected conversations": 1}


def test_broken_records_are_read_again(tmp_path):
    good = json.dumps(share("q", "a"))
    lines = [b"{broken", good.encode().replace(b'"q"', b'"q\xff"'), b"[" * 5_000, b"7"]
    (tmp_path / "dump.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "page.html").write_bytes(EXAMPLES["chatgpt_page"][0].replace("Use", "Use \x00").encode() + b"\xff")
    report = clean([tmp_path / "dump.jsonl", tmp_path / "page.html"], tmp_path / "out")
    assert report.rejected == {"broken_record": 4, "not_a_conversation": 1}
    report = clean([tmp_path / "out/rejected.jsonl"], tmp_path / "again")
    # What only held bytes that are not UTF-8 can be read by now: they were replaced.
    assert [turns[0] for _, _, _, turns in kept(tmp_path / "again")] == [
        ("user", "q\ufffd"),
        ("user", "vector<int> v;\n  x\ny"),
    ]
    assert [row["detail"] for row in rejected(tmp_path / "again")] == [
        row["detail"]
        for row in rejected(tmp_path / "out")
        if row["id"] in ("dump.jsonl-0", "dump.jsonl-2", "dump.jsonl-3")
    ]


def test_the_era_of_what_comes_back(tmp_path, nothing):
    escaped = [share(f"{i} a &lt; b", f"<div><p>{i}</p></div>", id=str(i)) for i in range(3)]
    dump = write(tmp_path / "dump.jsonl", *escaped)
    clean([dump], tmp_path / "whole")
    assert [turns[0][1] for _, _, _, turns in kept(tmp_path / "whole")] == ["0 a < b", "1 a < b", "2 a < b"]
    clean([dump], tmp_path / "out", settings=nothing)
    clean([tmp_path / "out/rejected.jsonl"], tmp_path / "again")
    assert kept(tmp_path / "again") == kept(tmp_path / "whole")


def test_what_only_looks_like_a_row_is_none(tmp_path):
    row = {"id": "a", "reason": "x", "detail": "", "round": None, "record": share("q", "a")}
    report = clean([write(tmp_path / "dump.jsonl", row, {**row, "where": "", "more": 1})], tmp_path / "out")
    assert report.rejected == {"not_a_conversation": 2}
    hostile = {key: {"deep": [row]} for key in ("id", "where", "reason", "detail", "round", "record")}
    report = clean([write(tmp_path / "dump.jsonl", hostile, {**hostile, "record": None})], tmp_path / "out")
    assert report.rejected == {"not_a_conversation": 2}


def test_a_row_is_read_without_its_record(tmp_path):
    record = {"a": ',"record":', "b": [{"record": 1}]}
    clean([write(tmp_path / ',"record":.jsonl', record)], tmp_path / "out")
    (line,) = (tmp_path / "out/rejected.jsonl").open("rb")
    row, whole = read_row(line), parse_json(line)
    assert parse_json(row.record) == record == whole.pop("record")
    assert {name: getattr(row, name) for name in whole} == whole
    for broken in (b"{}\n", b'{"id":1}\n', b"x", b'{"where":"","record":1}'):
        with pytest.raises(UserError):
            read_row(broken)


@settings(max_examples=30)
@given(st.lists(RECORD, min_size=1, max_size=8), st.sampled_from([b"]", b"", b', {"a": ', b"\xff"]))
def test_all_that_was_rejected_is_an_input(tmp_path_factory, records, tail):
    """… and with the same settings rejected for the same reasons, save duplicates: their keepers are not there."""
    directory = tmp_path_factory.mktemp("law")
    (directory / "dump.json").write_bytes(json.dumps([share(LONG, PAGE % "x"), *records]).encode()[:-1] + tail)
    clean([directory / "dump.json"], directory / "out", near=0)
    first = rejected(directory / "out")
    if not first:
        return
    report = clean([directory / "out/rejected.jsonl"], directory / "again", near=0)
    assert report.input == len(first)
    reasons = {row["where"]: row["reason"] for row in rejected(directory / "again") if row["round"] is None}
    for number, row in enumerate(first, start=1):
        if row["round"] is None and not row["reason"].startswith("duplicate"):
            assert reasons[f"rejected.jsonl: line {number}"] == row["reason"]
