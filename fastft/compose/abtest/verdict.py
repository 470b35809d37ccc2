"""The result of an experiment in one sentence, for whoever decides; significance is that of Holm's adjusted p values."""

import math
from collections.abc import Sequence

from fastft.compose.abtest.estimates import ROUNDING, ArmComparison, Effect
from fastft.compose.abtest.results import Results
from fastft.compose.abtest.shares import Shares

ALPHA = 0.05
SEEN = 2.8
"""Standard errors of an effect that 80 of 100 experiments of this size find at 5 %: 1.96 + .84."""
NAMED = 3
"""Arms that are named one by one."""


def verdict(results: Results) -> str:
    """One sentence on all arms. It says first if the experiment is not over, or its arms cannot be trusted."""
    doubts = [f"with doubt, because {' and '.join(results.doubts)}"] if results.doubts else []
    if results.reached < results.planned:
        doubts.append(f"so far, after {results.reached} of {results.planned} days")
    found = results.comparisons
    parts = [_differs(each, results) for each in found if _sure(each) or lost_days(each)]
    parts += _alike([each for each in found if not (_sure(each) or lost_days(each))], results)
    text = f"{', '.join(doubts)}: {'; '.join(parts)}." if doubts else f"{'; '.join(parts)}."
    begins_with_a_name = not doubts and any(text.startswith(each.arm) for each in found)
    return text if begins_with_a_name else text[0].upper() + text[1:]


def lost_days(found: ArmComparison) -> list[int]:
    """The days without a line on which the arms differ for sure."""
    return [day for day, each in found.shares.items() if each.p_holm < ALPHA]


def _sure(found: ArmComparison) -> dict[str, Effect]:
    return {name: effect for name, effect in found.figures.items() if effect.p_holm < ALPHA}


def _differs(found: ArmComparison, results: Results) -> str:
    """What differs, and first the days on which it does so beside any line."""
    phrases = []
    if days := lost_days(found):
        worst = max(days, key=lambda day: abs(found.shares[day].value))
        others = f" ({len(days)} such days: {ranges(days)})" if len(days) > 1 else ""
        phrases.append(f"{_of_shares(found.shares[worst])} on day {worst}{others}")
    phrases += [_phrase(name, effect, results) for name, effect in _sure(found).items()]
    return f"{found.arm} differs from {results.control}: {_and(phrases)}"


def _of_shares(shares: Shares) -> str:
    """nobody comes back against 31.0 % (-31.0 points [-37.7, -24.7])"""
    arm = f"{100 * shares.arm:.1f} % come back" if shares.arm else "nobody comes back"
    control = f"{100 * shares.control:.1f} %" if shares.control else "nobody"
    return f"{arm} against {control} ({points(shares)})"


def _alike(found: list[ArmComparison], results: Results) -> list[str]:
    """What is said of the arms without a difference, and how large one would have to be; nothing if there are none."""
    if not found:
        return []
    if not any(each.figures or each.shares for each in found):
        return [f"{_names(found)} cannot be compared with {results.control}: nobody comes back"]
    shown, missed = [], []
    for name, what in (("dzeta", "retention at the start"), ("engagement_ratio", f"{results.unit} per user")):
        if effects := [each.figures[name] for each in found if name in each.figures]:
            shown.append(f"{what} {_changes(effects)}")
            if (error := max(effect.error for effect in effects)) > ROUNDING:
                missed.append(f"{size(SEEN * error)} in {what}")
        elif name == "dzeta" and (day := _only_day(found)):
            shown.append(f"retention on day {day} {' and '.join(points(each.shares[day]) for each in found[:NAMED])}")
    said = f"no difference between {results.control} and {_names(found)} can be told from chance"
    said += f": {', '.join(shown)}" if shown else ""
    return [said + (f"; differences below {' and '.join(missed)} would usually be missed" if missed else "")]


def _only_day(found: list[ArmComparison]) -> int | None:
    """The day that all of them have, and no other."""
    days = {day for each in found for day in each.shares}
    return days.pop() if len(days) == 1 and all(each.shares for each in found) else None


def _names(found: list[ArmComparison]) -> str:
    if len(found) <= NAMED:
        return " or ".join(each.arm for each in found)
    return f"any of the other {len(found)} arms"


def _changes(effects: list[Effect]) -> str:
    if len(effects) <= NAMED:
        return " and ".join(map(percent_change, effects))
    values = [100 * (effect.ratio[0] - 1) for effect in effects]
    return f"{_change(min(values))} to {_change(max(values))} %"


def _phrase(name: str, effect: Effect, results: Results) -> str:
    more, slower = ("more", "more slowly") if effect.value > 0 else ("fewer", "faster")
    less = "more" if effect.value > 0 else "less"
    return {
        "dzeta": f"{more} users come back at the start ({percent_change(effect)})",
        "dbeta": f"its users stop coming back {slower} (dbeta {number(effect)})",
        "engagement_ratio": f"its users use {less} in all ({results.unit} per user {percent_change(effect)})",
        "dalpha": f"users who come back use {less} at the start ({percent_change(effect)})",
        "dgamma": f"what they use on a day falls {slower} (dgamma {number(effect)})",
    }[name]


def _and(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])}, and {phrases[-1]}"


def ranges(days: Sequence[int]) -> str:
    """1, 3 to 5, 9"""
    runs: list[list[int]] = []
    for day in days:
        if runs and day == runs[-1][1] + 1:
            runs[-1][1] = day
        else:
            runs.append([day, day])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)


def points(shares: Shares) -> str:
    """A difference of shares in points of 100, with its interval: -31.0 points [-37.7, -24.7]."""
    value, low, high = (f"{100 * each:+.1f}" for each in (shares.value, shares.low, shares.high))
    return f"{value} points [{low}, {high}]"


def percent_change(effect: Effect) -> str:
    """A ratio as a change with its interval: -1.7 % [-3.8, +0.3]."""
    value, low, high = (100 * (each - 1) for each in effect.ratio)
    return f"{_change(value)} % [{_change(low)}, {_change(high)}]"


def _change(value: float) -> str:
    return f"{value:+.1f}" if abs(value) < 1000 else f"{value:+,.0f}" if value < 1e6 else "over +1,000,000"


def size(difference: float) -> str:
    """How large a difference of logs is in percent, such as 3.2 %."""
    value = 100 * math.expm1(min(difference, 20))
    if value < 0.1:
        return f"{max(value, 0.001):.2g} %"
    return f"{value:.1f} %" if value < 10 else f"{value:,.0f} %" if value < 1e6 else "1,000,000 %"


def number(effect: Effect) -> str:
    """A figure with its interval: -.0173 [-.0378, .0033]."""
    value, low, high = (_short(each) for each in (effect.value, effect.low, effect.high))
    return f"{value} [{low}, {high}]"


def _short(value: float) -> str:
    return f"{value:.4f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"
