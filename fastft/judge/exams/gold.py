"""Compare an answer with a gold answer: by the option that it names, by its number, or by its text.

    is_right("The answer is (B).", "B", "Which one?\\nOptions:\\n(A) 3\\n(B) 4")       # True
    is_right("… so she has 1,234 apples.", "#### 1234", "How many …?")                 # True

What cannot be read is wrong: an answer that names two options, or ends without a number.
"""

import re
from typing import Literal

from fastft.judge.exams.items import lone_letter

Check = Literal["auto", "choice", "number", "text", "none"]
_NUMBER = re.compile(r"-?\d+(?:,\d{3})+(?:\.\d+)?|-?\d*\.?\d+")
_LISTED = re.compile(r"^\s*(?:[-*•]\s*)?(?:\(?([A-Z])[).]\s+)?(.+?)\s*$")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def is_right(answer: str, gold: str, query: str, check: Check = "auto") -> bool:
    """Whether an answer to a query is the gold answer. `check` "auto" goes by the query and by what the gold answer is."""
    check = kind_of(gold, query) if check == "auto" else check
    if check == "choice":
        return chosen(answer, query, gold) == _bare(gold).casefold()
    if check == "number":
        wanted, found = number_of(gold), number_of(answer)
        return wanted is not None and found is not None and abs(wanted - found) <= 1e-6 * max(1.0, abs(wanted))
    return plain(answer) == plain(gold)


def kind_of(gold: str, query: str) -> Literal["choice", "number", "text"]:
    """How an answer is compared: a choice if the query lists options, a number if the gold answer is one, else the text."""
    if options_of(query) or _two_words(gold) or re.fullmatch(r"\(?[A-Z]\)?", gold.strip()):
        return "choice"
    return "number" if re.fullmatch(rf"(?:.*####)?\s*\$?({_NUMBER.pattern})\s*", gold, re.DOTALL) else "text"


def options_of(query: str) -> dict[str, str]:
    """The options that a query lists after a line that ends with "Options:", as {letter: text}; without letters, A, B, …"""
    _, mark, listed = re.sub(r"(?i)\boptions:", "Options:", query).rpartition("Options:")
    found: dict[str, str] = {}
    for line in listed.splitlines() if mark else ():
        if line.strip() and (parts := _LISTED.match(line)):
            found[parts[1] or chr(ord("A") + len(found))] = parts[2]
    return found


def chosen(answer: str, query: str, gold: str) -> str | None:
    """The option that an answer names, in lower case: its letter if the gold answer is a letter, else its text.

    None if it names none, or more than one.
    """
    options, by_letter = options_of(query) or _two_words(gold), re.fullmatch("[A-Z]", _bare(gold)) is not None
    if by_letter and (letter := lone_letter(answer, "".join(options) or "ABCDE")):
        return letter.casefold()
    meaning = {text.casefold(): (letter if by_letter else text).casefold() for letter, text in options.items()}
    if not by_letter:
        meaning.setdefault(_bare(gold).casefold(), _bare(gold).casefold())  # "Sentence A" of 'Sentence A: "I run"'
    longest_first = sorted(filter(None, meaning), key=len, reverse=True)
    pattern = "|".join(rf"(?<!\w){re.escape(text)}(?!\w)" for text in longest_first)
    named = {meaning[each[0]] for each in re.finditer(pattern, answer.casefold())} if pattern else set()
    return named.pop() if len(named) == 1 else None


def number_of(text: str) -> float | None:
    """The number after the last "####", else the last number in a text; None if there is none."""
    found = _NUMBER.findall(text.rpartition("####")[2])
    return float(found[-1].replace(",", "")) if found else None


def plain(text: str) -> str:
    """A text in lower case, without punctuation, articles and superfluous spaces."""
    return " ".join(_ARTICLES.sub(" ", re.sub(r"[^\w\s]", " ", text.casefold())).split())


def _two_words(gold: str) -> dict[str, str]:
    """The options of a question that is answered with yes or no, or with true or false, whether or not it says so."""
    pair = next((pair for pair in (("yes", "no"), ("true", "false")) if gold.strip(". ").casefold() in pair), ())
    return dict(zip("AB", pair))


def _bare(gold: str) -> str:
    return gold.strip().strip("()").rstrip(".") if len(gold.strip()) <= 4 else gold.strip()
