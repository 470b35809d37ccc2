"""Judging: models answer questions, a stronger model compares the answers, and statistics give the result with its
uncertainty.

    fastft answer --model DIR -o mine.jsonl
    fastft judge --answers mine.jsonl theirs.jsonl --judge URL#name -o judged
    fastft report judged

From Python: `from fastft.judge import compare`. docs/judge.md shows what the figures mean.
"""


def __getattr__(name: str):
    if name in ("compare", "Comparison"):
        from fastft.judge import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
