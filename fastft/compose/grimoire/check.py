"""`fastft grimoire check`: look at a task, at grimoires or at recorded runs before anything is paid for.

    fastft grimoire check trec.yaml                                          # splits, labels, hard samples
    fastft grimoire check trec.yaml rte.yaml --grimoires grimoires.jsonl     # which of them copy training texts
    fastft grimoire check --runs runs.jsonl.gz                               # what would be chosen from recorded answers

A row of grimoires holds `text`, or `profound` and `simple`; one with a `task` counts for the task of that name. A row of runs
holds `setting`, `id`, and `right` or several `correct_WAY`; with `model` and `task`, each pair is chosen for by itself. The
test split is not read.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.common.command_line import option, parse, run_module
from fastft.compose.grimoire.answering.answers import ZERO_SHOT
from fastft.compose.grimoire.choosing.choose import Gain, chosen, compare
from fastft.compose.grimoire.task import LabelTask, OpenSplits, divided, overlapping_labels, read_questions, read_task
from fastft.compose.grimoire.writing.copies import WORDS, CopyGuard
from fastft.compose.grimoire.writing.samplers import strata
from fastft.errors import UserError
from fastft.judge.rows import read_objects

KINDS_OF_TEXT = ("profound", "simple", "text")


@dataclass(kw_only=True)
class CheckConfig:
    """What is looked at."""

    tasks: list[str] = option(positional=True, several=True)
    """Tasks, YAML files."""
    grimoires: Path | None = None
    """Grimoires, JSON Lines: count those that share words with a training text."""
    copied_words: int = WORDS
    """So many words in a row are a copy."""
    runs: Path | None = None
    """Recorded answers, JSON Lines: say what would be chosen."""

    def __post_init__(self) -> None:
        if not self.tasks and self.runs is None:
            raise UserError("there is nothing to check: name a task, or answers with --runs")
        if self.grimoires is not None and not self.tasks:
            raise UserError("--grimoires needs the task whose training texts may be copied")
        if self.copied_words < 2:
            raise UserError("--copied_words must be at least 2")


def main(argv: Sequence[str]) -> int:
    what = "Look at a task, at grimoires or at recorded runs, before anything is paid."
    [config] = parse(argv, "fastft grimoire check", what, CheckConfig)
    total: Counter[str] = Counter()
    for path in config.tasks:
        task = read_task(Path(path))
        split = divided(task)
        print("\n".join(task_lines(task, split)))
        if config.grimoires is not None:
            copied = copied_grimoires(config.grimoires, task, split, config.copied_words, len(config.tasks) > 1)
            print("\n".join(_copy_lines(task.name, copied, config.copied_words)))
            total.update(copied)
    if config.grimoires is not None and len(config.tasks) > 1:
        print("\n".join(_copy_lines("all tasks", total, config.copied_words)))
    if config.runs is not None:
        for line in replayed(config.runs):
            print(line)
    return 0


def task_lines(task: LabelTask, split: OpenSplits) -> list[str]:
    """Return what there is to say about a task: its splits, its labels, and who was right without help."""
    test = f"{task.test.name} (not opened)" if task.test else "set aside from train"
    counts = Counter(each.label for each in split.train)
    lines = [
        f"{task.name}: {len(split.train):,} train, {len(split.validation):,} validation questions, test: {test}",
        "  labels: " + ", ".join(f"{label} {counts[label]}" for label in task.labels),
        *(f"  {remark}" for remark in split.remarks),
        *(
            f"  label {a!r} is part of {b!r}: answers are read as whole words"
            for a, b in overlapping_labels(task.labels)
        ),
    ]
    questions = read_questions(task.train, task.labels)  # all rows, those with a text that comes twice, too
    for model in sorted({model for each in questions for model in each.zero_shot}):
        right = {each.id: each.zero_shot[model] for each in questions if model in each.zero_shot}
        known, wrong = strata(questions, right)
        lines.append(f"  {model} without help: {known} right, {wrong} wrong")
    return lines


def copied_grimoires(path: Path, task: LabelTask, split: OpenSplits, words: int, by_task: bool) -> Counter[str]:
    """Return how many grimoires there are of each kind, and under "copied KIND" how many hold a copy. Raises UserError."""
    guard = CopyGuard((each.text for each in [*split.train, *split.validation]), words)
    counts: Counter[str] = Counter()
    for record in read_objects(path):
        row = record.value
        if "task" in row and row["task"] != task.name:
            continue
        if "task" not in row and by_task:
            raise UserError(f"{record.where}: has no task; check it against one task at a time")
        texts = {kind: row[kind] for kind in KINDS_OF_TEXT if isinstance(row.get(kind), str)}
        if not texts:
            raise UserError(f"{record.where}: is not a grimoire; it needs text, or profound and simple")
        for kind, text in texts.items():
            kind = row.get("kind", kind) if kind == "text" else kind
            counts[kind] += 1
            counts[f"copied {kind}"] += bool(guard.copies(text))
    return counts


def _copy_lines(name: str, counts: Counter[str], words: int) -> list[str]:
    kinds = [kind for kind in counts if not kind.startswith("copied ")]
    if not kinds:
        return [f"  {name}: no grimoires"]
    return [
        f"  {name}: {counts[f'copied {kind}']} of {counts[kind]} {kind} grimoires share {words} words in a row with a question"
        for kind in kinds
    ]


# Recorded answers --------------------------------------------------------------------------------------------------------------


def replay(path: Path) -> dict[tuple[str, str, str], tuple[str, list[Gain]]]:
    """Return (model, task, way of scoring) -> (the choice, the gains). Raises UserError for rows that are no answers."""
    found: dict[tuple[str, str, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in read_objects(path):
        row = record.value
        ways = {key.removeprefix("correct_"): value for key, value in row.items() if key.startswith("correct_")}
        if "right" in row:
            ways["right"] = row["right"]
        if not ways or not isinstance(row.get("setting"), str) or "id" not in row:
            raise UserError(f"{record.where}: is not an answer; it needs setting, id, and right or correct_WAY")
        for way, right in ways.items():
            if right is not None:
                _note(found[str(row.get("model", "")), str(row.get("task", "")), way], row, right, record.where)
    replays = {}
    for key, outcomes in found.items():
        if ZERO_SHOT not in outcomes:
            raise UserError(f"{path}: has no answers of the setting {ZERO_SHOT}, with which the others are compared")
        gains = compare({ZERO_SHOT: outcomes.pop(ZERO_SHOT), **outcomes})
        replays[key] = chosen(gains), gains
    return replays


def _note(outcomes: dict[str, dict[str, float]], row: dict[str, Any], right: Any, where: str) -> None:
    if not isinstance(right, (bool, int, float)) or not 0 <= float(right) <= 1 or math.isnan(right):
        raise UserError(f"{where}: is not an answer: {right!r} is neither right nor wrong")
    outcomes[row["setting"]][str(row["id"])] = float(right)


def replayed(path: Path) -> list[str]:
    """Return a line for each model, task and way of scoring."""
    lines = []
    for (model, task, way), (name, gains) in replay(path).items():
        best = max(gains[1:], key=lambda each: each.gain.low, default=None)
        what = " ".join(filter(None, (model, task, way)))
        beside = ""
        if best is not None:
            value, low, high = (100 * each for each in (best.gain.value, best.gain.low, best.gain.high))
            beside = f" (best lower end: {best.setting} {value:+.1f} [{low:.1f}, {high:.1f}])"
        lines.append(f"{what}: {name} would be chosen of {len(gains)} settings{beside}")
    return lines


if __name__ == "__main__":
    run_module(main)
