"""A run's place in object storage: s3://, gs://, az://, hf://buckets/…, file:// or whatever fsspec knows.

    RUN/step-00000100-3f2a9c01/…        a checkpoint's files, each directory written once and never again
    RUN/step-00000100-3f2a9c01/COMMITTED   its manifest, put there last
    RUN/model/…, RUN/model/COMMITTED    the trained model: the run is finished
    RUN/lease.json                      who writes here

Only single objects are ever put, which storage does atomically; nothing is appended to, or taken from a listing that is not
confirmed by a manifest. Every request is tried again after 1, 2, 4, 8 and 16 seconds.
"""

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from fastft.errors import UserError

COMMITTED = "COMMITTED"
DELAYS_S = (1, 2, 4, 8, 16)
EXTRA = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # another try ends the same way
Result = TypeVar("Result")


class Store:
    """The objects under one address. All methods raise UserError, in one line, when storage does not do what it must."""

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        scheme = self.url.split("://")[0] if "://" in self.url else "file"
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if scheme == "file":
            options["auto_mkdir"] = True
        if scheme in ("s3", "s3a"):  # one policy of trying again: theirs under ours would be four minutes
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10}
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url, **options)
        except ImportError:
            raise UserError(
                f'{self.url}: {scheme}:// needs {EXTRA.get(scheme, "a package for it")}: pip install "fastft[cloud]"'
            ) from None
        except ValueError as error:  # fsspec: unknown protocol
            raise UserError(f"checkpoint.remote: {url}: {error}") from None
        self.root = self.root.rstrip("/")
        if hasattr(self.fs, "retries"):
            self.fs.retries = 1

    def put(self, source: Path, name: str) -> None:
        """Copy a file there. Its size is asked for afterwards."""

        def copy() -> None:
            self.fs.put_file(str(source), f"{self.root}/{name}")
            size, wanted = self.fs.size(f"{self.root}/{name}"), source.stat().st_size
            if size != wanted:
                raise OSError(f"{size} of {wanted} bytes arrived")

        self._try(copy, name)

    def get(self, name: str, target: Path) -> None:
        self._try(lambda: self.fs.get_file(f"{self.root}/{name}", str(target)), name)

    def write(self, name: str, content: str) -> None:
        """Put an object whose readers find the old or the new content, as object storage has it."""
        path, beside = f"{self.root}/{name}", f"{self.root}/{name}.{secrets.token_hex(4)}.tmp"

        def replace() -> None:  # fsspec writes a file in place: for a moment it would be empty
            self.fs.pipe_file(beside, content.encode())
            os.replace(beside, path)

        local = "file" in self.fs.protocol
        self._try(replace if local else lambda: self.fs.pipe_file(path, content.encode()), name)

    def read(self, name: str) -> bytes | None:
        """None where there is no such object."""

        def cat() -> bytes | None:
            try:
                return self.fs.cat_file(f"{self.root}/{name}")
            except FileNotFoundError:
                return None

        return self._try(cat, name)

    def modified(self, name: str) -> datetime:
        return self._try(lambda: self.fs.modified(f"{self.root}/{name}"), name)

    def directories(self) -> list[str]:
        """Names directly under the address that hold something."""

        def names() -> list[str]:
            self.fs.invalidate_cache()
            try:
                found = self.fs.ls(self.root, detail=True)
            except FileNotFoundError:
                return []
            return sorted(entry["name"].rstrip("/").split("/")[-1] for entry in found if entry["type"] == "directory")

        return self._try(names, "")

    def remove(self, name: str) -> None:
        """An object or all under it. The manifest goes first: what is half removed is no checkpoint."""

        def delete() -> None:
            for path in (f"{self.root}/{name}/{COMMITTED}", f"{self.root}/{name}"):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    self.fs.rm(path, recursive=True)
            self.fs.invalidate_cache()

        self._try(delete, name)

    def _try(self, action: Callable[[], Result], name: str) -> Result:
        for delay in (*DELAYS_S, None):
            try:
                return action()
            except Exception as error:  # each storage has a family of its own
                if (
                    delay is None
                    or isinstance(error, (*FINAL, NotImplementedError))
                    or "credential" in str(error).lower()
                ):
                    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                    raise UserError(
                        f"{self.url}/{name}: {reason}; look at the bucket's name, its permissions and the credentials"
                    ) from None
                time.sleep(delay)
        raise AssertionError
