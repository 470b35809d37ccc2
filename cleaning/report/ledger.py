"""The ledger of a run: what was read, what was rejected and why, and what was kept. report.json holds it as JSON, and the
terminal shows it as a table.
"""

import contextlib
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

import fastft
from cleaning.sources.eras import EraDecision
from cleaning.sources.formats import Reading
from fastft.errors import UserError

CHANGED_IDS = "ids that another conversation had, changed"  # a note


@dataclass
class Report:
    """The ledger of a run. Its two laws: `input` = `kept` + the sum of `rejected`, and rounds in = rounds kept + rejected.

    `input` counts the conversations found in the dumps (a tree may give several); a record without any counts as one.
    """

    input: int = 0
    kept: int = 0  # conversations
    rejected: dict[str, int] = field(default_factory=dict)  # by reason
    parts: int = 0  # lines of conversations.jsonl
    unfinished_parts: int = 0  # parts whose last answer continues in the next part
    # Held-out conversations, which are included in `kept`, and their parts, which are not included in `parts`.
    held_out: dict[str, int] = field(default_factory=lambda: {"conversations": 0, "parts": 0})
    duplicates: dict[str, Any] = field(default_factory=dict)  # how they were found, and the largest clusters
    contamination: dict[str, Any] = field(default_factory=dict)  # by benchmark
    repairs: dict[str, int] = field(default_factory=dict)  # turns changed, rounds dropped, in kept conversations
    # Rounds given to the splitter. Rounds with a shortened question count as kept.
    rounds: dict[str, int] = field(default_factory=lambda: {"in": 0, "kept": 0, "rejected": 0, "shortened": 0})
    # Answers of the kept conversations, by the form in which they were shared, and those that are not trained or were cut.
    answers: dict[str, int] = field(default_factory=lambda: {"html": 0, "as_is": 0})
    marked: dict[str, int] = field(default_factory=lambda: {"not_learned": 0, "cut": 0})
    warnings: list[str] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)  # turns before and after conversion
    files: list[dict[str, Any]] = field(default_factory=list)  # {"name", "path", "bytes", "records", "input", "era"}
    formats: dict[str, int] = field(default_factory=dict)  # conversations found, by format
    notes: dict[str, int] = field(default_factory=dict)  # what readers left out or changed, in all conversations found
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def check(self) -> None:
        """Assert that nothing was lost or counted twice."""
        assert self.input == self.kept + sum(self.rejected.values()), self
        assert self.rounds["in"] == self.rounds["kept"] + self.rounds["rejected"], self
        assert self.input == sum(file["input"] for file in self.files), self


def versions() -> dict[str, str]:
    """Versions of everything that the result depends on."""
    packages = (
        "lxml", "beautifulsoup4", "markdownify", "rensa", "pycld2", "ahocorasick_rs", "tokenizers", "transformers",
    )  # fmt: skip
    installed = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return {"fastft": fastft.__version__, "python": platform.python_version(), **installed}


def read_ledger(directory: Path) -> dict[str, Any]:
    """Return the report.json of a finished run. Raises UserError if there is none, or one of another cleaner's version."""
    path = directory / "report.json"
    try:
        ledger = orjson.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; name the -o directory of a finished run") from None
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: is damaged ({error}); run the cleaner again") from None
    if not isinstance(ledger, dict) or "examples" not in ledger:
        raise UserError(f"{path}: was written by another version of the cleaner; run it again")
    return ledger


def reading_of(ledger: dict[str, Any], where: str) -> Reading:
    """Return how the record at `where` was read, by what the ledger says about its file."""
    files = [file for file in ledger["files"] if where == file["name"] or where.startswith(file["name"] + ": ")]
    era = max(files, key=lambda file: len(file["name"]))["era"] if files else EraDecision().to_dict()
    settings = ledger["settings"]
    return Reading(
        settings["format"], settings["every_branch"], EraDecision(**{**era, "reasons": tuple(era["reasons"])})
    )


class _OutputConsole(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich itself would end the process with exit code 1


def output_console() -> Console:
    """Return the console for results, on stdout. Once its reader has left (`| head`), it raises BrokenPipeError as print does."""
    return _OutputConsole()


def print_ledger(report: Report, console: Console) -> None:
    """Print the ledger as a table: what was read, what was rejected and why, and what was kept."""
    table = Table(title="Cleaning", title_justify="left", show_header=False, title_style="bold")
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")

    def share(count: int) -> str:
        return f"{100 * count / report.input:.1f} %" if report.input else ""

    table.add_row("conversations in", f"{report.input:,}", "")
    for reason, count in sorted(report.rejected.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(f"  - {reason}", f"{count:,}", share(count), style="yellow")
    table.add_row("conversations kept", f"{report.kept:,}", share(report.kept), style="bold green")
    if report.settings.get("max_tokens"):
        table.add_row(f"parts of at most {report.settings['max_tokens']:,} tokens", f"{report.parts:,}", "")
        table.add_row("parts that end before their answer", f"{report.unfinished_parts:,}", "", style="dim")
        table.add_row("rounds with a shortened question", f"{report.rounds['shortened']:,}", "", style="dim")
        table.add_row("rounds over the limit", f"{report.rounds['rejected']:,}", "")
    if report.held_out["conversations"]:
        count = report.held_out["conversations"]
        table.add_row("conversations held out", f"{count:,}", share(count))
    for name, found in report.contamination.items():
        hit = f"benchmark {name}: {found['items_hit']:,} of {found['items']:,} items found, in conversations"
        table.add_row(hit, f"{found['conversations']:,}", share(found["conversations"]))
    if count := report.notes.get(CHANGED_IDS):
        table.add_row(CHANGED_IDS, f"{count:,}", "", style="dim")
    for name, count in report.repairs.items():
        table.add_row(f"turns repaired: {name}", f"{count:,}", "", style="dim")
    table.add_row("answers converted from HTML", f"{report.answers['html']:,}", "", style="dim")
    table.add_row("answers left as they were", f"{report.answers['as_is']:,}", "", style="dim")
    for name, about in (("not_learned", "not to learn from"), ("cut", "cut before their end")):
        if count := report.marked[name]:
            table.add_row(f"answers {about}", f"{count:,}", "")
    for name, count in report.notes.items():
        if name != CHANGED_IDS:
            table.add_row(f"read: {name}", f"{count:,}", "", style="dim")
    console.print(table)
