"""Keep what a run has done so far in its working directory DIR/.partial, so that the same command can continue from there.

    run.json        what the result depends on; after a change of the command or the inputs, the run begins anew
    outcomes        the log of the first pass: a frame for each shard, in order (`Log`)
    progress.json   how far the second pass is: shards done, sizes of the outputs after them, the ledger so far
    rejected.jsonl, conversations.jsonl, …    the outputs, which are cut back to those sizes before the run continues
    report.html     the page made from the outputs
    report.json     says that both passes are done; only renaming is left

SIGKILL at any moment leaves one of these states. A run that continues from it has, byte for byte, the result of a run that
was not interrupted, because where shards are cut depends on the inputs alone, and a shard's outcomes on its records and the
settings alone. A power cut can also lose what the system had not yet written to the disk. So frames carry digests, and where
outputs are shorter than progress.json says, the second pass begins anew.
"""

import fcntl
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from xxhash import xxh3_128_digest

from fastft.common.files import make_directory, room_for, sync, write_whole
from fastft.errors import UserError

# In the order in which they are published: report.json, which says that the others are complete, is the last.
OUTPUTS = ("rejected.jsonl", "conversations.jsonl", "conversations.holdout.jsonl", "report.html", "report.json")
_FRAME = struct.Struct("<Q16s")  # length of the payload; its XXH3 digest (BLAKE2b took a tenth of this process's time)


@contextmanager
def working_directory(output_dir: Path, identity: dict[str, Any]) -> Iterator[tuple[Path, list[str] | None]]:
    """Lock `output_dir`, and give (its working directory, what has changed since an interrupted run in it).

    What has changed is None if there was no such run, and [] if nothing has, so that this run continues it. Otherwise it is
    a list of the entries of run.json that differ, and the earlier work has been removed. If this run is interrupted after
    it has done some work, the working directory stays. Raises UserError while another run holds the output directory, if
    the directory cannot be made, and if its disk is full.
    """
    make_directory(output_dir)
    descriptor = os.open(output_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{output_dir}: another run is writing there; wait for it or choose another -o") from None
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"{output_dir}: cannot be locked ({error.strerror}); choose an -o on another disk") from None
    work = output_dir / ".partial"
    try:
        with room_for(output_dir, written=work):
            changed = _changes(work, identity)
            if changed != []:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                write_whole(work / "run.json", orjson.dumps(identity))
            yield work, changed
        shutil.rmtree(work)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(output_dir)  # writing to an open file names no file
        if not _holds_work(work):
            shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _changes(work: Path, identity: dict[str, Any]) -> list[str] | None:
    """Return the entries of run.json that differ from those of the run that was interrupted here; None if there was none."""
    if not _holds_work(work):
        return None
    try:
        earlier = orjson.loads((work / "run.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return ["run.json"]
    now = orjson.loads(orjson.dumps(identity))
    return sorted(key for key in {*earlier, *now} if earlier.get(key) != now.get(key))


def _holds_work(work: Path) -> bool:
    log = work / "outcomes"
    return log.exists() and log.stat().st_size > 0


def file_identity(path: Path) -> list:
    """Return values that change when a file, or one of a directory's files, does: paths, sizes and times."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


class Log:
    """A file of frames that is only appended to."""

    def __init__(self, path: Path):
        self.path, self.file = path, path.open("ab")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()

    def recover(self) -> Iterator[bytes]:
        """Yield the frames of an interrupted run, then cut off what follows the last whole one."""
        end = 0
        for payload in self.frames():
            yield payload
            end += _FRAME.size + len(payload)
        os.truncate(self.path, end)

    def append(self, payload: bytes) -> None:
        self.file.write(_FRAME.pack(len(payload), xxh3_128_digest(payload)))
        self.file.write(payload)
        self.file.flush()  # hands it to the system, which keeps it if this process is killed

    def frames(self) -> Iterator[bytes]:
        """Yield the frames up to the first that is cut or damaged."""
        with self.path.open("rb") as stream:
            while len(head := stream.read(_FRAME.size)) == _FRAME.size:
                size, digest = _FRAME.unpack(head)
                payload = stream.read(size) if size <= self.path.stat().st_size else b""
                if len(payload) != size or xxh3_128_digest(payload) != digest:
                    return
                yield payload


def load_progress(work: Path) -> dict[str, Any] | None:
    """Return what the second pass had done when it was interrupted; None if nothing, or if the outputs are too short for it."""
    try:
        progress = orjson.loads((work / "progress.json").read_bytes())
        whole = all((work / name).stat().st_size >= size for name, size in progress["sizes"].items())
    except (OSError, orjson.JSONDecodeError):
        return None
    return progress if whole else None


def open_output(path: Path, size: int) -> BinaryIO:
    """Open an output for appending after its first `size` bytes. What follows these bytes is cut off."""
    file = path.open("ab")
    file.truncate(size)
    return file


def publish(work: Path, output_dir: Path, empty: set[str]) -> None:
    """Rename the finished outputs into place, and remove an earlier run's file for each that is `empty`.

    An old report.json is removed first, so that it is never beside new files. Can be called again after an interruption.
    """
    (output_dir / "report.json").unlink(missing_ok=True)
    for name in OUTPUTS:
        if name in empty:
            (output_dir / name).unlink(missing_ok=True)
        elif (work / name).exists():  # false if it was renamed before an interruption
            # Not `written_whole`, because outputs are appended to for hours, over interruptions, before they are whole.
            sync(work / name)
            os.replace(work / name, output_dir / name)
    sync(output_dir)
