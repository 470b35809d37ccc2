"""Every option of every command has one name: the key that --print_config prints is the flag, and the key of a file."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import cleaning.report.__main__
from fastft.cli import VERBS, main
from fastft.serve.worker import service as worker


def words() -> list[str]:
    """Every verb; of one with words of its own, such as `fastft router`, every word."""
    found = []
    for verb, (module, _) in VERBS.items():
        has_words = module.startswith("fastft.compose.") and module.endswith(".command")
        found += [f"{verb} {word}" for word in importlib.import_module(module).TABLE] if has_words else [verb]
    return found


COMMANDS: dict[str, Callable[[list[str]], object]] = {
    **{word: (lambda argv, word=word: main([*word.split(), *argv])) for word in words() if word != "record"},
    "record export": lambda argv: main(["record", "export", *argv]),
    "python -m cleaning.report": cleaning.report.__main__.main,
    "python -m fastft.serve.worker": worker.main,
}
HERE = Path(__file__).parents[1]
NO_KEYS = {"help", "config", "print_config"}


def said(command: str, argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as end:
        COMMANDS[command](argv)
    assert end.value.code in (0, None)
    return capsys.readouterr().out


def flat(values: dict, prefix: str = "") -> dict:
    """The values by dotted key; a list is a value, and so is a group without keys."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def printed(command: str, argv: list[str], capsys) -> dict:
    return flat(yaml.safe_load(said(command, [*argv, "--print_config"], capsys)))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_key_is_a_flag_and_a_flag_is_a_key(command, tmp_path, capsys):
    keys = printed(command, [], capsys)
    flags = set(re.findall(r"^  (?:-\w \w+, )?--(\w[\w.]*)", said(command, ["--help"], capsys), re.MULTILINE))
    assert flags - NO_KEYS == keys.keys()

    # null where text is expected is the text "null"; a list of texts has no word for an empty one
    given = {key: value if isinstance(value, str) else json.dumps(value) for key, value in keys.items()}
    again = printed(command, [f"--{key}={text}" for key, text in given.items() if keys[key] != []], capsys)
    assert {key: again[key] for key, value in keys.items() if value is not None} == {
        key: value for key, value in keys.items() if value is not None
    }
    for key in (key for key, value in keys.items() if value == []):
        printed(command, [f"--{key}=[]"], capsys)

    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
    assert printed(command, ["--config", str(file)], capsys) == keys


@pytest.mark.parametrize(
    "by_place, by_name",
    [
        ("inspect data.jsonl --model m", "inspect --data data.jsonl --model m"),
        ("export run out", "export --checkpoint run --directory out"),
        ("export run out", "export --directory out run"),
        ("report run", "report --directory run"),
        ("record export served -o out", "record export --output out --directory served"),
        ("answer q.jsonl --model m -o out", "answer --questions q.jsonl --model m -o out"),
        ("clean a.json b.json -o out", "clean -o out --inputs a.json b.json"),
        ("clean a.json b.json -o out", "clean a.json --inputs b.json -o out"),
    ],
)
def test_what_has_a_place_has_a_name(by_place, by_name, capsys):
    command = "record export" if by_place.startswith("record") else by_place.split()[0]
    first, second = (printed(command, words.removeprefix(command).split(), capsys) for words in (by_place, by_name))
    assert {key: str(sorted(value) if isinstance(value, list) else value) for key, value in first.items()} == {
        key: str(sorted(value) if isinstance(value, list) else value) for key, value in second.items()
    }


@pytest.mark.parametrize(
    "argv, nearest",
    [
        (["export", "run", "out", "--checkpont", "x"], "checkpoint"),
        (["inspect", "data.jsonl", "--dta", "x"], "data"),
        (["report", "--directry", "run"], "directory"),
        (["answer", "q.jsonl", "--question", "x"], "questions"),
        (["clean", "dump.json", "--input", "x"], "inputs"),
        (["clean", "dump.json", "--without_filter", "x"], "without"),
        (["record", "export", "served", "--frm", "events"], "as"),
    ],
)
def test_a_name_that_is_nearly_right_is_named_beside_places_too(argv, nearest, capsys):
    assert main(argv) == 2
    assert f"; the nearest valid one is {nearest!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, key, old, value",
    [
        ("clean", "with", "with_filters", ["digit_run"]),
        ("clean", "without", "without_filters", ["repetition"]),
        ("record export", "as", "form", "conversations"),
    ],
)
def test_keys_of_the_last_release_work_with_a_warning(command, key, old, value, tmp_path, capsys, caplog):
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump({old: value}))
    assert printed(command, ["--config", str(file)], capsys)[key] == value
    assert f"{old} is called {key} now" in caplog.text


def test_there_is_one_parser():
    """Everything that reads a command line does it with fastft.common.command_line, so that all of them read it alike."""
    files = [path for room in ("fastft", "cleaning", "benchmarks", "tests") for path in (HERE / room).rglob("*.py")]
    parsing = [
        path.name
        for path in files
        if re.search(r"^\s*(import|from) (argparse|optparse|getopt|click)", path.read_text(), re.M)
    ]
    assert parsing == ["command_line.py"]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((HERE / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_says_what_it_takes(path):
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
