"""Filters for broken text (loops, mojibake, runs of digits) and for text that the user does not want (blocked phrases)."""

import functools
import re
import unicodedata
import zlib

import ahocorasick_rs

from cleaning.settings import FilterSettings
from fastft.data.conversation import Conversation, Message

# --- repetition and garbage -------------------------------------------------------------------------------------------

# A loop at the end of an answer has at least 400 characters and repeats a piece of at most 250 characters 8 times.
LOOP_CHARS, LOOP_TIMES, LOOP_UNIT = 400, 8, 250
PROBE = 16  # characters of the end whose earlier occurrences are examined
# zlib makes prose 2 to 3 times smaller, code and tables 3 to 6 times, an answer in a loop 20 times and more.
MOST_COMPRESSIBLE = 16
# Letters and digits only: rows of - = _ * # . are rulers, tables, forms and banners.
_SAME_CHARACTER = re.compile(r"([^\W_])\1{49}")  # `{49,}` would take 80 bytes of stack for each character
# A first look, at every twelfth character of a text only, which takes a 40th of the time.
_PERHAPS_SAME = re.compile(r"(\S)\1\1\1")
_DIGITS = re.compile(r"\d{60,}")
_FENCED = re.compile(r"^[ \t>]*(`{3,}|~{3,})[\s\S]*?(?:^[ \t>]*\1|\Z)", re.MULTILINE)


def repetition(message: Message, settings: FilterSettings) -> str | None:
    """Complain about a model caught in a loop, without showing the text, because the repeated piece may be a secret key."""
    text = message.content
    if message.role != "assistant" or len(text) < 50:
        return None
    if _PERHAPS_SAME.search(text[::12]) and (found := _SAME_CHARACTER.search(_prose(text))):
        return f"one character {_run_length(found.string, found.start())} times"
    if len(text) < LOOP_CHARS:
        return None
    if looping := _loop_at_end(text.rstrip()):
        return "ends in a loop: {} characters, {} times".format(*looping)
    ratio = _compresses(text[-6_000:].encode("utf-8", "replace"))
    return f"compresses {ratio:.0f} times" if ratio > MOST_COMPRESSIBLE else None


def _compresses(data: bytes) -> float:
    """Return how many times smaller zlib makes `data`, or 0 if it is certainly not more than MOST_COMPRESSIBLE times.

    Most texts (98 %) are ruled out by compressing only their beginning, which hardly ever takes more bytes than the whole
    text: at most 3 more among 90,000 texts that were made to loop. 50 are allowed for.
    """
    if len(data) <= 2_000 or len(zlib.compress(data[:750], 1)) - 50 > len(data) / MOST_COMPRESSIBLE:
        return 0
    return len(data) / len(zlib.compress(data, 1))


def _run_length(text: str, start: int) -> int:
    return len(text) - start - len(text[start:].lstrip(text[start]))


def _loop_at_end(text: str) -> tuple[int, int] | None:
    """Return (length, times) of the piece that is repeated at the end of `text`, or None."""
    window = text[-(LOOP_UNIT * LOOP_TIMES + LOOP_CHARS) :]
    # The answer may end in the middle of a piece. A text of period p equals itself shifted by p, so its last characters also
    # occur p characters earlier. Only the distances at which they do need to be examined.
    probe = window[-PROBE:]
    at = len(window) - PROBE
    while (at := window.rfind(probe, 0, at + PROBE - 1)) >= 0:
        period = len(window) - PROBE - at
        needed = max(LOOP_CHARS, period * LOOP_TIMES)
        if period > LOOP_UNIT or needed > len(window):
            break
        tail = window[-needed:]
        if tail[period:] == tail[:-period]:
            unit = tail[-period:]
            return (period, needed // period) if any(c.isalnum() for c in unit) else None
    return None


def digit_run(message: Message, settings: FilterSettings) -> str | None:
    """Complain about an answer with many digits in a row outside of code."""
    found = _DIGITS.search(_prose(message.content)) if message.role == "assistant" else None
    return f"{len(found[0])} digits in a row" if found else None


# Replacement, control and private-use characters: what is left of a text that was decoded wrongly.
_BROKEN = re.compile("[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ue000-\uf8ff]")
_PLAIN = bytes((*b"\t\n", *range(32, 127)))
# UTF-8 read as Latin-1 or Windows-1252: Ã© for é, â€™ for ’, ä½\xa0 for 你.
_MOJIBAKE = re.compile(
    "Ã[\u0080-\u00bf‚ƒ„…†‡ˆ‰Š‹Œ–—˜™š›œž]|â€[\u0080-\u00bfœ™˜“”¦¢]|[ä-é][\u0080-\u00bf][\u0080-\u00bf]"
)


def garbage(message: Message, settings: FilterSettings) -> str | None:
    """Complain about an answer that was decoded wrongly. Questions are not examined, because people may paste anything."""
    text = message.content
    if message.role != "assistant":
        return None
    if text.isascii() and not text.encode().translate(None, _PLAIN):  # true of most answers, and quick to see
        return None
    broken = len(_BROKEN.findall(text)) + len(_MOJIBAKE.findall(text))
    return f"{broken} broken characters of {len(text)}" if broken >= 5 and broken > 0.02 * len(text) else None


def _prose(text: str) -> str:
    return _FENCED.sub(" ", text) if "```" in text or "~~~" in text else text


# --- blocked phrases --------------------------------------------------------------------------------------------------


def blocked_phrase(conversation: Conversation, settings: FilterSettings) -> str | None:
    """Complain about the first of the user's phrases that occurs in any turn, as whole words."""
    if not settings.blocked_phrases:
        return None
    automaton, phrases = _automaton(settings.blocked_phrases)
    for number, message in enumerate(conversation.messages, start=1):
        folded = _folded(message.content)
        for number_of_phrase, begin, end in automaton.find_matches_as_indexes(folded, overlapping=True):
            if _is_whole_words(folded, begin, end):
                return f"turn {number} holds {phrases[number_of_phrase]!r}"
    return None


@functools.lru_cache(maxsize=4)
def _automaton(phrases: tuple[str, ...]) -> tuple[ahocorasick_rs.AhoCorasick, list[str]]:
    """Return one search for all phrases, and the phrases by number. It reads 110 MB/s for 2,000 phrases; `in`, phrase by
    phrase, reads 12 MB/s for 200.
    """
    wanted = {_folded(phrase): phrase for phrase in phrases if phrase.strip()}
    return ahocorasick_rs.AhoCorasick(list(wanted)), list(wanted.values())


def _folded(text: str) -> str:
    """Return `text` without case and with single spaces, because a phrase may be broken across lines."""
    return " ".join(text.casefold().split())


def _is_whole_words(text: str, begin: int, end: int) -> bool:
    """Tell whether a match begins and ends at word boundaries. In scripts without spaces, every position is a boundary."""
    cuts_before = begin > 0 and _is_narrow_word(text[begin]) and _is_word(text[begin - 1])
    cuts_after = end < len(text) and _is_narrow_word(text[end - 1]) and _is_word(text[end])
    return not cuts_before and not cuts_after


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _is_narrow_word(character: str) -> bool:
    return character.isalnum() and unicodedata.east_asian_width(character) not in "WF"
