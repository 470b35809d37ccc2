"""Writes files and directories so that nobody ever sees half of one, and explains errors of a full disk.

write_whole(path, "text or bytes")                # written beside `path`, then renamed to it
write_whole(path, content, durable=True)          # and on the disk before this returns
with written_whole(path) as partial: ...          # for files that another library writes
with room_for(path, needed=4096): ...             # for files that are appended to, or written in some other way
make_directory(path), require_place(path)         # for a directory, or a file, that the user has named
publish_directory(partial, path)                  # for a directory that was filled beside its place
"""

import errno
import math
import os
import re
import resource
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastft.errors import UserError

REPLACED = ".old.tmp"  # ends the name of a directory that is being replaced
_NAMED = re.compile(r"([\w.:-][\w.:/-]*)=(.+)")  # NAME=PLACE
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Errors of the machine, which only its user can repair. Others, such as a missing file, may be a bug.
MACHINE = {*FULL, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# Errors of a path that the user has chosen. Without a path, they are about something else.
PLACE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ESTALE, errno.ENOTCONN,
    errno.EOPNOTSUPP,
}  # fmt: skip


class FullDiskError(UserError):
    """A disk does not have enough room for what is to be written."""

    def __init__(self, line: str, number: int):
        super().__init__(line)
        self.errno = number


def write_whole(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Write `content` (text as UTF-8) to `path`. A reader finds the old file or the whole new one at any time."""
    content = content.encode() if isinstance(content, str) else content
    with written_whole(path, durable, needed=len(content)) as partial:
        partial.write_bytes(content)


@contextmanager
def written_whole(
    path: Path, durable: bool = False, several_writers: bool = False, needed: int | None = None
) -> Iterator[Path]:
    """Give a path beside `path` to write to, which is renamed to `path` at the end, or removed after an error.

    With `several_writers`, several processes, of several machines too, may write the same file at the same time. Raises
    FullDiskError as `room_for` does; `needed` is for its message.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp" if several_writers else f"{path.name}.tmp")
    try:
        with room_for(path, needed, partial):
            yield partial
            if durable:
                sync(partial)
        os.replace(partial, path)
        if durable:
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def room_for(path: Path, needed: int | None = None, written: Path | None = None) -> Iterator[None]:
    """Turn the error of a full disk into a FullDiskError, whose line names `path`, the bytes needed and free, and what to do.

    `needed` is None if the size is not known before; the line then says that more is needed than was written. `written` is the
    partial file or directory, if it is not `path` itself; its room counts as free, because it will be removed.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FullDiskError) or (number := full_disk(error)) is None:
            raise
        lack = lack_of_room(number, path, needed, written)
        raise FullDiskError(f"{path}: {lack}; make room there and start the same command again", number) from None


def make_directory(path: Path) -> None:
    """Make a directory and those above it, unless it is there. Raises UserError, whatever the reason is that it cannot be made.

    For places that the user has chosen. Elsewhere, that something exists or is missing is a bug.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if full_disk(error):
            raise machine_error(error) from None
        reason = "a file is in the way" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
        raise UserError(f"{path}: cannot be made a directory ({reason})") from None


def require_place(path: Path) -> None:
    """Make the directory of the file `path`, which the user has chosen, and prove that files can be made there.

    Raises UserError. No file is left.
    """
    make_directory(path.parent)
    probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be written to ({error.strerror})") from None


def require_not_input(output: Path, inputs: Iterable[str | Path]) -> None:
    """Raise UserError if writing `output`, a file or a directory, would replace one of the files that are read.

    Links are followed, and a directory replaces what lies in it.
    """
    place = output.resolve()
    for each in inputs:
        read = Path(each).resolve()
        if place == read or (output.exists() and read.exists() and output.samefile(read)):
            raise UserError(f"-o {output}: is the input {each}, which would be overwritten; name another file")
        if place in read.parents:
            raise UserError(f"-o {output}: holds the input {each}, which would be lost; name another directory")


def machine_error(error: OSError) -> UserError | None:
    """The message about `error` for the user: one line with the system's words and the path; None if it may be a bug. For a
    full disk it says how much room there is.
    """
    path = error.filename2 or error.filename
    if error.errno not in MACHINE and not (path and error.errno in PLACE):
        return None
    if path and (number := full_disk(error)):
        lack = lack_of_room(number, Path(os.fsdecode(path)))
        return FullDiskError(f"{path}: {lack}; make room there and start the same command again", number)
    return UserError(f"{path or 'this machine'}: {error.strerror}")


def is_refusal(error: BaseException) -> bool:
    """Whether the machine, or a path on it that the error names, refused to read or write."""
    return system_number(error) in MACHINE | PLACE


def full_disk(error: BaseException) -> int | None:
    """The system's number of the error if it means that a disk is too full, else None.

    A used-up quota and a limit on the size of files count, too.
    """
    number = system_number(error)
    return number if number in FULL else None


def system_number(error: BaseException) -> int | None:
    """The system's number of the error (errno), also where a library has kept only its words; None if it has none.

    Libraries in Rust say "(os error 13)", safetensors has the system's words, and torch's writer says
    "inline_container.cc:672 . unexpected pos 704 vs 598" of a full disk.
    """
    number, words = getattr(error, "errno", None), str(error)
    if number is None and (found := re.search(r"\(os error (\d+)\)", words)):
        number = int(found[1])
    if number is None:
        number = next((each for each in FULL if os.strerror(each) in words), None)
    return errno.ENOSPC if number is None and "unexpected pos" in words else number


def lack_of_room(number: int, path: Path, needed: int | None = None, written: Path | None = None) -> str:
    """What is needed for `path` and what is free there, in the words of error `number`; the rest as in `room_for`.

    `needed` is the size of the contents. On a disk they take whole blocks, another for the directory, and some for the file
    system's own lists. So contents that seem to fit can still need more than what is free. If far more is free, something
    else is used up.
    """
    words, done = os.strerror(number), _bytes_under(written or path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    wanted = f"{bytes_text(needed)} needed" if needed is not None else f"more than {bytes_text(done)} needed"
    wanted = wanted if needed is not None or done else "room needed"
    if number == errno.EFBIG:
        limited = f"a file may have {bytes_text(limit)} (ulimit -f)"
        return f"{words}: {wanted}, {'more than a file may have' if limit == resource.RLIM_INFINITY else limited}"
    if number == errno.EDQUOT:
        return f"{words}: {wanted}, more than your quota has left (quota -s)"
    disk = os.statvfs(next(place for place in (path, *path.absolute().parents) if place.exists()))
    free = disk.f_bavail * disk.f_frsize + (done if written and needed is not None else 0)
    if needed is not None:
        taken = (math.ceil(needed / disk.f_frsize) + 1) * disk.f_frsize
        if free > 2 * taken:
            return f"{words}: {wanted}, {bytes_text(free)} free: look for another limit, such as inodes (df -i)"
        wanted = f"{bytes_text(taken)} needed" if taken > free else f"more than {bytes_text(free)} needed"
    return f"{words}: {wanted}, {bytes_text(free)} free"


def _bytes_under(path: Path) -> int:
    """The size of a file, or of all files in a directory; 0 if `path` does not exist."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def bytes_text(count: float) -> str:
    """Write a number of bytes as people read it: "512 bytes", "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1024
    raise AssertionError("TiB is the last unit")


def sync(path: Path) -> None:
    """Write a file, or a directory's list of names, from the system's memory to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_directory(partial: Path, path: Path) -> None:
    """Make `partial` and all its files durable, and rename it to `path`, where it replaces a directory that is there.

    At any moment, after SIGKILL or a power cut as well, `path` is the whole old directory, or nothing, or the whole new one.
    """
    for each in (*partial.rglob("*"), partial):
        sync(each)
    old = path.with_name(f"{path.name}{REPLACED}")
    shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed here
    if path.is_dir() and not path.is_symlink():
        os.rename(path, old)  # one atomic step; removing its files one by one could leave a part of it after a kill
    os.rename(partial, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def short_name(place: str) -> str:
    """The last part of a path, for reports that must not tell where files lie. A name on the Hub is returned unchanged."""
    path = Path(place)
    local = path.exists() or path.is_absolute() or place.startswith((".", "~")) or place.count("/") > 1
    return path.resolve().name if local else place


def split_name(written: str) -> tuple[str | None, str]:
    """(NAME, PLACE) of NAME=PLACE; (None, PLACE) of a place alone, which may hold "=" if it is there or is an address."""
    is_place = Path(written).exists() or written.startswith(("http://", "https://"))
    named = None if is_place else _NAMED.fullmatch(written)
    return (named[1], named[2]) if named else (None, written)
