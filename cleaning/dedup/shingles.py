"""Text as hashes of its words, and of runs of them: what near duplicates and contamination both look at.

A word is a run of letters and digits, folded; in scripts that write no spaces (Chinese, Japanese, Thai …) each character
is a word of its own, so that "5 words" is five characters there. Everything else separates.

All of it is arithmetic on whole arrays (mod 2^64): each character has a random value v, H[i] = sum of v[j] * B^j for
j < i, and the hash of any run is (H[end] - H[start]) * B^-start. Runs of words are hashed the same way over the words'
hashes. That is 15 MB/s on one core for words and 50 MB/s for their runs, and a text has the same hashes in every process
(Python's own differ).
"""

import sys
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

_B = 0x9E3779B97F4A7C15  # odd, so that it has an inverse mod 2^64
_B_INVERSE = pow(_B, -1, 1 << 64)
_OTHER, _WORD, _WIDE = 0, 1, 2

# Scripts without spaces between words, as ranges of code points: Thai to Tibetan, Myanmar, Khmer, kana and Han with
# their extensions. Korean writes spaces.
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
# Where letters, digits and marks can be; asking for all 1.1 million code points takes every worker a second.
_ASSIGNED = ((0, 0x3FFFF), (0xE0000, 0xE0FFF))


class Runs:
    """N hashes in a row (uint64), and those of all runs of n of them."""

    __slots__ = ("_inverses", "_sums")

    def __init__(self, hashes: np.ndarray):
        powers, self._inverses = _powers(len(hashes).bit_length())
        self._sums = sums = np.empty(len(hashes) + 1, np.uint64)  # all in one place: a fifth faster
        sums[0] = 0
        np.multiply(hashes, powers[: len(hashes)], out=sums[1:])
        np.add.accumulate(sums, out=sums)

    def of(self, n: int) -> np.ndarray:
        """uint64[N - n + 1], or none."""
        count = max(len(self._sums) - n, 0)
        return (self._sums[n:] - self._sums[:count]) * self._inverses[:count]

    def between(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        return (self._sums[ends] - self._sums[starts]) * self._inverses[starts]


class Words:
    """The W words of a text: where they stand in the folded text, their hashes, which are single wide characters."""

    __slots__ = ("_kinds", "_values", "ends", "hashes", "starts", "text")

    def __init__(self, text: str, folded: bool = False):
        self.text = text = text if folded else fold(text)
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        self._kinds = kinds = _kinds().take(points)  # twice as fast as _kinds()[points]
        self.starts, self.ends = _borders(kinds)  # int64[W]
        self._values = _values_of_characters().take(points)
        # Mixed, or runs of words would be sums of sums: "ab c" is "ac b".
        self.hashes = _mixed(Runs(self._values).between(self.starts, self.ends))  # uint64[W]

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def wide(self) -> np.ndarray:
        return self._kinds[self.starts] == _WIDE  # bool[W]

    @property
    def characters(self) -> np.ndarray:
        """Where letters and digits stand."""
        return np.flatnonzero(self._kinds)

    def character_hashes(self) -> np.ndarray:
        """A hash for each letter and digit, whatever stands between them."""
        return self._values[self.characters]


def _borders(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where words begin and where they end: wherever the kind changes, and on both sides of a wide character."""
    padded = np.zeros(len(kinds) + 2, np.uint8)
    padded[1:-1] = kinds
    border = padded[1:] != padded[:-1]
    if padded.max() < _WIDE:  # what is no word begins where one ends: a third of the time
        borders = np.flatnonzero(border)
        return borders[::2], borders[1::2]
    border |= padded[1:] == _WIDE
    inside = kinds != _OTHER
    return np.flatnonzero(border[:-1] & inside), np.flatnonzero(border[1:] & inside) + 1


# Between texts that are hashed as one: a word of its own, which none of the items or texts around it holds.
SEPARATOR = "\ue000"
SLICE = 1 << 20  # characters hashed together: the arrays of a slice take 60 MB


def slices(text: str, overlap: int = 0) -> Iterator[tuple[int, str]]:
    """(where, text) of slices that `Words` can hold in little memory; neighbours share `overlap` characters."""
    for start in range(0, max(len(text) - overlap, 1), SLICE):
        yield start, text[start : start + SLICE + overlap]


def fold(text: str) -> str:
    """Case and compatibility forms (full-width letters, ligatures) do not count."""
    return text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


@lru_cache(maxsize=64)
def _powers(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """B^0 … B^(2^bits), and their inverses."""
    powers, inverses = np.full(1 << bits, _B, np.uint64), np.full(1 << bits, _B_INVERSE, np.uint64)
    powers[0] = inverses[0] = 1
    return np.cumprod(powers), np.cumprod(inverses)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of the value (the finaliser of splitmix64)."""
    values = values.astype(np.uint64)  # a copy, changed in place: a quarter faster
    values += np.uint64(_B)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@lru_cache(maxsize=1)
def _values_of_characters() -> np.ndarray:
    """The random value of each code point, uint64[0x110000]: looking one up costs an eighth of making it."""
    return _mixed(np.arange(sys.maxunicode + 1, dtype=np.uint32))


@lru_cache(maxsize=1)
def _kinds() -> np.ndarray:
    """What each code point is, uint8[0x110000]."""
    kinds = np.zeros(sys.maxunicode + 1, np.uint8)
    for first, last in _ASSIGNED:
        # Marks (Mn, Mc) belong to the word they stand in: Hindi vowels, decomposed accents.
        kinds[first : last + 1] = [unicodedata.category(chr(p))[0] in "LNM" for p in range(first, last + 1)]
    for first, last in _UNSPACED:
        kinds[first : last + 1] *= _WIDE
    kinds[ord(SEPARATOR)] = _WIDE
    return kinds
