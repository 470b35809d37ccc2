"""How much of a conversation survives the cleaner, and how fast: measured on pages whose markdown is known.

    python benchmarks/clean.py            the corpora are in $FASTFT_DATA (default: data/)

    pip install --target DIR --no-deps fschat==0.2.36 markdownify==0.11.6
    python benchmarks/clean.py --fastchat DIR        FastChat's original functions over the same turns, in the same run

There are two corpora. `generated` is page HTML made from known markdown: all code-block shapes, formulas, tables, nested lists.
`rendered` is answers of real conversations rendered to the page's HTML. Both give the true markdown turn by turn.

Answers are compared after `normalised`: trailing spaces, runs of blank lines outside code and the bullet character do
not count, because the page does not say what they were. Code blocks are compared byte for byte, as a CommonMark parser
(markdown-it-py) reads them from both texts; the one line end before the closing fence belongs to the fence (an answer
cut inside a block has neither, and its page cannot say so). A human turn is intact if nothing but white space at its
ends changed. FastChat pushes human turns through its HTML converter too, so they go through it here.

Speed is of the conversion alone, CPU time, the best of five passes over all answers, contestants in turns.
"""

import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from rich.console import Console
from rich.table import Table

from cleaning.html.markdown import html_to_markdown
from cleaning.sources.formats import conversations_in
from cleaning.sources.turns import Turn
from fastft.common.command_line import parse, run
from fastft.errors import UserError

DATA = Path(os.environ.get("FASTFT_DATA", "data")) / "chats"
_FENCE = re.compile(r"[ >]*(`{3,})")
_BULLET = re.compile(r"^([ >]*)[*+-] ")


@dataclass
class CleanBenchmark:
    """Options of this benchmark."""

    fastchat: Path | None = None
    """Where fschat and its markdownify are installed, to measure FastChat's functions, too."""


@dataclass
class Contestant:
    """`answer` makes markdown of an answer's HTML; `human` makes of a human turn what would be trained on."""

    name: str
    answer: Callable[[str], str]
    human: Callable[[str], str]


OURS = Contestant("fastft", html_to_markdown, lambda text: text)
REFERENCE = Contestant("its reference", lambda html: html_to_markdown(html, reference=True), lambda text: text)


@dataclass
class Fidelity:
    """Counts over one corpus."""

    answers: int = 0
    answers_exact: int = 0
    code_blocks: int = 0
    code_blocks_exact: int = 0
    human_turns: int = 0
    human_turns_intact: int = 0


def turns(path: Path) -> Iterator[tuple[Turn, str]]:
    """(turn as the cleaner reads it, its truth) for all turns of a corpus."""
    for line in path.open(encoding="utf-8"):
        record = json.loads(line)
        truths = iter(record.get("truth") or record["truth_gpt"])
        for turn, shared in zip(conversations_in(record)[0].turns, record["conversations"]):
            is_human = turn.role == "user"
            assert turn.html != is_human, f"{record['id']}: what is HTML was not recognised"
            yield turn, shared["value"] if is_human and "truth" not in record else next(truths)


def measure(path: Path, contestant: Contestant = OURS) -> Fidelity:
    """Convert every turn of `path` and compare it with the truth in the same record."""
    result = Fidelity()
    for turn, truth in turns(path):
        if turn.role == "user":
            result.human_turns += 1
            result.human_turns_intact += contestant.human(turn.text).strip() == truth.strip()
            continue
        markdown = contestant.answer(turn.text)
        result.answers += 1
        result.answers_exact += normalised(markdown) == normalised(truth)
        expected, found = code_blocks(truth), code_blocks(markdown)
        result.code_blocks += len(expected)
        result.code_blocks_exact += sum(a == b for a, b in zip(expected, found)) if len(expected) == len(found) else 0
    return result


def speeds(path: Path, contestants: list[Contestant]) -> list[float]:
    """MB of HTML that each contestant converts in a second."""
    answers = [turn.text for turn, _ in turns(path) if turn.html]
    seconds = [float("inf")] * len(contestants)
    for _ in range(5):
        for number, contestant in enumerate(contestants):
            begin = time.process_time()
            for answer in answers:
                contestant.answer(answer)
            seconds[number] = min(seconds[number], time.process_time() - begin)
    megabytes = sum(len(answer.encode()) for answer in answers) / 1e6
    return [megabytes / s for s in seconds]


def load_fastchat(directory: Path) -> Contestant:
    """FastChat's converter as it is in `directory`, with the markdownify it was written for (ours is another)."""
    ours = sys.modules.pop("markdownify")
    sys.path.insert(0, str(directory))
    try:
        from fastchat.data import clean_sharegpt
    finally:
        sys.path.remove(str(directory))
        sys.modules["markdownify"] = ours
    assert clean_sharegpt.markdownify is not ours, f"no markdownify in {directory}"
    return Contestant("FastChat", clean_sharegpt.html_to_markdown, clean_sharegpt.html_to_markdown)


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


def main() -> None:
    [options] = parse(sys.argv[1:], "benchmarks/clean.py", __doc__.splitlines()[0], CleanBenchmark)
    if not DATA.is_dir():
        raise UserError(f"{DATA}: no such directory; set FASTFT_DATA to the directory that holds chats/")
    contestants = [OURS, REFERENCE]
    if options.fastchat:
        warnings.simplefilter("ignore")  # Beautiful Soup about human turns that look like file names
        contestants.insert(0, load_fastchat(options.fastchat))
    for corpus in ("generated", "rendered"):
        path = DATA / f"{corpus}_html_with_truth.jsonl"
        table = Table(title=f"{corpus.capitalize()} pages", title_justify="left")
        table.add_column("")
        for column in ("answers exact", "code blocks exact", "human turns intact", "MB/s", "ratio"):
            table.add_column(column, justify="right")
        rates = speeds(path, contestants)
        for contestant, rate in zip(contestants, rates):
            f = measure(path, contestant)
            table.add_row(
                contestant.name,
                _share(f.answers_exact, f.answers),
                _share(f.code_blocks_exact, f.code_blocks),
                _share(f.human_turns_intact, f.human_turns),
                f"{rate:.2f}",
                f"{rate / rates[0]:.1f}x",
            )
        Console().print(table)


def _share(count: int, total: int) -> str:
    return f"{count} / {total} = {100 * count / total:.2f} %"


if __name__ == "__main__":
    sys.exit(run(main))
