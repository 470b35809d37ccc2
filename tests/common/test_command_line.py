"""The one parser of every verb: what is given on the command line and in files, and the one line that a mistake gets."""

import errno
import logging
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
import yaml

from fastft.common.command_line import option, parse, run
from fastft.errors import PeerError, UsageError, UserError


@dataclass
class Rates:
    """Learning rates."""

    lr: float = 1e-3
    """Peak learning rate, 25 % of them."""
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass
class Entry:
    """One of several files."""

    path: str
    weight: float = 1.0


@dataclass
class Saves:
    """When to save."""

    every: int | Literal["auto"] = "auto"
    remote: str | None = None


@dataclass
class Endpoint:
    """What several verbs share."""

    key: str = option("none", short="-k")
    """A key that is inherited, at 5 %."""


@dataclass
class Verb(Endpoint):
    """A verb with an option of every kind."""

    files: list[str] = option(positional=True, several=True)
    """Files to read."""
    output_dir: str = option("out", short="-o")
    """Where the results go."""
    tags: list[str] = option(several=True)
    """Words, any number of them."""
    skipped: list[str] = option(repeated=True, separator=",", name="--without", help=f"Names, such as {'a'}.")
    shared: str | None = option(None, name="--with-log", alone="here")
    """A log, here if no place is given."""
    epochs: int = 3
    """Times over the data."""
    shift: float = 0.0
    text: str = ""
    check: bool = False
    """Only check."""
    data: str | list[Entry] | None = None
    kind: Literal["a", "b"] = "a"
    remember: Literal["none", "full", True, False] = "full"
    optimizer: Rates = field(default_factory=Rates)
    lora: Rates = field(default_factory=Rates)
    checkpoint: Saves = field(default_factory=Saves)


RENAMED = {"window": "epochs", "optim.lr": "optimizer.lr", "checkpoint.cadence": "checkpoint.every"}
SYNONYMS = {"num_train_epochs": "epochs", "learning_rate": "optimizer.lr"}


def verb(*argv: str) -> Verb:
    [config] = parse(argv, "fastft verb", "Do it.", Verb, renamed=RENAMED, synonyms=SYNONYMS)
    return config


def mistake(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        verb(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "argv, changed",
    [
        ([], {}),
        (["a", "b"], {"files": ["a", "b"]}),
        (["a", "-o", "d", "b", "--epochs", "5", "c"], {"files": ["a", "b", "c"], "output_dir": "d", "epochs": 5}),
        (["--", "-a", "--b"], {"files": ["-a", "--b"]}),
        (["-"], {"files": ["-"]}),
        (["--files", "a", "b", "--epochs", "5"], {"files": ["a", "b"], "epochs": 5}),
        (["a", "--files=-b", "--files", "c"], {"files": ["-b", "c", "a"]}),
        (["[x]", "1.5", "true", "null"], {"files": ["[x]", "1.5", "true", "null"]}),
        (["--tags", "x", "y", "--tags", "z", "--tags=-w"], {"tags": ["x", "y", "z", "-w"]}),
        (["--tags", "1", "null", "-5"], {"tags": ["1", "null", "-5"]}),
        (["--without", "x, y", "a", "--without", "z", "b"], {"skipped": ["x", "y", "z"], "files": ["a", "b"]}),
        (["--without=", "a"], {"files": ["a"]}),
        (["-od"], {"output_dir": "d"}),
        (["-o=d"], {"output_dir": "d"}),
        (["--output-dir", "d", "-k", "v"], {"output_dir": "d", "key": "v"}),
        (["--with-log"], {"shared": "here"}),
        (["--with_log", "--epochs", "5"], {"shared": "here", "epochs": 5}),
        (["--with-log", "there", "a"], {"shared": "there", "files": ["a"]}),
        (["--check"], {"check": True}),
        (["--check", "a"], {"check": True, "files": ["a"]}),
        (["a", "--check", "--epochs", "5"], {"check": True, "files": ["a"], "epochs": 5}),
        (["--check", "false"], {}),
        (["--check", "yes"], {"check": True}),
        (["--check=no"], {}),
        (["--remember"], {"remember": True}),
        (["--remember", "none"], {"remember": "none"}),
        (["--shift", "-1.5"], {"shift": -1.5}),
        (["--shift", "-1e-5"], {"shift": -1e-5}),
        (["--shift", "-.5"], {"shift": -0.5}),
        (["--text=--abc"], {"text": "--abc"}),
        (["--text", "-"], {"text": "-"}),
        (["--text", ""], {"text": ""}),
        (["--text", "a=b"], {"text": "a=b"}),
        (["--text", "{a: 1}"], {"text": "{a: 1}"}),
        (["--text", "1"], {"text": "1"}),
        (["--data", "[{path: x}]"], {"data": [Entry("x")]}),
        (["--optimizer.betas", "[0.1, 0.2]"], {"optimizer": Rates(betas=(0.1, 0.2))}),
        (["--optimizer", "{lr: 2}"], {"optimizer": Rates(lr=2)}),
        (["--checkpoint.every", "10", "--checkpoint.remote", "s3://b"], {"checkpoint": Saves(10, "s3://b")}),
        (["--epochs", "4", "--epochs", "5"], {"epochs": 5}),
    ],
)
def test_what_is_given_is_what_is_read(argv, changed):
    assert verb(*argv) == replace(Verb(), **changed)


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--epoch", "3"], "unknown key 'epoch'; the nearest valid one is 'epochs'"),
        (["--windo", "3"], "unknown key 'windo'; the nearest valid one is 'epochs'"),
        (["--zzqqxx"], "unknown key 'zzqqxx'; --help lists all"),
        (["--num-train-epochs", "3"], "unknown key 'num_train_epochs'; the nearest valid one is 'epochs'"),
        (["--learning_rate=3"], "unknown key 'learning_rate'; the nearest valid one is 'optimizer.lr'"),
        (["--optimzer.lr", "3"], "unknown key 'optimzer.lr'; the nearest valid one is 'optimizer.lr'"),
        (["--data", "[{path: x, wieght: 2}]"], "unknown key 'data.0.wieght'; the nearest valid one is 'data.0.weight'"),
        (["--data.0.weight", "2"], "data.0.weight: entries of a list have no options of their own"),
        (["-x"], "unknown option '-x'; --help lists all"),
        (["--epochs"], "epochs: expected a whole number, got nothing"),
        (["--epochs", "--check"], "epochs: expected a whole number, got nothing"),
        (["--epochs", "3.5"], "epochs: expected a whole number, got '3.5'"),
        (["--epochs", "three"], "epochs: expected a whole number, got 'three'"),
        (["--text", "--abc"], "a value that begins with a dash is written --text=--abc"),
        (["--tags"], "tags: expected text, got nothing"),
        (["--kind", "c"], "kind: expected one of a, b, got 'c'"),
        (["--remember", "some"], "remember: expected one of none, full, got 'some'"),
        (["--checkpoint.every", "10m"], "checkpoint.every: expected a whole number or auto, got '10m'"),
        (["--lora", "true"], "lora: expected a group of keys (lr, betas), got 'true'"),
        (["--lora"], "lora: expected a group of keys (lr, betas), got nothing"),
        (["--lora", "3"], "lora: expected a group of keys (lr, betas), got '3'"),
        (["--lora", "{rl: 1}"], "unknown key 'lora.rl'; the nearest valid one is 'lora.lr'"),
        (["--optimizer.betas", "0.1"], "optimizer.betas: expected a list of 2 values, got '0.1'"),
        (["--config"], "config: expected a YAML file, got nothing"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(argv, says):
    assert says in mistake("a", *argv)


@pytest.mark.parametrize(
    "text, says",
    [
        ("epoch: 7", "unknown key 'epoch'; the nearest valid one is 'epochs'"),
        ("optimizer: {lrr: 1}", "unknown key 'optimizer.lrr'; the nearest valid one is 'optimizer.lr'"),
        ("data:\n  - {path: x, wieght: 2}", "unknown key 'data.0.wieght'; the nearest valid one is 'data.0.weight'"),
        ("epochs: 3\nfiles: [a", "line 2: not YAML (expected ',' or ']', but got '<stream end>')"),
        ("", "holds no keys; write KEY: VALUE lines"),
        ("# epochs: 3\n", "holds no keys; write KEY: VALUE lines"),
        ("- a\n", "holds no keys; write KEY: VALUE lines"),
        ("epochs: three", "epochs: expected a whole number, got 'three'"),
        ("epochs:", "epochs: expected a whole number, got null"),
        ("text: null", "text: expected text, got null"),
        ("text: 7", "text: expected text, got 7"),
        ("epochs: {a: 1}", "epochs: expected a whole number, got {'a': 1}"),
        ("tags: x", "tags: expected a list of texts, got 'x'"),
        ("tags: [no]", "tags: expected a list of texts, got [False]"),
        ("files: [1]", "files: expected a list of texts, got [1]"),
        ("lora: true", "lora: expected a group of keys (lr, betas), got True"),
        ("lora:", "lora: expected a group of keys (lr, betas), got null"),
        ("data: [{weight: 2}]", "data.0.path: missing"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tmp_path, text, says):
    assert says in mistake("--config", written(tmp_path / "c.yaml", text))


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    assert mistake("--config", str(tmp_path / "no.yaml")) == f"config: {tmp_path}/no.yaml: no such file"
    (tmp_path / "latin.yaml").write_bytes("text: é".encode("latin-1"))
    assert "latin.yaml: cannot be read" in mistake(f"--config={tmp_path / 'latin.yaml'}")
    assert "cannot be read" in mistake("--config", str(tmp_path))


def test_files_then_the_command_line_whatever_the_order(tmp_path):
    first = written(tmp_path / "a.yaml", "epochs: 5\ntags: [t]\nfiles: [a, b]\noptimizer: {lr: 0.5}\ntext: first")
    second = written(tmp_path / "b.yaml", "epochs: 7\noptimizer: {betas: [0.1, 0.2]}\nwith_log: there")
    both = verb("--config", first, "--config", second)
    assert (both.epochs, both.tags, both.files, both.text) == (7, ["t"], ["a", "b"], "first")
    assert both.optimizer == Rates(0.5, (0.1, 0.2)) and both.shared == "there"
    for argv in (["--epochs", "9", "--config", first], ["--config", first, "--epochs", "9"]):
        assert verb(*argv).epochs == 9
    over = verb("c", "--tags", "u", "--tags", "v", "--optimizer.lr", "1", "--config", first)
    assert (over.files, over.tags, over.optimizer.lr) == (["c"], ["u", "v"], 1.0), "a list is replaced, not added to"


def test_dotted_keys_and_numbers_that_json_has_no_word_for(tmp_path):
    config = verb("--config", written(tmp_path / "a.yaml", "optimizer.lr: .inf\nlora: {lr: -.inf}\nshift: 1e-3"))
    assert (config.optimizer.lr, config.lora.lr, config.shift) == (math.inf, -math.inf, 1e-3)


def test_renamed_keys_work_with_one_warning(tmp_path, caplog):
    path = written(tmp_path / "a.yaml", "window: 5\noptim: {lr: 0.5}\ncheckpoint: {cadence: 6}")
    with caplog.at_level(logging.WARNING, logger="fastft"):
        config = verb("--config", path)
    assert (config.epochs, config.optimizer.lr, config.checkpoint.every) == (5, 0.5, 6)
    assert [record.getMessage().split(" is called ")[0] for record in caplog.records] == list(RENAMED)
    assert verb("--window=8").epochs == 8


def test_repeated_values_come_from_a_file_under_the_name_of_the_option(tmp_path):
    path = written(tmp_path / "a.yaml", "without: [x, y]")
    assert verb("--config", path).skipped == ["x", "y"]
    assert verb("--config", path, "--without", "z").skipped == ["z"]
    assert "unknown key 'skipped'" in mistake("--config", written(tmp_path / "c.yaml", "skipped: [x]"))
    assert "without: expected a list of texts, got 'x,y'" in mistake(
        "--config", written(tmp_path / "b.yaml", "without: x,y")
    )


@dataclass
class Sizes:
    """Lists with a default."""

    lengths: list[int] = option([256, 512], several=True)
    names: list[str] = option(["a", "b"], repeated=True, separator=",")
    inputs: list[str] = option(["here"], several=True, positional=True)


@pytest.mark.parametrize(
    "argv, lengths, names, inputs",
    [
        ([], [256, 512], ["a", "b"], ["here"]),
        (["--lengths", "8", "16", "--names", "c,d"], [8, 16], ["c", "d"], ["here"]),
        (["--lengths=8", "--lengths=16", "--names", "c", "--names", "d", "x"], [8, 16], ["c", "d"], ["x"]),
        (["--config", "{lengths: [1], names: [e], inputs: [y]}"], [1], ["e"], ["y"]),
        (["--config", "{lengths: [1], names: [e], inputs: [y]}", "--names", "f"], [1], ["f"], ["y"]),
    ],
)
def test_a_list_that_is_given_replaces_the_default(tmp_path, argv, lengths, names, inputs):
    argv = [written(tmp_path / "a.yaml", word) if word.startswith("{") else word for word in argv]
    assert parse(argv, "x", "x", Sizes) == [Sizes(lengths, names, inputs)]
    assert parse([], "x", "x", Sizes) == [Sizes()]


def test_a_list_of_groups_comes_from_a_file(tmp_path):
    path = written(tmp_path / "a.yaml", yaml.safe_dump({"data": [{"path": "x", "weight": 2}, {"path": "y"}]}))
    assert verb("--config", path).data == [Entry("x", 2.0), Entry("y")]


def test_print_config_prints_what_config_reads(tmp_path, capsys):
    argv = [
        "a",
        "b",
        "--tags",
        "t",
        "--without",
        "x,y",
        "-o",
        "d",
        "--check",
        "--data",
        "[{path: x}]",
        "--checkpoint.every",
        "3",
    ]
    with pytest.raises(SystemExit) as end:
        verb(*argv, "--print_config")
    assert end.value.code in (0, None)
    assert verb("--config", written(tmp_path / "c.yaml", capsys.readouterr().out)) == verb(*argv)


def test_help_shows_every_option_with_its_text(capsys):
    with pytest.raises(SystemExit):
        verb("--help")
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith("usage: fastft verb [FILES ...] [--KEY VALUE ...] [--config FILE] Do it.")
    for words in (
        "--files FILES [FILES ...] Files to read.",
        "-o OUTPUT_DIR, --output_dir OUTPUT_DIR Where the results go.",
        "-k KEY, --key KEY A key that is inherited, at 5 %.",
        "--tags TAGS [TAGS ...] Words, any number of them.",
        "--without WITHOUT [WITHOUT ...] Names, such as a.",
        "--with_log [WITH_LOG] A log, here if no place is given.",
        "--epochs EPOCHS Times over the data. (type: a whole number, default: 3)",
        "--data DATA, --data+ DATA (type: text or a list, default: null)",
        "--check {true,false} Only check.",
        "--optimizer.lr LR Peak learning rate, 25 % of them.",
        "--lora.lr LR Peak learning rate",
        "--checkpoint.every EVERY",
        "--config FILE",
        "--print_config",
    ):
        assert words in out
    assert "--lora CONFIG" not in out and "--data.help" not in out


@dataclass
class Placed:
    """What has a place and no name."""

    directory: str = option(positional=True)
    """A directory."""
    questions: str = option("own", positional=True)
    """Questions; without, our own."""
    model: str = ""


@dataclass
class Beside:
    """What has no default."""

    judge: str
    limit: int | None = None


def both(*argv: str) -> list:
    return parse(argv, "fastft both", "Do both.", Placed, Beside)


def test_places_and_what_must_be_given(tmp_path):
    assert both("d", "--judge", "j") == [Placed("d"), Beside("j")]
    assert both("d", "--judge", "j", "q") == [Placed("d", "q"), Beside("j")]
    assert both("--questions", "q", "--judge", "j", "d") == [Placed("d", "q"), Beside("j")]
    assert both("--directory=d", "--judge", "j", "q") == [Placed("d", "q"), Beside("j")]
    path = written(tmp_path / "a.yaml", "directory: d\nquestions: r\njudge: k\nlimit: null")
    assert both("--config", path) == [Placed("d", "r"), Beside("k")]
    assert both("e", "--config", path) == [Placed("e", "r"), Beside("k")]
    for argv, says in (
        ([], "directory, judge: missing; say DIRECTORY --judge ..., or use --config FILE"),
        (["d"], "judge: missing"),
        (["--judge", "j"], "directory: missing; say DIRECTORY, "),
        (["d", "q", "r", "--judge", "j"], "'r' is one value too many"),
        (["--directory", "d", "q", "r", "--judge", "j"], "'r' is one value too many"),
        (["d", "--judge", "j", "--qestions", "q"], "unknown key 'qestions'; the nearest valid one is 'questions'"),
    ):
        with pytest.raises(UsageError) as caught:
            both(*argv)
        assert says in str(caught.value)


@dataclass
class Checked:
    """A class that looks at its own values."""

    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"size: {self.size} is not 1 or more")
        [self.size][self.size - 1]  # above 1 it is a bug


@dataclass
class Around:
    """A group that checks itself."""

    inner: Checked = field(default_factory=Checked)


@pytest.mark.parametrize("cls, name", [(Checked, "size"), (Around, "inner.size")])
def test_what_a_dataclass_raises_keeps_its_kind(cls, name):
    with pytest.raises(UserError, match="size: 0 is not 1 or more"):
        parse([f"--{name}", "0"], "x", "x", cls)
    with pytest.raises(IndexError):
        parse([f"--{name}", "2"], "x", "x", cls)


def raising(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, says",
    [
        (UserError("no such model"), 1, "error: no such model\n"),
        (UsageError("unknown key"), 2, "error: unknown key\n"),
        (PeerError(), 1, ""),
        (KeyboardInterrupt(), 130, ""),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied\n"),
        (IsADirectoryError(21, "Is a directory", "/a.tmp", None, "/a"), 1, "error: /a: Is a directory\n"),
        (NotADirectoryError(20, "Not a directory", "/a/b"), 1, "error: /a/b: Not a directory\n"),
    ],
)
def test_a_users_mistake_is_a_line(error, code, says, capsys):
    assert run(raising(error)) == code
    assert capsys.readouterr().err == says


@pytest.mark.parametrize(
    "number, lack",
    [
        (errno.ENOSPC, " GiB free"),
        (errno.EFBIG, "more than a file may have"),
        (errno.EDQUOT, "more than your quota has left (quota -s)"),
    ],
)
def test_a_full_disk_is_a_line_that_says_what_is_free(number, lack, capsys, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(2048))
    assert run(raising(OSError(number, os.strerror(number), str(path)))) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}: {os.strerror(number)}: more than 2 KiB needed, ")
    assert said.endswith(f"{lack}; make room there and start the same command again\n")


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError(2, "No such file", "/x"), AssertionError()])
def test_a_bug_keeps_its_traceback(error, capsys):
    assert run(raising(error)) == 1
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said and type(error).__name__ in said
    assert said.endswith("please report it with the lines above\n")


def test_one_of_several_processes_speaks(capsys):
    assert run(raising(UserError("no such model")), speaks=lambda: False) == 1
    assert run(raising(ValueError("x")), speaks=lambda: False) == 1
    assert capsys.readouterr().err == ""


def test_the_code_of_a_verb_is_the_processes():
    assert run(lambda: None) == 0
    assert run(lambda: 3) == 3


def piped_into_head(statement: str) -> tuple[str, str]:
    """(stdout, stderr) of `python | head -1` with the exit code of Python below."""
    code = f"import sys; from fastft.common.command_line import run; sys.exit(run(lambda: {statement}))"
    command = f'"{sys.executable}" -c "{code}" | head -1; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_a_reader_that_leaves_ends_the_command_quietly():
    assert piped_into_head("[print(i) for i in range(9**6)] and None") == ("0\n0\n", "")


def test_another_pipe_that_breaks_is_a_bug():
    code = (
        "import sys; from fastft.common.command_line import run; sys.exit(run(lambda: exec('raise BrokenPipeError')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "please report it" in done.stderr
