"""--explain: the story of one conversation agrees with what the run wrote."""

import json
import re

import pytest
from helpers.cleaning_runs import clean_command
from helpers.prose import prose


def said(capsys) -> str:
    return re.sub(r"\s+", " ", capsys.readouterr().out.replace("│", " "))


def told(capsys, out, id: str) -> str:
    assert clean_command(["-o", str(out), "--explain", id]) == 0
    return said(capsys)


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def out(tmp_path):
    page = '<div class="markdown prose w-full break-words light"><p>%s</p></div>'
    story = turns(prose(1, 60), page % prose(2, 90), "And then? Write to jo@firma-meier.de", page % prose(3, 90))
    records = [
        {"id": "a", "conversations": story},
        {"id": "copy", "conversations": story},
        {
            "id": "a",
            "conversations": turns(
                prose(4, 60), prose(5, 90), "Is it so?", "I'm sorry, but as an AI I cannot browse the internet."
            ),
        },
        {"id": "none", "conversations": []},
        {"conversations": turns(prose(6, 40), prose(7, 40))},
        {"id": "\u001b[31mred", "conversations": turns(prose(8, 40), prose(9, 40))},
        {"id": "alien", "conversations": [{"from": "ai", "value": "hello"}]},
        {"id": "polite", "conversations": turns(prose(12, 40), "thanks")},
        {"id": "plugged", "plugins": ["maps"], "conversations": turns(prose(10, 40), prose(11, 40))},
    ]
    (tmp_path / "dump.json").write_text(json.dumps(records))
    (tmp_path / "my.py").write_text(
        "def polite(c):\n    return 'thanks' if c.messages[1].content == 'thanks' else None\n"
    )
    options = ["--mask_pii", "--workers", "1", "--filters", f"{tmp_path / 'my.py'}:polite"]
    assert clean_command([str(tmp_path / "dump.json"), "-o", str(tmp_path / "out"), *options]) == 0
    return tmp_path / "out"


def test_each_step_of_one_that_was_kept(out, capsys):
    capsys.readouterr()
    text = told(capsys, out, "a")
    for step in (
        "dump.json: record 1, as sharegpt",
        "2 of 2 answers from HTML",
        "masked_emails: 1",
        "1 removed in its favour: copy",
        "kept: conversations.jsonl, line 1, language en",
    ):
        assert step in text


def test_the_ledger_counts_changed_ids(tmp_path, capsys):
    records = [{"id": "a", "conversations": turns(prose(i, 60), prose(i + 5, 60))} for i in range(3)]
    (tmp_path / "dump.json").write_text(json.dumps(records))
    assert clean_command([str(tmp_path / "dump.json"), "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert re.search(r"ids that another conversation had, changed +│ +2 ", printed.out)
    assert (
        printed.err
        == "warning: 2 conversations had the id of another one, and got their own: 'a' is now 'a-2', 'a' is now 'a-3'\n"
    )


def test_an_id_that_json_escapes(tmp_path, capsys):
    line = json.dumps({"id": 'a/b "q"', "conversations": turns(prose(1, 40), prose(2, 40))}).replace("a/b", "a\\/b")
    (tmp_path / "dump.jsonl").write_text(line)
    assert clean_command([str(tmp_path / "dump.jsonl"), "-o", str(tmp_path / "out")]) == 0
    assert "dump.jsonl: line 1" in told(capsys, tmp_path / "out", 'a/b "q"')


def test_the_second_of_the_same_name_and_one_without_a_name(out, capsys):
    capsys.readouterr()
    text = told(capsys, out, "a-2")
    assert "was 'a' in the dump, which is the id of another conversation" in text
    assert "dump.json: record 3" in text and "refusal: round 2 rejected (turn 4 refuses" in text
    assert "dump.json: record 5" in told(capsys, out, "dump.json-4")


def test_what_was_rejected_says_why(out, capsys):
    capsys.readouterr()
    text = told(capsys, out, "copy")
    assert "dump.json: record 2" in text and "masked_emails: 1" in text and "rejected: duplicate (kept as a)" in text
    assert "rejected: too_short" in told(capsys, out, "none")
    assert "rejected: plugin_session" in told(capsys, out, "plugged")


def test_a_record_without_a_conversation_has_its_own_id(out, capsys):
    capsys.readouterr()
    text = told(capsys, out, "alien")
    assert "rejected: unknown_role (turn 1 is from 'ai')" in text and "filters" not in text


def test_ones_own_filter_has_something_to_complain_of(out, capsys):
    capsys.readouterr()
    text = told(capsys, out, "polite")
    assert "rejected: polite (thanks)" in text and "no complaints" not in text


def test_what_a_dump_wrote_cannot_steer_the_terminal(out, capsys):
    capsys.readouterr()
    text = told(capsys, out, "\u001b[31mred")
    assert "\u001b" not in text and "kept" in text


def test_without_the_dump_the_outputs_still_tell(out, capsys):
    (out.parent / "dump.json").unlink()
    capsys.readouterr()
    text = told(capsys, out, "a-2")
    assert "no longer where it was" in text and "refusal: round 2 rejected" in text and "line 2" in text


def test_mistakes_are_one_line(out, tmp_path, capsys):
    capsys.readouterr()
    for arguments, says in (
        (["-o", str(out), "--explain", "nobody"], "no conversation has the id 'nobody'"),
        (["-o", str(tmp_path / "nowhere"), "--explain", "a"], "name the -o directory of a finished run"),
    ):
        assert clean_command(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert clean_command(["--explain", "a"]) == 2
