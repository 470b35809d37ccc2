"""Turns queries into numbers: hashed words and characters (the default), static embeddings, or a frozen encoder.

    features = HashedFeatures().fit(queries)
    matrix = features.transform(queries)          # [N, width], a scipy matrix of rows of length 1

HashedFeatures needs neither a vocabulary nor a model: every n-gram has its column by hash, in any language.
"""

import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

WORD = re.compile(r"\w\w+")
BLOCK = 1 << 16  # columns for words, and as many for characters
LONGEST = 4000  # characters of a query that are read: its first and last 2,000


class HashedFeatures:
    """Words and pairs of words, and 2 to 4 characters within a word, weighed by idf; each of the two blocks has length 1.

    An n-gram's column is its hash, so two may share one; with 65,536 columns a block this costs nothing measurable.
    """

    kind = "hashed"
    width = 2 * BLOCK

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


def columns_of(query: str) -> tuple[np.ndarray, np.ndarray]:
    """The columns of a query's n-grams, sorted, and how often each occurs (float32)."""
    if len(query) > LONGEST:
        query = f"{query[: LONGEST // 2]} {query[-LONGEST // 2 :]}"
    text = query.lower()
    words = WORD.findall(text)
    grams = [*words, *(f"{a} {b}" for a, b in zip(words, words[1:]))]
    hashes = np.fromiter((zlib.crc32(gram.encode()) for gram in grams), dtype=np.uint32, count=len(grams))
    columns, counts = np.unique(
        np.concatenate([hashes & (BLOCK - 1), BLOCK + _character_columns(text)]).astype(np.int64), return_counts=True
    )
    return columns, counts.astype(np.float32)


def _character_columns(text: str) -> np.ndarray:
    """The column, from 0, of every run of 2 to 4 characters that holds a space only as its first or last."""
    padded = f" {' '.join(text.split())} "
    codes = np.frombuffer(padded.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    space = codes == 32
    found = []
    for n in (2, 3, 4):
        count = len(codes) - n + 1
        if count <= 0:
            continue
        hashes = np.full(count, n, dtype=np.uint64)
        whole = np.ones(count, dtype=bool)
        for i in range(n):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[i : i + count]
            if 0 < i < n - 1:
                whole &= ~space[i : i + count]
        whole &= ~(space[:count] & space[n - 1 : n - 1 + count])
        hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        found.append((hashes >> np.uint64(40))[whole])
    return np.concatenate(found) & np.uint64(BLOCK - 1) if found else np.zeros(0, dtype=np.uint64)
