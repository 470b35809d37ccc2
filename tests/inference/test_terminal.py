"""`fastft chat`: commands, options, and text that must not command a terminal."""

import io
import sys

from fastft import cli
from fastft.inference.terminal import printable


def test_chat_answers_resets_and_quits(ground, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n/reset\n/help\nhello\n/quit\nnever\n"))
    assert cli.main(["chat", "--model", str(ground / "model"), "--max_new_tokens", "8"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "(forgotten)" in out and "(commands: /reset, /quit)" in out


def test_chat_takes_its_options_from_a_file(ground, tmp_path, monkeypatch, capsys):
    (tmp_path / "chat.yaml").write_text(f"model: {ground / 'model'}\nmax_new_tokens: 4\nsystem: Be kind.\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert cli.main(["chat", "--config", str(tmp_path / "chat.yaml")]) == 0
    assert capsys.readouterr().out.startswith(f"{ground / 'model'} on ")


def test_mistakes_are_one_line(capsys):
    for options, code, said in (
        (["--model", "./nowhere"], 1, "./nowhere: no such directory"),
        (["--model", "x", "--temperature", "-1"], 1, "--temperature must not be below 0"),
        (["--model", "x", "--max_new_token", "5"], 2, "the nearest valid one is 'max_new_tokens'"),
    ):
        assert cli.main(["chat", *options]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and said in line


def test_what_a_model_says_cannot_command_a_terminal():
    assert printable("a\x1b[2Jb\n\tc\u202e") == "a\ufffd[2Jb\n\tc\ufffd"
