"""Text that is broken, and text that the user does not want: loops, mojibake, runs of digits, blocked phrases."""

import functools
import re
import unicodedata
import zlib

import ahocorasick_rs

from cleaning.settings import Settings
from fastft.data.conversation import Conversation, Message

# --- repetition and garbage -------------------------------------------------------------------------------------------

LOOP_CHARS = 400  # a loop at the end of an answer is at least that long …
LOOP_TIMES = 8  # … and says its piece that often
LOOP_UNIT = 250  # the longest piece looked for
PROBE = 16  # characters of the end whose earlier places are looked at
# zlib makes prose 2 to 3 times smaller, code and tables 3 to 6, an answer that runs in circles 20 and more.
MOST_COMPRESSIBLE = 16
# Letters and digits: rows of - = _ * # . are rulers, tables, forms and banners.
_SAME_CHARACTER = re.compile(r"([^\W_])\1{49}")  # not `{49,}`: the pattern's stack takes 80 bytes a character
_PERHAPS_SAME = re.compile(r"(\S)\1\1\1")  # in every twelfth character: a 40th of the time
_DIGITS = re.compile(r"\d{60,}")
_FENCED = re.compile(r"^[ \t>]*(`{3,}|~{3,})[\s\S]*?(?:^[ \t>]*\1|\Z)", re.MULTILINE)


def repetition(message: Message, settings: Settings) -> str | None:
    """A model caught in a loop. The text itself is not shown: what repeats may be anything, a key too."""
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
    """How many times; 0 where there is too little of it, or too much in its beginning alone (so it is for 98 in 100)."""
    # A beginning may take more bytes than the whole, but hardly: 3 was the most in 90,000 of texts made to loop.
    if len(data) <= 2_000 or len(zlib.compress(data[:750], 1)) - 50 > len(data) / MOST_COMPRESSIBLE:
        return 0
    return len(data) / len(zlib.compress(data, 1))


def _run_length(text: str, start: int) -> int:
    return len(text) - start - len(text[start:].lstrip(text[start]))


def _loop_at_end(text: str) -> tuple[int, int] | None:
    """(length, times) of the piece that `text` ends with again and again."""
    window = text[-(LOOP_UNIT * LOOP_TIMES + LOOP_CHARS) :]
    # An answer is cut somewhere inside the last piece; a text of period p is equal to itself moved by p. So its last
    # characters stand p before its end, too, and few other distances need a look.
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


def digit_run(message: Message, settings: Settings) -> str | None:
    found = _DIGITS.search(_prose(message.content)) if message.role == "assistant" else None
    return f"{len(found[0])} digits in a row" if found else None


# Replacement characters, control characters, private use: what is left of text that was decoded wrongly.
_BROKEN = re.compile("[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ue000-\uf8ff]")
_PLAIN = bytes((*b"\t\n", *range(32, 127)))
# UTF-8 read as Latin-1 or Windows-1252: Ã© for é, â€™ for ’, ä½\xa0 for 你.
_MOJIBAKE = re.compile(
    "Ã[\u0080-\u00bf‚ƒ„…†‡ˆ‰Š‹Œ–—˜™š›œž]|â€[\u0080-\u00bfœ™˜“”¦¢]|[ä-é][\u0080-\u00bf][\u0080-\u00bf]"
)


def garbage(message: Message, settings: Settings) -> str | None:
    text = message.content
    if message.role != "assistant":  # people paste what they like
        return None
    if text.isascii() and not text.encode().translate(None, _PLAIN):  # of most answers nothing is left
        return None
    broken = len(_BROKEN.findall(text)) + len(_MOJIBAKE.findall(text))
    return f"{broken} broken characters of {len(text)}" if broken >= 5 and broken > 0.02 * len(text) else None


def _prose(text: str) -> str:
    return _FENCED.sub(" ", text) if "```" in text or "~~~" in text else text


# --- blocked phrases --------------------------------------------------------------------------------------------------


def blocked_phrase(conversation: Conversation, settings: Settings) -> str | None:
    if not settings.blocked_phrases:
        return None
    automaton, phrases = _automaton(settings.blocked_phrases)
    for number, message in enumerate(conversation.messages, start=1):
        folded = _folded(message.content)
        for which, start, stop in automaton.find_matches_as_indexes(folded, overlapping=True):
            if _at_word_borders(folded, start, stop):
                return f"turn {number} holds {phrases[which]!r}"
    return None


@functools.lru_cache(maxsize=4)
def _automaton(phrases: tuple[str, ...]) -> tuple[ahocorasick_rs.AhoCorasick, list[str]]:
    """One pass for all phrases: 110 MB/s for 2,000 of them, where `in` for each makes 12 MB/s with 200."""
    wanted = {_folded(phrase): phrase for phrase in phrases if phrase.strip()}
    return ahocorasick_rs.AhoCorasick(list(wanted)), list(wanted.values())


def _folded(text: str) -> str:
    """A phrase may be broken across lines."""
    return " ".join(text.casefold().split())


def _at_word_borders(text: str, start: int, stop: int) -> bool:
    """Scripts that write no spaces (wide characters) have none; elsewhere a phrase does not begin or end in a word."""
    before = start == 0 or not (_is_narrow_word(text[start]) and _is_word(text[start - 1]))
    return before and (stop == len(text) or not (_is_narrow_word(text[stop - 1]) and _is_word(text[stop])))


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _is_narrow_word(character: str) -> bool:
    return character.isalnum() and unicodedata.east_asian_width(character) not in "WF"
