"""Objects in storage: s3://, gs://, az://, hf://buckets/…, file:// or any other address that fsspec knows.

    store = Store("s3://bucket/run")
    store.put(Path("weights.safetensors"), "step-100/weights.safetensors")
    store.read("lease.json")                      # None if there is no such object

Only whole objects are put, which storage does atomically; nothing is appended to. A request that fails is tried again after
1, 2, 4, 8 and 16 seconds.
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

DELAYS_S = (1, 2, 4, 8, 16)
EXTRA = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
# Another try would end the same way.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
BUGS = (AssertionError, AttributeError, NameError, TypeError)
Result = TypeVar("Result")


class Store:
    """The objects under one address. All methods raise UserError if the storage does not do what it is asked for."""

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        scheme = self.url.split("://")[0] if "://" in self.url else "file"
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if scheme == "file":
            options["auto_mkdir"] = True
        if scheme in ("s3", "s3a"):  # one policy of trying again: with botocore's under ours an error took four minutes
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10}
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url, **options)
        except ImportError:
            raise UserError(
                f'{self.url}: {scheme}:// needs {EXTRA.get(scheme, "a package for it")}: pip install "fastft[cloud]"'
            ) from None
        except ValueError as error:  # fsspec's, for a protocol that it does not know
            raise UserError(f"{url}: {error}; an address is s3://, gs://, az://, hf://buckets/ or file:///") from None
        self.root = self.root.rstrip("/")
        if hasattr(self.fs, "retries"):
            self.fs.retries = 1

    def put(self, source: Path, name: str) -> None:
        """Upload a file, and check that all of its bytes arrived."""

        def copy() -> None:
            self.fs.put_file(str(source), f"{self.root}/{name}")
            size, wanted = self.fs.size(f"{self.root}/{name}"), source.stat().st_size
            if size != wanted:
                raise OSError(f"{size} of {wanted} bytes arrived")

        self._try(copy, name)

    def get(self, name: str, target: Path) -> None:
        """Download an object to the file `target`."""
        self._try(lambda: self.fs.get_file(f"{self.root}/{name}", str(target)), name)

    def write(self, name: str, content: str) -> None:
        """Put an object with this text. Readers find the old or the new content, never a mixture, in files too."""
        path, beside = f"{self.root}/{name}", f"{self.root}/{name}.{secrets.token_hex(4)}.tmp"

        def replace() -> None:  # fsspec writes a file in place: for a moment it would be empty
            self.fs.pipe_file(beside, content.encode())
            os.replace(beside, path)

        local = "file" in self.fs.protocol
        self._try(replace if local else lambda: self.fs.pipe_file(path, content.encode()), name)

    def read(self, name: str) -> bytes | None:
        """Return the content of an object, or None if there is no such object."""

        def cat() -> bytes | None:
            try:
                return self.fs.cat_file(f"{self.root}/{name}")
            except FileNotFoundError:
                return None

        return self._try(cat, name)

    def modified(self, name: str) -> datetime:
        """Return when an object was last written, by the storage's clock."""
        return self._try(lambda: self.fs.modified(f"{self.root}/{name}"), name)

    def directories(self) -> list[str]:
        """Return the names of the directories directly under the address, sorted."""

        def names() -> list[str]:
            self.fs.invalidate_cache()
            try:
                found = self.fs.ls(self.root, detail=True)
            except FileNotFoundError:
                return []
            return sorted(entry["name"].rstrip("/").split("/")[-1] for entry in found if entry["type"] == "directory")

        return self._try(names, "")

    def remove(self, name: str, first: str | None = None) -> None:
        """Remove an object, or everything under it; `first` names what under it must be gone before the rest is."""
        paths = [f"{self.root}/{name}/{first}"] * bool(first) + [f"{self.root}/{name}"]

        def delete() -> None:
            for path in paths:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    self.fs.rm(path, recursive=True)
            self.fs.invalidate_cache()

        self._try(delete, name)

    def _try(self, action: Callable[[], Result], name: str) -> Result:
        """Do `action`, again after each of DELAYS_S if it fails in a way that may pass."""
        for delay in (*DELAYS_S, None):
            try:
                return action()
            except BUGS:
                raise
            except Exception as error:  # each storage's library has a family of errors of its own
                if delay is None or isinstance(error, FINAL) or "credential" in str(error).lower():
                    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                    raise UserError(
                        f"{self.url}/{name}: {reason}; check the bucket's name, its permissions and the credentials"
                    ) from None
                time.sleep(delay)
        raise AssertionError("the last try returns or raises")
