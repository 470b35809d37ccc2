"""Read a verdict, which of two answers is better, from a judge's words: "a" (the first), "b", "tie", or None.

A prompt says in which form a judge is to answer (`asked_by`), and `read_pair` reads a reply as an answer to it:

    "scores"    a score for each answer, as our own prompts ask; a verdict in brackets is read, too
    "verdict"   [[A]], [[A>>B]], a JSON object with "verdict", "Final verdict: A"
    "number"    1, 2 or 3 (equal) alone on the last line. A lone number means nothing if it was not asked for
"""

import re
from collections.abc import Iterable, Iterator
from typing import Literal

from fastft.judge.judgment import Reading, Verdict, better
from fastft.judge.replies.parsing import lines_of, objects_and_words, parse_pair

Asked = Literal["scores", "verdict", "number"]
VERDICT_KEYS = ("verdict", "final_verdict", "winner", "preference", "better", "better_answer", "choice")

_ASKS_NUMBER = re.compile(r"\bnumbers? 1 or 2\b.*\b3 if\b", re.IGNORECASE | re.DOTALL)
_ASKS_VERDICT = re.compile(r"\[\[\s*A\s*(?:>+\s*B\s*)?\]\]|[\"'](?:verdict|winner)[\"']\s*:", re.IGNORECASE)
# "Assistant A", "Response 1", "A", "tie" (`side_of` says which it is). A lone digit in brackets would be a rating.
_NAMED = (
    r"(?:the\s+)?(?:assistant|answer|response|model|output)\s*\(?[12AB]\)?|\(?[ABC]\)?"
    r"|(?:it'?s\s+)?an?\s+tie|ties?|equal|draw"
)
_SIDE = rf"{_NAMED}|[12]"
_ORDER = r"[AB12]\s*(?:[<>]+|=+)\s*[AB12]"
_BRACKETS = re.compile(rf"\[\[\s*({_ORDER}|{_NAMED})\s*\]\]", re.IGNORECASE)
_ANNOUNCED = re.compile(
    rf"(?:.*[.!?]\s+)?(?:(?:so|therefore|thus|hence),?\s+)?(?:(?:the|my)\s+)?(?:(?:final|overall)\s+)?"
    rf"(?:verdict|winner|(?:better|best)\s+(?:answer|response|assistant|one)|preferred\s+(?:answer|response)|choice)"
    rf"\s*(?:is\s*:?|[:=])\s*\[*\(?({_ORDER}|{_SIDE})\)?\]*(?:\s+is\s+better)?[.!]?",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"\[?\(?({_ORDER}|assistant\s*[12AB])\)?\]?[.!]?", re.IGNORECASE)
_TAGGED = re.compile(rf"<(verdict|winner|choice)>\s*\[*\s*({_ORDER}|{_SIDE})\s*\]*\s*</\1>", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?:(?:final\s+)?(?:answer|verdict|choice|output)\s*[:=]\s*)?[\[(]*([123])[\])]*\.?", re.IGNORECASE
)
_NUMBERS: dict[str, Verdict] = {"1": "a", "2": "b", "3": "tie"}


def asked_by(prompt: str) -> Asked:
    """Return what a prompt for two answers asks for."""
    if _ASKS_NUMBER.search(prompt):
        return "number"
    return "verdict" if _ASKS_VERDICT.search(prompt) else "scores"


def read_pair(text: str, asked: Asked = "scores") -> Reading | None:
    """Return the scores of the first and the second answer, or the verdict, or None.

    A reply to a request for scores that gives a verdict, too, is read only if both say the same.
    """
    if asked == "number":
        return parse_number(text)
    verdict = parse_verdict(text)
    if asked == "verdict":
        return verdict
    scores = parse_pair(text)
    if scores and verdict:
        return scores if better(scores) == verdict else None
    return scores or verdict


def parse_number(text: str) -> Verdict | None:
    """Return the verdict of a judge who was asked for 1, 2 or 3 on the last line."""
    _, words = objects_and_words(text)
    lines = lines_of(words)
    found = _NUMBER.fullmatch(lines[-1]) if lines else None
    return _NUMBERS[found[1]] if found else None


def parse_verdict(text: str) -> Verdict | None:
    """Return the verdict, if all that look like one agree and one of them is where a judge would put its own.

    That is a JSON object that the reply begins or ends with, brackets at the end of a line and outside quotation marks, or a
    line that announces it.
    """
    objects, words = objects_and_words(text)
    own = [verdict for found in objects if (verdict := _of_object(found))]
    lines = lines_of(words)
    own += [verdict for line in lines for verdict in _concluded(line)]
    everywhere = {side_of(found[1]) for found in _BRACKETS.finditer(words)}
    said = {*own} | everywhere
    return said.pop() if own and len(said) == 1 else None


def _concluded(line: str) -> Iterator[Verdict]:
    """Yield the verdicts that a line ends with."""
    found = [*_BRACKETS.finditer(line)]
    if found and re.fullmatch(r"[\s.!]*", line[found[-1].end() :]) and not _inside_quotes(line, found[-1].start()):
        yield from _known(found[-1][1])
    elif announced := _ANNOUNCED.fullmatch(line):
        yield from _known(announced[1])
    elif tagged := _TAGGED.fullmatch(line):
        yield from _known(tagged[2])
    elif alone := _ALONE.fullmatch(line):
        yield from _known(alone[1])


def _inside_quotes(line: str, place: int) -> bool:
    return bool(line[:place].count('"') % 2 or line[:place].count("“") > line[:place].count("”"))


def _known(words: str) -> Iterable[Verdict]:
    return [side] if (side := side_of(words)) else []


def _of_object(found: dict) -> Verdict | None:
    """Return the verdict under the keys that hold one, in any case, if there is exactly one."""
    said = {str(key).strip().lower().replace(" ", "_"): value for key, value in found.items()}
    verdicts = {side_of(str(said[key]).strip(" []()")) for key in VERDICT_KEYS if key in said}
    return verdicts.pop() if len(verdicts) == 1 else None


def side_of(words: str) -> Verdict | None:
    """Return what "Assistant A", "2", "tie", "C" or "B>>A" stands for; None for anything else."""
    words = re.sub(r"[\s()'_]+", "", words.lower())
    if order := re.fullmatch(r"([ab12])([<>]+|=+)([ab12])", words):
        left, sign, right = ({"1": "a", "2": "b"}.get(each, each) for each in order.groups())
        if left == right:
            return None
        return "tie" if "=" in sign else left if ">" in sign else right
    if words in ("c", "tie", "ties", "atie", "itsatie", "equal", "draw", "adraw"):
        return "tie"
    found = re.fullmatch(r"(?:the)?(?:assistant|answer|response|model|output)?([ab12])", words)
    return {"a": "a", "1": "a", "b": "b", "2": "b"}[found[1]] if found else None
