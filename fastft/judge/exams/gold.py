"""Compare an answer with a gold answer, by the kind that this has: an option, yes or no, a number, or a short text.

    is_right("The answer is (B).", "B", "Which one?\\nOptions:\\n(A) 3\\n(B) 4")       # True
    is_right("… so she has 1,234 apples.", "#### 1234", "How many …?")                 # True

What cannot be read is wrong: an answer that names two options, or has no number. A longer gold answer (a translation, a story)
is of no kind, and cannot be compared.
"""

import re
from collections.abc import Sequence
from typing import Literal

from fastft.judge.exams.options import chosen_option, index_of, options_in

Check = Literal["auto", "choice", "number", "text", "none"]
WORD_PAIRS = (("yes", "no"), ("true", "false"))
LETTERS = [f"({letter})" for letter in "ABCDEFGHIJ"]
SHORT = 3  # words of a gold text that an answer must contain
_NUMBER = re.compile(r"(?<![\w.])-?\$?\d[\d,]*(?:\.\d+)?(?![\w])|(?<![\w.])-?\$?\.\d+")
_NUMBER_CONCLUDES = re.compile(
    r"(?:####|\\boxed\{|\banswers?\b[^.\n]{0,40}?(?:\bis\b|[:=]))[^\d\n]{0,40}?(-?\$?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE
)


def is_right(answer: str, gold: str, query: str, check: Check = "auto") -> bool:
    """Whether an answer to a query is the gold answer. Check "none", and a gold answer of no kind, are always wrong."""
    options = options_in(query)
    kind = kind_of_gold(gold, options) if check == "auto" else check
    return kind != "none" and compare(answer, gold, options, kind)[0]


def kind_of_gold(gold: str, options: Sequence[str]) -> str:
    """How a gold answer to a question with these options can be compared: choice, number, text or none."""
    gold = gold.strip()
    if options:
        return "choice" if index_of(gold, options) is not None else "none"
    if word_pair(gold) or re.fullmatch(r"\(?[A-Z]\)?", gold):
        return "choice"
    if gold_number(gold) is not None:
        return "number"
    return "text" if len(gold.split()) <= SHORT else "none"


def compare(text: str, gold: str, options: Sequence[str], kind: str) -> tuple[bool, str | None]:
    """Whether an answer is the gold answer, and what it answers, None if nothing can be read. `kind`: choice, number, text."""
    if kind == "choice":
        options = options or word_pair(gold) or LETTERS
        chosen, wanted = chosen_option(text, options), index_of(gold.strip(), options)
        return chosen is not None and chosen == wanted, None if chosen is None else options[chosen]
    if kind == "number":
        found, right = number_in(text), gold_number(gold)
        same = found is not None and right is not None and abs(found - right) <= 1e-6 * max(1, abs(right))
        return same, None if found is None else f"{found:g}"
    wanted_text, said = _bare(gold), _bare(text)
    contains = bool(wanted_text) and f" {wanted_text} " in f" {said} "
    return contains, None if contains else (text.strip().splitlines() or [""])[0]


def word_pair(gold: str) -> tuple[str, str] | None:
    """The pair of which a gold answer is one, such as yes and no."""
    return next((pair for pair in WORD_PAIRS if gold.strip(" .").casefold() in pair), None)


def gold_number(gold: str) -> float | None:
    """The number that a gold answer is; where it ends with "#### 12", as GSM8K's do, that one."""
    return number(gold.rpartition("####")[2])


def number(text: str) -> float | None:
    """The number that a text is, with its dollar sign and commas; None for other texts."""
    bare = text.strip().strip(".").replace(",", "").replace("$", "").removesuffix("%").strip()
    return float(bare) if re.fullmatch(r"-?(?:\d+\.?\d*|\.\d+)", bare) else None


def number_in(text: str) -> float | None:
    """The number that an answer gives: after its last "the answer is" or "####", else a first line that is a number, else the
    last number.
    """
    text = re.sub(r"[*_`]+", "", text).strip()
    concluding = [found[1] for found in _NUMBER_CONCLUDES.finditer(text)][-1:]
    first = [line for line in text.splitlines()[:1] if number(line) is not None]
    found = concluding or first or [each[0] for each in _NUMBER.finditer(text)][-1:]
    return number(found[0]) if found else None


def _bare(text: str) -> str:
    """A text as words in lower case, without punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))
