"""Rounds that splitting loses, ours beside FastChat's, on a sample of ShareGPT V3 in $FASTFT_DATA (default: data/).

    pip install --target DIR --no-deps fschat==0.2.36
    python benchmarks/split.py --fastchat DIR

The tokenizer is a byte-level BPE of 32,000 trained on the sample, the template Vicuna's. FastChat's splitter counts a turn's
tokens and six more; its parts are not counted again here. A round is lost if its answer is in no part; a round whose answer
is in the parts after a question without its middle is counted as shortened.
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastft.common.command_line import parse, run
from fastft.data.conversation import Conversation, read_conversations, rounds_of
from fastft.data.split import split_conversation, token_counter
from fastft.errors import UserError

DATA = Path(os.environ.get("FASTFT_DATA", "data")) / "chats"


@dataclass
class SplitBenchmark:
    """Options of this benchmark."""

    fastchat: Path | None = None
    """Where fschat is installed, to run FastChat's splitter, too."""


def train_tokenizer(conversations: list[Conversation], directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]
    )
    tokenizer.train_from_iterator((m.content for c in conversations for m in c.messages), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)


def whole_dialogues(path: Path) -> list[Conversation]:
    """The conversations of whole rounds, question and answer in turns."""
    found = []
    for conversation in read_conversations(path):
        lead, rounds = rounds_of(conversation.messages)
        if rounds and not lead and all([m.role for m in each] == ["user", "assistant"] for each in rounds):
            found.append(conversation)
    return found


def ours(conversations: list[Conversation], limit: int, tokenizer: Path) -> tuple[int, int]:
    """(rounds lost, rounds with a shortened question)."""
    count, most, _ = token_counter(str(tokenizer), "vicuna")
    lost = shortened = 0
    for conversation in conversations:
        parts, over, short = split_conversation(conversation, limit, count, most)
        assert all(count(part.messages) <= limit for part in parts)
        lost, shortened = lost + len(over), shortened + len(short)
    return lost, shortened


def fastchats(conversations: list[Conversation], limit: int, tokenizer: Path) -> int:
    from fastchat.data import split_long_conversation
    from transformers import AutoTokenizer

    split_long_conversation.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    split_long_conversation.max_length = limit
    lost = 0
    for conversation in conversations:
        turns = [{"from": m.role, "value": m.content} for m in conversation.messages]
        parts = split_long_conversation.split_one_sample({"id": "", "conversations": turns})
        lost += len(turns) // 2 - sum(len(part["conversations"]) // 2 for part in parts)
    return lost


def main() -> None:
    [options] = parse(sys.argv[1:], "benchmarks/split.py", __doc__.splitlines()[0], SplitBenchmark)
    if not DATA.is_dir():
        raise UserError(f"{DATA}: no such directory; set FASTFT_DATA to the directory that holds chats/")
    conversations = whole_dialogues(DATA / "sharegpt_v3_sample.json")
    rounds = sum(len(c.messages) // 2 for c in conversations)
    table = Table(title=f"{len(conversations):,} conversations, {rounds:,} rounds", title_justify="left")
    for column in ("limit", "lost by FastChat", "lost by fastft", "question shortened"):
        table.add_column(column, justify="right")
    if options.fastchat:
        sys.path.insert(0, str(options.fastchat))
    with tempfile.TemporaryDirectory() as name:
        train_tokenizer(conversations, Path(name))
        for limit in (2048, 512):
            lost, shortened = ours(conversations, limit, Path(name))
            theirs = fastchats(conversations, limit, Path(name)) if options.fastchat else None
            shown = "not run" if theirs is None else f"{theirs:,} = {theirs / rounds:.1%}"
            table.add_row(f"{limit:,}", shown, f"{lost:,} = {lost / rounds:.1%}", f"{shortened:,}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(run(main))
