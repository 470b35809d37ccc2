"""Find the options of a multiple-choice question, and which of them an answer names.

FLAN and T0 write options in many ways: "(A) 66", "- yes", "[A]. negative;", "(1). no;", "A. stream  B. end of line". An answer
that explains itself mentions several of them, so the answer is looked for where answers stand: after "the answer is", in the
first line, in the last one; and where that leaves two, there is none.
"""

import functools
import re
from collections.abc import Iterator, Sequence

from fastft.judge.exams.items import lone_letter

_HEADER = re.compile(
    r"(?:\b(?:options?|choices|answers?|alternatives)\b|\b(?:pick|select|choose)\b[^\n]{0,40})[^\n:]{0,30}:[ \t]*"
    r"(?:\n|(?=[(\[]?[A-Ha-h1-8][)\].:]))",  # the options follow on the next lines, or at once with a label
    re.IGNORECASE,
)
_LABEL = re.compile(r"[(\[]?(?:[A-Za-z]|\d{1,2}|[ivx]{1,4})(?:[)\]][.:;]?|[.:])[ \t]+(?=\S)")
_BULLET = re.compile(r"[-*•][ \t]+")
# "the answer is", "Answer:", "the correct option would be", "therefore, the sentiment is", "I conclude that it is"
_CONCLUDES = re.compile(
    r"\b(?:answers?|choice|option|solution|conclusion|result)\b[^.\n:]{0,60}?(?:\bis\b|\bare\b|\bwould be\b|[:=])\s*"
    r"|\b(?:therefore|thus|hence|so|in conclusion)\b,?[^.\n]{0,80}?\b(?:is|are|would be)\b\s*",
    re.IGNORECASE,
)
MOST = 26  # options
WORDS = "AI"  # letters that are words of their own: "A fish swims" does not choose (A)


def options_in(query: str) -> list[str]:
    """The options that a query lists, as they stand there with their labels; empty if it lists none."""
    if ":" not in query:  # most queries end here, in a hundredth of the time
        return []
    for header in reversed(list(_HEADER.finditer(query))):
        found = []
        for line in query[header.end() :].splitlines():
            line = _BULLET.sub("", line.strip(), count=1)
            if not line:
                if found:
                    break
                continue
            pieces = _split_labels(line)
            if not pieces and found and not _BULLET.match(query[header.end() :].strip()):
                break  # what follows labelled options is the question's end ("Answer:")
            found += pieces or [line]
        if 2 <= len(found) <= MOST:
            return [each.rstrip("; ") for each in found]
    return []


def _split_labels(line: str) -> list[str]:
    """The labelled options in a line; empty if it does not begin with a label."""
    starts = [
        found.start()
        for found in _LABEL.finditer(line)
        if line[found.start() - 1 : found.start()] in ("", " ", ";", "\t")
    ]
    if not starts or starts[0]:
        return []
    return [line[a:b].strip() for a, b in zip(starts, [*starts[1:], len(line)])]


def label_and_text(option: str) -> tuple[str, str]:
    """Split "(A) 66" into "A" and "66"; an option without a label has the label ""."""
    found = _LABEL.match(option)
    if not found:
        bare = re.fullmatch(r"[(\[]([A-Za-z]|\d{1,2})[)\]]", option.strip())
        return (bare[1], "") if bare else ("", option.strip())
    return found[0].strip(" ()[].:;\t"), option[found.end() :].strip().rstrip(".;")


def index_of(gold: str, options: Sequence[str]) -> int | None:
    """Which option a gold answer means: by its label, its text, or its beginning ("Sentence A" of 'Sentence A: "I run"')."""
    wanted = gold.strip()
    bare = wanted.strip("()[]. ")
    pairs = [label_and_text(option) for option in options]
    for test in (
        lambda label, text, option: option == wanted,
        lambda label, text, option: text.casefold() == wanted.rstrip(".").casefold() != "",
        lambda label, text, option: label != "" and label.casefold() == bare.casefold(),
        lambda label, text, option: (
            bool(wanted) and re.match(rf"{re.escape(wanted)}\b", text, re.IGNORECASE) is not None
        ),
    ):
        found = [index for index, (pair, option) in enumerate(zip(pairs, options)) if test(*pair, option)]
        if len(found) == 1:
            return found[0]
    return None


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """Which of `options` an answer names as its own; None if it names none, or several in the same place."""
    text = re.sub(r"[*_`]+", "", answer).strip()
    if not text or not options:
        return None
    lines = [line for line in text.splitlines() if line.strip()]
    concluding = [text[found.end() : found.end() + 200].split("\n")[0] for found in _CONCLUDES.finditer(text)]
    if not concluding and len(set(_listed(lines, tuple(options)))) > 1:
        return None  # the question's options over and over, as small models write them
    for place in (*reversed(concluding), lines[0], lines[-1], text):
        named = list(_mentions(place, tuple(options)))
        if place in concluding and named:
            return named[0]  # "the answer is (B), not (A)"
        if len(set(named)) == 1:
            return named[0]
    letters = "".join(label for label, _ in map(label_and_text, options) if re.fullmatch("[A-Z]", label))
    letter = lone_letter(lines[0], letters) if len(letters) == len(options) and not named else None
    return letters.index(letter) if letter and letter not in WORDS else None


def _listed(lines: list[str], options: tuple[str, ...]) -> Iterator[int]:
    """Yield the options that stand alone in a line."""
    pattern, meaning = _patterns(options)
    for line in lines:
        if found := pattern.fullmatch(_BULLET.sub("", line.strip(), count=1).rstrip(" .;")):
            yield meaning[found.lastgroup]


def _mentions(text: str, options: tuple[str, ...]) -> Iterator[int]:
    """Yield the options that are named in a text, in its order: by their text, or by a label that cannot be a word."""
    pattern, meaning = _patterns(options)
    for found in pattern.finditer(text):
        yield meaning[found.lastgroup]


@functools.lru_cache(maxsize=4096)
def _patterns(options: tuple[str, ...]) -> tuple[re.Pattern, dict[str, int]]:
    """A pattern that finds any option, the longest first ("very positive" before "positive"), and what its groups mean."""
    spellings: list[tuple[str, int]] = []
    for index, option in enumerate(options):
        label, text = label_and_text(option)
        if text:
            spellings.append((rf"(?<!\w){re.escape(text)}(?!\w)", index))
            if head := re.match(r"([\w ]{2,20}):\s", text):  # Sentence A: "I run in the air"
                spellings.append((rf"(?<!\w){re.escape(head[1])}(?!\w)", index))
        if label:
            # Bare letters are words ("A dog"), so they count in brackets, before a bracket, dot or colon, or alone.
            bare = re.escape(label)
            spellings.append((rf"[(\[]{bare}[)\]]|(?<!\w){bare}(?:[)\].:](?!\w)|(?=\s*$))", index))
    spellings.sort(key=lambda each: -len(each[0]))
    groups = [f"(?P<g{number}>{spelling})" for number, (spelling, _) in enumerate(spellings)]
    meaning = {f"g{number}": index for number, (_, index) in enumerate(spellings)}
    return re.compile("|".join(groups), re.IGNORECASE), meaning
