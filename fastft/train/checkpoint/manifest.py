"""The manifest of a checkpoint: the file that makes a directory a checkpoint, on disks and in object storage.

It is written last and names every file with its size and XXH3-128. What has no manifest was never finished, what does not
agree with its manifest is damaged; neither is ever loaded. The checksum is for accidents, not for enemies: XXH3 reads
6.9 GB/s of one core where SHA-256 reads 0.77, and a restart reads 84 GB for a 7B model.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from fastft.errors import UserError

FORMAT = 1  # of the manifest and of what it stands for
NAME = "meta.json"
KEYS = ("step", "world_size", "machines", "files", "identity")
AT_ONCE = 8  # files that are read at the same time; hashing leaves Python's lock alone


class DamagedError(Exception):
    """The text of a manifest is none."""


def dumps(meta: dict[str, Any]) -> str:
    return json.dumps({"format": FORMAT, **meta}, indent=1)


def loads(text: str | bytes, where: str) -> dict[str, Any]:
    """Raises DamagedError for what is no manifest, ValueError for one that a newer version wrote."""
    try:
        meta = json.loads(text)
        version, complete = meta["format"], all(key in meta for key in KEYS)
    except (ValueError, KeyError, TypeError):
        raise DamagedError(f"{NAME} is damaged") from None
    if isinstance(version, int) and version > FORMAT:
        raise UserError(
            f"{where}: was written by a newer fastft (format {version}, this one reads {FORMAT}); update fastft"
        )
    if version != FORMAT or not complete:
        raise DamagedError(f"{NAME} is damaged")
    return meta


def read(directory: Path) -> dict[str, Any]:
    """The manifest of a directory; raises as `loads` does."""
    try:
        return loads((directory / NAME).read_bytes(), str(directory))
    except FileNotFoundError:
        raise DamagedError(f"{NAME} is missing") from None


def entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "xxh3": checksum(path)}


def checksum(path: Path) -> str:
    digest, buffer = xxhash.xxh3_128(), bytearray(1 << 20)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def faults(directory: Path, meta: dict[str, Any], contents: bool = False) -> dict[str, str]:
    """File name -> what is wrong with it, for those that are missing, of another size, or with `contents` of other bytes."""
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


def kept(steps: Iterable[int], newest: int, keep: int, keep_every: int) -> set[int]:
    """Which of the steps retention keeps once `newest` is published: the newest `keep`, and multiples of `keep_every` (0:
    none). Later ones are of an earlier start, and this one has passed over them: their bytes were wrong.
    """
    newest_first = sorted({step for step in steps if step <= newest}, reverse=True)
    return {step for i, step in enumerate(newest_first) if i < keep or (keep_every and step % keep_every == 0)}
