"""Make training data by asking teachers: `fastft distill FILE.yaml [--dry_run]`.

plan (which query, with which system message, by whom) -> ask -> verify -> write. The same command goes on where an earlier one
stopped, at row level: what is paid for stays in OUTPUT/answers.jsonl, and only rows without an answer are asked. OUTPUT/ holds

    plan.jsonl  answers.jsonl  rejected.jsonl  ledger.json  stage1/conversations.jsonl …  train.yaml  report.html
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import orjson

from fastft.common.command_line import parse, run_module
from fastft.common.files import make_directory, write_whole, written_whole
from fastft.distill import ledger as ledgers
from fastft.distill.draws import draw
from fastft.distill.plan import PlanAccount, make_plan
from fastft.distill.queries.recipes import make_queries, recipe_usd
from fastft.distill.settings import DistillConfig
from fastft.distill.student import Stages, require_trainable, write_train_yaml
from fastft.distill.teachers.answers import Answers
from fastft.distill.teachers.asking import ask_all, unanswered
from fastft.distill.teachers.estimate import TeacherEstimate, estimate
from fastft.distill.verify.checks import KEPT, STATUSES
from fastft.distill.verify.decide import Verdicts, answered_rows, decide
from fastft.errors import UserError
from fastft.inference.endpoint import key_for

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Run `fastft distill`. Raises UserError if queries could not be asked: the same command goes on."""
    files = ["--config", argv[0]] if argv and not argv[0].startswith("-") else list(argv[:1])
    description = "Make training data by asking teachers: fastft distill FILE.yaml [--dry_run]."
    [config] = parse([*files, *argv[1:]], "fastft distill", description, DistillConfig)
    if config.dry_run:
        show_dry_run(config)
    else:
        distill(config)
    return 0


def distill(config: DistillConfig) -> None:
    """Plan, ask, verify and write. Raises UserError for the user's mistakes, and at the end if a teacher had to stop."""
    from fastft.distill.report import write_report

    make_directory(config.directory)
    require_trainable(config)
    if config.verify.judge.url:
        key_for(config.verify.judge.url, config.verify.judge.key_env)  # now, because it is asked at the end
    with _locked(config.directory):
        plan, answers = config.directory / "plan.jsonl", Answers(config.directory / "answers.jsonl")
        _require_known_versions(config, answers)
        account = make_plan(config, make_queries(config, answers.usd), plan)
        logger.info("%s of %s queries are planned", f"{account.planned:,}", f"{account.read:,}")
        elsewhere = recipe_usd(config)
        failures = ask_all(config, plan, answers, elsewhere)
        verdicts = decide(config, plan, answers, failures)
        ledger = write_results(config, account, answers, verdicts, {**elsewhere, "judge": failures.judge_usd})
        answers.close()
        write_report(config.directory / "report.html", ledger)
    for line in summary(ledger):
        print(line)
    print(f"report: {config.directory / 'report.html'}")
    stopped = {**failures.stopped, **failures.over_budget}
    if stopped:
        left = sum(each["failed"] + each["over_budget"] for each in ledger["teachers"])
        why = "; ".join(stopped.values())
        raise UserError(f"{f'{left:,} answers are missing ({why})' if left else why}; the same command goes on")


def write_results(
    config: DistillConfig, account: PlanAccount, answers: Answers, verdicts: Verdicts, elsewhere: dict[str, float]
) -> dict:
    """Write the stages, rejected.jsonl, train.yaml and ledger.json, each whole. Returns the ledger.

    `elsewhere` is what teachers have cost beside their answers, and the judge. Its "usd" is all that was spent in this directory.
    """
    plan, directory = config.directory / "plan.jsonl", config.directory
    teachers = {each.name: ledgers.TeacherLedger(each.name, each.model) for each in config.teachers}
    stages, samples, paid = Stages(config), [], set()
    with ExitStack() as stack:
        stages.open(stack)
        rejected = stack.enter_context(stack.enter_context(written_whole(directory / "rejected.jsonl")).open("wb"))
        for index, (row, keyed) in enumerate(answered_rows(config, plan, answers)):
            found = {name: (answer, verdicts[name][index]) for name, (_, answer) in keyed.items()}
            stages.add(row, found)
            for name, (key, answer) in keyed.items():
                verdict, ledger = verdicts[name][index], teachers[name]
                ledger.add(row, answer, verdict)
                if answer and (name, key) not in paid:
                    paid.add((name, key))
                    ledger.answers += 1
                    ledger.tokens[0] += answer["prompt_tokens"]
                    ledger.tokens[1] += answer["completion_tokens"]
                if verdict.status != KEPT:
                    why = {"status": verdict.status, "reason": verdict.reason, "detail": verdict.detail}
                    rejected.write(orjson.dumps({"id": row["id"], "teacher": name, **why}) + b"\n")
            samples = _with_sample(samples, draw(config.seed, "sample of the page", row["id"]), row, found)
    for name, ledger in teachers.items():
        ledger.usd = answers.usd.get(name, 0.0)
    train = write_train_yaml(config, stages.counts)
    made = {
        "queries": asdict(account),
        "teachers": [ledger.to_json() for ledger in teachers.values()],
        "stages": [
            {"stage": name, "conversations": stages.counts[name], "erased": stages.erased[name]}
            for name in stages.counts
        ],
        "usd": round(sum(answers.usd.values()) + sum(elsewhere.values()), 6),
        "train_yaml": str(train) if train else None,
        "samples": [shown for _, shown in samples],
    }
    write_whole(directory / "ledger.json", orjson.dumps(made, option=orjson.OPT_INDENT_2) + b"\n")
    return made


def _with_sample(samples: list, place: int, row: dict, found: dict) -> list:
    """The queries to show: those with the most teachers' answers, and of these a random few."""
    answered = sum(answer is not None for answer, _ in found.values())
    if not answered or (len(samples) == ledgers.SAMPLES and samples[-1][0] <= (-answered, place)):
        return samples
    return sorted([*samples, ((-answered, place), ledgers.sample(row, found))], key=lambda each: each[0])[
        : ledgers.SAMPLES
    ]


def _require_known_versions(config: DistillConfig, answers: Answers) -> None:
    """Raise UserError if earlier answers of a teacher came from two versions of its model, and that was not allowed."""
    for teacher in config.teachers:
        versions = answers.versions.get((teacher.name, teacher.model), [])
        if len(versions) > 1 and not teacher.any_version:
            raise UserError(
                f"{teacher.name}: answers.jsonl has answers of {' and of '.join(versions)}; set any_version: true to keep both, "
                "or give the run another output"
            )


def summary(ledger: dict) -> list[str]:
    """What the terminal says at the end: a line for what was left out, and one for each teacher."""
    queries = ledger["queries"]
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in queries["left_out"].items())
    lines = [f"{queries['read']:,} queries: {queries['planned']:,} planned{f', {left_out}' if left_out else ''}"]
    for each in ledger["teachers"]:
        ended = [(status, each[status.replace(" ", "_")]) for status in STATUSES]
        line = f"{each['name']}: {each['planned']:,} planned = " + ", ".join(
            f"{n:,} {status}" for status, n in ended if n
        )
        if each["usd"]:
            line += f"; ${each['usd']:,.2f}"
            line += f", ${each['usd_per_kept']:.5f} a kept answer" if each["usd_per_kept"] else ""
        lines.append(line)
    return lines


def show_dry_run(config: DistillConfig) -> None:
    """Print the sample, and for each teacher calls, tokens, dollars and days. Nothing is asked, and no file is left."""
    require_trainable(config)
    with tempfile.TemporaryDirectory() as scratch:
        answers, plan = Answers(config.directory / "answers.jsonl"), Path(scratch) / "plan.jsonl"
        sources = make_queries(config, answers.usd, dry_run=True)
        if not sources:
            return
        account = make_plan(config, sources, plan)
        for collection, each in sorted(account.collections.items()):
            exhausted = f", {each['exhausted_tasks']:,} of them used up" if each["planned"] < each["queries"] else ""
            print(
                f"{collection}: {each['planned']:,} of {each['queries']:,} queries in {each['tasks']:,} tasks{exhausted}"
            )
        for reason, count in account.left_out.items():
            print(f"left out: {count:,} {reason} ({account.examples[reason][0]}{' …' if count > 1 else ''})")
        missing = unanswered(config, plan, answers)
        for teacher in config.teachers:
            found = estimate(teacher, plan, missing[teacher.name], answers)
            print(_estimate_line(found, bool(teacher.usd_per_million)))
        if config.verify.judge.url:
            most, judge = sum(account.asked.values()), config.verify.judge
            replies = f"{most * judge.max_tokens:,} reply tokens at most"
            print(f"judge {judge.model}: up to {most:,} calls, {replies}, in addition to the teachers")


def _estimate_line(each: TeacherEstimate, priced: bool) -> str:
    parts = [f"{each.name}: {each.calls:,} calls"]
    if each.answered or each.repeats:
        parts[0] += f" ({each.answered:,} answered already, {each.repeats:,} equal requests)"
    parts.append(f"{each.prompt_tokens:,} prompt tokens")
    parts.append(f"about {each.reply_tokens:,.0f} reply tokens (at most {each.most_reply_tokens:,})")
    if priced:
        parts.append(
            f"about ${each.usd:,.2f} (at most ${each.most_usd:,.2f}; by batch files about ${each.batch_usd:,.2f})"
        )
    if each.days is not None:
        parts.append(f"at least {_days(each.days)} ({each.limited_by})")
    return ", ".join(parts)


def _days(days: float) -> str:
    return (
        f"{days:.1f} days"
        if days >= 1
        else f"{days * 24:.1f} hours"
        if days >= 1 / 24
        else f"{days * 1440:.0f} minutes"
    )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep a second run out of the directory, because it would pay for everything again. Raises UserError."""
    import fcntl

    with open(directory / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = "another fastft distill is at work there; wait for it, or name another output"
            raise UserError(f"{directory}: {what}") from None
        except OSError as error:
            logger.warning("%s: cannot be locked (%s): start only one run there", directory, error.strerror)
        yield


if __name__ == "__main__":
    run_module(main)
