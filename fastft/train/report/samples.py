"""Ask the model fixed prompts while it learns, and write its greedy answers to OUTPUT_DIR/samples.jsonl, a line for each.

    fastft train … --samples.prompts prompts.txt --samples.every 200

All prompts are in one packed row, each followed by room for its answer, and every forward pass writes the next token of each
answer. This is the forward pass of training itself, so it works on sharded models and with every attention backend, and its
shapes never change. Every process runs the same passes. There is no cache, so an answer of n tokens costs n passes. Nothing
random is drawn and no gradient is computed, so samples do not change a run by a single bit.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastft.common.files import room_for
from fastft.config import SamplesConfig, TrainConfig
from fastft.data.conversation import Message, parse_conversation
from fastft.data.template.chat_template import ChatTemplate
from fastft.errors import UserError
from fastft.model.build import TrainedModel, uncompiled
from fastft.train.report.metrics import cut_after


@dataclass
class Prompt:
    """A prompt of the file."""

    text: str
    """The text to show with its answer."""
    ids: list[int]
    """Its tokens, with the generation prompt."""


class Sampler:
    """Asks the prompts of a run and writes the answers. After an interruption the file continues as if nothing had
    happened."""

    def __init__(self, config: TrainConfig, template: ChatTemplate):
        """Read the prompts. Raises UserError as `read_prompts` does."""
        self.config, self.template = config.samples, template
        self.prompts = read_prompts(config.samples, template, config.seq_len)

    def open(self, output_dir: Path, start_step: int) -> None:
        """Write to `output_dir` from now on. Earlier answers after `start_step` are removed from the file.

        `start_step` is the step of the checkpoint from which the run continues, 0 for a new run.
        """
        self.path = output_dir / "samples.jsonl"
        if dist.get_rank() == 0:
            cut_after(self.path, start_step)

    def is_due(self, step: int, total: int) -> bool:
        """Whether to ask after `step` of `total`."""
        return bool(self.prompts) and (step % self.config.every == 0 or step == total)

    def ask(self, model: TrainedModel, step: int, device: torch.device) -> None:
        """Ask all prompts, and write the answers on rank 0; collective."""
        found = answers(model, self.prompts, self.config.max_new_tokens, self.template, device)
        if dist.get_rank() == 0:
            rows = [{"step": step, "prompt": p.text, "answer": answer} for p, answer in zip(self.prompts, found)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            with room_for(self.path, len(lines)), self.path.open("a") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())


def read_prompts(config: SamplesConfig, template: ChatTemplate, seq_len: int) -> list[Prompt]:
    """Read the prompts of the file, if one is given. Raises UserError for a line that is no prompt or does not fit."""
    if config.prompts is None:
        return []
    try:
        lines = Path(config.prompts).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"samples.prompts: {config.prompts}: cannot be read ({error})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"samples.prompts: {config.prompts}: line {number}"
            messages = _messages(line, where)
            ids = template.encode_prompt(messages)
            if len(ids) + config.max_new_tokens > seq_len:
                raise UserError(
                    f"{where}: {len(ids)} tokens and {config.max_new_tokens} for the answer are more than the sequence length "
                    f"of {seq_len}; shorten it, or lower samples.max_new_tokens"
                )
            text = "\n\n".join(m.content if m.role == "user" else f"[{m.role}] {m.content}" for m in messages)
            found.append(Prompt(text, ids))
    if not found:
        raise UserError(f"samples.prompts: {config.prompts}: holds no prompt")
    return found


def _messages(line: str, where: str) -> list[Message]:
    """The messages of a line: its text as a user's message, or those of its JSON object.

    Raises UserError if the object holds none, or if the last is not a user's.
    """
    if not line.lstrip().startswith("{"):
        return [Message("user", line.strip())]
    try:
        record = json.loads(line)
    except ValueError:  # JSONDecodeError, or a number of more than 4,300 digits
        record = {}
    if "prompt" in record:
        record = {"messages": [{"role": "user", "content": record["prompt"]}]}
    elif "messages" not in record:
        raise UserError(f"{where}: is no JSON object with prompt or messages")
    messages = parse_conversation(record, where).messages
    if not messages or messages[-1].role != "user":
        raise UserError(f"{where}: its messages do not end with a message of the user")
    return messages


@torch.no_grad()
def answers(
    model: TrainedModel, prompts: list[Prompt], max_new_tokens: int, template: ChatTemplate, device: torch.device
) -> list[str]:
    """Generate the model's greedy answers, up to the end of turn or `max_new_tokens`; collective."""
    row = _lay_out(prompts, max_new_tokens, device)
    ends = row.pop("ends")
    model.eval()
    with uncompiled():
        for n in range(max_new_tokens):
            row["input_ids"][0, ends + n] = model.likeliest(ends + n - 1, **row)
    model.train()
    model.reshard()
    written = [row["input_ids"][0, end : end + max_new_tokens].tolist() for end in ends.tolist()]
    return [_text(ids, template) for ids in written]


def _lay_out(prompts: list[Prompt], room: int, device: torch.device) -> dict[str, Any]:
    """Lay the prompts into one row, with `room` tokens after each.

    Returns the arguments of TrainedModel.likeliest, and `ends`, int64 [prompts]: the positions after the prompts, where their
    answers begin.
    """
    lengths = [len(prompt.ids) + room for prompt in prompts]
    begins = [sum(lengths[:i]) for i in range(len(prompts) + 1)]
    ids = [token for prompt in prompts for token in (*prompt.ids, *[0] * room)]
    positions = [position for length in lengths for position in range(length)]
    as_row = lambda values: torch.tensor(values, device=device)[None]  # noqa: E731
    return {
        "input_ids": as_row(ids),
        "position_ids": as_row(positions),
        "cu_seqlens": torch.tensor(begins, dtype=torch.int32, device=device),
        "max_seqlen": max(lengths),
        "ends": torch.tensor([begin + len(prompt.ids) for begin, prompt in zip(begins, prompts)], device=device),
    }


def _text(ids: list[int], template: ChatTemplate) -> str:
    """The text of an answer, up to its first stop token."""
    stop = next((i for i, token in enumerate(ids) if token in template.stop_token_ids), len(ids))
    text = template.tokenizer.decode(ids[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.removeprefix(template.separator)
