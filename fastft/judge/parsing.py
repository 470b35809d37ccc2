"""A judge's words -> its scores. Nothing is guessed: what cannot be read is None, and is counted by those who asked.

Read, in this order: a JSON object (what our prompts ask for); a first line of nothing but scores, as Vicuna's reviewers
wrote it; else what is said last, as a pair, a tuple behind a word such as "scores" or "output", or with the assistants' names
("Assistant 1: 8/10"). A tuple alone is a score only on a line of its own: in "the endpoints (10, 4)" it is geometry.
"""

import json
import re
from collections.abc import Iterator

LOWEST, HIGHEST = 0.0, 10.0

_SCORE = r"(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*10(?:\.0)?)?(?![\w.]*\d)"
_BETWEEN = r"\s*(?:[,;:/|&\s]|\band\b)\s*"
_PAIR = re.compile(rf"[\[(]*\s*{_SCORE}{_BETWEEN}{_SCORE}\s*[\])]*[.;]?", re.IGNORECASE)
_TUPLE = re.compile(rf"[\[(]\s*{_SCORE}\s*,\s*{_SCORE}\s*[\])]", re.IGNORECASE)
_CONCLUDES = re.compile(r"\b(?:scores?|scoring|ratings?|output|tuple|verdict|conclusion)\b", re.IGNORECASE)
_NAMED = [
    # Assistant 1: 8/10 | Assistant 1 a score of 8 | score for Assistant 1 is 8 | Assistant 1's score: 8
    re.compile(
        rf"\bAssistant\s*{number}\b(?:'s)?\**[^\S\n]*(?:\(?(?:an?|the|overall|final|score|rating|of|is|gets|receives|with|deserves)\b[^\S\n]*)*"
        rf"\**[:=-]?\**[^\S\n]*\**{_SCORE}",
        re.IGNORECASE,
    )
    for number in (1, 2)
]
_BRACKETS = re.compile(rf"\[\[\s*{_SCORE}\s*\]\]")
_RATED = re.compile(
    rf"\b(?:score|rating|grade|rate|give)\b[^\d\n]{{0,40}}?{_SCORE}|(?<![\d.]){_SCORE}(?=\s*(?:/|out of)\s*10\b)",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"\**[\[(]*\s*{_SCORE}\s*[\])]*\**[.;]?", re.IGNORECASE)
_EMPHASIS = re.compile(r"[*_`#>]+")
_REFUSAL = re.compile(
    r"\b(?:I(?:'m| am) sorry|I can(?:not|'t)|I(?:'m| am) (?:unable|not able)|as an AI)\b", re.IGNORECASE
)


def parse_pair(text: str) -> tuple[float, float] | None:
    """The scores of Assistant 1 and 2, or None."""
    if pair := _from_json(text, (("score_1", "score_2"), ("assistant_1", "assistant_2"), ("scores",))):
        return pair
    lines = [line for line in (_EMPHASIS.sub("", line).strip() for line in text.strip().splitlines()) if line]
    if lines and (found := _PAIR.fullmatch(lines[0])) and (pair := _scores(found)):
        return pair
    said = [*_tuples(lines), *_named(lines)]
    return sorted(said, key=lambda each: each[0])[-1][1] if said else None


def parse_single(text: str) -> float | None:
    """The score of the one answer, or None."""
    if score := _from_json(text, (("score",), ("rating",))):
        return score[0]
    said = [_scores(found) for found in _BRACKETS.finditer(text)]
    lines = [line for line in (_EMPHASIS.sub("", line).strip() for line in text.strip().splitlines()) if line]
    if not said and lines:
        said = [_scores(found) for line in (lines[-1], lines[0]) if (found := _ALONE.fullmatch(line))][:1]
    if not said:
        said = [_scores(found) for line in lines for found in _RATED.finditer(line)]
    said = [scores for scores in said if scores]
    return said[-1][0] if said else None


def is_refusal(text: str) -> bool:
    """Does the judge say that it will not? Asked where no score was found."""
    return bool(_REFUSAL.search(text[:300]))


def _tuples(lines: list[str]) -> Iterator[tuple[int, tuple[float, float]]]:
    """Pairs on a line of their own, and tuples on a line that speaks of scores, with the number of the line."""
    for number, line in enumerate(lines):
        bare = re.sub(r"^(?:final\s+)?(?:scores?|output|verdict|ratings?)\s*[:=]\s*", "", line, flags=re.IGNORECASE)
        if found := _PAIR.fullmatch(bare):
            found = [found]
        else:
            found = _TUPLE.finditer(line) if _CONCLUDES.search(line) else []
        yield from ((number, pair) for each in found if (pair := _scores(each)))


def _named(lines: list[str]) -> Iterator[tuple[int, tuple[float, float]]]:
    """The last scores said with the assistants' names; counted to the line of the later one."""
    last: list[tuple[int, float] | None] = [None, None]
    for number, line in enumerate(lines):
        for i, pattern in enumerate(_NAMED):
            if scores := [s for found in pattern.finditer(line) if (s := _scores(found))]:
                last[i] = number, scores[-1][0]
    if last[0] and last[1]:
        yield max(last[0][0], last[1][0]), (last[0][1], last[1][1])


def _scores(found: re.Match) -> tuple[float, ...] | None:
    """The match's numbers where they are on the scale."""
    values = tuple(float(group) for group in found.groups() if group is not None)
    return values if values and all(LOWEST <= value <= HIGHEST for value in values) else None


def _from_json(text: str, names: tuple[tuple[str, ...], ...]) -> tuple[float, ...] | None:
    """From the last object in the text that holds numbers under one of `names`; the whole text, where it is one."""
    for found in reversed(list(_objects(text))):
        for keys in names:
            values = [found.get(key) for key in keys]
            values = values[0] if len(values) == 1 and isinstance(values[0], list) and len(values[0]) == 2 else values
            numbers = tuple(float(value) for value in values if _is_score(value))
            if len(numbers) == len(values):
                return numbers
    return None


def _is_score(value) -> bool:
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?", value):
        value = float(value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and LOWEST <= value <= HIGHEST


def _objects(text: str) -> Iterator[dict]:
    decoder, position = json.JSONDecoder(strict=False), 0
    while (position := text.find("{", position)) >= 0:
        try:
            value, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError):
            position += 1
            continue
        if isinstance(value, dict):
            yield value
