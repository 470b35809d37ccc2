"""`fastft demo`: the whole pipeline on a small dump that ships with the package.

It cleans 210 raw records that were written for this purpose (fastft/demo/make_dump.py), trains a tokenizer and, from
scratch, a Llama of about 2 million parameters on the result, and asks three questions before and after. It needs no network
and less than three minutes on two CPU cores. A model this small on a dump this small learns by heart, and the questions
show just that. A real run has the same stages; it differs in the model that it starts from and in the GPUs.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastft.common.command_line import parse, run_module
from fastft.common.files import make_directory
from fastft.data.conversation import Conversation, Message, read_conversations
from fastft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from cleaning.report.ledger import Report

HERE = Path(__file__).parent
MADE_BY_DEMO = ".demo"  # a file that says the directory may be replaced
SEQ_LEN = 512  # tokens in a packed row; two dialogues of the dump do not fit: one is split, the other rejected
VOCABULARY = 2048
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # of the chatml template
MODEL = {  # of transformers.LlamaConfig; small enough to learn the dump by heart in two minutes on two cores
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,  # 0.02 suits widths of thousands; here it would cost some epochs
}
# One row a step, because the number of steps counts here: 14 epochs end at a loss of 5 with four rows, at 0.2 with one.
TRAINING = [
    "--epochs", "16", "--global_batch_size", "1", "--optimizer.lr", "1.5e-3", "--optimizer.betas", "[0.9,0.95]",
    "--gradient_checkpointing", "false", "--checkpoint.every", "0", "--log_every", "5",
]  # fmt: skip
FILES = {
    "clean/conversations.jsonl": "the clean conversations",
    "clean/rejected.jsonl": "what was rejected, and why",
    "clean/report.json": "the ledger: input = kept + rejected",
    "clean/report.html": "the same with examples, on a page",
    "metrics.jsonl": "loss, learning rate and tokens/s of every step",
    "tensorboard/": "the same for TensorBoard",
    "config.yaml": "the training's configuration",
    "model/": "the model in Hugging Face's format",
    "report.html": "all of it on one page",
}
NEXT_STEPS = """
Look at it:    {directory}/report.html, in a browser
Talk to it:    fastft chat --model {directory}/model
Serve it:      fastft serve --model demo={directory}/model      (OpenAI's API and a page; pip install "fastft[serve]")

Then with a dump, a model and GPUs of your own:
  fastft clean DUMP.json -o data --model Qwen/Qwen2.5-7B --max_tokens 2048
  fastft estimate --model Qwen/Qwen2.5-7B --data data/conversations.jsonl
  torchrun --nproc-per-node 8 -m fastft.train --model Qwen/Qwen2.5-7B --data data/conversations.jsonl --output_dir runs/first"""


@dataclass
class DemoConfig:
    """Where the demo works."""

    output_dir: str = "runs/demo"
    """Directory for everything that the demo writes. One of an earlier demo is replaced, any other is refused."""


def main(argv: list[str] | None = None) -> int:
    """Run `fastft demo` and return the exit code."""
    description = "Clean a small dump, train a small model on it and ask it questions, in about two minutes on a CPU."
    [config] = parse(sys.argv[1:] if argv is None else argv, "fastft demo", description, DemoConfig)
    output_dir = Path(config.output_dir)
    if output_dir.exists() and not (output_dir / MADE_BY_DEMO).exists():
        raise UserError(f"output_dir: {output_dir} exists and was not made by the demo; choose another --output_dir")
    run(output_dir)
    return 0


def run(output_dir: Path) -> None:
    """Do every stage in order, in a new `output_dir`."""
    began = time.time()
    # Two threads are a third faster on an idle machine, but five times slower on a busy one, where they spin while waiting.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    shutil.rmtree(output_dir, ignore_errors=True)
    make_directory(output_dir)
    (output_dir / MADE_BY_DEMO).touch()
    os.environ.setdefault("FASTFT_CACHE", str(output_dir / "cache"))
    questions = json.loads((HERE / "questions.json").read_text())

    heading("1. Clean the raw dump")
    report = clean_dump(output_dir)

    heading("2. A model to start from: random weights, the dump's own tokenizer")
    before = ask_all(output_dir / "base", questions, max_new_tokens=32)

    heading("3. Train")
    train_model(output_dir)

    heading("4. The same questions, after training")
    after = ask_all(output_dir / "model", questions, max_new_tokens=300)
    print("\nThese answers are learned by heart from the dump; a model of 2 million parameters can do no more.")

    write_html(output_dir, report, questions, before, after)
    heading(f"Done in {time.time() - began:.0f} s. What it left")
    for name, what in FILES.items():
        print(f"  {output_dir / name!s:<36} {what}")
    print(NEXT_STEPS.format(directory=output_dir))


def clean_dump(output_dir: Path) -> "Report":
    """Clean the dump and make the base model; return the cleaner's report.

    It is cleaned twice: first without splitting, to get text for training a tokenizer, then split into parts of SEQ_LEN
    tokens of that tokenizer. Users who start from a model have its tokenizer and clean once.
    """
    from rich.console import Console

    from cleaning.pipeline import clean
    from cleaning.report.ledger import print_ledger

    dump, phrases = HERE / "dump.json", (HERE / "blocked_phrases.txt").read_text().splitlines()
    directory, whole = output_dir / "clean", output_dir / "unsplit"
    clean([dump], whole, blocked_phrases=phrases)
    make_base_model(read_conversations(whole / "conversations.jsonl"), output_dir / "base")
    shutil.rmtree(whole)
    base = str(output_dir / "base")
    report = clean([dump], directory, blocked_phrases=phrases, max_tokens=SEQ_LEN, model=base, overlong="reject")
    print_ledger(report, Console())
    return report


def train_model(output_dir: Path) -> None:
    """Train the base model on the clean conversations, as `fastft train` does."""
    from fastft.train.loop import main as train

    data = output_dir / "clean" / "conversations.jsonl"
    arguments = ["--model", str(output_dir / "base"), "--data", str(data), "--output_dir", str(output_dir)]
    if train([*arguments, "--seq_len", str(SEQ_LEN), *TRAINING]):
        raise UserError("the training did not finish; the line above says why")


def make_base_model(conversations: Iterable[Conversation], path: Path) -> None:
    """Train a tokenizer on the conversations and save it with a small random Llama, as a model directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from fastft.data.template.chat_template import template_for

    logging.disable_progress_bar()
    tokenizer = train_tokenizer(m.content for c in conversations for m in c.messages)
    tokenizer.chat_template = template_for(tokenizer, "chatml").source
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id, dtype="float32", **MODEL
    )
    LlamaForCausalLM(config).save_pretrained(path)


def train_tokenizer(texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer, like GPT-2's, with ChatML's control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def ask_all(model: Path, questions: list[str], max_new_tokens: int) -> list[str]:
    """Print each question with its answer, token by token, and return the answers."""
    from fastft.inference.engine import ChatModel
    from fastft.inference.terminal import printable

    chat, answers = ChatModel(str(model)), []
    for question in questions:
        print(f"\n> {question}")
        pieces = []
        for piece in chat.stream([Message("user", question)], max_new_tokens):
            pieces.append(piece)
            print(printable(piece), end="", flush=True)
        print()
        answers.append("".join(pieces))
    return answers


def write_html(output_dir: Path, report: "Report", questions: list[str], before: list[str], after: list[str]) -> None:
    """Write the demo's page, OUTPUT_DIR/report.html."""
    import yaml

    from fastft.demo.report import write_report
    from fastft.train.report.metrics import read_metrics

    samples = [{"question": q, "before": b, "after": a} for q, b, a in zip(questions, before, after)]
    write_report(
        output_dir / "report.html",
        title="fastft demo",
        ledger=asdict(report),
        metrics=read_metrics(output_dir / "metrics.jsonl"),
        samples=samples,
        settings=yaml.safe_load((output_dir / "config.yaml").read_text()),
        files={name.rstrip("/"): str(output_dir / name) for name in FILES if name != "report.html"},
    )


def heading(text: str) -> None:
    """Print the name of a stage, bold in a terminal."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}")


if __name__ == "__main__":
    run_module(main)
