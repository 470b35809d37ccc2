"""File systems of a given size, which a test can fill."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(place: Path, size: int, inodes: int = 0) -> Iterator[Path]:
    """A file system of `size` bytes at `place`, which must not exist yet; the test is skipped where nothing can be mounted.

    `inodes`: the most files and directories, its own included; 0 for no limit.
    """
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size},nr_inodes={inodes}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def grow(place: Path) -> None:
    """Give the file system at `place` 100 MiB."""
    subprocess.run(["mount", "-o", "remount,size=100M", str(place)], check=True)
