"""Files are whole or not there, whatever happens while they are written."""

import shutil
import signal
import subprocess
import sys

import pytest

from fastft.common.files import (
    FullDiskError,
    bytes_text,
    make_directory,
    publish_directory,
    require_not_input,
    require_place,
    room_for,
    short_name,
    split_name,
    sync,
    write_whole,
    written_whole,
)
from fastft.errors import UserError


def names(path):
    return sorted(each.name for each in path.iterdir())


def test_text_and_bytes_replace_what_is_there(tmp_path):
    for durable in (False, True):
        write_whole(tmp_path / "a", "é\n", durable)
        assert (tmp_path / "a").read_bytes() == "é\n".encode()
        write_whole(tmp_path / "a", b"\xff", durable)
        assert (tmp_path / "a").read_bytes() == b"\xff"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("place", ["file/z", "file/y/z", "file", "/proc/z", "/proc/y/z", "long" * 100])
def test_a_directory_that_cannot_be_made_is_one_line(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be made a directory \(") as error:
        make_directory(tmp_path / place)
    assert "\n" not in str(error.value)


def test_a_directory_that_is_there_may_be_made_again(tmp_path):
    for _ in range(2):
        make_directory(tmp_path / "a" / "b")
    assert names(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("place", ["file/z", "/proc/z", "/proc/y/z", "long" * 100])
def test_a_file_that_cannot_be_made_is_one_line(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be (written to|made a directory) \("):
        require_place(tmp_path / place)
    require_place(tmp_path / "new" / "a")
    assert names(tmp_path) == ["file", "new"] and names(tmp_path / "new") == []


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    write_whole(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "a") as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a", "\ud83d")
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_a_full_disk_is_one_line_with_what_is_needed_and_free(tmp_path):
    """The real errors of the system: a device that is always full, and a limit on the size of files."""
    path = tmp_path / "log"
    line = rf"^{path}: No space left on device: 6 bytes needed, .* free: look for another limit, such as inodes .*; make room"
    with pytest.raises(FullDiskError, match=line), room_for(path, 6), open("/dev/full", "w") as file:
        file.write("123456")
        file.flush()
    code = (
        "import resource, sys; from pathlib import Path; from fastft.common.files import write_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); write_whole(Path(sys.argv[1]), 'x' * 3000, durable=True)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    line = f"FullDiskError: {path}: File too large: 2.93 KiB needed, a file may have 1.95 KiB (ulimit -f); make room"
    assert line in done.stderr and names(tmp_path) == []


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ValueError("x"), OSError("x")])
def test_other_errors_of_a_disk_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, room_for(tmp_path / "a", 5):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "words", ["I/O error: No space left on device (os error 28)", "inline_container.cc:672 . unexpected pos 7 vs 5"]
)
def test_the_words_of_libraries_that_lose_the_systems_number_are_known(tmp_path, words):
    line = "a: No space left on device: more than 3 bytes needed"
    with pytest.raises(FullDiskError, match=line), written_whole(tmp_path / "a") as partial:
        partial.write_text("abc")
        raise RuntimeError(words)
    assert names(tmp_path) == []


def test_bytes_for_people():
    assert [bytes_text(n) for n in (0, 999, 1536, 3 << 20, 5e12)] == [
        "0 bytes",
        "999 bytes",
        "1.5 KiB",
        "3 MiB",
        "4.55 TiB",
    ]


def test_nobody_sees_half_a_file(tmp_path):
    """A writer that is killed again and again, and a reader who looks after each time."""
    code = (
        "import sys; from pathlib import Path; from fastft.common.files import write_whole; path = Path(sys.argv[1]); "
        "print(flush=True); [write_whole(path, str(n % 10) * 200_000) for n in range(10**6)]"
    )
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code, tmp_path / "a"], stdout=subprocess.PIPE)
        writer.stdout.readline()
        while not (tmp_path / "a").exists():
            pass
        for _ in range(20):
            text = (tmp_path / "a").read_text()
            assert len(text) == 200_000 and len(set(text)) == 1
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        text = (tmp_path / "a").read_text()
        assert len(text) == 200_000 and len(set(text)) == 1


def test_several_writers_do_each_other_no_harm(tmp_path):
    def writing():
        return written_whole(tmp_path / "a", several_writers=True)

    with writing() as partial, writing() as other:
        partial.write_text("mine")
        other.write_text("another's")
        assert partial.read_text() == "mine"
    assert (tmp_path / "a").read_text() == "mine" and names(tmp_path) == ["a"]


def test_directories_are_made_durable_too(tmp_path):
    sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "nowhere")


def test_a_published_directory_replaces_the_old_one(tmp_path):
    for text in ("old", "new"):
        (tmp_path / "a.partial").mkdir()
        (tmp_path / "a.partial" / f"{text}.txt").write_text(text)
        publish_directory(tmp_path / "a.partial", tmp_path / "a")
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["new.txt"]


def test_a_link_is_not_replaced_by_a_directory(tmp_path):
    for name in ("elsewhere", "a.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "a").symlink_to("elsewhere")
    with pytest.raises(NotADirectoryError):
        publish_directory(tmp_path / "a.partial", tmp_path / "a")
    assert names(tmp_path) == ["a", "a.partial", "elsewhere"]


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from fastft.common.files import publish_directory
left = int(sys.argv[2])
def count(event, arguments):
    global left
    if event in ("open", "os.rename", "os.remove", "os.rmdir"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
path = Path(sys.argv[1])
sys.addaudithook(count)
publish_directory(path.with_name("a.partial"), path)
"""


def test_nobody_sees_half_a_directory(tmp_path):
    """A publisher is killed before each act on the disk in turn: what is there is all old, nothing, or all new."""
    path, seen, killed, code = tmp_path / "a", [], 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        for place, text in ((path, "old"), (tmp_path / "a.partial", "new")):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            for number in range(3):
                (place / str(number)).write_text(text)
        code = subprocess.run([sys.executable, "-c", KILLED_AT, path, str(killed)]).returncode
        texts = [file.read_text() for file in sorted(path.iterdir())] if path.exists() else []
        assert texts in (["old"] * 3, [], ["new"] * 3)
        seen, killed = [*seen, texts], killed + 1
    assert code == 0 and seen[0] == ["old"] * 3 and [] in seen and seen[-1] == ["new"] * 3
    assert names(tmp_path) == ["a"], "what a killed publisher left is gone"


def test_a_short_name_does_not_tell_where_a_file_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model").mkdir()
    assert short_name(str(tmp_path / "org" / "model")) == "model"
    assert short_name("org/model") == "model", "it is there, so it is no name on the Hub"
    assert short_name("Qwen/Qwen2.5-7B") == "Qwen/Qwen2.5-7B"
    assert short_name("~/secret/model") == short_name("./secret/model") == short_name("a/b/model") == "model"
    assert short_name(".") == tmp_path.name


def test_a_name_stands_before_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c=10").mkdir()
    assert split_name("mine=runs/a/model") == ("mine", "runs/a/model")
    assert split_name("org/mine=http://10.0.0.5:8000/v1#m=1") == ("org/mine", "http://10.0.0.5:8000/v1#m=1")
    for place in ("runs/a/model", "c=10", "http://10.0.0.5:8000/a=b/v1#m", "=runs/a"):
        assert split_name(place) == (None, place)


def test_what_is_read_is_not_written(tmp_path):
    read = tmp_path / "a" / "in.jsonl"
    read.parent.mkdir()
    read.touch()
    (tmp_path / "soft").symlink_to(read)
    (tmp_path / "hard").hardlink_to(read)
    for output in (read, tmp_path / "soft", tmp_path / "hard", tmp_path / "a" / ".." / "a" / "in.jsonl"):
        with pytest.raises(UserError, match="would be overwritten"):
            require_not_input(output, [str(read)])
    with pytest.raises(UserError, match="would be lost"):
        require_not_input(tmp_path / "a", [read])
    require_not_input(tmp_path / "a" / "out.jsonl", [read])
