"""Show which tokens are trained, or prove the loss mask of a whole file.

    fastft inspect DATA --model MODEL -n 3       # conversations in colour: trained tokens, others, control tokens
    fastft inspect DATA --model MODEL --check    # every check of fastft.data.template.mask_check on every conversation

With `--check` the counts of the file are printed, and the exit code is 1 if anything is wrong.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from fastft.common.command_line import option, parse, run_module
from fastft.data.conversation import Conversation, read_conversations
from fastft.data.template.chat_template import ChatTemplate, Encoded, load_template
from fastft.data.template.mask_check import check
from fastft.errors import UserError

if TYPE_CHECKING:
    from rich.text import Text

logger = logging.getLogger(__name__)

SHOWN_FAULTS = 10  # faults of a file that are described; the counts include all of them
TRAINED, UNTRAINED = "black on green", "dim"


@dataclass
class InspectConfig:
    data: str = option(positional=True)
    """A file of conversations."""
    model: str
    """A model's directory or its name on the Hub; only the tokenizer is loaded."""
    template: str | None = None
    """The name of a built-in chat template, or a .jinja file; the default is the tokenizer's own."""
    count: int = option(3, short="-n")
    """How many conversations to show."""
    check: bool = False
    """Prove the loss mask of the whole file instead."""


def main(argv: Sequence[str]) -> int:
    """The verb `fastft inspect`. Returns the exit code: 1 when the mask of any conversation is wrong."""
    [config] = parse(argv, "fastft inspect", "Show which tokens are trained, or prove the loss mask.", InspectConfig)
    if config.count < 1:
        raise UserError(f"-n {config.count}: give the number of conversations to show, at least 1")
    template = load_template(config.model, config.template)
    if config.check:
        return check_file(config.data, template)
    show_file(config.data, template, config.count)
    return 0


def show_file(path: str, template: ChatTemplate, count: int) -> None:
    """Print the first `count` conversations in colour. Raises UserError if there is none, or one cannot be encoded."""
    from rich.console import Console
    from rich.text import Text

    conversations = list(islice(read_conversations(path), count))
    if not conversations:
        raise UserError(f"{path}: holds no conversation")
    shown = [(conversation, template.encode(conversation.messages)) for conversation in conversations]
    console = Console(highlight=False)
    console.print(
        Text.assemble(("trained", TRAINED), "  ", ("not trained", UNTRAINED), "  ", ("control token", "bold"))
    )
    for conversation, encoded in shown:
        title = f"{conversation.id}  {len(encoded.ids)} tokens, {sum(encoded.trained)} trained"
        if encoded.kept_boundaries:
            title += f", {encoded.kept_boundaries} boundaries where the answer's own tokens won"
        console.rule(Text(title), align="left")
        console.print(coloured(encoded, template), soft_wrap=True)


def coloured(encoded: Encoded, template: ChatTemplate) -> "Text":
    """Return the tokens as rich text. A character whose bytes are several tokens is shown with the last of them."""
    from rich.text import Text

    control = {template.tokenizer.convert_tokens_to_ids(t) for t in template.control_tokens}
    text, pending = Text(), []
    for i, (token, trained) in enumerate(zip(encoded.ids, encoded.trained)):
        pending.append(token)
        shown = template.tokenizer.decode(pending, skip_special_tokens=False)
        if "\ufffd" in shown and i + 1 < len(encoded.ids) and len(pending) < 4:
            continue
        style = (TRAINED if trained else UNTRAINED) + (" bold" if token in control else "")
        text.append(shown, style)
        pending = []
    return text


def check_file(path: str, template: ChatTemplate) -> int:
    """Prove the loss mask of every conversation and print the counts. Returns 1 when anything is wrong, else 0.

    Raises UserError when the file cannot be read or holds no conversation.
    """
    from rich.console import Console
    from rich.table import Table

    counts, faults = Counter(), Counter()
    for conversation in read_conversations(path):
        for kind, detail in _faults(conversation, template, counts):
            faults[kind] += 1
            if sum(faults.values()) <= SHOWN_FAULTS:
                logger.error("%s: %s: %s", conversation.id, kind, detail)
    if not counts["conversations"]:
        raise UserError(f"{path}: holds no conversation")
    table = Table(title=f"{path} under {template.name}", title_justify="left", show_header=False)
    for name, number in [*counts.items(), *((f"FAULT: {kind}", number) for kind, number in faults.items())]:
        table.add_row(name, f"{number:,}")
    Console().print(table)
    print("the mask is off" if faults else "the mask is proven: every check passed")
    return 1 if faults else 0


def _faults(conversation: Conversation, template: ChatTemplate, counts: Counter) -> list[tuple[str, str]]:
    """Return (kind, detail) of everything that is wrong with a conversation's tokens. Counts the tokens in `counts`."""
    counts["conversations"] += 1
    try:
        encoded = template.encode(conversation.messages)
    except UserError as error:
        return [("cannot be encoded", str(error))]
    counts["tokens"] += len(encoded.ids)
    counts["trained tokens"] += sum(encoded.trained)
    messages = conversation.messages
    counts["answers trained"] += sum(m.train for m in messages)
    if skipped := sum(m.role == "assistant" and not m.train for m in messages):
        counts["answers that the file marks as not to be learned"] += skipped
    counts["answers trained without their end of turn"] += sum(m.train and not m.ends for m in messages)
    counts["boundaries where the answer's own tokens won"] += encoded.kept_boundaries
    return list(check(conversation, encoded, template))


if __name__ == "__main__":
    run_module(main)
