"""What comes from outside and is not what it should be: a ledger line or one clear line, never a traceback."""

import gzip
import io
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from helpers.cleaning_runs import clean_command

from cleaning.pipeline import clean
from cleaning.report.ledger import Report
from fastft.common.records import parse_json, read_records
from fastft.data.conversation import read_conversations

ROOT = Path(__file__).parents[2]
PAGE = '<div class="markdown prose w-full break-words">%s</div>'


def share(question: str, answer: str, id: str = "a") -> dict:
    return {"id": id, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


GOOD = share("is this one good?", "it is", "good")


def run(tmp_path: Path, data: bytes, name: str = "d.jsonl", **options) -> tuple[Report, list, list[dict]]:
    """(the report, conversations, rejected lines) of a dump that also holds a good conversation, which must stay."""
    (tmp_path / name).write_bytes(data)
    report = clean([tmp_path / name], tmp_path / "out", workers=1, **options)
    conversations = list(read_conversations(tmp_path / "out/conversations.jsonl"))
    assert "good" in [c.id for c in conversations]
    rejected = [parse_json(line) for line in (tmp_path / "out/rejected.jsonl").open("rb")]
    return report, conversations, rejected


def lines(*records: dict) -> bytes:
    return b"\n".join(orjson.dumps(record) for record in records)


# --- answers ----------------------------------------------------------------------------------------------------------

NESTED = ["<div><b>" * 1_500, "<blockquote>" * 3_000, "<ul><li>" * 1_500, "<table><tr><td>" * 1_000]


@pytest.mark.parametrize("tags", NESTED)
def test_html_nested_three_thousand_deep_is_refused(tmp_path, tags):
    report, _, rejected = run(tmp_path, lines(share("q", PAGE % (tags + "x")), GOOD))
    assert report.rejected == {"unreadable_html": 1} and "nested" in rejected[0]["detail"]


def test_twenty_thousand_list_items_are_all_kept(tmp_path):
    items = "".join(f"<li><p>item {number * number}</p></li>" for number in range(20_000))
    report, conversations, _ = run(tmp_path, lines(share("q", PAGE % f"<ol>{items}</ol>"), GOOD))
    assert report.kept == 2 and conversations[0].messages[1].content.endswith("\n\n20000. item 399960001")


def test_a_section_that_no_html_has(tmp_path):
    page = PAGE % "a <![foo b"
    report, conversations, _ = run(tmp_path, lines(share("<![foo", "see <![CDATA[x]]>"), share("q", page, "b"), GOOD))
    assert report.kept == 3
    assert [m.content for m in conversations[0].messages] == ["<![foo", "see <![CDATA[x]]>"]


def test_one_message_of_many_megabytes(tmp_path):
    """2 MB each; 50 MB were measured by hand (docs/cleaning.md). What is quadratic in it would not end here."""
    words = " ".join(f"w{number}" for number in random.Random(0).choices(range(100_000), k=300_000))
    paragraphs = "".join(f"<p>{words[at : at + 500][::-1]} <code>x</code></p>" for at in range(0, len(words), 500))
    spaces = " " * 1_000_000 + "a" + "\n" * 1_000_000 + words[:9_000]
    records = [share("q", words), share(words, "ok", "b"), share("p", PAGE % paragraphs, "c"), share("r", spaces, "d")]
    records.append(share("s", "x" * 5_000_000, "loop"))
    report, conversations, _ = run(tmp_path, lines(*records, GOOD))
    assert [c.id for c in conversations] == ["a", "b", "c", "d", "good"] and report.rejected == {"repetition": 1}
    assert conversations[0].messages[1].content == words and conversations[3].messages[1].content == spaces


# --- records ----------------------------------------------------------------------------------------------------------


def test_numbers_that_nothing_can_hold(tmp_path):
    huge = b'{"id": %s, "conversations": []}' % (b"9" * 5_000)
    for name, data in (("d.jsonl", huge + b"\n" + lines(GOOD)), ("d.json", b"[%s, %s]" % (huge, lines(GOOD)))):
        _, _, rejected = run(tmp_path, data, name)
        assert [(r["reason"], r["detail"]) for r in rejected] == [
            ("broken_record", "not JSON: a number of more than 4,300 digits")
        ]
    odd = lines(share("q", "a")).replace(b'"a"', b'1e400, "n": -1e999, "m": NaN, "k": ' + b"9" * 400, 1)
    report, *_ = run(tmp_path, odd + b"\n" + lines(GOOD))
    assert report.kept == 2


def test_of_a_key_that_comes_twice_the_last_counts(tmp_path):
    twice = lines(share("q", "a", "b")).replace(b"{", b'{"id": "first", "conversations": 3, ', 1)
    _, conversations, _ = run(tmp_path, twice + b"\n" + lines(GOOD))
    assert [c.id for c in conversations] == ["b", "good"]


def test_an_id_that_comes_twice_stays_with_the_first(tmp_path):
    report, conversations, _ = run(
        tmp_path, lines(share("q", "one", "a"), share("r", "two", "a"), share("s", "three", "a-2"), GOOD)
    )
    assert report.notes == {"ids that another conversation had, changed": 1}
    assert report.warnings == ["1 conversations had the id of another one, and got their own: 'a' is now 'a-3'"]
    assert [(c.id, c.messages[1].content) for c in conversations[:3]] == [
        ("a", "one"),
        ("a-3", "two"),
        ("a-2", "three"),
    ]


def test_nesting_deeper_than_any_parser(tmp_path):
    deep = b'{"a": ' * 100_000 + b"\n" + b'{"b": ' + b"[" * 5_000 + b"]" * 5_000 + b"}\n"
    report, _, rejected = run(tmp_path, deep + lines(GOOD))
    assert report.rejected == {"broken_record": 2} and "nested too deeply" in rejected[0]["detail"]
    in_array = b'[{"id": "x", "conversations": %s}, %s]' % (b"[" * 5_000 + b"]" * 5_000, lines(GOOD))
    assert run(tmp_path, in_array, "d.json")[0].input == 2


@pytest.mark.parametrize("tail", [b" trailing garbage } ]", b"]]]]}}", b", {", b"\xff\xfe"])
def test_garbage_after_an_array_is_one_broken_record(tmp_path, tail):
    report, conversations, rejected = run(tmp_path, b"[" + lines(GOOD) + b"]" + tail, "d.json")
    assert (
        len(conversations) == 1
        and report.rejected == {"broken_record": 1}
        and rejected[0]["where"].startswith("d.json")
    )


def test_ten_thousand_tiny_records_are_each_counted(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"".join(b'{"a":%d}\n' % number for number in range(10_000)) + lines(GOOD))
    report = clean([tmp_path / "d.jsonl"], tmp_path / "out", workers=1)
    assert (report.input, report.kept, report.rejected) == (10_001, 1, {"not_a_conversation": 10_000})


# --- encodings --------------------------------------------------------------------------------------------------------


def test_latin1_and_nul_bytes_cost_their_line(tmp_path):
    latin = json.dumps(share("fußball", "schön"), ensure_ascii=False).encode("latin-1")
    data = lines(GOOD) + b"\n" * 5_000 + latin + b"\n\0\0\0\n" + lines(share("a\0b", "c\0d", "n")) + b"\n"
    report, conversations, rejected = run(tmp_path, data)
    assert report.rejected == {"broken_record": 2}
    assert "not UTF-8" in rejected[0]["detail"] and "\ufffd" in rejected[0]["record"]
    assert [m.content for m in conversations[1].messages] == ["a\0b", "c\0d"]  # JSON may say so; nobody loses it


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_byte_order_marks_where_files_were_joined(tmp_path, name):
    """cat a.json b.json c.json"""
    pieces = [lines(record) for record in (GOOD, share("q", "a", "b"), share("r", "s", "c"))]
    if name == "d.json":
        pieces = [b"[%s]" % piece for piece in pieces]
    report, conversations, _ = run(tmp_path, b"".join(b"\xef\xbb\xbf%s\n" % piece for piece in pieces), name)
    assert [c.id for c in conversations] == ["good", "b", "c"] and not report.rejected


# --- files ------------------------------------------------------------------------------------------------------------


def damaged_parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([GOOD] * 50), file, compression="snappy")
    data = bytearray(file.getvalue())
    data[8:60] = b"\xff" * 52
    return bytes(data)


def not_utf8_parquet() -> bytes:
    file = io.BytesIO()
    broken = pa.array([b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), file)
    return file.getvalue()


MANY = b"".join(lines(share(f"q{n}", os.urandom(40).hex())) + b"\n" for n in range(999))
BAD_FILES = {
    "bom16.json": ("\ufeff" + json.dumps([GOOD])).encode("utf-16-be"),
    "le16.jsonl": json.dumps(GOOD).encode("utf-16-le"),
    "bom32.json": ("\ufeff" + json.dumps([GOOD])).encode("utf-32-le"),
    "be32.jsonl": json.dumps(GOOD).encode("utf-32-be"),
    "nul.jsonl": b"{ \0" + lines(GOOD),
    "cut.jsonl.gz": gzip.compress(MANY)[:-20_000],
    "head.jsonl.gz": gzip.compress(MANY)[:5],
    "no.jsonl.gz": lines(GOOD),
    "cut.jsonl.zst": zstandard.compress(MANY)[:-20_000],
    "flip.jsonl.zst": zstandard.compress(MANY)[:9] + b"\xff" * 99 + zstandard.compress(MANY)[108:],
    "a.parquet": damaged_parquet(),
    "b.parquet": not_utf8_parquet(),
    "c.parquet": b"PAR1" + b"\xff" * 99 + b"PAR1",
}
COMPLAINTS = {
    "bom16.json": "is UTF-16; convert it first: iconv", "le16.jsonl": "is UTF-16", "be32.jsonl": "is UTF-32",
    "bom32.json": "is UTF-32; convert it first: iconv -f UTF-32", "nul.jsonl": "is a binary file",
    "pipe": "not a regular file", "directory": "is a directory", "/proc/self/mem": "Input/output error",
}  # fmt: skip


@pytest.mark.parametrize("name", [*BAD_FILES, "pipe", "directory", "/proc/self/mem"])
def test_a_file_that_is_no_dump_is_one_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.mkdir("directory")
    if name in BAD_FILES:
        Path(name).write_bytes(BAD_FILES[name])
    Path("good.jsonl").write_bytes(lines(GOOD))
    assert clean_command([name, "good.jsonl", "-o", "out", "--workers", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name}: ") and error.count("\n") == 1
    assert COMPLAINTS.get(name, "damaged" if name.endswith(("gz", "zst")) else "Parquet") in error
    assert not Path("out/conversations.jsonl").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_file_that_may_not_be_read(tmp_path, capsys):
    (tmp_path / "d.jsonl").write_bytes(lines(GOOD))
    (tmp_path / "d.jsonl").chmod(0)
    assert clean_command([str(tmp_path / "d.jsonl"), "-o", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'd.jsonl'}: Permission denied\n"


def test_after_a_full_disk_the_same_command_goes_on(tmp_path):
    """The system's own limit on the size of files stands for the disk: writing fails in the middle of a frame."""
    numbers = range(1_500)
    (tmp_path / "d.jsonl").write_bytes(lines(*[share(f"q {n}", f"{n * n} " * 200, str(n)) for n in numbers], GOOD))
    command = [sys.executable, "-m", "cleaning", str(tmp_path / "d.jsonl"), "--workers", "1", "--near", "0"]
    command += ["--without", "repetition"]

    def clean_into(name: str, limit: int) -> subprocess.CompletedProcess:
        def full():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        directory = str(tmp_path / name)
        return subprocess.run([*command, "-o", directory], cwd=ROOT, capture_output=True, text=True, preexec_fn=full)

    whole = clean_into("whole", resource.RLIM_INFINITY)
    assert whole.returncode == 0
    size = (tmp_path / "whole/conversations.jsonl").stat().st_size
    # The first limit is reached in the log, which is larger than what is written from it, the second one further on.
    for limit in (size // 2, size - 100):
        failed = clean_into("out", limit)
        assert failed.returncode == 1
        line = failed.stderr.splitlines()[-1]
        assert line.startswith(f"error: {tmp_path / 'out'}: File too large: more than ")
        assert line.endswith("make room there and start the same command again")
        assert "Traceback" not in failed.stderr and os.listdir(tmp_path / "out") == [".partial"]
    resumed = clean_into("out", resource.RLIM_INFINITY)
    assert resumed.returncode == 0 and "going on with an interrupted run" in resumed.stderr
    for name in ("conversations.jsonl", "rejected.jsonl", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_readers_of_the_trainer_say_the_same(tmp_path):
    """`read_records` is what the trainer reads its conversations with."""
    (tmp_path / "a.jsonl").write_bytes(b'{"a": %s}\n{"a": 1}' % (b"9" * 5_000))
    assert [r.error is None for r in read_records(tmp_path / "a.jsonl")] == [False, True]
