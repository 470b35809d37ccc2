"""TODO docstring of fastft.data.inspect."""

import argparse
import sys
from collections import Counter
from itertools import islice

from fastft.data.conversation import read_conversations
from fastft.data.template.chat_template import ChatTemplate, Encoded, load_template
from fastft.data.template.mask_check import check
from fastft.errors import UserError

SHOWN_FAULTS = 10  # lines printed of a file with faults; the counts are always whole


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastft inspect", description="Show which tokens are trained, or prove the mask."
    )
    parser.add_argument("data", help="a file of conversations")
    parser.add_argument("--model", required=True, help="directory or Hub name; only its tokenizer is loaded")
    parser.add_argument("--template", help="built-in name or .jinja file (default: the tokenizer's own)")
    parser.add_argument("-n", type=int, default=3, help="conversations to show (default 3)")
    parser.add_argument("--check", action="store_true", help="prove the mask over the whole file")
    options = parser.parse_args(argv)
    template = load_template(options.model, options.template)
    if options.check:
        return check_file(options.data, template)
    show_file(options.data, template, options.n)
    return 0


def show_file(path: str, template: ChatTemplate, count: int) -> None:
    """Print the first `count` conversations in colour."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(
        Text.assemble(("trained", TRAINED), "  ", ("not trained", UNTRAINED), "  ", ("control token", "bold"))
    )
    for conversation in islice(read_conversations(path), count):
        encoded = template.encode(conversation.messages)
        title = f"{conversation.id}  {len(encoded.ids)} tokens, {sum(encoded.trained)} trained"
        if encoded.merged_boundaries:
            title += f", {encoded.merged_boundaries} boundaries where the answer's own tokens won"
        console.rule(Text(title), align="left")
        console.print(coloured(encoded, template), soft_wrap=True)


TRAINED, UNTRAINED = "black on green", "dim"


def coloured(encoded: Encoded, template: ChatTemplate):
    """The tokens as rich text; bytes of a character that several tokens share are shown with the last of them."""
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
    """Prove the mask of every conversation; print the counts. Returns 1 when anything is off."""
    from rich.console import Console
    from rich.table import Table

    counts, faults = Counter(), Counter()
    for conversation in read_conversations(path):
        counts["conversations"] += 1
        try:
            encoded = template.encode(conversation.messages)
        except UserError as error:
            found = [("cannot be encoded", str(error))]
        else:
            counts["tokens"] += len(encoded.ids)
            counts["trained tokens"] += sum(encoded.trained)
            counts["answers trained"] += sum(m.train for m in conversation.messages)
            unfinished = sum(m.train and not m.ends for m in conversation.messages)
            counts["answers trained without their end of turn"] += unfinished
            counts["boundaries where the answer's own tokens won"] += encoded.merged_boundaries
            found = list(check(conversation, encoded, template))
        for kind, detail in found:
            faults[kind] += 1
            if sum(faults.values()) <= SHOWN_FAULTS:
                print(f"{conversation.id}: {kind}: {detail}", file=sys.stderr)
    table = Table(title=f"{path} under {template.name}", title_justify="left", show_header=False)
    for name, number in [*counts.items(), *((f"FAULT: {kind}", number) for kind, number in faults.items())]:
        table.add_row(name, f"{number:,}")
    Console().print(table)
    if not counts["conversations"]:
        raise UserError(f"{path}: holds no conversation")
    print("the mask is off" if faults else "the mask is proven: every check passed")
    return 1 if faults else 0
