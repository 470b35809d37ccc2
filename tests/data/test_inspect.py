"""`fastft inspect`: its options, and what it prints. That it finds faults in masks is tested in tests/test_verbs.py."""

import json

import pytest
import yaml

from fastft.cli import main


def shown(out: str) -> list[str]:
    """The ids of the conversations that were printed."""
    return [line.split()[0] for line in out.splitlines() if "tokens," in line and "trained" in line]


def test_options_of_a_file_and_of_the_command_line(model, data, tmp_path, capsys):
    (tmp_path / "options.yaml").write_text(yaml.safe_dump({"model": str(model), "count": 2}))
    assert main(["inspect", str(data), "--config", str(tmp_path / "options.yaml")]) == 0
    assert shown(capsys.readouterr().out) == ["c0", "c1"]
    assert main(["inspect", str(data), "--config", str(tmp_path / "options.yaml"), "-n", "1"]) == 0
    assert shown(capsys.readouterr().out) == ["c0"]


def test_three_conversations_are_shown_without_a_number(model, data, capsys):
    assert main(["inspect", str(data), "--model", str(model), "--template", "vicuna"]) == 0
    assert shown(capsys.readouterr().out) == ["c0", "c1", "c2"]


def test_print_config_prints_a_file_of_options(model, data, capsys):
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(data), "--model", str(model), "--check", "--print_config"])
    assert end.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"] == str(model) and printed["check"] is True and printed["count"] == 3


def test_an_unknown_option_names_the_nearest(model, data, capsys):
    assert main(["inspect", str(data), "--model", str(model), "--chek"]) == 2
    assert capsys.readouterr().err == "error: unknown key 'chek'; the nearest valid one is 'check'\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-n", "0"], "error: -n 0: give the number of conversations to show, at least 1\n"),
        (["-n", "-1"], "error: -n -1: give the number of conversations to show, at least 1\n"),
        (["--template", "chatlm"], "error: --template chatlm: neither a file nor one of chatml, gemma, "),
    ],
)
def test_a_value_that_cannot_be_meant_is_one_line(model, data, arguments, says, capsys):
    assert main(["inspect", str(data), "--model", str(model), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(says) and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--check"]])
def test_a_file_without_conversations_is_named(model, tmp_path, arguments, capsys):
    (tmp_path / "none.json").write_text("[]")
    assert main(["inspect", str(tmp_path / "none.json"), "--model", str(model), *arguments]) == 1
    assert capsys.readouterr().err.endswith("none.json: holds no conversation\n")


def test_faults_are_described_up_to_ten_and_all_are_counted(model, tmp_path, capsys):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    refused = [{"role": "assistant", "content": "nobody asked"}]
    rows = [{"id": f"c{i}", "messages": turns if i == 5 else refused} for i in range(15)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["inspect", str(tmp_path / "data.jsonl"), "--model", str(model), "--check"]) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 10 and lines[0].startswith("error: c0: cannot be encoded: ")
    assert "FAULT: cannot be encoded" in captured.out and " 14 " in captured.out and "the mask is off" in captured.out


@pytest.mark.parametrize("more", [[], ["--check"]])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ('{"messages": [{"role": "user", "content": 7}]}\n', "line 1, message 1: its content is a number, not text"),
        ("no JSON\n", "line 1"),
    ],
)
def test_of_a_bad_file_nothing_is_shown_but_the_error(model, tmp_path, capsys, text, says, more):
    (tmp_path / "bad.jsonl").write_text(text)
    assert main(["inspect", str(tmp_path / "bad.jsonl"), "--model", str(model), *more]) == 1
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.startswith("error: ") and err.count("\n") == 1
