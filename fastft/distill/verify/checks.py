"""Decide which answers are learned. Each check can be switched off, and each has a reason that the ledger counts.

In this order: no answer (failed, over budget), empty, cut, refused, unverified (against the gold answer, the other teachers, a
judge), duplicate. The first that fails is the reason.

A gold answer is compared by the kind that it has (fastft.judge.exams.gold). Longer ones (translations, stories) have none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastft.data import refusals
from fastft.data.conversation import Conversation, Message
from fastft.distill.settings import VerifyConfig
from fastft.judge.exams.gold import compare, gold_number, kind_of_gold, number_in
from fastft.judge.exams.options import chosen_option

KEPT = "kept"
STATUSES = (KEPT, "refused", "cut", "unverified", "failed", "over budget", "duplicate")


@dataclass(frozen=True, slots=True)
class AnswerVerdict:
    """How an answer ended: one of STATUSES, a reason that can be counted, and details for its row.

    `checked` says whether a gold answer was compared.
    """

    status: str
    reason: str = ""
    detail: str = ""
    checked: bool = False


def look_at(row: dict[str, Any], answer: dict[str, Any], settings: VerifyConfig) -> AnswerVerdict:
    """Judge an answer by itself: all checks but those that compare it with other answers, and the judge."""
    text = answer["text"]
    if not text.strip():
        why = f"empty answer ({answer['finish_reason'] or 'no reason'})"
        return AnswerVerdict(KEPT) if settings.empty == "keep" else AnswerVerdict("cut", "empty answer", why)
    if answer["finish_reason"] == "length" and settings.cut == "drop":
        return AnswerVerdict("cut", "longer than max_tokens", f"{answer['completion_tokens']} tokens")
    if settings.refusals == "drop" and (why := refusal(text, answer)):
        return AnswerVerdict("refused", *why)
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


def compare_with_gold(row: dict[str, Any], text: str, check: str) -> AnswerVerdict:
    """Compare an answer with the row's gold answer, by the kind `check` (auto: whichever fits the gold answer)."""
    gold = row["gold"]
    kind = "none" if not gold or check == "none" else kind_of_gold(gold, row["options"]) if check == "auto" else check
    if kind == "none":
        return AnswerVerdict(KEPT)
    right, found = compare(text, gold, row["options"], kind)
    if right:
        return AnswerVerdict(KEPT, checked=True)
    if found is None:
        return AnswerVerdict("unverified", "no answer found", f"gold {gold[:80]!r}", True)
    return AnswerVerdict("unverified", "wrong answer", f"gold {gold[:80]!r}, answered {found[:80]!r}", True)


def extracted(row: dict[str, Any], text: str) -> str | None:
    """The answer that a text gives to a question with options, or with a number as its gold answer; None if none is found.

    Two teachers agree if these are equal.
    """
    if row["options"]:
        found = chosen_option(text, row["options"])
        return None if found is None else str(found)
    if row["gold"] and gold_number(row["gold"]) is not None:
        value = number_in(text)
        return None if value is None else f"{value:g}"
    return None


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

    def found(self) -> Iterator[tuple[str, AnswerVerdict]]:
        """Yield (id, verdict) of each conversation that is too near to another."""
        from fastft.data.dedup.duplicates import find_duplicates

        if not self.settings.near:
            return
        for position, duplicate in find_duplicates(self.prints, self.settings.near).items():
            reason = "near duplicate" if duplicate.reason == "near_duplicate" else "the same conversation"
            detail = f"of {self.ids[duplicate.keeper]}, similarity {duplicate.similarity:.2f}"
            yield self.ids[position], AnswerVerdict("duplicate", reason, detail)
