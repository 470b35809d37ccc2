"""The page that tells what a cleaning run did: `write_report` writes report.html beside report.json.

    python -m cleaning.report DIR      writes it again from the files of a finished run

Everything on it comes from those files, each read once as a stream. It uses no clock and no random numbers, so the same
files give the same page, byte for byte. This module prepares the numbers; the template cleaning.html.jinja and, for all
pages of the project, `fastft.common.html` say what they look like.
"""

from pathlib import Path
from typing import Any

from cleaning.report.figures import Kept
from cleaning.report.ledger import read_ledger
from cleaning.report.masking import clip, mask_all
from cleaning.report.rejections import DESCRIPTIONS, Rejected
from fastft.common.html import compact, flatten, funnel, percent, write_page
from fastft.common.workers import Pool

LONGEST_VALUE = 300  # characters of a setting


def write_report(directory: Path, ledger: dict[str, Any] | None = None, pool: Pool | None = None) -> Path:
    """Write `directory`/report.html from the other outputs there, and return its path.

    `ledger` is what report.json will hold, if it is not written yet. With `pool`, its processes count what is kept, which
    does not change the page. Raises UserError if the directory does not hold the outputs of a finished run.
    """
    ledger = read_ledger(directory) if ledger is None else ledger
    largest = ledger["duplicates"].get("largest", [])
    kept, rejected = Kept(directory, {cluster["kept"] for cluster in largest}, pool), Rejected(directory)
    reasons, rounds = (rejected.reasons(ledger, of_rounds) for of_rounds in (False, True))
    clusters = [{**mask_all(cluster), "text": kept.beginnings.get(cluster["kept"], "")} for cluster in largest]
    ledger = {name: mask_all(value) if name != "versions" else value for name, value in ledger.items()}
    files = ledger["files"]
    write_page(
        directory / "report.html",
        Path(__file__).with_name("cleaning.html.jinja"),
        title=f"The cleaning of {files[0]['name'] if len(files) == 1 else f'{len(files):,} inputs'}",
        ledger=ledger,
        totals=_totals(ledger, kept),
        funnel=_funnel(ledger, reasons),
        about_parts=_about_parts(ledger),
        reasons=reasons,
        rounds=rounds,
        plots=kept.plots(),
        charts=kept.charts(ledger),
        repairs=_repairs(ledger),
        clusters=clusters,
        settings=[(name, clip(value, LONGEST_VALUE)) for name, value in flatten(ledger["settings"])],
        versions=_versions(ledger),
        size=_size,
    )
    return directory / "report.html"


def _totals(ledger: dict[str, Any], kept: Kept) -> list[tuple[str, str, str]]:
    """Return (label, value, note) of the figures at the top of the page."""
    answers, held = ledger["answers"], ledger["held_out"]["conversations"]
    totals = [
        (
            "Conversations in",
            f"{ledger['input']:,}",
            f"from {sum(file['records'] for file in ledger['files']):,} records",
        ),
        ("Kept", f"{ledger['kept']:,}", percent(ledger["kept"] / ledger["input"]) if ledger["input"] else ""),
        ("Parts to train on", f"{ledger['parts']:,}", _limit(ledger)),
        ("Characters", compact(kept.lengths["answers"].total + kept.lengths["questions"].total), "kept"),
        ("Answers from HTML", f"{answers['html']:,}", f"{answers['as_is']:,} left as they were"),
    ]
    return totals + ([("Held out", f"{held:,}", f"{ledger['held_out']['parts']:,} parts")] if held else [])


def _versions(ledger: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, version) of what this run has used."""
    unused = () if ledger["settings"]["max_tokens"] else ("tokenizers", "transformers")
    return [(name, version) for name, version in ledger["versions"].items() if name not in unused]


def _limit(ledger: dict[str, Any]) -> str:
    limit = ledger["settings"].get("max_tokens")
    return f"of at most {limit:,} tokens" if limit else "not split"


def _funnel(ledger: dict[str, Any], reasons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the funnel chart.

    Parts are left out, because there can be ten times as many, which would make all other bars too short.
    """
    anchors = {reason["label"]: reason["anchor"] for reason in reasons}
    rows = [row for row in funnel({**ledger, "parts": 0}) if row["kind"] != "parts"]
    return [{**row, "anchor": anchors.get(row["label"]) if row["kind"] == "reason" else None} for row in rows]


def _about_parts(ledger: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what became of the conversations that are kept, as (what, how many), without zeros."""
    rounds = ledger["rounds"]
    counts = [
        ("rounds longer than --max_tokens", rounds["rejected"]),
        ("questions that lost their middle, to fit", rounds["shortened"]),
        ("parts that end before their answer does", ledger["unfinished_parts"]),
        ("conversations set aside in conversations.holdout.jsonl", ledger["held_out"]["conversations"]),
    ]
    of_parts = [("rounds in the parts", f"{rounds['kept']:,} of {rounds['in']:,}")]
    if ledger["settings"]["max_tokens"] is None:
        of_parts = []
    return of_parts + [(what, f"{count:,}") for what, count in counts if count]


def _repairs(ledger: dict[str, Any]) -> list[tuple[str, str, int]]:
    """Return (name, what it does, turns changed) of the repairs. Dropped rounds have a section of their own on the page."""
    repairs = ((name, count) for name, count in ledger["repairs"].items() if not name.startswith("dropped_rounds:"))
    return [(name.replace("_", " "), DESCRIPTIONS.get(name, ""), count) for name, count in repairs]


def _size(count: int) -> str:
    """Return a number of bytes as text: 512 B, 3.5 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,} B"
