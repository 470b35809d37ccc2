"""Decide how every query of the plan ended with every teacher: the checks of checks.py, over all answers.

verdicts = decide(config, plan, answers, failures)         # by teacher, in the order of the plan; None where it is not asked
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastft.distill.plan import read_plan
from fastft.distill.settings import DistillConfig
from fastft.distill.teachers.answers import Answers, key_of
from fastft.distill.teachers.asking import Failures
from fastft.distill.verify.checks import KEPT, AnswerVerdict, NearDuplicates, disagreement, look_at

Verdicts = dict[str, list[AnswerVerdict | None]]


def decide(config: DistillConfig, plan: Path, answers: Answers, failures: Failures) -> Verdicts:
    """Return the verdicts. Asks the judge, if there is one, about the answers that all other checks have left."""
    verdicts: Verdicts = {teacher.name: [] for teacher in config.teachers}
    for row, found in answered_rows(config, plan, answers):
        ended = {name: _first_look(config, row, name, key, answer, failures) for name, (key, answer) in found.items()}
        if config.verify.agreement:
            kept = {name: found[name][1] for name, verdict in ended.items() if verdict.status == KEPT}
            if said := disagreement(row, kept):
                ended |= dict.fromkeys(kept, AnswerVerdict("unverified", "the teachers disagree", said))
        for name, sequence in verdicts.items():
            sequence.append(ended.get(name))
    if config.verify.judge.url:
        from fastft.distill.verify.judging import judge_answers

        stopped, failures.judge_usd = judge_answers(config, plan, answers, verdicts)
        failures.stopped |= {"judge": stopped} if stopped else {}
    _take_duplicates_out(config, plan, answers, verdicts)
    return verdicts


def answered_rows(
    config: DistillConfig, plan: Path, answers: Answers
) -> Iterator[tuple[dict[str, Any], dict[str, tuple[str, dict[str, Any] | None]]]]:
    """Yield each row of the plan with, by teacher, the key of its request and its answer."""
    for row in read_plan(plan):
        keys = {each.name: key_of(each, row) for each in config.teachers if each.name in row["teachers"]}
        yield row, {name: (key, answers.get(key)) for name, key in keys.items()}


def _first_look(
    config: DistillConfig, row: dict[str, Any], name: str, key: str, answer: dict[str, Any] | None, failures: Failures
) -> AnswerVerdict:
    if answer is None:
        return AnswerVerdict(*failures.of(name, key))
    return look_at(row, answer, config.verify)


def _take_duplicates_out(config: DistillConfig, plan: Path, answers: Answers, verdicts: Verdicts) -> None:
    """Change, in place, the verdicts on equal requests and near duplicates, which are looked for within each stage."""
    if config.verify.repeats == "share" and not config.verify.near:
        return
    stages = {teacher.name: NearDuplicates(config.verify) for teacher in config.teachers}
    places: dict[str, int] = {}
    for index, (row, found) in enumerate(answered_rows(config, plan, answers)):
        places[row["id"]] = index
        for name, (key, answer) in found.items():
            verdict = verdicts[name][index]
            if verdict.status != KEPT:
                continue
            if first := stages[name].repeats(key, row["id"]):
                if config.verify.repeats == "drop":
                    verdicts[name][index] = AnswerVerdict(
                        "duplicate", "the same request", f"as {first}", verdict.checked
                    )
            else:
                stages[name].add(row, answer["text"])
    for name, stage in stages.items():
        for id, duplicate in stage.found():
            checked = verdicts[name][places[id]].checked
            verdicts[name][places[id]] = AnswerVerdict(duplicate.status, duplicate.reason, duplicate.detail, checked)
