"""Reads and writes objects in storage: s3://, gs://, az://, hf://buckets/…, file:// or any other address that fsspec knows.

    store = Store("s3://bucket/run")
    store.put(Path("weights.safetensors"), "step-100/weights.safetensors")
    store.read("lease.json")                      # None if there is no such object

Objects are written whole, which storage does atomically; nothing is appended. A request that fails for a reason that may pass
(no network, an overloaded service, expired credentials) is tried again for five minutes, with a warning in the log. A refused
request is tried again a few times, with credentials that are read anew. After that a StorageError names the cause.
"""

import difflib
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from fastft.common.files import FullDiskError, written_whole
from fastft.common.storage_faults import NO_BUCKET, StorageError, diagnose, reason_of
from fastft.errors import UserError, is_ours

logger = logging.getLogger(__name__)

DELAYS_S = (1, 2, 4, 8, 16)  # between tries; the last one is repeated
PATIENCE_S = 300  # most outages are over by then; 8 GPUs on spot cost a dollar in that time
SAID_AFTER_S, SAID_EVERY_S = 5, 60
SCHEMES = ("s3", "gs", "az", "hf", "file")  # suggested for an unknown one that is similar
# fsspec knows them, but they keep nothing, or files of which others may find a half, or they are views of other file systems.
NO_STORES = (
    "memory", "http", "https", "data", "github", "git", "gist", "jupyter", "jlab", "pyscript", "dvc", "wandb", "root",
    "ftp", "sftp", "ssh", "smb", "webdav", "box", "dropbox", "gdrive",
    "dask", "dir", "zip", "tar", "libarchive", "reference", "generic", "cached", "blockcache", "filecache", "simplecache",
    "async_wrapper", "asyncwrapper", "asynclocal",
)  # fmt: skip
EXAMPLES = "s3://bucket/run, gs://bucket/run, az://container/run, hf://buckets/owner/name or file:///directory"
EXTRA = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
# They log what they raise, too, gcsfs with a traceback each time. Python prints that where nobody has asked for logs.
LIBRARIES = ("gcsfs", "adlfs", "azure", "s3fs", "aiobotocore", "botocore", "google.auth")
BUGS = (AssertionError, AttributeError, LookupError, NameError, TypeError)  # what no library of storage raises
Result = TypeVar("Result")


def check_address(url: str) -> None:
    """Raise UserError unless `url` is an address of storage: a scheme that fsspec knows, `://`, and a place.

    A path without a scheme is refused: it would be a directory of this machine, and be lost with the machine.
    """
    from fsspec import available_protocols

    scheme, separator, place = url.partition("://")
    if not separator:
        raise UserError(f"{url!r} is no address of storage{_meant(url)}; an address is {EXAMPLES}")
    if scheme in NO_STORES or scheme not in available_protocols():
        nearest = difflib.get_close_matches(scheme.lower(), SCHEMES, n=1)
        hint = f"; did you mean {nearest[0]}://{place}?" if nearest else ""
        raise UserError(f"{url!r}: {scheme!r} is no kind of storage{hint}; an address is {EXAMPLES}")
    if scheme in ("file", "local"):
        if not place.startswith("/") or not place.strip("/"):
            raise UserError(f"{url!r}: after {scheme}:// comes the full path of a directory: {scheme}:///mnt/runs")
    elif not place.split("/")[0] or re.search(r"\s", place):
        raise UserError(f"{url!r} names no bucket; an address is {EXAMPLES}")


def _meant(url: str) -> str:
    """A hint about an address without ://, beginning with a semicolon; "" if there is none."""
    slip = re.fullmatch(r"(\w+)(?:://?|//+|:)([^/].*)", url)  # s3:/bucket, s3//bucket, s3:bucket
    if slip and slip[1].lower() in (*SCHEMES, *EXTRA):
        return f"; did you mean {slip[1].lower()}://{slip[2]}?"
    if url.startswith(("/", "~", ".")):
        return f"; a directory is file://{os.path.abspath(os.path.expanduser(url))}" if url.strip("/") else ""
    return f"; did you mean s3://{url}?" if url else ""


class Store:
    """The objects under one address. All methods raise StorageError if a request fails."""

    def __init__(self, url: str):
        """Raises UserError if `url` is no address, if the package for its scheme is not installed, or if that cannot open it."""
        check_address(url)
        self.url = url.rstrip("/")
        self.lock = threading.Lock()
        self.said_at: float | None = None  # when the log last said that the storage does not answer
        self.fs, self.root = self._open()

    def _open(self) -> tuple[Any, str]:
        """A new file system of fsspec, with a session of its own, and the address without its scheme."""
        import fsspec

        for library in map(logging.getLogger, LIBRARIES):
            if not library.handlers:
                library.addHandler(logging.NullHandler())
        scheme = self.url.split("://")[0]
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if scheme in ("file", "local"):
            options["auto_mkdir"] = True
        if scheme in ("s3", "s3a"):  # without botocore's own retries: with them under ours, an error took four minutes
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10}
        try:
            fs, root = fsspec.core.url_to_fs(self.url, **options)
        except ImportError:
            raise UserError(
                f'{self.url}: {scheme}:// needs {EXTRA.get(scheme, "a package for it")}: pip install "fastft[cloud]"'
            ) from None
        except Exception as error:  # as in `_try`
            if _is_bug(error):
                raise
            raise StorageError(self.url, diagnose(error), reason_of(error)) from None
        if hasattr(fs, "retries"):
            fs.retries = 1
        if loop := getattr(fs, "loop", None):
            # A broken connection leaves tasks whose errors nobody reads, and asyncio would print a traceback for each of them.
            # The request they belonged to fails as well, and is tried again.
            loop.set_exception_handler(lambda _, context: logger.debug("asyncio: %s", context.get("message")))
        return fs, root.rstrip("/")

    def put(self, source: Path, name: str) -> None:
        """Upload a file, and check that all of its bytes arrived."""

        wanted = source.stat().st_size

        def copy(fs: Any) -> None:
            fs.put_file(str(source), f"{self.root}/{name}")
            size = fs.size(f"{self.root}/{name}")
            if size != wanted:
                raise OSError(f"{size} of {wanted} bytes arrived")

        self._try(copy, name)

    def get(self, name: str, target: Path) -> None:
        """Download an object to the file `target`."""
        self._try(lambda fs: fs.get_file(f"{self.root}/{name}", str(target)), name)

    def write(self, name: str, content: str) -> None:
        """Put an object with this text. A reader finds the old or the new content, whole, on a disk (file://) as well."""
        path = f"{self.root}/{name}"

        def replace(_: Any) -> None:  # fsspec would write a file in place, so that it is empty for a moment
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with written_whole(Path(path), several_writers=True) as partial:
                partial.write_text(content)

        local = "file" in self.fs.protocol
        self._try(replace if local else lambda fs: fs.pipe_file(path, content.encode()), name)

    def read(self, name: str) -> bytes | None:
        """Return the content of an object, or None if there is no such object."""
        # With more, s3fs asks for the size first, by HEAD, and the answer to HEAD does not say why a request is refused.
        whole = {"max_concurrency": 1} if "s3" in self.fs.protocol else {}

        def cat(fs: Any) -> bytes | None:
            try:
                return fs.cat_file(f"{self.root}/{name}", **whole)
            except FileNotFoundError as error:
                return _nothing(error, None)

        return self._try(cat, name)

    def modified(self, name: str) -> datetime:
        """Return the time at which an object was last written, by the storage's clock."""
        return self._try(lambda fs: fs.modified(f"{self.root}/{name}"), name)

    def directories(self) -> list[str]:
        """Return the names of the directories directly under the address, sorted."""

        def names(fs: Any) -> list[str]:
            fs.invalidate_cache()
            try:
                found = fs.ls(self.root, detail=True)
            except FileNotFoundError as error:
                found = _nothing(error, [])
            return sorted(entry["name"].rstrip("/").split("/")[-1] for entry in found if entry["type"] == "directory")

        return self._try(names, "")

    def remove(self, name: str, first: str | None = None) -> None:
        """Remove an object, or everything under it. What `first` names under it is removed before the rest."""
        paths = [f"{self.root}/{name}/{first}"] * bool(first) + [f"{self.root}/{name}"]

        def delete(fs: Any) -> None:
            for path in paths:
                with suppress(FileNotFoundError, NotADirectoryError):
                    fs.rm(path, recursive=True)
            fs.invalidate_cache()

        self._try(delete, name)

    def _try(self, action: Callable[[Any], Result], name: str) -> Result:
        """Call `action` with the file system, and retry as often as the kind of fault allows. Raises StorageError."""
        began, tries = time.monotonic(), 0
        while True:
            fs = self.fs
            try:
                result = action(fs)
            except Exception as error:  # each storage's library has a family of errors of its own
                if isinstance(error, BUGS) or _is_bug(error):
                    raise
                fault, reason = diagnose(error), reason_of(error)
            else:
                self._answers()
                return result
            tried_s, delay = time.monotonic() - began, DELAYS_S[min(tries, len(DELAYS_S) - 1)]
            tries += 1
            over = tried_s + delay > PATIENCE_S if fault.tries is None else tries > fault.tries
            failed = StorageError(f"{self.url}/{name}".rstrip("/"), fault, reason, tried_s)
            if over:
                raise failed
            if tried_s >= SAID_AFTER_S and fault.tries is None:
                self._say(failed.cause, tried_s)
            time.sleep(delay)
            if fault.renews:
                self._renew(fs)

    def _renew(self, used: Any) -> None:
        """Replace the file system `used` by one that reads the credentials again, unless another thread has done so
        already."""
        with self.lock:
            if self.fs is used:
                self.fs = self._open()[0]

    def _say(self, cause: str, tried_s: float) -> None:
        """Log that the storage does not answer, at most once a minute for all threads together."""
        with self.lock:
            now = time.monotonic()
            if self.said_at is not None and now - self.said_at < SAID_EVERY_S:
                return
            self.said_at = now
        left = max(0.0, PATIENCE_S - tried_s)
        logger.warning(f"{cause}; tried for {tried_s:.0f} s, giving up after another {left:.0f} s")

    def _answers(self) -> None:
        """Log that the storage answers again, if the log says that it did not."""
        with self.lock:
            if self.said_at is None:
                return
            self.said_at = None
        logger.info("%s: answers again", self.url)


def _is_bug(error: Exception) -> bool:
    """Whether our own code has raised `error`. The system's errors have no frame of their own, a full disk's is ours."""
    return is_ours(error) and not isinstance(error, (OSError, FullDiskError))


def _nothing(error: FileNotFoundError, empty: Result) -> Result:
    """Return `empty`, because the object does not exist. If the bucket does not exist either, raise `error` instead."""
    if diagnose(error) is NO_BUCKET:
        raise error
    return empty
