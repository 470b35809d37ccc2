"""Assign users to the arms of an experiment by a hash, as GrowthBook's SDKs do: no table, the same answer on every machine.

    ranges = bucket_ranges([0.5, 0.5], coverage=0.2)     # [(0, .1), (.5, .6)]
    arm_of(bucket("user-7", "spring-2026", version=2), ranges)      # 0, 1, or None: not in the experiment

A user's bucket is a number from [0, 1), a hash of the user and the experiment's seed. Each arm owns a range of it. Coverage
shrinks each range from its end, so that raising it later moves nobody from one arm to another. Experiments of one namespace
with ranges that do not overlap share no users. Hash version 1 has 1,000 buckets and is kept for experiments that began with
it: it correlates experiments whose seeds differ little; 2 has 10,000 and does not. Source: GrowthBook's "Build your own SDK".
"""

from collections.abc import Sequence

Range = tuple[float, float]
"""From (inclusive), to (exclusive)."""


def fnv1a_32(text: str) -> int:
    """The FNV-1a hash of a text's UTF-16 code units, which are what JavaScript's strings consist of."""
    value = 0x811C9DC5
    units = text.encode("utf-16-le", "surrogatepass")
    for unit in memoryview(units).cast("H") if text else ():
        value = ((value ^ unit) * 0x01000193) & 0xFFFFFFFF
    return value


def bucket(unit: str, seed: str, version: int) -> float:
    """The bucket of a user in [0, 1), by hash version 1 or 2."""
    if version == 2:
        return fnv1a_32(str(fnv1a_32(seed + unit))) % 10000 / 10000
    assert version == 1, version
    return fnv1a_32(unit + seed) % 1000 / 1000


def bucket_ranges(weights: Sequence[float], coverage: float = 1.0) -> list[Range]:
    """The range of each arm. `weights` sum to 1; `coverage` is the share of the users who are in the experiment."""
    ranges, start = [], 0.0
    for weight in weights:
        ranges.append((start, start + coverage * weight))
        start += weight
    return ranges


def arm_of(number: float, ranges: Sequence[Range]) -> int | None:
    """The index of the arm that owns a bucket; None if no arm does."""
    return next((index for index, (start, end) in enumerate(ranges) if start <= number < end), None)


def in_namespace(unit: str, name: str, within: Range) -> bool:
    """Whether a user belongs to an experiment's part of a namespace."""
    start, end = within
    return start <= bucket(unit, f"__{name}", version=1) < end
