"""Retention on a disk removes checkpoints of the trainer's making, and nothing else."""

import signal
import subprocess
import sys

import pytest
import xxhash

from fastft.train.checkpoint import local, manifest

OTHERS = (
    "step-bestever",
    "step-best-so-far",
    "step-0000001a",
    "step-1",
    "step-00000010-copy",
    "notes.tmp",
    "step-x.tmp",
)


def checkpoint(path, step: int):
    """A checkpoint that is one file, with its manifest."""
    path.mkdir(parents=True)
    (path / "shard").write_text("12345")
    files = {"shard": {"bytes": 5, "xxh3": xxhash.xxh3_128(b"12345").hexdigest()}}
    meta = {"step": step, "world_size": 1, "machines": 1, "identity": {}, "files": files}
    (path / manifest.NAME).write_text(manifest.dumps(meta))
    return path


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_others_have_put_there_stays(tmp_path):
    for name in OTHERS:  # copies of a checkpoint, with its manifest
        checkpoint(tmp_path / name, 10)
    (tmp_path / "step-00000011").mkdir()  # no manifest: the trainer publishes no such directory
    (tmp_path / "step-00000011" / "mine.txt").write_text("mine")
    elsewhere = checkpoint(tmp_path.with_name("elsewhere") / "kept", 12)
    (tmp_path / "step-00000012").symlink_to(elsewhere)
    for step in (10, 20, 30):
        checkpoint(tmp_path / f"step-{step:08d}", step)
    for name in ("step-00000040.tmp", "step-00000020.fetch.tmp", "step-00000020.old.tmp"):
        (tmp_path / name).mkdir()
    local.prune(tmp_path, 30, keep=1)
    kept = ["step-00000011", "step-00000012", "step-00000030"]
    assert names(tmp_path) == sorted([*OTHERS, *kept]) and names(elsewhere) == [manifest.NAME, "shard"]


def test_copies_under_other_names_are_no_checkpoints_of_the_run(tmp_path):
    for name in OTHERS:
        checkpoint(tmp_path / name, 99)
    for listing in (local.listing(tmp_path), local.complete(tmp_path)):
        assert listing.found == [] and listing.passed_over == []
    checkpoint(tmp_path / "step-00000010", 10)
    assert local.newest(tmp_path)[0].name == "step-00000010"


KILLED_WHILE_REMOVING = """
import os, signal, sys
from pathlib import Path
from fastft.train.checkpoint import local
def killed(path, *given, **more):
    os.unlink(Path(path) / "meta.json")
    os.kill(os.getpid(), signal.SIGKILL)
local.shutil.rmtree = killed
local.prune(Path(sys.argv[1]), 20, keep=1)
"""


@pytest.mark.slow
def test_a_removal_that_is_killed_is_finished_by_the_next(tmp_path):
    """Else a directory without a manifest would be left, which nobody may remove."""
    for step in (10, 20):
        checkpoint(tmp_path / f"step-{step:08d}", step)
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_REMOVING, tmp_path], timeout=100)
    assert done.returncode == -signal.SIGKILL and names(tmp_path) == ["step-00000010.tmp", "step-00000020"]
    local.prune(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["step-00000020"]
