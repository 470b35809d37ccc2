"""Decide which answers are learned. Each check can be switched off, and each has a reason that the ledger counts.

In this order: no answer (failed, over budget), empty, cut, refused, unverified (against the gold answer, the other teachers, a
judge), duplicate. The first that fails is the reason.

A gold answer is compared by the kind that it has: an option of a multiple-choice question, yes or no, a number, or a short text
that the answer must contain. Longer gold answers (translations, stories) cannot be compared like this, and are not.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastft.data import refusals
from fastft.data.conversation import Conversation, Message
from fastft.distill.queries.options import chosen_option, index_of
from fastft.distill.settings import VerifyConfig

KEPT = "kept"
STATUSES = (KEPT, "refused", "cut", "unverified", "failed", "over budget", "duplicate")
WORD_PAIRS = (("yes", "no"), ("true", "false"))
SHORT = 3  # words of a gold text that an answer must contain
_NUMBER = re.compile(r"(?<![\w.])-?\$?\d[\d,]*(?:\.\d+)?(?![\w])|(?<![\w.])-?\$?\.\d+")
_NUMBER_CONCLUDES = re.compile(
    r"(?:####|\\boxed\{|\banswers?\b[^.\n]{0,40}?(?:\bis\b|[:=]))[^\d\n]{0,40}?(-?\$?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an answer ended: one of STATUSES, a reason that can be counted, and details for its row.

    `checked` says whether a gold answer was compared.
    """

    status: str
    reason: str = ""
    detail: str = ""
    checked: bool = False


def look_at(row: dict[str, Any], answer: dict[str, Any], settings: VerifyConfig) -> Verdict:
    """Judge an answer by itself: all checks but those that compare it with other answers, and the judge."""
    text = answer["text"]
    if not text.strip():
        why = f"empty answer ({answer['finish_reason'] or 'no reason'})"
        return Verdict(KEPT) if settings.empty == "keep" else Verdict("cut", "empty answer", why)
    if answer["finish_reason"] == "length" and settings.cut == "drop":
        return Verdict("cut", "longer than max_tokens", f"{answer['completion_tokens']} tokens")
    if settings.refusals == "drop" and (why := refusal(text, answer)):
        return Verdict("refused", *why)
    return compare_with_gold(row, text, settings.check_for(row["collection"]))


def refusal(text: str, answer: dict[str, Any]) -> tuple[str, str] | None:
    """The (reason, detail) if an answer is a refusal, or says whose product the teacher is."""
    if answer["refused"]:
        return "the endpoint marks it as a refusal", ""
    if answer["finish_reason"] == "content_filter":
        return "the endpoint's content filter", ""
    message = Message("assistant", text)
    checks = (
        ("declines something harmful", refusals.policy_refusal),
        ("says that it cannot", refusals.refusal),
        ("opens with what an AI is", refusals.ai_boilerplate),
        ("says whose product it is", refusals.self_identification),
    )
    for reason, check in checks:
        if detail := check(message):
            return reason, detail
    return None


# --- Gold answers -----------------------------------------------------------------------------------------------------


def compare_with_gold(row: dict[str, Any], text: str, check: str) -> Verdict:
    """Compare an answer with the row's gold answer, by the kind `check` (auto: whichever fits the gold answer)."""
    gold = row["gold"]
    kind = "none" if not gold or check == "none" else kind_of_gold(row) if check == "auto" else check
    if kind == "none":
        return Verdict(KEPT)
    right, found = _COMPARE[kind](row, text)
    if right:
        return Verdict(KEPT, checked=True)
    if found is None:
        return Verdict("unverified", "no answer found", f"gold {gold[:80]!r}", True)
    return Verdict("unverified", "wrong answer", f"gold {gold[:80]!r}, answered {found[:80]!r}", True)


def kind_of_gold(row: dict[str, Any]) -> str:
    """How a row's gold answer can be compared: choice, number, text or none."""
    gold = row["gold"].strip()
    if row["options"]:
        return "choice" if index_of(gold, row["options"]) is not None else "none"
    if _word_pair(gold) or re.fullmatch(r"\(?[A-Z]\)?", gold):
        return "choice"
    if number(gold) is not None:
        return "number"
    return "text" if len(gold.split()) <= SHORT else "none"


def extracted(row: dict[str, Any], text: str) -> str | None:
    """The answer that a text gives to a question with options, or with a number as its gold answer; None if none is found.

    Two teachers agree if these are equal.
    """
    if row["options"]:
        found = chosen_option(text, row["options"])
        return None if found is None else str(found)
    if row["gold"] and number(row["gold"]) is not None:
        value = number_in(text)
        return None if value is None else f"{value:g}"
    return None


def _by_choice(row: dict[str, Any], text: str) -> tuple[bool, str | None]:
    gold = row["gold"].strip()
    options = row["options"] or list(_word_pair(gold) or (f"({letter})" for letter in "ABCDEFGHIJ"))
    found, wanted = chosen_option(text, options), index_of(gold, options)
    return found is not None and found == wanted, None if found is None else options[found]


def _by_number(row: dict[str, Any], text: str) -> tuple[bool, str | None]:
    found, wanted = number_in(text), number(row["gold"])
    right = found is not None and wanted is not None and abs(found - wanted) <= 1e-6 * max(1, abs(wanted))
    return right, None if found is None else f"{found:g}"


def _by_text(row: dict[str, Any], text: str) -> tuple[bool, str | None]:
    wanted, said = _bare(row["gold"]), _bare(text)
    right = bool(wanted) and f" {wanted} " in f" {said} "
    return right, None if right else text.strip().splitlines()[0]


_COMPARE = {"choice": _by_choice, "number": _by_number, "text": _by_text}


def _word_pair(gold: str) -> tuple[str, str] | None:
    """The pair of which a gold answer is one, such as yes and no."""
    return next((pair for pair in WORD_PAIRS if gold.strip(" .").casefold() in pair), None)


def number(text: str) -> float | None:
    """The number that a text is, with its dollar sign and commas; None for other texts."""
    bare = text.strip().strip(".").replace(",", "").replace("$", "").removesuffix("%").strip()
    return float(bare) if re.fullmatch(r"-?(?:\d+\.?\d*|\.\d+)", bare) else None


def number_in(text: str) -> float | None:
    """The number that an answer gives: after its last "the answer is" or "####", else a first line that is a number, else the
    last number.
    """
    text = re.sub(r"[*_`]+", "", text).strip()
    concluding = [found[1] for found in _NUMBER_CONCLUDES.finditer(text)][-1:]
    first = [line for line in text.splitlines()[:1] if number(line) is not None]
    found = concluding or first or [each[0] for each in _NUMBER.finditer(text)][-1:]
    return number(found[0]) if found else None


def _bare(text: str) -> str:
    """A text as words in lower case, without punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


# --- Checks that compare answers with each other ----------------------------------------------------------------------


def disagreement(row: dict[str, Any], answers: dict[str, dict[str, Any] | None]) -> str | None:
    """What the teachers answered, if they answered differently; None if they agree or cannot be compared."""
    found = {name: extracted(row, answer["text"]) for name, answer in answers.items() if answer}
    said = {name: value for name, value in found.items() if value is not None}
    if len(set(said.values())) < 2:
        return None
    return ", ".join(
        f"{name}: {row['options'][int(value)] if row['options'] else value}" for name, value in said.items()
    )


class NearDuplicates:
    """Finds near duplicates among the conversations of a stage, and equal requests (fastft.data.dedup)."""

    def __init__(self, settings: VerifyConfig):
        from fastft.data.dedup.duplicates import Fingerprints

        self.settings, self.prints = settings, Fingerprints()
        self.ids: list[str] = []
        self.first: dict[str, str] = {}  # key of a request -> id of the first row with it

    def repeats(self, key: str, id: str) -> str | None:
        """The id of an earlier row with the same request, None if this is the first."""
        first = self.first.setdefault(key, id)
        return first if first != id else None

    def add(self, row: dict[str, Any], text: str) -> None:
        """Remember a conversation that has passed all other checks."""
        from fastft.data.dedup.duplicates import fingerprint

        messages = [Message("user", row["query"]), Message("assistant", text, True)]
        self.prints.append(fingerprint(Conversation(row["id"], messages), bool(self.settings.near)))
        self.ids.append(row["id"])

    def found(self) -> Iterator[tuple[str, Verdict]]:
        """Yield (id, verdict) of each conversation that is too near to another."""
        from fastft.data.dedup.duplicates import find_duplicates

        if not self.settings.near:
            return
        for position, duplicate in find_duplicates(self.prints, self.settings.near).items():
            reason = "near duplicate" if duplicate.reason == "near_duplicate" else "the same conversation"
            detail = f"of {self.ids[duplicate.keeper]}, similarity {duplicate.similarity:.2f}"
            yield self.ids[position], Verdict("duplicate", reason, detail)
