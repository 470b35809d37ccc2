"""The whole cleaning pass beside FastChat's, on the same dump and the same cores: convert, filter, deduplicate, split.

    pip install --target DIR --no-deps fschat==0.2.36 markdownify==0.11.6
    python benchmarks/clean_pass.py --fastchat DIR [--copies 8] [--window 2048]

The dump is made of the pages in $FASTFT_DATA (default: data/): several copies of each, three words in ten replaced, so that
they are no near duplicates; as a JSON array. The tokenizer (byte-level BPE of 32,000) is trained on it, its template is Vicuna's.

FastChat's pass is its own commands one after the other, as its documentation chains them: clean_sharegpt, optional_clean
--keep-lang en, split_long_conversation. Its optional_clean asks polyglot for the language, which asks pycld2; polyglot
needs ICU's headers to build, so that pycld2 is asked directly here, which is in FastChat's favour. Its near duplicates
are none: it compares ids and first rounds. Ours runs with near duplicates and the language filter on.

Contestants take turns, each in processes of its own; the best of three passes counts. Rounds are counted in what comes out.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

DATA = Path(os.environ.get("FASTFT_DATA", "data")) / "chats"

# Stands for polyglot, whose detector is pycld2's answer in a class.
POLYGLOT = """
import pycld2
class UnknownLanguage(Exception): pass
class Detector:
    def __init__(self, text):
        reliable, _, found = pycld2.detect(text)
        if not reliable:
            raise UnknownLanguage(text[:20])
        self.language = type("Language", (), {"code": found[0][1]})
"""


def make_dump(path: Path, copies: int) -> int:
    """Returns the number of conversations."""
    choose = random.Random(0)
    records = [
        json.loads(line)
        for name in ("generated", "rendered")
        for line in (DATA / f"{name}_html_with_truth.jsonl").open(encoding="utf-8")
    ]
    words = sorted({word for record in records for turn in record["conversations"] for word in _words(turn["value"])})

    def changed(text: str) -> str:
        return re.sub(
            r"(?<![\w&<\"=/.-])[a-z]{3,}(?![\w;>\"=/-])",
            lambda m: m[0] if choose.random() < 0.7 else choose.choice(words),
            text,
        )

    dump = []
    for copy in range(copies):
        for record in records:
            turns = [
                {"from": t["from"], "value": changed(t["value"]) if copy else t["value"]}
                for t in record["conversations"]
            ]
            dump.append({"id": f"{record['id']}-{copy}", "conversations": turns})
    path.write_text(json.dumps(dump), encoding="utf-8")
    return len(dump)


def _words(html: str) -> list[str]:
    return re.findall(r"\b[a-z]{4,12}\b", re.sub("<[^>]*>", " ", html))


def train_tokenizer(dump: Path, directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = (
        re.sub("<[^>]*>", " ", t["value"]) for record in json.loads(dump.read_text()) for t in record["conversations"]
    )
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)


def fastft(dump: Path, tokenizer: Path, out: Path, window: int) -> Path:
    command = [
        sys.executable,
        "-m",
        "cleaning",
        dump,
        "-o",
        out,
        "--languages",
        "en",
        "--max_tokens",
        str(window),
        "--model",
        tokenizer,
    ]
    subprocess.run([*command, "--template", "vicuna"], check=True, stdout=subprocess.DEVNULL)
    return out / "conversations.jsonl"


def fastchat(package: Path, dump: Path, tokenizer: Path, out: Path, window: int) -> Path:
    out.mkdir()
    stub = out / "stub/polyglot"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    (stub / "detect").mkdir()
    (stub / "detect/__init__.py").write_text("from . import base\nfrom .base import Detector, UnknownLanguage\n")
    (stub / "detect/base.py").write_text(POLYGLOT)
    path = os.pathsep.join([str(package), str(stub.parent)])
    last = dump
    for module, options in (
        ("clean_sharegpt", ()),
        ("optional_clean", ("--keep-lang", "en")),
        ("split_long_conversation", ("--model-name-or-path", tokenizer, "--max-length", str(window))),
    ):
        made = out / f"{module}.json"
        command = [sys.executable, "-m", f"fastchat.data.{module}", "--in-file", last, "--out-file", made, *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, **quiet)
        last = made
    return last


def rounds(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    turns = [turn for record in records for turn in record.get("messages") or record["conversations"]]
    return sum(turn.get("role", turn.get("from")) in ("assistant", "gpt") and turn.get("train", True) for turn in turns)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fastchat", type=Path, required=True, metavar="DIR")
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--passes", type=int, default=3)
    arguments = parser.parse_args()
    if not DATA.is_dir():
        print(f"no data at {DATA}: set FASTFT_DATA to the directory that holds chats/", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        dump, tokenizer = work / "dump.json", work / "tokenizer"
        count = make_dump(dump, arguments.copies)
        train_tokenizer(dump, tokenizer)
        contestants: dict[str, Callable[[Path], Path]] = {
            "FastChat": lambda out: fastchat(arguments.fastchat.resolve(), dump, tokenizer, out, arguments.window),
            "fastft": lambda out: fastft(dump, tokenizer, out, arguments.window),
        }
        seconds, kept = dict.fromkeys(contestants, float("inf")), {}
        for number in range(arguments.passes):
            for contestant, run in contestants.items():
                began = time.monotonic()
                made = run(work / f"{contestant}{number}")
                seconds[contestant] = min(seconds[contestant], time.monotonic() - began)
                kept[contestant] = rounds(made)
        megabytes = dump.stat().st_size / 1e6
        table = Table(
            title=f"{count:,} conversations, {megabytes:.0f} MB, window {arguments.window}, {os.cpu_count()} cores",
            title_justify="left",
        )
        table.add_column("")
        for column in ("seconds", "conversations/s", "MB/s", "ratio", "answers that come out"):
            table.add_column(column, justify="right")
        for contestant, took in seconds.items():
            ratio = seconds["FastChat"] / took
            table.add_row(
                contestant,
                f"{took:.1f}",
                f"{count / took:,.0f}",
                f"{megabytes / took:.1f}",
                f"{ratio:.1f}x",
                f"{kept[contestant]:,}",
            )
        Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
