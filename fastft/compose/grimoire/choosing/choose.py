"""Choose a setting by what the weak model answered to validation questions: the one that is surely better than zero-shot, if any.

    gains = compare({"zero-shot": {"q1": 1.0, …}, "few-shot": …})       # a Gain for each setting, zero-shot first
    best = chosen(gains)                                                 # its name; "zero-shot" if none is surely better

A setting's gain is its accuracy minus zero-shot's on the same questions, with an interval that resamples questions. The choice
has the highest lower end of these intervals. Looking at many settings finds a lucky one: the best of six on 40 questions lost
20 points on the next 40. So the intervals hold for all settings together (Bonferroni: each has 100 % - 5 % / settings).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import orjson

from fastft.compose.grimoire.answering.answers import ZERO_SHOT, WeakAnswer
from fastft.judge.statistics.intervals import Interval, bootstrap_mean, bootstrap_share, sign_flip_p

Outcomes = Mapping[str, Mapping[str, float]]
"""setting -> question -> 1 for a right answer, 0 for a wrong one. A question whose call failed has no entry."""
RESAMPLES = 10_000  # the ends of the intervals are far out: with ten settings at the 0.25th percentile


@dataclass(frozen=True)
class Gain:
    """A setting beside zero-shot, in shares. `gain` is over all questions that both have answered."""

    setting: str
    questions: int
    accuracy: Interval  # 95 %
    valid: float | None
    failed: int
    gain: Interval
    p_value: float


def outcomes_of(answers: Sequence[WeakAnswer]) -> dict[str, dict[str, float]]:
    """Return who was right where. Failed calls are left out: they say nothing about the model."""
    found: dict[str, dict[str, float]] = {}
    for answer in answers:
        rows = found.setdefault(answer.setting, {})
        if not answer.error:
            rows[answer.id] = float(answer.right)
    return found


def compare(
    outcomes: Outcomes,
    valid: Mapping[str, float] | None = None,
    failed: Mapping[str, int] | None = None,
    together: bool = True,
) -> list[Gain]:
    """Return a Gain for each setting, in their order. With `together`, the intervals of the gains hold for all settings at
    once; without, each is a 95 % interval of its own.
    """
    base = outcomes[ZERO_SHOT]
    others = max(1, len(outcomes) - 1)
    outside = 5.0 / others if together else 5.0  # percent
    found = []
    for setting, rows in outcomes.items():
        right_Q = np.array(list(rows.values()), float)
        shared = [question for question in rows if question in base]
        gain_Q = np.array([rows[question] - base[question] for question in shared], float)
        found.append(
            Gain(
                setting=setting,
                questions=len(rows),
                accuracy=bootstrap_share(right_Q, np.ones(len(right_Q))),
                valid=(valid or {}).get(setting),
                failed=(failed or {}).get(setting, 0),
                gain=bootstrap_mean(gain_Q, outside, RESAMPLES),
                p_value=sign_flip_p(gain_Q) if setting != ZERO_SHOT else math.nan,
            )
        )
    return found


def gain_rows(gains: Sequence[Gain]) -> list[dict[str, Any]]:
    """Return the gains for JSON, with None for NaN, which JSON does not know: the figures of a setting without answers."""
    return orjson.loads(orjson.dumps([asdict(each) for each in gains], option=orjson.OPT_SERIALIZE_NUMPY))


def gains_of(rows: Sequence[dict[str, Any]]) -> list[Gain]:
    """Return the gains that `gain_rows` has made ready."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    def interval(row: dict[str, float | None]) -> Interval:
        return Interval(**{end: number(value) for end, value in row.items()})

    return [
        Gain(
            **{
                **row,
                "accuracy": interval(row["accuracy"]),
                "gain": interval(row["gain"]),
                "p_value": number(row["p_value"]),
            }
        )
        for row in rows
    ]


def chosen(gains: Sequence[Gain]) -> str:
    """Return the setting with the highest lower end of its gain, zero-shot where none is above 0."""
    others = [each for each in gains if each.setting != ZERO_SHOT and each.gain.low > 0]
    return max(others, key=lambda each: each.gain.low).setting if others else ZERO_SHOT


def valid_shares(answers: Sequence[WeakAnswer]) -> tuple[dict[str, float], dict[str, int]]:
    """Return by setting the share of valid answers, and how many calls failed."""
    valid: dict[str, list[float]] = {}
    failed: dict[str, int] = {}
    for answer in answers:
        if answer.error:
            failed[answer.setting] = failed.get(answer.setting, 0) + 1
        else:
            valid.setdefault(answer.setting, []).append(answer.valid)
    return {setting: sum(shares) / len(shares) for setting, shares in valid.items()}, failed
