"""Turn text into hashes of its words and of its shingles, for near duplicates and for contamination.

A word is a run of letters and digits, folded (see `fold`). In scripts that are written without spaces (Chinese, Japanese,
Thai …) each character is a word, so that "5 words" means five characters there. All other characters only separate words.
A shingle, also called an n-gram, is n words in a row, or n characters in a row.

All hashes are computed by arithmetic on whole arrays, modulo 2^64. Each character has a random value v. With the sums H[i]
of v[j] * B^j over all j < i, the hash of the characters from `start` to `end` is (H[end] - H[start]) * B^-start, which does
not depend on where they stand. Shingles are hashed in the same way from the hashes of their words. One core hashes 15 MB/s
of text into words and 50 MB/s into shingles. A text has the same hashes in every process, unlike with Python's own `hash`.
"""

import sys
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

_B = 0x9E3779B97F4A7C15  # odd, so that it has an inverse mod 2^64
_B_INVERSE = pow(_B, -1, 1 << 64)
_OTHER, _WORD, _WIDE = 0, 1, 2

# Ranges of code points of scripts without spaces between words: Thai to Tibetan, Myanmar, Khmer, kana and Han with their
# extensions. Korean is written with spaces.
_UNSPACED = (
    (0x0E00, 0x0FFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3005, 0x3007),
    (0x3040, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
    (0x20000, 0x3FFFF),
)
# Ranges that hold all letters, digits and marks. Classifying all 1.1 million code points would take every worker a second.
_ASSIGNED = ((0, 0x3FFFF), (0xE0000, 0xE0FFF))


class Shingles:
    """A sequence of N hashes (uint64[N]) from which the hash of any part of it is computed in constant time."""

    __slots__ = ("_inverses", "_sums")

    def __init__(self, hashes: np.ndarray):
        powers, self._inverses = _powers(len(hashes).bit_length())
        self._sums = sums = np.empty(len(hashes) + 1, np.uint64)  # every step works in this one array: a fifth faster
        sums[0] = 0
        np.multiply(hashes, powers[: len(hashes)], out=sums[1:])
        np.add.accumulate(sums, out=sums)

    def of(self, n: int) -> np.ndarray:
        """Return the hashes of all parts of length n, uint64[N - n + 1]; empty if there are fewer than n."""
        count = max(len(self._sums) - n, 0)
        return (self._sums[n:] - self._sums[:count]) * self._inverses[:count]

    def between(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return the hash of each part that begins at one of `starts` and ends before the same one of `ends`."""
        return (self._sums[ends] - self._sums[starts]) * self._inverses[starts]


class Words:
    """The W words of a text: where each begins and ends in the folded text, its hash, and whether it is a wide character.

    A wide character is one of a script without spaces, which is a word on its own.
    """

    __slots__ = ("_kinds", "_values", "ends", "hashes", "starts", "text")

    def __init__(self, text: str, folded: bool = False):
        self.text = text = text if folded else fold(text)
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        self._kinds = kinds = _kinds().take(points)  # twice as fast as _kinds()[points]
        self.starts, self.ends = _word_edges(kinds)  # int64[W]
        self._values = _values_of_characters().take(points)
        # The mixing makes order count: without it a shingle would be a sum of sums, and "ab c" would be equal to "ac b".
        self.hashes = _mixed(Shingles(self._values).between(self.starts, self.ends))  # uint64[W]

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def wide(self) -> np.ndarray:
        """Which words are wide characters, bool[W]."""
        return self._kinds[self.starts] == _WIDE

    @property
    def characters(self) -> np.ndarray:
        """Positions of letters and digits in the folded text."""
        return np.flatnonzero(self._kinds)

    def character_hashes(self) -> np.ndarray:
        """Return a hash for each letter and digit, leaving out all other characters."""
        return self._values[self.characters]


def _word_edges(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where words begin and where they end: where the kind changes, and on both sides of a wide character."""
    padded = np.zeros(len(kinds) + 2, np.uint8)
    padded[1:-1] = kinds
    edge = padded[1:] != padded[:-1]
    if padded.max() < _WIDE:  # words and gaps alternate; this takes a third of the time
        edges = np.flatnonzero(edge)
        return edges[::2], edges[1::2]
    edge |= padded[1:] == _WIDE
    inside = kinds != _OTHER
    return np.flatnonzero(edge[:-1] & inside), np.flatnonzero(edge[1:] & inside) + 1


# Separates texts that are hashed as one. It counts as a word, and must not occur in the texts.
SEPARATOR = "\ue000"
SLICE = 1 << 20  # characters hashed together; the arrays for a slice take 60 MB


def slices(text: str, overlap: int = 0) -> Iterator[tuple[int, str]]:
    """Yield (position, text) of slices for which `Words` takes little memory; neighbours share `overlap` characters."""
    for start in range(0, max(len(text) - overlap, 1), SLICE):
        yield start, text[start : start + SLICE + overlap]


def fold(text: str) -> str:
    """Return `text` without differences of case and of compatibility forms (full-width letters, ligatures)."""
    return text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


@lru_cache(maxsize=64)
def _powers(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first 2^`bits` powers of B, and their inverses."""
    powers, inverses = np.full(1 << bits, _B, np.uint64), np.full(1 << bits, _B_INVERSE, np.uint64)
    powers[0] = inverses[0] = 1
    return np.cumprod(powers), np.cumprod(inverses)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Mix each value so that every bit of it affects every bit of the result (the finaliser of splitmix64)."""
    values = values.astype(np.uint64)  # a copy that is then changed in place, which is a quarter faster
    values += np.uint64(_B)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@lru_cache(maxsize=1)
def _values_of_characters() -> np.ndarray:
    """Return the random value of each code point, uint64[0x110000]. Looking one up takes an eighth of computing it."""
    return _mixed(np.arange(sys.maxunicode + 1, dtype=np.uint32))


@lru_cache(maxsize=1)
def _kinds() -> np.ndarray:
    """Return the kind of each code point, uint8[0x110000]: _OTHER, _WORD or _WIDE."""
    kinds = np.zeros(sys.maxunicode + 1, np.uint8)
    for first, last in _ASSIGNED:
        # Marks (Mn, Mc) such as Hindi vowels and decomposed accents belong to the word that they are in.
        kinds[first : last + 1] = [unicodedata.category(chr(p))[0] in "LNM" for p in range(first, last + 1)]
    for first, last in _UNSPACED:
        kinds[first : last + 1] *= _WIDE
    kinds[ord(SEPARATOR)] = _WIDE
    return kinds
