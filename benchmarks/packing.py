"""How full packed rows of real conversations are, and how their number compares with the least that any plan could need.

    python benchmarks/packing.py [DUMP ...] [--seq_lens 2048 4096 8192]

DUMP is a ShareGPT file (by default: the sample of ShareGPT V3 in $FASTFT_DATA). It is cleaned, split at each sequence length
with a byte-level BPE tokenizer that is trained on it, and packed. For comparison: the share of tokens in rows of one
conversation each, which a trainer without packing computes.
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import fastft.demo.run
from cleaning.pipeline import clean
from fastft.common.command_line import option, parse, run
from fastft.data.conversation import read_conversations
from fastft.data.dataset import tokenized
from fastft.data.packing import lower_bound, pack
from fastft.data.template.chat_template import load_template

SAMPLE = Path(os.environ.get("FASTFT_DATA", "data")) / "chats/sharegpt_v3_sample.json"


@dataclass
class PackingConfig:
    """What to pack."""

    dumps: list[str] = option([str(SAMPLE)], several=True, positional=True)
    """ShareGPT files; by default the sample in $FASTFT_DATA."""
    seq_lens: list[int] = option([2048, 4096, 8192], several=True)
    """Sequence lengths to pack for."""


def main() -> None:
    [options] = parse(sys.argv[1:], "benchmarks/packing.py", __doc__.splitlines()[0], PackingConfig)
    fastft.demo.run.VOCABULARY = 16384
    table = Table(title=f"Packing {', '.join(options.dumps)}")
    for column in (
        "seq_len",
        "parts",
        "tokens",
        "rows",
        "lower bound",
        "rows / bound",
        "fill",
        "fill without packing",
        "seconds",
    ):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as work:
        os.environ["FASTFT_CACHE"] = f"{work}/cache"
        clean(options.dumps, f"{work}/whole")
        fastft.demo.run.make_base_model(read_conversations(f"{work}/whole/conversations.jsonl"), Path(work) / "model")
        for seq_len in options.seq_lens:
            table.add_row(*measure(options.dumps, seq_len, work))
    Console(width=110).print(table)


def measure(dumps: list[str], seq_len: int, work: str) -> list[str]:
    """One row of the table."""
    report = clean(dumps, f"{work}/{seq_len}", max_tokens=seq_len, model=f"{work}/model")
    lengths = tokenized(f"{work}/{seq_len}/conversations.jsonl", load_template(f"{work}/model")).lengths
    began = time.perf_counter()
    rows, bound = pack(lengths, seq_len, 0, 0), lower_bound(lengths, seq_len)
    seconds = time.perf_counter() - began
    alone = lengths.sum() / (len(lengths) * seq_len)
    values = (seq_len, report.parts, lengths.sum(), len(rows), bound)
    shares = (
        f"{len(rows) / bound:.4f}",
        f"{lengths.sum() / (len(rows) * seq_len):.2%}",
        f"{alone:.1%}",
        f"{seconds:.3f}",
    )
    return [*(f"{v:,}" for v in values), *shares]


if __name__ == "__main__":
    raise SystemExit(run(main))
