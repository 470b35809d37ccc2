"""Everything that can be named as input of the cleaner, and what its ledger counts."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from helpers.bugs import bug
from helpers.cleaning_runs import clean_command
from helpers.sources import CHATGPT_PAGE, EXAMPLES, EXPORT, LABEL, OASST, shared, spoken

from cleaning.pipeline import clean
from cleaning.sources import inputs
from cleaning.sources.formats import conversations_in
from cleaning.sources.inputs import open_inputs
from fastft.common.records import parse_json
from fastft.data.conversation import read_conversations
from fastft.errors import UserError

ROOT = Path(__file__).parents[2]
LOG = EXAMPLES["chat_log"][0]


def containers() -> dict[str, bytes]:
    lines = (json.dumps(LOG) + "\n").encode() * 2
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([LOG, LOG]), parquet)
    return {
        "a.json": json.dumps([LOG, LOG]).encode(),
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": zstandard.ZstdCompressor().compress(lines),
        "a.parquet": parquet.getvalue(),
    }


@pytest.mark.parametrize("name", containers())
def test_every_container_is_read_from_a_file_and_from_standard_input(tmp_path, monkeypatch, name):
    data = containers()[name]
    (tmp_path / name).write_bytes(data)
    report = clean([tmp_path / name], tmp_path / "out", workers=1)
    assert (report.input, report.rejected, report.formats) == (2, {"duplicate": 1}, {"chat_log": 2})
    assert report.notes == {"flagged by moderation": 2, "flagged toxic": 2}
    (conversation,) = read_conversations(tmp_path / "out/conversations.jsonl")
    assert (conversation.lang, conversation.model) == ("en", "vicuna-13b")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    report = clean(["-"], tmp_path / "piped", workers=1)
    assert (report.kept, report.files[0]["name"], report.files[0]["records"]) == (1, "stdin", 2)


@pytest.mark.parametrize("name", containers())
def test_what_a_file_is_called_does_not_matter(tmp_path, name):
    (tmp_path / "dump.json").write_bytes(containers()[name])
    assert clean([tmp_path / "dump.json"], tmp_path / "out", workers=1).input == 2


def test_a_packed_page_is_read(tmp_path):
    for name, pack in (("a.html.gz", gzip.compress), ("b.html.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(pack(CHATGPT_PAGE.encode()))
        assert clean([tmp_path / name], tmp_path / "out", workers=1).formats == {"chatgpt_page": 1}


def test_nothing_to_read_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    (tmp_path / "a.json").write_text("[]")
    for name, says in (
        ("-", "standard input: is empty"),
        (str(tmp_path / "a.json"), "there is no record in the input"),
    ):
        assert clean_command([name, "-o", str(tmp_path / "out"), "--workers", "1"]) == 1
        assert capsys.readouterr().err == f"error: {says}\n"


def test_saved_pages_and_the_command_line(tmp_path, capsys):
    (tmp_path / "a.html").write_text(CHATGPT_PAGE)
    (tmp_path / "b.htm").write_bytes(b"\xef\xbb\xbf" + EXAMPLES["sharegpt_page"][0].encode())
    (tmp_path / "c.html").write_text("<html>nothing</html>")
    (tmp_path / "d.html").write_bytes(b"<html>\xff\xfe</html>")
    pages = [str(path) for path in sorted(tmp_path.glob("*.htm*"))]
    assert clean_command([*pages, "-o", str(tmp_path / "out"), "--era", "auto", "--branches", "all"]) == 0
    kept = list(read_conversations(tmp_path / "out/conversations.jsonl"))
    assert [[m.content for m in c.messages] for c in kept] == [
        ["vector<int> v;\n  x\ny", "Use `a<b`."],
        ["a < b", "yes & no"],
    ]
    rejected = [parse_json(line) for line in (tmp_path / "out/rejected.jsonl").open("rb")]
    assert [(r["where"], r["reason"]) for r in rejected] == [
        ("c.html", "not_a_conversation"),
        ("d.html", "broken_record"),
    ]
    assert clean_command([*pages, "-o", str(tmp_path / "x"), "--format", "alpaca"]) == 1
    with pytest.raises(SystemExit):
        clean_command(["--help"])
    assert all(name in capsys.readouterr().out.replace("\n", "") for name in ("marked_text",))


def test_the_ledger_counts_conversations(tmp_path):
    """Two branches, three leaves, one plain, one broken record, one that holds no conversation."""
    lines = [EXPORT, OASST, LOG, {"x": 1}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    report = clean([tmp_path / "a.jsonl"], tmp_path / "out", every_branch=True, blocked_phrases=["its fall"], workers=1)
    assert report.input == report.files[0]["input"] == 2 + 3 + 1 + 1 + 1 and report.files[0]["records"] == 5
    assert report.formats == {"chat_log": 1, "chatgpt_export": 2, "oasst": 3}
    rejected = [parse_json(line) for line in (tmp_path / "out/rejected.jsonl").open("rb")]
    assert report.rejected["broken_record"] == report.rejected["not_a_conversation"] == 1
    # A rejected branch is kept as messages, not with its whole tree: it can be fed back in.
    branch = next(r for r in rejected if r["where"] == "a.jsonl: line 1, branch 2")
    assert "mapping" not in branch["record"] and spoken(conversations_in(branch["record"])[0]).endswith("Its fall.")
    ids = [c.id for c in read_conversations(tmp_path / "out/conversations.jsonl")]
    assert len(set(ids)) == len(ids) == report.kept
    assert orjson.loads((tmp_path / "out/report.json").read_bytes())["files"][0]["era"]["reasons"]


def test_the_era_is_in_the_report_and_reaches_the_workers(tmp_path):
    escaped = shared("a &lt; b", f"<div><p>yes</p>{LABEL}</div>")
    (tmp_path / "a.json").write_text(json.dumps([escaped | {"id": str(i), "pad": "x" * 2000} for i in range(600)]))
    report = clean([tmp_path / "a.json"], tmp_path / "out", workers=2)
    assert report.notes == {"unescaped questions": 600} and report.files[0]["era"]["evidence"]["labels"] == 600
    (conversation,) = read_conversations(tmp_path / "out/conversations.jsonl")
    assert [m.content for m in conversation.messages] == ["a < b", "yes\n\n```css\ncode .\n```"]


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("gone.json", "no such file"),
        ("no/such.jsonl", "no such file"),
        (".", "is a directory"),
        ("cleaning-test/no-such-dataset", "the Hub gave no such dataset"),
    ],
)
def test_an_input_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, capsys, name, complaint):
    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub\n(offline)")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr("datasets.load_dataset", None)  # it would ask again and again
    assert clean_command([name, "-o", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert complaint in error and name in error and error.count("\n") == 1


def test_a_bug_of_ours_is_no_fault_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(inputs, "_hub_rows", bug(inputs))
    with pytest.raises(ValueError, match="not a number"):
        clean(["owner/chats"], tmp_path / "out", workers=1)


def test_a_dataset_of_the_hub_is_streamed(tmp_path, monkeypatch):
    def load(name, streaming):
        assert (name, streaming) == ("owner/chats", True)
        return {"test": iter([]), "train": [LOG, {"conversation": None}]}

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr("datasets.load_dataset", load)
    report = clean(["owner/chats"], tmp_path / "out", workers=1)
    assert (report.input, report.kept, report.files[0]["name"]) == (2, 1, "owner/chats")

    def fails_later(name, streaming):
        def rows():
            yield LOG
            raise OSError("connection lost")

        return {"train": rows()}

    monkeypatch.setattr("datasets.load_dataset", fails_later)
    with pytest.raises(UserError, match=r"failed after 1 rows \(connection lost\)"):
        clean(["owner/chats"], tmp_path / "out", workers=1)


def test_standard_input_of_a_process(tmp_path):
    def run(*inputs: str):
        command = [sys.executable, "-m", "cleaning", *inputs, "-o", str(tmp_path / "out")]
        return subprocess.run(command, input=json.dumps([LOG]).encode(), capture_output=True, cwd=ROOT)

    done = run("-")
    assert done.returncode == 0 and b"conversations.jsonl" in done.stdout
    done = run("-", "-")
    assert done.returncode == 1 and b"once only" in done.stderr
    with pytest.raises(UserError, match="no such file"), open_inputs([tmp_path / "x/y"]):
        pass
