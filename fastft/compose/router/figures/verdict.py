"""Say whether a router is worth it, for training and evaluation alike: by its lead over the best single model.

is_worth_it(gain, queries)                                  # True, False, or None: not known
verdict(gain, queries, "small", "points of 100")            # the same in a sentence
"""

from fastft.judge.statistics.intervals import Interval

FEWEST = 30
"""Queries from which on a difference is judged: resampling fewer gives intervals that are too narrow."""


def is_worth_it(gain: Interval, queries: int) -> bool | None:
    """Whether the router is surely better than the best single model; None if the queries are too few to say."""
    return gain.low > 0 if queries >= FEWEST else None


def verdict(gain: Interval, queries: int, default: str, unit: str) -> str:
    """`gain`: router minus best single model, on `queries` queries."""
    worth_it, by = is_worth_it(gain, queries), f"by {signed(gain)} {unit}"
    than = f"the best single model, {default}"
    if worth_it is None:
        few = f"{counted(queries)} {'is' if queries == 1 else 'are'} too few"
        return f"whether this router is worth it is not known: {few} (difference to {than}: {signed(gain)} {unit})"
    if worth_it:
        return f"this router is worth it: it is better than {than}, {by}"
    if gain.high < 0:
        return f"this router is not worth it: it is worse than {than}, {by}; serve that one alone"
    return (
        f"this router is not worth it: it cannot be told from {than}: {signed(gain)} {unit}, and that interval holds 0"
    )


def counted(queries: int) -> str:
    return "1 query" if queries == 1 else f"{queries:,} queries"


def signed(gain: Interval) -> str:
    """A difference with its interval, with as many digits as a bound needs that is not 0 to be told from it."""
    bounds = (gain.value, gain.low, gain.high)
    digits = next((d for d in (2, 3, 4) if all(not each or round(each, d) for each in bounds)), 4)
    value, low, high = (f"{each:+.{digits}f}" for each in bounds)
    return f"{value} [{low}, {high}]"
