"""Compare how several models write, because a blend of models that write differently reads like several people.

    compare_styles({"vicuna": ["…", …], "spring": ["…", …]})     # ["length: spring's answers are 2.6 times as long …", …]

A difference is reported if a reader would notice it and if chance does not explain it. Noticeable is an answer of twice the
length, formatting (lists, headings, code, emphasis) that one model uses in 30 of 100 answers more than another, or a language
that it uses in 20 of 100 more. Chance is ruled out by 3 standard errors: it reaches them once in 370 comparisons of models
that write alike. The answers need not be to the same questions, but to questions that were dealt out by chance, as a blend does.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, variance

from fastft.data.language import UNKNOWN, available, language_of

FEWEST = 10
"""Answers of a model below which nothing is said about its style."""
LENGTH_RATIO, FORMAT_SHARE, LANGUAGE_SHARE = 2.0, 0.3, 0.2
STANDARD_ERRORS = 3.0
_CODE = re.compile(r"^[ \t]*(```|~~~)[\s\S]*?(?:^[ \t]*\1|\Z)", re.MULTILINE)
# What is looked for outside of code, where "# x" is a comment and "*x" a pointer.
_FORMATS = {
    "lists": re.compile(r"^[ \t]*(?:[-*+•]|\d+[.)])[ \t]+\S.*\n\s*(?:[-*+•]|\d+[.)])[ \t]+\S", re.MULTILINE),
    "headings": re.compile(r"^#{1,6}[ \t]+\S", re.MULTILINE),
    # **bold**, __bold__ and *smiles*, as models write that play a character
    "emphasis": re.compile(r"(?<![*\w])\*{1,2}(?=[^*\s])[^*\n]*[^*\s]\*{1,2}(?![*\w])|(?<!\w)__(?=\S)[^_\n]+__(?!\w)"),
}


def compare_styles(samples: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a warning, one line with its numbers, for each trait in which models differ strongly.

    `samples` holds answers by model; blank ones are left out. Each warning names the two models that differ most. A model
    with fewer than FEWEST answers is named and not compared.
    """
    texts = {model: [text for text in answers if text.strip()] for model, answers in samples.items()}
    few = {model: len(answers) for model, answers in texts.items() if len(answers) < FEWEST}
    compared = {model: answers for model, answers in texts.items() if model not in few}
    if len(texts) < 2:
        return []
    warnings = [
        f"style: {model}'s is not compared: {count} answers are too few ({FEWEST})" for model, count in few.items()
    ]
    if len(compared) > 1:
        warnings += [*_lengths(compared), *_formats(compared), *_languages(compared)]
    return warnings


def _lengths(texts: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Geometric means of the characters: a single long answer does not make a model's answers long."""
    logs = {model: [math.log(len(text)) for text in answers] for model, answers in texts.items()}
    means = {model: fmean(each) for model, each in logs.items()}
    short, long = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    error = math.sqrt(sum(variance(logs[model]) / len(logs[model]) for model in (short, long)))
    difference = means[long] - means[short]
    if difference >= math.log(LENGTH_RATIO) and difference > STANDARD_ERRORS * error:
        typical = f"typically {math.exp(means[long]):.0f} and {math.exp(means[short]):.0f} characters"
        yield f"length: {long}'s answers are {math.exp(difference):.1f} times as long as {short}'s ({typical})"


def _formats(texts: Mapping[str, Sequence[str]]) -> Iterator[str]:
    prose = {model: [_CODE.sub("", text) for text in answers] for model, answers in texts.items()}
    found = {
        name: {model: [bool(pattern.search(text)) for text in each] for model, each in prose.items()}
        for name, pattern in _FORMATS.items()
    }
    found["code"] = {model: [bool(_CODE.search(text)) for text in each] for model, each in texts.items()}
    for name, has in found.items():
        if pair := _differ(has, FORMAT_SHARE):
            most, least = pair
            yield f"{name}: in {_share(has[most])} of {most}'s answers and in {_share(has[least])} of {least}'s"


def _languages(texts: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Compare the languages that are some model's most frequent one. Answers whose language is not clear do not count."""
    if not available():
        return
    spoken = {model: [language_of(text) for text in answers] for model, answers in texts.items()}
    spoken = {model: [code for code in codes if code != UNKNOWN] for model, codes in spoken.items()}
    spoken = {model: codes for model, codes in spoken.items() if len(codes) >= FEWEST}
    for language in sorted({Counter(codes).most_common(1)[0][0] for codes in spoken.values()}):
        uses = {model: [code == language for code in codes] for model, codes in spoken.items()}
        if pair := _differ(uses, LANGUAGE_SHARE):
            most, least = pair
            yield f"language: {_share(uses[most])} of {most}'s answers are in {language}, {_share(uses[least])} of {least}'s"


def _differ(has: Mapping[str, Sequence[bool]], threshold: float) -> tuple[str, str] | None:
    """The models with the largest and the smallest share, if these differ by the threshold and not by chance."""
    shares = {model: fmean(each) for model, each in has.items()}
    most, least = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
    if shares[most] - shares[least] < threshold:
        return None
    # Under the hypothesis that both have the same share; one answer of each kind is added, so that it is never 0 or 1.
    sizes = [len(has[model]) for model in (most, least)]
    pooled = (sum(has[most]) + sum(has[least]) + 1) / (sum(sizes) + 2)
    error = math.sqrt(pooled * (1 - pooled) * (1 / sizes[0] + 1 / sizes[1]))
    return (most, least) if shares[most] - shares[least] > STANDARD_ERRORS * error else None


def _share(values: Sequence[bool]) -> str:
    return f"{100 * fmean(values):.0f} %"
