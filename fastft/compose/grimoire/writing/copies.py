"""Counts what a grimoire has copied: runs of words that also stand in a training text.

    guard = CopyGuard(texts)
    guard.copies(grimoire)          # ["the main story involves an innocent teenage boy", …]

A grimoire that quotes its samples teaches answers and not rules, and carries training texts into every prompt.
"""

import re
from collections.abc import Iterable

WORDS = 8
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts without spaces: each character counts as a word
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


class CopyGuard:
    """Knows all runs of `words` words in a row of some texts. Case, punctuation and white space do not count."""

    def __init__(self, texts: Iterable[str], words: int = WORDS):
        self.words = words
        self.known = {run for text in texts for run in runs_of(text, words)}

    def copies(self, text: str) -> list[str]:
        """Return what `text` shares with them, overlapping runs joined, in the order of `text`."""
        words = words_of(text)
        found: list[list[int]] = []
        for begin, run in enumerate(runs_of(text, self.words)):
            if run not in self.known:
                continue
            if found and begin <= found[-1][1]:
                found[-1][1] = begin + self.words
            else:
                found.append([begin, begin + self.words])
        return [" ".join(words[begin:end]) for begin, end in found]


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def runs_of(text: str, words: int) -> list[tuple[str, ...]]:
    """Return every run of `words` words in a row, by where it begins."""
    found = words_of(text)
    return [tuple(found[begin : begin + words]) for begin in range(len(found) - words + 1)]
