"""The cleaner's command: its options on the command line and in files, what it prints, and how it ends."""

import errno
import gzip
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
import yaml
from helpers.cleaning_runs import clean_command, contents, dump
from helpers.disks import small_disk
from helpers.dumps import LONG, share
from rich.progress import Progress

import cleaning.run.workdir
import cleaning.run.workers
from cleaning.__main__ import CleanConfig, FilterConfig, options
from cleaning.pipeline import OUTPUTS, clean
from cleaning.settings import FilterSettings, RunSettings
from fastft.common import logs

ROOT = Path(__file__).parents[2]


# --- options ----------------------------------------------------------------------------------------------------------

ALL_OPTIONS = """a.json -o out b.json --max_tokens 9 --model true --template chatml --overlap_rounds 1 --overlong reject
--near 0.5 --keep newest --against x y --against z --contaminated flag --holdout 0.5 --seed 3 --workers 2 --ray auto
--format oasst --branches all --era none --with masked_keys,masked_ips --with digit_run --without refusal
--filters my.py:a,my.py:b --filters my.py:c --keep_refusals --mask_pii --consecutive last
--languages en,zh --models gpt-4*,x --min_turns 1 --max_turns 2 --max_chars 3
--moderation http://127.0.0.1/ --moderation_model m"""


def test_every_option_is_read(tmp_path):
    (tmp_path / "one.txt").write_text("a phrase\nanother\n")
    (tmp_path / "two.txt").write_text("third")
    phrases = ["--blocked_phrases", str(tmp_path / "one.txt"), "c.json", "--blocked_phrases", str(tmp_path / "two.txt")]
    config, run_settings, filters = options([*shlex.split(ALL_OPTIONS), *phrases])
    assert config == CleanConfig(
        ["a.json", "b.json", "c.json"], "out", format="oasst", branches="all", era="none", workers=2, ray="auto"
    )
    assert run_settings == RunSettings(
        9, "true", "chatml", 1, "reject", 0.5, "newest", ["x", "y", "z"], "flag", holdout=0.5, seed=3
    )
    masks = ("masked_keys", "masked_emails", "masked_ips", "masked_phones")
    assert filters.settings() == FilterSettings(
        with_filters=("masked_keys", "masked_ips", "digit_run", *masks),
        without_filters=("refusal", "ai_boilerplate", "refusal", "self_identification"),
        own_filters=("my.py:a", "my.py:b", "my.py:c"),
        blocked_phrases=("a phrase", "another", "third"),
        consecutive="last",
        languages=("en", "zh"),
        models=("gpt-4*", "x"),
        min_turns=1,
        max_turns=2,
        max_chars=3,
        moderation="http://127.0.0.1/",
        moderation_model="m",
    )


def test_without_options_all_is_as_a_call_from_python():
    config, run_settings, filters = options(["-", "-o", "out"])
    assert (config, run_settings, filters) == (CleanConfig(["-"], "out"), RunSettings(), FilterConfig())
    assert filters.settings() == FilterSettings()


@pytest.mark.parametrize(
    "arguments, field, value",
    [
        (["--ray"], "ray", ""),
        (["--ray", "-o", "out"], "ray", ""),
        (["--ray", "ray://head:10001"], "ray", "ray://head:10001"),
        (["--list-filters"], "list_filters", True),
        (["--explain", "1e5"], "explain", "1e5"),
        (["--explain", "null"], "explain", "null"),
        (["--explain=-a"], "explain", "-a"),
    ],
)
def test_values_that_parsers_read_in_their_own_way(arguments, field, value):
    assert getattr(options(arguments)[0], field) == value


def test_a_file_of_options_gives_what_the_options_give(tmp_path, capsys):
    source = dump(tmp_path / "d.json")
    given = ["--holdout", "0.2", "--with", "masked_ips,digit_run", "--near=0", "--without", "refusal"]
    assert clean_command([str(source), "-o", str(tmp_path / "one"), *given]) == 0
    keys = {"inputs": [str(source)], "holdout": 0.2, "with": ["masked_ips", "digit_run"], "near": 0.5}
    (tmp_path / "clean.yaml").write_text(yaml.safe_dump(keys | {"without": ["refusal"]}))
    # What stands on the command line has the last word.
    assert clean_command(["--config", str(tmp_path / "clean.yaml"), "-o", str(tmp_path / "two"), "--near", "0"]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert orjson.loads((tmp_path / "two/report.json").read_bytes())["settings"]["near"] == 0


def test_print_config_prints_a_file_that_config_reads(tmp_path, capsys):
    given = [*shlex.split(ALL_OPTIONS), "--blocked_phrases", "p.txt"]
    with pytest.raises(SystemExit):
        options([*given, "--print_config"])
    (tmp_path / "clean.yaml").write_text(capsys.readouterr().out)
    assert options(["--config", str(tmp_path / "clean.yaml")]) == options(given)


def test_a_file_with_an_unknown_key_names_the_nearest(tmp_path, capsys):
    (tmp_path / "clean.yaml").write_text("max_token: 9")
    assert clean_command(["--config", str(tmp_path / "clean.yaml")]) == 2
    assert capsys.readouterr().err == "error: unknown key 'max_token'; the nearest valid one is 'max_tokens'\n"


def test_choices_can_be_given_as_a_whole_or_one_by_one(tmp_path):
    source = dump(tmp_path / "d.json")
    clean([source], tmp_path / "one", holdout=0.3, seed=7, near=0.5)
    clean([source], tmp_path / "two", run_settings=RunSettings(holdout=0.3, near=0.5), seed=7)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with pytest.raises(TypeError, match="hold_out"):
        clean([source], tmp_path / "three", hold_out=0.3)


# --- what is printed, and the exit code -------------------------------------------------------------------------------


def test_a_run_that_keeps_no_conversation_is_an_error(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/conversations.jsonl").write_text("old")
    (tmp_path / "d.json").write_text(json.dumps([share("q")]))
    assert clean_command([str(tmp_path / "d.json"), "-o", str(tmp_path / "out")]) == 1
    assert "error: no conversation is left" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["rejected.jsonl", "report.html", "report.json"]


def dump_in(tmp_path: Path) -> str:
    (tmp_path / "d.json").write_text(json.dumps([share("q", "a")]))
    return str(tmp_path / "d.json")


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["missing.json"], 1, "no such file"),
        (["empty.json"], 1, "is empty"),
        (["binary.json"], 1, "is a binary file"),
        (["cut.json.gz"], 1, "cut short"),
        (["d.json", "missing.json"], 1, "no such file"),
        (["d.json", "--max_tokens", "100"], 2, "--max_tokens needs --model"),
        (["d.json", "--max_tokens", "0", "--model", "m"], 1, "at least 1"),
        (["d.json", "--max_tokens", "9", "--model", "no/such/model/here"], 1, "no/such/model/here"),
        (["d.json", "--workers", "0"], 1, "at least 1"),
        (["d.json", "--blocked_phrases", "missing.txt"], 1, "missing.txt"),
        (["d.json", "--blocked_phrases", "binary.json"], 1, "UTF-8"),
        (["out/conversations.jsonl"], 1, "is an output"),
    ],
)
def test_one_line_and_an_exit_code(tmp_path, capsys, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    dump_in(tmp_path)
    (tmp_path / "empty.json").write_bytes(b" \n")
    (tmp_path / "binary.json").write_bytes(b"\x89PNG\0\0\xff")
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(json.dumps([share("q", "a")] * 99).encode())[:-20])
    (tmp_path / "out").mkdir()
    for name in OUTPUTS:
        (tmp_path / "out" / name).write_text(json.dumps(share("q", "a")))
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert clean_command([*arguments, "-o", "out"]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_output_directory_that_cannot_be(tmp_path, capsys):
    assert clean_command([dump_in(tmp_path), "-o", "/dev/null/out"]) == 1
    assert capsys.readouterr().err == "error: /dev/null/out: cannot be made a directory (a file is in the way)\n"


def test_the_output_is_a_directory(tmp_path, capsys):
    (tmp_path / "afile").write_text("x")
    assert clean_command([dump_in(tmp_path), "-o", str(tmp_path / "afile")]) == 1
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path / 'afile'}: cannot be made a directory (a file is in the way)\n"


def test_a_directory_that_has_the_name_of_an_output(tmp_path, capsys):
    """One line that names it; once it is gone, the same command publishes the work that is done."""
    (tmp_path / "out/report.html").mkdir(parents=True)
    command = [dump_in(tmp_path), "-o", str(tmp_path / "out")]
    assert clean_command(command) == 1
    assert capsys.readouterr().err.endswith(f"error: {tmp_path / 'out/report.html'}: Is a directory\n")
    (tmp_path / "out/report.html").rmdir()
    assert clean_command(command) == 0
    assert "conversations in" in capsys.readouterr().out and (tmp_path / "out/report.html").is_file()


def test_everything_held_out_is_an_error(tmp_path, capsys):
    assert clean_command([dump_in(tmp_path), "-o", str(tmp_path / "out"), "--holdout", "0.999"]) == 1
    assert "error: --holdout 0.999 leaves no conversation to train on; all 1 that were" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jsonl")) == [
        "conversations.holdout.jsonl",
        "rejected.jsonl",
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max_token_=9"], "unknown key 'max_token_'; the nearest valid one is 'max_tokens'"),
        (["--zzz"], "unknown key 'zzz'; --help lists all"),
        (["--near", "x"], "near: expected a number, got 'x'"),
        (["--keep", "oldest"], "keep: expected one of longest, newest, got 'oldest'"),
        (["--with"], "with: expected text, got nothing"),
        ([], "inputs: missing; name at least one dump"),
        (["d.json"], "output_dir: missing; say -o DIR"),
        (["--explain", "a"], "--explain ID needs -o DIR"),
        (["d.json", "--explain", "a", "-o", "out"], "takes no input"),
    ],
)
def test_a_wrong_command_is_one_line(capsys, arguments, message):
    assert clean_command(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cleaning.run.workdir.Log, "append", full)
    out = tmp_path / "out"
    assert clean_command([dump_in(tmp_path), "-o", str(out)]) == 1
    line = capsys.readouterr().err
    assert (
        line.startswith(f"error: {out}: No space left on device: more than ") and " GiB free; make room there" in line
    )
    assert line.endswith("and start the same command again\n") and line.count("\n") == 1
    assert list(out.iterdir()) == []


def test_an_output_directory_that_a_full_disk_cannot_make_is_one_line_with_its_numbers(tmp_path, capsys):
    with small_disk(tmp_path / "disk", 64 << 10, inodes=1) as disk:
        assert clean_command([dump_in(tmp_path), "-o", str(disk / "out")]) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"error: {disk / 'out'}: No space left on device: ") and " free; make room there" in line
    assert line.count("\n") == 1


def test_the_module_runs_without_torch(tmp_path):
    command = [sys.executable, "-m", "cleaning", dump_in(tmp_path), "-o", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and "conversations kept" in result.stdout and result.stderr == ""
    heavy = {"torch", "transformers", "fastft.data.template.chat_template"}
    code = f"import sys, cleaning.__main__; assert not {heavy} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_module_says_what_the_verb_says(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([share("q", "a"), share("r", "b", id="b")])[:-9])
    arguments = ["clean", str(tmp_path / "d.json"), "-o", str(tmp_path / "out")]
    verb, module = (
        subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT)
        for command in (["fastft", *arguments], ["cleaning", *arguments[1:]])
    )
    first, second = verb.stderr.splitlines()
    assert first.startswith("warning: d.json: record 2: ") and second.startswith("warning: d.json: end of file: ")
    assert (verb.returncode, verb.stdout, verb.stderr) == (module.returncode, module.stdout, module.stderr)


def test_a_log_gets_lines_in_place_of_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cleaning.run.workers, "LINE_EVERY", -1)
    records = [share(f"{i} {LONG}", "An answer.", id=str(i)) for i in range(500)]
    (tmp_path / "d.json").write_text(json.dumps(records))
    logs.show()
    clean([tmp_path / "d.json"], tmp_path / "out", workers=1)
    lines = capsys.readouterr().err.splitlines()
    rates = r"500 conversations, [\d,]+/s"
    assert any(re.fullmatch(rf"cleaning: 100 %, {rates}, \d+\.\d MB/s", line) for line in lines)
    assert re.fullmatch(rf"writing: 100 %, {rates}", lines[-1])


def test_the_bar_shows_megabytes_a_second(monkeypatch):
    with Progress(disable=True, get_time=lambda: 10.0) as progress:
        bar = cleaning.run.workers.Bar(progress)
        bar.begin("cleaning", 40_000_000, of_bytes=True)
        bar.advance(30_000_000, 1_200)
        progress.tasks[0].start_time = 0.0
        assert str(cleaning.run.workers._Speed().render(progress.tasks[0])) == "1,200 conversations, 120/s, 3.0 MB/s"


@pytest.mark.parametrize("arguments", [["IN", "-o", "OUT"], ["--list_filters"], ["-o", "DONE", "--explain", "a"]])
def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path, arguments):
    assert clean_command([dump_in(tmp_path), "-o", str(tmp_path / "DONE")]) == 0
    names = {"IN": dump_in(tmp_path), "OUT": str(tmp_path / "OUT"), "DONE": str(tmp_path / "DONE")}
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "cleaning", *(names.get(each, each) for each in arguments)]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")  # the work is done; only the account of it is not wanted
    assert "OUT" not in arguments or (tmp_path / "OUT/report.json").exists()


# --- workers ----------------------------------------------------------------------------------------------------------

# Worker processes import this script too, so what it replaces is replaced there.
SCRIPT = """
import multiprocessing, os, signal, sys, time
import cleaning.first_pass, cleaning.run.workers

class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(one)

def describe(work, conversion):
    if multiprocessing.parent_process() is not None:
        {fault}
    return original(work, conversion)

original, cleaning.first_pass._describe = cleaning.first_pass._describe, describe
if __name__ == "__main__":
    cleaning.run.workers.POOL_FROM = 0
    cleaning.first_pass.SHARD_BYTES = 2_000
    from fastft import cli
    cli.command()
"""


def command_with_a_fault(tmp_path: Path, fault: str) -> list[str]:
    (tmp_path / "script.py").write_text(SCRIPT.format(fault=fault))
    source = dump(tmp_path / "d.json", 200)
    return [
        sys.executable,
        str(tmp_path / "script.py"),
        "clean",
        str(source),
        "-o",
        str(tmp_path / "out"),
        "--workers",
        "2",
    ]


@pytest.mark.parametrize(
    "fault, says",
    [
        ("raise KeyError('in a worker')", "KeyError: 'in a worker'"),
        ("raise Odd('one', 'two')", "missing 1 required positional argument: 'two'"),  # the parent cannot unpickle it
    ],
)
def test_a_bug_in_a_worker_shows_the_workers_traceback(tmp_path, fault, says):
    done = subprocess.run(command_with_a_fault(tmp_path, fault), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and says in done.stderr and "please report it" in done.stderr.splitlines()[-1]
    assert "KeyError" not in fault or ('script.py", line' in done.stderr and "in describe" in done.stderr)


@pytest.mark.parametrize(
    "fault, says",
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "a worker process was killed, most likely for memory: use fewer --workers",
        ),
        ("raise MemoryError", "not enough memory; use fewer --workers, unless one record of the input is that large"),
    ],
)
def test_a_worker_that_runs_out_of_memory_is_one_line(tmp_path, fault, says):
    done = subprocess.run(command_with_a_fault(tmp_path, fault), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"error: {says}\n")


@pytest.mark.parametrize("number, word", [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")])
def test_a_signal_ends_the_run_and_its_workers_and_says_how_to_continue(tmp_path, number, word):
    command = command_with_a_fault(tmp_path, "time.sleep(0.02)")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell's background jobs ignore SIGINT
    )
    log = tmp_path / "out/.partial/outcomes"
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (128 + number, f"error: {word}; the same command continues from here\n"), (
        error
    )
    deadline = time.monotonic() + 60
    while processes_of_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_of_session(process.pid)
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    clean([tmp_path / "d.json"], tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def processes_of_session(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it has ended
        if int(of) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found
