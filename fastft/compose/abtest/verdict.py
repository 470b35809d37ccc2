"""The result of an experiment in one sentence, for whoever decides; significance is that of Holm's adjusted p values."""

import math

from fastft.compose.abtest.estimates import ArmComparison, Effect
from fastft.compose.abtest.results import Results

ALPHA = 0.05
SEEN = 2.8
"""Standard errors of an effect that 80 of 100 experiments of this size find at 5 %: 1.96 + .84."""


def verdict(results: Results) -> str:
    """One sentence on all arms. It says first if the experiment is not over, or its arms are uneven."""
    doubts = []
    if results.sample_ratio.verdict == "warning":
        doubts.append("with doubt, because the sizes of the arms are off")
    if results.reached < results.planned:
        doubts.append(f"so far, after {results.reached} of {results.planned} days")
    found = results.comparisons
    parts = [_differs(each, results) for each in found if _sure(each)]
    parts += _alike([each for each in found if each.figures and not _sure(each)], results)
    parts += [_without_line(each, results) for each in found if not each.figures]
    text = f"{', '.join(doubts)}: {'; '.join(parts)}." if doubts else f"{'; '.join(parts)}."
    begins_with_a_name = not doubts and any(text.startswith(each.arm) for each in found)
    return text if begins_with_a_name else text[0].upper() + text[1:]


def _without_line(found: ArmComparison, results: Results) -> str:
    """What is said of an arm with fewer than two days, and without amounts."""
    if not found.retention:
        return f"{found.arm} cannot be compared with {results.control}: there is no day on which both have active users"
    [(day, effect)] = found.retention.items()
    differs = (
        f"{found.arm} differs from"
        if effect.p < ALPHA
        else f"no difference can be told from chance between {found.arm} and"
    )
    return f"{differs} {results.control} in retention on day {day}, the only one: {percent_change(effect)}"


def _sure(found: ArmComparison) -> dict[str, Effect]:
    return {name: effect for name, effect in found.figures.items() if effect.p_holm < ALPHA}


def _differs(found: ArmComparison, results: Results) -> str:
    phrases = [_phrase(name, effect, results) for name, effect in _sure(found).items()]
    return f"{found.arm} differs from {results.control}: {_and(phrases)}"


def _alike(found: list[ArmComparison], results: Results) -> list[str]:
    """What is said of the arms without a difference, and how large one would have to be; nothing if there are none."""
    if not found:
        return []
    shown = []
    for name, what in (("dzeta", "retention at the start"), ("engagement_ratio", f"{results.unit} per user")):
        if effects := [each.figures[name] for each in found if name in each.figures]:
            shown.append(f"{what} {' and '.join(map(percent_change, effects))}")
    leading = [each.figures.get("dzeta") or each.figures.get("engagement_ratio") for each in found]
    errors = [effect.error for effect in leading if effect]
    missed = (
        f"; a difference of less than {100 * math.expm1(SEEN * max(errors)):.2g} % would usually be missed"
        if errors
        else ""
    )
    others = " or ".join(each.arm for each in found)
    return [f"no difference between {results.control} and {others} can be told from chance: {', '.join(shown)}{missed}"]


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


def percent_change(effect: Effect) -> str:
    """A ratio as a change with its interval: -1.7 % [-3.8, +0.3]."""
    value, low, high = (100 * (each - 1) for each in effect.ratio)
    return f"{_change(value)} % [{_change(low)}, {_change(high)}]"


def _change(value: float) -> str:
    return f"{value:+.1f}" if abs(value) < 1000 else f"{value:+.2g}"


def number(effect: Effect) -> str:
    """A figure with its interval: -.0173 [-.0378, .0033]."""
    value, low, high = (_short(each) for each in (effect.value, effect.low, effect.high))
    return f"{value} [{low}, {high}]"


def _short(value: float) -> str:
    return f"{value:.4f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"
