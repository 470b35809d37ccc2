"""The manifest of a checkpoint: the file that makes a directory a checkpoint, on disks and in object storage.

It is written last and names every file with its size and XXH3-128. A directory without a manifest was never finished, one
that does not agree with its manifest is damaged, and neither is ever loaded. The checksum guards against accidents, not
against attackers: XXH3 reads 6.9 GB/s on one core where SHA-256 reads 0.77, and a restart reads 84 GB for a 7B model.
"""

import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from fastft.errors import UserError

FORMAT = 1  # of the manifest and of the files that it names
NAME = "meta.json"
KEYS = ("step", "world_size", "machines", "files", "identity")
RENAMED = {"window": "seq_len"}  # keys of identities in checkpoints that earlier versions wrote
AT_ONCE = 8  # files that are read at the same time; hashing releases Python's lock


class DamagedError(Exception):
    """The manifest cannot be parsed, or is not there."""


class Listing(NamedTuple):
    """The checkpoints of one place."""

    found: list[tuple[Any, dict[str, Any]]]
    """(directory, manifest), the newest first."""
    passed_over: list[str]
    """A line for each directory that is damaged, which says where it is and what is wrong with it."""


def dumps(meta: dict[str, Any]) -> str:
    """The text of a manifest."""
    return json.dumps({"format": FORMAT, **meta}, indent=1)


def loads(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse a manifest. Raises DamagedError if it is damaged, UserError if a newer version wrote it."""
    try:
        meta = json.loads(text)
        version, complete = meta["format"], all(key in meta for key in KEYS)
    except (ValueError, KeyError, TypeError):
        raise DamagedError(f"{NAME} is damaged") from None
    if isinstance(version, int) and version > FORMAT:
        raise UserError(
            f"{where}: was written by a newer fastft (format {version}, this one reads {FORMAT}); update fastft"
        )
    if version != FORMAT or not complete or not isinstance(meta["identity"], dict):
        raise DamagedError(f"{NAME} is damaged")
    meta["identity"] = {RENAMED.get(key, key): value for key, value in meta["identity"].items()}
    return meta


def read(directory: Path) -> dict[str, Any]:
    """The manifest of a directory. Raises DamagedError if there is none, and as `loads` does."""
    try:
        return loads((directory / NAME).read_bytes(), str(directory))
    except FileNotFoundError:
        raise DamagedError(f"{NAME} is missing") from None


def entry(path: Path) -> dict[str, Any]:
    """What a manifest says about a file."""
    return {"bytes": path.stat().st_size, "xxh3": checksum(path)}


def checksum(path: Path) -> str:
    """XXH3-128 of a file's contents, in hexadecimal."""
    digest, buffer = xxhash.xxh3_128(), bytearray(1 << 20)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def faults(directory: Path, meta: dict[str, Any], contents: bool = False) -> dict[str, str]:
    """Map the name of every faulty file to what is wrong with it: missing, of another size, or, with `contents`, changed."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda item: _fault(directory / item[0], item[1], contents), meta["files"].items())
        return {name: fault for name, fault in zip(meta["files"], found) if fault}


def _fault(path: Path, entry: dict[str, Any], contents: bool) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path.name} is missing"
    if size != entry["bytes"]:
        return f"{path.name} holds {size} bytes instead of {entry['bytes']}"
    if contents and checksum(path) != entry["xxh3"]:
        return f"{path.name} does not hold what was written"
    return None


def step_of(name: str) -> int | None:
    """The step of the checkpoint whose directory on a disk is called `name`, or None if the trainer gives no such name."""
    return int(name[5:]) if re.fullmatch(r"step-[0-9]{8}", name) else None


def kept(steps: Iterable[int], newest: int, keep: int, keep_every: int) -> set[int]:
    """Which of `steps` retention keeps once step `newest` is published.

    Those are the newest `keep`, and the multiples of `keep_every` (0: none). Steps after `newest` are not kept: an earlier
    start wrote them, and this start passed over them because their contents were wrong.
    """
    newest_first = sorted({step for step in steps if step <= newest}, reverse=True)
    return {step for i, step in enumerate(newest_first) if i < keep or (keep_every and step % keep_every == 0)}
