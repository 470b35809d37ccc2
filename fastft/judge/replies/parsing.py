"""Read scores from a judge's words. Nothing is guessed: what cannot be read, or can be read in two ways, is None.

Our prompts ask for a JSON object. It counts as the judge's own if the reply begins or ends with it. Elsewhere it may be a
quote from an answer that imitates a judge. In plain words, scores are read in the forms in which judges have been seen to
write them: alone on the first line, as Vicuna's reviewers did; as a pair; as a tuple after a word such as "scores" or
"output"; and with the assistants' names ("Assistant 1: 8/10"). A tuple without such a word counts only on a line of its own,
because "the endpoints (10, 4)" is geometry. "Assistant 1: 5 examples" is no score.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

LOWEST, HIGHEST = 0.0, 10.0
PAIR_KEYS = (
    *(
        (f"{name}_{first}", f"{name}_{second}")
        for name in ("score", "rating", "assistant")
        for first, second in ("12", "ab")
    ),
    ("assistant_1_score", "assistant_2_score"),
    ("assistant_a_score", "assistant_b_score"),
    ("a", "b"),
    ("scores",),
    ("ratings",),
)
SINGLE_KEYS = (("score",), ("rating",), ("final_score",), ("overall_score",))

_SCORE = r"(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*10(?:\.0)?)?(?![\w.]*\d)"
_BETWEEN = r"\s*(?:[,;:/|&\s]|\band\b|\bvs\b\.?)\s*"
_PAIR = re.compile(rf"[\[(]*\s*{_SCORE}[\])]*{_BETWEEN}[\[(]*{_SCORE}\s*[\])]*[.;]?", re.IGNORECASE)
_TUPLE = re.compile(rf"[\[(]\s*{_SCORE}\s*,\s*{_SCORE}\s*[\])]", re.IGNORECASE)
_FULL_WIDTH = str.maketrans("，：；／｜（）［］＝　", ",:;/|()[]= ") | {0x2019: "'"}
# What may come before a pair at the end of a line: a sentence without quotes, then a word that announces scores.
_TITLE = re.compile(
    r"^(?:[^\"“”„«»]*[.!?]\s+)?(?:(?:the\s+)?(?:final\s+)?(?:scores?|output|verdict|ratings?|a\s+tie|评分|得分|分数)\s*(?:[:=]|-\s)|final\s*:)\s*",
    re.IGNORECASE,
)
_CONCLUDES = re.compile(r"\b(?:scores?|scoring|ratings?|output|tuple|verdict|conclusion)\b", re.IGNORECASE)
# What must follow a score within a sentence: the sentence's end or another clause. After "5 examples", "2 of 5" or "10 %" the
# number counts something else.
_AFTER = r"(?:(?<=/10)|(?<=of 10)|(?=\s*(?:$|[.,;!)|(\]]|(?:and|while|whereas|but|because|points?)\b|分|[-–—]\s)))"
_NAMED = [
    # Assistant 1: 8/10 | Assistant 1 (8/10) | Assistant 1 a score of 8 | score for Assistant 1 is 8 | | Assistant 1 | 8 |
    re.compile(
        rf"(?:\b(?:Assistant|Model|Response)|助手)\s*(?:{name})\b(?:'s)?[^\S\n]*"
        r"(?:\(?(?:an?|the|overall|final|score|rating|of|is|gets|receives|with|deserves)\b[^\S\n]*)*"
        rf"[:=|–—-]?[^\S\n]*\(?{_SCORE}{_AFTER}",
        re.IGNORECASE,
    )
    for name in ("1|A", "2|B")
]
_BRACKETS = re.compile(rf"\[\[\s*{_SCORE}\s*\]\]")
_RATED = re.compile(
    rf"\b(?:score|rating|grade|rate|give|评分|得分|分数)\b[^\d\n]{{0,40}}?{_SCORE}{_AFTER}"
    rf"|(?<![\d.,–-])(?<!\bto )(?<!\bor ){_SCORE}(?=\s*(?:/|out of)\s*10\b)",
    re.IGNORECASE,
)
_FINAL = re.compile(r"\b(?:final|overall)\b", re.IGNORECASE)
_ALONE = re.compile(rf"[\[(]*\s*{_SCORE}\s*[\])]*[.;]?", re.IGNORECASE)
_ALMOST_JSON = re.compile(
    rf"\b((?:score|rating)(?:[_ ]?(?:[12]|[ab]\b))?)[\"']?\s*[:=>]\s*[\"']?{_SCORE}[\"']?\s*(?=[,}}\n]|</|$)",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_EMPHASIS = re.compile(r"[*_`#]+|^\s*>+|(?<=[-=])>")  # and quotation marks of Markdown, and arrows
_OPENS = r"<think>|<thinking>|\[THINK\]|<\|channel\|>analysis\b"
_CLOSES = r"</think>|</thinking>|\[/THINK\]|<\|end\|>(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>|<\|end\|>"
# A server may keep the opening mark to itself. The closing mark then ends a line, or an object follows it.
_THOUGHT = re.compile(rf"\s*(?:{_OPENS}).*?(?:{_CLOSES})|.*(?:{_CLOSES})(?=\s*?\n|\s*[{{`])", re.DOTALL)
_UNFINISHED = re.compile(rf"\s*(?:{_OPENS})")
_FENCE = re.compile(r"\A```\w*\s*\n|\n```\s*\Z")
_REFUSAL = re.compile(
    r"\b(?:I(?:'m| am) sorry|I can(?:not|'t)|I(?:'m| am) (?:unable|not able)|as an AI)\b", re.IGNORECASE
)


def parse_pair(text: str) -> tuple[float, float] | None:
    """Return the scores of Assistant 1 and Assistant 2, or None."""
    return _read(text, PAIR_KEYS, _pairs)


def parse_single(text: str) -> float | None:
    """Return the score of the one answer, or None."""
    scores = _read(text, SINGLE_KEYS, _singles)
    return scores[0] if scores else None


def is_refusal(text: str) -> bool:
    """Return whether the judge says that it will not judge. Meant for replies in which no score was found."""
    return bool(_REFUSAL.search(text[:300]))


def spoken(text: str) -> str:
    """Return the judge's own words: its text and the values of its object, without the keys that our prompt prescribes."""
    objects, rest = _own_objects(text)
    return "\n".join([rest, *(str(value) for found in objects for value in found.values())])


def _read(
    text: str, names: tuple[tuple[str, ...], ...], words: Callable[[list[str]], Iterable[tuple[float, ...]]]
) -> tuple[float, ...] | None:
    """Return the scores if all readings of a reply agree: those of its objects, under the keys `names`, and of its lines."""
    objects, rest = objects_and_words(text)
    readings = {scores for found in objects if (scores := _of_object(found, names))}
    if rest.strip():
        readings |= set(words(lines_of(rest)))
        readings = readings or _almost_json(rest.replace("*", ""), names[0])
    return readings.pop() if len(readings) == 1 else None


def objects_and_words(text: str) -> tuple[list[dict], str]:
    """Return what a judge says after thinking: the objects that it begins and ends with, and the rest.

    Of thoughts that never end, only an object at the end counts.
    """
    thought = _THOUGHT.match(text)
    objects, rest = _own_objects(text[thought.end() :] if thought else text)
    return objects, "" if not thought and _UNFINISHED.match(text) else rest.translate(_FULL_WIDTH)


def lines_of(words: str) -> list[str]:
    """Return the lines that say something, without emphasis and without the objects inside them, which are quotes."""
    bare = _BOXED.sub(r"\1", _without_objects(words))
    lines = [" ".join(_EMPHASIS.sub("", line).split()) for line in bare.split("\n")]
    return [line for line in lines if line]


def _own_objects(text: str) -> tuple[list[dict], str]:
    """Return the objects that the text begins and ends with, without code fences, and the rest of the text."""
    text = _FENCE.sub("", text.strip()).strip()
    found = [(begin, end, value) for begin, end, value in _objects(text) if begin == 0 or end == len(text)]
    rest = text[found[0][1] if found and found[0][0] == 0 else 0 :]
    if found and found[-1][0] > 0:
        rest = rest[: found[-1][0] - found[-1][1]]
    return [value for _, _, value in found], rest.replace("```json", "").replace("```", "")


def _without_objects(text: str) -> str:
    """Return the text without the objects inside it, which are quotes."""
    for begin, end, _ in reversed(list(_objects(text))):
        text = text[:begin] + text[end:]
    return text


def _objects(text: str) -> Iterator[tuple[int, int, dict]]:
    """Yield (begin, end, object) of every outermost JSON object in a text."""
    decoder, begin = json.JSONDecoder(strict=False), 0
    while (begin := text.find("{", begin)) >= 0:
        try:
            value, end = decoder.raw_decode(text, begin)
        except (json.JSONDecodeError, RecursionError):
            begin += 1
            continue
        if isinstance(value, dict):
            yield begin, end, value
        begin = end


def _of_object(found: dict, names: Iterable[tuple[str, ...]]) -> tuple[float, ...] | None:
    """Return the numbers under the first of `names` that has them, in any case.

    All zeros are no scores, because our prompts show them as the form to be filled in.
    """
    found = {re.sub(r"[\s-]+", "_", str(key).strip().lower()): value for key, value in found.items()}
    for keys in names:
        values = [found.get(key) for key in keys]
        if len(values) == 1 and isinstance(values[0], dict):  # {"scores": {"assistant_1": 8, "assistant_2": 6}}
            return _of_object(values[0], names)
        values = values[0] if len(values) == 1 and isinstance(values[0], list) and len(values[0]) == 2 else values
        numbers = tuple(number for value in values if (number := _number(value)) is not None)
        if len(numbers) == len(values) and any(numbers):
            return numbers
    return None


def _number(value: Any) -> float | None:
    """Return a value of an object as a score, or None if it is not a number on the scale."""
    if isinstance(value, str) and (found := re.fullmatch(r"(\d+(?:\.\d+)?)(?:\s*/\s*10)?", value.strip())):
        value = float(found[1])
    is_score = isinstance(value, (int, float)) and not isinstance(value, bool) and LOWEST <= value <= HIGHEST
    return float(value) if is_score else None


def _almost_json(text: str, names: tuple[str, ...]) -> set[tuple[float, ...]]:
    """Read broken JSON such as `score_1: 8` or `{'score_1': 8, "score_2": 9,}` if each name has exactly one value."""
    said = {(_score_name(found[1]), float(found[2])) for found in _ALMOST_JSON.finditer(text)}
    values = [value for name in names for said_name, value in sorted(said) if said_name == name]
    good = len(said) == len(values) == len(names) and any(values) and all(LOWEST <= v <= HIGHEST for v in values)
    return {tuple(values)} if good else set()


def _score_name(said: str) -> str:
    """Return "score_1" for "Score 1", "rating_a" and the like."""
    found = re.fullmatch(r"(?:score|rating)[_ ]?([12ab]?)", said.lower())
    side = {"a": "1", "b": "2"}.get(found[1], found[1])
    return f"score_{side}" if side else "score"


def _pairs(lines: list[str]) -> Iterator[tuple[float, ...]]:
    """Yield the scores on the first line, and those that are given last."""
    if len(lines) == 2 and (found := [_ALONE.fullmatch(line) for line in lines]) and all(found):
        lines = [" ".join(lines)]
    if lines and (found := _PAIR.fullmatch(lines[0])) and (pair := _scores(found)):
        yield pair
    said = sorted([*_tuples(lines), *_named(lines)], key=lambda each: each[0])
    yield from (pair for _, pair in said[-1:])


def _tuples(lines: list[str]) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Yield (line's number, pair) for pairs on a line of their own and for tuples on a line that speaks of scores."""
    for number, line in enumerate(lines):
        bare = _TITLE.sub("", line)
        if found := _PAIR.fullmatch(bare):
            found = [found]
        else:
            found = _TUPLE.finditer(line) if _CONCLUDES.search(line) else []
        yield from ((number, pair) for each in found if (pair := _scores(each)))


def _named(lines: list[str]) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Yield (later line's number, pair) for scores given with the assistants' names.

    Nothing is read if one assistant is given two different scores.
    """
    said = [
        [(number, s) for number, line in enumerate(lines) for found in pattern.finditer(line) if (s := _scores(found))]
        for pattern in _NAMED
    ]
    if all(len({scores for _, scores in each}) == 1 for each in said):
        yield max(each[-1][0] for each in said), tuple(each[-1][1][0] for each in said)


def _singles(lines: list[str]) -> set[tuple[float, ...]]:
    """Return the scores of the surest form that occurs.

    The forms, surest first: double brackets, a score alone on the first or last line, a line with "final" or "overall", any
    other.
    """
    text = "\n".join(lines)
    rated = [(line, found) for line in lines for found in _RATED.finditer(line)]
    for found in (
        _BRACKETS.finditer(text),
        [match for line in lines[:1] + lines[-1:] if (match := _ALONE.fullmatch(line))],
        [match for line, match in rated if _FINAL.search(line)],
        [match for _, match in rated],
    ):
        if scores := {scores for match in found if (scores := _scores(match))}:
            return scores
    return set()


def _scores(found: re.Match) -> tuple[float, ...] | None:
    """Return the numbers of a match, or None if they are not on the scale."""
    values = tuple(float(group) for group in found.groups() if group is not None)
    return values if values and all(LOWEST <= value <= HIGHEST for value in values) else None
