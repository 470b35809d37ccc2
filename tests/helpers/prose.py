"""Random prose, for tests of duplicates."""

import random

VOCABULARY = [f"word{i}" for i in range(5000)]


def prose(seed: int, words: int = 200) -> str:
    """Return `words` random words, always the same for a seed."""
    return " ".join(random.Random(seed).choices(VOCABULARY, k=words))
