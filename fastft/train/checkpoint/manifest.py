"""Write, read and check manifests: the file that makes a directory a checkpoint, on disks and in object storage.

A manifest is written last and names every file with its size and XXH3-128. A directory without a manifest was never
finished, and one that does not agree with its manifest is damaged; neither is ever loaded. The checksum guards against
accidents, not against attackers: XXH3 reads 6.9 GB/s on one core where SHA-256 reads 0.77, and a restart reads 84 GB for a
7B model.
"""

import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from fastft.errors import UserError

FORMAT = 1  # version of the manifest and of the files that it names
NAME = "meta.json"
KEYS = ("step", "world_size", "machines", "files", "identity")  # what every manifest has
RENAMED = {"window": "seq_len"}  # keys of identities in checkpoints that earlier versions wrote
AT_ONCE = 8  # files that are read at the same time; hashing releases Python's lock


class DamagedError(Exception):
    """The manifest is missing or cannot be parsed."""


class Listing(NamedTuple):
    """The checkpoints on one disk, or in one storage."""

    found: list[tuple[Any, dict[str, Any]]]
    """(directory, manifest) of each, the newest first."""
    passed_over: list[str]
    """A line for each damaged directory, which says where it is and what is wrong with it."""


def dumps(meta: dict[str, Any]) -> str:
    """Make the text of a manifest."""
    return json.dumps({"format": FORMAT, **meta}, indent=1)


def loads(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse a manifest. Raises DamagedError if it cannot be parsed, and UserError if a newer version of fastft wrote it."""
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
    """Read the manifest of a directory. Raises DamagedError if there is none, and the errors of `loads`."""
    try:
        return loads((directory / NAME).read_bytes(), str(directory))
    except FileNotFoundError:
        raise DamagedError(f"{NAME} is missing") from None


def entry(path: Path) -> dict[str, Any]:
    """The manifest's entry for a file: its size and checksum."""
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
    """Map the name of every faulty file to what is wrong with it: it is missing, or has another size.

    With `contents` the files are read, too, and their checksums are compared.
    """
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
    """The step of the checkpoint whose directory on a disk is called `name`; None if it is not a name that the trainer gives."""
    return int(name[5:]) if re.fullmatch(r"step-[0-9]{8}", name) else None


def kept(steps: Iterable[int], newest: int, keep: int, keep_every: int) -> set[int]:
    """Select which of `steps` retention keeps once step `newest` is published.

    It keeps the newest `keep` and the multiples of `keep_every` (0: none). Steps after `newest` are not kept: an earlier start
    wrote them, and this start passed over them because their contents were wrong.
    """
    newest_first = sorted({step for step in steps if step <= newest}, reverse=True)
    return {step for i, step in enumerate(newest_first) if i < keep or (keep_every and step % keep_every == 0)}
