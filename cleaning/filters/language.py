"""Detects the language of a conversation with CLD2: 28 MB/s on one core, tables inside the wheel (pycld2, Apache-2.0).

Pieces from the whole conversation are judged, or all of it where they disagree, since `yes` and `continue` are no evidence.
Code is taken out first: to any detector it is English. What CLD2 is not sure about is "unknown", which `--languages` keeps,
because it is mostly code and dialogues of a few words; `--with unknown_language` rejects it.
"""

import difflib
import functools
import re
from collections.abc import Iterator

from cleaning.settings import Settings
from fastft.data.conversation import Conversation
from fastft.errors import UserError

try:
    import pycld2
except ImportError:  # no wheel for this platform: `lang` stays empty, and --languages says what to install
    pycld2 = None

UNKNOWN = "unknown"
ENOUGH = 10_000  # characters. Of 1,259 real dialogues, 50,000 characters change no verdict, and 5,000 change two
_OLD_CODES = {"iw": "he", "jw": "jv", "in": "id", "ji": "yi", "sh": "sr", "no": "nb", "mo": "ro", "un": UNKNOWN}
_OF_COUNTRIES = {"cn": "zh", "jp": "ja", "kr": "ko"}  # countries, often mistaken for languages
# A long text is first judged by 5 pieces of 200 characters, evenly spread: enough if 95 % of them is in one language.
PIECES, PIECE, ALL_BUT_SURE = 5, 200, 95
# Code, addresses and tags, each after a string that it contains: searching for that first halves the time.
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
    return pycld2 is not None


@functools.cache
def known() -> dict[str, str]:
    """{code: English name} of the languages that CLD2 can detect, without its jokes (Klingon, Pig Latin) and scripts."""
    if pycld2 is None:
        return {}
    codes = dict(pycld2.LANGUAGES)
    names = [name for name in pycld2.DETECTED_LANGUAGES if not name.startswith("X_") and "-" not in codes[name]]
    return {code_of(codes[name]): name.title().replace("_", " ") for name in names}


def code_of(lang: str) -> str:
    """The code under which languages are compared: zh for zh-Hant (a script), pt for pt-BR, he for iw."""
    code = lang.strip().lower().split("-")[0]
    return _OLD_CODES.get(code, code)


def check_codes(codes: tuple[str, ...]) -> None:
    """Raise UserError for the first code that is not a language's, naming near ones."""
    for code in codes:
        if "-" in code or code_of(code) not in known():
            near = ", ".join(f"{each} ({known()[each]})" for each in _near(code.lower()))
            raise UserError(f"--languages: {code!r} is not a language code; the nearest are {near}")


def _near(code: str) -> list[str]:
    """Codes of the languages that may be meant by a mistaken code, a region or a name."""
    base = _OF_COUNTRIES.get(code) or code_of(code.replace("_", "-"))
    by_name = {name.lower(): each for each, name in known().items()}
    if base in known() or code in by_name:
        return [by_name.get(code, base)]
    words = {each: each for each in known()} if len(code) < 4 else by_name
    return [words[word] for word in difflib.get_close_matches(code, words, n=3)] or ["en", "zh", "de"]


def detect_language(conversation: Conversation) -> str:
    """The language's ISO 639-1 code if it has one, "unknown", or "" if pycld2 is not installed."""
    if pycld2 is None:
        return ""
    texts, size = [], 0
    for message in conversation.messages:
        if message.role in ("user", "assistant") and size < ENOUGH:
            texts.append(message.content[: ENOUGH - size])
            size += len(texts[-1])
    return language_of("\n".join(texts))


def language_of(text: str) -> str:
    """The language of a text, as `detect_language` gives it: judged by pieces, and by all of it if these disagree.

    Of 1,258 real dialogues none is judged differently than by the whole text. Of 2,000 that were made of the rounds of two
    dialogues in different languages, 2 are (with 1,500 characters of either end instead of pieces: 26).
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
    for mark, pattern in _NO_PROSE:
        if mark in text:
            text = pattern.sub(" ", text)
    return text


def _ask(text: str) -> tuple[str, int]:
    """Ask CLD2 for the language of most of the text, and the percentage of the text that is in it."""
    text = _INVALID.sub(" ", text)
    try:
        reliable, _, ((_, code, percent, _), *_) = pycld2.detect(text.encode("utf-8", "ignore"))
    except pycld2.error:  # planes of the private use area and noncharacters beyond the basic plane
        return UNKNOWN, 0
    return (code_of(code) if reliable and percent >= 50 else UNKNOWN), percent


def other_language(conversation: Conversation, settings: Settings) -> str | None:
    if not settings.languages or code_of(conversation.lang) in ("", UNKNOWN, *map(code_of, settings.languages)):
        return None
    return f"is in {conversation.lang!r}"


def unknown_language(conversation: Conversation, settings: Settings) -> str | None:
    return "too little text, or too mixed" if conversation.lang == UNKNOWN else None
