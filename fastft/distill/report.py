"""Write a distillation's page, report.html, from its ledger."""

from pathlib import Path
from typing import Any

import orjson

from fastft.common.html import write_page
from fastft.distill.verify.checks import STATUSES
from fastft.errors import UserError, first_line


def write_report(path: Path, ledger: dict[str, Any]) -> None:
    """Write the page of `ledger`, what ledger.json holds."""
    teachers = ledger["teachers"]
    write_page(
        path,
        Path(__file__).with_name("distill.html.jinja"),
        title=f"Distilled: {path.resolve().parent.name}",
        lede=_lede(ledger),
        queries=ledger["queries"],
        teachers=teachers,
        ended={each["name"]: _ended(each) for each in teachers},
        collections=_collections(teachers),
        lengths=_lengths(teachers),
        messages=_messages(ledger["queries"]["messages"]),
        checked=_checked(teachers),
        stages=ledger["stages"],
        train_yaml=ledger["train_yaml"],
        samples=ledger["samples"],
    )


def write_report_again(directory: Path) -> Path:
    """Write the page of a run from its ledger.json alone. Returns its path. Raises UserError if that cannot be read."""
    path, place = directory / "ledger.json", directory / "report.html"
    try:
        write_report(place, orjson.loads(path.read_bytes()))
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no ledger of fastft distill ({first_line(error)})") from None
    return place


def _lede(ledger: dict[str, Any]) -> str:
    """The result in a sentence or two."""
    kept = [f"{each['kept']:,} of {each['planned']:,} answers of {each['name']}" for each in ledger["teachers"]]
    cost = f" All in all, ${ledger['usd']:,.2f} was spent here." if ledger["usd"] else ""
    return f"{' and '.join(kept)} are good to learn from.{cost}"


def _ended(teacher: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a waterfall: what was planned, what each reason took away, and what is kept."""
    scale = 100 / max(teacher["planned"], 1)
    left, rows = teacher["planned"], [("input", "planned", teacher["planned"], 0)]
    for status in STATUSES[1:]:
        for reason, count in teacher["reasons"].get(status, {}).items():
            left -= count
            rows.append(("reason", f"{status}: {reason}" if reason else status, count, left))
    rows.append(("kept", "kept", teacher["kept"], 0))
    return [
        {"kind": kind, "label": label, "count": count, "left": begin * scale, "bar": count * scale}
        | {"share": count / teacher["planned"] if teacher["planned"] else None}
        for kind, label, count, begin in rows
    ]


def _collections(teachers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each collection and teacher."""
    names = sorted({name for each in teachers for name in each["collections"]})
    return [
        {"collection": name, "teacher": each["name"], **dict.fromkeys(STATUSES, 0), **each["collections"][name]}
        for name in names
        for each in teachers
        if name in each["collections"]
    ]


def _lengths(teachers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each message, with the lengths of every teacher's answers and bars for their medians."""
    names = sorted({name for each in teachers for name in each["lengths"]})
    longest = max((each["lengths"][name]["p90"] for each in teachers for name in each["lengths"]), default=0) or 1
    rows = []
    for name in names:
        for each in teachers:
            if found := each["lengths"].get(name):
                bars = {"bar": 100 * found["median"] / longest, "reach": 100 * found["p90"] / longest}
                rows.append({"message": name, "teacher": each["name"], **found, **bars})
    return rows


def _messages(counts: dict[str, dict[str, int]]) -> list[tuple[str, str, int, float]]:
    """(collection, message, queries, share of the collection)."""
    return [
        (collection, message, count, count / sum(by_message.values()))
        for collection, by_message in counts.items()
        for message, count in by_message.items()
    ]


def _checked(teachers: list[dict[str, Any]]) -> list[tuple[str, str, int, int]]:
    """(teacher, collection, answers compared with a gold answer, those that are right)."""
    return [
        (each["name"], name, found["checked"], found["right"])
        for each in teachers
        for name, found in each["collections"].items()
        if found["checked"]
    ]
