"""The record of served turns: what is written, and the conversations that are made of it."""

import json
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import orjson
import pytest
from helpers.serving import ENVIRONMENT

from fastft.cli import main
from fastft.serve.gateway.events import FILE, EventLog, ServedTurn, read_answers, read_events


def turn(messages: list[dict], answer: str | None, model: str = "m", **more) -> ServedTurn:
    """A turn that was answered whole, unless `more` says otherwise."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer},
        "finish_reason": more.pop("finish", "stop"),
    }
    sent = [orjson.dumps({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})]
    fields = {
        "path": "/v1/chat/completions",
        "asked": model,
        "body": orjson.dumps({"model": model, "messages": messages}),
        "streamed": False,
        "key": None,
        "conversation": "c",
        "conversation_from": "messages",
        "turn": 1,
        "policy": None,
        "chosen": model,
        "probabilities": {model: 1.0},
        "why": "asked by name",
        "answered": model if answer is not None else None,
        "tries": [{"worker": "http://w/v1", "model": model, "outcome": "answered"}],
        "status": 200,
        "outcome": "answered",
        "sent": sent if answer is not None else [],
    }
    return ServedTurn(**(fields | more))


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def recorded(directory: Path, turns: list[ServedTurn], texts: bool = True) -> list[dict]:
    log = EventLog(directory, texts)
    for each in turns:
        log.add(each)
    log.close()
    assert log.lost == 0
    return list(read_events(directory))


def exported(directory: Path, output: Path) -> list[dict]:
    assert main(["record", "export", str(directory), "--as", "conversations", "-o", str(output)]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


# Events --------------------------------------------------------------------------------------------------------------------


def test_all_that_was_added_is_written_in_order_while_others_read(tmp_path):
    log, counts = EventLog(tmp_path), []
    threads = [
        threading.Thread(target=lambda n=n: [log.add(turn([user(f"{n} {i}")], "a")) for i in range(300)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        counts.append(sum(1 for _ in read_events(tmp_path)))
    log.close()
    events = list(read_events(tmp_path))
    assert len(events) == 1200 == len({each["id"] for each in events}) and counts == sorted(counts)
    for n in range(4):
        mine = [each["messages"][0]["content"] for each in events if each["messages"][0]["content"][0] == str(n)]
        assert mine == [f"{n} {i}" for i in range(300)]


def test_an_event_says_who_was_asked_chosen_and_answered(tmp_path):
    [event] = recorded(tmp_path, [turn([user("q")], "a", asked="best", policy="fixed")])
    assert (event["asked"], event["policy"], event["chosen"], event["model"]) == ("best", "fixed", "m", "m")
    assert event["answers"] == [{"content": "a", "finish_reason": "stop"}] and event["completion_tokens"] == 2


def test_one_event_that_cannot_be_made_does_not_cost_the_others(tmp_path):
    log = EventLog(tmp_path)
    for body in (b"not JSON", orjson.dumps({"messages": [user("q")]})):
        log.add(turn([user("q")], "a", body=body))
    log.close()
    assert log.lost == 1 and len(list(read_events(tmp_path))) == 1


def test_a_record_goes_on_after_a_restart_and_is_in_wal_mode(tmp_path):
    for number in range(3):
        assert len(recorded(tmp_path, [turn([user("q")], "a")])) == number + 1
    assert sqlite3.connect(tmp_path / FILE).execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_answers_are_read_from_what_was_sent():
    event = lambda delta, reason=None, i=0: (  # noqa: E731
        b"data: " + orjson.dumps({"choices": [{"index": i, "delta": delta, "finish_reason": reason}]}) + b"\n\n"
    )
    sent = (
        b": waiting\n\n"
        + event({"role": "assistant", "content": ""})
        + event({"content": "a"})
        + event({"content": "x"}, i=1)
    )
    sent += event({"reasoning_content": "hm"}) + event({"content": "b"}) + event({}, "stop") + event({}, "length", 1)
    sent += b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\ndata: [DONE]\n\n'
    answers, usage = read_answers(sent, streamed=True)
    assert answers == [
        {"content": "ab", "finish_reason": "stop", "reasoning": "hm"},
        {"content": "x", "finish_reason": "length"},
    ]
    assert usage == {"completion_tokens": 3}
    assert read_answers(sent[: sent.index(b'"b"')], streamed=True)[0][0]["content"] == "a"
    assert read_answers(b'{"choices": [{"index": 0, "text": "t", "finish_reason": "stop"}]}', streamed=False)[0][0] == {
        "content": "t",
        "finish_reason": "stop",
    }
    assert read_answers(b"<html>", streamed=False) == ([], {})


# Export --------------------------------------------------------------------------------------------------------------------


def test_turns_become_the_conversation_that_they_were(tmp_path):
    """Each once; the models that answered are named, in order; what clients made up is not learned."""
    first = [{"role": "system", "content": "s"}, user("q1")]
    second = [*first, said("a1"), user("q2")]
    made_up = [user("x"), said("never said"), user("y")]
    recorded(tmp_path / "r", [turn(first, "a1", "a"), turn(second, "a2", "b"), turn(made_up, "z", "a")])
    rows = exported(tmp_path / "r", tmp_path / "c.jsonl")
    assert [row["model"] for row in rows] == ["a+b", "a"]
    assert [(m["role"], m["content"], m["train"]) for m in rows[0]["messages"]] == [
        ("system", "s", False),
        ("user", "q1", False),
        ("assistant", "a1", True),
        ("user", "q2", False),
        ("assistant", "a2", True),
    ]
    assert [m["train"] for m in rows[1]["messages"]] == [False, False, False, True]


def test_what_was_asked_again_or_cut_is_told_apart(tmp_path):
    again = [turn([user("q")], "one"), turn([user("q")], "two")]
    cut = [turn([user("cut")], "half", finish="length"), turn([user("died")], "ha", outcome="died", finish=None)]
    silent = [turn([user("none")], None), turn([user("title")], "t", conversation=None, conversation_from="background")]
    recorded(tmp_path / "r", [*again, *cut, *silent])
    rows = exported(tmp_path / "r", tmp_path / "c.jsonl")
    ends = {row["messages"][-1]["content"]: row["messages"][-1]["ends"] for row in rows}
    assert ends == {"one": True, "two": True, "half": False, "ha": False}


def test_the_cleaner_and_the_trainer_read_the_conversations(tmp_path):
    from fastft.data.conversation import read_conversations

    text = "Seventeen is a prime number because only one and itself divide it without a rest."
    recorded(tmp_path / "r", [turn([user("Why is seventeen prime?")], text)])
    exported(tmp_path / "r", tmp_path / "c.jsonl")
    [read] = read_conversations(tmp_path / "c.jsonl")
    assert read.messages[-1].content == text and read.messages[-1].train
    command = [sys.executable, "-m", "cleaning", str(tmp_path / "c.jsonl"), "--output_dir", str(tmp_path / "clean")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    ledger = json.loads((tmp_path / "clean" / "report.json").read_text())
    assert (ledger["input"], ledger["kept"]) == (1, 1)


def test_events_are_exported_as_they_are(tmp_path):
    events = recorded(tmp_path / "r", [turn([user("q")], "a")])
    assert main(["record", "export", str(tmp_path / "r"), "-o", str(tmp_path / "e.jsonl")]) == 0
    assert [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()] == events


def test_the_record_is_not_overwritten_by_its_export(tmp_path, capsys):
    events = recorded(tmp_path / "r", [turn([user("q")], "a")])
    (tmp_path / "link").symlink_to(tmp_path / "r" / "events.sqlite")
    for output in (tmp_path / "r" / "events.sqlite", tmp_path / "link"):
        assert main(["record", "export", str(tmp_path / "r"), "-o", str(output)]) == 1
        assert "would be overwritten" in capsys.readouterr().err
    assert main(["record", "export", str(tmp_path / "r"), "-o", str(tmp_path / "e.jsonl")]) == 0
    assert (tmp_path / "e.jsonl").read_text().count("\n") == len(events)


@pytest.mark.parametrize(
    "words, said",
    [
        (["export", "/nowhere", "-o", "OUT"], "/nowhere: no record (events.sqlite) is there"),
        (["export", "DIR", "-o", "OUT", "--as", "battles"], "this record holds no vote that counts"),
        (["export", "DIR", "-o", "OUT", "--as", "outcomes"], "this record holds no vote that counts"),
        (["export", "DIR", "-o", "OUT", "--as", "conversations"], "the record keeps hashes only"),
        (["export", "DIR"], "output: missing"),
        (["exprot", "DIR"], "fastft record export DIR -o FILE"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, capsys, words, said):
    recorded(tmp_path / "r", [turn([user("q")], "a")], texts=False)
    output = tmp_path / "out.jsonl"
    assert main(["record", *(w.replace("DIR", str(tmp_path / "r")).replace("OUT", str(output)) for w in words)]) in (
        1,
        2,
    )
    [line] = capsys.readouterr().err.splitlines()
    assert said in line and not output.exists()


def test_a_file_that_is_no_record_is_one_line(tmp_path, capsys):
    (tmp_path / FILE).write_text("not a database, but long enough to be taken for the header of one" * 20)
    assert main(["record", "export", str(tmp_path), "-o", str(tmp_path / "o")]) == 1
    assert "is not a record that can be read" in capsys.readouterr().err
