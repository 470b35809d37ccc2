"""How much of a conversation survives the cleaner, and how fast: measured on pages whose markdown is known.

    python benchmarks/clean.py            data in ../shared/data beside the repository, or in $FASTFT_DATA

Two corpora. `generated`: page HTML made from known markdown, all code-block shapes, formulas, tables, nested lists.
`rendered`: answers of real conversations rendered to the page's HTML. Both say what the truth is, turn by turn.

Answers are compared after `normalised`: trailing spaces, runs of blank lines outside code and the bullet character do
not count, because the page does not say what they were. Code blocks are compared byte for byte, as a CommonMark parser
(markdown-it-py) reads them from both texts; the one line end before the closing fence belongs to the fence (an answer
cut inside a block has neither, and its page cannot say so).
"""

import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from rich.console import Console
from rich.table import Table

from cleaning.markdown import html_to_markdown
from cleaning.sources import read_conversation

DATA = Path(os.environ.get("FASTFT_DATA", Path(__file__).parents[1] / "../shared/data")) / "chats"
_FENCE = re.compile(r"[ >]*(`{3,})")
_BULLET = re.compile(r"^([ >]*)[*+-] ")


@dataclass
class Fidelity:
    """Counts over one corpus; `megabytes` of HTML took `seconds` of CPU time to convert."""

    answers: int = 0
    answers_exact: int = 0
    code_blocks: int = 0
    code_blocks_exact: int = 0
    human_turns: int = 0
    human_turns_intact: int = 0
    megabytes: float = 0.0
    seconds: float = 0.0


def measure(path: Path) -> Fidelity:
    """Convert every turn of `path` as the cleaner does and compare it with the truth in the same record."""
    result = Fidelity()
    for line in path.open(encoding="utf-8"):
        record = json.loads(line)
        truths = iter(record.get("truth") or record["truth_gpt"])
        for turn, shared in zip(read_conversation(record).turns, record["conversations"]):
            if turn.role == "user":
                truth = next(truths) if "truth" in record else shared["value"]
                result.human_turns += 1
                result.human_turns_intact += turn.text == truth and not turn.html
                continue
            truth = next(truths)
            assert turn.html, f"{record['id']}: an answer was not recognised as HTML"
            begin = time.process_time()
            markdown = html_to_markdown(turn.text)
            result.seconds += time.process_time() - begin
            result.megabytes += len(turn.text.encode()) / 1e6
            result.answers += 1
            result.answers_exact += normalised(markdown) == normalised(truth)
            expected, found = code_blocks(truth), code_blocks(markdown)
            result.code_blocks += len(expected)
            result.code_blocks_exact += (
                sum(a == b for a, b in zip(expected, found)) if len(expected) == len(found) else 0
            )
    return result


def code_blocks(markdown: str) -> list[str]:
    """The text of each fenced code block, wherever it stands, without the line end before its closing fence."""
    return [token.content.removesuffix("\n") for token in MarkdownIt().parse(markdown) if token.type == "fence"]


def normalised(markdown: str) -> str:
    """`markdown` without trailing spaces, runs of blank lines outside code, and with `-` as the bullet."""
    lines, fence = [], None
    for line in markdown.strip().split("\n"):
        if fence is not None:
            fence = None if line.strip(" >") == fence else fence
            lines.append(line)
            continue
        found = _FENCE.match(line)
        fence = found.group(1) if found else None
        line = _BULLET.sub(r"\1- ", line.rstrip())
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines)


def main() -> int:
    if not DATA.is_dir():
        print(f"no data at {DATA}: set FASTFT_DATA to the directory that holds chats/", file=sys.stderr)
        return 1
    table = Table(title="Fidelity of the cleaner", title_justify="left")
    for column in ("corpus", "answers exact", "code blocks exact", "human turns intact", "MB/s of HTML, one core"):
        table.add_column(column, justify="left" if column == "corpus" else "right")
    for corpus in ("generated", "rendered"):
        f = measure(DATA / f"{corpus}_html_with_truth.jsonl")
        table.add_row(
            corpus,
            _share(f.answers_exact, f.answers),
            _share(f.code_blocks_exact, f.code_blocks),
            _share(f.human_turns_intact, f.human_turns),
            f"{f.megabytes / f.seconds:.2f}",
        )
    Console().print(table)
    return 0


def _share(count: int, total: int) -> str:
    return f"{count} / {total} = {100 * count / total:.2f} %"


if __name__ == "__main__":
    sys.exit(main())
