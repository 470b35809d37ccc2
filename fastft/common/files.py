"""Write files so that nobody ever sees half of one, make them durable, and name them without saying where they lie.

write_whole(path, "text or bytes")                # beside, then renamed into place
write_whole(path, content, durable=True)          # and on the disk before this returns
with written_whole(path) as partial: ...          # for what another library writes
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Replace `path` by a file with `content` (text as UTF-8) in one act: readers find the old file or the whole new one."""
    with written_whole(path, durable) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def written_whole(path: Path, durable: bool = False, several_writers: bool = False) -> Iterator[Path]:
    """A place beside `path` to write to, which becomes `path` at the end; after an error it is gone and `path` untouched.

    With `several_writers`, processes that write the same file at the same time do each other no harm.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp" if several_writers else f"{path.name}.tmp")
    try:
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)
        if durable:
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file, or a directory's list of names, durable: on the disk, not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def short_name(place: str) -> str:
    """The last name of a file or directory, so that reports do not tell where it lies; a name on the Hub stays as it is."""
    path = Path(place)
    local = path.exists() or path.is_absolute() or place.startswith((".", "~")) or place.count("/") > 1
    return path.resolve().name if local else place
