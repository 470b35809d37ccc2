"""Turns queries into numbers by hashing their words and characters: no vocabulary, no model, any language.

    features = HashedFeatures().fit(queries)
    matrix = features.transform(queries)          # [N, width], CSR
    features.dense(matrix)                        # [N, 512], for similarities

fastft.compose.router.vectors.embeddings has two others, which need a model's directory.
"""

import re
import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from fastft.errors import UserError

WORD = re.compile(r"\w\w+")
BLOCK = 1 << 16  # columns for words, and as many for characters
RUNS = (2, 3, 4)  # characters
SKETCH = 512  # columns of `dense`
LONGEST = 4000  # characters of a query that are read: its first and last 2,000


class Features(Protocol):
    """What a router sees of queries."""

    kind: str

    def transform(self, queries: Sequence[str]) -> Any:
        """Return [N, D], float32, dense or CSR."""
        ...

    def dense(self, matrix: Any) -> np.ndarray:
        """Return what `transform` gave as [N, d], float32, in which similar queries have a small angle."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return what a router's directory keeps: settings for its JSON, and tensors."""
        ...


def require_packages() -> None:
    """Raise UserError if the packages are missing that a router computes with."""
    try:
        import scipy.sparse  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f'fastft router needs {error.name}, which is not installed: pip install "fastft[compose]"'
        ) from None


class HashedFeatures:
    """Words and pairs of words, and 2 to 4 characters within a word, weighed by idf; each of the two blocks has length 1.

    An n-gram's column is its hash, so two may share one; with 65,536 columns a block this costs nothing measurable.
    """

    kind = "hashed"
    width = 2 * BLOCK

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"kind": self.kind}, {"idf": self.idf}

    def __init__(self, idf: np.ndarray | None = None):
        self.idf = np.ones(self.width, dtype=np.float32) if idf is None else idf

    def fit(self, queries: Sequence[str]) -> "HashedFeatures":
        """Learn the inverse document frequency of every column: log((1 + N) / (1 + n)) + 1."""
        seen = np.zeros(self.width)
        for query in queries:
            seen[columns_of(query)[0]] += 1
        self.idf = (np.log((1 + len(queries)) / (1 + seen)) + 1).astype(np.float32)
        return self

    def row(self, query: str) -> tuple[np.ndarray, np.ndarray]:
        """The columns of a query that are not 0, and their values (float32)."""
        columns, counts = columns_of(query)
        values = counts * self.idf[columns]
        for block in (columns < BLOCK, columns >= BLOCK):
            values[block] /= max(float(np.sqrt(np.sum(values[block] ** 2))), 1e-12)
        return columns, values

    def transform(self, queries: Sequence[str]) -> Any:
        """Return a CSR matrix [N, width] of float32."""
        from scipy.sparse import csr_matrix

        rows = [self.row(query) for query in queries]
        ends = np.cumsum([0, *(len(columns) for columns, _ in rows)])
        columns = np.concatenate([columns for columns, _ in rows] or [np.zeros(0, int)])
        values = np.concatenate([values for _, values in rows] or [np.zeros(0, np.float32)])
        return csr_matrix((values, columns, ends), shape=(len(rows), self.width), dtype=np.float32)

    def dense(self, matrix: Any) -> np.ndarray:
        """A sketch: every column is added to or taken from one of 512 sums, which keeps angles to about 1 / sqrt(512)."""
        return (matrix @ self._sketch).toarray()

    @cached_property
    def _sketch(self) -> Any:
        from scipy.sparse import csr_matrix

        hashes = np.arange(self.width, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
        places, signs = hashes % SKETCH, np.where(hashes // SKETCH % 2, 1, -1).astype(np.float32)
        return csr_matrix((signs, places.astype(np.int32), np.arange(self.width + 1)), shape=(self.width, SKETCH))


def columns_of(query: str) -> tuple[np.ndarray, np.ndarray]:
    """The columns of a query's n-grams, sorted, and how often each occurs (float32)."""
    text = _read(query)
    grams = _word_grams(text)
    found = [_word_columns(grams), *(columns for columns, _ in _character_columns(_codes(text)))]
    columns, counts = np.unique(np.concatenate(found), return_counts=True)
    return columns, counts.astype(np.float32)


def grams_of(query: str) -> list[tuple[str, int]]:
    """The n-grams of a query, each with its column, for explanations."""
    text = _read(query)
    grams = _word_grams(text)
    named = list(zip(grams, _word_columns(grams).tolist()))
    codes = _codes(text)
    for n, (columns, starts) in zip(RUNS, _character_columns(codes)):
        named += [(_text_of(codes[start : start + n]), int(column)) for column, start in zip(columns, starts)]
    return named


def _read(query: str) -> str:
    """The part of a query that counts, in lower case."""
    if len(query) > LONGEST:
        query = f"{query[: LONGEST // 2]} {query[-LONGEST // 2 :]}"
    return query.lower()


def _word_grams(text: str) -> list[str]:
    words = WORD.findall(text)
    return [*words, *(f"{a} {b}" for a, b in zip(words, words[1:]))]


def _word_columns(grams: list[str]) -> np.ndarray:
    hashes = (zlib.crc32(gram.encode("utf-8", "surrogatepass")) % BLOCK for gram in grams)
    return np.fromiter(hashes, dtype=np.int64, count=len(grams))


def _codes(text: str) -> np.ndarray:
    """The code points of a text with one space before, between and after its words."""
    padded = f" {' '.join(text.split())} "
    return np.frombuffer(padded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)


def _text_of(codes: np.ndarray) -> str:
    return codes.astype(np.uint32).tobytes().decode("utf-32-le", "surrogatepass")


def _character_columns(codes: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """For runs of 2, 3 and 4 characters: (column, start) of those that hold a space only as their first or last."""
    space, found = codes == 32, []
    for n in RUNS:
        count = max(len(codes) - n + 1, 0)
        hashes, whole = np.full(count, n, dtype=np.uint64), np.ones(count, dtype=bool)
        for i in range(n):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[i : i + count]
            if 0 < i < n - 1:
                whole &= ~space[i : i + count]
        if n == 2:  # an empty text is two spaces
            whole &= ~(space[:count] & space[1 : 1 + count])
        hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        starts = np.flatnonzero(whole)
        found.append((BLOCK + (hashes[starts] >> np.uint64(40)).astype(np.int64) % BLOCK, starts))
    return found
