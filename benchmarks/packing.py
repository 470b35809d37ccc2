"""How full the packed rows are, on real conversations, beside the least number of rows that any plan could need.

    python benchmarks/packing.py [DUMP] [--seq_lens 2048 4096 8192]

DUMP is a ShareGPT file (default: the sample of ShareGPT V3 in $FASTFT_DATA). It is cleaned and split at each window with
a byte-level BPE tokenizer trained on it, then packed. Padding to the longest conversation of a batch is shown for
comparison: what a trainer without packing computes.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import fastft.demo.run
from cleaning.pipeline import clean
from fastft.data.conversation import read_conversations
from fastft.data.dataset import tokenized
from fastft.data.packing import lower_bound, pack
from fastft.data.template.chat_template import load_template

SAMPLE = Path(os.environ.get("FASTFT_DATA", "data")) / "chats/sharegpt_v3_sample.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("dump", nargs="?", default=str(SAMPLE))
    parser.add_argument("--seq_lens", nargs="+", type=int, default=[2048, 4096, 8192])
    options = parser.parse_args()
    fastft.demo.run.VOCABULARY = 16384
    table = Table(title=f"Packing {options.dump}")
    for column in (
        "window",
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
        clean([options.dump], f"{work}/whole")
        fastft.demo.run.make_base_model(read_conversations(f"{work}/whole/conversations.jsonl"), Path(work) / "model")
        for window in options.windows:
            table.add_row(*measure(options.dump, window, work))
    Console(width=110).print(table)


def measure(dump: str, window: int, work: str) -> list[str]:
    """One row of the table."""
    report = clean([dump], f"{work}/{window}", max_tokens=window, model=f"{work}/model")
    lengths = tokenized(f"{work}/{window}/conversations.jsonl", load_template(f"{work}/model")).lengths
    began = time.perf_counter()
    rows, bound = pack(lengths, window, 0, 0), lower_bound(lengths, window)
    seconds = time.perf_counter() - began
    alone = lengths.sum() / (len(lengths) * window)
    values = (window, report.parts, lengths.sum(), len(rows), bound)
    shares = (
        f"{len(rows) / bound:.4f}",
        f"{lengths.sum() / (len(rows) * window):.2%}",
        f"{alone:.1%}",
        f"{seconds:.3f}",
    )
    return [*(f"{v:,}" for v in values), *shares]


if __name__ == "__main__":
    main()
