"""The whole road on a small dump that ships with the package: `fastft demo`.

Cleans 210 raw records written for this purpose (fastft/demo/make_dump.py), trains a tokenizer and a Llama of about 2
million parameters from scratch on what is left, and asks three questions before and after. No network, two CPU cores,
under three minutes. A model this small on a dump this small learns by heart: that is what the questions show. What a
real run does differently is the model it starts from and the GPUs; the stages are these.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from fastft.data.conversation import Message, read_conversations
from fastft.errors import UserError

HERE = Path(__file__).parent
WINDOW = 512  # tokens in a packed row: the dump's longest dialogue but one fits, and one must be split
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
# One row a step: with four, 14 epochs end at a loss of 5; with one, at 0.2. What counts here is the number of steps.
TRAINING = [
    "--epochs", "16", "--global_batch_size", "1", "--optimizer.lr", "1.5e-3", "--optimizer.betas", "[0.9,0.95]",
    "--gradient_checkpointing", "false", "--checkpoint.every", "0", "--log_every", "5",
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastft demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", default="runs/demo", help="replaced if it exists (default runs/demo)")
    options = parser.parse_args(argv)
    output_dir = Path(options.output_dir)
    if output_dir.exists() and not (output_dir / MADE_BY_DEMO).exists():
        print(f"error: {output_dir} exists and is not a demo's; choose another --output_dir", file=sys.stderr)
        return 1
    run(output_dir)
    return 0


MADE_BY_DEMO = ".demo"  # a file that says the directory may be replaced


def run(output_dir: Path) -> None:
    """Every stage in order, into `output_dir`, which is made anew."""
    began = time.time()
    # Two threads are a third faster while the machine is idle, and five times slower once it is not: they wait in a loop.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True)
    (output_dir / MADE_BY_DEMO).touch()
    os.environ.setdefault("FASTFT_CACHE", str(output_dir / "cache"))
    questions = json.loads((HERE / "questions.json").read_text())

    heading("1. Clean the raw dump")
    report = clean_dump(output_dir)

    heading("2. A model to start from: random weights, the dump's own tokenizer")
    before = ask_all(output_dir / "base", questions, max_new_tokens=32)

    heading("3. Train")
    from fastft.train.loop import main as train

    data, model = output_dir / "clean" / "conversations.jsonl", output_dir / "model"
    arguments = ["--model", str(output_dir / "base"), "--data", str(data), "--output_dir", str(output_dir)]
    if train([*arguments, "--seq_len", str(WINDOW), *TRAINING]):
        raise UserError("the training did not finish; the line above says why")

    heading("4. The same questions, after training")
    after = ask_all(model, questions, max_new_tokens=300)
    print("\nThese answers are learned by heart from the dump; a model of 2 million parameters can do no more.")

    write_html(output_dir, report, questions, before, after)
    heading(f"Done in {time.time() - began:.0f} s. What it left")
    for name, what in FILES.items():
        print(f"  {output_dir / name!s:<36} {what}")
    print(f"\nTalk to it:  fastft chat --model {model}")


FILES = {
    "clean/conversations.jsonl": "the clean conversations",
    "clean/rejected.jsonl": "what was rejected, and why",
    "clean/report.json": "the ledger: input = kept + rejected",
    "clean/report.html": "the same with examples, on a page",
    "metrics.jsonl": "loss, learning rate, tokens/s of every step",
    "tensorboard/": "the same for TensorBoard",
    "config.yaml": "the training's configuration",
    "model/": "the model in Hugging Face's format",
    "report.html": "all of it on one page",
}


def clean_dump(output_dir: Path):
    """Clean twice: without splitting, for text to train a tokenizer on; then, with it, for the parts. Returns the report.

    Someone with a model has its tokenizer and cleans once.
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
    report = clean([dump], directory, blocked_phrases=phrases, max_tokens=WINDOW, model=base, overlong="reject")
    print_ledger(report, Console())
    return report


def make_base_model(conversations: Iterable, path: Path) -> None:
    """Train a tokenizer on the conversations and save it with a small random Llama, as a model directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from fastft.data.template.chat_template import chat_template

    logging.disable_progress_bar()
    tokenizer = train_tokenizer(m.content for c in conversations for m in c.messages)
    tokenizer.chat_template = chat_template(tokenizer, "chatml").source
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id, dtype="float32", **MODEL
    )
    LlamaForCausalLM(config).save_pretrained(path)


def train_tokenizer(texts: Iterable[str]):
    """A byte-level BPE tokenizer (as GPT-2's) with ChatML's control tokens."""
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
    """Stream the answers to the terminal; return them."""
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


def write_html(output_dir: Path, report, questions: list[str], before: list[str], after: list[str]) -> None:
    from dataclasses import asdict

    import yaml

    from fastft.demo.report import write_report
    from fastft.train.metrics import read_metrics

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
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}")
