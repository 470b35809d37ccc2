"""The whole cleaning pass beside FastChat's, on the same dump and the same cores: convert, filter, deduplicate, split.

    python3 -m venv FASTCHAT
    FASTCHAT/bin/pip install transformers==4.34.1 sentencepiece "numpy<2" "protobuf<5" tqdm pycld2 beautifulsoup4 six
    FASTCHAT/bin/pip install --no-deps fschat==0.2.36 markdownify==0.11.6
    python benchmarks/clean_pass.py --fastchat FASTCHAT [--copies 384] [--passes 1] [--seq_len 2048]

FastChat has an environment of its time, because its pass asks for a slow tokenizer, which is what Llama's was then. The
tokenizer is Llama's kind, SentencePiece BPE of 32,000 with byte fallback, trained on the dump's beginning; ours is the same as
tokenizer.json, with Vicuna's template.

The dump is made of the pages in $FASTFT_DATA (default: data/): several copies of each, three words in ten replaced, so that
they are no near duplicates; as a JSON array. 384 copies are 1.1 GB and take 20 minutes (the public raw dump, sharegpt-raw in
iamplus/Conversation_Repo, has 1.8 GB). With few copies it is mostly start-up that is compared: 7 s of CPU of ours.

FastChat's pass is its own commands one after the other, as its documentation chains them: clean_sharegpt, optional_clean
--keep-lang en, split_long_conversation. Its optional_clean asks polyglot for the language, which asks pycld2; polyglot
needs ICU's headers to build, so that pycld2 is asked directly here, which is in FastChat's favour. Its near duplicates
are none: it compares ids and first rounds. Ours runs with near duplicates and the language filter on.

Contestants take turns, each in processes of its own; their passes are added up. Beside them a fixed loop of Python tells how
fast the machine is (see `Speed`), and a second ratio has that taken out. Answers are counted in what comes out.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastft.common.command_line import parse, run
from fastft.errors import UserError

TRAINED_ON = 20_000  # conversations: more copies hold the same words
DATA = Path(os.environ.get("FASTFT_DATA", "data")) / "chats"


@dataclass
class CleanPassBenchmark:
    """Options of this benchmark."""

    fastchat: Path
    """FastChat's environment, made as described in this file."""
    copies: int = 384
    """Copies of each page in the dump."""
    max_tokens: int = 2048
    """The longest part, in tokens."""
    passes: int = 1
    """Passes of each contestant."""


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
        return re.sub(  # never inside a tag: without its class, an answer is no page's any more
            r"<[^<>]*>|(?<![\w&<\"=/.-])[a-z]{3,}(?![\w;>\"=/-])",
            lambda m: m[0] if m[0][0] == "<" or choose.random() < 0.7 else choose.choice(words),
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


TRAIN = """
import sys
import sentencepiece
from transformers import LlamaTokenizer, LlamaTokenizerFast
text, out = sys.argv[1:]
sentencepiece.SentencePieceTrainer.train(
    input=text, model_prefix=out + "/tokenizer", model_type="bpe", vocab_size=32000, byte_fallback=True, split_digits=True,
    add_dummy_prefix=True, normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
    max_sentence_length=1000000, num_threads=2, minloglevel=2)
LlamaTokenizer(out + "/tokenizer.model", legacy=False).save_pretrained(out)
LlamaTokenizerFast.from_pretrained(out).save_pretrained(out + "/fast")
"""


def train_tokenizer(python: Path, dump: Path, directory: Path) -> None:
    """Writes Llama's slow tokenizer, and the same as tokenizer.json in its folder `fast`."""
    directory.mkdir()
    records = json.loads(dump.read_text(encoding="utf-8"))[:TRAINED_ON]
    texts = (re.sub("<[^>]*>", " ", turn["value"]) for record in records for turn in record["conversations"])
    (directory / "text").write_text("\n".join(texts), encoding="utf-8")
    command = [python, "-c", TRAIN, directory / "text", directory]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def fastft(dump: Path, tokenizer: Path, out: Path, max_tokens: int) -> Path:
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
        str(max_tokens),
        "--model",
        tokenizer / "fast",
    ]
    subprocess.run([*command, "--template", "vicuna"], check=True, stdout=subprocess.DEVNULL)
    return out / "conversations.jsonl"


def fastchat(python: Path, dump: Path, tokenizer: Path, out: Path, max_tokens: int) -> Path:
    out.mkdir()
    stub = out / "stub/polyglot"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    (stub / "detect").mkdir()
    (stub / "detect/__init__.py").write_text("from . import base\nfrom .base import Detector, UnknownLanguage\n")
    (stub / "detect/base.py").write_text(POLYGLOT)
    last = dump
    for module, options in (
        ("clean_sharegpt", ()),
        ("optional_clean", ("--keep-lang", "en")),
        ("split_long_conversation", ("--model-name-or-path", tokenizer, "--max-length", str(max_tokens))),
    ):
        made = out / f"{module}.json"
        command = [python, "-m", f"fastchat.data.{module}", "--in-file", last, "--out-file", made, *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(stub.parent)}, **quiet)
        last = made
    return last


class Speed(threading.Thread):
    """How fast the machine is meanwhile: the CPU time of a short fixed loop, once a second.

    Virtual machines change their speed by a half within minutes, unseen by `steal`. What a contestant took, divided by this, is
    free of that as far as its work is the interpreter's; how fast memory is, the loop does not see. 1 % of a core.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.loops, self.done = [], threading.Event()

    def run(self) -> None:
        while not self.loops or not self.done.wait(1):
            began = time.thread_time()
            sum(number * number % 7 for number in range(100_000))
            self.loops.append(time.thread_time() - began)

    def __enter__(self) -> "Speed":
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.done.set()
        self.join()

    @property
    def loop(self) -> float:
        """Seconds of the loop, on average."""
        return sum(self.loops) / len(self.loops)


def rounds(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    turns = [turn for record in records for turn in record.get("messages") or record["conversations"]]
    return sum(turn.get("role", turn.get("from")) in ("assistant", "gpt") and turn.get("train", True) for turn in turns)


def main() -> None:
    [options] = parse(sys.argv[1:], "benchmarks/clean_pass.py", __doc__.splitlines()[0], CleanPassBenchmark)
    if not DATA.is_dir():
        raise UserError(f"{DATA}: no such directory; set FASTFT_DATA to the directory that holds chats/")
    python = options.fastchat.absolute() / "bin/python"
    if not python.is_file():
        raise UserError(
            f"--fastchat {options.fastchat}: holds no bin/python; benchmarks/clean_pass.py says how to make it"
        )
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        dump, tokenizer = work / "dump.json", work / "tokenizer"
        count = make_dump(dump, options.copies)
        train_tokenizer(python, dump, tokenizer)
        contestants: dict[str, Callable[[Path], Path]] = {
            "FastChat": lambda out: fastchat(python, dump, tokenizer, out, options.max_tokens),
            "fastft": lambda out: fastft(dump, tokenizer, out, options.max_tokens),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        loops: dict[str, list[float]] = {name: [] for name in contestants}
        kept = {}
        for number in range(options.passes):
            for contestant, clean in contestants.items():
                began = time.monotonic()
                with Speed() as speed:
                    made = clean(work / f"{contestant}{number}")
                seconds[contestant].append(time.monotonic() - began)
                loops[contestant].append(speed.loop)
                took = f"{seconds[contestant][-1]:.1f} s, the fixed loop {1000 * speed.loop:.2f} ms"
                print(f"pass {number + 1}: {contestant} {took}", file=sys.stderr)
                kept[contestant] = rounds(made)
        megabytes = dump.stat().st_size / 1e6
        table = Table(
            title=f"{count:,} conversations, {megabytes:.0f} MB, at most {options.max_tokens} tokens, {os.cpu_count()} cores",
            title_justify="left",
        )
        table.add_column("")
        for column in ("seconds", "conversations/s", "MB/s", "ratio", "ratio at one speed", "answers that come out"):
            table.add_column(column, justify="right")
        total = {name: sum(each) for name, each in seconds.items()}
        in_loops = {name: sum(s / loop for s, loop in zip(seconds[name], loops[name])) for name in contestants}
        for contestant in contestants:
            took = total[contestant] / options.passes
            table.add_row(
                contestant,
                f"{took:.1f}",
                f"{count / took:,.0f}",
                f"{megabytes / took:.1f}",
                f"{total['FastChat'] / total[contestant]:.1f}x",
                f"{in_loops['FastChat'] / in_loops[contestant]:.1f}x",
                f"{kept[contestant]:,}",
            )
        Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(run(main))
