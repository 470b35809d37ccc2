"""TODO docstring of fastft.inference.terminal."""

import argparse
import sys
import unicodedata

from fastft.data.conversation import Message
from fastft.errors import UserError
from fastft.inference.engine import ChatModel


def printable(text: str) -> str:
    """The text without what could command a terminal: a model can say anything, escape sequences too.

    Joiners (in emoji and in Persian) stay; control characters, surrogates and changes of writing direction go.
    """
    return "".join("\N{REPLACEMENT CHARACTER}" if _commands(c) else c for c in text)


def _commands(character: str) -> bool:
    changes_direction = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return changes_direction or (unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastft chat", description="Talk to a model in the terminal.")
    parser.add_argument(
        "--model", required=True, help="a model directory (fastft train leaves one in OUTPUT_DIR/model)"
    )
    parser.add_argument("--template", help="built-in name or .jinja file (default: the tokenizer's own)")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token (default)")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    options = parser.parse_args(argv)
    model = ChatModel(options.model, options.template)
    print(f"{options.model} on {model.device}. /reset forgets, /quit leaves.")
    system = [Message("system", options.system)] if options.system else []
    history: list[Message] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return 0
        if line.strip() == "/quit":
            return 0
        if line.strip() == "/reset":
            history.clear()
            print("(forgotten)")
        elif line.strip() in ("/", "/help"):
            print("(commands: /reset, /quit)")
        elif line.strip():
            _answer(model, system, history, line, options)


def _answer(model: ChatModel, system: list[Message], history: list[Message], line: str, options) -> None:
    """Print the answer as it comes and keep the round; a round that failed or was empty is not kept."""
    history.append(Message("user", line))
    pieces: list[str] = []
    try:
        for piece in model.stream([*system, *history], options.max_new_tokens, options.temperature):
            pieces.append(piece)
            print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        pass
    except UserError as error:
        print(f"({error})", end="")
        pieces.clear()
    print()
    if pieces:
        history.append(Message("assistant", "".join(pieces)))
    else:
        history.pop()
