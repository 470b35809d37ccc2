"""Compares two shares of users: the difference with its interval, and a test that holds for few users, and for none.

compare_shares(0, 200, 62, 200)      # nobody of 200 against 62 of 200: difference -.31 [-.377, -.241]
"""

import math
from dataclasses import dataclass

Z = 1.959963984540054
"""The normal distribution's 97.5 % point."""
MANY = 50
"""Expected users in every cell above which the chi-square test is Fisher's to two digits."""


@dataclass(frozen=True)
class Shares:
    """The share of an arm's users beside that of the control's."""

    arm: float
    control: float
    low: float
    high: float
    """Newcombe's 95 % interval of the difference, from Wilson's of each share (Statistics in Medicine 17, 1998)."""
    p: float
    """Two-sided, corrected for the number of tests; above 0."""
    p_holm: float = math.nan

    @property
    def value(self) -> float:
        return self.arm - self.control


def compare_shares(arm: int, arm_users: int, control: int, control_users: int, tests: int = 1) -> Shares:
    """Compare `arm` of `arm_users` with `control` of `control_users`. `tests` is Bonferroni's factor."""
    (a, a_low, a_high), (c, c_low, c_high) = _wilson(arm, arm_users), _wilson(control, control_users)
    low, high = a - c - math.hypot(a - a_low, c_high - c), a - c + math.hypot(a_high - a, c - c_low)
    return Shares(a, c, low, high, min(1.0, max(tests * _p(arm, arm_users, control, control_users), 1e-300)))


def _wilson(count: int, users: int) -> tuple[float, float, float]:
    """(share, low, high)"""
    share, z2 = count / users, Z**2 / users
    centre = (share + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(share * (1 - share) / users + z2 / 4 / users) / (1 + z2)
    return share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def _p(a: int, n: int, c: int, m: int) -> float:
    """The chi-square test of two shares, with the correction for continuity; Fisher's exact test for few users."""
    active, users = a + c, n + m
    least = min(active, users - active) * min(n, m) / users
    if least == 0:
        return 1.0
    if least > MANY:
        apart = max(0.0, abs(a - active * n / users) - 0.5)
        return math.erfc(apart / math.sqrt(2 * active * n * m * (users - active) / users**3))
    tables = range(max(0, active - m), min(active, n) + 1)
    logs = {x: _log_binomial(n, x) + _log_binomial(m, active - x) for x in tables}
    all_of_them, most = _log_binomial(users, active), logs[a] + 1e-7
    return min(1.0, math.fsum(math.exp(each - all_of_them) for each in logs.values() if each <= most))


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
