"""A disk that is full, at each place where a run writes: one line that names the file, the room needed and free, and a remedy."""

import contextlib
import shutil

import pytest
from helpers.disks import small_disk
from helpers.training import fails, here, losses, train_here

from fastft.data.dataset import cache_directory
from fastft.train import loop
from fastft.train.checkpoint import local
from fastft.train.report import samples

ROOM = 24 << 20


@pytest.fixture(scope="module")
def whole(ground, tmp_path_factory):
    """The directory of a run that nothing has stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert train_here(ground, out, "--trackers", "none", "--max_steps", "6").returncode == 0
    return out


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, which a test can fill."""
    with small_disk(tmp_path / "disk", ROOM) as place:
        yield place


def fill(disk) -> None:
    """Use up the disk, down to the last page."""
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


MOMENTS = {
    "metrics.jsonl": (loop, "train_step"),
    "samples.jsonl": (samples, "answers"),
    "checkpoints/step-00000002": (local.Writer, "save"),
    "config.yaml": (loop, "describe"),
    "run.json": (loop, "write_facts"),
    ".lock": (loop, "lock"),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(ground, whole, disk, tmp_path, monkeypatch, name):
    (tmp_path / "prompts").write_text("hello\n")
    more = ["--trackers", "none", "--max_steps", "6", "--checkpoint.every", "2"]
    if name == "samples.jsonl":
        more += ["--samples.prompts", str(tmp_path / "prompts"), "--samples.max_new_tokens", "2"]
    with monkeypatch.context() as patch:
        owner, moment = MOMENTS[name]
        original = getattr(owner, moment)

        def filled_before(*given, **more):
            fill(disk)
            return original(*given, **more)

        patch.setattr(owner, moment, filled_before)
        done = train_here(ground, disk / "run", *more)
    fails(done, f"{disk / 'run' / name}: ", "No space left on device: ", " needed, ", " free", "make room")
    assert "Traceback" not in done.stderr
    (disk / "filler").unlink()
    done = train_here(ground, disk / "run", *more)
    assert done.returncode == 0, done.stderr
    assert losses(disk / "run") == losses(whole)


def test_a_full_disk_of_the_token_cache(ground, disk, monkeypatch):
    monkeypatch.setenv("FASTFT_CACHE", str(disk / "cache"))
    cache_directory().mkdir(parents=True)
    fill(disk)
    with (disk / "filler").open("ab") as file:
        file.truncate((disk / "filler").stat().st_size - 4096)  # of the 6 kB that these tokens are
    done = train_here(ground, disk.parent / "out", "--max_steps", "1", "--trackers", "none")
    fails(done, f"{cache_directory()}", ".arrow: No space left on device: more than ", " free; make room there")
    assert not list((disk / "cache").rglob("*.tmp"))


def test_a_full_disk_of_what_is_made_from_a_run(whole, disk):
    """The page that a verb writes."""
    shutil.copytree(whole, disk / "run", ignore=shutil.ignore_patterns("checkpoints", "model"))
    (disk / "run/report.html").unlink()
    fill(disk)
    fails(
        here(["report", str(disk / "run")]), "report.html: No space left on device: ", " needed, ", "; make room there"
    )
    assert not list((disk / "run").glob("*.tmp"))
