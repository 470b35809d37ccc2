"""Find test queries that share text with the queries a router was trained on, by hashes that the router keeps.

    runs = fingerprints(training_queries)        # uint64[G], kept in the router's directory
    shared_runs(test_queries, runs)              # for each query the words that it shares, or None

The rules are those of fastft.data.dedup.contamination: 13 words in a row, or 20 characters in scripts without spaces. A
shorter query must be the same as a whole. Words in a row that more than 10 training queries share are a template, such as
"which of the following statements", and no evidence.
"""

from collections.abc import Sequence

import numpy as np

from fastft.data.dedup.contamination import COMMON, WIDE_WORDS, WORDS
from fastft.data.dedup.shingles import Shingles, Words


def fingerprints(queries: Sequence[str]) -> np.ndarray:
    """The sorted hashes of all runs of words of the training queries, without those of templates: uint64[G]."""
    found = [np.unique(_runs(Words(query))[0]) for query in dict.fromkeys(queries)]
    runs, counts = np.unique(np.concatenate(found or [np.empty(0, np.uint64)]), return_counts=True)
    return runs[counts <= COMMON]


def shared_runs(queries: Sequence[str], runs: np.ndarray) -> list[str | None]:
    """For each query the first run of its words that a training query has, too; None if there is none."""
    return [_shared_run(Words(query), runs) for query in queries]


def _shared_run(words: Words, runs: np.ndarray) -> str | None:
    own, length = _runs(words)
    if not len(own) or not len(runs):
        return None
    nearest = np.minimum(np.searchsorted(runs, own), len(runs) - 1)  # np.isin would sort the runs for each query
    found = np.flatnonzero(runs[nearest] == own)
    if not len(found):
        return None
    return words.text[words.starts[found[0]] : words.ends[found[0] + length - 1]]


def _runs(words: Words) -> tuple[np.ndarray, int]:
    """The hashes of all runs of words, and the length of a run. A short query has one run, itself."""
    wide = bool(len(words)) and words.wide.mean() >= 0.5
    length = min(len(words), WIDE_WORDS if wide else WORDS)
    return Shingles(words.hashes).of(length) if length else np.empty(0, np.uint64), length
