"""What a run would take before it begins: calls, tokens, dollars and days for each teacher, and what batch files would cost."""

from array import array
from dataclasses import dataclass
from pathlib import Path

from fastft.distill.plan import read_plan
from fastft.distill.settings import TeacherConfig
from fastft.distill.teachers.answers import Answers, key_of, messages_of
from fastft.distill.teachers.asking import rows_at
from fastft.inference.budget import FREE
from fastft.inference.connection import BATCH_PRICE, estimate_tokens


@dataclass(frozen=True)
class TeacherEstimate:
    """What asking a teacher would take. Reply tokens and dollars are given as expected and at most."""

    name: str
    calls: int
    answered: int
    repeats: int
    prompt_tokens: int
    reply_tokens: float
    most_reply_tokens: int
    usd: float
    most_usd: float
    batch_usd: float
    days: float | None
    """At its limits; None without limits."""
    limited_by: str


def estimate(teacher: TeacherConfig, plan: Path, missing: array, answers: Answers) -> TeacherEstimate:
    """Estimate what the rows of a plan take that begin at `missing`, which have no answer yet."""
    calls = prompt = 0
    planned = [key_of(teacher, row) for row in read_plan(plan) if teacher.name in row["teachers"]]
    answered = sum(key in answers for key in planned)
    for row in rows_at(plan, missing):
        calls += 1
        prompt += estimate_tokens(messages_of(row))
    mean = teacher.reply_tokens or answers.mean_reply_tokens(teacher.name) or teacher.max_tokens
    most = calls * teacher.max_tokens
    usd_in, usd_out = teacher.usd_per_million or FREE
    usd, most_usd = ((usd_in * prompt + usd_out * reply) / 1e6 for reply in (calls * mean, most))
    now = BATCH_PRICE if teacher.mode == "batch" else 1.0
    minutes = {
        "rpm": calls / teacher.rpm if teacher.rpm else 0.0,
        "tpm": (prompt + most) / teacher.tpm if teacher.tpm else 0.0,
    }
    slowest = max(minutes, key=minutes.get)
    addresses = len(teacher.addresses)
    days = minutes[slowest] / addresses / 1440
    limited = teacher.mode == "chat" and days > 0
    limited_by = f"{slowest} {getattr(teacher, slowest):,g}{f' x {addresses} addresses' if addresses > 1 else ''}"
    return TeacherEstimate(
        name=teacher.name,
        calls=calls,
        answered=answered,
        repeats=len(planned) - answered - calls,
        prompt_tokens=prompt,
        reply_tokens=calls * mean,
        most_reply_tokens=most,
        usd=usd * now,
        most_usd=most_usd * now,
        batch_usd=usd * BATCH_PRICE,
        days=days if limited else None,
        limited_by=limited_by if limited else "",
    )
