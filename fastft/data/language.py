"""Detect the language of a conversation or a text with CLD2 (pycld2, Apache-2.0): 28 MB/s on one core, tables in the wheel.

CLD2 judges pieces from the whole conversation and not a single turn, because `yes` and `continue` are no evidence. Where
the pieces disagree, it judges all of the text. Code is taken out first, because to any detector it is English. A
text about which CLD2 is not sure is "unknown": mostly code, or a dialogue of a few words. The cleaner filters by language
(cleaning/filters/language.py), and a blend's parts are compared by it.
"""

import difflib
import functools
import re
from collections.abc import Iterator

from fastft.data.conversation import Conversation
from fastft.errors import UserError

try:
    import pycld2
except ImportError:  # no wheel for this platform: `lang` stays empty, and --languages says what to install
    pycld2 = None

UNKNOWN = "unknown"
# Characters of a conversation that are examined. With 50,000, none of 1,259 real dialogues gets another verdict; with 5,000,
# two do.
ENOUGH = 10_000
_OLD_CODES = {"iw": "he", "jw": "jv", "in": "id", "ji": "yi", "sh": "sr", "no": "nb", "mo": "ro", "un": UNKNOWN}
_OF_COUNTRIES = {"cn": "zh", "jp": "ja", "kr": "ko"}  # countries, often mistaken for languages
# A long text is first judged by 5 pieces of 200 characters, evenly spread. That is enough if 95 % of them is in one language.
PIECES, PIECE, ALL_BUT_SURE = 5, 200, 95
# Patterns of code, addresses and tags, each with a string that all its matches contain. Looking for that string first halves
# the time.
_NO_PROSE = (
    ("```", re.compile(r"^[ \t>]*(`{3,})[\s\S]*?(?:^[ \t>]*\1|\Z)", re.MULTILINE)),
    ("~~~", re.compile(r"^[ \t>]*(~{3,})[\s\S]*?(?:^[ \t>]*\1|\Z)", re.MULTILINE)),
    ("`", re.compile(r"`[^`\n]*`")),
    ("://", re.compile(r"https?://\S+")),
    ("<", re.compile(r"<[^<>\n]{1,200}>")),
)
# Characters that CLD2 refuses (it calls them not interchange-valid).
_INVALID = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\U0000e000-\U0000f8ff]"
)


def available() -> bool:
    """Tell whether languages can be detected on this platform."""
    return pycld2 is not None


@functools.cache
def known() -> dict[str, str]:
    """Return {code: English name} of the languages that CLD2 detects, without its jokes (Klingon, Pig Latin) and scripts."""
    if pycld2 is None:
        return {}
    codes = dict(pycld2.LANGUAGES)
    names = [name for name in pycld2.DETECTED_LANGUAGES if not name.startswith("X_") and "-" not in codes[name]]
    return {code_of(codes[name]): name.title().replace("_", " ") for name in names}


def code_of(lang: str) -> str:
    """Return the code by which languages are compared: zh for zh-Hant (a script), pt for pt-BR, he for iw."""
    code = lang.strip().lower().split("-")[0]
    return _OLD_CODES.get(code, code)


def check_codes(codes: tuple[str, ...]) -> None:
    """Raise UserError for the first code that is not a language's, naming near ones."""
    for code in codes:
        if "-" in code or code_of(code) not in known():
            near = ", ".join(f"{each} ({known()[each]})" for each in _near(code.lower()))
            raise UserError(f"--languages: {code!r} is not a language code; the nearest are {near}")


def _near(code: str) -> list[str]:
    """Return the codes of the languages that a mistaken code, a country's code or a name may mean."""
    base = _OF_COUNTRIES.get(code) or code_of(code.replace("_", "-"))
    by_name = {name.lower(): each for each, name in known().items()}
    if base in known() or code in by_name:
        return [by_name.get(code, base)]
    words = {each: each for each in known()} if len(code) < 4 else by_name
    return [words[word] for word in difflib.get_close_matches(code, words, n=3)] or ["en", "zh", "de"]


def detect_language(conversation: Conversation) -> str:
    """Return the language's code (ISO 639-1 where it has one), "unknown", or "" if pycld2 is not installed."""
    if pycld2 is None:
        return ""
    texts, size = [], 0
    for message in conversation.messages:
        if message.role in ("user", "assistant") and size < ENOUGH:
            texts.append(message.content[: ENOUGH - size])
            size += len(texts[-1])
    return language_of("\n".join(texts))


def language_of(text: str) -> str:
    """Return the language of a text as `detect_language` does: by pieces of it, and by all of it where these disagree.

    The verdict is the same as by the whole text for all of 1,258 real dialogues, and for all but 2 of 2,000 dialogues that
    were made by joining two in different languages. (If 1,500 characters from each end were used instead of pieces, 26 would
    differ.)
    """
    if len(text) > PIECES * PIECE:
        language, percent = _ask(" ".join(map(_prose, _pieces(text))))
        if language != UNKNOWN and percent >= ALL_BUT_SURE:
            return language
    return _ask(_prose(text))[0]


def _pieces(text: str) -> Iterator[str]:
    step = (len(text) - PIECE) // (PIECES - 1)
    in_code = False
    for start in range(0, step * PIECES, step):
        # A piece that begins inside a code block must not count as prose: otherwise 30 of 2,346 dialogues in other
        # languages around code become English.
        in_code ^= text.count("```", max(start - step, 0), start) % 2
        yield ("```\n" if in_code else "") + text[start : start + PIECE]


def _prose(text: str) -> str:
    for contained, pattern in _NO_PROSE:
        if contained in text:
            text = pattern.sub(" ", text)
    return text


def _ask(text: str) -> tuple[str, int]:
    """Return what CLD2 says: the language of most of the text, and the percentage of the text that is in it."""
    text = _INVALID.sub(" ", text)
    try:
        reliable, _, ((_, code, percent, _), *_) = pycld2.detect(text.encode("utf-8", "ignore"))
    except pycld2.error:  # private-use characters and noncharacters beyond U+FFFF, which it refuses, too
        return UNKNOWN, 0
    return (code_of(code) if reliable and percent >= 50 else UNKNOWN), percent
