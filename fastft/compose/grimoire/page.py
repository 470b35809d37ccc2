"""Writes what an evaluation found: grimoire.md, grimoire.html, and a table in the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.common.files import write_whole
from fastft.compose.grimoire.answering.answers import ZERO_SHOT
from fastft.compose.grimoire.choosing.choose import Gain, gains_of
from fastft.compose.grimoire.run import RANKED, SIMILAR
from fastft.compose.grimoire.writing.write import load_grimoires

HEADS = ("setting", "right, validation", "right, test", "95 %", "gain over zero-shot", "95 %", "p", "valid", "failed")
WHAT = {SIMILAR: "the most similar grimoire for each question", RANKED: "a trained ranker's grimoire for each question"}


@dataclass(frozen=True)
class SettingRow:
    """A setting with its figures on both splits."""

    name: str
    chosen: bool
    validation: Gain
    test: Gain


def setting_rows(choice: dict[str, Any], evaluation: dict[str, Any]) -> list[SettingRow]:
    on_validation = {each.setting: each for each in gains_of(choice["gains"])}
    return [
        SettingRow(each.setting, each.setting == choice["chosen"], on_validation[each.setting], each)
        for each in gains_of(evaluation["gains"])
    ]


def cells(row: SettingRow) -> list[str]:
    gain, accuracy = row.test.gain, row.test.accuracy
    nothing = row.name == ZERO_SHOT or gain.value != gain.value
    return [
        f"{row.name} (chosen)" if row.chosen else row.name,
        _percent(row.validation.accuracy.value),
        _percent(accuracy.value),
        _ends(accuracy.low, accuracy.high),
        "–" if nothing else f"{100 * gain.value:+.1f}",
        "–" if nothing else _ends(gain.low, gain.high),
        "–" if nothing else f"{row.test.p_value:.3f}",
        "–" if row.test.valid is None else _percent(row.test.valid),
        str(row.test.failed),
    ]


def remarks(choice: dict[str, Any], evaluation: dict[str, Any]) -> list[str]:
    """Return the notes that a reader of the table needs."""
    ways = {
        "likelihood": "The answer is the likeliest label, so that skill counts and not format. Valid: the probability that an "
        "answer begins with a label.",
        "choice": "The answer is a constrained choice of one label where the endpoint knows that, else what its text names. "
        "Valid: the share of answers that name a label; others count as wrong.",
        "text": "The answer is what the text names. Valid: the share of texts that name one label; others count as wrong, so "
        "a gain may be format and not skill.",
    }
    lines = [
        f"Percent right on {len(choice['validation'])} validation and {evaluation['questions']} test questions. "
        "Intervals resample questions; gains are paired, with a sign-flip test. Failed calls are left out, and counted.",
        ways[choice["answers"]],
    ]
    if choice["means"]:
        lines.append(
            "Likelihoods are calibrated: each label's mean over the validation questions is taken away, in every setting."
        )
    lines.append(
        "The choice was made on validation, by the highest lower end of the gain with an interval that holds for all settings "
        "together, and zero-shot where none is above 0. The test split was read once, after that."
    )
    return [*lines, *evaluation["remarks"]]


def verdict(choice: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """Return the result in a sentence or two."""
    rows = {row.name: row for row in setting_rows(choice, evaluation)}
    base, own = rows[ZERO_SHOT].test, rows[choice["chosen"]].test
    if choice["chosen"] == ZERO_SHOT:
        said = f"No grimoire surely helps {choice['weak']}: zero-shot stays, with {_percent(base.accuracy.value)} right on test."
    else:
        what = WHAT.get(choice["chosen"], choice["chosen"])
        gain = f"{100 * own.gain.value:+.1f} points {_ends(own.gain.low, own.gain.high)}"
        said = (
            f"Chosen: {what}. {choice['weak']} is right in {_percent(own.accuracy.value)} of the test questions, zero-shot "
            f"in {_percent(base.accuracy.value)}: {gain}."
        )
        if own.gain.low <= 0:
            said += " The test does not confirm the gain."
    return said


def write_results(directory: Path, choice: dict[str, Any], evaluation: dict[str, Any]) -> None:
    """Write grimoire.md and grimoire.html, each whole or not at all."""
    from fastft.common.html import write_page
    from fastft.judge.tables import markdown_table

    rows, notes = setting_rows(choice, evaluation), remarks(choice, evaluation)
    said = verdict(choice, evaluation)
    table = markdown_table(HEADS, map(cells, rows))
    notes_text = "\n".join(f"- {line}" for line in notes)
    write_whole(directory / "grimoire.md", f"# Grimoire: {choice['task']}\n\n{said}\n\n{table}\n\n{notes_text}\n")
    write_page(
        directory / "grimoire.html",
        Path(__file__).with_name("grimoire.html.jinja"),
        title=f"Grimoire: {choice['task']}",
        verdict=said,
        choice=choice,
        rows=rows,
        heads=HEADS,
        lines=[(row, cells(row)) for row in rows],
        notes=notes,
        texts=_texts(directory, choice),
        span=_span(rows),
    )


def _texts(directory: Path, choice: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what each setting tells the weak model, the chosen first, with what the strong model has copied."""
    written = {}
    if (path := directory / "grimoires.jsonl").is_file():
        written = {each.name: each for each in load_grimoires(path)}
    shown = []
    for setting in choice["settings"]:
        row = written.pop(setting["name"], None)
        shown.append(
            {
                "name": setting["name"],
                "text": setting["text"] or setting["prompt"],
                "copies": row.copies if row else (),
                "samples": row.samples if row else (),
                "chosen": setting["name"] == choice["chosen"],
            }
        )
    left_out = [{"name": name, "wrong": row.fault} for name, row in written.items()]
    return [*sorted(shown, key=lambda each: not each["chosen"]), *left_out]


def _span(rows: Sequence[SettingRow]) -> float:
    """Return how many points the axis of gains shows on each side: the next multiple of 10 that holds all intervals."""
    ends = [abs(100 * end) for row in rows for end in (row.test.gain.low, row.test.gain.high) if end == end]
    return 10 * max(1, -(-max(ends, default=10) // 10))


def show(choice: dict[str, Any], evaluation: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, 150)
    table = Table(show_edge=False)
    for index, head in enumerate(HEADS):
        table.add_column(head, justify="right" if index else "left", no_wrap=True)
    for row in setting_rows(choice, evaluation):
        table.add_row(*cells(row), style="bold" if row.chosen else None)
    console.print(table)
    for line in [*remarks(choice, evaluation), verdict(choice, evaluation)]:
        console.print(line, markup=False)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share == share else "–"


def _ends(low: float, high: float) -> str:
    return f"[{100 * low:.1f}, {100 * high:.1f}]" if low == low else "–"
