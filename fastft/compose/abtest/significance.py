"""Holm's correction, and the chi-square test of whether users fell into the arms as planned."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np


def holm(p: dict[Any, float]) -> dict[Any, float]:
    """Holm's adjusted p values, which keep the chance of any false alarm among all at 5 %."""
    least, adjusted = 0.0, {}
    for rank, key in enumerate(sorted(p, key=lambda key: p[key])):
        least = max(least, min(1.0, (len(p) - rank) * p[key]))
        adjusted[key] = least
    return adjusted


def sample_ratio_p(counts: Iterable[int], shares: Iterable[float]) -> float:
    """The p value of the chi-square test that users fell into the arms by these shares.

    For two arms it has the correction for continuity, with which it is the binomial test's to two digits.
    """
    counts, shares = np.array(list(counts), float), np.array(list(shares), float)
    expected = counts.sum() * shares / shares.sum()
    apart = np.abs(counts - expected)
    if len(counts) == 2:
        apart = np.maximum(apart - 0.5, 0)
    return chi_square_tail(float((apart**2 / expected).sum()), len(counts) - 1)


def chi_square_tail(value: float, freedom: int) -> float:
    """The probability that a chi-square variable with so many degrees of freedom is above `value`.

    It is Q(freedom / 2, value / 2), from Q(1/2, x) = erfc(sqrt(x)) or Q(1, x) = exp(-x), by
    Q(a + 1, x) = Q(a, x) + x^a exp(-x) / gamma(a + 1) (Abramowitz and Stegun, 6.5.21).
    """
    x, a = value / 2, 0.5 if freedom % 2 else 1.0
    tail = math.erfc(math.sqrt(x)) if freedom % 2 else math.exp(-x)
    while a < freedom / 2 and x > 0:
        tail += math.exp(a * math.log(x) - x - math.lgamma(a + 1))
        a += 1
    return 1.0 if x == 0 else tail
